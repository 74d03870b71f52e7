"""ExaBGP as a child process: its environment, its configuration file, its end.

It runs as whatever uid this process has, with nothing writable but the speaker's directory.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

import structlog

from lbctl.core.model import Address, Peer
from manager.speaker import messages

log = structlog.get_logger()


def environment() -> dict[str, str]:
    """ExaBGP's settings (FACTS.md) on top of this process's environment."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("exabgp")}
    return own | {
        "exabgp_daemon_user": user_name(),
        "exabgp_daemon_drop": "false",
        "exabgp_daemon_daemonize": "false",
        "exabgp_log_level": "WARNING",
        "exabgp_log_destination": "stdout",
        "exabgp_api_ack": "true",
        "exabgp_api_cli": "false",
        "exabgp_api_chunk": "2000",
        "exabgp_reactor_speed": "0.1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def user_name() -> str:
    """The name of the running user, or of any that exists: ExaBGP wants one and changes nothing."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return pwd.getpwall()[0].pw_name


def local_address(peer: Peer) -> Address | None:
    """The address that the kernel would speak to the peer from; None without a route."""
    family = socket.AF_INET if peer.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(peer.address), peer.port))  # sends nothing
            return ip_address(probe.getsockname()[0].split("%")[0])
        except OSError:
            return None


def relay_command(directory: Path) -> tuple[str, ...]:
    """The command line of ExaBGP's API process."""
    return (sys.executable, "-m", "manager.speaker.relay", str(directory / messages.RELAY_SOCKET))


class Process:
    """One ExaBGP, from start to exit."""

    def __init__(self, child: asyncio.subprocess.Process, started_s: float) -> None:
        self._child = child
        self.started_s = started_s

    @property
    def pid(self) -> int:
        """Of ExaBGP."""
        return self._child.pid

    @classmethod
    async def start(cls, config: Path) -> Process:
        """Start it with a configuration file."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "manager.speaker.runner",
            str(config),
            str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(),
        )
        return cls(child, asyncio.get_running_loop().time())

    async def wait(self) -> int:
        """Log what it says until it exits; returns its exit code."""
        assert self._child.stdout is not None  # by construction
        while data := await self._child.stdout.read(4096):
            for line in data.decode("utf-8", "replace").splitlines():
                if line.strip():
                    log.info("exabgp_says", line=line.strip()[:500])
        return await self._child.wait()

    def reload(self) -> None:
        """Ask it to read its configuration again."""
        self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it at once; its sockets close, the switches see a FIN."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._child.returncode is None:
            self._child.send_signal(number)


def write_config(path: Path, text: str) -> None:
    """Replace the file at once, readable by this user only."""
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    fresh.replace(path)
