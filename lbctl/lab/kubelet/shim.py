"""A node's container runtime: one process inside a machine's namespaces, led by the daemon.

It is the fork server of everything that runs on the node, so that a power cut takes all of it. It
speaks JSON lines on file descriptor 0, a socket to the daemon, and is handed the directory for logs
as a descriptor, because the machine's mounts need not show it. When the socket closes it kills its
containers and ends.

Rules: standard library only (it runs as `python -S -E`, 20 ms); one thread, so that forking and
changing namespaces are safe; an operation that can last (exec) never blocks the others.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lbctl.lab.kubelet import linux, sandbox
from lbctl.lab.kubelet.launch import Launch, enter_and_run, start

BASE: Final = "/run/lbctl-kubelet"
_CONTROL: Final = 0
_MAX_OUTPUT: Final = 64 * 1024
_KILLED_S: Final = 60.0  # a killed command is waited for without a deadline of its own


@dataclass(slots=True)
class _Running:
    key: str
    pid: int
    pidfd: int
    launch: Launch


@dataclass(slots=True)
class _Exec:
    request: int
    pid: int
    pidfd: int
    output_fd: int
    deadline: float
    output: bytes = b""
    open: bool = True
    timed_out: bool = field(default=False)


class Shim:
    """The server. Every `_op_*` answers one kind of request; it may raise OSError or ValueError."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._control = socket.socket(fileno=_CONTROL)
        self._control.setblocking(True)
        self._buffer = b""
        self._containers: dict[str, _Running] = {}
        self._execs: dict[int, _Exec] = {}
        self._network = sandbox.Sandboxes()
        self._files = sandbox.Volumes(BASE)
        self._pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._ended = False

    def run(self) -> None:
        """Serve until the daemon is gone."""
        Path(f"{BASE}/root").mkdir(parents=True, exist_ok=True)
        sandbox.prepare_node()
        self._selector.register(self._control, selectors.EVENT_READ, self._on_control)
        self._send({"event": "ready"})
        while not self._ended:
            for key, _ in self._selector.select(self._until_deadline()):
                action: Callable[[], None] = key.data
                action()
            self._kill_late_execs()
        for running in self._containers.values():
            os.kill(running.pid, signal.SIGKILL)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._ended = True

    def _on_control(self) -> None:
        try:
            data = self._control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._ended = True
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._request(json.loads(line))

    def _request(self, request: dict[str, Any]) -> None:
        operation = getattr(self, f"_op_{request['op']}")
        try:
            answer = operation(request)
        except (OSError, ValueError) as error:
            self._send({"id": request["id"], "error": str(error)})
            return
        if answer is not None:
            self._send({"id": request["id"], **answer})

    # containers

    def _op_start(self, request: dict[str, Any]) -> dict[str, Any]:
        launch: Launch = request["launch"]
        key: str = request["key"]
        if key in self._containers:
            raise ValueError(f"{key} is running already")
        netns = self._network.fd(launch["sandbox"]) if launch["sandbox"] else None
        Path(launch["log"]).parent.mkdir(parents=True, exist_ok=True)
        log = os.open(launch["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            pid, inode = start(launch, log, netns, self._pidns, f"{BASE}/root")
        finally:
            os.close(log)
        pidfd = os.pidfd_open(pid)
        running = _Running(key, pid, pidfd, launch)
        self._containers[key] = running
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_exit(running))
        return {"pid": pid, "pidns": inode}

    def _on_exit(self, running: _Running) -> None:
        self._selector.unregister(running.pidfd)
        os.close(running.pidfd)
        _, status = os.waitpid(running.pid, 0)
        del self._containers[running.key]
        self._send({"event": "exited", "key": running.key, "code": _code(status)})

    def _op_signal(self, request: dict[str, Any]) -> dict[str, Any]:
        running = self._containers.get(request["key"])
        if running is not None:
            signal.pidfd_send_signal(running.pidfd, request["signal"])
        return {"sent": running is not None}

    # exec

    def _op_exec(self, request: dict[str, Any]) -> None:
        running = self._containers.get(request["key"])
        if running is None:
            raise ValueError(f"{request['key']} is not running")
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            enter_and_run(running.pidfd, running.launch, request["argv"], write_end)
        os.close(write_end)
        os.set_blocking(read_end, False)
        deadline = time.monotonic() + float(request["timeout_s"])
        run = _Exec(request["id"], pid, os.pidfd_open(pid), read_end, deadline)
        self._execs[pid] = run
        self._selector.register(read_end, selectors.EVENT_READ, lambda: self._on_output(run))
        self._selector.register(run.pidfd, selectors.EVENT_READ, lambda: self._on_exec_end(run))

    def _on_output(self, run: _Exec) -> None:
        try:
            data = os.read(run.output_fd, 1 << 16)
        except BlockingIOError:
            return
        run.output = (run.output + data)[:_MAX_OUTPUT]
        if not data:
            self._close_output(run)

    def _close_output(self, run: _Exec) -> None:
        if run.open:
            run.open = False
            self._selector.unregister(run.output_fd)
            os.close(run.output_fd)

    def _on_exec_end(self, run: _Exec) -> None:
        if run.open:
            self._on_output(run)
        self._close_output(run)
        self._selector.unregister(run.pidfd)
        os.close(run.pidfd)
        _, status = os.waitpid(run.pid, 0)
        del self._execs[run.pid]
        output = run.output.decode(errors="replace")
        code = None if run.timed_out else _code(status)
        self._send({"id": run.request, "code": code, "output": output})

    def _until_deadline(self) -> float | None:
        if not self._execs:
            return None
        return max(0.0, min(run.deadline for run in self._execs.values()) - time.monotonic())

    def _kill_late_execs(self) -> None:
        now = time.monotonic()
        for run in self._execs.values():
            if run.deadline <= now and not run.timed_out:
                run.timed_out = True
                run.deadline = now + _KILLED_S
                signal.pidfd_send_signal(run.pidfd, signal.SIGKILL)

    # pods

    def _op_sandbox(self, request: dict[str, Any]) -> dict[str, Any]:
        self._network.create(request["uid"], request["addresses"])
        return {}

    def _op_volume(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"path": self._files.directory(request["uid"], request["name"], request["group"])}

    def _op_files(self, request: dict[str, Any]) -> dict[str, Any]:
        path = self._files.write(
            request["uid"], request["name"], request["files"], request["group"]
        )
        return {"path": path}

    def _op_hostpath(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"path": sandbox.host_path(request["path"], request["kind"])}

    def _op_remove(self, request: dict[str, Any]) -> dict[str, Any]:
        for running in self._containers.values():
            if running.key.startswith(f"{request['uid']}/"):
                signal.pidfd_send_signal(running.pidfd, signal.SIGKILL)
        self._network.remove(request["uid"])
        self._files.remove(request["uid"])
        return {}


def _code(status: int) -> int:
    """Exit code as Kubernetes writes it: 128 + signal for a killed process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main(logs: int) -> None:
    """Entry point, see the module. `logs` is the descriptor of the directory for logs."""
    os.set_inheritable(_CONTROL, False)
    os.fchdir(logs)  # log names are relative to it
    os.close(logs)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    linux.die_with_parent()
    Shim().run()
    sys.exit(0)
