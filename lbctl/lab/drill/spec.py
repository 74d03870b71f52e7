"""A drill as its YAML file says it: Services, traffic, faults on a timeline, what must hold.

Rules: everything is checked when the file is read, the names and arguments of faults too, and every
problem is said with file, line and column; a drill that starts cannot fail for how it was written.
Times of the timeline count from the moment at which traffic has run for `before`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lbctl.core.config_values import parse_duration
from lbctl.core.positions import Document, Loc, Problem, load
from lbctl.errors import DrillError, LabError
from lbctl.lab.drill import faults, mentions
from lbctl.lab.drill.faults import Step

DRILLS: Final = Path(__file__).parents[3] / "bgp-lab" / "drills"

# Where a file has steps.
_PREPARE: Final[Loc] = ("prepare",)
_TIMELINE: Final[Loc] = ("timeline",)
_FIRST: Final[Loc] = ("sabotage", "prepare")
_MEANWHILE: Final[Loc] = ("sabotage", "timeline")

Seconds = Annotated[float, BeforeValidator(parse_duration)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(gt=0)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DrillService(_Model):
    """A Deployment with its Service, on TCP 80 and UDP 80."""

    name: str = Field(pattern=r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$")
    replicas: int = Field(4, ge=1, le=100)
    policy: Literal["Cluster", "Local"] = "Cluster"


class Traffic(_Model):
    """What the client drives at one Service.

    flows: long-lived TCP connections with numbered data. requests: new connections per second.
    datagrams: UDP flows. timeout: for one new connection with its answer. downloads: at a time,
    each on a new connection. core: the processor that all of this is pinned to.
    """

    service: str
    flows: int = Field(default=0, ge=0, le=1000)
    requests: int = Field(default=0, ge=0, le=1000)
    datagrams: int = Field(default=0, ge=0, le=1000)
    timeout: Seconds = 1.0
    downloads: int = Field(default=0, ge=0, le=100)
    core: int | None = Field(default=None, ge=0)


class Carried(_Model):
    """What downloads must reach: Mbit/s in all, from 3 s after step number `after` of the timeline.

    Steps count from 1; it ends with the next step.
    """

    after: int = Field(ge=1)
    mbit: float = Field(gt=0)


class Expect(_Model):
    """What must hold; what is not named is only reported.

    broken: at most so many flows to living pods broken. failed: at most so many new connections
    failed. outage: none failed that began later than that after the last fault before its end.
    gap: the longest silence of a living flow. next_hops: at the end, on every living switch.
    entered: (machine, share of the flows that entered there). steered: share of the flows whose pod
    was on another node than the one they entered at. throughput: of the downloads. latency: for a
    service, how many times slower nine of ten new connections may be after the last fault than
    before the first. flooded: share of each flood that was really sent. leader: the same manager
    leads at the end. changes: at most so many changes of any switch's next hops after the first
    fault.
    """

    broken: int | None = Field(None, ge=0)
    datagrams_broken: int | None = Field(None, alias="datagramsBroken", ge=0)
    failed: int | None = Field(None, ge=0)
    outage: Seconds | None = None
    gap: Seconds | None = None
    next_hops: tuple[str, ...] | None = Field(None, alias="nextHops")
    entered: dict[str, Share] | None = None
    steered: Share | None = None
    throughput: tuple[Carried, ...] | None = None
    latency: dict[str, Factor] | None = None
    flooded: Share | None = None
    leader: Literal["kept"] | None = None
    changes: int | None = Field(None, ge=0)


class Sabotage(_Model):
    """What takes out the thing that the drill guards: with it, the drill must fail.

    fails: the expectations, by their keys, that must not hold then. prepare: before the
    drill's own.
    """

    about: str
    fails: tuple[str, ...] = Field(min_length=1)
    prepare: tuple[dict[str, Any], ...] = ()
    timeline: tuple[dict[str, Any], ...] = ()


class _File(_Model):
    about: str
    topology: str = "small"
    services: tuple[DrillService, ...] = Field(min_length=1)
    traffic: tuple[Traffic, ...] = Field(min_length=1)
    prepare: tuple[dict[str, Any], ...] = ()
    before: Seconds = 2.0
    after: Seconds = 10.0
    timeline: tuple[dict[str, Any], ...] = Field(min_length=1)
    expect: Expect
    sabotage: Sabotage


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill, checked. `after_s`: traffic goes on so long after the last step.

    prepare: what is done before there are Services and traffic.
    """

    name: str
    about: str
    topology: str
    services: tuple[DrillService, ...]
    traffic: tuple[Traffic, ...]
    prepare: tuple[Step, ...]
    before_s: float
    after_s: float
    timeline: tuple[Step, ...]
    expect: Expect
    sabotage: str
    sabotage_fails: tuple[str, ...]
    sabotage_prepare: tuple[Step, ...]
    sabotage_timeline: tuple[Step, ...]

    def preparations(self, sabotaged: bool) -> tuple[Step, ...]:
        """What is done before there is traffic, sabotage first."""
        return (*(self.sabotage_prepare if sabotaged else ()), *self.prepare)

    def steps(self, sabotaged: bool) -> tuple[Step, ...]:
        """The timeline in order; sabotage comes before what happens at the same time."""
        more = self.sabotage_timeline if sabotaged else ()
        return tuple(sorted((*more, *self.timeline), key=lambda step: step.at_s))


def names() -> list[str]:
    """The drills in `bgp-lab/drills`, sorted."""
    return sorted(path.stem for path in DRILLS.glob("*.yml"))


def find(name: str) -> Drill:
    """A drill by its name, or a file by its path. Raises DrillError."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else DRILLS / f"{name}.yml"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(names())
        raise DrillError(f"no drill {name!r} ({error}); there are: {known}") from error
    return parse(text, path.stem, str(path))


def parse(text: str, name: str, source: str) -> Drill:
    """Read a drill. Raises DrillError with every problem, each `SOURCE:LINE:COLUMN: …`."""
    document = load(text)
    problems = list(document.problems)
    file: _File | None = None
    if document.complete:
        try:
            file = _File.model_validate(document.value)
        except ValidationError as error:
            problems += [_problem(document, item) for item in error.errors()]
    if file is None:
        raise _refused(problems, source)
    given = {
        _PREPARE: file.prepare,
        _TIMELINE: file.timeline,
        _FIRST: file.sabotage.prepare,
        _MEANWHILE: file.sabotage.timeline,
    }
    steps = {at: _steps(document, at, entries, problems) for at, entries in given.items()}
    problems += _unexpected(document, file)
    problems += problems or _unknown(document, file, steps)
    if problems:
        raise _refused(problems, source)
    return Drill(
        name=name,
        about=file.about,
        topology=file.topology,
        services=file.services,
        traffic=file.traffic,
        prepare=steps[_PREPARE],
        before_s=file.before,
        after_s=file.after,
        timeline=steps[_TIMELINE],
        expect=file.expect,
        sabotage=file.sabotage.about,
        sabotage_fails=file.sabotage.fails,
        sabotage_prepare=steps[_FIRST],
        sabotage_timeline=steps[_MEANWHILE],
    )


def _refused(problems: list[Problem], source: str) -> DrillError:
    ordered = sorted(problems, key=lambda problem: (problem.mark, str(problem)))
    return DrillError("\n".join(f"{source}:{problem}" for problem in ordered))


def _problem(document: Document, error: Any) -> Problem:
    loc: Loc = tuple(error["loc"])
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return Problem(document.key_mark(loc), loc, "unknown key")
    return Problem(document.mark(loc), loc, said[:1].lower() + said[1:])


def _unknown(
    document: Document, file: _File, steps: Mapping[Loc, tuple[Step, ...]]
) -> list[Problem]:
    """What is mentioned and is not there."""
    try:
        rack = mentions.rack(file.topology)
    except LabError as error:
        return [Problem(document.mark(("topology",)), ("topology",), str(error))]
    known = mentions.Known(
        mentions.machines(rack, (step for some in steps.values() for step in some)),
        frozenset(service.name for service in file.services),
        len(file.timeline),
    )
    expect = file.expect.model_dump(by_alias=True, exclude_none=True)
    said = [*known.twice(file.services), *known.traffic(file.traffic), *known.expected(expect)]
    for at, some in steps.items():
        said += known.steps(at, some)
    return [Problem(document.mark(loc), loc, text) for loc, text in said]


def _unexpected(document: Document, file: _File) -> list[Problem]:
    known = file.expect.model_dump(by_alias=True, exclude_none=True)
    return [
        Problem(document.mark(loc), loc, f"this drill does not expect {key!r}")
        for number, key in enumerate(file.sabotage.fails)
        for loc in [("sabotage", "fails", number)]
        if key not in known
    ]


def _steps(
    document: Document, at: Loc, given: tuple[dict[str, Any], ...], problems: list[Problem]
) -> tuple[Step, ...]:
    """The steps of a timeline; what is wrong with one goes to `problems`."""
    found = []
    for number, entry in enumerate(given):
        loc = (*at, number)
        words = dict(entry)
        try:
            at_s = parse_duration(words.pop("at", 0))
            fault = str(words.pop("do", ""))
            found.append(Step(at_s, fault, faults.checked(fault, words)))
        except (ValueError, DrillError) as error:
            problems.append(Problem(document.mark(loc), loc, str(error)))
    return tuple(found)
