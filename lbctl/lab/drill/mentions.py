"""What a drill's file mentions must be there: machines of its topology, its own Services and steps.

Rules: pure but for the topology, which is read from its file. Processes are looked for when their
step is due, for only then it is known what runs; their machine has to be there from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from lbctl.core.positions import Loc
from lbctl.errors import LabError
from lbctl.lab import topology
from lbctl.lab.drill.faults import Machines, NodeName, ServiceName, Step, Target, kinds
from lbctl.lab.drill.site import ROLES
from lbctl.lab.topology import Topology

TOPOLOGIES: Final = Path(__file__).parents[3] / "bgp-lab"
_SUFFIX: Final = ".clab.yml"
_SEVERAL: Final = frozenset({"*", *ROLES})

Said = tuple[Loc, str]


class Named(Protocol):
    """A Service of a drill."""

    name: str


class Driven(Protocol):
    """Traffic of a drill."""

    service: str


def file_of(name: str) -> Path:
    """The file of a topology of ours."""
    return TOPOLOGIES / f"{name}{_SUFFIX}"


def rack(name: str) -> Topology:
    """The topology of this name. Raises LabError, which names those that there are."""
    files = sorted(path.name.removesuffix(_SUFFIX) for path in TOPOLOGIES.glob(f"*{_SUFFIX}"))
    if name not in files:
        raise LabError(f"there is no topology {name!r}; there are: {', '.join(files)}")
    return topology.load(file_of(name))


def machines(found: Topology, steps: Iterable[Step]) -> frozenset[str]:
    """What a step may call machines: those of the topology, those that steps add, roles, `*`."""
    for step in steps:
        if step.fault == "addNode":
            more = topology.next_node(found)
            found = replace(found, nodes=(*found.nodes, more.spec), links=(*found.links, more.link))
    return frozenset({*_SEVERAL, *(node.name for node in found.nodes)})


@dataclass(frozen=True, slots=True)
class Known:
    """What a drill may mention; `count`: steps of its timeline. Each finding has its place."""

    machines: frozenset[str]
    services: frozenset[str]
    count: int

    def twice(self, services: Iterable[Named]) -> Iterator[Said]:
        """Services that have the name of one before."""
        seen = set[str]()
        for number, service in enumerate(services):
            if service.name in seen:
                yield ("services", number, "name"), f"there are two services {service.name!r}"
            seen.add(service.name)

    def traffic(self, driven: Iterable[Driven]) -> Iterator[Said]:
        """Traffic at what is no Service of the drill."""
        for number, one in enumerate(driven):
            yield from self._service(("traffic", number, "service"), one.service)

    def expected(self, expect: Mapping[str, Any]) -> Iterator[Said]:
        """Expectations of what is not there."""
        for name in expect.get("latency", ()):
            yield from self._service(("expect", "latency", name), name)
        for name in expect.get("entered", ()):
            yield from self._machine(("expect", "entered", name), name)
        for number, name in enumerate(expect.get("nextHops", ())):
            yield from self._machine(("expect", "nextHops", number), name)
        for number, one in enumerate(expect.get("throughput", ())):
            if one["after"] > self.count:
                loc = ("expect", "throughput", number, "after")
                yield loc, f"the timeline has {self.count} steps"

    def steps(self, at: Loc, steps: Iterable[Step]) -> Iterator[Said]:
        """Steps that are done to what is not there. at: where their list is."""
        for number, step in enumerate(steps):
            kind = kinds(step.fault)
            for key, value in step.arguments.items():
                loc = (*at, number, key)
                if kind[key] is ServiceName:
                    yield from self._service(loc, value)
                elif kind[key] is Machines:
                    yield from self._machine(loc, value)
                elif kind[key] is NodeName and value not in self.machines - _SEVERAL:
                    yield loc, f"there is no node {value!r} in this topology"
                elif kind[key] is Target and "@" in value:
                    yield from self._machine(loc, value.partition("@")[2])

    def _service(self, loc: Loc, name: str) -> Iterator[Said]:
        if name not in self.services:
            yield loc, f"there is no service {name!r} in this drill"

    def _machine(self, loc: Loc, name: str) -> Iterator[Said]:
        if name not in self.machines:
            yield loc, f"there is no machine {name!r} in this topology"
