"""`lbctl lab node add`: the fourth node carries traffic when the command ends; the last of all."""

from __future__ import annotations

import json

from lbctl.lab.lab import Lab
from tests.lab.rack import lbctl

from .support import SWITCHES, System


def test_an_added_node_is_a_next_hop_and_gets_pods(system: System) -> None:
    eip = system.deploy("web")
    done = lbctl("lab", "node", "add", "--lab", system.lab.name, "--output", "json")
    assert done.returncode == 0, done.stderr
    answer = {"name": "node-4", "address": "192.0.2.24", "pods": "10.244.4.0/24,fd00:10:244:4::/64"}
    assert json.loads(done.stdout) == answer
    system.lab = Lab.load(system.lab.name)  # another process changed it
    said = [line.split("s  ", 1)[1] for line in done.stderr.splitlines()]
    assert said == [
        "adding a node like node-3",
        "node-4 is on at 192.0.2.24",
        "waiting for node-4 to be Ready",
        "waiting for the agent on node-4",
    ]
    agents = {p["spec"]["nodeName"] for p in system.api.system_pods("lbctl-agent")}
    assert agents == {"node-1", "node-2", "node-3", "node-4"}
    system.wait_routed(eip, to=("node-1", "node-2", "node-3", "node-4"))
    assert all("192.0.2.24" in hops for hops in system.hops(eip).values())
    assert sorted(system.hops(eip)) == list(SWITCHES)

    system.api.scale("web", 8)
    system.wait_pods("web", 8)
    on = system.api.pod_nodes("web")
    assert "node-4" in on.values()
    answered = {on[pod] for pod in system.spread(eip, 200)}
    assert answered == {"node-1", "node-2", "node-3", "node-4"}
