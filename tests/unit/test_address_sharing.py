"""Services on one address, as nodes and managers see them: ports side by side, one route."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import msgspec

from lbctl.core import forwarding
from lbctl.core.forwarding import EMPTY, Locator, Sources, Table
from lbctl.core.model import (
    Eip,
    Endpoint,
    Node,
    ObjectRef,
    PortEndpoints,
    Service,
    ServiceEndpoints,
    Sharer,
    TrafficPolicy,
)
from lbctl.core.pmap import PMap
from lbctl.core.routes import standing
from lbctl.kube.objects import eip_body, to_eip
from tests.unit.address_rules import ports, service

ADDRESS = ip_address("10.0.0.1")
NODE = Node("n1", addresses=(ip_address("192.0.2.21"),), pod_cidrs=(ip_network("10.244.1.0/24"),))
ONE, TWO = service("one", ports=ports("80")), service("two", ports=ports("443", "53/UDP"))
EIP = Eip(
    ADDRESS,
    "a",
    ONE.ref,
    ONE.uid,
    sharing_key="k",
    sharers=(Sharer(TWO.ref, TWO.uid),),
)


def behind(found: Service, number: int) -> ServiceEndpoints:
    pod = Endpoint(ip_address(f"10.244.1.{number}"), 8080, "n1", "pod")
    return ServiceEndpoints(
        found.ref, tuple(PortEndpoints(p.name, p.protocol, (pod,)) for p in found.ports)
    )


def sources(eip: Eip, *services: Service) -> Sources:
    return Sources(
        PMap({eip.address: eip}),
        PMap({found.ref: found for found in services}),
        PMap({found.ref: behind(found, n) for n, found in enumerate(services, 2)}),
        Locator((NODE,)),
    )


def seen(table: Table) -> dict[str, str]:
    """Ports of the address, and the pod behind each."""
    return {
        f"{port.protocol} {port.port}": str(port.owner(0).address)
        for port in table.eips[ADDRESS].ports
    }


def test_their_ports_are_side_by_side() -> None:
    table = forwarding.revise(EMPTY, sources(EIP, ONE, TWO))
    assert seen(table) == {
        "TCP 80": "10.244.1.2",
        "TCP 443": "10.244.1.3",
        "UDP 53": "10.244.1.3",
    }


def test_the_next_table_is_the_same_whatever_came_before() -> None:
    first = replace(EIP, sharers=(), sharing_key="")
    steps = [
        sources(first, ONE, TWO),
        sources(EIP, ONE, TWO),
        sources(EIP, ONE, replace(TWO, ports=ports("444"))),
        sources(replace(EIP, owner=TWO.ref, owner_uid=TWO.uid, sharers=()), ONE, TWO),
    ]
    table = EMPTY
    for step in steps:
        table = forwarding.revise(table, step)
        fresh = forwarding.revise(EMPTY, step)
        assert table.digest == fresh.digest and seen(table) == seen(fresh)
        assert dict(table.owned.items()) == dict(fresh.owned.items())
    assert seen(table) == {"TCP 443": "10.244.1.3", "UDP 53": "10.244.1.3"}


def test_a_port_belongs_to_who_was_there_first() -> None:
    clashes = replace(TWO, ports=ports("80", "443"))
    table = forwarding.revise(EMPTY, sources(EIP, ONE, clashes))
    assert seen(table) == {"TCP 80": "10.244.1.2", "TCP 443": "10.244.1.3"}


def test_source_ranges_of_one_never_open_the_ports_of_another() -> None:
    narrow = replace(ONE, source_ranges=(ip_network("203.0.113.0/24"),))
    table = forwarding.revise(EMPTY, sources(EIP, narrow, TWO))
    assert seen(table) == {"TCP 80": "10.244.1.2"}
    assert table.eips[ADDRESS].sources == (ip_network("203.0.113.0/24"),)
    table = forwarding.revise(
        EMPTY, sources(EIP, ONE, replace(TWO, source_ranges=narrow.source_ranges))
    )
    assert seen(table) == {"TCP 80": "10.244.1.2"}, "the first one stays open, the other closed"


def test_who_turns_local_beside_others_has_no_ports() -> None:
    table = forwarding.revise(EMPTY, sources(EIP, ONE, replace(TWO, policy=TrafficPolicy.LOCAL)))
    assert seen(table) == {"TCP 80": "10.244.1.2"}


def test_the_route_stands_as_long_as_one_of_them_does() -> None:
    endpoints = {ONE.ref: ServiceEndpoints(ONE.ref), TWO.ref: behind(TWO, 3)}
    services: dict[ObjectRef, Service] = {ONE.ref: ONE, TWO.ref: TWO}
    speaker, known = standing(EIP, services.get, endpoints.get)
    assert speaker == ONE and known is not None and known.ports == behind(TWO, 3).ports
    services[ONE.ref] = replace(ONE, deleting=True)
    assert standing(EIP, services.get, endpoints.get)[0] == TWO
    del services[ONE.ref], services[TWO.ref]
    assert standing(EIP, services.get, endpoints.get)[0] is None


def test_the_object_says_who_shares() -> None:
    for eip in (EIP, replace(EIP, sharers=()), replace(EIP, sharers=(), sharing_key="")):
        assert to_eip(msgspec.json.encode(eip_body(eip))) == eip
