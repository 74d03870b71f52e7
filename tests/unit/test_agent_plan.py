"""The agent's own plans: numbers of nodes, ways to them, policy rules; and the snapshot."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from agent.engine import assign, current_macs, hops
from agent.inputs import Inputs, config_of
from agent.rendering import State, render
from agent.routes import Hop, Survey, rules
from agent.snapshot import FILE, Store
from lbctl.core import nodeview
from lbctl.core.model import (
    Eip,
    ForwardingOptions,
    Node,
    ObjectRef,
    PortEndpoints,
    ServiceEndpoints,
)
from lbctl.core.names import MARK_BASE, ROUTE_TABLE_BASE, RULE_PRIORITY
from lbctl.kube.objects import DataObject

from .forwarding_cases import EIP, RANGES, WEB, nodes, pod, service, table

SURVEY = Survey((("eth0", 2),), ((IPv4Network("192.0.2.0/24"), 2),))


def test_a_node_keeps_its_number_and_a_freed_one_rests() -> None:
    first = assign({}, "n1", nodes(4))
    assert first == {"n2": 1, "n3": 2, "n4": 3}
    without = assign(first, "n1", tuple(n for n in nodes(4) if n.name != "n4"))
    assert without == {"n2": 1, "n3": 2}
    swapped = tuple(n for n in nodes(5) if n.name != "n4")
    assert assign(first, "n1", swapped) == {"n2": 1, "n3": 2, "n5": 4}
    assert assign({"n2": 0xFFFE}, "n1", nodes(3)) == {"n2": 0xFFFE, "n3": 1}


def test_ways_lead_over_a_link_only() -> None:
    away = Node("away", addresses=(IPv4Address("10.9.9.9"),))
    chosen = Node(
        "chosen", addresses=(IPv4Address("10.9.9.8"),), next_hops=(IPv4Address("192.0.2.77"),)
    )
    found = hops(SURVEY, {"n2": 1, "away": 2, "chosen": 3}, (*nodes(2), away, chosen))
    assert found == {
        1: Hop(IPv4Address("192.0.2.22"), 2),
        3: Hop(IPv4Address("192.0.2.77"), 2),
    }


def test_macs_of_nodes_that_left_are_forgotten() -> None:
    known = {IPv4Address(f"192.0.2.{n}"): f"02:00:00:00:00:{n}" for n in (21, 22, 29)}
    assert list(current_macs(known, "n1", nodes(3))) == [IPv4Address("192.0.2.22")]


def test_unmarked_packets_pass_one_rule() -> None:
    made = rules((1, 2))
    guard = min(made, key=lambda rule: rule.priority)
    last = max(made, key=lambda rule: rule.priority)
    assert guard.invert and guard.target == last.priority == RULE_PRIORITY + 3
    assert made[0] == last and made[-1] == guard
    assert [(r.mark - MARK_BASE, r.target - ROUTE_TABLE_BASE) for r in made[2:-1]] == [
        (1, 1),
        (2, 2),
    ]


OPTIONS = ForwardingOptions(("eth1",), "tunnel", False, "strict", 7, "masquerade")


def state() -> State:
    pods = tuple(pod(n, p) for n in (1, 2, 3) for p in (2, 3))
    limited = service(affinity=False)
    first, second = table(*pods[:3]), table(*pods, of=limited)
    inputs = Inputs(
        eips={EIP: Eip(EIP, "public", WEB, "uid")},
        services={WEB: limited},
        endpoints={
            WEB: ServiceEndpoints(
                WEB, tuple(PortEndpoints(p.name, p.protocol, pods) for p in limited.ports)
            )
        },
        nodes=nodes(),
        ranges=RANGES,
        forwarding=OPTIONS,
        config_generation=4,
    )
    view = nodeview.advance(nodeview.advance({}, first), second)
    macs = {IPv4Address("192.0.2.22"): "02:00:00:00:00:02"}
    index = {"n2": 1, "n3": 5}
    bare = State(inputs, frozenset(), second, view, index, macs, usable=("n2", "n3"), shape="x")
    return render(bare, "n1", 9, ("eth0",))


def test_a_snapshot_gives_back_the_same_ruleset(tmp_path: Path) -> None:
    kept = state()
    store = Store(tmp_path, "n1")
    assert store.load() is None
    store.save(kept)
    store.write()
    found = store.load()
    assert found is not None
    assert found.rules == kept.rules
    assert found.inputs.forwarding == OPTIONS
    assert any(port.prev for port in found.rules.ports.values())
    assert (found.table.digest, found.index, found.shape) == (
        kept.table.digest,
        kept.index,
        kept.shape,
    )
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert Store(tmp_path, "n2").load() is None


def test_what_the_agent_takes_from_the_accepted_configuration() -> None:
    assert config_of(None) == (0, (), ForwardingOptions())
    text = """\
version: 1
pools: [{name: public, addresses: [198.51.100.0/31]}]
bgp: {asn: 64512, peers: []}
forwarding: {interfaces: [eth1], steering: tunnel, ping: false, localDelivery: strict,
  newFlowsPerSecond: 7}
endpoints: {external: masquerade}
"""
    accepted = DataObject(
        ObjectRef("lbctl-system", "lbctl-accepted"),
        "uid",
        (("config.yaml", text), ("generation", "3")),
    )
    ranges = ((IPv4Address("198.51.100.0"), IPv4Address("198.51.100.1")),)
    assert config_of(accepted) == (3, ranges, OPTIONS)


def test_a_damaged_snapshot_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path, "n1")
    store.save(state())
    store.write()
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (
        b"",
        b"{}",
        b"[1]",
        whole[:-9],
        whole.replace(b"198.51.100.1", b"not.an.addr"),
        whole.replace(b"masquerade", b"hide"),
    ):
        (tmp_path / FILE).write_bytes(damaged)
        assert store.load() is None
    store.remove()
    assert not (tmp_path / FILE).exists()
