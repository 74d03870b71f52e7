"""The agent's own plans: numbers of nodes, ways to them, policy rules; and the snapshot."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from pathlib import Path

from agent.inputs import Inputs, config_of, growing
from agent.rendering import State, render
from agent.snapshot import FILE, Store
from lbctl.core import forwarding, nodeview, ways
from lbctl.core.forwarding import Locator
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    External,
    ForwardingOptions,
    Node,
    ObjectRef,
    PortEndpoints,
    ServiceEndpoints,
)
from lbctl.core.names import MARK_BASE, NODE_BITS, ROUTE_TABLE_BASE, RULE_PRIORITY
from lbctl.core.ways import TUNNEL, Hop, Survey, assign, current_macs, rules
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
    assert assign({"n2": NODE_BITS}, "n1", nodes(3)) == {"n2": NODE_BITS, "n3": 1}


def test_numbers_have_no_bit_of_the_others() -> None:
    many = tuple(Node(f"n{n:04}") for n in range(ways.MOST_NODES + 1))
    numbers = assign({}, "n0000", many)
    assert len(set(numbers.values())) == ways.MOST_NODES
    assert max(numbers.values()) == NODE_BITS and not any(n & ~NODE_BITS for n in numbers.values())
    assert assign(numbers, "n0000", many) == numbers
    # One from before NODE_BITS were fixed is not kept.
    assert assign({"n2": 0x100}, "n1", nodes(2)) == {"n2": 1}


def test_a_load_in_stages_ends_with_the_inputs_themselves() -> None:
    eips = {EIP + n: Eip(EIP + n, "public", WEB, "uid") for n in range(7)}
    inputs = Inputs(eips=eips, nodes=nodes(3))
    *parts, last = growing(inputs, stage=3)
    assert last is inputs
    assert [sorted(part.eips) for part in parts] == [sorted(eips)[:3], sorted(eips)[:6]]
    assert all(part.nodes is inputs.nodes for part in parts)
    assert list(growing(Inputs(), stage=3)) == [Inputs()]


def old_nodes(count: int) -> tuple[Node, ...]:
    return tuple(Node(n.name, addresses=n.addresses[:1]) for n in nodes(count))


def test_ways_by_steering() -> None:
    away = Node("away", addresses=(IPv4Address("10.9.9.9"),))
    chosen = Node(
        "chosen", addresses=(IPv4Address("10.9.9.8"),), next_hops=(IPv4Address("192.0.2.77"),)
    )
    known, index = (*old_nodes(2), away, chosen), {"n2": 1, "away": 2, "chosen": 3}
    beside = {
        (4, 1): Hop(IPv4Address("192.0.2.22"), 2),
        (4, 3): Hop(IPv4Address("192.0.2.77"), 2),
    }
    assert ways.choose(SURVEY, "direct", "n1", index, known) == beside
    across = {(4, 2): Hop(IPv4Address("10.9.9.9"), TUNNEL)}
    assert ways.choose(SURVEY, "auto", "n1", index, known) == beside | across
    all_through = ways.choose(SURVEY, "tunnel", "n1", index, known)
    assert [hop.interface for hop in all_through.values()] == [TUNNEL] * 3
    assert list(ways.unreached(SURVEY, beside, "n1", index, known)) == ["away"]


def test_both_ends_choose_the_same() -> None:
    """A node with a second link that the other one knows nothing of goes by tunnel, both ways."""
    second = Survey(
        (("eth0", 2), ("eth1", 3)),
        ((IPv4Network("192.0.2.0/24"), 2), (IPv4Network("198.18.0.0/24"), 3)),
    )
    other = Node("other", addresses=(IPv4Address("198.18.0.9"),))
    known = (*old_nodes(1), other)
    assert ways.choose(second, "auto", "n1", {"other": 1}, known)[4, 1].interface == TUNNEL
    far = Survey((("eth0", 2),), ((IPv4Network("198.18.0.0/24"), 2),))
    assert ways.choose(far, "auto", "other", {"n1": 1}, known)[4, 1].interface == TUNNEL


def dual(name: str, subnet: int, host: int) -> Node:
    return Node(
        name,
        addresses=(
            ip_address(f"2001:db8:{subnet}::{host}"),
            ip_address(f"192.0.{subnet}.{host}"),
        ),
    )


def test_each_family_has_its_own_way() -> None:
    links = ((IPv4Network("192.0.2.0/24"), 2), (IPv6Network("2001:db8:2::/64"), 2))
    survey = Survey((("eth0", 2),), links, 1500)
    known = (dual("a", 2, 21), dual("b", 2, 22), dual("c", 3, 23))
    index = {"b": 1, "c": 2}
    found = ways.choose(survey, "auto", "a", index, known)
    made = ways.tunnel(survey, found, "a", index, known)
    assert found[6, 1] == Hop(ip_address("2001:db8:2::22"), 2)
    assert made is not None and made.local == IPv4Address("192.0.2.21") and made.mtu == 1450
    assert made.peers == (IPv4Address("192.0.3.23"),)
    assert [found[version, 2].gateway for version in (4, 6)] == [a for a, _ in made.gateways]
    assert {mac for _, mac in made.gateways} == {ways.tunnel_mac(IPv4Address("192.0.3.23"))}
    # Without an address of ours in IPv6, it is left alone.
    old = tuple(Node(n.name, addresses=n.addresses[1:]) for n in known)
    only = Survey((("eth0", 2),), links[:1], 1500)
    assert {version for version, _ in ways.choose(only, "auto", "a", index, old)} == {4}


def test_a_tunnel_over_ipv6() -> None:
    known = tuple(
        Node(n.name, addresses=n.addresses[:1]) for n in (dual("a", 2, 1), dual("b", 3, 2))
    )
    survey = Survey((("eth0", 2),), ((IPv6Network("2001:db8:2::/64"), 2),), 9000)
    found = ways.choose(survey, "auto", "a", {"b": 1}, known)
    made = ways.tunnel(survey, found, "a", {"b": 1}, known)
    assert made is not None and (made.mtu, made.local) == (8930, ip_address("2001:db8:2::1"))
    assert made.mac == ways.tunnel_mac(made.local) != ways.tunnel_mac(made.peers[0])
    assert found == {(6, 1): Hop(made.gateways[0][0], TUNNEL)} and found[6, 1].gateway.is_link_local
    assert ways.tunnel(survey, {}, "a", {"b": 1}, known) is None


def test_macs_of_nodes_that_left_are_forgotten() -> None:
    known = {ip_address(f"192.0.2.{n}"): f"02:00:00:00:00:{n}" for n in (21, 22, 29)}
    assert list(current_macs(known, "n1", nodes(3))) == [IPv4Address("192.0.2.22")]


def test_unmarked_packets_pass_one_rule() -> None:
    made = rules((1, 2))
    guard = min(made, key=lambda rule: rule.priority)
    last = max(made, key=lambda rule: rule.priority)
    assert guard.invert and guard.target == last.priority == RULE_PRIORITY + 4
    assert made[0] == last and made[-1] == guard
    assert [(r.mark - MARK_BASE, r.target - ROUTE_TABLE_BASE) for r in made[3:-1]] == [
        (1, 1),
        (2, 2),
    ]
    assert [rule.target for rule in made if rule.own] == [last.priority]


OPTIONS = ForwardingOptions(("eth1",), "tunnel", False, "strict", 7, "masquerade", "nodeName")


def state() -> State:
    named = replace(pod(2, 9), node="n1")  # where its nodeName says, and not in n2's pod CIDR
    pods = (*(pod(n, p) for n in (1, 2, 3) for p in (2, 3)), named)
    limited, locator = service(affinity=False), Locator(nodes(), "nodeName")
    first, second = (
        table(*pods[:3], locator=locator),
        table(*pods, of=limited, locator=locator),
    )
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
    view = nodeview.advance(nodeview.advance({}, first, "n1"), second, "n1")
    macs = {ip_address("192.0.2.22"): "02:00:00:00:00:02"}
    index = {"n2": 1, "n3": 5}
    bare = State(
        inputs,
        frozenset(),
        second,
        view,
        index,
        macs,
        usable=("n2", "n3"),
        shape="x",
        usable6=("n2",),
        tunnel_peers=(IPv4Address("192.0.2.23"),),
        tunnel_mtu=1450,
    )
    return render(bare, "n1", 9, ("eth0",))


def test_a_snapshot_gives_back_the_same_ruleset(tmp_path: Path) -> None:
    kept = state()
    store = Store(tmp_path, "n1")
    assert store.load() is None
    store.save(kept)
    store.kept.write()
    found = store.load()
    assert found is not None
    assert found.rules == kept.rules
    assert found.inputs.forwarding == OPTIONS
    assert any(port.counts()["prev"] for port in found.rules.ports.values())
    assert (found.usable6, found.tunnel_peers) == (kept.usable6, kept.tunnel_peers)
    assert (found.table.digest, found.index, found.shape) == (
        kept.table.digest,
        kept.index,
        kept.shape,
    )
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert Store(tmp_path, "n2").load() is None


def test_a_snapshot_of_before_endpoints_nodes_goes_by_pod_cidrs(tmp_path: Path) -> None:
    store = Store(tmp_path, "n1")
    store.save(state())
    store.kept.write()
    whole = (tmp_path / FILE).read_bytes()
    older = whole.replace(b',"located_by":"nodeName"', b"")
    assert older != whole
    (tmp_path / FILE).write_bytes(older)
    found = store.load()
    assert found is not None and found.inputs.forwarding.located_by == "podCIDR"


def test_what_the_agent_takes_from_the_accepted_configuration() -> None:
    assert config_of(None) == (0, (), ForwardingOptions())
    text = """\
version: 1
pools: [{name: public, addresses: [198.51.100.0/31]}]
bgp: {asn: 64512, peers: []}
forwarding: {interfaces: [eth1], steering: tunnel, ping: false, localDelivery: strict,
  newFlowsPerSecond: 7}
endpoints: {external: masquerade, nodes: nodeName}
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
    store.kept.write()
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (
        b"",
        b"{}",
        b"[1]",
        whole[:-9],
        whole.replace(b"198.51.100.1", b"not.an.addr"),
        whole.replace(b"masquerade", b"hide"),
        whole.replace(b"nodeName", b"podName"),
    ):
        (tmp_path / FILE).write_bytes(damaged)
        assert store.load() is None
    store.kept.remove()
    assert not (tmp_path / FILE).exists()


def test_external_endpoints_are_masqueraded_while_they_are_asked_for() -> None:
    """`endpoints.external`: in the set as long as an EIP has one, and only then."""
    outside = Endpoint(ip_address("192.0.2.200"), 8080)
    of = service()
    behind = ServiceEndpoints(
        of.ref, tuple(PortEndpoints("", p.protocol, (outside,)) for p in of.ports)
    )
    before = State()
    steps: tuple[tuple[External, tuple[Address, ...]], ...] = (
        ("refuse", ()),
        ("masquerade", (outside.address,)),
        ("refuse", ()),
    )
    for asked, expected in steps:
        inputs = Inputs(nodes=nodes(), ranges=RANGES, forwarding=ForwardingOptions(external=asked))
        sources = forwarding.Sources(
            {EIP: Eip(EIP, "public", of.ref, "uid")},
            {of.ref: of},
            {of.ref: behind},
            Locator(nodes()),
            frozenset(),
            inputs.forwarding,
        )
        made = forwarding.revise(before.table, sources)
        view = nodeview.advance(before.view, made, "n1", before.table)
        before = render(
            replace(before, inputs=inputs, table=made, view=view), "n1", 1, ("eth0",), before
        )
        assert before.rules.policy.external == expected
