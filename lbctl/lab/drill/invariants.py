"""What must hold when nothing is broken any more, over one look at the whole lab. Pure.

Rules: `Snapshot` is what was seen, and nothing in it was judged; every check says what it found.
The managers' own word (`/v1/state`) is the plan that switches are held against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from lbctl.core.model import NodeState, Phase
from lbctl.core.state import EipState, ManagerState
from lbctl.lab.drill.verdict import Check

_SHOWN: Final = 4  # of what is wrong, in one line


@dataclass(frozen=True, slots=True)
class ServiceSeen:
    """A Service of type LoadBalancer. addresses: in its status. sharing: its key, "" for none."""

    name: str
    addresses: tuple[str, ...]
    sharing: str = ""


@dataclass(frozen=True, slots=True)
class EipSeen:
    """An EIP object; members: names of the Services on it."""

    address: str
    phase: str
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The lab at one moment.

    managers: by control host, None if it gave no answer. routes: per living switch the next hops
    of each EIP in its kernel. tables: per node the EIPs in its nftables. answers: "" or why an EIP
    did not answer as its Service. programs: per machine what runs in its network, counted; usual:
    the same before anything happened. nodes: that should be Up.
    """

    nodes: frozenset[str]
    services: tuple[ServiceSeen, ...]
    eips: tuple[EipSeen, ...]
    managers: Mapping[str, ManagerState | None]
    routes: Mapping[str, Mapping[str, frozenset[str]]]
    tables: Mapping[str, frozenset[str]]
    answers: Mapping[str, str]
    programs: Mapping[str, Counter[str]] = field(default_factory=dict)
    usual: Mapping[str, Counter[str]] = field(default_factory=dict)

    def states(self) -> tuple[ManagerState, ...]:
        """Of the managers that answered."""
        return tuple(state for _, state in sorted(self.managers.items()) if state)


def check(seen: Snapshot) -> tuple[Check, ...]:
    """Every invariant, held against what was seen."""
    return tuple(
        _checked(name, list(wrong))
        for name, wrong in (
            ("managers, sessions and nodes are well", _unwell(seen)),
            ("no address on two Services without a sharing key", _doubled(seen)),
            ("every Service with a free pool has its address", _waiting(seen)),
            ("each switch's next hops equal the plan", _astray(seen)),
            ("all agents' digests agree", _differing(seen)),
            ("every EIP answers", _silent(seen)),
            ("nothing is left over", _left_over(seen)),
        )
    )


def _checked(name: str, wrong: list[str]) -> Check:
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return Check(name, "always", "; ".join(wrong[:_SHOWN]) + more or "yes", not wrong)


def _unwell(seen: Snapshot) -> Iterator[str]:
    for control, state in sorted(seen.managers.items()):
        if state is None:
            yield f"the manager on {control} does not answer"
            continue
        up = {node.name for node in state.nodes if node.state is NodeState.UP}
        for name in sorted(seen.nodes - up):
            yield f"{name} is not Up for {control}"
        yield from (f"no session {control} to {s.peer}" for s in state.sessions if not s.up)
        if len(state.sessions) < len(seen.routes):
            yield f"{control} has {len(state.sessions)} sessions to {len(seen.routes)} switches"
    leaders = [state.manager for state in seen.states() if state.leader]
    if len(leaders) != 1:
        yield f"{len(leaders)} managers lead"


def _doubled(seen: Snapshot) -> Iterator[str]:
    on: dict[str, list[ServiceSeen]] = {}
    for service in seen.services:
        for address in service.addresses:
            on.setdefault(address, []).append(service)
    for address, services in sorted(on.items()):
        keys = {service.sharing for service in services}
        if len(services) > 1 and (len(keys) > 1 or "" in keys):
            yield f"{address} is on {', '.join(service.name for service in services)}"
    for address, count in sorted(Counter(eip.address for eip in seen.eips).items()):
        if count > 1:
            yield f"{address} has {count} EIP objects"


def _waiting(seen: Snapshot) -> Iterator[str]:
    """A Service without an address, or with one that no EIP object gives it."""
    pools = [pool for state in seen.states() if state.leader for pool in state.pools]
    given = {(eip.address, name) for eip in seen.eips for name in eip.members}
    for service in seen.services:
        if not service.addresses and any(pool.used < pool.total for pool in pools):
            yield f"{service.name} has none"
        for address in service.addresses:
            if (address, service.name) not in given:
                yield f"{service.name} shows {address}, which no EIP object gives it"


def _bound(state: ManagerState) -> dict[str, EipState]:
    return {str(eip.address): eip for eip in state.eips if eip.phase is Phase.BOUND}


def _astray(seen: Snapshot) -> Iterator[str]:
    """A switch that differs from a manager, or an EIP that a manager announces nothing for."""
    given = {eip.address for eip in seen.eips if eip.phase == Phase.BOUND}
    for state in seen.states():
        bound = _bound(state)
        for address in sorted(given - bound.keys()):
            yield f"{state.manager} does not know of {address}"
        for address, eip in sorted(bound.items()):
            hops = frozenset(str(hop) for hop in eip.next_hops)
            if not hops:
                yield f"{state.manager} announces no next hop of {address}"
            for switch, routes in sorted(seen.routes.items()):
                found = routes.get(address, frozenset())
                if found != hops:
                    said = ", ".join(sorted(found)) or "nobody"
                    yield f"{switch}: {address} to {said}, not {', '.join(sorted(hops)) or 'none'}"
    if not seen.routes:
        yield "no switch is on"


def _differing(seen: Snapshot) -> Iterator[str]:
    digests: dict[str, set[str]] = {}
    for state in seen.states():
        for node in state.nodes:
            if node.name in seen.nodes:
                digests.setdefault(node.digest, set()).add(node.name)
    if len(digests) != 1 or "" in digests:
        yield from (
            f"{', '.join(sorted(on))}: {digest or 'none'}" for digest, on in digests.items()
        )


def _silent(seen: Snapshot) -> Iterator[str]:
    for service in seen.services:
        for address in service.addresses:
            why = seen.answers.get(f"{service.name} {address}", "was not asked")
            if why:
                yield f"{address} of {service.name}: {why}"


def _left_over(seen: Snapshot) -> Iterator[str]:
    names = {service.name for service in seen.services}
    held = set()
    for eip in seen.eips:
        if eip.phase == Phase.BOUND and set(eip.members) <= names:
            held.add(eip.address)
        else:
            yield f"EIP {eip.address} ({eip.phase}) of {', '.join(eip.members)}"
    for switch, routes in sorted(seen.routes.items()):
        yield from (f"route {address} on {switch}" for address in sorted(routes.keys() - held))
    for node, addresses in sorted(seen.tables.items()):
        yield from (f"table entries of {address} on {node}" for address in sorted(addresses - held))
    for machine, programs in sorted(seen.programs.items()):
        usual = seen.usual.get(machine, Counter())
        yield from (f"{n} x {p} on {machine}" for p, n in sorted((programs - usual).items()))
        yield from (f"{p} is missing on {machine}" for p in sorted((usual - programs).keys()))
