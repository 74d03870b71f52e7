"""Faults for tests and drills: the processes of the lab's containers, found and hit.

Signals reach processes by pid and never by a name that others could have. `kill_container` ends a
container as a kubelet does; the others act on its processes directly. All raise LabError.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lbctl.errors import LabError

if TYPE_CHECKING:
    from lbctl.lab.lab import Lab

_SOCKET: Final = "kubelet.sock"
_LIMIT_S: Final = 120.0


@dataclass(frozen=True, slots=True, order=True)
class RunningContainer:
    """A container as the lab's kubelet knows it. `pidns` is 0 while it does not run."""

    namespace: str
    pod: str
    container: str
    node: str
    pidns: int
    restarts: int
    ready: bool


def _ask(lab: Lab, request: dict[str, Any]) -> dict[str, Any]:
    path = lab.directory / _SOCKET
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_LIMIT_S)
            sock.connect(str(path))
            with sock.makefile("rwb") as file:
                file.write(json.dumps(request).encode() + b"\n")
                file.flush()
                answer: dict[str, Any] = json.loads(file.readline() or b"{}")
    except (OSError, ValueError) as error:
        raise LabError(f"the lab's kubelet does not answer at {path}: {error}") from error
    if "error" in answer:
        raise LabError(answer["error"])
    return answer


def containers(lab: Lab) -> list[RunningContainer]:
    """Every container that a kubelet of the lab looks after, sorted."""
    rows = _ask(lab, {"op": "containers"})["containers"]
    return sorted(RunningContainer(**row) for row in rows)


def find(lab: Lab, pod: str, container: str) -> RunningContainer:
    """One container; `pod` is NAME or NAMESPACE/NAME."""
    for row in containers(lab):
        if pod in (row.pod, f"{row.namespace}/{row.pod}") and row.container == container:
            return row
    raise LabError(f"no container {container!r} of a pod {pod!r} in lab {lab.name}")


def container_pids(lab: Lab, pod: str, container: str, match: str = "") -> list[int]:
    """Pids (the host's) of all processes of a container, its first one first.

    match: only those with this text in their command line, such as "exabgp". Empty while the
    container does not run.
    """
    pidns = find(lab, pod, container).pidns
    if not pidns:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if (entry / "ns/pid").stat().st_ino == pidns and match in _command(entry):
                    found.append(int(entry.name))
    return sorted(found, key=lambda pid: (_inner(pid), pid))


def _command(entry: Path) -> str:
    return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _inner(pid: int) -> int:
    """Its pid in the container's own namespace."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 1 << 30


def signal_container(lab: Lab, pod: str, container: str, number: int, match: str = "") -> list[int]:
    """Send a signal (SIGKILL, SIGSTOP, SIGCONT …) to a container's processes; the pids hit.

    Raises LabError if there is none.
    """
    pids = container_pids(lab, pod, container, match)
    if not pids:
        raise LabError(f"no process of {pod}/{container} matches {match!r}")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids


def freeze(lab: Lab, pod: str, container: str, match: str = "") -> list[int]:
    """SIGSTOP a container's processes, so that they hold still until `thaw`.

    Again until no new one has appeared: one that was not stopped yet may have forked.
    """
    frozen: set[int] = set()
    while new := set(signal_container(lab, pod, container, signal.SIGSTOP, match)) - frozen:
        frozen |= new
    return sorted(frozen)


def thaw(lab: Lab, pod: str, container: str, match: str = "") -> list[int]:
    """SIGCONT."""
    return signal_container(lab, pod, container, signal.SIGCONT, match)


def crash_container(lab: Lab, pod: str, container: str, match: str = "") -> list[int]:
    """SIGKILL a container's processes, as the kernel's out-of-memory killer would."""
    return signal_container(lab, pod, container, signal.SIGKILL, match)


def kill_container(lab: Lab, pod: str, container: str, grace_s: float = 30.0) -> None:
    """End a container as a kubelet does: SIGTERM, `grace_s`, SIGKILL. It is then restarted.

    Returns when this run of it has ended.
    """
    _ask(lab, {"op": "kill", "pod": pod, "container": container, "grace_s": grace_s})
