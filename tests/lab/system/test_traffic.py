"""From an EIP to a packet at a pod, and back to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lbctl.core import names
from lbctl.kube import client as kube
from lbctl.lab import workload
from lbctl.lab.api import wait

from .support import CLIENT, SWITCHES, System

POOL = "[198.51.100.0/25, 198.51.100.200-198.51.100.210]"
TINY = f"""{POOL}
    autoAssign: false
  - {{name: tiny, addresses: [198.51.100.240-198.51.100.240]}}"""
WAITS_LESS = workload.CONFIG.replace("announce: {}", "announce: {reuseAfter: 1s, drainTime: 1s}")


@contextmanager
def configured(system: System, config: str) -> Iterator[None]:
    """Another configuration in force, for a while."""
    assert config != workload.CONFIG
    try:
        system.configure(config)
        yield
    finally:
        system.configure(workload.CONFIG)


@pytest.mark.both
def test_from_pool_to_packet(system: System) -> None:
    eip = system.deploy("web")
    assert eip.startswith("198.51.100.")
    spec = system.eip_object(eip)
    assert spec is not None
    assert (spec["pool"], spec["phase"]) == ("public", "Bound")
    assert spec["owner"]["name"] == "web"
    replies = system.replies(eip, 40)
    assert {reply.pod for reply in replies} <= set(system.api.ready_pods("web"))
    assert {reply.peer.rsplit(":", 1)[0] for reply in replies} == {CLIENT}
    for switch in SWITCHES:
        table = system.vtysh(switch, "show bgp ipv4 unicast json")
        paths = table["routes"][f"{eip}/32"]
        assert {p["nexthops"][0]["ip"] for p in paths} == {
            "192.0.2.21",
            "192.0.2.22",
            "192.0.2.23",
        }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_spread_over_pods_is_even(system: System, seed: int) -> None:
    """The seed names the Service, so each has another EIP, other pods and another table."""
    name = f"even-{seed}"
    eip = system.deploy(name, replicas=4)
    count = 600
    spread = system.spread(eip, count)
    assert len(spread) == 4
    # Binomial: share 1/4 of 600 is 150, standard deviation 10.6; five of them, and the table's own
    # unevenness of a bucket or two.
    assert all(90 <= hits <= 210 for hits in spread.values()), spread


def test_scale_up_to_zero_and_back(system: System) -> None:
    eip = system.deploy("scale", replicas=1)
    assert len(system.spread(eip, 20)) == 1
    system.api.scale("scale", 8)
    system.wait_pods("scale", 8)
    wait("all 8 pods to be hit", lambda: len(system.spread(eip, 160)) == 8)
    system.api.scale("scale", 0)
    system.wait_pods("scale", 0)
    system.wait_routed(eip, to=())
    assert system.api.eip_of("scale") == eip, "the EIP stays"
    system.api.scale("scale", 2)
    system.wait_pods("scale", 2)
    system.wait_routed(eip)
    assert set(system.spread(eip, 40)) == set(system.api.ready_pods("scale"))


@pytest.mark.both
def test_local_policy_has_only_nodes_with_pods_as_next_hops(system: System) -> None:
    eip = system.deploy("local", replicas=2, policy="Local", announced=False)
    nodes = set(system.api.pod_nodes("local").values())
    assert len(nodes) == 2
    system.wait_routed(eip, to=nodes)
    assert set(system.spread(eip, 40)) == set(system.api.ready_pods("local"))


def test_udp_reaches_every_pod_with_the_clients_address(system: System) -> None:
    # All pods first: for a while, datagrams of buckets that a pod took over go to the former owner.
    system.api.apply(workload.deployment("dns", 3, (("UDP", 5353), ("TCP", 5353))))
    system.wait_pods("dns", 3)
    eip = system.deploy("dns", replicas=3, ports=(("UDP", 53, 5353), ("TCP", 53, 5353)))
    script = (
        "import socket,sys\n"
        "for n in range(60):\n"
        "    s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(5)\n"
        f"    s.sendto(b'n%d'%n,('{eip}',53)); print(s.recv(999).decode())\n"
    )
    said = system.lab.machine("client").run("python3", "-c", script, timeout_s=60).stdout
    words = [line.split() for line in said.splitlines()]
    assert len(words) == 60
    assert {w[0] for w in words} == set(system.api.ready_pods("dns"))
    assert {w[1].rsplit(":", 1)[0] for w in words} == {CLIENT}
    assert system.replies(eip, 5, port=53)


@pytest.mark.both
def test_deleted_service_gives_its_address_back_in_order(system: System) -> None:
    with configured(system, WAITS_LESS):
        gives_back_in_order(system)


def gives_back_in_order(system: System) -> None:
    eip = system.deploy("gone")
    system.api.delete(kube.SERVICES, "gone")
    wait(f"{eip} to be Releasing", lambda: (system.eip_object(eip) or {})["phase"] == "Releasing")
    system.wait_routed(eip, to=())
    spec = wait(
        "the forwarding to be removed",
        lambda: s if (s := system.eip_object(eip)) and not s["forwarding"] else None,
    )
    assert len(spec["withdrawnBy"]) == 2, "both managers have withdrawn before"
    wait("the Service to be gone", lambda: system.api.find(kube.SERVICES, "gone") is None)
    done = system.lab.machine("client").run(
        "curl", "-s", "--connect-timeout", "2", f"http://{eip}/", check=False
    )
    assert done.returncode != 0
    wait("the address to be free", lambda: system.eip_object(eip) is None, limit_s=90)


def test_pool_full_is_said_and_served_when_freed(system: System) -> None:
    with configured(system, WAITS_LESS.replace(POOL, TINY)):
        is_full_and_freed(system)


def is_full_and_freed(system: System) -> None:
    try:
        first = system.deploy("first", replicas=1)
        assert first == "198.51.100.240"
        system.wait_gone("second")
        system.made.append("second")
        system.api.apply(workload.service("second", app="first"))

        def refusal() -> bool:
            status = system.api.get(kube.SERVICES, "second").get("status", {})
            events = system.api.all(kube.EVENTS, "default")
            said = [e for e in events if e["involvedObject"]["name"] == "second"]
            conditions = {c["type"]: c["reason"] for c in status.get("conditions") or ()}
            return conditions.get(names.CONDITION_ANNOUNCED) == "PoolExhausted" and any(
                e["reason"] == "PoolExhausted" for e in said
            )

        wait("condition and Event of the full pool", refusal)
        assert system.api.eip_of("second") is None
        system.remove("first")
        assert wait("the freed address", lambda: system.api.eip_of("second")) == first
    finally:
        system.remove("second")
        wait("the tiny pool to be unused", lambda: system.eip_object("198.51.100.240") is None)
