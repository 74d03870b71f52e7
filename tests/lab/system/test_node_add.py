"""`lbctl lab node add`: the fourth node carries traffic when the command ends. A lab of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from lbctl.lab.api import Api
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.lab import Lab, take_down
from tests.lab.rack import lbctl

from .support import SWITCHES, TOPOLOGY, System


@pytest.fixture
def grown() -> Iterator[System]:
    """A lab that is just up; it is gone afterwards, so that nobody else meets its fourth node."""
    name = f"g-{os.getpid()}"
    try:
        lab = Lab.up(TOPOLOGY, name, print)
        bring_up(lab, "embedded", print)
        with Api(lab.directory / KUBECONFIG) as api:
            yield System(lab, api)
    finally:
        take_down(name)


def test_an_added_node_is_a_next_hop_and_gets_pods(grown: System) -> None:
    eip = grown.deploy("web")
    done = lbctl("lab", "node", "add", "--lab", grown.lab.name, "--output", "json")
    assert done.returncode == 0, done.stderr
    answer = {"name": "node-4", "address": "192.0.2.24", "pods": "10.244.4.0/24,fd00:10:244:4::/64"}
    assert json.loads(done.stdout) == answer
    grown.lab = Lab.load(grown.lab.name)  # another process changed it
    said = [line.split("s  ", 1)[1] for line in done.stderr.splitlines()]
    assert said == [
        "adding a node like node-3",
        "node-4 is on at 192.0.2.24",
        "waiting for node-4 to be Ready",
        "waiting for the agent on node-4",
    ]
    agents = {p["spec"]["nodeName"] for p in grown.api.system_pods("lbctl-agent")}
    assert agents == {"node-1", "node-2", "node-3", "node-4"}
    grown.wait_routed(eip, to=("node-1", "node-2", "node-3", "node-4"))
    assert all("192.0.2.24" in hops for hops in grown.hops(eip).values())
    assert sorted(grown.hops(eip)) == list(SWITCHES)

    grown.api.scale("web", 8)
    grown.wait_pods("web", 8)
    on = grown.api.pod_nodes("web")
    assert "node-4" in on.values()
    answered = {on[pod] for pod in grown.spread(eip, 200)}
    assert answered == {"node-1", "node-2", "node-3", "node-4"}
