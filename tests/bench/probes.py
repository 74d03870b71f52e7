"""One real `lbctl-manager` and the answers of many nodes, in a network namespace of their own.

Every node is a real `agent.responder.Responder` on an address of `lo` of its own, all in this one
process; a node falls silent when nftables drops what is sent to it. The API server and the speaker
are the bench's; the manager is a process as on its host, so its memory and processor time are its
own. `python -m tests.bench.probes NODES RUNS` does it where it is and prints JSON; `measure` runs
that in a new namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import structlog

from agent.responder import Responder
from lbctl.core.keys import Keys
from lbctl.core.model import Behind, NodeState
from manager.speaker import messages
from manager.speaker.messages import Run

from .cluster import Cluster
from .fakeapi import FakeApi
from .fakespeaker import FakeSpeaker
from .scale import in_namespace
from .timing import Measured, Program

SIZES: Final = (50, 1_000)
SERVICES: Final = 100
PODS: Final = 4
_ROOT: Final = Path(__file__).parent.parent.parent
FIRST: Final = "192.168.0.1"  # a switch would take no loopback address as a next hop
_WINDOW_S: Final = 3.0
_LIMIT_S: Final = 120.0
_NFT: Final = """\
table ip bench {
  set dead { type ipv4_addr; }
  chain in { type filter hook input priority 0; ip daddr @dead drop; }
}
"""


def measure(runs: int) -> Iterator[Measured]:
    """An idle manager, one node silent, a tenth of them at once, and more than half."""
    for nodes in SIZES:
        for what, (values, unit) in in_namespace("probes", nodes, runs).items():
            yield f"{nodes:,} nodes, {SERVICES:,} EIPs: {what}", tuple(values), unit


class Manager(Program):
    """What it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__(process.pid)
        self._judged: dict[str, tuple[str, bool]] = {}  # by node: state, and whether it is held
        self._news = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read(process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while process.stderr is not None and (line := await process.stderr.readline()):
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "node_judged":
                self._judged[event["node"]] = event["state"], event["held"]
                self._news.set()
            if event["level"] == "error":
                print(line.decode(), end="", file=sys.stderr)

    async def judges(self, nodes: Iterable[str], state: NodeState, held: bool = False) -> float:
        """Wait until it calls all these nodes so; when that was."""
        left = set(nodes)
        async with asyncio.timeout(_LIMIT_S):
            while left := {name for name in left if self._judged.get(name) != (state, held)}:
                await self._news.wait()
                self._news.clear()
        return time.perf_counter()


class Probes:
    """The measurements of one manager."""

    def __init__(self, nodes: int, runs: int, directory: Path) -> None:
        self.runs, self.directory = runs, directory
        self.cluster = Cluster(SERVICES, nodes, PODS, FIRST)
        self.names = [node.name for node in self.cluster.nodes]
        self.speaker = FakeSpeaker()
        self.found: dict[str, tuple[list[float], str]] = {}

    def note(self, what: str, value: float, unit: str) -> None:
        """Keep a value."""
        self.found.setdefault(what, ([], unit))[0].append(value)

    async def run(self) -> None:
        """Start the nodes and a manager, measure, end it."""
        secret = os.urandom(32)
        responders = await self._answer(Keys(secret))
        server = await asyncio.start_unix_server(
            self.speaker.serve, self.directory / messages.MANAGER_SOCKET, limit=messages.MAX_LINE
        )
        async with server, FakeApi(self.cluster, secret) as api:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "manager.main", "--id", "m", "--address", "127.0.0.1"),
                *("--speaker-dir", self.directory, "--snapshot-dir", self.directory),
                *("--keys-dir", self.directory, "--kubeconfig", api.kubeconfig(self.directory)),
                cwd=_ROOT,
                stderr=asyncio.subprocess.PIPE,
                limit=messages.MAX_LINE,
            )
            try:
                await self._measure(Manager(process), responders)
            finally:
                process.terminate()
                await process.wait()

    async def _answer(self, keys: Keys) -> list[Responder]:
        confirmed = dict.fromkeys(self.cluster.addresses, Behind.AWAY)
        responders = []
        for node in self.cluster.nodes:
            made = Responder(node.name, keys, time.time_ns(), lambda: self.names, lambda _: None)
            made.publish(confirmed, digest=77, config_generation=1)
            await made.start(str(node.addresses[0]))
            responders.append(made)
        return responders

    async def _measure(self, manager: Manager, responders: list[Responder]) -> None:
        begin = time.perf_counter()
        up = await manager.judges(self.names, NodeState.UP)
        self.note("process started → all nodes are Up", up - begin, "s")
        await self._quiet()
        self.note("the same and all is announced, processor time", manager.processor_s(), "s")
        for _ in range(self.runs):
            used, begin = manager.processor_s(), time.perf_counter()
            answered = sum(one.answered for one in responders)
            await asyncio.sleep(_WINDOW_S)
            took_s = time.perf_counter() - begin
            self.note("idle: share of a core", 100 * (manager.processor_s() - used) / took_s, "%")
            rate = (sum(one.answered for one in responders) - answered) / took_s
            self.note("idle: probes answered", rate, "/s")
        self.note("idle: memory", manager.memory("VmRSS"), "MiB")
        for number in range(self.runs):
            await self._silence("one node silent", manager, self.names[number : number + 1])
        tenth = len(self.names) // 10
        await self._silence("a tenth silent at once", manager, self.names[-tenth:])
        most = self.names[: len(self.names) * 6 // 10]
        await self._silence("six tenths silent at once", manager, most, panic=True)
        self.note("memory at its peak", manager.memory("VmHWM"), "MiB")

    async def _silence(
        self, what: str, manager: Manager, names: list[str], panic: bool = False
    ) -> None:
        """These nodes are silent, and come back. panic: they are too many to believe it."""
        addresses = [str(n.addresses[0]) for n in self.cluster.nodes if n.name in set(names)]
        self.speaker.runs.clear()
        came: list[float] = []
        self.speaker.on_run = lambda _run: came.append(time.perf_counter())
        used = manager.processor_s()
        nft(f"add element ip bench dead {{ {', '.join(addresses)} }}")
        begin = time.perf_counter()
        judged = await manager.judges(names, NodeState.SUSPECT, panic)
        self.note(f"{what} → {'held, all of them' if panic else 'Suspect'}", judged - begin, "s")
        await self._quiet()
        if panic:
            self.note(f"{what}: routes that changed", sum(map(_routes, self.speaker.runs)), "")
        else:
            self.note(f"{what} → first command to the speaker", min(came) - begin, "s")
            self.note(f"{what} → last command to the speaker", max(came) - begin, "s")
        self.note(f"{what}: processor time", manager.processor_s() - used, "s")
        nft("flush set ip bench dead")
        await manager.judges(names, NodeState.UP)
        await self._quiet()

    async def _quiet(self) -> None:
        """Wait until nothing has come to the speaker for a while."""
        came = asyncio.Event()
        before = self.speaker.on_run

        def note(run: Run) -> None:
            came.set()
            before(run)

        self.speaker.on_run = note
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(_WINDOW_S):
                    await came.wait()
                came.clear()
        self.speaker.on_run = before


def _routes(run: Run) -> int:
    return len(run.prefixes)


def local_addresses() -> None:
    """Give this network namespace the simulated nodes' addresses."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "route", "add", "local", "192.168.0.0/16", "dev", "lo"], check=True)


def nft(text: str) -> None:
    """Give this to nft."""
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def main() -> None:
    """Run here."""
    local_addresses()
    nft(_NFT)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    nodes, runs = map(int, sys.argv[1:])
    with TemporaryDirectory() as directory:
        probes = Probes(nodes, runs, Path(directory))
        asyncio.run(probes.run())
    print(json.dumps(probes.found))


if __name__ == "__main__":
    main()
