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
from lbctl.errors import DrillError
from lbctl.lab.drill import faults

DRILLS: Final = Path(__file__).parents[3] / "bgp-lab" / "drills"

Seconds = Annotated[float, BeforeValidator(parse_duration)]


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
    datagrams: UDP flows. timeout: for one new connection with its answer.
    """

    service: str
    flows: int = Field(0, ge=0, le=1000)
    requests: int = Field(0, ge=0, le=1000)
    datagrams: int = Field(0, ge=0, le=1000)
    timeout: Seconds = 1.0


class Expect(_Model):
    """What must hold; what is not named is only reported.

    broken: at most so many flows to living pods broken. failed: at most so many new connections
    failed. outage: none failed that began later than that after the last fault before it. gap: the
    longest silence of a living flow. next_hops: at the end, on every living switch. entered:
    (machine, share of the flows that entered there). steered: share of the flows whose pod was on
    another node than the one they entered at.
    """

    broken: int | None = Field(None, ge=0)
    datagrams_broken: int | None = Field(None, alias="datagramsBroken", ge=0)
    failed: int | None = Field(None, ge=0)
    outage: Seconds | None = None
    gap: Seconds | None = None
    next_hops: tuple[str, ...] | None = Field(None, alias="nextHops")
    entered: dict[str, float] | None = None
    steered: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to the lab: `at_s` after the beginning of the timeline."""

    at_s: float
    fault: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        words = (f"{key} {value}" for key, value in self.arguments.items())
        return " ".join((self.fault, *words))


class Sabotage(_Model):
    """What takes out the thing that the drill guards: with it, the drill must fail.

    fails: the expectations, by their keys, that must not hold then.
    """

    about: str
    fails: tuple[str, ...] = Field(min_length=1)
    timeline: tuple[dict[str, Any], ...] = Field(min_length=1)


class _File(_Model):
    about: str
    topology: str = "small"
    services: tuple[DrillService, ...] = Field(min_length=1)
    traffic: tuple[Traffic, ...] = Field(min_length=1)
    before: Seconds = 2.0
    after: Seconds = 10.0
    timeline: tuple[dict[str, Any], ...] = Field(min_length=1)
    expect: Expect
    sabotage: Sabotage


@dataclass(frozen=True, slots=True)
class Drill:
    """One drill, checked. `after_s`: traffic goes on so long after the last step."""

    name: str
    about: str
    topology: str
    services: tuple[DrillService, ...]
    traffic: tuple[Traffic, ...]
    before_s: float
    after_s: float
    timeline: tuple[Step, ...]
    expect: Expect
    sabotage: str
    sabotage_fails: tuple[str, ...]
    sabotage_timeline: tuple[Step, ...]

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
    timeline = _steps(document, ("timeline",), file.timeline, problems)
    sabotage = _steps(document, ("sabotage", "timeline"), file.sabotage.timeline, problems)
    problems += _unknown_services(document, file)
    problems += _unexpected(document, file)
    if problems:
        raise _refused(problems, source)
    return Drill(
        name,
        file.about,
        file.topology,
        file.services,
        file.traffic,
        file.before,
        file.after,
        timeline,
        file.expect,
        file.sabotage.about,
        file.sabotage.fails,
        sabotage,
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


def _unknown_services(document: Document, file: _File) -> list[Problem]:
    known = {service.name for service in file.services}
    return [
        Problem(document.mark(loc), loc, f"there is no service {traffic.service!r} in this drill")
        for number, traffic in enumerate(file.traffic)
        for loc in [("traffic", number, "service")]
        if traffic.service not in known
    ]


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
