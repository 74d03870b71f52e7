"""The embedded cluster: `python -m lbctl.lab.apiserver`, one process with its controllers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lbctl.errors import LabError
from lbctl.lab.cluster import pki, processes
from lbctl.lab.cluster.handle import ClusterKind, ClusterSpec

_READY_S: Final = 60.0
_STOP_S: Final = 10.0
_POLL_S: Final = 0.02
_CHECKOUT: Final = Path(__file__).resolve().parents[3]


@dataclass(slots=True)
class EmbeddedCluster:
    """A running embedded cluster (`handle.Cluster`)."""

    directory: Path
    url: str
    ca_file: Path
    admin_token: str
    kubeconfig: Path
    process: subprocess.Popen[bytes]
    kind: ClusterKind = "embedded"

    def stop(self) -> None:
        """End the process (also one that is stopped by SIGSTOP) and wait for it."""
        if self.process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, number)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_STOP_S)

    def pids(self) -> dict[str, int]:
        """The one process: it is API server and controllers."""
        return {"apiserver": self.process.pid}


def start(
    spec: ClusterSpec,
    progress: Callable[[str], None] = lambda _: None,
    *,
    linked: bool = True,
    history: int = 10_000,
    node_grace_s: float = 40.0,
) -> EmbeddedCluster:
    """Start a cluster and wait until it answers. Raises LabError with the end of its log.

    Starting again in the same directory keeps certificates, tokens and all objects. `linked`: it
    dies with this process. `history` is the number of events per resource that a watch may go back,
    `node_grace_s` the age of a node's heartbeat that makes the node unknown.
    """
    progress("starting the embedded cluster")
    keys = pki.create(spec.directory / "pki", (spec.address, *spec.extra_names))
    ready = spec.directory / "apiserver.url"
    ready.unlink(missing_ok=True)
    log_file = spec.directory / "apiserver.log"
    command = [
        *spec.prefix,
        *("env", f"PYTHONPATH={_CHECKOUT}"),
        *(sys.executable, "-m", "lbctl.lab.apiserver"),
        *("--pki", str(keys.directory), "--address", spec.address, "--port", str(spec.port)),
        *("--service-cidrs", spec.service_cidrs, "--history", str(history)),
        *("--state", str(spec.directory / "state.jsonl"), "--ready-file", str(ready)),
        *("--node-grace-s", str(node_grace_s)),
    ]
    process = processes.start(command, log_file, linked=linked)
    url = _wait(process, ready, log_file)
    token = keys.token()
    kubeconfig = pki.write_kubeconfig(spec.directory / "kubeconfig", url, keys.ca_cert, token)
    return EmbeddedCluster(spec.directory, url, keys.ca_cert, token, kubeconfig, process)


def _wait(process: subprocess.Popen[bytes], ready: Path, log_file: Path) -> str:
    end = time.monotonic() + _READY_S
    while not ready.exists():
        if process.poll() is not None:
            tail = log_file.read_text(errors="replace")[-2000:]
            raise LabError(f"the embedded API server ended with {process.returncode}: {tail}")
        if time.monotonic() > end:
            process.kill()
            process.wait()
            raise LabError(
                f"the embedded API server was not ready after {_READY_S:.0f} s: {log_file}"
            )
        time.sleep(_POLL_S)
    return ready.read_text().strip()
