"""A bare machine for the kubelet's tests: namespaces of their own, without a lab around them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lbctl.lab.kubelet.kubelet import ROOT
from lbctl.lab.kubelet.launch import Launch
from lbctl.lab.kubelet.podserver import Port

_INIT = "mount -t proc proc /proc && mount -t tmpfs run /run && ip link set lo up && exec sleep 600"
KEEP = [str(ROOT), os.path.realpath(sys.base_prefix)]
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"


class Node:
    """An init in namespaces of its own; `close` ends it and all that runs inside."""

    name = "kubelet-test"

    def __init__(self) -> None:
        unshare = ["unshare", "-n", "-m", "-p", "-u", "--fork", "--kill-child"]
        self._process = subprocess.Popen([*unshare, "sh", "-c", _INIT])
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + 30
        while not (found := children.read_text().split()) or not self._asleep(int(found[0])):
            assert time.monotonic() < deadline, "waited 30 s for a machine to start"
            time.sleep(0.01)
        self.pid = int(found[0])

    @staticmethod
    def _asleep(pid: int) -> bool:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep")

    def command(self, *argv: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "-u", "--", *argv]

    def run(self, *argv: str) -> str:
        return subprocess.run(
            self.command(*argv), capture_output=True, text=True, check=True, timeout=60
        ).stdout

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def served(name: str, *ports: int, udp: int = 0) -> Launch:
    """A pod server on these ports, in the sandbox of the same name."""
    wanted = [Port(port=port, protocol="TCP") for port in ports]
    wanted += [Port(port=udp, protocol="UDP")] if udp else []
    return program(name, [], serve=wanted, sandbox=name)


def program(name: str, argv: list[str], **changes: Any) -> Launch:
    """A hostNetwork container that may do nothing at all, unless `changes` say otherwise."""
    made = Launch(
        name=name,
        argv=argv,
        env={"PATH": PATH},
        cwd="/",
        serve=None,
        sandbox="",
        keep=KEEP,
        mounts=[],
        uid=65532,
        gid=65532,
        groups=[],
        capabilities=[],
        readonly=True,
        no_new_privileges=True,
        log=f"{name}/main.log",
    )
    made.update(changes)  # type: ignore[typeddict-item]
    return made
