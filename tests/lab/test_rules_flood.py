"""A flood of one EIP: what it fills stays small, what it is not about stays.

Bounded: a few thousand packets from one namespace to another, for seconds.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from lbctl.core import nft
from lbctl.core.nftsets import Policy

from . import frames
from .agentnet import wait_for
from .rulesnet import EIP, GATE_MAC, OTHER, PORT, ROUTER_MAC, RulesNet, both, made, rules, table

LIMIT = 40  # new flows of one EIP per second and node
PACKETS = 4000


@pytest.fixture(scope="module")
def net() -> Iterator[RulesNet]:
    net = made("rf")
    try:
        both(net, table(), Policy(new_flows=LIMIT))
        yield net
    finally:
        net.close()


def source(version: int, number: int) -> str:
    """An address of many, none of which answers."""
    high, low = divmod(number, 250)
    return f"203.0.{high + 120}.{low + 1}" if version == 4 else f"2001:db8:f::{number + 1:x}"


@pytest.mark.parametrize("kind", ["syn", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_flood_is_bounded(net: RulesNet, version: int, kind: str) -> None:
    """Conntrack gets the limit's share; the rest is counted; another EIP's flows go on."""
    held = [
        net.connect(version, OTHER[version]) for _ in range(16)
    ]  # to both pods, but for 1 in 32,000
    assert {flow.pod for flow in held} == {1, 2}
    before = [(net.counters(n), net.tracked(n)) for n in (1, 2)]
    wire = net.link("c", "eth0")
    make = frames.tcp if kind == "syn" else frames.udp
    port = PORT if kind == "syn" else 53
    for number in range(PACKETS):
        packet = make(source(version, number), 1024 + number, EIP[version], port)
        wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
        if number % 500 == 250:
            assert all(flow.echoes() for flow in held)
            flow = net.connect(version, OTHER[version])
            assert flow.echoes()
            flow.close()

    def arrived() -> bool:
        now = [net.counters(n) for n in (1, 2)]
        new = sum(
            after[name] - old[name]
            for after, (old, _) in zip(now, before, strict=True)
            for name in ("flood", "delivered")
        )
        return new >= PACKETS

    wait_for("every packet to be delivered or dropped as flood", arrived)
    for node, (old, tracked) in zip((1, 2), before, strict=True):
        now = net.counters(node)
        assert now["flood"] - old["flood"] > PACKETS / 8
        let_in = now["delivered"] - old["delivered"]
        assert 0 < net.tracked(node) - tracked <= let_in + 4
    assert all(flow.echoes() for flow in held)
    for flow in held:
        flow.close()


def test_unanswered_flows_leave_soon(net: RulesNet) -> None:
    """A half-open connection is gone in seconds, not in the kernel's minute or two."""
    wire = net.link("c", "eth0")
    for number in range(5):
        for packet in (
            frames.tcp(source(4, number), 60000, OTHER[4], PORT),
            frames.udp(source(4, number), 60000, OTHER[4], 53),
        ):
            wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))

    def left() -> list[int]:
        lines = "".join(
            net.run(f"n{n}", "cat", "/proc/net/nf_conntrack") for n in (1, 2)
        ).splitlines()
        return [int(line.split()[4]) for line in lines if "sport=60000" in line]

    found = wait_for("the flows to be tracked", lambda: len(f := left()) == 10 and f)
    assert max(found) <= 10


def test_the_limit_can_be_changed_and_taken_away(net: RulesNet) -> None:
    """By a difference; the flows that are there stay."""
    held = net.connect(4, OTHER[4])
    limited, free = (rules(table(), held.pod, Policy(new_flows=n)) for n in (LIMIT, 0))
    net.load(held.pod, *nft.difference(limited, free))
    assert nft.reshapes(limited, free)
    before = net.counters(held.pod)["flood"]
    senders = [net.opened("c", 4, socket.SOCK_DGRAM) for _ in range(600)]
    for sender in senders:
        sender.sendto(b"x", (EIP[4], 53))
    assert held.echoes()
    assert net.counters(held.pod)["flood"] == before
    net.load(held.pod, *nft.difference(free, limited))
    for sender in senders:
        sender.close()
    held.close()
