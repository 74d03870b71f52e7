"""ExaBGP 5.0.15 as text: its configuration, its API commands, and the lines that it answers.

Pure. Rules: every value is checked here, by type and by form, before it becomes text, so that
nothing that a user wrote can become syntax; peer names never reach ExaBGP at all, and passwords
only base64-encoded. A withdraw carries the announce's attributes, letter by letter, and one command
carries many prefixes of the same attributes (`announce attributes … nlri …`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

from lbctl.core.model import Address, Agreed, Network, Path, Peer
from lbctl.errors import MessageError, SpeakerError

PROCESS: Final = "lbctl"
BARRIER: Final = "lbctl-barrier"  # the API commands that manager.speaker.runner adds
END_OF_RIB: Final = "lbctl-end-of-rib"
MAX_PREFIXES: Final = 200
MAX_U32: Final = 2**32 - 1
MAX_PASSWORD: Final = 80  # RFC 2385 as Linux and FRR take it
MAX_RESTART_S: Final = 2**12 - 1  # RFC 4724
_FAMILIES: Final = {"ipv4 unicast": 4, "ipv6 unicast": 6}

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ARGUMENT: Final = re.compile(r"[A-Za-z0-9_./:=@+-]+")
_COMMUNITY: Final = re.compile(r"[0-9]{1,5}:[0-9]{1,5}")
_LARGE: Final = re.compile(r"[0-9]{1,10}:[0-9]{1,10}:[0-9]{1,10}")
_ATTRIBUTES: Final = re.compile(
    r"next-hop (?P<hop>[0-9a-f.:]+)"
    r"(?: path-information (?P<id>[0-9]{1,10}))?"
    r"(?: med (?P<med>[0-9]{1,10}))?"
    r"(?: community \[ (?P<community>[0-9: ]+) \])?"
    r"(?: large-community \[ (?P<large>[0-9: ]+) \])?"
)


class Verb(StrEnum):
    """What a command does to its routes."""

    ANNOUNCE = "announce"
    WITHDRAW = "withdraw"


@dataclass(frozen=True, slots=True)
class Command:
    """One API command: `prefixes` with `attributes` (of `attributes()`) for `peers` (addresses)."""

    verb: Verb
    peers: tuple[str, ...]
    attributes: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """`done` or `error`: the answer to the oldest command that has none yet."""

    ok: bool


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """A session changed. `agreed` is set by a `negotiated` event, `up` by the others."""

    peer: str
    up: bool | None = None
    agreed: Agreed | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BarrierAnswer:
    """What ExaBGP says of itself, in order with its acknowledgements.

    `flushed` maps a neighbour's address to whether all that ExaBGP has for it is on the wire (True
    too when the session is not established), `sessions` says what the sessions are, should an event
    have been lost. `reloads` counts configurations loaded, `failures` those refused.
    """

    nonce: str
    flushed: Mapping[str, bool]
    sessions: tuple[SessionEvent, ...]
    reloads: int
    failures: int


Answer = Acknowledged | SessionEvent | BarrierAnswer


def _integer(value: object, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise SpeakerError(f"{what} must be an integer from {low} to {high}")
    return value


def checked_address(value: object, what: str) -> str:
    """The canonical text of a unicast address without a zone; SpeakerError if it is none."""
    if not isinstance(value, IPv4Address | IPv6Address):
        raise SpeakerError(f"{what} must be an IP address")
    if value.is_unspecified or value.is_multicast:
        raise SpeakerError(f"{what} must be a unicast address")
    if isinstance(value, IPv6Address) and value.scope_id is not None:
        raise SpeakerError(f"{what} must not have a zone")
    return str(value)


def check_peer(peer: Peer) -> Peer:
    """The peer as it came, if all of it can be rendered safely; else SpeakerError (no secrets)."""
    if not isinstance(peer.name, str) or not _NAME.fullmatch(peer.name):
        raise SpeakerError(f"peer name {peer.name!r} must match {_NAME.pattern}")
    where = f"peer {peer.name}: "
    checked_address(peer.address, where + "address")
    _integer(peer.asn, 1, MAX_U32, where + "asn")
    _integer(peer.local_asn, 1, MAX_U32, where + "local asn")
    _integer(peer.port, 1, 65535, where + "port")
    _integer(peer.hold_time_s, 3, 65535, where + "hold time")
    if peer.local_address is not None:
        checked_address(peer.local_address, where + "local address")
        if peer.local_address.version != peer.address.version:
            raise SpeakerError(where + "local address must be of the peer's family")
    if peer.router_id is not None and (
        not isinstance(peer.router_id, IPv4Address) or peer.router_id.is_unspecified
    ):
        raise SpeakerError(where + "router id must be an IPv4 address")
    if peer.multihop is not None:
        _integer(peer.multihop, 1, 255, where + "multihop")
    if peer.graceful_restart_s is not None:
        _integer(peer.graceful_restart_s, 1, MAX_RESTART_S, where + "restart time")
    _check_password(peer.password, where)
    if peer.keep_password and peer.password is not None:
        raise SpeakerError(where + "password is there, and none is to be kept")
    return peer


def _check_password(password: object, where: str) -> None:
    if password is None:
        return
    if not isinstance(password, str) or not 1 <= len(password) <= MAX_PASSWORD:
        raise SpeakerError(f"{where}password must have 1 to {MAX_PASSWORD} characters")
    if not all(" " <= char <= "~" for char in password):
        raise SpeakerError(where + "password must be printable ASCII")


@lru_cache(maxsize=1 << 14)
def attributes(path: Path, identified: bool = True) -> str:
    """The attributes of a path as API text, with its path-id if `identified`; SpeakerError if bad.

    Without the path-id, a later announce of the prefix replaces this one, as a peer that did not
    agree ADD-PATH understands it (RFC 7911 section 5).
    """
    words = [f"next-hop {checked_address(path.next_hop, 'next hop')}"]
    path_id = _integer(path.path_id, 1, MAX_U32, "path id")
    if identified:
        words.append(f"path-information {path_id}")
    if path.med is not None:
        words.append(f"med {_integer(path.med, 0, MAX_U32, 'MED')}")
    plain = sorted({c for c in path.communities if c.count(":") == 1})
    large = sorted({c for c in path.communities if c.count(":") != 1})
    if plain:
        words.append(f"community [ {' '.join(_community(c) for c in plain)} ]")
    if large:
        words.append(f"large-community [ {' '.join(_large_community(c) for c in large)} ]")
    return " ".join(words)


def _community(text: str) -> str:
    if not _COMMUNITY.fullmatch(text) or any(int(part) > 65535 for part in text.split(":")):
        raise SpeakerError(f"community {text!r} must be N:N with 16-bit numbers")
    return text


def _large_community(text: str) -> str:
    if not _LARGE.fullmatch(text) or any(int(part) > MAX_U32 for part in text.split(":")):
        raise SpeakerError(f"community {text!r} must be N:N or N:N:N")
    return text


def prefix(value: object) -> str:
    """The canonical text of a prefix; SpeakerError if it is none."""
    if not isinstance(value, IPv4Network | IPv6Network):
        raise SpeakerError("prefix must be an IP network")
    return str(value)


@lru_cache(maxsize=1 << 15)
def _family(text: str) -> int:
    """The IP version of a prefix in canonical form; ValueError if it is not."""
    network = ip_network(text)
    if str(network) != text:
        raise ValueError(f"{text} is not canonical")
    return network.version


@lru_cache(maxsize=1 << 16)
def path_id(attributes_text: str) -> int | None:
    """The path-id in an attributes text, None if it has none."""
    words = attributes_text.split(" ", 4)
    return int(words[3]) if len(words) > 3 and words[2] == "path-information" else None


@lru_cache(maxsize=1 << 16)
def next_hop(attributes_text: str) -> str:
    """The next hop in an attributes text."""
    return attributes_text.split(" ", 2)[1]


@lru_cache(maxsize=1 << 16)
def host(address: str) -> Network:
    """The host route of an address."""
    return ip_network(address)


def check_attributes(text: object) -> str:
    """The text, if it is what `attributes()` makes; else MessageError."""
    match = _ATTRIBUTES.fullmatch(text) if isinstance(text, str) and text.isascii() else None
    if match is None or not isinstance(text, str):
        raise MessageError("attributes are not what this program writes")
    try:
        hop = ip_address(match["hop"])
        again = attributes(
            Path(
                hop,
                int(match["id"] or 1),
                "",
                (*(match["community"] or "").split(), *(match["large"] or "").split()),
                None if match["med"] is None else int(match["med"]),
            ),
            match["id"] is not None,
        )
    except (ValueError, SpeakerError) as error:
        raise MessageError(f"attributes are not valid: {error}") from error
    if again != text:
        raise MessageError("attributes are not in canonical form")
    return text


def check_command(command: Command) -> Command:
    """The command as it came, if it can be rendered safely; else MessageError."""
    check_attributes(command.attributes)
    if not command.peers or not 1 <= len(command.prefixes) <= MAX_PREFIXES:
        raise MessageError(f"a command has a peer and 1 to {MAX_PREFIXES} prefixes")
    version = ip_address(next_hop(command.attributes)).version
    try:
        for peer in command.peers:
            if checked_address(ip_address(peer), "peer") != peer:
                raise MessageError("peer is not in canonical form")
        for text in command.prefixes:
            if _family(text) != version:
                raise MessageError("prefix is not of the next hop's family")
    except (ValueError, SpeakerError) as error:
        raise MessageError(f"command is not valid: {error}") from error
    return command


def render(command: Command) -> str:
    """One line of ExaBGP's API, without the newline, from a checked command."""
    neighbors = " , ".join(f"neighbor {peer}" for peer in command.peers)
    nlri = " ".join(command.prefixes)
    return f"{neighbors} {command.verb} attributes {command.attributes} nlri {nlri}"


def render_barrier(nonce: str) -> str:
    """The barrier command. `nonce` (letters and digits) comes back in the answer."""
    if not nonce.isascii() or not nonce.isalnum():
        raise SpeakerError("a nonce is letters and digits")
    return f"{BARRIER} {nonce}"


def render_end_of_rib(peers: tuple[str, ...]) -> str:
    """Tell these that they have all: what is left from before a restart goes (RFC 4724)."""
    checked = [checked_address(ip_address(peer), "peer") for peer in peers]
    return f"{END_OF_RIB} {' '.join(checked)}"


def render_teardown(peer: str) -> str:
    """Close a session with Cease, Administrative Shutdown (RFC 4486)."""
    return f"neighbor {checked_address(ip_address(peer), 'peer')} teardown 2"


def render_config(
    peers: tuple[Peer, ...], local: Mapping[str, Address], run: tuple[str, ...]
) -> str:
    """ExaBGP's configuration file.

    `local` maps peer names to the address to speak from, for peers that do not set one; a peer with
    neither is an error. `run` is the command line of the API process. SpeakerError if any value is
    not safe, a peer occurs twice, or the command line has characters that ExaBGP would read.
    """
    for argument in run:
        if not _ARGUMENT.fullmatch(argument):
            raise SpeakerError(f"argument {argument!r} has characters that ExaBGP would interpret")
    addresses = [peer.address for peer in peers]
    if len(set(addresses)) != len(addresses):
        raise SpeakerError("two peers have the same address")
    blocks = [f"process {PROCESS} {{\n\trun {' '.join(run)};\n\tencoder json;\n}}\n"]
    for peer in sorted(peers, key=lambda peer: (peer.address.version, int(peer.address))):
        blocks.append(_neighbor(check_peer(peer), peer.local_address or local.get(peer.name)))
    return "\n".join(blocks)


def _neighbor(peer: Peer, local: Address | None) -> str:
    source = checked_address(local, f"peer {peer.name}: local address")
    lines = [
        f"router-id {peer.router_id or router_id(local)};",
        f"local-address {source};",
        f"local-as {peer.local_asn};",
        f"peer-as {peer.asn};",
        f"connect {peer.port};",
        f"hold-time {peer.hold_time_s};",
        "adj-rib-out true;",
        "adj-rib-in false;",
    ]
    if peer.multihop is not None:
        lines.append(f"outgoing-ttl {peer.multihop};")
    if peer.password is not None:
        encoded = base64.b64encode(peer.password.encode("ascii")).decode("ascii")
        lines += [f'md5-password "{encoded}";', "md5-base64 true;"]
    restart = "disable"
    if peer.graceful_restart_s is not None:
        restart = str(peer.graceful_restart_s)
        lines.append("manual-eor true;")
    lines += [
        "family { ipv4 unicast; ipv6 unicast; }",
        f"capability {{ add-path send; route-refresh enable; graceful-restart {restart}; }}",
        f"api {{ processes [ {PROCESS} ]; neighbor-changes; negotiated; }}",
    ]
    body = "".join(f"\t{line}\n" for line in lines)
    return f"neighbor {peer.address} {{\n{body}}}\n"


def router_id(local: Address | None) -> IPv4Address:
    """The BGP identifier for a local address: itself, or the low 32 bits of an IPv6 address."""
    if isinstance(local, IPv4Address):
        return local
    return IPv4Address((int(local or 0) & MAX_U32) or 1)


def parse_line(line: str) -> Answer | None:
    """One line that ExaBGP wrote; None for lines without meaning to us; MessageError if garbled."""
    text = line.strip()
    if text in ("done", "error"):
        return Acknowledged(text == "done")
    if not text.startswith("{"):
        return None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise MessageError(f"ExaBGP wrote a line that is not JSON: {error}") from error
    try:
        if BARRIER in data:
            return _barrier(data)
        return _event(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MessageError(f"ExaBGP wrote an event without {error}") from error


def _barrier(data: dict[str, Any]) -> BarrierAnswer:
    flushed, sessions = {}, []
    for peer, state in sorted(data["peers"].items()):
        agreed = state["agreed"]
        flushed[peer] = bool(state["flushed"])
        given = None if agreed is None else _agreed(agreed)
        sessions.append(SessionEvent(peer, bool(state["up"]), given))
    return BarrierAnswer(
        str(data[BARRIER]), flushed, tuple(sessions), int(data["reloads"]), int(data["failures"])
    )


def _agreed(families: Mapping[str, bool]) -> Agreed:
    """The unicast families by ExaBGP's names, with whether several paths may be sent."""
    known = {_FAMILIES[name]: bool(n) for name, n in families.items() if name in _FAMILIES}
    return tuple(sorted(known.items()))


def _event(data: dict[str, Any]) -> SessionEvent | None:
    kind = str(data.get("type"))
    if kind not in ("state", "negotiated"):
        return None
    neighbor = data["neighbor"]
    peer = str(neighbor["address"]["peer"])
    if kind == "negotiated":
        agreed = neighbor["negotiated"]
        send = agreed["add_path"]["send"]
        return SessionEvent(peer, agreed=_agreed({f: f in send for f in agreed["families"]}))
    state = str(neighbor["state"])
    if state == "connected":
        return None
    return SessionEvent(peer, up=state == "up", detail=str(neighbor.get("reason", "")))
