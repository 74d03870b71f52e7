"""Addresses that belong to the cluster itself: ClusterIPs, and the host's gateways."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest

from lbctl.core.actions import CreateEip, Refused
from lbctl.core.allocator import Allocator, plan
from lbctl.core.config import parse
from lbctl.core.model import ObjectRef, Service
from lbctl.core.reasons import Reason
from lbctl.kube.objects import to_service
from manager.gateways import gateways

CONFIG = parse("""
version: 1
pools: [{name: a, addresses: [10.0.0.0/30]}]
bgp: {asn: 64512, peers: []}
""")


def service(name: str, cluster_ip: str, balanced: bool = True) -> Service:
    ref = ObjectRef("default", name)
    return Service(ref, f"uid-{name}", 0.0, (), balanced, cluster_ips=(ip_address(cluster_ip),))


def given_to(allocator: Allocator) -> dict[str, str]:
    actions = allocator.plan()
    return {a.service.name: str(a.eip.address) for a in actions if isinstance(a, CreateEip)}


def test_cluster_ips_are_never_given_out_whatever_comes_first() -> None:
    asks, other = service("asks", "10.0.0.1"), service("other", "10.0.0.0", balanced=False)
    for order in ([asks, other], [other, asks]):
        actions = plan(CONFIG, order, [])
        assert [str(a.eip.address) for a in actions if isinstance(a, CreateEip)] == ["10.0.0.2"]


def test_cluster_ip_asked_for_is_refused_and_given_once_its_service_is_gone() -> None:
    allocator = Allocator(CONFIG)
    other = service("other", "10.0.0.3", balanced=False)
    asks = replace(service("asks", "172.16.0.1"), requested="10.0.0.3")
    allocator.set_service(other)
    allocator.set_service(asks)
    (refused,) = allocator.plan()
    assert isinstance(refused, Refused) and refused.reason is Reason.ADDRESS_OUTSIDE_POOLS
    assert "belongs to the cluster" in refused.sentence
    allocator.remove_service(other.ref)
    assert given_to(allocator) == {"asks": "10.0.0.3"}


def test_full_pool_serves_who_waits_when_a_cluster_ip_is_given_back() -> None:
    allocator = Allocator(
        parse("""
version: 1
pools: [{name: a, addresses: [10.0.0.0/32]}]
bgp: {asn: 64512, peers: []}
""")
    )
    other = service("other", "10.0.0.0", balanced=False)
    allocator.set_service(other)
    allocator.set_service(service("asks", "172.16.0.1"))
    (refused,) = allocator.plan()
    assert isinstance(refused, Refused) and refused.reason is Reason.POOL_EXHAUSTED
    allocator.set_service(replace(other, cluster_ips=()))
    assert given_to(allocator) == {"asks": "10.0.0.0"}


def test_two_services_with_one_cluster_ip_and_a_new_configuration() -> None:
    """As in the moment in which one is deleted and the next is made."""
    allocator = Allocator(CONFIG)
    for name in ("x", "y"):
        allocator.set_service(service(name, "10.0.0.0", balanced=False))
    allocator.remove_service(ObjectRef("default", "x"))
    allocator.configure(CONFIG, [ip_address("10.0.0.1")])
    allocator.set_service(service("asks", "172.16.0.1"))
    assert given_to(allocator) == {"asks": "10.0.0.2"}


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"clusterIP": "10.0.0.1"}, ["10.0.0.1"]),
        ({"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"]}, ["10.0.0.1", "fd00::1"]),
        ({"clusterIP": "None", "clusterIPs": ["None"]}, []),
        ({"type": "ExternalName"}, []),
        ({"clusterIP": "", "clusterIPs": None}, []),
    ],
)
def test_cluster_ips_as_kubernetes_writes_them(spec: dict[str, object], found: list[str]) -> None:
    body = {"metadata": {"name": "s", "namespace": "d"}, "spec": spec}
    assert [str(a) for a in to_service(msgspec.json.encode(body)).cluster_ips] == found


def test_gateways_are_read_from_the_kernels_tables(tmp_path: Path) -> None:
    (tmp_path / "route").write_text(
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "eth0\t00000000\tFE0200C0\t0003\t0\t0\t0\t00000000\n"
        "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
    )
    (tmp_path / "ipv6_route").write_text(
        f"{'0' * 32} 00 {'0' * 32} 00 20010db8{'0' * 23}1 00000400 1 0 00000003 eth0\n"
        f"20010db8{'0' * 24} 40 {'0' * 32} 00 {'0' * 32} 00000100 1 0 00000001 eth0\n"
    )
    assert gateways(tmp_path) == {ip_address("192.0.2.254"), ip_address("2001:db8::1")}
    assert gateways(tmp_path / "nothing") == frozenset()
