"""Netlink batches: their bytes, how they are cut, and what a change of a port becomes."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import ip_address

import pytest

from lbctl.core import elements, nfbatch, nft
from lbctl.core.elements import WHOLE, Delta, Value
from lbctl.core.model import Protocol
from lbctl.core.names import MARK_BASE
from lbctl.core.nfbatch import Batch
from lbctl.core.nftfamily import BUCKET_BASE
from lbctl.core.nodeview import PortElements

EIP = ip_address("198.51.100.1")
KEY = (EIP, "TCP", 80)
POD = (ip_address("10.244.1.2"), 8080)
SIX = ip_address("2001:db8:100::1")


def port(now: bytes, past: bytes = b"", closed: bool = False) -> PortElements:
    """Target 1 is the node 1, target 2 the pod, target 3 the node 2."""
    return PortElements(
        EIP, Protocol.TCP, 80, None, closed, (None, 1, POD, 2), now, past or bytes(len(now))
    )


def messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, sequence number and body of each message."""
    found, offset = [], 0
    while offset < len(data):
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, offset)
        found.append((kind, flags, sequence, data[offset + 16 : offset + length]))
        offset += length
    assert offset == len(data)
    return found


@pytest.mark.skipif(struct.pack("=H", 1) != b"\x01\0", reason="the bytes are little-endian ones")
def test_the_bytes_of_a_batch() -> None:
    """One bucket more, one less: header, family, table, map, elements."""
    (batch,) = nfbatch.pieces([[Delta(KEY, "steer", [5], [6], b"\0", [7])]])
    begin, gone, fresh, end = messages(nfbatch.framed(batch, 1000))
    assert begin == (0x10, 1, 1000, bytes.fromhex("0000000a"))
    assert end == (0x11, 1, 1003, bytes.fromhex("0000000a"))
    place = "02000000" + "0a000100" + "6c6263746c000000" + "0a000200" + "7374656572000000"
    bucket = struct.pack("=I", BUCKET_BASE + 5).hex()
    key = "c6336401" + "06000000" + "00500000"
    assert gone == (
        0xA0E,
        1,
        1001,
        bytes.fromhex(place + "20000380" + "1c000180" + "18000180" + "14000100" + key + bucket),
    )
    bucket = struct.pack("=I", BUCKET_BASE + 6).hex()
    mark = struct.pack("=I", MARK_BASE + 7).hex()
    element = "28000180" + "18000180" + "14000100" + key + bucket
    assert fresh == (
        0xA0C,
        0x405,
        1002,
        bytes.fromhex(place + "2c000380" + element + "0c000280" + "08000100" + mark),
    )


def test_each_kind_of_value() -> None:
    deltas = [
        Delta((SIX, "UDP", 53), "deliver", [], [0], b"\0", [(ip_address("fd00::2"), 53)]),
        Delta((SIX, "SCTP", 9), "svc", [], [WHOLE], b"\0", ["flow64"]),
        Delta((SIX, "SCTP", 9), "closed", [], [WHOLE], b"\0", [None]),
    ]
    (batch,) = nfbatch.pieces([deltas[:1], deltas[1:]])
    closed, deliver, svc = (message.body for message in batch.messages)
    assert all(message.version == 6 for message in batch.messages)
    assert closed.endswith(SIX.packed + bytes.fromhex("84000000" + "00090000"))
    assert deliver.endswith(ip_address("fd00::2").packed + bytes.fromhex("00350000"))
    assert bytes.fromhex("08000100fffffffd" + "0b000200") + b"flow64\0\0" in svc


def test_a_long_row_becomes_several_messages() -> None:
    """An attribute's length has 16 bits; what one message cannot hold goes into the next."""
    many = [
        Delta((SIX + n, "TCP", 80), "steer", [], range(4096), bytes(4096), [1]) for n in range(3)
    ]
    (batch,) = nfbatch.pieces([many])
    found = batch.messages
    assert len(found) > 3
    assert all(len(message.body) < 1 << 16 for message in found)
    assert sum(message.body.count(SIX.packed[:12]) for message in found) == 3 * 4096


def test_pieces_are_cut_between_ports() -> None:
    one = [Delta(KEY, "steer", [], range(30), bytes(30), [1])]
    found = list(nfbatch.pieces([one] * 5, limit=50))
    assert [len(batch.messages) for batch in found] == [1, 1, 1]
    assert list(nfbatch.pieces([])) == []


Said = tuple[str, list[int], list[tuple[int, Value]]]


def said(deltas: list[Delta]) -> list[Said]:
    """By map: the buckets that go, and those that come with their values."""
    return [
        (d.map, list(d.gone), [(b, d.values[p]) for b, p in zip(d.fresh, d.places, strict=True)])
        for d in deltas
    ]


def test_a_change_is_what_differs() -> None:
    old = {KEY: port(bytes((1, 1, 2, 0)))}
    (found,) = elements.deltas(old, {KEY: port(bytes((1, 2, 2, 1)), closed=True)})
    assert said(found) == [
        ("deliver", [], [(1, POD)]),
        ("steer", [1], [(3, 1)]),
        ("closed", [], [(WHOLE, None)]),
    ]
    assert list(elements.deltas(old, {KEY: port(bytes((1, 1, 2, 0)))})) == []
    (gone,) = elements.deltas(old, {})
    assert said(gone) == [
        ("deliver", [2], []),
        ("steer", [0, 1], []),
        ("svc", [WHOLE], []),
        ("past", [WHOLE], []),
        ("homed", [WHOLE], []),
    ]


def test_another_list_of_targets_is_no_change_by_itself() -> None:
    old = port(bytes((1, 1, 2, 0)))
    new = replace(old, targets=(None, POD, 1), now=bytes((2, 2, 1, 0)))
    assert list(elements.deltas({KEY: old}, {KEY: new})) == []


def test_another_size_moves_the_chain_and_keeps_what_is_equal() -> None:
    old, new = port(bytes((1,) * 40)), port(bytes((1,) * 160))
    (found,) = elements.deltas({KEY: old}, {KEY: new})
    assert said(found) == [
        ("steer", [], [(bucket, 1) for bucket in range(40, 160)]),
        ("svc", [WHOLE], [(WHOLE, "flow160")]),
        ("past", [WHOLE], [(WHOLE, "flow160")]),
    ]


def marks(step: nft.Step) -> tuple[bool, bool]:
    """Whether it takes the generation away, and whether it writes it."""
    if isinstance(step, str):
        return "flush set ip lbctl gen" in step, "add element ip lbctl gen" in step
    what = [message.what for message in step.messages]
    assert ("flush ip lbctl gen" in what) == ("flush ip6 lbctl gen" in what)
    return "flush ip lbctl gen" in what, "add element ip lbctl gen" in what


def test_tables_with_a_generation_are_complete() -> None:
    """Whatever comes first takes it away, the last step alone writes it, in one transaction."""
    small = nft.Ruleset(1, ("eth0",), ports={KEY: port(bytes(64 * [1]))})
    one = replace(small, generation=2, ports={KEY: port(bytes(64 * [2]))})
    assert [marks(step) for step in nft.steps(small, [one])] == [(True, True)]
    names = replace(small, generation=2, uplinks=("eth1",))
    assert [marks(step) for step in nft.steps(small, [names])] == [(True, True)]
    both = replace(one, uplinks=("eth1",))
    assert [marks(step) for step in nft.steps(small, [both])] == [(True, False), (False, True)]
    many = replace(small, ports={(EIP + n, "TCP", 80): port(bytes(4096 * [1])) for n in range(12)})
    found = [marks(step) for step in nft.steps(small, [many])]
    assert found == [(True, False), (False, False), (False, True)]
    assert list(nft.steps(small, [replace(small, generation=9)])) == []
    fresh = list(nft.steps(None, [small, many]))
    assert isinstance(fresh[0], str) and fresh[0].startswith("add table ip lbctl\ndelete table")
    assert [marks(step)[1] for step in fresh] == [False] * (len(fresh) - 1) + [True]


def test_an_empty_batch_is_a_frame() -> None:
    assert [kind for kind, *_ in messages(nfbatch.framed(Batch(), 5))] == [0x10, 0x11]
