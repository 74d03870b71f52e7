"""Processes that outlive the command that starts them: pid files, liveness, stopping by pid.

A pid file holds the first line of `/proc/PID/stat`, written by the process itself before it
becomes what it is for. So there is no moment in which a process runs that nobody knows of, and a
recycled pid is told apart by its start time. Nothing here ever looks for a process by name.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lbctl.errors import LabError

_DETACH: Final = """
log=$1 pidfile=$2; shift 2
( read -r stat </proc/self/stat; echo "$stat" >"$pidfile.new"; mv "$pidfile.new" "$pidfile"
  exec "$@" </dev/null >>"$log" 2>&1 ) &
"""


@dataclass(frozen=True, slots=True)
class Pid:
    """A process for good: pid and start time (clock ticks since boot, proc(5) field 22)."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        now = parse_stat(_stat_of(self.pid))
        return now is not None and now[0] == self and now[1] not in "ZX"


def parse_stat(line: str) -> tuple[Pid, str] | None:
    """`/proc/PID/stat` → (who, state letter); None for anything else. The name may hold spaces."""
    head, _, tail = line.rpartition(")")
    fields = tail.split()
    number = head.partition(" ")[0]
    if not number.isdigit() or len(fields) < 20:
        return None
    return Pid(int(number), int(fields[19])), fields[0]


def _stat_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""


def identify(pid: int) -> Pid | None:
    """Who has this pid now."""
    found = parse_stat(_stat_of(pid))
    return found[0] if found else None


def is_stopped(pid: Pid) -> bool:
    """Whether SIGSTOP holds it."""
    found = parse_stat(_stat_of(pid.pid))
    return found is not None and found == (pid, "T")


def read_pid_file(path: Path) -> Pid | None:
    """What a pid file says; None if there is none or it is not one."""
    try:
        found = parse_stat(path.read_text("utf-8", "replace"))
    except OSError:
        return None
    return found[0] if found else None


def spawn(
    argv: Sequence[str],
    *,
    pid_file: Path,
    log: Path,
    env: Mapping[str, str] | None = None,
    limit_s: float = 30.0,
) -> Pid:
    """Start a process of its own session, not our child, with output appended to `log`.

    Its pid file exists before it runs. Raises LabError if it never appeared.
    """
    pid_file.unlink(missing_ok=True)
    command = ["sh", "-c", _DETACH, "sh", str(log), str(pid_file), *argv]
    subprocess.run(command, check=True, start_new_session=True, env=env)
    deadline = time.monotonic() + limit_s
    while (pid := read_pid_file(pid_file)) is None:
        if time.monotonic() > deadline:
            raise LabError(f"{argv[0]} did not start within {limit_s:.0f} s; see {log}")
        time.sleep(0.002)
    return pid


def stop(pids: Iterable[Pid], grace_s: float = 5.0) -> None:
    """End processes: SIGTERM, after `grace_s` SIGKILL; returns when all are gone.

    grace_s 0 kills at once. Signals go through a pidfd, so never to a stranger with the same pid.
    """
    handles = [(pid, fd) for pid in pids if (fd := _open(pid)) is not None]
    try:
        if grace_s > 0:
            _signal(handles, signal.SIGTERM)
            handles_left = _wait(handles, grace_s)
        else:
            handles_left = handles
        _signal(handles_left, signal.SIGKILL)
        stuck = _wait(handles_left, 30.0)
        if stuck:
            raise LabError(f"processes {[p.pid for p, _ in stuck]} survive SIGKILL (kernel wait)")
    finally:
        for _, fd in handles:
            os.close(fd)


def send(pids: Iterable[Pid], number: signal.Signals) -> None:
    """Send a signal to these very processes; those that are gone are left out."""
    handles = [(pid, fd) for pid in pids if (fd := _open(pid)) is not None]
    try:
        _signal(handles, number)
    finally:
        for _, fd in handles:
            os.close(fd)


def _open(pid: Pid) -> int | None:
    try:
        fd = os.pidfd_open(pid.pid)
    except OSError:
        return None
    if pid.alive():
        return fd
    os.close(fd)
    return None


def _signal(handles: list[tuple[Pid, int]], number: signal.Signals) -> None:
    for _, fd in handles:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)


def _wait(handles: list[tuple[Pid, int]], limit_s: float) -> list[tuple[Pid, int]]:
    """Those still alive after at most `limit_s`. A pidfd is readable once its process is over."""
    poller = select.poll()
    for _, fd in handles:
        poller.register(fd, select.POLLIN)
    left = {fd: pid for pid, fd in handles}
    deadline = time.monotonic() + limit_s
    while left and (rest := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(rest * 1000):
            poller.unregister(fd)
            left.pop(fd, None)
    return [(pid, fd) for fd, pid in left.items()]


def members(namespaces: Iterable[Path]) -> list[Pid]:
    """Every process whose network namespace is one of these (paths such as /run/netns/NAME)."""
    wanted = set()
    for path in namespaces:
        with suppress(OSError):
            status = path.stat()
            wanted.add((status.st_dev, status.st_ino))
    found = []
    for entry in os.scandir("/proc") if wanted else ():
        if entry.name.isdigit():
            with suppress(OSError):
                status = Path(f"/proc/{entry.name}/ns/net").stat()
                if (status.st_dev, status.st_ino) in wanted:
                    pid = identify(int(entry.name))
                    found += [pid] if pid else []
    return found


def readable(fd: int, limit_s: float) -> bool:
    """Wait until a pipe has something to read, or its end; False if `limit_s` passes first."""
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poller.poll(limit_s * 1000))
