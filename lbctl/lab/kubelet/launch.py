"""Starts a container's first process with exactly what its manifest gives it, as a runtime does.

Capabilities follow containerd: root has the bounding set, another user has none (Kubernetes has no
ambient capabilities), whatever `add` says. The process is number 1 of its own PID namespace, so it
gets no signal that it has no handler for, and nothing of it outlives it.

Rules: standard library only; between fork and exec nothing may return: the child ends by `_exit`.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn, TypedDict

from lbctl.lab.kubelet import linux, podserver, rootfs

_FAILED: Final = 128  # what a runtime reports when the process could not be started


class Launch(TypedDict):
    """Everything about one container, plain enough for JSON.

    serve: run the pod server with these ports instead of `argv`. sandbox: the pod's network (its
    uid), "" for the node's. keep: directories of the machine to show. log: relative file name.
    """

    name: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    serve: list[podserver.Port] | None
    sandbox: str
    keep: list[str]
    mounts: list[rootfs.Mount]
    uid: int
    gid: int
    groups: list[int]
    capabilities: list[str]
    readonly: bool
    no_new_privileges: bool
    log: str


def start(launch: Launch, log: int, netns: int | None, pidns: int, scratch: str) -> tuple[int, int]:
    """Start it; return its pid and the inode of its PID namespace.

    netns: the pod's network namespace. pidns: the caller's own PID namespace, to come back to.
    Raises OSError with what the child could not do, such as a command that is not there.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    linux.unshare(linux.CLONE_NEWPID)  # for children only, and only until setns below
    pid = os.fork()
    if pid == 0:
        _first_process(launch, log, netns, write_end, scratch)
    linux.setns(pidns, linux.CLONE_NEWPID)
    os.close(write_end)
    said = b""
    while piece := os.read(read_end, 65536):
        said += piece
    os.close(read_end)
    inode, _, problem = said.decode(errors="replace").partition("\n")
    if problem or not inode:
        os.waitpid(pid, 0)
        raise OSError(problem or "the container's process ended before it started")
    return pid, int(inode)


def _first_process(
    launch: Launch, log: int, netns: int | None, report: int, scratch: str
) -> NoReturn:
    code = _FAILED
    try:
        os.write(report, f"{Path('/proc/self/ns/pid').stat().st_ino}\n".encode())
        _fresh_process(log)
        if netns is not None:
            linux.setns(netns, linux.CLONE_NEWNET)
        if launch["serve"] is not None:
            code = _serve(launch, report)
        else:
            rootfs.enter(scratch, launch["keep"], launch["mounts"], launch["readonly"])
            _execute(launch, launch["argv"])
    except OSError as error:
        os.write(report, str(error).encode())
    except BaseException:  # noqa: BLE001 - a forked child: nothing may return from here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _fresh_process(output: int) -> None:
    """A session of its own, default signals, /dev/null to read, `output` to write."""
    os.setsid()
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir("/")
    os.umask(0o022)


def _serve(launch: Launch, report: int) -> int:
    linux.die_with_parent()
    os.closerange(3, report)
    os.closerange(report + 1, 65536)
    listening = podserver.Listening(launch["serve"] or [])
    os.close(report)
    podserver.serve(launch["name"], listening)
    return 0


def _execute(launch: Launch, argv: Sequence[str]) -> NoReturn:
    os.chdir(launch["cwd"])
    linux.bound_capabilities(frozenset(launch["capabilities"]))
    os.setgroups(launch["groups"])
    os.setresgid(launch["gid"], launch["gid"], launch["gid"])
    os.setresuid(launch["uid"], launch["uid"], launch["uid"])
    linux.die_with_parent()
    if launch["no_new_privileges"]:
        linux.no_new_privileges()
    os.environ.clear()  # execvpe looks argv[0] up in the PATH that it is given
    os.execvpe(argv[0], list(argv), launch["env"])


def enter_and_run(pidfd: int, launch: Launch, argv: Sequence[str], output: int) -> NoReturn:
    """In a forked child: run `argv` in the container of `pidfd`, and end with its exit code."""
    code = _FAILED
    try:
        linux.die_with_parent()
        _fresh_process(output)
        linux.setns(pidfd, linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET)
        pid = os.fork()
        if pid == 0:
            _execute(launch, argv)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status) & 0xFF
    except OSError as error:
        os.write(output, str(error).encode())
    except BaseException:  # noqa: BLE001 - a forked child: nothing may return from here
        traceback.print_exc()
    finally:
        os._exit(code)
