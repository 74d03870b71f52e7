"""A TCP forwarder from the host's loopback to an address inside a network namespace.

So the host's `kubectl` reaches the lab's API server. The listening socket is made on the host,
then the whole process moves into the namespace: a socket keeps the namespace that it was made in,
and every connection made afterwards starts from inside. It listens on 127.0.0.1 only.

Run as `python -m lbctl.lab.forward NETNS ADDRESS:PORT PORTFILE [PORT]`; PORTFILE gets the port
that it listens on (0 or none: a free one) once it does.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from lbctl.errors import LabError

if TYPE_CHECKING:
    from lbctl.lab.lab import Lab

_CLONE_NEWNET: Final = 0x40000000
_CHUNK: Final = 65536
log = structlog.get_logger()


def enter_netns(path: Path) -> None:
    """Move this thread, and with it a process of one thread, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            raise LabError(f"setns {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, until its end; the end is passed on, the other direction may go on."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _serve(
    host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One connection. A target that does not answer closes it, as a refused one would be."""
    try:
        far_reader, far_writer = await asyncio.open_connection(host, port)
    except OSError as error:
        log.warning("forward.refused", target=f"{host}:{port}", error=str(error))
        writer.close()
        return
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(reader, far_writer))
            group.create_task(_copy(far_reader, writer))
    except* OSError as errors:
        log.debug("forward.broken", errors=[str(error) for error in errors.exceptions])
    finally:
        for end in (writer, far_writer):
            end.close()


async def forward(netns: Path, target: str, port_file: Path, port: int) -> None:
    """Listen and forward for ever."""
    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    enter_netns(netns)
    host, _, target_port = target.rpartition(":")
    server = await asyncio.start_server(
        lambda reader, writer: _serve(host.strip("[]"), int(target_port), reader, writer),
        sock=listener,
    )
    new = port_file.with_suffix(".new")
    new.write_text(str(listener.getsockname()[1]), "utf-8")
    new.replace(port_file)
    async with server:
        await server.serve_forever()


def start_forwarder(
    lab: Lab, netns: Path, target: str, port: int = 0, name: str = "forward", limit_s: float = 60.0
) -> int:
    """Start a forwarder that lives as long as the lab; returns its port on 127.0.0.1.

    target: `ADDRESS:PORT` inside `netns`. Raises LabError if it does not come up.
    """
    port_file = lab.directory / "processes" / f"{name}.port"
    port_file.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "lbctl.lab.forward", str(netns), target, str(port_file)]
    pid = lab.spawn(name, [*argv, str(port)])
    deadline = time.monotonic() + limit_s
    while not port_file.exists():
        if not pid.alive() or time.monotonic() > deadline:
            said = (lab.directory / "logs" / f"{name}.log").read_text("utf-8")[-500:]
            raise LabError(f"the forwarder to {target} did not start: {said.strip()}")
        time.sleep(0.005)
    return int(port_file.read_text("utf-8"))


def main() -> None:
    """Command line of the module."""
    netns, target, port_file, *port = sys.argv[1:]
    with suppress(KeyboardInterrupt):
        asyncio.run(forward(Path(netns), target, Path(port_file), int(port[0]) if port else 0))


if __name__ == "__main__":
    main()
