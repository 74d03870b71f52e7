"""One real `lbctl-agent` at full size, in a network namespace of its own.

The API server, the nodes on the link (static neighbours) and the manager that calls nodes down are
the bench's; the agent is a process as on a node, so its memory and processor time are its own.
A time ends when the agent says that the kernel has the table.
`python -m tests.bench.scale SERVICES RUNS` does it where it is and prints JSON; `measure` runs that
in a new namespace.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from lbctl.core import names, probe
from lbctl.core.keys import Keys
from lbctl.udp import UdpSocket

from .cluster import Cluster
from .fakeapi import FakeApi
from .timing import Measured, Program

SIZES = (1_000, 10_000)
NODES, PODS = 100, 10
_ROOT = Path(__file__).parent.parent.parent
_NODE: Final = "n0"
_PROBES_S: Final = 0.05  # as a manager of few nodes has it
_SETTLED_S: Final = 6.0
_LIMIT_S: Final = 120.0
_LINK: Final = (
    "link set lo up",
    "link add eth0 type veth peer name wire",
    "link set wire up",
    "link set eth0 up",
    "address add 192.0.2.20/24 dev eth0",
    "route add default via 192.0.2.1",
)


def measure(runs: int) -> Iterator[Measured]:
    """Load, changes, nodes lost, and an agent with nothing to do, at two sizes."""
    for services in SIZES:
        where = f"{services:,} Services × {PODS} endpoints × {NODES} nodes"
        for what, (values, unit) in in_namespace("scale", services, runs).items():
            yield f"{where}: {what}", tuple(values), unit


def in_namespace(module: str, *arguments: int) -> dict[str, tuple[list[float], str]]:
    """What a module of the bench, run in a new network namespace, prints: JSON."""
    name = f"bench{os.getpid()}"
    ip = ("ip", "netns")
    subprocess.run([*ip, "add", name], check=True)
    try:
        python = [sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)]
        done = subprocess.run(
            [*ip, "exec", name, *python], cwd=_ROOT, check=True, stdout=subprocess.PIPE, timeout=900
        )
        found: dict[str, tuple[list[float], str]] = json.loads(done.stdout)
        return found
    finally:
        subprocess.run([*ip, "del", name], check=True)


class Manager:
    """The probes of one manager, with the nodes that it calls down."""

    def __init__(self, keys: Keys) -> None:
        self.down: frozenset[str] = frozenset()
        self._ring = keys.node(_NODE)
        self._socket = UdpSocket("127.0.0.1")
        self._boot, self._sequence, self._cookie = time.time_ns(), 0, 0

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            self.probe()
            await asyncio.sleep(_PROBES_S)

    def probe(self) -> None:
        """Send one request; read what came back to those before."""
        for data, _ in self._socket.receive():
            self._cookie = probe.decode_answer(data, self._ring).cookie
        self._sequence += 1
        down = frozenset(map(probe.node_hash, self.down))
        request = probe.Request(
            "m", self._boot, self._sequence, self._sequence, self._cookie, judging=True, down=down
        )
        self._socket.send(
            probe.encode_request(request, self._ring.signing), ("127.0.0.1", names.PROBE_PORT)
        )


class Agent(Program):
    """What it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process.pid)
        self._applied: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._reading = asyncio.ensure_future(self._read(process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while process.stderr is not None and (line := await process.stderr.readline()):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "table_applied":
                self._applied.put_nowait(event)
            if event["level"] == "error":
                print(line.decode(), end="", file=sys.stderr)

    def quiet(self) -> None:
        """Forget what it has said so far."""
        while not self._applied.empty():
            self._applied.get_nowait()

    async def applied(self) -> dict[str, Any]:
        """Wait for the next table that is in the kernel; what was said of it."""
        async with asyncio.timeout(_LIMIT_S):
            return await self._applied.get()


class Scale:
    """The measurements of one agent."""

    def __init__(self, services: int, runs: int, directory: Path) -> None:
        self.runs, self.directory = runs, directory
        self.cluster = Cluster(services, NODES, PODS)
        self.found: dict[str, tuple[list[float], str]] = {}

    def note(self, what: str, value: float, unit: str) -> None:
        """Keep a value."""
        self.found.setdefault(what, ([], unit))[0].append(value)

    async def run(self) -> None:
        """Start an agent, measure, end it."""
        secret = os.urandom(32)
        (self.directory / "current").write_bytes(base64.b64encode(secret))
        manager = Manager(Keys(secret))
        async with FakeApi(self.cluster) as api:
            config = api.kubeconfig(self.directory)
            environment = {**os.environ, "NODE_NAME": _NODE, "KUBECONFIG": str(config)}
            begin = time.perf_counter()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agent.main"),
                *("--keys-dir", self.directory, "--snapshot-dir", self.directory),
                cwd=_ROOT,
                env=environment,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                await self._measure(Agent(process), api, manager, begin)
            finally:
                process.terminate()
                await process.wait()

    async def _measure(self, agent: Agent, api: FakeApi, manager: Manager, begin: float) -> None:
        while (await agent.applied())["eips"] < len(self.cluster.refs):
            pass
        self.note("process started → kernel has all", time.perf_counter() - begin, "s")
        self.note("the same, processor time", agent.processor_s(), "s")
        self.note("memory at its peak, loaded", agent.memory("VmHWM"), "MiB")
        probing = asyncio.ensure_future(manager.run())
        await asyncio.sleep(_SETTLED_S)  # the snapshot is written, everybody's lists are read
        await self._idle(agent)
        await self._changes(agent, api)
        await self._losses(agent, manager)
        probing.cancel()
        self.note("memory at its peak, after all that", agent.memory("VmHWM"), "MiB")

    async def _idle(self, agent: Agent) -> None:
        for _ in range(self.runs):
            used, begin = agent.processor_s(), time.perf_counter()
            await asyncio.sleep(2.0)
            share = (agent.processor_s() - used) / (time.perf_counter() - begin)
            self.note("idle, 20 probes a second: share of a core", 100 * share, "%")

    async def _changes(self, agent: Agent, api: FakeApi) -> None:
        """One Service after another has a pod less; never two within one turn of the agent."""
        count = min(100 * self.runs, len(self.cluster.refs))
        used = agent.processor_s()
        for number in range(count):
            agent.quiet()
            begin = time.perf_counter()
            api.change(self.cluster.behind(number, PODS - 1))
            event = await agent.applied()
            self.note("watch line sent → kernel has it", (time.perf_counter() - begin) * 1e3, "ms")
            self.note("of that, plan and write", event["took_s"] * 1e3, "ms")
            await asyncio.sleep(0.02)
        used = (agent.processor_s() - used) / count
        self.note("one Service changed, processor time", used * 1e3, "ms")

    async def _losses(self, agent: Agent, manager: Manager) -> None:
        for number in range(self.runs):
            lost = frozenset({f"n{NODES - 1 - number}"})
            for what, down in (("lost", lost), ("back", frozenset[str]())):
                agent.quiet()
                used, begin = agent.processor_s(), time.perf_counter()
                manager.down = down
                manager.probe()
                await agent.applied()
                self.note(f"node called {what} → kernel has it", time.perf_counter() - begin, "s")
                self.note(f"node {what}, processor time", agent.processor_s() - used, "s")
                await asyncio.sleep(_SETTLED_S)


def _neighbours() -> Iterator[str]:
    for number in range(1, NODES):
        mac = f"02:00:00:00:01:{number:02x}"
        yield f"neighbour add 192.0.2.{20 + number} lladdr {mac} dev eth0 nud permanent"


def main() -> None:
    """Run here."""
    subprocess.run(
        ["ip", "-batch", "-"], input="\n".join((*_LINK, *_neighbours())), text=True, check=True
    )
    services, runs = map(int, sys.argv[1:])
    with TemporaryDirectory() as directory:
        scale = Scale(services, runs, Path(directory))
        asyncio.run(scale.run())
    print(json.dumps(scale.found))


if __name__ == "__main__":
    main()
