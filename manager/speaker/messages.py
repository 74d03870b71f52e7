"""What manager and speaker container say to each other: one JSON object a line.

Both ends decode strictly. The manager's `Hello` comes first; the speaker answers with what it knows
of the sessions and then with `Held` parts (the last one marked) or `Paused`. A second manager
connection replaces the first.
"""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address
from typing import Final

import msgspec

from lbctl.core import exabgp
from lbctl.core.announce import Held
from lbctl.core.exabgp import Command, Verb
from lbctl.core.model import Peer
from lbctl.errors import MessageError, SpeakerError

VERSION: Final = 4
MAX_LINE: Final = 1 << 20
MANAGER_SOCKET: Final = "manager.sock"
RELAY_SOCKET: Final = "relay.sock"


class Message(msgspec.Struct, frozen=True, tag_field="op"):
    """Any message."""


class Hello(Message, frozen=True, tag="hello"):
    """Manager: who speaks, and in which version."""

    manager: str
    version: int = VERSION


class Keys(Message, frozen=True, tag="keys"):
    """Manager: the managers' keys, to tell other managers' heartbeats from noise."""

    ring: str  # `KeyRing.to_text` of the managers' keys


class PeerEntry(msgspec.Struct, frozen=True):
    """A `Peer`, as text."""

    name: str
    address: str
    asn: int
    local_asn: int
    port: int
    hold_time_s: int
    local_address: str | None
    router_id: str | None
    multihop: int | None
    password: str | None
    graceful_restart_s: int | None
    keep_password: bool  # the manager does not know it now: the speaker's is to stay


class Peers(Message, frozen=True, tag="peers"):
    """Manager: all peers that there shall be."""

    peers: list[PeerEntry]


class Run(Message, frozen=True, tag="run"):
    """Manager: one command for ExaBGP."""

    id: int
    generation: int  # of the `HeldPart`s that it was planned upon; the speaker drops older ones
    verb: Verb
    peers: list[str]
    attributes: str
    prefixes: list[str]


class Flush(Message, frozen=True, tag="flush"):
    """Manager: a barrier."""

    id: int


class EndOfRib(Message, frozen=True, tag="end"):
    """Manager: these peers (addresses) have all that is wanted, on the wire."""

    generation: int  # as in `Run`
    peers: list[str]


class Ping(Message, frozen=True, tag="ping"):
    """Manager: I work. `others`: another replica announces."""

    others: bool


class HeldEntry(msgspec.Struct, frozen=True, array_like=True):
    """Part of the ledger."""

    peer: str
    attributes: str
    sure: bool
    prefixes: list[str]


class HeldPart(Message, frozen=True, tag="held"):
    """Speaker: part of what ExaBGP holds; the first part after another message starts anew."""

    entries: list[HeldEntry]
    generation: int
    last: bool


class Paused(Message, frozen=True, tag="paused"):
    """Speaker: ExaBGP or its relay is gone for a moment."""


class Done(Message, frozen=True, tag="done"):
    """Speaker: ExaBGP's answer to `Run`."""

    id: int
    ok: bool


class Flushed(Message, frozen=True, tag="flushed"):
    """Speaker: the answer to `Flush`: which peers have all of it on the wire."""

    id: int
    peers: dict[str, bool]


class SessionState(Message, frozen=True, tag="session"):
    """Speaker: a session as it is now. `agreed`: None while nothing was ever negotiated."""

    peer: str
    up: bool
    agreed: tuple[tuple[int, bool], ...] | None
    detail: str


class Problems(Message, frozen=True, tag="problems"):
    """Speaker: what keeps it from running some peer, by peer name. Empty: nothing (any more)."""

    problems: dict[str, str]


FromManager = Hello | Keys | Peers | Run | Flush | EndOfRib | Ping
FromSpeaker = HeldPart | Paused | Done | Flushed | SessionState | Problems

_encoder = msgspec.json.Encoder()
_from_manager: msgspec.json.Decoder[FromManager] = msgspec.json.Decoder(FromManager)
_from_speaker: msgspec.json.Decoder[FromSpeaker] = msgspec.json.Decoder(FromSpeaker)


def encode(message: Message) -> bytes:
    """A message as one line."""
    return _encoder.encode(message) + b"\n"


def decode_from_manager(line: bytes) -> FromManager:
    """A line that a manager sent; MessageError if it is not what the protocol says."""
    try:
        return _from_manager.decode(line)
    except msgspec.MsgspecError as error:
        raise MessageError(f"the manager sent what the protocol does not have: {error}") from error


def decode_from_speaker(line: bytes) -> FromSpeaker:
    """A line that a speaker sent; MessageError if it is not what the protocol says."""
    try:
        return _from_speaker.decode(line)
    except msgspec.MsgspecError as error:
        raise MessageError(f"the speaker sent what the protocol does not have: {error}") from error


def from_peer(peer: Peer) -> PeerEntry:
    """A checked peer as text; SpeakerError if it is not valid."""
    exabgp.check_peer(peer)
    return PeerEntry(
        peer.name,
        str(peer.address),
        peer.asn,
        peer.local_asn,
        peer.port,
        peer.hold_time_s,
        None if peer.local_address is None else str(peer.local_address),
        None if peer.router_id is None else str(peer.router_id),
        peer.multihop,
        peer.password,
        peer.graceful_restart_s,
        peer.keep_password,
    )


def check_peer(peer: Peer) -> Peer:
    """The peer as it came; SpeakerError if it is not valid."""
    return exabgp.check_peer(peer)


def from_command(id: int, generation: int, command: Command) -> Run:
    """A command to send."""
    return Run(
        id,
        generation,
        command.verb,
        list(command.peers),
        command.attributes,
        list(command.prefixes),
    )


def to_peer(entry: PeerEntry) -> Peer:
    """The peer, checked again; MessageError if it is not valid."""
    try:
        local = None if entry.local_address is None else ip_address(entry.local_address)
        return exabgp.check_peer(
            Peer(
                entry.name,
                ip_address(entry.address),
                entry.asn,
                entry.local_asn,
                entry.port,
                entry.hold_time_s,
                local,
                None if entry.router_id is None else IPv4Address(entry.router_id),
                entry.multihop,
                entry.password,
                entry.graceful_restart_s,
                entry.keep_password,
            )
        )
    except (ValueError, SpeakerError) as error:
        raise MessageError(f"the manager sent a peer that is not valid: {error}") from error


def to_command(run: Run) -> Command:
    """The command, checked again; MessageError if it is not valid."""
    return exabgp.check_command(
        Command(run.verb, tuple(run.peers), run.attributes, tuple(run.prefixes))
    )


def to_held(entry: HeldEntry) -> Held:
    """An entry of the ledger."""
    return Held(entry.peer, entry.attributes, tuple(entry.prefixes), entry.sure)
