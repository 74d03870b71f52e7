"""The daemon's end of a node's runtime (`shim.py`): starts it in the machine and talks to it.

Rules: one `Runtime` per life of a machine; when the machine loses power, `lost` is set and every
waiting request raises `LabError`. No policy here: what to start and when is the pod workers'.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from lbctl.errors import LabError
from lbctl.lab.kubelet.launch import Launch
from lbctl.lab.kubelet.sandbox import File, PodAddress

_log = structlog.get_logger()
_ROOT: Final = Path(__file__).resolve().parents[3]
_START: Final = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); "
    "from lbctl.lab.kubelet.shim import main; main(int(sys.argv[1]))"
)
_LIMIT_S: Final = 60.0
_LINE: Final = 32 * 1024 * 1024


class Host(Protocol):
    """What the kubelet needs of a lab machine."""

    @property
    def name(self) -> str:
        """For messages."""

    def command(self, *argv: str) -> list[str]:
        """`argv` wrapped so that it runs inside the machine."""


class Runtime:
    """A node's container runtime."""

    def __init__(self, name: str, exited: Callable[[str, int], None]) -> None:
        """`exited(key, code)` is called when a container's first process is gone."""
        self.lost = asyncio.Event()
        self._name = name
        self._exited = exited
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    async def start(self, host: Host, logs: Path) -> None:
        """Start the shim inside `host`; `logs` is the host's directory for its containers' logs.

        Raises LabError if it does not come up.
        """
        logs.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        directory = os.open(logs, os.O_RDONLY | os.O_DIRECTORY)
        argv = host.command(sys.executable, "-S", "-E", "-c", _START, str(directory))
        errors = (logs / "runtime.log").open("ab")
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it forks at once, and passes fds
                argv,
                stdin=theirs.fileno(),
                stdout=errors,
                stderr=errors,
                pass_fds=(directory,),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise LabError(f"{self._name}: cannot start its runtime: {error}") from error
        finally:
            theirs.close()
            os.close(directory)
            errors.close()
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LINE)
        self._reading = asyncio.create_task(self._read(reader))
        await self._until_ready(logs)

    async def _until_ready(self, logs: Path) -> None:
        waits = [asyncio.ensure_future(self._ready.wait()), asyncio.ensure_future(self.lost.wait())]
        await asyncio.wait(waits, timeout=_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not self._ready.is_set() or self.lost.is_set():
            await self.stop()
            raise LabError(f"{self._name}: its runtime did not start: see {logs / 'runtime.log'}")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._message(json.loads(line))
        except OSError:
            pass  # the machine lost power: the same as an end of file
        finally:
            self.lost.set()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(LabError(f"{self._name} has no power"))
            self._waiting.clear()

    def _message(self, message: dict[str, Any]) -> None:
        if message.get("event") == "ready":
            self._ready.set()
        elif message.get("event") == "exited":
            self._exited(message["key"], message["code"])
        else:
            future = self._waiting.pop(message["id"], None)
            if future is not None and not future.done():
                if "error" in message:
                    future.set_exception(LabError(message["error"]))
                else:
                    future.set_result(message)

    async def _ask(self, op: str, limit_s: float = _LIMIT_S, **fields: Any) -> dict[str, Any]:
        if self._writer is None or self.lost.is_set():
            raise LabError(f"{self._name} has no power")
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._writer.write(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
        try:
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError as error:
            raise LabError(f"{self._name}: no answer to {op} for {limit_s:.0f} s") from error
        finally:
            self._waiting.pop(number, None)

    async def sandbox(self, uid: str, addresses: Sequence[PodAddress]) -> None:
        """Make a pod's network; idempotent. Like all that follow, raises LabError."""
        await self._ask("sandbox", uid=uid, addresses=list(addresses))

    async def directory(self, uid: str, name: str, group: int | None) -> str:
        """Make an emptyDir; returns its path inside the machine."""
        return str((await self._ask("volume", uid=uid, name=name, group=group))["path"])

    async def files(self, uid: str, name: str, files: Mapping[str, File], group: int | None) -> str:
        """Write a volume of files, or swap its content; returns its path inside the machine."""
        answer = await self._ask("files", uid=uid, name=name, files=dict(files), group=group)
        return str(answer["path"])

    async def host_path(self, path: str, kind: str) -> str:
        """Check or make a hostPath; returns the path."""
        return str((await self._ask("hostpath", path=path, kind=kind))["path"])

    async def launch(self, key: str, launch: Launch) -> int:
        """Start a container; returns the inode of its PID namespace."""
        return int((await self._ask("start", key=key, launch=launch))["pidns"])

    async def signal(self, key: str, number: int) -> None:
        """Signal a container's first process; nothing if it is gone."""
        await self._ask("signal", key=key, signal=number)

    async def execute(
        self, key: str, argv: Sequence[str], timeout_s: float
    ) -> tuple[int | None, str]:
        """Run a command in a container; exit code (None: it took too long) and output."""
        answer = await self._ask(
            "exec", timeout_s + _LIMIT_S, key=key, argv=list(argv), timeout_s=timeout_s
        )
        return answer["code"], answer["output"]

    async def remove(self, uid: str) -> None:
        """Take away a pod's network and volumes."""
        await self._ask("remove", uid=uid)

    async def stop(self) -> None:
        """Close the connection: the shim kills its containers and ends; then it is reaped."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            process = self._process
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
                _log.warning("runtime_killed", node=self._name)
        if self._reading is not None:
            await self._reading
