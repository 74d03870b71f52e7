"""`lbctl trace`: the rule that a packet meets, and what is said of each node."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import cast

import pytest
import typer
from rich.console import Console

from lbctl.cli.live import Answer, Live
from lbctl.cli.trace import _end, fetch_scene, show
from lbctl.core import forwarding, packet
from lbctl.core.config import Config, Endpoints, parse
from lbctl.core.forwarding import Locator
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    ForwardingOptions,
    LocatedBy,
    Node,
    NodeState,
    ObjectRef,
    Phase,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
    Sharer,
    TrafficPolicy,
)
from lbctl.core.reasons import Reason
from lbctl.core.state import EipState, HopState, ManagerState, NodeStatus, SessionState
from lbctl.core.trace import Action, Packet, Scene, Trace, Verdict, down_set, judge, trace
from lbctl.kube import objects
from lbctl.kube.client import Client
from lbctl.kube.objects import Slice

EIP, SIX = ip_address("198.51.100.1"), ip_address("2001:db8:100::1")
EMPTY, LEAVING = ip_address("198.51.100.2"), ip_address("198.51.100.3")
CLIENT = ip_address("203.0.113.10")
WEB, IDLE, DNS = (ObjectRef("default", name) for name in ("web", "idle", "dns"))
CONFIG = parse(
    """\
version: 1
pools: [{name: public, addresses: [198.51.100.0/25, "2001:db8:100::/64"]}]
bgp: {asn: 64512, peers: []}
forwarding: {steering: direct}
"""
)
NODES = tuple(
    Node(
        f"n{n}",
        addresses=(ip_address(f"192.0.2.{20 + n}"), ip_address(f"2001:db8:1::{20 + n}")),
        pod_cidrs=(ip_network(f"10.244.{n}.0/24"), ip_network(f"fd00:10:244:{n}::/64")),
    )
    for n in (1, 2, 3)
)


def pods(version: int, ready: bool = True) -> tuple[Endpoint, ...]:
    base = "10.244.{}.2" if version == 4 else "fd00:10:244:{}::2"
    return tuple(
        Endpoint(ip_address(base.format(n)), 8080, f"n{n}", f"web-{n}", ready, ready)
        for n in (1, 2, 3)
    )


def built(
    *,
    ready: bool = True,
    down: frozenset[str] = frozenset(),
    options: ForwardingOptions = forwarding.DEFAULTS,
    every: tuple[Endpoint, ...] = (),
    **changes: object,
) -> forwarding.Table:
    """Service `web` with two ports on an EIP of each family, and `idle` without endpoints."""
    ports = (ServicePort("a", Protocol.TCP, 80), ServicePort("b", Protocol.UDP, 53))
    web = replace(Service(WEB, "uid", 0.0, ports, True), **changes)  # type: ignore[arg-type]
    idle = Service(IDLE, "uid", 0.0, ports[:1], True)
    every = every or (*pods(4, ready), *pods(6, ready))
    behind = (
        PortEndpoints("a", Protocol.TCP, every),
        PortEndpoints("b", Protocol.UDP, every),
    )
    return forwarding.build(
        (
            Eip(EIP, "public", WEB, "uid"),
            Eip(SIX, "public", WEB, "uid"),
            Eip(EMPTY, "public", IDLE, "uid"),
            Eip(LEAVING, "public", IDLE, "uid", Phase.RELEASING, forwarding=False),
        ),
        {WEB: web, IDLE: idle},
        {WEB: ServiceEndpoints(WEB, behind)},
        Locator(NODES),
        down,
        options=options,
    )


def ask(
    table: forwarding.Table,
    eip: Address = EIP,
    port: int = 80,
    protocol: Protocol = Protocol.TCP,
    source: int = 40000,
    client: Address = CLIENT,
) -> Verdict:
    return judge(Packet(eip, port, client, source, protocol), CONFIG, table)


RANGES = {"source_ranges": (ip_network("203.0.113.96/28"), ip_network("2001:db8:3::/64"))}


@pytest.mark.parametrize(
    ("where", "change", "reason", "action"),
    [
        ({}, {}, Reason.DELIVERED, Action.DELIVERS),
        ({"port": 53, "protocol": Protocol.UDP}, {}, Reason.DELIVERED, Action.DELIVERS),
        ({"port": 53}, {}, Reason.NO_SUCH_PORT, Action.REFUSES),
        ({"port": 81}, {}, Reason.NO_SUCH_PORT, Action.REFUSES),
        ({"protocol": Protocol.SCTP}, {}, Reason.NO_SUCH_PORT, Action.REFUSES),
        ({"eip": EMPTY}, {}, Reason.NO_ENDPOINTS, Action.REFUSES),
        ({"eip": LEAVING}, {}, Reason.RELEASING, Action.REFUSES),
        ({"eip": ip_address("198.51.100.9")}, {}, Reason.NOT_AN_EIP, Action.REFUSES),
        ({"eip": ip_address("192.0.2.9")}, {}, Reason.ADDRESS_OUTSIDE_POOLS, Action.LEAVES),
        ({}, RANGES, Reason.SOURCE_REFUSED, Action.DROPS),
        ({"client": ip_address("203.0.113.97")}, RANGES, Reason.DELIVERED, Action.DELIVERS),
        ({}, {"ready": False}, Reason.NO_NEW_FLOWS, Action.REFUSES),
        (
            {"eip": SIX, "client": ip_address("2001:db8:3::10")},
            RANGES,
            Reason.DELIVERED,
            Action.DELIVERS,
        ),
        (
            {"eip": SIX, "client": ip_address("2001:db8:4::10")},
            RANGES,
            Reason.SOURCE_REFUSED,
            Action.DROPS,
        ),
    ],
    ids=str,
)
def test_each_rule(
    where: Mapping[str, object], change: Mapping[str, object], reason: Reason, action: Action
) -> None:
    found = ask(built(**change), **where)  # type: ignore[arg-type]
    assert (found.reason, found.action) == (reason, action)
    assert (found.endpoint is not None) is (reason is Reason.DELIVERED)


@pytest.mark.parametrize("eip", [EIP, SIX])
def test_the_bucket_s_owner_gets_it_and_all_endpoints_get_some(eip: Address) -> None:
    table = built()
    client = CLIENT if eip.version == 4 else ip_address("2001:db8:3::10")
    found = [ask(table, eip, source=40000 + n, client=client) for n in range(300)]
    (port,) = (p for p in table.eips[eip].ports if p.port == 80)
    for one in found:
        owner = port.owner(one.bucket)
        assert (one.endpoint, one.node, one.pod) == (
            owner.address,
            owner.node,
            f"web-{owner.node[1]}",
        )
    assert {one.pod for one in found} == {"web-1", "web-2", "web-3"}
    assert {one.buckets for one in found} == {160}


def test_affinity_takes_the_client_alone() -> None:
    table = built(affinity_s=10800)
    assert len({ask(table, source=n) for n in range(1, 200)}) == 1
    clients = [ip_address(f"203.0.113.{n}") for n in range(1, 200)]
    assert {ask(table, client=client).pod for client in clients} == {"web-1", "web-2", "web-3"}


def test_on_a_shared_address_the_service_that_has_the_port_is_named() -> None:
    alone = built().sources
    port, later = ServicePort("c", Protocol.TCP, 81), ServicePort("d", Protocol.TCP, 82)
    other = Service(DNS, "uid", 0.0, (port, later), True)
    behind = ServiceEndpoints(DNS, (PortEndpoints("c", Protocol.TCP, pods(4)[:1]),))
    shared = Eip(EIP, "public", WEB, "uid", sharers=(Sharer(DNS, "uid"),))
    table = forwarding.revise(
        forwarding.EMPTY,
        replace(
            alone,
            eips={EIP: shared},
            services={**alone.services, DNS: other},
            endpoints={**alone.endpoints, DNS: behind},
        ),
    )
    found = ask(table, port=81)
    assert (found.reason, found.service, found.pod) == (Reason.DELIVERED, DNS, "web-1")
    assert (ask(table).service, ask(table).pod[:4]) == (WEB, "web-")
    found = ask(table, port=82)
    assert (found.reason, found.service) == (Reason.NO_ENDPOINTS, DNS)
    assert ask(table, port=83).reason is Reason.NO_SUCH_PORT


def test_a_down_node_s_endpoint_gets_nothing_new() -> None:
    table = built(down=frozenset({"n2"}))
    assert {ask(table, source=n).pod for n in range(1, 200)} == {"web-1", "web-3"}


# Read back from Linux 6.18 with `jhash … mod 4096 seed 0x6c626374` on packets sent so.
@pytest.mark.parametrize(
    ("client", "port", "bucket"),
    [
        ("203.0.113.10", 40000, 0x787),
        ("203.0.113.97", 65501, 0x904),
        ("2001:db8:3::10", 40002, 0x8CA),
        ("fd00::1:2", 4, 0x132),
        ("203.0.113.10", None, 0xCEA),
        ("2001:db8:3::10", None, 0xE80),
    ],
)
def test_the_hash_is_the_kernel_s(client: str, port: int | None, bucket: int) -> None:
    assert packet.bucket(ip_address(client), port, 4096) == bucket


def manager(name: str, table: forwarding.Table, **changes: object) -> ManagerState:
    hops = tuple(
        HopState(node.name, Reason.ANNOUNCED, node.addresses[0])
        if node.name != "n3"
        else HopState("n3", Reason.NODE_DRAINING)
        for node in NODES
    )
    digest = f"{table.digest:016x}"
    made = ManagerState(
        name,
        True,
        0.0,
        eips=(EipState(EIP, "public", WEB, Phase.BOUND, True, hops),),
        sessions=(
            SessionState("tor-a", ip_address("192.0.2.1"), True, Reason.SESSION_UP, True),
            SessionState("tor-b", ip_address("192.0.2.2"), False, Reason.SESSION_DOWN),
        ),
        nodes=tuple(
            NodeStatus(n.name, NodeState.UP, digest=digest, answer_age_s=0.1) for n in NODES
        ),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def traced(*managers: ManagerState, table: forwarding.Table | None = None) -> Trace:
    table = table or built()
    managers = managers or (manager("one", table),)
    return trace(Packet(EIP, 80, CLIENT, 40000), Scene(CONFIG, table, NODES, managers))


def test_what_each_node_does() -> None:
    found = traced()
    home = found.verdict.node
    assert found.arrives
    for one in found.ingress:
        if one.node == home:
            assert (one.action, one.to, one.via) == (Action.DELIVERS, "", None)
        else:
            via = next(n.addresses[0] for n in NODES if n.name == home)
            assert (one.action, one.to, one.via) == (Action.STEERS, home, via)
    assert [one.switches for one in found.ingress] == [("tor-a",), ("tor-a",), ()]
    assert found.ingress[2].judged[0].reason is Reason.NODE_DRAINING
    assert not any(one.differs for one in found.ingress)


def test_strict_local_delivery_is_each_node_s_own() -> None:
    """The switches lead to n1 and n2; the endpoints are on n2 and n3."""
    strict = ForwardingOptions(local_delivery="strict")
    local = {"policy": TrafficPolicy.LOCAL, "options": strict}
    found = traced(table=built(every=pods(4)[1:], **local))  # type: ignore[arg-type]
    assert found.verdict.reason is Reason.OWN_ENDPOINTS and found.arrives
    assert [one.action for one in found.ingress] == [
        Action.DROPS,
        Action.DELIVERS,
        Action.DELIVERS,
    ]
    assert [one.verdict.pod for one in found.ingress] == ["", "web-2", "web-3"]
    text = page(found)
    assert "its own endpoints alone (localDelivery: strict). [OwnEndpoints]" in text
    assert "n2: a next hop at tor-a; delivers it to pod web-2, 10.244.2.2:8080" in text
    assert "n1: a next hop at tor-a; drops it: " in text and "[NoLocalEndpoint" in text
    assert not traced(table=built(every=pods(4)[2:], **local)).arrives  # type: ignore[arg-type]


def test_an_endpoint_on_no_node_is_delivered_by_every_node() -> None:
    outside = (Endpoint(ip_address("203.0.113.80"), 8080),)
    table = built(every=outside, options=ForwardingOptions(external="masquerade"))
    found = traced(table=table)
    assert found.arrives and found.verdict.node == forwarding.EVERYWHERE
    assert {(one.action, one.to) for one in found.ingress} == {(Action.DELIVERS, "")}
    assert "203.0.113.80:8080 on no node, in the name of the node" in page(found)


def test_a_switch_without_add_path_or_family_is_not_counted_for_more_than_it_has() -> None:
    table = built()
    single = SessionState("tor-a", ip_address("192.0.2.1"), True, Reason.ADD_PATH_MISSING, False)
    found = traced(manager("one", table, sessions=(single,)))
    assert [one.switches for one in found.ingress] == [("tor-a",), (), ()]
    six = SessionState(
        "tor-a", ip_address("192.0.2.1"), True, Reason.FAMILY_MISSING, True, families=(6,)
    )
    assert not traced(manager("one", table, sessions=(six,))).arrives


def test_a_table_that_differs_is_said() -> None:
    table = built()
    other = (NodeStatus("n1", NodeState.UP, digest="0" * 16, answer_age_s=0.0),)
    found = traced(manager("one", table), manager("two", table, nodes=other))
    assert [one.differs for one in found.ingress] == [True, False, False]
    assert "n1's table has the digest 0000000000000000" in page(found)


def page(found: Trace) -> str:
    out = Console(file=io.StringIO(), markup=False, highlight=False, width=300)
    show(found, Live((Answer("pod-x", error="it does not answer"),)), out)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_page() -> None:
    text = page(traced())
    assert "203.0.113.10:40000 to 198.51.100.1:80, TCP, a new flow" in text
    assert "of 160." in text and "[Delivered]" in text
    assert "n3: no next hop;" in text and "directly" in text
    assert "the node is being drained [NodeDraining]" in text
    assert "manager pod-x: it does not answer" in text


@pytest.mark.parametrize(("by", "node"), [("podCIDR", "n2"), ("nodeName", "n1")])
async def test_a_trace_locates_pods_as_agents_do(
    monkeypatch: pytest.MonkeyPatch, by: LocatedBy, node: str
) -> None:
    named = replace(pods(4)[1], node="n1")  # by an address in n2's pod CIDR
    web = Service(WEB, "uid", 0.0, (ServicePort("a", Protocol.TCP, 80),), True)
    behind = Slice(WEB, WEB, (PortEndpoints("a", Protocol.TCP, (named,)),))
    known: dict[object, list[object]] = {
        objects.EIP: [Eip(EIP, "public", WEB, "uid")],
        objects.SERVICE: [web],
        objects.SLICE: [behind],
        objects.NODE: list(NODES),
    }
    config = CONFIG.model_copy(update={"endpoints": Endpoints(nodes=by)})

    async def answers(*_: object) -> Live:
        return Live(())

    async def accepted(_: object) -> Config:
        return config

    async def every(_: object, kind: object) -> list[object]:
        return known[kind]

    module = sys.modules["lbctl.cli.trace"]
    for name, fake in (("ask_all", answers), ("_accepted", accepted), ("_every", every)):
        monkeypatch.setattr(module, name, fake)
    scene, _ = await fetch_scene(cast(Client, None))
    assert ask(scene.table).node == node


def test_down_needs_every_manager_and_at_most_half_of_the_nodes() -> None:
    table = built()

    def said(*names: str, held: bool = False) -> ManagerState:
        state = NodeState.SUSPECT
        return manager("m", table, nodes=tuple(NodeStatus(n, state, held) for n in names))

    assert down_set((said("n1", "n2"), said("n1")), NODES) == {"n1"}
    assert down_set((said("n1"), said()), NODES) == set()
    assert down_set((said("n1", "n2"),), NODES) == set()
    assert down_set((said("n1", held=True),), NODES) == set()
    assert down_set((), NODES) == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("198.51.100.1:80", (EIP, 80)),
        ("[2001:db8:100::1]:443", (SIX, 443)),
        ("198.51.100.1", None),
        ("198.51.100.1:0", None),
        ("198.51.100.1:65536", None),
        ("2001:db8:100::1:80", None),
        ("[198.51.100.1]:80", None),
        ("web:80", None),
        ("198.51.100.1:８0", None),
    ],
)
def test_ends(text: str, found: tuple[Address, int] | None) -> None:
    if found is not None:
        assert _end(text) == found
        return
    with pytest.raises(typer.Exit) as stopped:
        _end(text)
    assert stopped.value.exit_code == 2
