"""`lbctl drill`: faults on a timeline, under real traffic, with a verdict.

Exit code 0 when everything held, 1 when something did not, 2 when a drill could not be run, or its
report not be written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lbctl.cli import output
from lbctl.cli.drills import Drills, Reports
from lbctl.errors import DrillError, LbctlError
from lbctl.lab import preflight
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.drill import spec
from lbctl.lab.drill.spec import Drill

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Drill failures in a lab, under traffic; each drill ends with a verdict."""


@app.command(name="list")
def list_drills(
    out: Annotated[output.Output, typer.Option("--output", "-o")] = output.Output.TEXT,
) -> None:
    """The drills that there are, and what each guards."""
    found = _found(spec.names())
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
    drills = _found(wanted)

    def ask() -> bool:
        written = _checked(reports)
        return Drills(output.console(), kind, lab, written).run(drills, sabotage)

    answer(ask)


@app.command()
def chaos(
    seed: Annotated[int, typer.Option(help="The same seed makes the same faults.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="How long, about.")] = 10.0,
    faults: Annotated[int | None, typer.Option(min=1, help="At most so many faults.")] = None,
    cluster: Annotated[str, typer.Option(help="embedded or kubernetes")] = "embedded",
    lab: Annotated[str, typer.Option(help="A lab that is up; else one is started.")] = "",
    reports: Annotated[Path | None, typer.Option("--report", help="Folder for reports.")] = None,
) -> None:
    """Put in faults at random, heal them, and look at what must hold.

    Exit code 1 if it does not, 2 if it could not be run. A lab that was given is left as it is
    after a round that does not hold.
    """
    kind = _kind(cluster)

    def ask() -> bool:
        written = _checked(reports)
        return Drills(output.console(), kind, lab, written).chaos(seed, minutes, faults)

    answer(ask)


def answer(ask: Callable[[], bool]) -> None:
    """The exit code of what is asked: whether everything held, LbctlError if it cannot be said.

    SIGTERM ends it as ctrl-C does, so that labs are taken down or healed.
    """
    with _ended_by_sigterm():
        try:
            held = ask()
        except LbctlError as error:
            _refuse(error)
    if not held:
        raise typer.Exit(output.WRONG)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM act as ctrl-C, in this process alone.

    pyroute2 forks for each network namespace, and ends its children by SIGTERM: in one of these an
    exception would unwind all that runs here, and take the lab down behind our back.
    """
    own = os.getpid()

    def end(number: int, _frame: object) -> NoReturn:
        if os.getpid() != own:
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checked(folder: Path | None) -> Reports | None:
    """Look at all that is needed, before the first lab."""
    reports = Reports(folder) if folder is not None else None
    if reports is not None:
        reports.check()
    preflight.check()
    return reports


def _found(names: Sequence[str]) -> list[Drill]:
    """The drills of these names; ends with every one that is not as it must be."""
    found, wrong = list[Drill](), list[str]()
    for name in names:
        try:
            found.append(spec.find(name))
        except DrillError as error:
            wrong.append(str(error))
    if wrong:
        _refuse("\n".join(wrong))
    return found


def _refuse(reason: object) -> NoReturn:
    """Like `output.cannot`, a line for each problem."""
    for line in str(reason).splitlines() or [type(reason).__name__]:
        sys.stderr.write(f"lbctl: {output.clean(line)}\n")
    raise typer.Exit(output.CANNOT)


def _kind(cluster: str) -> ClusterKind:
    if cluster not in ("embedded", "kubernetes"):
        raise typer.BadParameter("embedded or kubernetes", param_hint="--cluster")
    return "embedded" if cluster == "embedded" else "kubernetes"
