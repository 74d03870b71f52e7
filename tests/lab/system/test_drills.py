"""`lbctl drill` and `lbctl node`, as a user types them, on the lab that the other tests use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lbctl.lab.bringup import KUBECONFIG

from .support import System

LIMIT_S = 180


def lbctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lbctl.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


QUICK = """\
about: All agents die at once.
services:
  - {name: web, replicas: 3}
traffic:
  - {service: web, flows: 30, requests: 20, timeout: 3s}
before: 1s
after: 3s
timeline:
  - {at: 0s, do: signal, to: "agent@*"}
expect:
  broken: 0
  failed: 0
  nextHops: [node-1, node-2, node-3]
sabotage:
  about: What they wrote is wiped while they are frozen.
  fails: [failed]
  timeline:
    - {at: 0s, do: freeze, what: "agent@*"}
    - {at: 0s, do: wipeTables, machine: nodes}
"""


def test_a_drill_holds_and_its_sabotage_is_seen(system: System, tmp_path: Path) -> None:
    file = tmp_path / "quick.yml"
    file.write_text(QUICK)
    run = ("drill", "run", str(file), "--lab", system.lab.name, "--report", str(tmp_path))
    done = lbctl(*run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ connections to living pods broken: 0 of 30" in done.stdout
    told = json.loads((tmp_path / "quick.json").read_text())
    assert told["held"] and len(told["evidence"]["faults"]) == 1
    assert "<svg" in (tmp_path / "quick.html").read_text()
    done = lbctl(*run, "--sabotage")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "✗ new connections failed" in done.stdout
    assert not json.loads((tmp_path / "quick-sabotaged.json").read_text())["held"]


def test_a_node_is_drained_and_comes_back(system: System) -> None:
    eip = system.deploy("drained")
    kubeconfig = ("--kubeconfig", str(system.lab.directory / KUBECONFIG))
    done = lbctl("node", "drain", "node-2", *kubeconfig)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "node-2 is in no route any more" in done.stdout
        left = sorted(system.lab.machine(name).address for name in ("node-1", "node-3"))
        assert all(hops == left for hops in system.hops(eip).values())
        assert "NodeDraining" in lbctl("status", *kubeconfig).stdout
    finally:
        assert lbctl("node", "undrain", "node-2", *kubeconfig).returncode == 0
    system.wait_routed(eip)
    done = lbctl("node", "drain", "node-9", *kubeconfig)
    assert done.returncode == 2 and "there is no node 'node-9'" in done.stderr
