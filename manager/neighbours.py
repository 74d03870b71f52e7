"""The BGP neighbours of a configuration, with the passwords that their Secrets hold.

Rules: passwords are read from this namespace's Secrets, key `password`. A peer whose Secret is not
there is left out and named, never spoken to without its password; one whose Secret vanishes later
keeps the password it had (fail static). Before the Secrets have been listed, as after a restart
while the API server is away, only the speaker may still know it: it is asked to keep that.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address

import structlog

from lbctl.core.config import PeerConfig
from lbctl.core.model import Address, ObjectRef, Peer
from lbctl.kube.objects import DataObject
from manager.configuration import Accepted

_log = structlog.get_logger()


class Neighbours:
    """Makes `Peer`s. address: this manager's own, from which a router id is taken by default."""

    def __init__(
        self,
        secrets: Mapping[ObjectRef, DataObject],
        listed: Callable[[], bool],
        namespace: str,
        address: Address | None,
    ) -> None:
        self._secrets = secrets
        self._listed = listed
        self._namespace = namespace
        self._router_id = address if isinstance(address, IPv4Address) else None
        self._passwords: dict[str, str] = {}
        self._made: tuple[tuple[object, ...], tuple[Peer, ...]] | None = None
        self.missing: dict[str, str] = {}  # peer name → what it lacks

    def peers(self, accepted: Accepted) -> tuple[Peer, ...]:
        """All neighbours that can be spoken to, in the order of the configuration."""
        wanted = accepted.config.bgp.peers
        stored = tuple(self._secret(peer.password_secret) for peer in wanted)
        facts = (accepted, self._listed(), *stored)
        if self._made is not None and self._made[0] == facts:
            return self._made[1]
        self.missing = {}
        found = [self._peer(peer, accepted.config.bgp.asn) for peer in wanted]
        peers = tuple(peer for peer in found if peer is not None)
        self._made = (facts, peers)
        return peers

    def _secret(self, name: str | None) -> DataObject | None:
        return self._secrets.get(ObjectRef(self._namespace, name)) if name else None

    def _peer(self, peer: PeerConfig, local_asn: int) -> Peer | None:
        password: str | None = None
        keep = False
        if peer.password_secret is not None:
            password = self._password(peer.password_secret)
            keep = password is None and not self._listed()
            if password is None and not keep:
                self.missing[peer.name] = f"Secret {peer.password_secret} has no usable `password`"
                _log.error("peer_without_password", peer=peer.name, secret=peer.password_secret)
                return None
        return Peer(
            name=peer.name,
            address=peer.address,
            asn=peer.asn,
            local_asn=local_asn,
            port=peer.port,
            hold_time_s=peer.hold_time_s,
            local_address=peer.local_address,
            router_id=peer.router_id or self._router_id,
            multihop=peer.multihop,
            password=password,
            graceful_restart_s=peer.graceful_restart_s,
            keep_password=keep,
        )

    def _password(self, name: str) -> str | None:
        secret = self._secret(name)
        stored = secret.get("password") if secret is not None else None
        if stored is not None:
            try:
                text = base64.b64decode(stored, validate=True).decode("ascii").strip("\r\n")
            except (binascii.Error, ValueError):
                _log.error("password_unreadable", secret=name)
            else:
                # RFC 2385 has no limit, but Linux takes 80 bytes (TCP_MD5SIG_MAXKEYLEN).
                if 0 < len(text) <= 80 and text.isprintable():
                    self._passwords[name] = text
        return self._passwords.get(name)
