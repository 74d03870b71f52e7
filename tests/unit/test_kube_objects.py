"""API objects as the API server may send them, odd ones included, and what becomes of them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from lbctl import errors
from lbctl.core import names
from lbctl.core.model import (
    Eip,
    Node,
    ObjectRef,
    Phase,
    Protocol,
    Service,
    ServicePort,
    TrafficPolicy,
    eip_object_name,
)
from lbctl.kube import objects
from lbctl.kube.slices import SliceIndex


def raw(name: str = "web", namespace: str = "default", **body: Any) -> bytes:
    meta = {"name": name, "namespace": namespace, **body.pop("metadata", {})}
    return json.dumps({"metadata": meta, **body}).encode()


def test_service_with_everything() -> None:
    found = objects.to_service(
        raw(
            metadata={
                "uid": "u",
                "resourceVersion": "7",
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "deletionTimestamp": "2026-01-01T00:00:09Z",
                "finalizers": [names.FINALIZER],
                "annotations": {"b": "2", "a": "1"},
            },
            spec={
                "type": "LoadBalancer",
                "loadBalancerClass": names.LOAD_BALANCER_CLASS,
                "loadBalancerIP": "198.51.100.7",
                "loadBalancerSourceRanges": ["10.0.0.0/8 ", "192.0.2.1/24"],
                "externalTrafficPolicy": "Local",
                "ipFamilies": ["IPv4", "IPv6"],
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
                "ports": [
                    {"name": "s", "port": 443, "protocol": "TCP", "targetPort": 1},
                    {"name": "d", "port": 53, "protocol": "UDP"},
                ],
            },
            status={
                "loadBalancer": {"ingress": [{"ip": "198.51.100.7"}, {"hostname": "x"}]},
                "conditions": [
                    {"type": names.CONDITION_ANNOUNCED, "status": "True", "reason": "Announced"}
                ],
            },
        )
    )
    assert found == Service(
        ref=ObjectRef("default", "web"),
        uid="u",
        created_s=1767225600.0,
        ports=(ServicePort("d", Protocol.UDP, 53), ServicePort("s", Protocol.TCP, 443)),
        is_load_balancer=True,
        load_balancer_class=names.LOAD_BALANCER_CLASS,
        policy=TrafficPolicy.LOCAL,
        families=(4, 6),
        affinity_s=60,
        source_ranges=(ip_network("10.0.0.0/8"), ip_network("192.0.2.0/24")),
        deleting=True,
        finalizers=(names.FINALIZER,),
        ingress=(ip_address("198.51.100.7"),),
        host_names=("x",),
        annotations=(("a", "1"), ("b", "2")),
        requested="198.51.100.7",
    )
    assert found.version == "7" and found.condition == ("True", "Announced", "")


def test_nulls_everywhere() -> None:
    spec = dict.fromkeys(("ports", "loadBalancerClass", "ipFamilies", "loadBalancerSourceRanges"))
    found = objects.to_service(raw(spec={"type": "ClusterIP", **spec}, status=None))
    assert not found.is_load_balancer and found.families == (4,) and found.ports == ()
    node = objects.to_node(raw(spec={"podCIDRs": None}, status={"addresses": None}))
    assert node.addresses == () and not node.ready
    part = objects.to_endpoints(raw(addressType="IPv4", endpoints=None, ports=None))
    assert part.service is None and part.ports == ()


@pytest.mark.parametrize(
    "body",
    [
        raw(),
        raw(spec={"ports": [{"port": "http"}]}),
        raw(spec={"ports": [{"port": 1, "protocol": "ICMP"}]}),
        raw(spec={"loadBalancerSourceRanges": ["10.0.0.0/99"]}),
        b"[]",
        b"",
    ],
)
def test_nonsense_is_one_objects_error(body: bytes) -> None:
    with pytest.raises(errors.KubeError):
        objects.to_service(body)


def test_node() -> None:
    found = objects.to_node(
        raw(
            "node-1",
            "",
            metadata={
                "uid": "u",
                "labels": {names.LABEL_EXCLUDE: ""},
                "annotations": {
                    names.ANNOTATION_DRAIN: "true",
                    names.ANNOTATION_NEXT_HOP: "192.0.2.9, 2001:db8::9",
                },
            },
            spec={"podCIDR": "10.244.1.0/24"},
            status={
                "addresses": [
                    {"type": "Hostname", "address": "node-1"},
                    {"type": "InternalIP", "address": "192.0.2.21"},
                ],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        )
    )
    assert found == Node(
        name="node-1",
        uid="u",
        addresses=(ip_address("192.0.2.21"),),
        pod_cidrs=(ip_network("10.244.1.0/24"),),
        excluded=True,
        draining=True,
        next_hops=(ip_address("192.0.2.9"), ip_address("2001:db8::9")),
    )


def test_a_slip_in_the_next_hop_annotation_does_not_cost_the_node() -> None:
    """Its drain, its readiness and its deletion have to be seen all the same."""
    marks = {
        names.ANNOTATION_DRAIN: "true",
        names.ANNOTATION_NEXT_HOP: "192.0.2.210x, 192.0.2.9 2001:db8::9 fe80::1%eth0,",
    }
    found = objects.to_node(raw("node-1", "", metadata={"annotations": marks}, spec={}))
    assert found.draining
    assert found.next_hops == (ip_address("192.0.2.9"), ip_address("2001:db8::9"))
    assert found.odd_hops == ("192.0.2.210x", "fe80::1%eth0")


@pytest.mark.parametrize(
    ("taint", "out"), [("unschedulable", False), ("not-ready", False), ("out-of-service", True)]
)
def test_a_cordoned_node_forwards_and_one_out_of_service_does_not(taint: str, out: bool) -> None:
    taints = [{"key": f"node.kubernetes.io/{taint}", "value": "x", "effect": "NoExecute"}]
    found = objects.to_node(raw("node-1", "", spec={"unschedulable": True, "taints": taints}))
    assert found == replace(objects.to_node(raw("node-1", "", spec={})), out_of_service=out)


@pytest.mark.parametrize("text", ["198.51.100.1", "2001:db8::1"])
def test_eip_there_and_back(text: str) -> None:
    address = ip_address(text)
    eip = Eip(address, "public", ObjectRef("default", "web"), "u")
    found = objects.to_eip(json.dumps(objects.eip_body(eip)).encode())
    assert found == eip and {found.address: "it"}[address] == "it"


def test_eip_while_releasing() -> None:
    eip = Eip(ip_address("198.51.100.1"), "public", ObjectRef("default", "web"), "u")
    body = objects.eip_body(eip)
    body["spec"] |= {
        "phase": "Releasing",
        "forwarding": False,
        "withdrawnBy": {"two": "x", "one": "y"},
        "releasedAt": "2026-01-01T00:00:00Z",
        "unforwardedAt": "2026-01-01T00:00:01.5Z",
    }
    found = objects.to_eip(json.dumps(body).encode())
    assert found.phase is Phase.RELEASING and not found.forwarding
    assert found.withdrawn_by == ("one", "two")
    assert (found.released_s, found.unforwarded_s) == (1767225600.0, 1767225601.5)


def test_eip_under_a_false_name_is_refused() -> None:
    # Otherwise two objects could hold one address, and the name would be no lock.
    eip = Eip(ip_address("198.51.100.1"), "public", ObjectRef("default", "web"), "u")
    body = objects.eip_body(eip)
    body["metadata"]["name"] = eip_object_name(ip_address("198.51.100.2"))
    with pytest.raises(errors.KubeError, match="another address"):
        objects.to_eip(json.dumps(body).encode())


def part(name: str, *ends: dict[str, Any], service: str = "web") -> objects.Slice:
    return objects.to_endpoints(
        raw(
            name,
            metadata={"labels": {"kubernetes.io/service-name": service}},
            addressType="IPv4",
            ports=[{"name": None, "port": 8080, "protocol": "TCP"}],
            endpoints=list(ends),
        )
    )


def end(address: str, ready: bool | None = True, pod: str = "p") -> dict[str, Any]:
    return {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": ready, "terminating": False},
        "nodeName": "node-1",
        "targetRef": {"kind": "Pod", "name": pod},
    }


def test_host_names_are_left_out_and_remembered() -> None:
    labels = {"labels": {"kubernetes.io/service-name": "web"}}
    ports = [{"name": None, "port": 8080, "protocol": "TCP"}]
    ends = [{"addresses": ["db.example.org"], "conditions": {}}]
    named = objects.to_endpoints(
        raw("named", metadata=labels, addressType="FQDN", ports=ports, endpoints=ends)
    )
    index = SliceIndex()
    (ref,) = index.change(None, named)
    assert index.of(ref).hosts and not index.of(ref).ports
    index.change(None, part("one", end("10.244.1.2")))
    assert index.of(ref).hosts and len(index.of(ref).ports) == 1
    index.change(named, None)
    assert not index.of(ref).hosts


def test_slices_of_a_service_are_merged_and_sorted() -> None:
    index = SliceIndex()
    web = ObjectRef("default", "web")
    one = part("web-1", end("10.244.1.10"), end("10.244.1.9", ready=False))
    two = part("web-2", end("10.244.1.9"), end("10.244.1.2", ready=None))
    assert index.change(None, one) == (web,) and index.change(None, two) == (web,)
    (port,) = index.of(web).ports
    shown = [(str(e.address), e.ready, e.node, e.pod) for e in port.endpoints]
    assert shown == [
        ("10.244.1.2", True, "node-1", "p"),
        ("10.244.1.9", True, "node-1", "p"),
        ("10.244.1.10", True, "node-1", "p"),
    ]
    assert index.change(two, None) == (web,)
    assert [str(e.address) for e in index.of(web).ports[0].endpoints] == [
        "10.244.1.9",
        "10.244.1.10",
    ]
    twice = part("web-1", end("10.244.1.10", ready=False), end("10.244.1.9"), end("10.244.1.10"))
    index.change(one, twice)
    (port,) = index.of(web).ports
    assert [(str(e.address), e.ready) for e in port.endpoints] == [
        ("10.244.1.9", True),
        ("10.244.1.10", True),
    ]


async def test_the_last_endpoints_count_as_ready_a_moment_longer_while_they_are_there() -> None:
    due: asyncio.Queue[ObjectRef] = asyncio.Queue()
    index, web = SliceIndex(due.put_nowait, ready_s=0.05), ObjectRef("default", "web")

    def ready() -> list[bool]:
        return [e.ready for port in index.of(web).ports for e in port.endpoints]

    both = part("web-1", end("10.244.1.1"), end("10.244.1.2"))
    index.change(None, both)
    assert ready() == [True, True]
    one = part("web-1", end("10.244.1.1", ready=False), end("10.244.1.2"))
    index.change(both, one)
    assert ready() == [False, True]  # another one serves: what is not ready does not count
    none = part("web-1", end("10.244.1.1", ready=False), end("10.244.1.2", ready=False))
    index.change(one, none)
    assert ready() == [False, True] and due.empty()
    more = part("web-2", end("10.244.1.3", ready=False))
    index.change(None, more)
    assert ready() == [False, True, False] and due.empty()
    assert await asyncio.wait_for(due.get(), 30) == web
    assert ready() == [False, False, False]
    index.change(none, both)
    assert ready() == [True, True, False]
    index.change(both, none)
    index.of(web)
    index.change(none, both)
    index.of(web)
    index.change(both, None)
    assert ready() == [False]  # what is gone does not count
    assert due.empty()


def test_a_slice_that_changes_hands_touches_both_services() -> None:
    index = SliceIndex()
    old, new = part("x", end("10.244.1.1")), part("x", end("10.244.1.1"), service="other")
    index.change(None, old)
    assert index.change(old, new) == (ObjectRef("default", "other"), ObjectRef("default", "web"))
    assert index.of(ObjectRef("default", "web")).ports == ()
    assert [e.service.name for e in index.all()] == ["other"]


def test_an_address_with_a_zone_is_nonsense() -> None:
    for values in ({"ip": "2001:db8::7%eth0"}, {"ip": "2001:db8::7%;x"}):
        with pytest.raises(errors.KubeError):
            objects.to_service(raw(spec={}, status={"loadBalancer": {"ingress": [values]}}))
    with pytest.raises(errors.KubeError):
        objects.to_service(raw(spec={"loadBalancerSourceRanges": ["fe80::%eth0/64"]}))
