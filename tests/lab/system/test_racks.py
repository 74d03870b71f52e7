"""Two racks behind a spine: the fabric itself, then traffic that nodes steer between the racks.

LBCTL_TEST_RACKS=NAME uses a lab of racks.clab.yml that is up, and leaves it up.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address

import pytest

from lbctl.kube import client as kube
from lbctl.lab import entries
from lbctl.lab.api import Api, wait
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.lab import Lab, take_down
from lbctl.lab.load import Load
from tests.lab.rack import ROOT, pings, poll, vrrp

from .support import CLIENT, System
from .test_dual_stack import CLIENT6
from .test_faults import drive_on

RACKS = ROOT / "bgp-lab" / "racks.clab.yml"
INSIDE = {  # each switch's own next hops; to the other rack it goes by the spine
    "tor-1a": ("node-1", "node-2"),
    "tor-1b": ("node-1", "node-2"),
    "tor-2a": ("node-3",),
    "tor-2b": ("node-3",),
}
RACK = {"node-1": 1, "node-2": 1, "node-3": 2}
SPREAD = "198.51.100.200"  # in no pool
UPLINKS = ["10.255.0.1", "10.255.0.3", "10.255.0.5", "10.255.0.7"]
SENDER = f"""
import socket
for number in range(300):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("{SPREAD}", 9))
        sock.send(b"x")
"""
COUNT = f"""
table ip spread {{
  chain c {{
    type filter hook prerouting priority -450;
    ip daddr {SPREAD} counter drop
  }}
}}
"""


@pytest.fixture(scope="module")
def fabric(worker_id: str) -> Iterator[System]:
    """The racks with the embedded cluster, managers and agents ready."""
    existing = os.environ.get("LBCTL_TEST_RACKS")
    name = existing or f"tr-{os.getpid()}-{worker_id}"
    try:
        if existing:
            lab = Lab.load(existing)
        else:
            lab = Lab.up(RACKS, name, print)
            bring_up(lab, "embedded", print)
        with Api(lab.directory / KUBECONFIG) as api:
            yield System(lab, api, switches=tuple(INSIDE))
    finally:
        if not existing:
            take_down(name)


def test_the_fabric_comes_up_in_both_families(fabric: System) -> None:
    lab = fabric.lab
    masters = {"tor-1a": {10: "Master"}, "tor-1b": {10: "Backup"}}
    masters |= {"tor-2a": {20: "Master"}, "tor-2b": {20: "Backup"}, "spine": {}}
    poll("VRRP in both racks", lambda: vrrp(lab) == masters)
    poll(
        "the spine to know rack 2 by both its switches",
        lambda: lab.kernel_routes("spine", "192.0.2.128/25") == UPLINKS[2:],
    )
    pairs = [
        ("client", "node-1"),
        ("client", "node-3"),
        ("node-1", "node-3"),
        ("control-2", "kube"),
    ]
    for source, target in pairs:
        for address in lab.machine(target).addresses:
            poll(f"{source} to reach {address}", partial(pings, lab.machine(source), address))


def test_the_spine_spreads_by_layer_4_and_each_rack_again(fabric: System) -> None:
    """The spine's choice and the ToRs' are independent, or a node of rack 1 would get nothing."""
    lab = fabric.lab
    for tor, nodes in INSIDE.items():
        lines = [f"ip route {SPREAD}/32 {lab.machine(node).address}" for node in nodes]
        asn = "64501" if tor.startswith("tor-1") else "64502"
        lines += [f"router bgp {asn}", "address-family ipv4 unicast", f"network {SPREAD}/32"]
        words = [word for line in ("configure terminal", *lines) for word in ("-c", line)]
        lab.machine(tor).run("vtysh", *words)
    poll("the spine's route", lambda: lab.kernel_routes("spine", f"{SPREAD}/32") == UPLINKS)
    for name in RACK:
        lab.machine(name).run("nft", "-f", "-", input=COUNT)
    lab.machine("client").run("python3", "-c", SENDER)
    counts = {name: counted(fabric, name) for name in RACK}
    assert sum(counts.values()) == 300, counts
    # a quarter, a quarter and a half; below a tenth has no chance to be seen
    assert min(counts.values()) > 30, counts


def counted(fabric: System, node: str) -> int:
    """Packets that reached a node's counter; its table goes."""
    machine = fabric.lab.machine(node)
    said = json.loads(machine.run("nft", "-j", "list", "table", "ip", "spread").stdout)
    machine.run("nft", "delete", "table", "ip", "spread")
    (found,) = [
        int(expression["counter"]["packets"])
        for item in said["nftables"]
        for expression in item.get("rule", {}).get("expr", [])
        if "counter" in expression
    ]
    return found


def wait_announced(fabric: System, eip: str, without: str = "") -> None:
    """Every switch has the next hops of its own rack, and no other but by the spine."""
    six = ip_address(eip).version == 6
    nodes = fabric.lab.of_role("node")
    address = {m.name: next(a for a in m.addresses if (":" in a) == six) for m in nodes}
    wanted = {
        switch: sorted(address[node] for node in nodes if node != without)
        for switch, nodes in INSIDE.items()
    }
    wait(f"every switch to route {eip} to {wanted}", lambda: fabric.hops(eip) == wanted, 60)


def test_pods_in_both_racks_by_every_node_and_a_power_cut(fabric: System) -> None:
    """In both families; between the racks packets go through the nodes' tunnel."""
    fabric.wait_system_ready()
    eip = fabric.deploy("across", replicas=6, announced=False, families="RequireDualStack")
    try:
        on = fabric.api.pod_nodes("across")
        assert set(on.values()) == set(RACK)
        ping_pods_of_the_other_rack(fabric)
        eips = wait("both EIPs", lambda: e if len(e := fabric.api.eips_of("across")) == 2 else None)
        for each in eips:
            wait_announced(fabric, each)
            poll(
                f"the spine's ways to {each}",
                lambda each=each: len(fabric.lab.kernel_routes("spine", each)) == len(UPLINKS),  # type: ignore[misc]
            )
            wait("every pod to answer", lambda each=each: len(fabric.spread(each, 60)) == 6, 60)  # type: ignore[misc]
            peers = {reply.peer for reply in fabric.replies(each, 20)}
            assert peers == {CLIENT6 if ":" in each else CLIENT}
        cut_a_node_under_load(fabric, eip, on)
    finally:
        if not fabric.lab.machine("node-1").alive:
            fabric.lab.power_on("node-1")
        fabric.remove("across")


def ping_pods_of_the_other_rack(fabric: System) -> None:
    """The fabric routes pod addresses in both families, as a CNI without an overlay has it."""
    for pod in fabric.api.all(kube.PODS):
        if pod["spec"]["nodeName"] == "node-3":
            for found in pod["status"]["podIPs"]:
                for source in ("node-1", "kube", "control-2"):
                    machine, address = fabric.lab.machine(source), found["ip"]
                    poll(f"{source} to reach {address}", partial(pings, machine, address))


def cut_a_node_under_load(fabric: System, eip: str, on: dict[str, str]) -> None:
    entries.watch(fabric.lab, [eip])
    client = fabric.lab.machine("client")
    with Load.start(client, eip, 80, flows=240, probes_per_s=20, timeout_s=0.8) as load:
        entered = entries.take(fabric.lab)
        at = load.mark("cut")
        fabric.lab.power_cut("node-1")
        report = drive_on(load, at)
    across = Counter(
        entered[eip, f.local_port]
        for f in report.flows
        if RACK[entered[eip, f.local_port]] != RACK[on[f.pod]]
    )
    assert all(across[node] >= 4 for node in RACK), f"each node steers to the other rack: {across}"
    living = [flow for flow in report.flows if on[flow.pod] != "node-1"]
    moved = [flow for flow in living if entered[eip, flow.local_port] == "node-1"]
    assert len(moved) >= 16, "connections to living pods entered by the node that died"
    broken = [flow for flow in living if flow.broken]
    assert not broken, f"{len(broken)} of {len(living)}: {broken[:3]}"
    print(f"outage of new connections {report.outage_s('cut'):.2f} s")
    wait_announced(fabric, eip, without="node-1")
