"""Child processes of a cluster: started with PR_SET_PDEATHSIG, logged to a file, stopped by pid."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lbctl.errors import LabError
from lbctl.lab.kubelet.linux import die_with_parent


def start(command: Sequence[str], log: Path, *, linked: bool) -> subprocess.Popen[bytes]:
    """Start a daemon with both outputs in `log`; with `linked` it dies with this process.

    A program behind `nsenter` or `ip netns exec` keeps the pid, because these exec. Raises LabError
    if it cannot be started.
    """
    with log.open("ab") as output:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent if linked else None,
            )
        except OSError as error:
            raise LabError(f"{command[0]} cannot be started: {error}") from error


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = 10.0) -> None:
    """SIGTERM the last one first, wait for each, SIGKILL what stays longer than `grace_s`."""
    for process in reversed(processes):
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path, lines: int = 5) -> str:
    """The last lines of a log in one line, for an error message."""
    try:
        return " | ".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nobody listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process in bytes, 0 if it is gone (proc(5), statm)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
