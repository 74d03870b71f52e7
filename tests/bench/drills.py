"""A drill many times over in one lab: how what it finds is distributed; the worst run is the bound.

Each run is what `lbctl drill run` does, the restore after it too. A run that could not be done
counts as one, and a lab that does not heal is made anew; if it was given, the runs that are left
could not be done. Whatever ends the bench (an interrupt as well), the tables of the runs so far are
printed; `--json FILE` has every run, after each of them.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from lbctl.cli.drills import Opener, Runner, kept, misfit
from lbctl.errors import LbctlError
from lbctl.lab import preflight
from lbctl.lab.drill import spec, verdict
from lbctl.lab.drill.opening import opened
from lbctl.lab.drill.run import run
from lbctl.lab.drill.site import Site
from lbctl.lab.drill.spec import Drill
from lbctl.lab.drill.verdict import Check


@dataclass(frozen=True, slots=True)
class Run:
    """One run. load: the machine's load average of the last minute as it began.

    checks: expectations, and what is told of every drill. error: why it could not be done, or why
    the lab did not heal after it. restored_s: 0 if it did not.
    """

    drill: str
    began: str
    load: float
    took_s: float
    restored_s: float
    checks: tuple[Check, ...]
    error: str

    @property
    def held(self) -> bool:
        """It was run, and every expectation held."""
        return bool(self.checks) and all(check.held for check in self.checks)

    def __str__(self) -> str:
        said = "held" if self.held else "FAILED" if self.checks else "not run"
        values = [
            f"{c.name} {_number(c.value)} {c.unit}".rstrip()
            for c in self.checks
            if c.value and c.held
        ]
        wrong = [f"{c.name}: {c.found} (wanted {c.wanted})" for c in self.checks if not c.held]
        times = f"{self.took_s:.0f} s and {self.restored_s:.0f} s to restore"
        more = "; ".join((*wrong, *values, *([self.error] if self.error else ())))
        return f"{self.drill}: {said}; load {self.load:.1f}; {times}; {more}"


def measure(names: Sequence[str], runs: int, given: str, record: Path | None) -> Iterator[str]:
    """Run them; the lines to print. given: a lab that is up, "" for one of its own."""
    done: list[Run] = []
    try:
        drills = [spec.find(name) for name in names for _ in range(runs)]
        preflight.check()
        for one in each(drills, given):
            done.append(one)
            print(f"  {len(done)}/{len(names) * runs}  {one}", file=sys.stderr, flush=True)
            if record is not None:
                record.write_text(json.dumps([asdict(run) for run in done]) + "\n", "utf-8")
    except (KeyboardInterrupt, SystemExit):
        yield "Interrupted."
    except LbctlError as error:
        yield f"There is no lab any more: {error}"
    yield from table(done)


def each(
    drills: list[Drill], given: str, opener: Opener = opened, runner: Runner = run
) -> Iterator[Run]:
    """Every run. Raises LabError if there is no lab to begin with."""
    left = sorted(drills, key=lambda drill: drill.topology)  # stable: one lab for neighbours
    while left:
        topology = left[0].topology
        with opener(topology, "embedded", f"bench-{os.getpid()}", given) as site:
            unhealed = ""
            while left and (given or (not unhealed and left[0].topology == topology)):
                drill = left.pop(0)
                if why := unhealed or (misfit(site, drill) if given else ""):
                    yield Run(drill.name, _clock(), os.getloadavg()[0], 0.0, 0.0, (), why)
                    continue
                with kept(site, given):  # it stays up, whatever ends the bench
                    one = _run(site, drill, runner)
                yield one
                if one.error and not one.restored_s:
                    unhealed = f"lab {site.lab.name!r} is not healed"


def _clock() -> str:
    return f"{dt.datetime.now(dt.UTC):%H:%M:%S}"


def _run(site: Site, drill: Drill, runner: Runner) -> Run:
    load, began, begin_s = os.getloadavg()[0], _clock(), time.monotonic()
    checks: tuple[Check, ...] = ()
    error = ""
    try:
        seen = runner(site, drill, False, lambda _now: None)
        checks = verdict.judge(drill, seen)
        checks += tuple(c for c in _always(seen) if c.name not in {check.name for check in checks})
    except LbctlError as problem:
        error = str(problem)
    ran_s, restored_s = time.monotonic(), 0.0
    try:
        site.restore()
        restored_s = time.monotonic() - ran_s
    except LbctlError as problem:
        error = f"{error}; not healed: {problem}".removeprefix("; ")
    return Run(drill.name, began, load, ran_s - begin_s, restored_s, checks, error)


def _always(seen: verdict.Evidence) -> tuple[Check, ...]:
    """What is told of every drill, under the names that the expectations have."""
    living = seen.living("TCP")
    broken, failed = sum(1 for flow in living if flow.broken), len(seen.failed())
    outage_s, gap_s = seen.outage_s(), seen.gap_s()
    return (
        Check("connections to living pods broken", "", f"{broken}", True, broken),
        Check("new connections failed", "", f"{failed}", True, failed),
        Check("outage of new connections", "", f"{outage_s:.2f} s", True, outage_s, "s"),
        Check("longest silence", "", f"{gap_s:.2f} s", True, gap_s, "s"),
    )


def table(runs: Iterable[Run]) -> Iterator[str]:
    """Per drill its verdicts, then a Markdown row for each expectation."""
    for name, group in groupby(runs, key=lambda one: one.drill):
        of = list(group)
        held, ran = sum(one.held for one in of), sum(bool(one.checks) for one in of)
        loads = [one.load for one in of]
        yield (
            f"\n{name}: {len(of)} runs, {held} held, {ran - held} did not, {len(of) - ran} could "
            f"not be run; load {min(loads):.1f} to {max(loads):.1f}\n"
        )
        yield "| what | held | least | median | nine of ten | most |\n|---|---|---|---|---|---|"
        checks = [check for one in of for check in one.checks]
        for what in dict.fromkeys(check.name for check in checks):
            yield _row([check for check in checks if check.name == what])


def _row(checks: list[Check]) -> str:
    """One expectation over all runs; of shares and rates the least is the worst."""
    values = sorted(check.value for check in checks if check.value is not None)
    held = f"{sum(check.held for check in checks)} of {len(checks)}"
    if not checks[0].wanted:
        held = "only told"
    cells = ["–"] * 4
    if values:
        tenth = values[math.ceil(0.9 * len(values)) - 1]
        found = (values[0], statistics.median(values), tenth, values[-1])
        cells = [f"{_number(value)} {checks[0].unit}".rstrip() for value in found]
    return f"| {checks[0].name} | {held} | {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
