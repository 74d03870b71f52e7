"""Two racks behind a spine, everything of ours in them: nodes steer between racks by their tunnel.

LBCTL_TEST_RACKS=NAME uses a lab of racks.clab.yml that is up, and leaves it up.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbctl.lab.api import Api, wait
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.lab import Lab, take_down
from lbctl.lab.load import Load

from .support import CLIENT, System
from .test_faults import drive_on

RACKS = Path(__file__).parents[3] / "bgp-lab" / "racks.clab.yml"
INSIDE = {  # each switch's own next hops; to the other rack it goes by the spine
    "tor-1a": ("node-1", "node-2"),
    "tor-1b": ("node-1", "node-2"),
    "tor-2a": ("node-3",),
    "tor-2b": ("node-3",),
}
RACK = {"node-1": 1, "node-2": 1, "node-3": 2}


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


def wait_announced(fabric: System, eip: str, without: str = "") -> None:
    """Every switch has the next hops of its own rack, and no other but by the spine."""
    address = {m.name: m.address for m in fabric.lab.of_role("node")}
    wanted = {
        switch: sorted(address[node] for node in nodes if node != without)
        for switch, nodes in INSIDE.items()
    }
    wait(f"every switch to route {eip} to {wanted}", lambda: fabric.hops(eip) == wanted, 60)


def test_pods_in_both_racks_by_every_node_and_a_power_cut(fabric: System) -> None:
    fabric.wait_system_ready()
    eip = fabric.deploy("across", replicas=6, announced=False)
    try:
        on = fabric.api.pod_nodes("across")
        assert set(on.values()) == set(RACK)
        wait_announced(fabric, eip)
        wait("every pod to answer", lambda: len(fabric.spread(eip, 60)) == 6, 60)
        assert {r.peer.rsplit(":", 1)[0] for r in fabric.replies(eip, 20)} == {CLIENT}
        cut_a_node_under_load(fabric, eip, on)
    finally:
        if not fabric.lab.machine("node-1").alive:
            fabric.lab.power_on("node-1")
        fabric.remove("across")


def cut_a_node_under_load(fabric: System, eip: str, on: dict[str, str]) -> None:
    fabric.watch_entries(eip)
    client = fabric.lab.machine("client")
    with Load.start(client, eip, 80, flows=240, probes_per_s=20, timeout_s=0.8) as load:
        entered = fabric.entries(eip)
        at = load.mark("cut")
        fabric.lab.power_cut("node-1")
        report = drive_on(load, at)
    across = Counter(
        entered[f.local_port]
        for f in report.flows
        if RACK[entered[f.local_port]] != RACK[on[f.pod]]
    )
    assert all(across[node] >= 4 for node in RACK), f"each node steers to the other rack: {across}"
    living = [flow for flow in report.flows if on[flow.pod] != "node-1"]
    moved = [flow for flow in living if entered[flow.local_port] == "node-1"]
    assert len(moved) >= 16, "connections to living pods entered by the node that died"
    broken = [flow for flow in living if flow.broken]
    assert not broken, f"{len(broken)} of {len(living)}: {broken[:3]}"
    print(f"outage of new connections {report.outage_s('cut'):.2f} s")
    wait_announced(fabric, eip, without="node-1")
