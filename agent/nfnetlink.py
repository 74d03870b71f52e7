"""nftables by netlink: small questions with small answers, and batches of elements.

`nft list` reads and parses the whole ruleset (24 s and 930 MiB beside 610,000 elements), and
pyroute2 knows neither objects nor element counts; these few messages are all that the agent needs.
Rules: a dump is always of one of our tables only. A batch is given to the kernel whole, in one
send, and is one transaction. Calls are synchronous: each is answered at once by the kernel.

Source: include/uapi/linux/netfilter/nf_tables.h; NFTA_SET_COUNT since Linux 6.17, absent before.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from lbctl.core.names import MARK_BASE, MARK_MASK, NFT_TABLE
from lbctl.core.nfbatch import Batch, framed
from lbctl.errors import DataplaneError

NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 10 << 8
REQUEST, DUMP = 0x1, 0x300
ERROR, DONE = 0x2, 0x3
_NF_FAMILY: Final = {4: 2, 6: 10}  # by IP version: NFPROTO_IPV4, NFPROTO_IPV6
_GET_CHAIN, _NF_FORWARD, _NF_DROP = 4, 2, 0
_GET_TABLE, _GET_RULE, _GET_SET, _GET_ELEMENT, _GET_GENERATION, _GET_OBJECT = 1, 7, 10, 13, 16, 19
_SOL_NETLINK, _CAP_ACK, _SNDBUFFORCE = 270, 10, 32
_SPARE: Final = 1 << 16
_BATCH_LIMIT_S: Final = 60.0
_NAME: Final = NFT_TABLE.encode() + b"\0"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one incarnation of one of our tables from another without reading its elements.

    sets: name, handle and number of elements (None where the kernel does not say).
    """

    table: int
    flags: int
    use: int
    rules: tuple[int, ...]
    sets: tuple[tuple[str, int, int | None], ...]

    def counts(self) -> dict[str, int | None]:
        """Number of elements by set."""
        return {name: count for name, _, count in self.sets}

    def shape(self) -> tuple[object, ...]:
        """All but the numbers of elements: what no change of ours alters."""
        sets = tuple((name, handle) for name, handle, _ in self.sets)
        return self.table, self.flags, self.use, self.rules, sets


class Nfnetlink:
    """A netlink socket to nftables of this network namespace. Needs CAP_NET_ADMIN."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(5.0)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def generation(self) -> int:
        """The number of the whole ruleset: it changes with every transaction of anyone."""
        for attributes in self._ask(_GET_GENERATION, b"", 0, family=0):
            return _number(attributes.get(1, b"\0"))
        raise DataplaneError("nftables gave no generation")

    def fingerprint(self, version: int) -> Fingerprint | None:
        """Our table of an IP version as it is now; None if there is none."""
        family = _NF_FAMILY[version]
        table = next(iter(self._ask(_GET_TABLE, attribute(1, _NAME), 0, family)), None)
        if table is None:
            return None
        named = attribute(1, _NAME)
        rules = tuple(_number(a[3]) for a in self._ask(_GET_RULE, named, DUMP, family))
        sets = []
        for a in self._ask(_GET_SET, named, DUMP, family):
            name = _string(a[2])
            if not name.startswith("__"):  # anonymous sets belong to their rule
                sets.append((name, _number(a[16]), _number(a[20]) if 20 in a else None))
        return Fingerprint(
            _number(table[4]),
            _number(table.get(2, b"\0")),
            _number(table.get(3, b"\0")),
            rules,
            tuple(sorted(sets)),
        )

    def marker(self, version: int) -> int | None:
        """The single element of the set `gen`; None if it is not there."""
        question = attribute(1, _NAME) + attribute(2, b"gen\0")
        for attributes in self._ask(_GET_ELEMENT, question, DUMP, _NF_FAMILY[version]):
            for _, element in nested(attributes.get(3, b"")):
                key = dict(nested(element)).get(1, b"")
                value = dict(nested(key)).get(1)
                if value is not None:
                    return int.from_bytes(value, "little" if _LITTLE else "big")
        return None

    def counters(self) -> dict[str, int]:
        """Packets by named counter, both tables together; {} if they are not there."""
        result: dict[str, int] = {}
        question = attribute(1, _NAME) + attribute(3, struct.pack(">I", 1))
        for family in _NF_FAMILY.values():
            for attributes in self._ask(_GET_OBJECT, question, DUMP, family):
                data = dict(nested(attributes.get(4, b"")))
                if _string(attributes.get(1, b"")) == NFT_TABLE:
                    name = _string(attributes[2])
                    result[name] = result.get(name, 0) + _number(data.get(2, b"\0"))
        return result

    def closed_forwards(self) -> tuple[str, ...]:
        """Base chains of anybody at the forward hook that drop by policy, as nft calls them.

        Left out is one with a rule of its own that names our marks.
        """
        found = []
        for family, word in ((2, "ip"), (10, "ip6"), (1, "inet")):
            for a in list(self._ask(_GET_CHAIN, b"", DUMP, family)):
                hook = dict(nested(a.get(4, b"")))
                forward = 1 in hook and _number(hook[1]) == _NF_FORWARD
                if forward and 5 in a and _number(a[5]) == _NF_DROP:
                    chain = attribute(1, a[1]) + attribute(2, a[3])
                    rules = list(self._ask(_GET_RULE, chain, DUMP, family))
                    if not any(_speaks_of_marks(r.get(4, b"")) for r in rules):
                        found.append(f"{word} {_string(a[1])} {_string(a[3])}")
        return tuple(sorted(found))

    def _ask(
        self, command: int, body: bytes, flags: int, family: int
    ) -> Iterator[dict[int, bytes]]:
        """Send one request; yield the attributes of each answer. A missing object yields none."""
        self._sequence += 1
        payload = struct.pack(">BBH", family, 0, 0) + body
        header = struct.pack(
            "=IHHII", 16 + len(payload), _SUBSYSTEM | command, REQUEST | flags, self._sequence, 0
        )
        try:
            self._socket.send(header + payload)
            yield from self._answers(bool(flags & DUMP))
        except OSError as error:
            raise DataplaneError(f"nftables by netlink: {error}") from error

    def _answers(self, dump: bool) -> Iterator[dict[int, bytes]]:
        found: list[dict[int, bytes]] = []
        while True:
            for kind, sequence, message in messages(self._socket.recv(1 << 18)):
                if sequence != self._sequence:
                    continue
                if kind == ERROR:
                    _raise_unless_missing(struct.unpack_from("=i", message)[0])
                if kind in (ERROR, DONE):
                    return (yield from found)
                found.append(dict(nested(message[4:])))
                if not dump:
                    return (yield from found)


class BatchWriter:
    """A netlink socket that takes batches of elements. Needs CAP_NET_ADMIN."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(_BATCH_LIMIT_S)
        # An answer then holds the header of what it speaks of, and not the whole message.
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._room = 0
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, batch: Batch) -> None:
        """Give one transaction to the kernel.

        Raises DataplaneError with the first message that it refused; then nothing was changed.
        """
        first = self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        data = framed(batch, first)
        self._sequence += len(batch.messages) + 1
        try:
            self._make_room(len(data))
            self._socket.send(data)
            self._await_answer(batch, first)
        except OSError as error:
            raise DataplaneError(f"nftables by netlink: {error}") from error

    def _make_room(self, size: int) -> None:
        # The kernel takes a batch only as one buffer.
        if size + _SPARE > self._room:
            self._room = 2 * (size + _SPARE)
            self._socket.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, self._room)

    def _await_answer(self, batch: Batch, first: int) -> None:
        messages = batch.messages
        last = first + len(messages)
        while True:
            for sequence, code in _errors(self._socket.recv(1 << 18)):
                number = sequence - first
                if not 0 <= number <= len(messages):
                    continue  # the rest of an earlier batch's answers
                if code:
                    what = messages[number - 1].what if number else "the transaction"
                    raise DataplaneError(f"nftables refused: {what}: {os.strerror(-code)}")
                if sequence == last:
                    return


def _errors(data: bytes) -> Iterator[tuple[int, int]]:
    """Sequence number and error of each answer; the error is 0 or negative."""
    for kind, sequence, message in messages(data):
        if kind == ERROR:
            yield sequence, struct.unpack_from("=i", message)[0]


_LITTLE: Final = struct.pack("=H", 1) == b"\x01\0"


def _speaks_of_marks(expressions: bytes) -> bool:
    return all(struct.pack("=I", part) in expressions for part in (MARK_BASE, MARK_MASK))


def _raise_unless_missing(code: int) -> None:
    if code not in (0, -errno.ENOENT):
        raise DataplaneError(f"nftables by netlink: {os.strerror(-code)}")


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The messages that one read gave: type, sequence number and payload."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data, offset)
        yield kind, sequence, data[offset + 16 : offset + length]
        offset += max(16, (length + 3) & ~3)


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def nested(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in a netlink payload: kind and value."""
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace")
