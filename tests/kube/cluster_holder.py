"""Holds one cluster for all test workers: `python cluster_holder.py KIND DIRECTORY RUN`.

The cluster ends on SIGTERM, or when the process RUN is gone, however it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lbctl.errors import LabError, MissingFeature
from lbctl.lab.cluster.handle import ClusterSpec

if TYPE_CHECKING:  # each kind imports only what it needs
    from lbctl.lab.cluster.embedded import EmbeddedCluster
    from lbctl.lab.cluster.kubernetes import KubernetesCluster

POLL_S = 0.3
NODE_GRACE_S = 20.0
HISTORY = 500  # small, so that the suite can outrun it


def main() -> None:
    """Start, say where it is (or why not), hold, stop."""
    kind, directory, run = sys.argv[1], Path(sys.argv[2]), Path("/proc", sys.argv[3])
    ended: list[int] = []
    pid_file = directory / "holder.new"
    pid_file.write_text(str(os.getpid()))
    pid_file.replace(directory / "holder.pid")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: ended.append(n))
    spec = ClusterSpec(directory)
    cluster: EmbeddedCluster | KubernetesCluster
    try:
        if kind == "embedded":
            from lbctl.lab.cluster import embedded

            cluster = embedded.start(spec, history=HISTORY, node_grace_s=NODE_GRACE_S)
        else:
            from lbctl.lab.cluster import kubernetes

            cluster = kubernetes.start(spec)
    except LabError as error:
        problem = {"missing": isinstance(error, MissingFeature), "error": str(error)}
        _write(directory / "access.json", problem)
        return
    access = {
        "url": cluster.url,
        "ca_file": str(cluster.ca_file),
        "admin_token": cluster.admin_token,
        "kubeconfig": str(cluster.kubeconfig),
        "pids": cluster.pids(),
    }
    _write(directory / "access.json", access)
    while not ended and run.exists():
        time.sleep(POLL_S)
    cluster.stop()


def _write(path: Path, content: object) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


if __name__ == "__main__":
    main()
