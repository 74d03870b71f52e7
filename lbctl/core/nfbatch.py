"""Changes of the big maps as nfnetlink transactions, without nft. Pure: bytes out.

`nft -f` reads the ruleset and parses text: 16 to 24 ms for a change beside 10,000 Services, and
1.1 GiB for a load. The kernel's own messages are made here, in microseconds.

Rules: a batch is one transaction, whole or not at all; in it what goes comes before what comes, and
a port's elements never span two batches. What is written is what nft writes for the same text (held
by tests/lab/test_batch_kernel.py). Marks are in the host's byte order, all else is big-endian;
every part of a concatenated key takes a multiple of 4 bytes.

Source: include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h; Linux, net/netfilter/nfnetlink.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from lbctl.core import maglev
from lbctl.core.elements import WHOLE, Delta, PortKey, Value
from lbctl.core.maglev import Row
from lbctl.core.model import Address
from lbctl.core.names import MARK_BASE, NFT_TABLE
from lbctl.core.nftfamily import BUCKET_BASE, FAMILIES

PIECE: Final = 20_000  # map elements of one transaction: about 1 MiB
NEW_ELEMENTS, DELETE_ELEMENTS = 12, 14  # NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM
_VERBS: Final = {NEW_ELEMENTS: "add", DELETE_ELEMENTS: "delete"}
_SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN, …_END
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400
_NESTED: Final = 0x8000
_JUMP: Final = -3  # NFT_JUMP
_LIMIT: Final = 60_000  # bytes of elements in a message: an attribute's length has 16 bits
_NF_FAMILY: Final = {4: 2, 6: 10}  # by IP version: NFPROTO_IPV4, NFPROTO_IPV6
_PROTOCOLS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132}


_KEYS: Final = struct.pack(
    f"={maglev.SIZES[-1]}I", *range(BUCKET_BASE, BUCKET_BASE + maglev.SIZES[-1])
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a batch. kind: of NFT_MSG_*. what: for people, should the kernel refuse it."""

    kind: int
    version: int
    body: bytes
    what: str


@dataclass(slots=True)
class Batch:
    """One transaction."""

    deleted: list[Message] = field(default_factory=list)
    added: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """In the order in which the kernel is to take them."""
        return self.deleted + self.added


def framed(batch: Batch, first: int) -> bytes:
    """Return what is given to the socket. Message n has the sequence number first + 1 + n.

    The last message asks for an answer; the kernel answers each that it refuses unasked.
    """
    messages = batch.messages
    parts = [_message(_BEGIN, _REQUEST, first, struct.pack(">BBH", 0, 0, _SUBSYSTEM))]
    for number, message in enumerate(messages, 1):
        flags = _REQUEST | (_CREATE if message.kind == NEW_ELEMENTS else 0)
        flags |= _ACK if number == len(messages) else 0
        head = struct.pack(">BBH", _NF_FAMILY[message.version], 0, 0)
        kind = _SUBSYSTEM << 8 | message.kind
        parts.append(_message(kind, flags, first + number, head + message.body))
    last = struct.pack(">BBH", 0, 0, _SUBSYSTEM)
    parts.append(_message(_END, _REQUEST, first + len(messages) + 1, last))
    return b"".join(parts)


def pieces(changes: Iterable[Sequence[Delta]], limit: int = PIECE) -> Iterator[Batch]:
    """Join changes, each of one port, into batches of about `limit` elements."""
    writer = _Writer()
    for port in changes:
        if writer.count >= limit:
            yield writer.batch()
            writer = _Writer()
        writer.take(port)
    if writer.count:
        yield writer.batch()


def unmark() -> list[Message]:
    """Messages that take the generation away: the tables are not complete from here on."""
    return [
        Message(DELETE_ELEMENTS, f.version, _place("gen"), f"flush {f.table} gen") for f in FAMILIES
    ]


def mark(generation: int) -> list[Message]:
    """Messages that write the generation: the tables are complete."""
    return _marks(NEW_ELEMENTS, "gen", [generation & 0xFFFFFFFF])


def silenced(old: Iterable[int], new: Iterable[int]) -> Batch:
    """The transaction that makes `silent` say the numbers of other nodes."""
    was, now = ({MARK_BASE + number for number in numbers} for numbers in (old, new))
    gone = _marks(DELETE_ELEMENTS, "silent", sorted(was - now))
    return Batch(gone, _marks(NEW_ELEMENTS, "silent", sorted(now - was)))


def _marks(kind: int, name: str, marks: Sequence[int]) -> list[Message]:
    """Messages for a set of marks of both tables; none for no marks, which would mean all."""
    elements = b"".join(_element(_attribute(1, struct.pack("=I", mark))) for mark in marks)
    body = _place(name) + _attribute(3 | _NESTED, elements)
    verb = _VERBS[kind]
    return [
        Message(kind, f.version, body, f"{verb} element {f.table} {name}")
        for f in FAMILIES
        if marks
    ]


class _Writer:
    """Collects elements by what is done with them and by map."""

    def __init__(self) -> None:
        self.count = 0
        self._messages: dict[int, list[Message]] = {DELETE_ELEMENTS: [], NEW_ELEMENTS: []}
        self._open: dict[tuple[int, int, str], bytearray] = {}

    def take(self, port: Sequence[Delta]) -> None:
        """Take in what the maps lose and gain for one port."""
        version, prefix = port[0].key[0].version, _port_key(port[0].key)
        for _, name, gone, fresh, places, values in port:
            if gone:
                self._put((DELETE_ELEMENTS, version, name), _elements(prefix, gone))
            if fresh:
                made = _elements(prefix, fresh, places, values)
                self._put((NEW_ELEMENTS, version, name), made)
            self.count += len(gone) + len(fresh)

    def _put(self, place: tuple[int, int, str], made: tuple[bytes | bytearray, int]) -> None:
        """made: elements, each of so many bytes."""
        data, each = made
        start = 0
        while start < len(data):
            known = self._open.setdefault(place, bytearray())
            stop = start + (_LIMIT - len(known)) // each * each
            if stop > start:
                known += data[start:stop]
                start = stop
            else:
                self._close(place)

    def _close(self, place: tuple[int, int, str]) -> None:
        kind, version, name = place
        elements = bytes(self._open.pop(place))
        table = next(f.table for f in FAMILIES if f.version == version)
        body = _place(name) + _attribute(3 | _NESTED, elements)
        what = f"{_VERBS[kind]} element {table} {name}"
        self._messages[kind].append(Message(kind, version, body, what))

    def batch(self) -> Batch:
        """All that was taken in."""
        for place in sorted(self._open):
            self._close(place)
        return Batch(self._messages[DELETE_ELEMENTS], self._messages[NEW_ELEMENTS])


def _port_key(key: PortKey) -> bytes:
    address, protocol, port = key
    return address.packed + struct.pack(">B3xH2x", _PROTOCOLS[protocol], port)


def _elements(
    prefix: bytes, buckets: Sequence[int], places: Row = b"", values: Sequence[Value] = ()
) -> tuple[bytes | bytearray, int]:
    """The elements of these buckets, at least one, and how many bytes each takes.

    All are alike but for a few bytes, which are written for all of them at once: the first byte of
    every key, then the second, and so on.
    """
    keys = _keys(buckets)
    width = len(keys) // len(buckets)
    data = _data(values[places[0]]) if values else b""
    head = _head(len(prefix) + width, len(data)) + prefix
    each = len(head) + width + len(data)
    if len(buckets) == 1:
        return head + keys + data, each
    start = len(head)
    made = bytearray((head + bytes(width) + data) * len(buckets))
    for byte in range(width):
        made[start + byte :: each] = keys[byte::width]
    if len(values) > 1:
        # Those of another kind, which no place here is of, may be shorter or longer.
        size = len(data)
        every = b"".join([(_data(value) or data)[:size].ljust(size) for value in values])
        for byte in range(size):
            column = every[byte::size]
            if column.count(data[byte]) < len(column):
                made[start + width + byte :: each] = maglev.translated(places, column)
    return made, each


def _keys(buckets: Sequence[int]) -> bytes:
    """How their keys end."""
    if isinstance(buckets, range):
        return _KEYS[4 * buckets.start : 4 * buckets.stop]
    if buckets[0] == WHOLE:
        return b""
    return struct.pack(f"={len(buckets)}I", *(BUCKET_BASE + bucket for bucket in buckets))


@lru_cache(maxsize=8)
def _head(key: int, data: int) -> bytes:
    """The start of an element, up to its key, for these lengths of key and data."""
    return struct.pack("=6H", 12 + key + data, 1 | _NESTED, 8 + key, 1 | _NESTED, 4 + key, 1)


@lru_cache(maxsize=1024)
def _data(value: Value) -> bytes:
    """The attribute with what a key leads to; nothing in a set."""
    if value is None:
        return b""
    if isinstance(value, str):
        verdict = _attribute(1, struct.pack(">i", _JUMP)) + _attribute(2, _text(value))
        return _attribute(2 | _NESTED, _attribute(2 | _NESTED, verdict))
    if isinstance(value, int):
        return _attribute(2 | _NESTED, _attribute(1, struct.pack("=I", MARK_BASE + value)))
    return _attribute(2 | _NESTED, _attribute(1, _pod(*value)))


def _pod(address: Address, port: int) -> bytes:
    return address.packed + struct.pack(">H2x", port)


def _element(key: bytes) -> bytes:
    return _attribute(1 | _NESTED, _attribute(1 | _NESTED, key))


def _place(name: str) -> bytes:
    return _attribute(1, _text(NFT_TABLE)) + _attribute(2, _text(name))


def _text(name: str) -> bytes:
    return name.encode("ascii") + b"\0"


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body
