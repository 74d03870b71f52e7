"""A manager whose container is killed while the API server is away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EIPS, NODES = 100, 4


def test_it_goes_on_with_what_it_last_read() -> None:
    """No route goes or comes when it is back, nor when the API server is; a node that dies between
    the two is withdrawn; and it does not say that it is ready."""
    command = ["unshare", "--net", sys.executable, "-m", "tests.lab.restart_process", str(EIPS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["announced"] == EIPS * NODES
    assert found["again"] == found["flapped"] == [0, 0]
    assert found["withdrawn"] == EIPS
    assert 0 <= found["age_s"] < 280
    assert "not listed yet: service" in found["ready"] and "snapshot" in found["ready"]
