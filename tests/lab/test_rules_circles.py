"""No circles: nodes whose tables differ, in content, age or hash, lose packets and count them.

Every packet is steered once at most, whatever the two nodes believe of each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from lbctl.core import maglev, nft, nodeview
from lbctl.core.names import MARK_BASE
from lbctl.core.nftfamily import HANDOVER_TTL

from . import frames
from .agentnet import sh, wait_for
from .rulesnet import CLIENT, EIP, GATE_MAC, PORT, ROUTER_MAC, RulesNet, made, rules, table

PACKETS = 300
SOURCES = itertools.count(20000)
KINDS = {"syn": frames.SYN, "established": frames.ACK}
QUIET = """table inet quiet {
  chain out { type filter hook output priority 0; tcp flags & rst == rst drop; }
}
"""
NAMES = ("steered", "sent_on", "delivered", "second_chance", "stray", "refused")


@pytest.fixture(scope="module")
def net() -> Iterator[RulesNet]:
    net = made("rc")
    # The client knows nothing of the flows that are sent as frames here, and would reset them.
    net.run_text("c", QUIET)
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
    # It is handed back, in case that this table is the older one; what is established once more by
    # each of the two, for the former owner may be known to the first alone.
    if kind == "syn":
        assert found["sent_on"] == (0, PACKETS)
    else:
        assert found["second_chance"] == (PACKETS, 2 * PACKETS)
    assert found["stray"] == (PACKETS, 0)


def other_hash(node: int) -> list[str]:
    """The rules of a node whose packet hash has another seed."""
    return [t.replace(f"{maglev.SEED:#x}", "0x1234567") for t in nft.full(rules(table(), node))]


def other_format(node: int) -> list[str]:
    """Those of a node with the same hash, and as unlike a table as can be: of another FORMAT."""
    common = table()
    eips = {
        address: replace(
            entry,
            ports=tuple(
                replace(p, owners=maglev.translated(p.owners, (1, 0))) for p in entry.ports
            ),
        )
        for address, entry in common.eips.items()
    }
    return nft.full(rules(replace(common, eips=eips), node))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", [other_hash, other_format])
@pytest.mark.parametrize("version", [4, 6])
def test_a_rolling_update(
    net: RulesNet, version: int, other: Callable[[int], list[str]], kind: str
) -> None:
    """What another format steers here goes to a pod here; established flows find no taker."""
    net.load(1, *nft.full(rules(table(), 1)))
    net.load(2, *other(2))
    found = sent(net, 1, version, KINDS[kind])
    assert found["steered"][1] == 0 < found["steered"][0]
    steered = PACKETS / 3  # half, and six sigma of a binomial less
    if kind == "syn":
        assert sum(found["delivered"]) == PACKETS and found["delivered"][1] > steered
    elif other is other_format:
        assert found["stray"][0] > steered
    else:
        assert PACKETS / 10 < found["stray"][0] < PACKETS / 2


@pytest.mark.parametrize(
    ("pods", "where"),
    [([(1, 2)], 2), ([(1, 2), (2,), (1, 2)], 2), ([(1,)], 1)],
)
@pytest.mark.parametrize("version", [4, 6])
def test_an_old_table(net: RulesNet, version: int, pods: list[tuple[int, ...]], where: int) -> None:
    """A node cut off from the API server while the other goes on, by one table or several.

    New flows that it sends by its old table go to a pod there, or else back to one of its own.
    """
    old = table((2,), unready=(1,))
    net.load(1, *nft.full(rules(old, 1)))
    view = nodeview.advance({}, old, "n2")
    for some in pods:
        view = nodeview.advance(view, table(some), "n2")
    net.load(2, *nft.full(rules(table(pods[-1]), 2, view=view)))
    found = sent(net, 1, version, frames.SYN)
    assert found["steered"] == (PACKETS, 0)
    assert found["delivered"] == ((0, PACKETS) if where == 2 else (PACKETS, 0))


@pytest.mark.parametrize("version", [4, 6])
def test_an_old_table_while_a_pod_ends(net: RulesNet, version: int) -> None:
    """The node is drained, its pods serve on: the other one has not heard of it yet."""
    old, new = table((1, 2)), table((1,), ending=(2,))
    net.load(1, *nft.full(rules(old, 1)))
    view = nodeview.advance(nodeview.advance({}, old, "n2"), new, "n2")
    net.load(2, *nft.full(rules(new, 2, view=view)))
    found = sent(net, 1, version, frames.SYN)
    assert found["stray"] == (0, 0)
    assert sum(found["delivered"]) == PACKETS and found["delivered"][1] > PACKETS / 3


@pytest.mark.parametrize("version", [4, 6])
def test_each_hands_over_to_the_other(net: RulesNet, version: int) -> None:
    """The worst of second chances: both say that the flow was the other's."""
    for node in (1, 2):
        mine, other = table((node,), unready=(3 - node,)), table((3 - node,), unready=(node,))
        me = f"n{node}"
        view = nodeview.advance(nodeview.advance({}, other, me), mine, me)
        net.load(node, *nft.full(rules(mine, node, view=view)))
    found = sent(net, 1, version, frames.ACK)
    assert sum(found["steered"]) == 0 and sum(found["stray"]) == PACKETS
    # By the first, passed on by the other, and once more because the first has noted it.
    assert found["second_chance"] == (2 * PACKETS, PACKETS)


@pytest.mark.parametrize("version", [4, 6])
def test_what_was_passed_on_does_not_swallow_a_new_connection(net: RulesNet, version: int) -> None:
    """A dead node's client repeats itself once, by way of others; then its port is used again.

    A flow with a note is remembered for 30 s: so long would `connect` wait in vain.
    """
    mine, other = table((2,), unready=(1,)), table((1,), unready=(2,))
    past = nodeview.advance(nodeview.advance({}, other, "n2"), mine, "n2")
    net.load(1, *nft.full(rules(table((1,)), 1)))
    net.load(2, *nft.full(rules(mine, 2, view=past)))
    net.enter(2)
    wire, ports = net.link("c", "eth0"), [next(SOURCES) for _ in range(8)]
    for source in ports:
        packet = frames.tcp(CLIENT[version], source, EIP[version], PORT, frames.ACK)
        # As handed over by another node: the router takes one hop.
        packet = frames.with_hops(packet, HANDOVER_TTL + 1)
        wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
    wait_for("all to be passed on", lambda: net.counters(2)["second_chance"] == len(ports))
    net.load(2, *nft.full(rules(table((2,)), 2)))
    for source in ports:
        net.connect(version, source=source).close()


@pytest.mark.parametrize("version", [4, 6])
def test_a_note_to_a_silent_node_is_left_for_another_former_owner(
    net: RulesNet, version: int
) -> None:
    """Flows were handed over by way of node 3, which dies; node 1 has them and had the bucket."""
    mine, other = table((2,), unready=(1,)), table((1,), unready=(2,))
    past = nodeview.advance(nodeview.advance({}, other, "n2"), mine, "n2")
    plain = rules(mine, 2, view=past)
    net.load(1, *nft.full(rules(other, 1)))
    net.load(2, *nft.full(renumbered(plain, {1: 3})))
    rule = f"rule add fwmark {MARK_BASE + 3:#x} lookup 103"
    for command in (rule, "route replace default dev eth0 table 103"):
        sh("ip", f"-{version}", "-n", net.ns("n2"), *command.split())
    net.enter(2)
    wire, ports = net.link("c", "eth0"), [next(SOURCES) for _ in range(8)]

    def said(of: int, name: str) -> None:
        before = net.counters(of)[name]
        for source in ports:
            packet = frames.tcp(CLIENT[version], source, EIP[version], PORT, frames.ACK)
            wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
        what = f"{name} at node {of} to count {len(ports)}"
        wait_for(what, lambda: net.counters(of)[name] == before + len(ports))

    said(2, "second_chance")  # to node 3
    net.load(2, *nft.full(plain))
    said(2, "second_chance")  # still: it is noted
    assert net.counters(1)["stray"] == 0
    net.load(2, *nft.full(replace(rules(mine, 2), silent=(3,))))
    said(2, "second_chance")  # nobody else had it: node 3 may come back
    assert net.counters(1)["stray"] == net.counters(2)["delivered"] == 0
    net.load(2, *nft.full(replace(plain, silent=(3,))))
    said(1, "stray")  # where a pod would have them


def renumbered(of: nft.Ruleset, numbers: dict[int, int]) -> nft.Ruleset:
    """The rules with other numbers for other nodes."""
    ports = {}
    for key, port in of.ports.items():
        targets = tuple(numbers.get(t, t) if isinstance(t, int) else t for t in port.targets)
        ports[key] = replace(port, targets=targets)
    return replace(of, ports=ports)
