"""Print the medians that `docs/benchmarks.md` holds, as a Markdown table.

`python -m tests.bench [--runs N] [--services N] [--eips N] [--only PART]`, PART one of pure, scale,
probes, lab, memory, beside (or a part of it: faults, speed, many), and announce and drills, which
run only when they are named. Absolute times depend on the machine, which is printed; compare rows
of one run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import announce, beside, drills, lab, probes, pure, scale

_PARTS = ("pure", "scale", "probes", "lab", "memory", "beside", *beside.PARTS, "announce", "drills")


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what, the median and the worst, the unit, and of how many runs."""

    what: str
    values: tuple[float, ...]
    unit: str

    def render(self) -> str:
        """As a Markdown table row."""
        median = statistics.median(self.values)
        return (
            f"| {self.what} | {median:.4g} {self.unit} "
            f"| {max(self.values):.4g} {self.unit} | {len(self.values)} |"
        )


def machine() -> str:
    """Processor, cores, memory, kernel and Python."""
    with Path("/proc/cpuinfo").open() as file:
        model = next((line.split(":")[1].strip() for line in file if "model name" in line), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def main(argv: Sequence[str]) -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--eips", type=int, default=10_000)
    parser.add_argument("--only", choices=_PARTS, default=None)
    parser.add_argument("--drills", default="node-dies", help="of drills: NAME,NAME,…")
    parser.add_argument("--lab", default="", help="of drills: a lab that is up")
    parser.add_argument("--json", type=Path, default=None, help="of drills: every run, here")
    chosen = parser.parse_args(argv)
    print(f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, {machine()}\n")
    if chosen.only in ("beside", *beside.PARTS):
        parts = beside.PARTS if chosen.only == "beside" else (chosen.only,)
        return _printed(beside.measure(parts))
    if chosen.only == "announce":
        return _printed(announce.measure(chosen.eips))
    if chosen.only == "drills":
        names = chosen.drills.split(",")
        return _printed(drills.measure(names, chosen.runs, chosen.lab, chosen.json))
    print("| what | median | worst | runs |\n|---|---|---|---|")
    if chosen.only in (None, "pure"):
        for what, values, unit in pure.measure(chosen.runs):
            print(Row(what, values, unit).render(), flush=True)
    if chosen.only in (None, "scale"):
        for what, values, unit in scale.measure(chosen.runs):
            print(Row(what, values, unit).render(), flush=True)
    if chosen.only in (None, "probes"):
        for what, values, unit in probes.measure(chosen.runs):
            print(Row(what, values, unit).render(), flush=True)
    if chosen.only not in ("pure", "scale", "probes"):
        for what, values, unit in lab.measure(
            chosen.runs, chosen.services, chosen.only == "memory"
        ):
            print(Row(what, values, unit).render(), flush=True)
    return 0 if chosen.only else _printed(beside.measure(beside.PARTS))


def _printed(lines: Iterable[str]) -> int:
    ours = os.getpid()  # children that pyroute2 forks, and ends by this signal, inherit the handler

    def end(*_: object) -> None:
        if os.getpid() != ours:
            os._exit(1)
        sys.exit(1)  # what was started is taken down, whatever ends us

    signal.signal(signal.SIGTERM, end)
    for line in lines:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
