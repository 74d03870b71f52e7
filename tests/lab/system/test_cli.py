"""`lbctl status` and `lbctl explain` against the real managers, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lbctl.lab.api import wait
from lbctl.lab.bringup import KUBECONFIG
from tests import command

from .support import System

LBCTL = str(Path(sys.executable).with_name("lbctl"))


def lbctl(system: System, *words: str) -> subprocess.CompletedProcess[str]:
    return command.lbctl(*words, "--kubeconfig", str(system.lab.directory / KUBECONFIG))


def typed(system: System, *words: str) -> subprocess.CompletedProcess[str]:
    """As a process of its own, with the cluster from the environment."""
    environment = {**os.environ, "KUBECONFIG": str(system.lab.directory / KUBECONFIG)}
    return subprocess.run(
        [LBCTL, *words], capture_output=True, text=True, env=environment, timeout=60
    )


@pytest.mark.both
def test_status_says_that_all_is_well(system: System) -> None:
    eip = system.deploy("seen")
    done = wait(
        "`lbctl status` to find nothing wrong",
        lambda: found if (found := lbctl(system, "status")).returncode == 0 else None,
    )
    for word in (eip, "public", "default/seen", "tor-a", "tor-b", "node-1", "node-3"):
        assert word in done.stdout, (word, done.stdout)
    assert "\x1b" not in done.stdout, "no colour off a terminal"
    data: dict[str, Any] = json.loads(typed(system, "status", "--output", "json").stdout)
    assert eip in json.dumps(data)


def test_status_says_which_node_is_down(system: System) -> None:
    system.deploy("lost")
    system.lab.power_cut("node-2")
    done = wait(
        "`lbctl status` to find node-2 down",
        lambda: (
            found
            if (found := lbctl(system, "status")).returncode == 1 and "Down" in found.stdout
            else None
        ),
    )
    assert "node-2" in next(line for line in done.stdout.splitlines() if "Down" in line)


@pytest.mark.both
def test_explain_gives_each_decision_in_a_sentence(system: System) -> None:
    eip = system.deploy("told", replicas=1, policy="Local", announced=False)
    (node,) = set(system.api.pod_nodes("told").values())
    system.wait_routed(eip, to=[node])
    done = lbctl(system, "explain", "default/told")
    assert done.returncode == 0, done.stdout + done.stderr
    assert eip in done.stdout and "public" in done.stdout
    others = {"node-1", "node-2", "node-3"} - {node}
    for other in others:
        line = next(line for line in done.stdout.splitlines() if other in line)
        assert "no ready endpoint" in line, line
    unknown = lbctl(system, "explain", "default/nobody")
    assert unknown.returncode != 0 and "nobody" in unknown.stdout + unknown.stderr
