"""No circles: nodes whose tables differ, in content, age or hash, lose packets and count them.

Every packet is steered once at most, whatever the two nodes believe of each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lbctl.core import maglev, nft, nftrules, nodeview

from . import frames
from .agentnet import wait_for
from .rulesnet import CLIENT, EIP, GATE_MAC, PORT, ROUTER_MAC, RulesNet, made, rules, table

PACKETS = 300
SOURCES = itertools.count(20000)
KINDS = {"syn": frames.SYN, "established": frames.ACK}
NAMES = ("steered", "delivered", "second_chance", "stray", "refused")


@pytest.fixture(scope="module")
def net() -> Iterator[RulesNet]:
    net = made("rc")
    try:
        yield net
    finally:
        net.close()


def sent(net: RulesNet, entry: int, version: int, flags: int) -> dict[str, tuple[int, int]]:
    """Send packets of as many flows in by one node; what both counted of them, once all ended."""
    net.enter(entry)
    wire = net.link("c", "eth0")
    for _ in range(PACKETS):
        source = next(SOURCES)  # none that conntrack may still know
        packet = frames.tcp(CLIENT[version], source, EIP[version], PORT, flags)
        wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))

    def ended() -> dict[str, tuple[int, int]] | None:
        now = [net.counters(n) for n in (1, 2)]
        found = {name: (now[0][name], now[1][name]) for name in NAMES}
        return found if sum(found["delivered"]) + sum(found["stray"]) >= PACKETS else None

    result: dict[str, tuple[int, int]] = wait_for("every packet to be counted", ended)
    assert sum(result["delivered"]) + sum(result["stray"]) == PACKETS
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [4, 6])
def test_each_believes_that_the_other_has_all(net: RulesNet, version: int, kind: str) -> None:
    for node in (1, 2):
        net.load(node, *nft.full(rules(table((3 - node,)), node)))
    found = sent(net, 1, version, KINDS[kind])
    assert found["steered"] == (PACKETS, 0)
    assert found["stray"] == (0, PACKETS)


@pytest.mark.parametrize("version", [4, 6])
def test_another_hash(net: RulesNet, version: int) -> None:
    """A rolling update between two formats: half of what is steered finds no taker."""
    net.load(1, *nft.full(rules(table(), 1)))
    net.load(2, *(t.replace(f"{maglev.SEED:#x}", "0x1234567") for t in nft.full(rules(table(), 2))))
    found = sent(net, 1, version, frames.SYN)
    assert found["steered"][1] == 0 < found["steered"][0]
    # Binomial: the other half of the steered share of 300.
    assert PACKETS / 10 < sum(found["stray"]) < PACKETS / 2


@pytest.mark.parametrize("version", [4, 6])
def test_an_old_table(net: RulesNet, version: int) -> None:
    """A node cut off from the API server: new flows that it sends by the old table arrive."""
    old, new = table((2,), unready=(1,)), table()
    net.load(1, *nft.full(rules(old, 1)))
    view = nodeview.advance(nodeview.advance({}, old, "n2"), new, "n2")
    net.load(2, *nft.full(rules(new, 2, view=view)))
    found = sent(net, 1, version, frames.SYN)
    # The client knows nothing of these flows and resets them: that is steered as well.
    assert found["steered"][0] >= PACKETS and found["steered"][1] == 0
    assert found["delivered"] == (0, PACKETS)


@pytest.mark.parametrize("version", [4, 6])
def test_each_hands_over_to_the_other(net: RulesNet, version: int) -> None:
    """The worst of second chances: both say that the flow was the other's. Its hops end it."""
    for node in (1, 2):
        mine, other = table((node,), unready=(3 - node,)), table((3 - node,), unready=(node,))
        me = f"n{node}"
        view = nodeview.advance(nodeview.advance({}, other, me), mine, me)
        net.load(node, *nft.full(rules(mine, node, view=view)))
    found = sent(net, 1, version, frames.ACK)
    assert sum(found["steered"]) == 0 and sum(found["stray"]) == PACKETS
    assert PACKETS < sum(found["second_chance"]) <= PACKETS * nftrules.HANDOVER_TTL
