"""`lbctl drill` and the drills' bench, with labs and runs that are made up: which are run, healed,
written down and printed, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from lbctl.cli import drill as command
from lbctl.cli.drills import Drills, Reports
from lbctl.errors import KubeError, LabError, LbctlError
from lbctl.lab.api import Api
from lbctl.lab.drill import report, spec
from lbctl.lab.drill.chaos import Round
from lbctl.lab.drill.run import Now, Show
from lbctl.lab.drill.site import Site
from lbctl.lab.drill.spec import Drill
from lbctl.lab.drill.verdict import Check, Evidence, FlowSeen
from lbctl.lab.lab import Lab
from lbctl.lab.topology import load
from tests.bench.drills import each

TEXT = """\
about: "a node dies: see [/etc/frr] and [bold]this[/bold] :warning:"
services:
  - {name: web}
traffic:
  - {service: web, flows: 10}
timeline:
  - {do: heal}
expect:
  broken: 0
sabotage:
  about: nobody notices
  fails: [broken]
  timeline:
    - {do: heal}
"""
SMALL = spec.parse(TEXT, "small-1", "small-1.yml")
OTHER = replace(SMALL, name="small-2")
HOSTS = replace(SMALL, name="hosts-1", topology="hosts")
FLOW = FlowSeen("web", "TCP", "web-1", "node-1", "node-1", "", 0.0, 0.1, 2.0)
CALM = Evidence((FLOW,), (), (), (), {}, frozenset(), {"web": "198.51.100.0"}, -2.0, 12.0)
BROKEN = replace(CALM, flows=(replace(FLOW, broken="reset", broken_at_s=3.0),))
TOPOLOGIES = Path(__file__).parents[2] / "bgp-lab"


class NoApi(Api):
    """Nothing here asks it."""

    def __init__(self) -> None: ...


class FakeSite(Site):
    """A site in which nothing runs. restores: what each restore raises, None for a good one."""

    restores: list[BaseException | None]
    restored: list[str]

    def restore(self) -> None:
        self.restored.append(self.lab.name)
        if self.restores and (error := self.restores.pop(0)):
            raise error


@dataclass
class World:
    """Labs and runs. has: what a given lab is. faults: by drill, what its run raises or sees.

    unbuilt: topologies whose labs do not start. opened: of which topology, in order.
    """

    has: str = "small"
    restores: list[BaseException | None] = field(default_factory=list)
    results: dict[str, BaseException | Evidence] = field(default_factory=dict)
    unbuilt: dict[str, LbctlError] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    closed: int = 0
    ran: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    config: str = ""
    out: io.StringIO = field(default_factory=io.StringIO)

    @contextmanager
    def opener(self, topology: str, _kind: str, own: str, given: str) -> Iterator[Site]:
        assert len(self.opened) < 10, "opened again and again"
        if error := self.unbuilt.get(topology):
            raise error
        what = self.has if given else topology
        self.opened.append(what)
        file = TOPOLOGIES / f"{what}.clab.yml"
        site = FakeSite(Lab(given or own, load(file), file), NoApi())
        site.restores, site.restored = self.restores, self.restored
        try:
            yield site
        finally:
            self.closed += 1
            self.config = site.config

    def runner(self, _site: Site, drill: Drill, _sabotaged: bool, show: Show) -> Evidence:
        self.ran.append(drill.name)
        show(Now(0.0, "a [/step]"))
        found = self.results.get(drill.name, CALM)
        if isinstance(found, BaseException):
            raise found
        return found

    def drills(self, given: str = "", reports: Path | None = None, **more: Any) -> Drills:
        console = Console(file=self.out, width=400)
        written = Reports(reports) if reports else None
        fakes = {"opener": self.opener, "runner": self.runner, **more}
        return Drills(console, "embedded", given, written, **fakes)

    @property
    def said(self) -> str:
        return self.out.getvalue()


def code_of(ask: Callable[[], bool]) -> int:
    """The exit code of `lbctl drill` for it."""
    try:
        command.answer(ask)
    except typer.Exit as ended:
        return int(ended.exit_code)
    return 0


def lbctl_drill(*words: str) -> Any:
    return CliRunner().invoke(command.app, words)


def test_labs_of_its_own_are_one_for_each_topology() -> None:
    world = World(results={"small-2": BROKEN})
    assert not world.drills().run([SMALL, HOSTS, OTHER], sabotaged=False)
    assert world.opened == ["hosts", "small"] and world.closed == 2
    assert world.ran == ["hosts-1", "small-1", "small-2"]
    assert "2 of 3 held; did not hold: small-2" in world.said


def test_a_given_lab_takes_the_drills_of_its_topology_alone() -> None:
    world = World()
    assert code_of(lambda: world.drills("mine").run([HOSTS, SMALL, OTHER], False)) == 2
    assert world.opened == ["small"] and world.ran == ["small-1", "small-2"]
    assert "✗ lab 'mine' is small, drill hosts-1 wants hosts\n" in world.said
    assert "2 of 3 held" in world.said
    assert world.restored == ["mine", "mine"]


@pytest.mark.parametrize("given", ["", "mine"])
@pytest.mark.parametrize("error", [KubeError("refused"), LabError("no process"), OSError("gone")])
def test_a_drill_that_cannot_be_done_keeps_no_other_from_being_run(
    given: str, error: LbctlError, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(results={"small-1": error})
    assert code_of(lambda: world.drills(given).run([SMALL, OTHER], False)) == 2
    assert world.ran == ["small-1", "small-2"] and world.opened == ["small"]
    assert f"✗ {error}" in world.said and "1 of 2 held" in world.said
    assert capsys.readouterr().err == "lbctl: no verdict on small-1\n"


@pytest.mark.parametrize("error", [KubeError("gone"), LabError("node-4 stays"), OSError("x")])
def test_after_a_lab_that_does_not_heal_comes_a_new_one(error: LbctlError) -> None:
    world = World(restores=[error])
    assert world.drills().run([SMALL, OTHER], sabotaged=False)
    assert world.opened == ["small", "small"] and world.ran == ["small-1", "small-2"]
    assert f"this lab is not used again: {error}" in world.said


def test_a_given_lab_that_does_not_heal_is_not_opened_again() -> None:
    world = World(restores=[LabError("node-4 cannot be taken away again")])
    assert code_of(lambda: world.drills("mine").run([SMALL, OTHER, HOSTS], False)) == 2
    assert world.opened == ["small"] and world.ran == ["small-1"]
    assert "✗ lab 'mine' is not healed: not run are small-2\n" in world.said
    assert "1 of 3 held" in world.said
    alone = World(restores=[LabError("node-4 cannot be taken away again")])
    assert code_of(lambda: alone.drills("mine").run([SMALL], False)) == 0


def test_a_lab_that_does_not_start_keeps_no_other_from_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(unbuilt={"hosts": LabError("no cable")})
    assert code_of(lambda: world.drills().run([HOSTS, SMALL], False)) == 2
    assert world.ran == ["small-1"]
    assert "✗ no cable\n" in world.said and "1 of 2 held" in world.said
    assert capsys.readouterr().err == "lbctl: no verdict on hosts-1\n"


def test_what_no_lab_can_be_had_for_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(unbuilt={"small": LabError("drills are being run in it")})
    assert code_of(lambda: world.drills("mine").run([SMALL, OTHER], False)) == 2
    assert code_of(lambda: world.drills("mine").chaos(1, 1.0, 1)) == 2
    assert capsys.readouterr().err == "lbctl: drills are being run in it\n" * 2


def test_a_sabotage_that_is_not_seen_is_no_verdict() -> None:
    assert code_of(lambda: World().drills().run([SMALL], True)) == 2
    seen = World(results={"small-1": BROKEN})
    assert code_of(lambda: seen.drills().run([SMALL], True)) == 1
    assert "small-1 (sabotaged)  a node dies" in seen.said and "nobody notices" in seen.said


@pytest.mark.parametrize("given", ["", "mine"])
def test_an_interrupt_heals_a_lab_that_was_given(given: str) -> None:
    world = World(results={"small-1": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        world.drills(given).run([SMALL, OTHER], False)
    assert world.ran == ["small-1"] and world.closed == 1
    assert world.restored == (["mine"] if given else [])


def test_an_interrupt_while_a_given_lab_is_healed_begins_that_anew() -> None:
    world = World(restores=[KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        world.drills("mine").run([SMALL, OTHER], False)
    assert world.ran == ["small-1"] and world.restored == ["mine", "mine"]


def test_what_people_wrote_is_printed_as_it_is() -> None:
    world = World(results={"small-1": BROKEN})
    assert not world.drills().run([replace(SMALL, sabotage="wiped\x1b[2J [/]\nall")], True)
    about = "a node dies: see [/etc/frr] and [bold]this[/bold] :warning:"
    assert f"small-1 (sabotaged)  {about}\n  sabotage: wiped [2J [/] all\n" in world.said
    assert "a [/step]\n" in world.said and "\x1b" not in world.said
    live = World()
    console = Console(file=live.out, force_terminal=True, color_system="standard", width=400)
    assert replace(live.drills(), console=console).run([SMALL], False)
    assert "[/etc/frr]" in live.said and "\x1b[32m✓\x1b[0m" in live.said


def test_reports_keep_the_whole_name(tmp_path: Path) -> None:
    dotted, twin = replace(SMALL, name="node.v2"), replace(SMALL, name="node.v3")
    assert World().drills(reports=tmp_path).run([dotted, twin], False)
    assert not World(results={"node.v2": BROKEN}).drills(reports=tmp_path).run([dotted], True)
    stems = ("node.v2", "node.v2-sabotaged", "node.v3")
    names = sorted(f"{stem}.{end}" for stem in stems for end in ("html", "json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    held = [json.loads((tmp_path / f"{stem}.json").read_text())["held"] for stem in stems]
    assert held == [True, False, True]
    assert "<svg" in (tmp_path / "node.v2.html").read_text()


def test_a_report_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is where the page should go: it is in the way after all has been written."""
    (tmp_path / "small-1.html" / "in-the-way").mkdir(parents=True)
    world = World()
    assert code_of(lambda: world.drills(reports=tmp_path).run([SMALL, OTHER], False)) == 2
    assert world.ran == ["small-1", "small-2"] and "2 of 2 held" in world.said
    said = capsys.readouterr().err
    assert said.startswith("lbctl: no report of small-1: ") and said.count("\n") == 1
    names = {"small-1.html", "small-1.json", "small-2.html", "small-2.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_half_a_report_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    title = report.Title("small-1", "a node dies")
    Reports(tmp_path).write(title, CALM, ())
    before = (tmp_path / "small-1.json").read_text()
    with pytest.raises(LabError, match="no report of small-1"):  # it has begun when it fails
        Reports(tmp_path).write(title, CALM, (Check("\udc80", "", "", True),))
    assert (tmp_path / "small-1.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("words", [("run", "node-dies"), ("chaos", "--seed", "1")])
@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/in", "/proc"])
def test_a_folder_that_takes_no_file_is_refused_first(words: Sequence[str], folder: str) -> None:
    done = lbctl_drill(*words, "--report", folder)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert done.stderr.startswith(f"lbctl: reports cannot be written into {folder}: ")
    assert done.stderr.count("\n") == 1


def test_every_bad_drill_is_named_before_anything_starts(tmp_path: Path) -> None:
    file, reports = tmp_path / "mine.yml", tmp_path / "reports"
    file.write_text(TEXT.replace("broken: 0", "brokken: 0"))
    names = ("no-such", "node-dies", str(file), "nor-such")
    done = lbctl_drill("run", *names, "--report", str(reports))
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert "lbctl: no drill 'no-such'" in done.stderr and "'nor-such'" in done.stderr
    assert f"lbctl: {file}:9:3: expect.brokken: unknown key\n" in done.stderr
    assert not reports.exists()


@dataclass
class Storm:
    """Made-up chaos. held: of its only check. error: what it raises."""

    held: bool = True
    error: BaseException | None = None

    def __call__(
        self, site: Site, rounds: tuple[Round, ...], show: Show, told: Callable[[str], None]
    ) -> tuple[Evidence, tuple[Check, ...]]:
        site.config = "of chaos"
        show(Now(0.0, "looking"))
        told(f"{len(rounds)} [/rounds]")
        if self.error is not None:
            raise self.error
        return CALM, (Check("all", "", "", self.held),)


@pytest.mark.parametrize(
    ("storm", "code", "restores"),
    [
        (Storm(), 0, 1),
        (Storm(held=False), 1, 0),
        (Storm(error=LabError("did not heal")), 2, 1),
        (Storm(error=KubeError("refused")), 2, 1),
    ],
)
def test_chaos_leaves_a_given_lab_only_after_a_round_that_did_not_hold(
    storm: Storm, code: int, restores: int, tmp_path: Path
) -> None:
    world = World()
    drills = world.drills("mine", tmp_path, storm=storm)
    assert code_of(lambda: drills.chaos(7, 1.0, 3)) == code
    assert world.restored == ["mine"] * restores
    assert world.config != "of chaos" and "[/rounds]" in world.said
    assert len(list(tmp_path.iterdir())) == (2 if code < 2 else 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a mistake of ours")])
@pytest.mark.parametrize("given", ["", "mine"])
def test_whatever_ends_chaos_a_given_lab_is_healed(given: str, error: BaseException) -> None:
    world = World()
    with pytest.raises(type(error)):
        world.drills(given, storm=Storm(error=error)).chaos(7, 1.0, 3)
    assert world.restored == (["mine"] if given else []) and world.closed == 1


def test_a_given_lab_that_does_not_heal_after_chaos_is_said() -> None:
    world = World(restores=[KubeError("refused")])
    assert code_of(lambda: world.drills("mine", storm=Storm()).chaos(7, 1.0, 3)) == 2
    assert "this lab is not used again: refused" in world.said


def test_sigterm_is_as_ctrl_c_and_both_end_with_130() -> None:
    app = typer.Typer()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ended: list[str] = []

    def ask() -> bool:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)  # the handler runs before this is over
        finally:
            ended.append("taken down")
        return True

    app.command()(lambda: command.answer(ask))
    try:
        assert CliRunner().invoke(app).exit_code == 130
        assert ended == ["taken down"] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_that_is_ended_does_not_unwind_what_its_parent_does(number: int) -> None:
    """As pyroute2's, which shares the handlers until it has set its own."""
    unwound, pid = 7, 0

    def ask() -> bool:
        nonlocal pid
        pid = os.fork()
        if pid == 0:
            try:
                os.kill(os.getpid(), number)
                signal.sigtimedwait([], 10)
            finally:
                os._exit(unwound)
        return True

    command.answer(ask)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number


def test_the_bench_makes_labs_anew_and_leaves_out_what_a_given_one_is_not() -> None:
    drills = [SMALL, HOSTS, SMALL]
    world = World(restores=[None, LabError("no")])
    own = list(each(drills, "", world.opener, world.runner))
    assert [(one.drill, one.error) for one in own] == [
        ("hosts-1", ""),
        ("small-1", "not healed: no"),
        ("small-1", ""),
    ]
    assert world.opened == ["hosts", "small", "small"]
    world = World(restores=[LabError("no")])
    given = list(each(drills, "mine", world.opener, world.runner))
    assert [one.error for one in given] == [
        "lab 'mine' is small, drill hosts-1 wants hosts",
        "not healed: no",
        "lab 'mine' is not healed",
    ]
    assert world.opened == ["small"] and [bool(one.checks) for one in given] == [False, True, False]


def test_an_interrupted_bench_heals_a_lab_that_was_given() -> None:
    world = World(results={"small-1": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        list(each([SMALL], "mine", world.opener, world.runner))
    assert world.restored == ["mine"]
