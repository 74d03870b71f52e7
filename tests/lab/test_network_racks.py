"""Two racks behind a spine: all machines reach each other, flows spread over racks and nodes.

First the fabric alone, with an EIP announced by hand; then with everything of ours on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial

import pytest

from lbctl.lab import workload
from lbctl.lab.api import Api, wait
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.lab import Lab, take_down

from .rack import ROOT, pings, poll, vrrp

RACKS = ROOT / "bgp-lab" / "racks.clab.yml"
TORS = {"tor-1a": "rack 1", "tor-1b": "rack 1", "tor-2a": "rack 2", "tor-2b": "rack 2"}
UPLINKS = ["10.255.0.1", "10.255.0.3", "10.255.0.5", "10.255.0.7"]


@pytest.fixture(scope="module")
def racks() -> Iterator[Lab]:
    name = f"r-{os.getpid()}"
    try:
        yield Lab.up(RACKS, name, print)
    finally:
        take_down(name)


def hops(lab: Lab, switch: str, prefix: str, expected: list[str]) -> bool:
    return lab.kernel_routes(switch, prefix) == expected


def test_the_fabric_comes_up_in_both_families(racks: Lab) -> None:
    masters = {"tor-1a": {10: "Master"}, "tor-1b": {10: "Backup"}}
    masters |= {"tor-2a": {20: "Master"}, "tor-2b": {20: "Backup"}, "spine": {}}
    poll("VRRP in both racks", lambda: vrrp(racks) == masters)
    poll(
        "the spine to know rack 2 by both its switches",
        partial(hops, racks, "spine", "192.0.2.128/25", UPLINKS[2:]),
    )
    pairs = [
        ("client", "node-1"),
        ("client", "node-3"),
        ("node-1", "node-3"),
        ("control-2", "kube"),
    ]
    for source, target in pairs:
        for address in racks.machine(target).addresses:
            poll(f"{source} to reach {address}", partial(pings, racks.machine(source), address))


def test_pods_of_the_other_rack_are_routed(racks: Lab) -> None:
    node = racks.machine("node-3")
    for address in ("10.244.3.1", "fd00:10:244:3::1"):
        node.run("ip", "address", "add", address, "dev", "lo")
        for source in ("node-1", "kube", "control-2"):
            poll(f"{source} to reach {address}", partial(pings, racks.machine(source), address))


def test_the_spine_spreads_by_layer_4_and_each_rack_again(racks: Lab) -> None:
    """The spine's choice and the ToRs' are independent, or a node of rack 1 would get nothing."""
    script = "vtysh -c 'configure terminal' "
    ways = {"rack 1": ["192.0.2.21", "192.0.2.22"], "rack 2": ["192.0.2.149"]}
    for tor, rack in TORS.items():
        lines = [f"ip route 198.51.100.9/32 {hop}" for hop in ways[rack]]
        asn = "64501" if rack == "rack 1" else "64502"
        lines += [f"router bgp {asn}", "address-family ipv4 unicast", "network 198.51.100.9/32"]
        racks.machine(tor).run("sh", "-c", script + " ".join(f"-c '{line}'" for line in lines))
    poll("the spine's route", partial(hops, racks, "spine", "198.51.100.9/32", UPLINKS))
    counts = {}
    for name in ("node-1", "node-2", "node-3"):
        rule = "add table ip t; add chain ip t c { type filter hook prerouting priority 0; }; "
        rule += "add rule ip t c ip daddr 198.51.100.9 counter drop"
        racks.machine(name).run("nft", rule)
    racks.machine("client").run("sh", "-c", SENDER)
    for name in ("node-1", "node-2", "node-3"):
        said = json.loads(racks.machine(name).run("nft", "-j", "list", "ruleset").stdout)
        (counts[name],) = [
            expression["counter"]["packets"]
            for item in said["nftables"]
            for expression in item.get("rule", {}).get("expr", [])
            if "counter" in expression
        ]
    assert sum(counts.values()) == 300, counts
    # a quarter, a quarter and a half; below a tenth has no chance to be seen
    assert min(counts.values()) > 30, counts


SENDER = """
python3 - <<'END'
import socket
for number in range(300):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("198.51.100.9", 9))
        sock.send(b"x")
END
"""


def test_every_pod_answers_whichever_rack_its_packets_enter(racks: Lab) -> None:
    """In both families; between the racks they go through the nodes' tunnel."""
    bring_up(racks, "embedded", print)
    with Api(racks.directory / KUBECONFIG) as api:
        api.apply(
            workload.deployment("web", 3), workload.service("web", families="RequireDualStack")
        )
        wait("a pod on each node", lambda: len(api.ready_pods("web")) == 3)
        assert len(set(api.pod_nodes("web").values())) == 3
        eips = wait("both EIPs", lambda: found if len(found := api.eips_of("web")) == 2 else None)
        pods = set(api.ready_pods("web"))
    for eip in eips:
        hops_1, hops_2 = own_rack(racks, eip)
        poll(f"rack 1's way to {eip}", partial(hops, racks, "tor-1b", eip, hops_1))
        poll(f"rack 2's way to {eip}", partial(hops, racks, "tor-2b", eip, hops_2))
        poll(f"the spine's ways to {eip}", partial(ways, racks, eip, 4))
        host = f"[{eip}]" if ":" in eip else eip
        script = f"for i in $(seq 40); do curl -s -m 20 http://{host}/; done"
        done = racks.machine("client").run("sh", "-c", script, timeout_s=240)
        lines = [line.split() for line in done.stdout.splitlines()]
        assert len(lines) == 40, f"{eip}: {len(lines)} of 40 answered"
        assert {pod for pod, _, _ in lines} == pods
        assert {peer for _, peer, _ in lines} <= set(racks.machine("client").addresses)


def own_rack(lab: Lab, eip: str) -> tuple[list[str], list[str]]:
    """The next hops that the switches of each rack take: their own nodes' of the EIP's family."""
    six = ":" in eip
    found = [
        next(a for a in lab.machine(f"node-{number}").addresses if (":" in a) == six)
        for number in (1, 2, 3)
    ]
    return found[:2], found[2:]


def ways(lab: Lab, eip: str, count: int) -> bool:
    return len(lab.kernel_routes("spine", eip)) == count
