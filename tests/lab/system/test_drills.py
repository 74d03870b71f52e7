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


def test_a_drill_holds_and_its_sabotage_is_seen(system: System, tmp_path: Path) -> None:
    name = system.lab.name
    done = lbctl("drill", "run", "agents-die", "--lab", name, "--report", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ connections to living pods broken: 0 of 100" in done.stdout
    told = json.loads((tmp_path / "agents-die.json").read_text())
    assert told["held"] and len(told["evidence"]["faults"]) == 2
    assert "<svg" in (tmp_path / "agents-die.html").read_text()
    done = lbctl("drill", "run", "agents-die", "--lab", name, "--sabotage")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "✗ new connections failed" in done.stdout


def test_a_node_is_drained_and_comes_back(system: System) -> None:
    eip = system.deploy("drained")
    kubeconfig = ("--kubeconfig", str(system.lab.directory / KUBECONFIG))
    done = lbctl("node", "drain", "node-2", *kubeconfig)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "node-2 is in no route any more" in done.stdout
        left = sorted(system.lab.machine(name).address for name in ("node-1", "node-3"))
        assert all(hops == left for hops in system.hops(eip).values())
    finally:
        assert lbctl("node", "undrain", "node-2", *kubeconfig).returncode == 0
    system.wait_routed(eip)
    done = lbctl("node", "drain", "node-9", *kubeconfig)
    assert done.returncode == 2 and "there is no node 'node-9'" in done.stderr
