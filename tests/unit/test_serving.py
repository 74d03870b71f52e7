"""What is behind an EIP, by table: policy, external endpoints, host names, families, ports."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from lbctl.core.forwarding import Locator
from lbctl.core.model import (
    Endpoint,
    External,
    LocatedBy,
    Node,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from lbctl.core.reasons import Reason
from lbctl.core.serving import Serving, serving

from .forwarding_cases import STRAY, TAKEN, blocks

WEB = ObjectRef("default", "web")
SERVICE = Service(WEB, "uid", 0.0, (ServicePort("", Protocol.TCP, 80),), True)
LOCATOR = Locator(
    Node(
        f"n{n}",
        addresses=(ip_address(f"192.0.2.{20 + n}"), ip_address(f"2001:db8:1::{20 + n}")),
        pod_cidrs=(ip_network(f"10.244.{n}.0/24"), ip_network(f"fd00:10:244:{n}::/64")),
    )
    for n in (1, 2)
)
ONE, TWO = (Endpoint(ip_address(f"10.244.{n}.2"), 8080, f"n{n}", f"pod-{n}") for n in (1, 2))
SIX = Endpoint(ip_address("fd00:10:244:2::2"), 8080, "n2", "pod-2")
FAR = Endpoint(ip_address("203.0.113.200"), 8080)
HOST = Endpoint(ip_address("192.0.2.22"), 9000)  # no nodeName: somebody wrote it by hand
LIAR = Endpoint(ip_address("203.0.113.201"), 8080, "n1")
LOST = Endpoint(ip_address("10.9.9.9"), 8080, "n1", "pod-9")
NO = Reason.NO_ENDPOINTS


def off(endpoint: Endpoint, *, serving: bool = False, ending: bool = False) -> Endpoint:
    return replace(endpoint, ready=False, serving=serving, terminating=ending)


@pytest.mark.parametrize(
    ("endpoints", "external", "found"),
    [
        ((ONE, TWO), "refuse", Serving(frozenset({"n1", "n2"}))),
        ((ONE, SIX), "refuse", Serving(frozenset({"n1"}))),
        ((off(ONE),), "refuse", Serving(reason=NO)),
        ((), "refuse", Serving(reason=NO)),
        ((SIX,), "refuse", Serving(reason=NO)),
        ((off(ONE, serving=True, ending=True), off(TWO)), "refuse", Serving(frozenset({"n1"}))),
        ((off(ONE, serving=True, ending=True), TWO), "refuse", Serving(frozenset({"n2"}))),
        ((off(ONE, serving=True),), "refuse", Serving(reason=NO)),
        ((HOST,), "refuse", Serving(frozenset({"n2"}))),
        ((FAR,), "refuse", Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)),
        ((LIAR,), "refuse", Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)),
        ((LOST,), "refuse", Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)),
        ((FAR, TWO), "refuse", Serving(frozenset({"n2"}))),
        ((FAR,), "masquerade", Serving(everywhere=True)),
        ((FAR, TWO), "masquerade", Serving(frozenset({"n2"}), everywhere=True)),
        ((off(FAR),), "masquerade", Serving(reason=NO)),
        ((LIAR,), "masquerade", Serving(everywhere=True)),
        ((LOST,), "masquerade", Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)),
        (
            (replace(FAR, address=ip_address("127.0.0.1")),),
            "masquerade",
            Serving(reason=Reason.ENDPOINTS_ON_NO_NODE),
        ),
    ],
)
def test_who_serves(endpoints: tuple[Endpoint, ...], external: External, found: Serving) -> None:
    known = ServiceEndpoints(WEB, (PortEndpoints("", Protocol.TCP, endpoints),))
    assert serving(SERVICE, known, 4, LOCATOR, external) == found


@pytest.mark.parametrize(
    ("endpoint", "by", "external", "found"),
    [
        (STRAY, "podCIDR", "refuse", Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)),
        (TAKEN, "podCIDR", "refuse", Serving(frozenset({"n2"}))),
        (STRAY, "nodeName", "refuse", Serving(frozenset({"n1"}))),
        (TAKEN, "nodeName", "refuse", Serving(frozenset({"n1"}))),
        (HOST, "nodeName", "refuse", Serving(frozenset({"n2"}))),
        (replace(TAKEN, pod=""), "nodeName", "refuse", Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)),
        (replace(TAKEN, pod=""), "nodeName", "masquerade", Serving(everywhere=True)),
        (
            replace(TAKEN, node="n9"),
            "nodeName",
            "masquerade",
            Serving(reason=Reason.ENDPOINTS_ON_NO_NODE),
        ),
    ],
)
def test_who_serves_where_pod_cidrs_mean_nothing(
    endpoint: Endpoint, by: LocatedBy, external: External, found: Serving
) -> None:
    known = ServiceEndpoints(WEB, (PortEndpoints("", Protocol.TCP, (endpoint,)),))
    assert serving(SERVICE, known, 4, Locator(blocks(), by), external) == found


def test_families_ports_and_host_names() -> None:
    known = ServiceEndpoints(WEB, (PortEndpoints("", Protocol.TCP, (ONE, SIX)),))
    assert serving(SERVICE, known, 6, LOCATOR) == Serving(frozenset({"n2"}))
    assert serving(SERVICE, None, 4, LOCATOR) == Serving(reason=NO)
    hosts = ServiceEndpoints(WEB, hosts=True)
    assert serving(SERVICE, hosts, 4, LOCATOR, "masquerade").reason is Reason.HOST_ENDPOINTS
    assert serving(SERVICE, replace(known, hosts=True), 4, LOCATOR).nodes == {"n1"}
    sctp = replace(SERVICE, ports=(ServicePort("", Protocol.SCTP, 80),))
    assert serving(sctp, known, 4, LOCATOR).reason is NO
    known = ServiceEndpoints(WEB, (PortEndpoints("", Protocol.SCTP, (ONE,)),))
    assert serving(sctp, known, 4, LOCATOR) == Serving(frozenset({"n1"}))
