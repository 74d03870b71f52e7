"""Route selection: who is a next hop of what, why not, what stays when nobody is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core.config import parse
from lbctl.core.confirmations import Confirmations
from lbctl.core.endpoints import KUBELETS_S, Doubt, taking
from lbctl.core.forwarding import Locator
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    Node,
    NodeState,
    NodeView,
    ObjectRef,
    Phase,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
    TrafficPolicy,
)
from lbctl.core.pmap import PSet
from lbctl.core.reasons import Reason
from lbctl.core.routes import EipSelection, PathIds, Rules, Verdicts, path_id, select

CONFIG = """
version: 1
pools:
  - name: public
    addresses: [198.51.100.0/24, "2001:db8:1::/120"]
bgp:
  asn: 64512
  peers:
    - {name: tor, address: 192.0.2.1, asn: 64500}
"""
A, B = ip_address("198.51.100.1"), ip_address("198.51.100.2")
V6 = ip_address("2001:db8:1::1")
WEB, DB = ObjectRef("default", "web"), ObjectRef("default", "db")
SUSPECT = {"state": NodeState.SUSPECT}


def service(ref: ObjectRef, policy: TrafficPolicy = TrafficPolicy.CLUSTER) -> Service:
    return Service(ref, ref.name, 0.0, (ServicePort("", Protocol.TCP, 80),), True, policy=policy)


def behind(ref: ObjectRef, *on: str, ready: bool = True) -> ServiceEndpoints:
    endpoints = tuple(
        Endpoint(ip_address(f"10.244.0.{n}"), 80, node, f"pod-{n}", ready=ready)
        for n, node in enumerate(on, 1)
    )
    return ServiceEndpoints(ref, (PortEndpoints("", Protocol.TCP, endpoints),))


class World:
    """Three nodes, one Service with an endpoint on each of the first two; change, then select."""

    def __init__(self, count: int = 3, extra: str = "") -> None:
        self.rules = Rules(parse(CONFIG + extra), "m1")
        self.nodes = {
            f"n{n}": Node(f"n{n}", addresses=(ip_address(f"192.0.2.{20 + n}"),))
            for n in range(1, count + 1)
        }
        everything = frozenset({A, B, V6})
        self.views = {
            name: NodeView(name, NodeState.UP, confirmed=everything, local_ready=everything)
            for name in self.nodes
        }
        self.eips = {A: Eip(A, "public", WEB, "web")}
        self.services = {WEB: service(WEB), DB: service(DB)}
        self.endpoints = {WEB: behind(WEB, "n1", "n2"), DB: behind(DB, "n1")}
        self.ids = PathIds()
        self.locator = Locator(self.nodes.values())
        self.doubtful = frozenset[str]()

    def view(self, name: str, **changes: object) -> None:
        self.views[name] = replace(self.views[name], **changes)  # type: ignore[arg-type]

    def node(self, name: str, **changes: object) -> None:
        self.nodes[name] = replace(self.nodes[name], **changes)  # type: ignore[arg-type]
        self.locator = Locator(self.nodes.values())

    def select(
        self, previous: Mapping[Address, EipSelection] | None = None
    ) -> dict[Address, EipSelection]:
        confirmations = Confirmations()
        for name, view in self.views.items():
            confirmations.take(name, None, view)
        known = (self.rules, self.nodes, self.views, self.ids, self.locator, self.doubtful)
        behind = (self.services.get, self.endpoints.get, confirmations)
        return select(Verdicts(*known), self.eips.values(), *behind, previous or {})

    def one(self, previous: Mapping[Address, EipSelection] | None = None) -> EipSelection:
        return self.select(previous)[A]

    def hops(self) -> list[str]:
        return sorted(path.node for path in self.one().paths)


def test_every_up_node_that_confirmed_is_a_next_hop() -> None:
    world = World()
    result = world.one()
    assert result.reason is Reason.ANNOUNCED
    assert {(str(p.next_hop), p.node) for p in result.paths} == {
        ("192.0.2.21", "n1"),
        ("192.0.2.22", "n2"),
        ("192.0.2.23", "n3"),
    }
    assert result.reasons == dict.fromkeys(["n1", "n2", "n3"], Reason.ANNOUNCED)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": NodeState.UNKNOWN}, Reason.NODE_UNKNOWN),
        ({"state": NodeState.SUSPECT}, Reason.NODE_SUSPECT),
        ({"state": NodeState.DOWN}, Reason.NODE_DOWN),
        ({"stable": False}, Reason.NODE_FLAPPING),
        ({"lags": True}, Reason.NODE_LAGS),
        ({"confirmed": frozenset({B})}, Reason.NOT_CONFIRMED),
    ],
)
def test_views_that_take_a_node_out(changes: dict[str, object], reason: Reason) -> None:
    world = World()
    world.view("n1", **changes)
    assert world.hops() == ["n2", "n3"]
    assert world.one().reasons["n1"] is reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"excluded": True}, Reason.NODE_EXCLUDED),
        ({"out_of_service": True}, Reason.NODE_OUT_OF_SERVICE),
        ({"draining": True}, Reason.NODE_DRAINING),
        ({"deleting": True}, Reason.NODE_DRAINING),
        ({"addresses": ()}, Reason.NODE_NO_ADDRESS),
        ({"addresses": (ip_address("2001:db8::1"),)}, Reason.NODE_NO_ADDRESS),
    ],
)
def test_nodes_that_are_no_next_hop_even_as_the_last(
    changes: dict[str, object], reason: Reason
) -> None:
    world = World(1)
    world.node("n1", **changes)
    assert world.hops() == []
    assert world.one().reasons["n1"] is reason
    assert world.one().reason is Reason.NO_NEXT_HOP


def test_a_deleted_node_is_no_next_hop_and_leaves_no_verdict() -> None:
    world = World()
    assert world.hops() == ["n1", "n2", "n3"]
    del world.nodes["n1"]
    assert world.hops() == ["n2", "n3"]
    assert "n1" not in world.one().reasons


def test_our_own_host_is_left_to_others_unless_it_is_the_last_or_the_policy_is_local() -> None:
    world = World()
    world.rules = replace(world.rules, left="n1")
    assert world.hops() == ["n2", "n3"]
    assert world.one().reasons["n1"] is Reason.LEFT_TO_OTHERS
    for name in ("n2", "n3"):
        world.view(name, state=NodeState.DOWN)
    assert world.hops() == ["n1"] and world.one().reasons["n1"] is Reason.ANNOUNCED
    world = World()
    world.rules = replace(world.rules, left="n1")
    world.services[WEB] = service(WEB, TrafficPolicy.LOCAL)
    assert world.hops() == ["n1", "n2"]


def test_what_is_left_to_others_has_no_substitute_beyond_max_paths() -> None:
    world = World(5, "announce: {maxPaths: 3}")
    chosen = world.hops()
    world.rules = replace(world.rules, left=chosen[0])
    assert world.hops() == chosen[1:]


def test_not_ready_is_said_as_such() -> None:
    world = World()
    world.node("n1", ready=False)
    world.view("n1", state=NodeState.DOWN)
    assert world.one().reasons["n1"] is Reason.NODE_NOT_READY


def test_node_without_a_view_has_never_answered() -> None:
    world = World()
    del world.views["n1"]
    assert world.one().reasons["n1"] is Reason.NODE_UNKNOWN


def test_silent_agent_keeps_what_it_confirmed() -> None:
    world = World()
    world.view("n1", state=NodeState.AGENT_SILENT)
    world.view("n2", state=NodeState.AGENT_SILENT, confirmed=frozenset())
    assert world.hops() == ["n1", "n3"]
    assert world.one().reasons["n1"] is Reason.AGENT_SILENT
    assert world.one().reasons["n2"] is Reason.NOT_CONFIRMED


def test_a_table_without_endpoints_is_no_next_hop_though_the_manager_sees_some() -> None:
    world = World()
    world.view("n2", empty=frozenset({A}))
    assert world.hops() == ["n1", "n3"]
    assert world.one().reasons["n2"] is Reason.NOT_CONFIRMED


def test_panic_holds_what_was_confirmed() -> None:
    world = World()
    for name in world.nodes:
        world.view(name, state=NodeState.SUSPECT, held=True)
    world.view("n3", confirmed=frozenset())
    assert world.hops() == ["n1", "n2"]
    assert world.one().reasons["n1"] is Reason.HELD_BY_PANIC


def test_the_suspect_that_fell_last_stays_until_it_is_down() -> None:
    world = World()
    world.view("n1", **SUSPECT, since_s=10.0)
    world.view("n2", **SUSPECT, since_s=20.0)
    assert world.hops() == ["n3"]
    world.view("n3", **SUSPECT, since_s=30.0)
    assert world.hops() == ["n3"]
    assert world.one().reasons["n3"] is Reason.LAST_NEXT_HOP
    assert world.one().reasons["n2"] is Reason.NODE_SUSPECT
    world.view("n3", state=NodeState.DOWN)
    world.view("n1", state=NodeState.DOWN)
    world.view("n2", state=NodeState.DOWN)
    assert world.hops() == []


def test_a_doubtful_node_is_better_than_a_suspect_one() -> None:
    world = World()
    world.view("n1", **SUSPECT, since_s=10.0)
    world.view("n2", stable=False)
    world.view("n3", lags=True)
    assert world.hops() == ["n2", "n3"]
    assert world.one().reasons["n2"] is Reason.LAST_NEXT_HOP


def test_local_policy_takes_nodes_with_an_endpoint_that_say_so() -> None:
    world = World()
    world.services[WEB] = service(WEB, TrafficPolicy.LOCAL)
    assert world.hops() == ["n1", "n2"]
    assert world.one().reasons["n3"] is Reason.NO_LOCAL_ENDPOINT
    world.view("n1", local_ready=frozenset())
    assert world.hops() == ["n2"]
    assert world.one().reasons["n1"] is Reason.NOT_CONFIRMED


@pytest.mark.parametrize("endpoints", [behind(WEB), behind(WEB, "n1", ready=False), None])
def test_no_endpoint_no_route(endpoints: ServiceEndpoints | None) -> None:
    world = World()
    world.endpoints = {} if endpoints is None else {WEB: endpoints}
    assert (world.hops(), world.one().reason) == ([], Reason.NO_ENDPOINTS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"phase": Phase.RELEASING}, Reason.RELEASING),
        ({"forwarding": False}, Reason.RELEASING),
        ({"address": ip_address("203.0.113.5")}, Reason.ADDRESS_OUTSIDE_POOLS),
        ({"owner": ObjectRef("default", "gone")}, Reason.NO_ENDPOINTS),
    ],
)
def test_eips_that_are_not_announced(changes: dict[str, object], reason: Reason) -> None:
    world = World()
    eip = replace(world.eips[A], **changes)  # type: ignore[arg-type]
    world.eips = {eip.address: eip}
    for name in world.nodes:
        world.view(name, confirmed=frozenset({eip.address}))
    result = world.select()
    assert result[eip.address].paths == frozenset()
    assert result[eip.address].reason is reason


def external(*addresses: str) -> ServiceEndpoints:
    ends = tuple(Endpoint(ip_address(a), 80) for a in addresses)
    return ServiceEndpoints(WEB, (PortEndpoints("", Protocol.TCP, ends),))


def test_external_endpoints_are_served_by_every_node_that_confirmed() -> None:
    world = World(3, "endpoints: {external: masquerade}\n")
    world.endpoints[WEB] = external("203.0.113.200")
    world.view("n3", confirmed=frozenset())
    assert world.hops() == ["n1", "n2"]
    world.services[WEB] = service(WEB, TrafficPolicy.LOCAL)
    assert set(world.one().reasons.values()) == {Reason.NO_LOCAL_ENDPOINT}


def test_external_endpoints_are_refused_by_default_and_with_a_reason() -> None:
    world = World()
    world.endpoints[WEB] = external("203.0.113.200")
    assert (world.hops(), world.one().reason) == ([], Reason.ENDPOINTS_ON_NO_NODE)
    world.endpoints[WEB] = ServiceEndpoints(WEB, hosts=True)
    assert (world.hops(), world.one().reason) == ([], Reason.HOST_ENDPOINTS)
    world.endpoints[WEB] = external("192.0.2.22")
    assert world.hops() == ["n1", "n2", "n3"]


def test_local_goes_by_where_an_endpoint_is_not_by_its_nodename() -> None:
    world = World()
    world.services[WEB] = service(WEB, TrafficPolicy.LOCAL)
    world.node("n1", pod_cidrs=(ip_network("10.244.1.0/24"),))
    liar = Endpoint(ip_address("10.244.1.9"), 80, "n2", "pod-9")
    world.endpoints[WEB] = ServiceEndpoints(WEB, (PortEndpoints("", Protocol.TCP, (liar,)),))
    assert world.hops() == ["n1"]
    assert world.one().reasons["n2"] is Reason.NO_LOCAL_ENDPOINT


def test_deleted_service_is_withdrawn_before_the_leader_acts() -> None:
    world = World()
    world.services[WEB] = replace(world.services[WEB], deleting=True)
    assert (world.hops(), world.one().reason) == ([], Reason.RELEASING)


def test_next_hop_annotation_and_family() -> None:
    world = World()
    v6 = ip_address("2001:db8::22")
    world.node("n1", next_hops=(ip_address("192.0.2.99"),))
    world.node("n2", addresses=(*world.nodes["n2"].addresses, v6))
    world.eips[V6] = Eip(V6, "public", WEB, "web")
    assert world.select()[V6].reason is Reason.NO_ENDPOINTS, "its pods have no IPv6 address"
    six = Endpoint(ip_address("fd00::1"), 80, "n1", "pod-1")
    (port,) = world.endpoints[WEB].ports
    world.endpoints[WEB] = replace(
        world.endpoints[WEB], ports=(replace(port, endpoints=(*port.endpoints, six)),)
    )
    result = world.select()
    by_node = {p.node: str(p.next_hop) for p in result[A].paths}
    assert by_node == {"n1": "192.0.2.99", "n2": "192.0.2.22", "n3": "192.0.2.23"}
    assert [path.next_hop for path in result[V6].paths] == [v6]
    assert result[V6].reasons["n1"] is Reason.NODE_NO_ADDRESS


def test_a_next_hop_that_cannot_be_read_is_not_replaced_by_the_address_it_stands_for() -> None:
    world = World()
    world.node("n1", odd_hops=("192.0.2.9l",))
    assert world.hops() == ["n2", "n3"]
    assert world.one().reasons["n1"] is Reason.NODE_NO_ADDRESS
    world.node("n1", next_hops=(ip_address("192.0.2.99"),))
    assert world.hops() == ["n1", "n2", "n3"]


@pytest.mark.parametrize(
    "hop", ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.5", "240.0.0.1", "255.255.255.255"]
)
def test_no_switch_is_told_of_a_next_hop_that_it_would_end_the_session_over(hop: str) -> None:
    """Whoever may annotate one node, or say its InternalIP."""
    world = World()
    world.node("n1", next_hops=(ip_address(hop),))
    assert sorted(str(path.next_hop)[-2:] for path in world.one().paths) == ["21", "22", "23"]
    world.node("n2", addresses=(ip_address(hop),))
    world.node("n3", addresses=(*map(ip_address, ("::1", "fe80::1%eth0", "ff02::1", "fe80::1")),))
    assert world.hops() == ["n1"] and world.one().reasons["n2"] is Reason.NODE_NO_ADDRESS
    world.eips[V6] = Eip(V6, "public", WEB, "web")
    six = PortEndpoints("", Protocol.TCP, (Endpoint(ip_address("fd00::1"), 80, "n3", "pod-1"),))
    world.endpoints[WEB] = ServiceEndpoints(WEB, (six,))
    assert world.select()[V6].reasons["n3"] is Reason.NODE_NO_ADDRESS


def test_max_paths_is_a_stable_subset() -> None:
    world = World(9, "announce: {maxPaths: 4}\n")
    chosen = world.hops()
    assert len(chosen) == 4
    assert Counter(world.one().reasons.values())[Reason.OVER_MAX_PATHS] == 5
    spare = next(name for name in world.nodes if name not in chosen)
    world.view(spare, state=NodeState.DOWN)
    assert world.hops() == chosen
    world.view(chosen[0], state=NodeState.DOWN)
    assert len(set(world.hops()) & set(chosen)) == 3


def test_max_paths_spreads_eips_over_nodes() -> None:
    world = World(8, "announce: {maxPaths: 2}\n")
    addresses = [ip_address(f"198.51.100.{n}") for n in range(1, 201)]
    world.eips = {address: Eip(address, "public", WEB, "web") for address in addresses}
    for name in world.nodes:
        world.view(name, confirmed=frozenset(addresses))
    counts = Counter(path.node for one in world.select().values() for path in one.paths)
    assert sum(counts.values()) == 400
    assert min(counts.values()) > 25  # 50 each on average


def test_per_manager_paths_differ_while_there_are_enough() -> None:
    world = World(3, "announce: {paths: perManager}\n")
    seen = []
    for me in ("m1", "m2", "m3"):
        world.rules = replace(world.rules, me=me, managers=("m1", "m2", "m3"))
        (hop,) = world.hops()
        seen.append(hop)
    assert sorted(seen) == ["n1", "n2", "n3"]
    world.rules = replace(world.rules, me="m1", managers=())
    assert world.hops() == [seen[0]]


def test_what_an_eip_goes_through_is_not_made_anew_for_what_does_not_concern_it() -> None:
    world = World(9, "announce: {maxPaths: 4}\n")
    world.eips[B] = Eip(B, "public", DB, "db")
    first = world.select()
    through = {a: {path.node for path in first[a].paths} for a in (A, B)}
    lost = next(name for name in world.nodes if name in through[A] - through[B])
    world.view(lost, state=NodeState.DOWN)
    second = world.select(first)
    assert second[B].paths is first[B].paths
    assert second[B].reasons[lost] is Reason.NODE_DOWN
    assert len(second[A].paths & first[A].paths) == 3
    world.view(lost, state=NodeState.UP)
    assert world.select(second) == first
    world.node(lost, next_hops=(ip_address("192.0.2.99"),))
    moved = world.select(first)
    assert moved[B].paths is first[B].paths
    assert {str(p.next_hop) for p in moved[A].paths - first[A].paths} == {"192.0.2.99"}


@settings(deadline=None)
@given(st.data())
def test_incremental_selection_equals_a_fresh_one(data: st.DataObject) -> None:
    world = World(4, "announce: {maxPaths: 2}\n")
    world.eips[B] = Eip(B, "public", DB, "db")
    previous: dict[Address, EipSelection] = {}
    names = st.sampled_from(sorted(world.nodes))
    for _ in range(data.draw(st.integers(1, 8))):
        name = data.draw(names)
        kinds = ["state", "confirmed", "node", "endpoints", "policy", "eip"]
        match data.draw(st.sampled_from(kinds)):
            case "state":
                held = data.draw(st.booleans())
                world.view(name, state=data.draw(st.sampled_from(NodeState)), held=held)
            case "confirmed":
                world.view(name, confirmed=data.draw(st.frozensets(st.sampled_from([A, B]))))
            case "node":
                world.node(name, draining=data.draw(st.booleans()))
            case "endpoints":
                world.endpoints[WEB] = behind(WEB, *data.draw(st.lists(names, max_size=3)))
            case "policy":
                policy = data.draw(st.sampled_from(TrafficPolicy))
                world.services[WEB] = replace(world.services[WEB], policy=policy)
            case "eip":
                world.eips[B] = replace(world.eips[B], phase=data.draw(st.sampled_from(Phase)))
        previous = world.select(previous)
        fresh = world.select()
        assert previous == fresh
        for selection in fresh.values():
            assert len(selection.paths) <= 2
            for path in selection.paths:
                assert world.views[path.node].state is not NodeState.DOWN
                assert path.path_id == path_id(path.node, path.next_hop)


def test_path_id_is_for_ever() -> None:
    """Literal values: changing the function makes running switches keep stale paths."""
    hop = ip_address("192.0.2.21")
    assert path_id("node-1", hop) == PathIds().get("node-1", hop).path_id
    assert (path_id("node-1", hop), path_id("node-1", hop, ("64512:1",), 5)) == (
        2643148429,
        589704039,
    )
    assert all(0 < path_id(f"n{n}", hop) < 2**32 for n in range(1000))


def test_path_ids_that_collide_get_a_salt() -> None:
    ids, hop = PathIds(lambda *args: 7 + args[-1]), ip_address("192.0.2.21")
    assert [ids.get(node, hop).path_id for node in "aba"] == [7, 8, 7]


class Placed(NamedTuple):
    node: str
    endpoint: Endpoint


def test_which_endpoints_take_traffic() -> None:
    address = ip_address("10.244.1.2")

    def placed(node: str, *conditions: bool) -> Placed:
        return Placed(node, Endpoint(address, 80, node, "p", *conditions))

    ready = placed("n1", True, True, False)
    ending, dead = placed("n1", False, True, True), placed("n2", False, False, True)
    starting, unknown = placed("n1", False, False, False), placed("n2", False, False, False)
    n2 = frozenset({"n2"})
    assert taking((ending, unknown, ready, dead), frozenset()) == [ready]
    assert taking((ending, unknown, ready, dead), n2) == [ready]
    assert taking((dead, unknown, ending, starting), n2) == [ending]
    assert taking((dead, unknown, starting), n2) == [unknown]
    assert taking((dead, unknown, starting), frozenset()) == []


def test_readiness_is_in_doubt_a_while_longer_than_the_node_is_not_ready() -> None:
    doubt = Doubt()
    assert not doubt.note("n1", True, 1.0) and not doubt.note("n2", False, 1.0)
    assert doubt.nodes(2.0) == {"n2"} == doubt.nodes(1000.0)
    assert doubt.note("n2", True, 1000.0)
    assert not doubt.note("n2", True, 1001.0)  # something else of it changed
    assert doubt.nodes(999.9 + KUBELETS_S) == {"n2"} and not doubt.nodes(1000.0 + KUBELETS_S)
    assert not doubt.note("n2", False, 1002.0) and doubt.nodes(5000.0) == {"n2"}
    assert not doubt.note("n2", None, 1003.0) and not doubt.nodes(1003.0)
    assert not doubt.note("n2", True, 1004.0) and not doubt.nodes(1004.0)


def test_pods_serve_while_their_readiness_is_in_doubt() -> None:
    world = World()
    world.endpoints[WEB] = behind(WEB, "n1", "n2", ready=False)
    assert world.one().reason is Reason.NO_ENDPOINTS
    world.doubtful = frozenset({"n2"})
    assert world.one().reason is Reason.ANNOUNCED and len(world.hops()) == 3
    assert world.one(previous={A: world.one()}).reason is Reason.ANNOUNCED
    world.doubtful, last = frozenset(), {A: world.one()}
    assert world.one(previous=last).reason is Reason.NO_ENDPOINTS


VIEWS = st.builds(
    NodeView,
    st.just("n"),
    confirmed=st.sets(st.sampled_from([A, B, V6])).map(PSet),
    empty=st.sets(st.sampled_from([A, B, V6])).map(PSet),
    local_ready=st.sets(st.sampled_from([A, B, V6])).map(frozenset),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["n1", "n2", "n3"]), st.none() | VIEWS), max_size=12))
def test_confirmations_say_what_the_views_say(steps: list[tuple[str, NodeView | None]]) -> None:
    kept, views = Confirmations(), dict[str, NodeView | None]()
    for name, view in steps:
        old = views.get(name)
        before = {address: kept(address) for address in (A, B, V6)}
        told = kept.take(name, old, view)
        views[name] = view
        for address in (A, B, V6):
            known = [(n, v) for n, v in views.items() if v is not None]
            assert kept(address) == (
                frozenset(n for n, v in known if address in v.confirmed - v.empty),
                frozenset(n for n, v in known if address in v.local_ready),
            )
            if kept(address) != before[address]:
                assert address in told
        if old == view:
            assert not told
