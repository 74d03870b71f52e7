"""Holds the lab's cluster: starts it in the machine `kube`, keeps it until SIGTERM.

Run as `python -m lbctl.lab.clusterd LAB KIND`. A process of its own, because the cluster's programs
die with the one that started them, and `lbctl lab up` does not stay. They run in the machine's
network namespace alone: their files are the host's, and cutting that machine's power ends them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

from lbctl.errors import LabError
from lbctl.lab.cluster.handle import ClusterSpec
from lbctl.lab.daemon import ClusterAccess
from lbctl.lab.lab import Lab

PORT: Final = 6443
HOST: Final = "kube.lbctl.lab"


def start(lab: Lab, kind: str) -> Callable[[], None]:
    """Start the cluster and write down how to reach it; what stops it. Raises LabError."""
    machine = lab.of_role("cluster")[0]
    directory = lab.directory / "cluster"
    directory.mkdir(mode=0o700, exist_ok=True)
    spec = ClusterSpec(
        directory=directory,
        prefix=("nsenter", f"--net={machine.netns}", "--"),
        address=machine.address,
        port=PORT,
        extra_names=("localhost", "127.0.0.1", HOST, machine.address),
    )

    def progress(text: str) -> None:
        print(text, flush=True)

    if kind == "embedded":
        from lbctl.lab.cluster import embedded

        simple = embedded.start(spec)
        stop, ca_file, token = simple.stop, simple.ca_file, simple.admin_token
    else:
        from lbctl.lab.cluster import kubernetes

        real = kubernetes.start(spec, progress)
        stop, ca_file, token = real.stop, real.ca_file, real.admin_token
    url = f"https://{machine.address}:{PORT}"
    access = ClusterAccess(kind, url, ca_file, token, machine.name)
    access.write(lab.directory)
    return stop


def main() -> None:
    """Command line of the module. Exit code 1 and one line on stderr if it cannot start."""
    # no blocked signals: the cluster's programs would inherit that, and not hear SIGTERM
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        stop = start(Lab.load(sys.argv[1]), sys.argv[2])
    except LabError as error:
        sys.exit(f"error: {error}")
    ended.wait()
    stop()


if __name__ == "__main__":
    main()
