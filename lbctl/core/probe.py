"""Datagrams between managers and agents, and among managers: encode, authenticate, decode.

Layout, big endian: header `LB`, version u8, kind u8, key id u32; body; zero padding; 16 bytes of
HMAC-SHA256 over everything before. Rules: decoding raises MessageError and nothing else, whatever
the bytes are; no answer is larger than its request (requests are padded), so nobody can use an
agent to amplify; nothing here reads a clock or makes a random number.

Replays: an answer must carry the nonce of an open request. A request counts for the down set only
with the agent's cookie of the last seconds and a rising (boot, sequence): a replayed one is
answered at most, which changes nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from lbctl.core.keys import Key, KeyRing
from lbctl.core.model import Address, Behind
from lbctl.errors import MessageError

VERSION = 1
MAC_BYTES = 16
REQUEST_BYTES = 512
MAX_BYTES = 1232  # fits an IPv6 minimum MTU
MAX_NODES = 250  # node hashes in one datagram: 4 bytes each
MAX_MANAGER_ID = 128
MAX_HEARD = 16  # managers that an answer names
MAX_NODE_NAME = 253  # a DNS subdomain

_HEADER = struct.Struct("!2sBBI")
_REQUEST = struct.Struct("!QQQQBBH")  # nonce, boot, sequence, cookie, flags, managers, nodes
_ANSWER = struct.Struct("!QQQQQQI")  # nonce, boot, cookie, config gen., table gen., digest, count
_PAGE_REQUEST = struct.Struct("!QQQQ17s")  # nonce, boot, since, cursor generation and address
_PAGE = struct.Struct("!QQQBQ17sH")  # nonce, boot, generation, flags, cursor, entries
_HEARTBEAT = struct.Struct("!QQBHHH")  # boot, sequence, flags, seen, known, nodes

_JUDGING = 1
_ANNOUNCING = 2
_FULL = 1
_MORE = 2
_V6 = 1
_PRESENT = 2
_LOCAL_READY = 4
_EMPTY = 8  # a predecessor that knows no such bit has endpoints


class Kind(IntEnum):
    """What a datagram is."""

    REQUEST = 1
    ANSWER = 2
    PAGE_REQUEST = 3
    PAGE = 4
    HEARTBEAT = 5


@dataclass(frozen=True, slots=True)
class Request:
    """Manager to agent: are you there?

    `down` are hashes of nodes whose endpoints should take no new flows; it counts only if `judging`
    (a manager that has just started knows nothing yet, so it must not seem to disagree). `cookie`
    echoes the last answer's. `managers` is how many managers the sender knows to be alive.
    """

    manager: str
    boot: int
    sequence: int
    nonce: int
    cookie: int = 0
    judging: bool = False
    managers: int = 1
    down: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """Agent to manager. `generation` rises with each change of what is confirmed, within a `boot`.

    `digest` is that of the forwarding table, alike on all nodes that are up to date. `heard` are
    hashes (`node_hash`) of the managers heard within the last second, the asking one's among them.
    """

    nonce: int
    node: str
    boot: int
    cookie: int
    config_generation: int
    generation: int
    digest: int
    confirmed: int = 0
    heard: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A place in an agent's list of changes: everything up to and including it is known."""

    generation: int
    address: bytes = b""  # address_key; b"\xff" stands after every address of the generation


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Manager to agent: what changed after `cursor`? `boot` 0 asks for everything.

    `since` is the generation whose removals the manager needs no more: that of its last complete
    list, or of the first page of the full list that it is reading.
    """

    nonce: int
    boot: int = 0
    since: int = 0
    cursor: Cursor = Cursor(0)


@dataclass(frozen=True, slots=True)
class Entry:
    """One EIP on one node: forwarding confirmed or not, and what is behind it."""

    address: Address
    present: bool
    behind: Behind = Behind.AWAY


@dataclass(frozen=True, slots=True)
class Page:
    """Agent to manager. `full`: this page starts a new list, forget the old one.

    `cursor` is where the next page starts, None after the last one; the list is then complete as
    of `generation`.
    """

    nonce: int
    boot: int
    generation: int
    full: bool
    entries: tuple[Entry, ...]
    cursor: Cursor | None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Manager to manager and to the other speakers' relays.

    `gone` are hashes of the nodes it calls Suspect or Down, `gone_count` how many those are (the
    hashes are bounded), `seen` how many nodes it sees. `announcing`: its sessions are up and full.
    """

    manager: str
    boot: int
    sequence: int
    judging: bool
    announcing: bool
    seen: int
    gone_count: int
    gone: frozenset[int]


@lru_cache(maxsize=16384)
def node_hash(name: str) -> int:
    """Return the 32-bit hash that stands for a node in datagrams."""
    return int.from_bytes(hashlib.sha256(b"lbctl-node:" + name.encode()).digest()[:4], "big")


@lru_cache(maxsize=65536)
def address_key(address: Address) -> bytes:
    """Return an address as sortable bytes: family, then the address."""
    return bytes((address.version,)) + address.packed


def peek(data: bytes) -> tuple[int, int]:
    """Return (kind, nonce) of a datagram that is not authenticated yet; raises MessageError."""
    if len(data) < _HEADER.size + 8 + MAC_BYTES:
        raise MessageError("a datagram is too short")
    return data[3], int.from_bytes(data[8:16], "big")


def encode_request(message: Request, key: Key) -> bytes:
    """Encode and sign; at least REQUEST_BYTES long. More than MAX_NODES hashes are cut off."""
    flags = _JUDGING if message.judging else 0
    body = _REQUEST.pack(
        message.nonce,
        message.boot,
        message.sequence,
        message.cookie,
        flags,
        min(message.managers, 255),
        min(len(message.down), MAX_NODES),
    )
    name = _text(message.manager, MAX_MANAGER_ID)
    return _seal(Kind.REQUEST, body + name + _hashes(message.down), key, REQUEST_BYTES)


def decode_request(data: bytes, ring: KeyRing) -> tuple[Request, Key]:
    """Return the request and the key it was signed with; the answer is signed with the same."""
    body, key = _open(Kind.REQUEST, data, ring)
    fields, rest = _unpack(_REQUEST, body)
    nonce, boot, sequence, cookie, flags, managers, count = fields
    manager, rest = _read_text(rest, MAX_MANAGER_ID)
    down = _read_hashes(rest, count)
    judging = bool(flags & _JUDGING)
    if len(data) < REQUEST_BYTES:
        raise MessageError("a request is not padded")
    return Request(manager, boot, sequence, nonce, cookie, judging, managers, down), key


def encode_answer(message: Answer, key: Key) -> bytes:
    """Encode and sign; never longer than a request."""
    body = _ANSWER.pack(
        message.nonce,
        message.boot,
        message.cookie,
        message.config_generation,
        message.generation,
        message.digest,
        message.confirmed,
    )
    heard = sorted(message.heard)[:MAX_HEARD]
    body += _text(message.node, MAX_NODE_NAME) + bytes((len(heard),))
    return _seal(Kind.ANSWER, body + _hashes(frozenset(heard)), key)


def decode_answer(data: bytes, ring: KeyRing) -> Answer:
    """Return the answer; the caller checks nonce and node name."""
    body, _ = _open(Kind.ANSWER, data, ring)
    fields, rest = _unpack(_ANSWER, body)
    nonce, boot, cookie, config_generation, generation, digest, count = fields
    node, rest = _read_text(rest, MAX_NODE_NAME)
    heard = _read_hashes(rest[1:], rest[0]) if rest else frozenset()
    return Answer(nonce, node, boot, cookie, config_generation, generation, digest, count, heard)


def encode_page_request(message: PageRequest, key: Key) -> bytes:
    """Encode and sign; MAX_BYTES long, as its page may be."""
    cursor = message.cursor
    body = _PAGE_REQUEST.pack(
        message.nonce, message.boot, message.since, cursor.generation, _pad_key(cursor.address)
    )
    return _seal(Kind.PAGE_REQUEST, body, key, MAX_BYTES)


def decode_page_request(data: bytes, ring: KeyRing) -> tuple[PageRequest, Key]:
    """Return the request and its key."""
    body, key = _open(Kind.PAGE_REQUEST, data, ring)
    (nonce, boot, since, generation, address), _ = _unpack(_PAGE_REQUEST, body)
    if len(data) < MAX_BYTES:
        raise MessageError("a page request is not padded")
    return PageRequest(nonce, boot, since, Cursor(generation, _trim_key(address))), key


def entry_bytes(address: Address) -> int:
    """Return how many bytes of a page an entry takes."""
    return 5 if address.version == 4 else 17


PAGE_ROOM = MAX_BYTES - _HEADER.size - MAC_BYTES - _PAGE.size


def encode_page(message: Page, key: Key) -> bytes:
    """Encode and sign; raises MessageError if the entries do not fit (PAGE_ROOM)."""
    if sum(entry_bytes(entry.address) for entry in message.entries) > PAGE_ROOM:
        raise MessageError("a page's entries do not fit into it")
    cursor = message.cursor or Cursor(0)
    flags = (_FULL if message.full else 0) | (0 if message.cursor is None else _MORE)
    body = _PAGE.pack(
        message.nonce,
        message.boot,
        message.generation,
        flags,
        cursor.generation,
        _pad_key(cursor.address),
        len(message.entries),
    )
    return _seal(Kind.PAGE, body + b"".join(map(_encode_entry, message.entries)), key)


def decode_page(data: bytes, ring: KeyRing) -> Page:
    """Return the page; the caller checks the nonce."""
    body, _ = _open(Kind.PAGE, data, ring)
    fields, rest = _unpack(_PAGE, body)
    nonce, boot, generation, flags, cursor_generation, cursor_address, count = fields
    cursor = Cursor(cursor_generation, _trim_key(cursor_address)) if flags & _MORE else None
    entries = _read_entries(rest, count)
    return Page(nonce, boot, generation, bool(flags & _FULL), entries, cursor)


def encode_heartbeat(message: Heartbeat, key: Key) -> bytes:
    """Encode and sign. More than MAX_NODES hashes are cut off."""
    flags = (_JUDGING if message.judging else 0) | (_ANNOUNCING if message.announcing else 0)
    body = _HEARTBEAT.pack(
        message.boot,
        message.sequence,
        flags,
        min(message.seen, 0xFFFF),
        min(message.gone_count, 0xFFFF),
        min(len(message.gone), MAX_NODES),
    )
    name = _text(message.manager, MAX_MANAGER_ID)
    return _seal(Kind.HEARTBEAT, body + name + _hashes(message.gone), key)


def decode_heartbeat(data: bytes, ring: KeyRing) -> Heartbeat:
    """Return the heartbeat; the caller drops what does not rise in (boot, sequence)."""
    body, _ = _open(Kind.HEARTBEAT, data, ring)
    (boot, sequence, flags, seen, gone_count, count), rest = _unpack(_HEARTBEAT, body)
    manager, rest = _read_text(rest, MAX_MANAGER_ID)
    gone = _read_hashes(rest, count)
    judging, announcing = bool(flags & _JUDGING), bool(flags & _ANNOUNCING)
    return Heartbeat(manager, boot, sequence, judging, announcing, seen, gone_count, gone)


def _seal(kind: Kind, body: bytes, key: Key, length: int = 0) -> bytes:
    data = _HEADER.pack(b"LB", VERSION, kind, key.id) + body
    data = data.ljust(length - MAC_BYTES, b"\0")
    if len(data) + MAC_BYTES > MAX_BYTES:
        raise MessageError("a datagram would be too long")
    return data + hmac.digest(key.secret, data, "sha256")[:MAC_BYTES]


def _open(kind: Kind, data: bytes, ring: KeyRing) -> tuple[bytes, Key]:
    if not _HEADER.size + MAC_BYTES <= len(data) <= MAX_BYTES:
        raise MessageError("a datagram has an impossible length")
    magic, version, found, key_id = _HEADER.unpack_from(data)
    if magic != b"LB" or version != VERSION or found != kind:
        raise MessageError("a datagram is of another kind or version")
    key = ring.find(key_id)
    if key is None:
        raise MessageError("a datagram is signed with a key that is not known")
    expected = hmac.digest(key.secret, data[:-MAC_BYTES], "sha256")[:MAC_BYTES]
    if not hmac.compare_digest(expected, data[-MAC_BYTES:]):
        raise MessageError("a datagram's signature is wrong")
    return data[_HEADER.size : -MAC_BYTES], key


def _unpack(layout: struct.Struct, body: bytes) -> tuple[tuple[Any, ...], bytes]:
    if len(body) < layout.size:
        raise MessageError("a datagram is cut short")
    return layout.unpack_from(body), body[layout.size :]


def _text(text: str, limit: int) -> bytes:
    raw = text.encode("ascii", "strict") if text.isascii() else b""
    if not 0 < len(raw) <= limit or not text.isprintable():
        raise MessageError("a name in a datagram is empty, too long or not plain ASCII")
    return bytes((len(raw),)) + raw


def _read_text(data: bytes, limit: int) -> tuple[str, bytes]:
    size = data[0] if data else 0
    raw = data[1 : 1 + size]
    text = raw.decode("ascii", "replace")
    if not 0 < size <= limit or len(raw) != size or not text.isascii() or not text.isprintable():
        raise MessageError("a name in a datagram is malformed")
    return text, data[1 + size :]


def _hashes(hashes: frozenset[int]) -> bytes:
    chosen = sorted(hashes)[:MAX_NODES]
    return struct.pack(f"!{len(chosen)}I", *chosen)


def _read_hashes(data: bytes, count: int) -> frozenset[int]:
    if count > MAX_NODES or len(data) < 4 * count:
        raise MessageError("a list of nodes in a datagram is cut short")
    return frozenset(struct.unpack_from(f"!{count}I", data))


def _pad_key(key: bytes) -> bytes:
    return key.ljust(17, b"\0")


def _trim_key(raw: bytes) -> bytes:
    if raw[0] == 4:
        return raw[:5]
    return raw if raw[0] == 6 else raw[:1].strip(b"\0")


def _encode_entry(entry: Entry) -> bytes:
    flags = (
        (_V6 if entry.address.version == 6 else 0)
        | (_PRESENT if entry.present else 0)
        | (_LOCAL_READY if entry.behind is Behind.HERE else 0)
        | (_EMPTY if entry.behind is Behind.NOTHING else 0)
    )
    return bytes((flags,)) + entry.address.packed


def _read_entries(data: bytes, count: int) -> tuple[Entry, ...]:
    entries = []
    offset = 0
    for _ in range(count):
        flags = data[offset] if offset < len(data) else 0
        end = offset + (17 if flags & _V6 else 5)
        if end > len(data):
            raise MessageError("a page is cut short")
        entries.append(_entry(flags, data[offset + 1 : end]))
        offset = end
    return tuple(entries)


@lru_cache(maxsize=65536)
def _entry(flags: int, packed: bytes) -> Entry:
    # Cached: a thousand nodes confirm the same EIPs, one object each is enough.
    address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
    behind = Behind.NOTHING if flags & _EMPTY else Behind.AWAY
    return Entry(address, bool(flags & _PRESENT), Behind.HERE if flags & _LOCAL_READY else behind)
