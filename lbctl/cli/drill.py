"""`lbctl drill`: faults on a timeline, under real traffic, with a verdict.

Exit code 0 when everything held, 1 when something did not, 2 when a drill could not be run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lbctl.cli import output
from lbctl.errors import DrillError, LabError
from lbctl.lab import preflight
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.drill import report, spec, verdict
from lbctl.lab.drill.chaos import plan
from lbctl.lab.drill.chaosrun import rack_of
from lbctl.lab.drill.chaosrun import run as run_chaos
from lbctl.lab.drill.opening import opened
from lbctl.lab.drill.run import Now, Show, run
from lbctl.lab.drill.site import Site
from lbctl.lab.drill.spec import Drill

_LAB: Final = "drill"

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Drill failures in a lab, under traffic; each drill ends with a verdict."""


@app.command(name="list")
def list_drills(
    out: Annotated[output.Output, typer.Option("--output", "-o")] = output.Output.TEXT,
) -> None:
    """The drills that there are, and what each guards."""
    found = [spec.find(name) for name in spec.names()]
    if out is output.Output.JSON:
        output.print_json([{"name": d.name, "about": d.about} for d in found])
        return
    rows = [(drill.name, drill.about) for drill in found]
    output.print_table(output.console(), "drills", ("NAME", "WHAT HAPPENS"), rows)


@app.command(name="run")
def run_drills(
    names: Annotated[list[str] | None, typer.Argument(help="Drills, or files.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All drills.")] = False,
    cluster: Annotated[str, typer.Option(help="embedded or kubernetes")] = "embedded",
    lab: Annotated[str, typer.Option(help="A lab that is up; else one is started.")] = "",
    sabotage: Annotated[
        bool, typer.Option(help="Take out what the drill guards: it must then fail.")
    ] = False,
    reports: Annotated[Path | None, typer.Option("--report", help="Folder for reports.")] = None,
) -> None:
    """Run drills, one after the other.

    Exit code 1 if an expectation did not hold, 2 if a drill could not be run, or if a sabotage was
    not seen in what it should have broken.
    """
    wanted = spec.names() if every else names or []
    if not wanted:
        raise typer.BadParameter("name a drill, or say --all; `lbctl drill list` shows them")
    kind = _kind(cluster)
    preflight.check()
    drills = [spec.find(name) for name in wanted]
    drills.sort(key=lambda drill: drill.topology)  # stable: one lab for neighbours
    try:
        held = Drills(Console(highlight=False), kind, lab, reports).run(drills, sabotage)
    except LabError as error:
        output.cannot(error)
    if not held:
        raise typer.Exit(output.WRONG)


@app.command()
def chaos(
    seed: Annotated[int, typer.Option(help="The same seed makes the same faults.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="How long, about.")] = 10.0,
    faults: Annotated[int | None, typer.Option(min=1, help="At most so many faults.")] = None,
    cluster: Annotated[str, typer.Option(help="embedded or kubernetes")] = "embedded",
    lab: Annotated[str, typer.Option(help="A lab that is up; else one is started.")] = "",
    reports: Annotated[Path | None, typer.Option("--report", help="Folder for reports.")] = None,
) -> None:
    """Put in faults at random, heal them, and look at what must hold. Exit code 1 if it does not.

    A lab that was given is left as it is after a round that does not hold.
    """
    preflight.check()
    drills = Drills(Console(highlight=False), _kind(cluster), lab, reports)
    if not drills.chaos(seed, minutes, faults):
        raise typer.Exit(output.WRONG)


def _kind(cluster: str) -> ClusterKind:
    if cluster not in ("embedded", "kubernetes"):
        raise typer.BadParameter("embedded or kubernetes", param_hint="--cluster")
    return "embedded" if cluster == "embedded" else "kubernetes"


class Drills:
    """Runs drills on one lab after the other, and prints what happens."""

    def __init__(self, console: Console, kind: ClusterKind, lab: str, reports: Path | None) -> None:
        self.console = console
        self.kind = kind
        self.given = lab
        self.reports = reports

    def run(self, drills: list[Drill], sabotaged: bool) -> bool:
        """All of them; whether everything held. A lab that does not heal is made anew.

        Raises LabError after the last one if any could not be run.
        """
        left, failed, undone = list(drills), list[str](), list[str]()
        while left:
            with self._site(left[0].topology) as site:
                healed = True
                while healed and left and left[0].topology == site.lab.topology.name:
                    drill = left.pop(0)
                    try:
                        if not self._one(site, drill, sabotaged):
                            failed.append(drill.name)
                    except LabError as error:
                        undone.append(drill.name)
                        self.console.print(f"  [red]✗[/red] {output.clean(error)}")
                    finally:
                        healed = self._restored(site)
        if len(drills) > 1:
            held = len(drills) - len(failed) - len(undone)
            missed = f"; did not hold: {', '.join(failed)}" if failed else ""
            self.console.print(f"\n{held} of {len(drills)} held{missed}")
        if undone:
            raise LabError(f"no verdict on {', '.join(undone)}")
        return not failed

    @contextmanager
    def _site(self, topology: str) -> Iterator[Site]:
        if not self.given:
            self.console.print(f"starting a lab ({topology}, {self.kind} cluster) …")
        with opened(topology, self.kind, _LAB, self.given) as site:
            yield site

    def _restored(self, site: Site) -> bool:
        try:
            site.restore()
        except LabError as error:
            self.console.print(f"  this lab is not used again: {output.clean(error)}")
            return False
        return True

    def _one(self, site: Site, drill: Drill, sabotaged: bool) -> bool:
        name = f"{drill.name} (sabotaged)" if sabotaged else drill.name
        self.console.print(f"\n[bold]{name}[/bold]  {drill.about}")
        if sabotaged:
            self.console.print(f"  sabotage: {drill.sabotage}")
        with self._live() as show:
            seen = run(site, drill, sabotaged, show)
        checks = verdict.judge(drill, seen)
        title = report.Title(drill.name, drill.about, drill.sabotage if sabotaged else "")
        held = self._told(title, seen, checks)
        if sabotaged and (kept := verdict.unharmed(drill, seen)):
            raise DrillError(f"{drill.name}: the sabotage was not seen in {', '.join(kept)}")
        return held

    def chaos(self, seed: int, minutes: float, faults: int | None) -> bool:
        """Faults at random; whether everything held."""
        with self._site("small") as site:
            rounds = plan(seed, rack_of(site), minutes, faults)
            count = sum(len(one.steps) for one in rounds)
            self.console.print(f"seed {seed}: {count} faults in {len(rounds)} rounds")
            for one in rounds:
                self.console.print(f"  {one}", soft_wrap=True)
            self.console.print("\n[bold]running[/bold]")
            told = partial(self.console.print, soft_wrap=True)
            with self._live() as show:
                seen, checks = run_chaos(site, rounds, show, told)
            about = f"Seed {seed}: {count} faults in {len(rounds)} rounds, about {minutes:g} min."
            held = self._told(report.Title(f"chaos-{seed}", about), seen, checks)
            if self.given and held:
                site.restore()
        return held

    def _told(
        self, title: report.Title, seen: verdict.Evidence, checks: tuple[verdict.Check, ...]
    ) -> bool:
        """Print the verdict and write the reports; whether everything held."""
        for check in checks:
            mark = "[green]✓[/green]" if check.held else "[red]✗[/red]"
            self.console.print(f"  {mark} {check.name}: {check.found} (wanted {check.wanted})")
        held = all(check.held for check in checks)
        if self.reports is not None:
            self.reports.mkdir(parents=True, exist_ok=True)
            stem = self.reports / (f"{title.name}-sabotaged" if title.sabotage else title.name)
            data: dict[str, Any] = {
                "drill": title.name,
                "sabotaged": bool(title.sabotage),
                "held": held,
                "checks": [asdict(check) for check in checks],
                "evidence": {**asdict(seen), "dead": sorted(seen.dead), "gone": sorted(seen.gone)},
            }
            output.write_json(stem.with_suffix(".json"), data)
            stem.with_suffix(".html").write_text(report.html(title, seen, checks), "utf-8")
            self.console.print(f"  report: {stem}.html, {stem}.json")
        return held

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
                self.console.print(f"  {now.at_s:7.2f}  {now.text}", soft_wrap=True)

        yield line


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
        f"  {now.at_s:7.2f} s  {now.text}",
        f"             {rate:.0f} new connections/s, {counts.failed} of {counts.requests} failed; "
        f"{counts.answered} answers on flows, {counts.broken} broken",
    ]
    lines += [
        f"             {switch}: {service} → {', '.join(hops) or 'no route'}"
        for service, switch, hops in now.hops
    ]
    return Text("\n".join(lines))
