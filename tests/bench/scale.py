"""The agent's planner and data plane at full size, in a kernel namespace of their own.

`python -m tests.bench.scale SERVICES RUNS` does it where it is and prints JSON; `measure` runs that
in a new namespace and a new process, because memory is a row of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from agent.dataplane import Dataplane

from .change import AgentSide
from .cluster import Cluster
from .timing import Measured

SIZES = (1_000, 10_000)
NODES, PODS = 100, 10
_ROOT = Path(__file__).parent.parent.parent


def measure(runs: int) -> Iterator[Measured]:
    """Load, one change, and one node lost at two sizes."""
    for services in SIZES:
        where = f"{services:,} Services × {PODS} endpoints × {NODES} nodes"
        for what, (values, unit) in _in_namespace(services, runs).items():
            yield f"{where}: {what}", tuple(values), unit


def _in_namespace(services: int, runs: int) -> dict[str, tuple[list[float], str]]:
    name = f"bench{os.getpid()}"
    ip = ("ip", "netns")
    subprocess.run([*ip, "add", name], check=True)
    try:
        python = [sys.executable, "-m", "tests.bench.scale", str(services), str(runs)]
        done = subprocess.run(
            [*ip, "exec", name, *python], cwd=_ROOT, check=True, capture_output=True, timeout=900
        )
        found: dict[str, tuple[list[float], str]] = json.loads(done.stdout)
        return found
    finally:
        subprocess.run([*ip, "del", name], check=True)


class Scale:
    """One agent's planner and data plane, and what was measured of them."""

    def __init__(self, services: int, runs: int) -> None:
        self.runs = runs
        self.before = _resident()
        self.agent = AgentSide(Cluster(services, NODES, PODS))
        self.inputs = _resident()
        self.dataplane = Dataplane()
        self.found: dict[str, tuple[list[float], str]] = {}

    def note(self, what: str, value: float, unit: str) -> None:
        """Keep a value."""
        self.found.setdefault(what, ([], unit))[0].append(value)

    async def turn(self, what: str, unit: str, down: frozenset[str] = frozenset()) -> None:
        """One pass: plan, write, and what is confirmed."""
        scale = 1000 if unit == "ms" else 1
        begin, cpu = time.perf_counter(), time.process_time()
        self.agent.run(down)
        planned = time.perf_counter()
        await self.dataplane.set(self.agent.state.rules)
        end = time.perf_counter()
        self.note(f"{what}, plan", (planned - begin) * scale, unit)
        self.note(f"{what}, write", (end - planned) * scale, unit)
        self.note(f"{what}, all", (end - begin) * scale, unit)
        self.note(f"{what}, processor time", (time.process_time() - cpu) * scale, unit)

    async def run(self) -> None:
        """Load, change one Service after another, lose a node."""
        await self.turn("load at start", "s")
        self.note("memory with all inputs, none planned", self.inputs, "MiB")
        self.note("memory at its peak, loaded", _peak(), "MiB")
        gc.collect()
        for number in range(0, 30 * self.runs, 3):
            self.agent.change(number)
            await self.turn("one Service changed", "ms")
        for number in range(self.runs):
            lost = frozenset({f"n{NODES - 1 - number}"})
            await self.turn("one node lost", "s", lost)
            await self.turn("one node back", "s")
        self.note("memory at its peak, after all that", _peak(), "MiB")
        elements = sum(self.agent.counts.values())
        self.note("elements in the kernel", elements, "")


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run here."""
    gc.set_threshold(50_000, 50, 100)  # as agent/main.py has it
    services, runs = map(int, sys.argv[1:])
    scale = Scale(services, runs)
    asyncio.run(scale.run())
    print(json.dumps(scale.found))


if __name__ == "__main__":
    main()
