"""Runs drills on one lab after the other, prints what happens, and writes reports.

Rules: what goes wrong in one drill, in its lab or with its report never keeps the others from being
run. Text from drill files and labs is printed without markup and control characters. A lab that was
given is healed whatever ends the drills, an interrupt too.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lbctl.cli import output
from lbctl.errors import DrillError, LabError, LbctlError
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.drill import report, verdict
from lbctl.lab.drill.chaos import Round, plan
from lbctl.lab.drill.chaosrun import rack_of
from lbctl.lab.drill.chaosrun import run as run_chaos
from lbctl.lab.drill.opening import opened
from lbctl.lab.drill.run import Now, Show, run
from lbctl.lab.drill.site import Site
from lbctl.lab.drill.spec import Drill

_LAB: Final = "drill"

# Topology, kind, the name of a lab of its own, the name of one that is given or "".
Opener = Callable[[str, ClusterKind, str, str], AbstractContextManager[Site]]
Runner = Callable[[Site, Drill, bool, Show], verdict.Evidence]
Storm = Callable[
    [Site, tuple[Round, ...], Show, Callable[[str], None]],
    tuple[verdict.Evidence, tuple[verdict.Check, ...]],
]


@dataclass(frozen=True, slots=True)
class Reports:
    """The folder that reports are written into; what is there is whole."""

    folder: Path

    def check(self) -> None:
        """Make the folder and try a file in it. Raises LabError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:
                file.write(b"tried")
        except OSError as error:
            why = error.strerror or error
            raise LabError(f"reports cannot be written into {self.folder}: {why}") from error

    def write(
        self, title: report.Title, seen: verdict.Evidence, checks: tuple[verdict.Check, ...]
    ) -> str:
        """Write one as HTML and as JSON; the names of the files. Raises LabError."""
        stem = self.folder / (f"{title.name}-sabotaged" if title.sabotage else title.name)
        page, record = Path(f"{stem}.html"), Path(f"{stem}.json")
        data: dict[str, Any] = {
            "drill": title.name,
            "sabotaged": bool(title.sabotage),
            "held": all(check.held for check in checks),
            "checks": [asdict(check) for check in checks],
            "evidence": {**asdict(seen), "off": sorted(seen.off), "gone": sorted(seen.gone)},
        }
        try:
            with _whole(record) as file:
                output.write_json(file, data)
            with _whole(page) as file:
                file.write_text(report.html(title, seen, checks), "utf-8")
        except (OSError, UnicodeError) as error:
            raise LabError(f"no report of {title.name}: {error}") from error
        return f"{page}, {record}"


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside this one that takes its place once it is written, and else is removed."""
    beside = path.with_name(f".{path.name}.new")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def misfit(site: Site, drill: Drill) -> str:
    """Why a drill cannot be run in a lab that was given; "" if it can."""
    has = site.lab.topology.name
    if drill.topology == has:
        return ""
    return f"lab {site.lab.name!r} is {has}, drill {drill.name} wants {drill.topology}"


@contextmanager
def kept(site: Site, given: str) -> Iterator[None]:
    """Heal a lab that was given if anything unforeseen, an interrupt too, ends what is done."""
    try:
        yield
    except BaseException:
        if given:
            with suppress(LbctlError):
                site.restore()
        raise


@dataclass(slots=True)
class Drills:
    """Runs drills, or chaos, once. given: a lab that is up, "" for labs of its own.

    undone: drills without a verdict. wrong: what else went wrong, one sentence each.
    """

    console: Console
    kind: ClusterKind
    given: str = ""
    reports: Reports | None = None
    opener: Opener = opened
    runner: Runner = run
    storm: Storm = run_chaos
    failed: list[str] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def run(self, drills: list[Drill], sabotaged: bool) -> bool:
        """All of them; whether everything held. A lab of its own that does not heal is made anew.

        Raises LbctlError after the last one if any could not be run, or a report not be written.
        """
        ordered = sorted(drills, key=_topology)  # stable: one lab for neighbours
        labs = (
            [ordered] if self.given else [list(group) for _, group in groupby(ordered, _topology)]
        )
        for left in labs:
            while left:
                try:
                    self._on_one_lab(left, sabotaged)
                except LbctlError as error:
                    if len(left) == len(drills):  # nothing was run, and nothing is left to try
                        raise
                    if not left:
                        self.wrong.append(output.clean(error))
                    self._not_run(left, error)
        if len(drills) > 1:
            held = len(drills) - len(self.failed) - len(self.undone)
            missed = f"; did not hold: {', '.join(self.failed)}" if self.failed else ""
            self._say(f"\n{held} of {len(drills)} held{missed}")
        self._admit()
        return not self.failed

    def _on_one_lab(self, left: list[Drill], sabotaged: bool) -> None:
        """Take drills out of `left` and run them, until it is empty or needs another lab."""
        with self._site(left[0].topology) as site:
            if self.given:
                for drill in [drill for drill in left if misfit(site, drill)]:
                    left.remove(drill)
                    self._not_run([drill], misfit(site, drill))
            while left and self._drilled(site, left.pop(0), sabotaged):
                pass
            if left and self.given:
                rest = ", ".join(drill.name for drill in left)
                self._not_run(left, f"lab {self.given!r} is not healed: not run are {rest}")

    def _not_run(self, drills: list[Drill], why: object) -> None:
        """Note them as undone; the list is empty then."""
        self._marked(False, output.clean(why))
        self.undone += [drill.name for drill in drills]
        drills.clear()

    def _admit(self) -> None:
        """Raise LabError with all that went wrong."""
        verdicts = [f"no verdict on {', '.join(self.undone)}"] if self.undone else []
        if sentences := [*verdicts, *self.wrong]:
            raise LabError("\n".join(sentences))

    @contextmanager
    def _site(self, topology: str) -> Iterator[Site]:
        if not self.given:
            self._say(f"starting a lab ({topology}, {self.kind} cluster) …")
        with self.opener(topology, self.kind, _LAB, self.given) as site:
            yield site

    def _restored(self, site: Site) -> bool:
        try:
            site.restore()
        except (LbctlError, OSError) as error:
            self._say(f"  this lab is not used again: {output.clean(error)}")
            return False
        return True

    def _drilled(self, site: Site, drill: Drill, sabotaged: bool) -> bool:
        """Run one and heal the lab; whether another one can be run in it."""
        with kept(site, self.given):
            try:
                if not self._one(site, drill, sabotaged):
                    self.failed.append(drill.name)
            except (LbctlError, OSError) as error:
                self._not_run([drill], error)
            return self._restored(site)

    def _one(self, site: Site, drill: Drill, sabotaged: bool) -> bool:
        name = f"{drill.name} (sabotaged)" if sabotaged else drill.name
        about = f"  {output.clean(drill.about)}"
        head = Text.assemble("\n", (output.clean(name), "bold"), about)
        self.console.print(head, soft_wrap=True)
        if sabotaged:
            self._say(f"  sabotage: {output.clean(drill.sabotage)}")
        with self._live() as show:
            seen = self.runner(site, drill, sabotaged, show)
        checks = verdict.judge(drill, seen)
        title = report.Title(drill.name, drill.about, drill.sabotage if sabotaged else "")
        held = self._told(title, seen, checks)
        if sabotaged and (kept := verdict.unharmed(drill, seen)):
            raise DrillError(f"{drill.name}: the sabotage was not seen in {', '.join(kept)}")
        return held

    def chaos(self, seed: int, minutes: float, faults: int | None) -> bool:
        """Faults at random; whether everything held. Raises LbctlError if that cannot be said."""
        with self._site("small") as site, kept(site, self.given):
            rounds = plan(seed, rack_of(site), minutes, faults)
            count = sum(len(one.steps) for one in rounds)
            self._say(f"seed {seed}: {count} faults in {len(rounds)} rounds")
            for one in rounds:
                self._say(f"  {one}")
            self.console.print("\nrunning", style="bold")
            usual = site.config
            try:
                with self._live() as show:
                    seen, checks = self.storm(site, rounds, show, self._say)
            finally:
                site.config = usual  # what is healed gets it back
            about = f"Seed {seed}: {count} faults in {len(rounds)} rounds, about {minutes:g} min."
            held = self._told(report.Title(f"chaos-{seed}", about), seen, checks)
            if self.given and held and not self._restored(site):
                self.wrong.append(f"lab {self.given!r} is not healed")
        self._admit()
        return held

    def _told(
        self, title: report.Title, seen: verdict.Evidence, checks: tuple[verdict.Check, ...]
    ) -> bool:
        """Print the verdict and write the reports; whether everything held."""
        for check in checks:
            text = f"{check.name}: {check.found} (wanted {check.wanted})"
            self._marked(check.held, output.clean(text))
        if self.reports is not None:
            try:
                self._say(f"  report: {self.reports.write(title, seen, checks)}")
            except LabError as error:
                self._marked(False, output.clean(error))
                self.wrong.append(output.clean(error))
        return all(check.held for check in checks)

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _marked(self, good: bool, text: str) -> None:
        mark = ("✓", "green") if good else ("✗", "red")
        self.console.print(Text.assemble("  ", mark, f" {text}"), soft_wrap=True)

    @contextmanager
    def _live(self) -> Iterator[Show]:
        """A view that is drawn anew on a terminal, and a line per change elsewhere."""
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=8, transient=True) as live:
                rate = _Rate()
                yield lambda now: live.update(_picture(now, rate(now)))
            return
        said = ""

        def line(now: Now) -> None:
            nonlocal said
            if now.text != said:
                said = now.text
                self._say(f"  {now.at_s:7.2f}  {output.clean(now.text)}")

        yield line


def _topology(drill: Drill) -> str:
    return drill.topology


class _Rate:
    """New connections per second between two looks."""

    def __init__(self) -> None:
        self._last: tuple[float, int] = (time.monotonic(), 0)

    def __call__(self, now: Now) -> float:
        at_s, before = self._last
        this_s = time.monotonic()
        self._last = (this_s, max(now.counts.requests, before))
        return max(0.0, (now.counts.requests - before) / max(this_s - at_s, 0.001))


def _picture(now: Now, rate: float) -> Text:
    counts = now.counts
    lines = [
        f"  {now.at_s:7.2f} s  {output.clean(now.text)}",
        f"             {rate:.0f} new connections/s, {counts.failed} of {counts.requests} failed; "
        f"{counts.answered} answers on flows, {counts.broken} broken",
    ]
    lines += [
        f"             {switch}: {service} → {', '.join(hops) or 'no route'}"
        for service, switch, hops in now.hops
    ]
    return Text("\n".join(lines))
