"""The plan of `lbctl drill chaos`: which faults meet which, by a seed. Pure.

Rules: the same seed, rack and length give the same rounds, and a longer plan begins with a shorter
one's rounds. In a round Services come, change and go, faults are put in, stay for a while, and are
all healed; then what must hold is looked at (`invariants`). Never more at once than DESIGN.md says
is survived:
- one fault of a kind (`_MENU`): two switches, two managers or two of three nodes at once are what
  drills of their own are about, and lose what those state;
- with the API server gone one more at most: that a node is dead is then known by two managers only;
- no node falls beside a manager that hears badly or not at all (from nodes, or from the other
  manager): one manager alone may be mistaken, so it waits for NotReady;
- sessions are not reset while one manager is away: the other one's are all that there are;
- what is asked for at the API server (drain, roll-out, configuration) is not, while it is
  gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal

from lbctl.lab.drill.faults import Step

STEADY: Final = "steady"  # the Service that stays, and that traffic is driven at
QUIET_S: Final = 20.0  # what a quiet period is reckoned at
PORTS: Final = 8000  # Service cN is on this port + N, so that those that share an EIP can
_NAMES: Final = tuple(f"c{number}" for number in range(1, 7))
_BROKEN: Final = "version: 1, pools: ["

Group = Literal["node", "manager", "switch", "cluster", "work"]


@dataclass(frozen=True, slots=True)
class Rack:
    """Who is there. cables: machine → the port of its segment that its first cable is in."""

    nodes: tuple[str, ...]
    controls: tuple[str, ...]
    switches: tuple[str, ...]
    cables: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A Service with its Deployment, as a round leaves it. replicas 0: it is deleted."""

    name: str
    replicas: int
    policy: str = "Cluster"
    families: str = "SingleStack"
    sharing: str = ""

    @property
    def port(self) -> int:
        """Its TCP port."""
        return PORTS + int(self.name[1:])

    def __str__(self) -> str:
        if not self.replicas:
            return f"{self.name} goes"
        shared = f" shared {self.sharing}" if self.sharing else ""
        return f"{self.name} x {self.replicas} {self.policy} {self.families}{shared}"


@dataclass(frozen=True, slots=True)
class Round:
    """Changes, then faults (seconds from their beginning), then `hold_s` until all is healed."""

    number: int
    changes: tuple[Asked, ...]
    steps: tuple[Step, ...]
    hold_s: float

    @property
    def length_s(self) -> float:
        """What it is reckoned at, its quiet period included."""
        return max(step.at_s for step in self.steps) + self.hold_s + QUIET_S

    def __str__(self) -> str:
        changes = ", ".join(map(str, self.changes)) or "no Service changes"
        steps = "; ".join(f"{step.at_s:g} s {step}" for step in self.steps)
        return f"round {self.number}: {changes}; {steps}; healed after {self.hold_s:g} s"


@dataclass(frozen=True, slots=True)
class Choice:
    """A fault to choose. Of an argument's list one is drawn; `{…}` is a machine that is drawn.

    asks: it is asked for at the API server. deaf: a manager hears nodes or the other one badly.
    """

    group: Group
    fault: str
    arguments: Mapping[str, Any]
    asks: bool = False
    deaf: bool = False


_MENU: Final = (
    Choice("node", "powerCut", {"machine": "{node}"}),
    Choice("node", "loss", {"machine": "{node}", "percent": [10, 30, 100]}),
    Choice("node", "flap", {"machine": "{node}", "times": [2, 4], "every": [0.6, 2.0]}),
    Choice("node", "linkDown", {"machine": "{node lan}", "interface": "{node port}"}),
    Choice("node", "rate", {"machine": "{node}", "mbit": 1}),
    Choice("node", "signal", {"to": "agent@{node}"}),
    Choice("node", "signal", {"to": "agent@*", "number": ["KILL", "TERM"]}),
    Choice("node", "freeze", {"what": "agent@{node}"}),
    Choice("node", "killContainer", {"container": "agent", "where": "{node}", "grace": 2.0}),
    Choice("node", "wipeTables", {"machine": ["{node}", "nodes"]}),
    Choice("node", "partition", {"of": "{node}", "away": ["kube", "controls"]}),
    Choice("node", "drain", {"node": "{node}"}, asks=True),
    Choice("node", "evict", {"node": "{node}"}, asks=True),
    Choice("node", "upgrade", {"what": "agents"}, asks=True),
    Choice("manager", "powerCut", {"machine": "{control}"}),
    Choice("manager", "linkDown", {"machine": "{control lan}", "interface": "{control port}"}),
    Choice("manager", "loss", {"machine": "{control}", "percent": [10, 30]}, deaf=True),
    *(
        choice
        for what in ("manager", "speaker", "exabgp", "relay")
        for choice in (
            Choice("manager", "signal", {"to": f"{what}@{{control}}"}),
            Choice("manager", "freeze", {"what": f"{what}@{{control}}"}),
        )
    ),
    Choice(
        "manager",
        "killContainer",
        {"container": ["manager", "speaker"], "where": "{control}", "grace": 5.0},
    ),
    Choice("manager", "partition", {"of": "{control}", "away": ["{switch}", "switches"]}),
    Choice("manager", "partition", {"of": "{control}", "away": "kube"}),
    Choice(
        "manager",
        "partition",
        {"of": "{control}", "away": ["nodes", "controls"], "oneWay": [True, False]},
        deaf=True,
    ),
    Choice("manager", "upgrade", {"what": "managers"}, asks=True),
    Choice("switch", "powerCut", {"machine": "{switch}"}),
    Choice("switch", "linkDown", {"machine": "{switch lan}", "interface": "{switch port}"}),
    Choice("switch", "loss", {"machine": "{switch}", "percent": [10, 30]}),
    Choice("switch", "restartRouting", {"machine": "{switch}"}),
    Choice("switch", "resetSessions", {"machine": ["{switch}", "switches"]}),
    *(Choice("switch", "signal", {"to": f"{what}@{{switch}}"}) for what in ("bgpd", "zebra")),
    Choice("switch", "freeze", {"what": "bgpd@{switch}"}),
    Choice("cluster", "freeze", {"what": "cluster"}),
    Choice("cluster", "partition", {"of": "kube", "away": ["nodes", "controls"]}),
    Choice("work", "crashPod", {"service": STEADY}, asks=True),
    Choice("work", "rollout", {"service": STEADY}, asks=True),
    Choice("work", "configMap", {"text": _BROKEN}, asks=True),
)


def plan(seed: int, rack: Rack, minutes: float, faults: int | None) -> tuple[Round, ...]:
    """The rounds that fit into so many minutes, and no more than `faults` faults (None: any)."""
    found: list[Round] = []
    left_s, left = minutes * 60, faults
    for one in rounds(seed, rack):
        count = len(one.steps)
        if (found and left_s < one.length_s) or (left is not None and left < 1):
            break
        if left is not None:
            one = Round(one.number, one.changes, one.steps[:left], one.hold_s)
            left -= count
        left_s -= one.length_s
        found.append(one)
    return tuple(found)


def rounds(seed: int, rack: Rack) -> Iterator[Round]:
    """Rounds without an end."""
    random = Random(seed)
    there: dict[str, Asked] = {}
    for number in itertools.count(1):
        changes = tuple(_change(random, there) for _ in range(random.randint(0, 2)))
        steps = []
        for choice in _together(random, random.choice((1, 2, 2, 3))):
            arguments = _drawn(random, choice.arguments, rack)
            steps.append(Step(random.randint(0, 30) / 10, choice.fault, arguments))
        steps.sort(key=lambda step: step.at_s)
        yield Round(number, changes, tuple(steps), float(random.randint(3, 12)))


def _change(random: Random, there: dict[str, Asked]) -> Asked:
    """A Service that comes, changes or goes; `there` is as it is then."""
    name = random.choice(_NAMES)
    if name in there and random.random() < 0.5:
        del there[name]
        return Asked(name, 0)
    if shared := random.random() < 0.4:  # sharing and Local do not go together
        asked = Asked(name, random.randint(1, 3), sharing=random.choice(("k1", "k2")))
    else:
        policy = random.choice(("Cluster", "Local"))
        families = random.choice(("SingleStack", "PreferDualStack"))
        asked = Asked(name, random.randint(1, 3), policy, families)
    before = there.get(name)
    if before is not None and (shared or before.sharing):
        asked = Asked(name, asked.replicas, before.policy, before.families, before.sharing)
    there[name] = asked
    return asked


def _together(random: Random, count: int) -> list[Choice]:
    """So many faults that are survived together, or fewer."""
    found: list[Choice] = []
    for group in random.sample(sorted({choice.group for choice in _MENU}), count):
        choice = random.choice([choice for choice in _MENU if choice.group == group])
        if survived((*found, choice)):
            found.append(choice)
    return found


def survived(choices: tuple[Choice, ...]) -> bool:
    """Whether DESIGN.md says that these are survived at once; the module says why not."""
    groups = {choice.group for choice in choices}
    if len(groups) < len(choices):
        return False
    if "cluster" in groups and (len(choices) > 2 or any(choice.asks for choice in choices)):
        return False
    if "node" in groups and any(choice.deaf for choice in choices):
        return False
    reset = any(choice.fault == "resetSessions" for choice in choices)
    return not (reset and "manager" in groups)


def _drawn(random: Random, arguments: Mapping[str, Any], rack: Rack) -> dict[str, Any]:
    """Arguments with everything drawn; one machine of a role is the same in all of them."""
    words: dict[str, str] = {}
    for role, names in (
        ("node", rack.nodes),
        ("control", rack.controls),
        ("switch", rack.switches),
    ):
        name = random.choice(names)
        lan, port = rack.cables[name]
        words |= {f"{{{role}}}": name, f"{{{role} lan}}": lan, f"{{{role} port}}": port}
    found = {}
    for key, value in arguments.items():
        drawn = random.choice(value) if isinstance(value, list) else value
        if isinstance(drawn, str):
            for word, name in words.items():
                drawn = drawn.replace(word, name)
        found[key] = drawn
    return found
