"""What a drill saw, and whether it is what must hold. Pure.

Rules: times are seconds from the beginning of the timeline. A flow counts against the drill if its
pod lives: its node never lost power and the pod was not removed or crashed by the drill. A share
that proves that the drill could have failed is an expectation like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lbctl.lab.drill.spec import Drill, Expect


@dataclass(frozen=True, slots=True)
class FlowSeen:
    """One TCP or UDP flow. broken: "" or why. entered: the node that a switch handed it to."""

    service: str
    protocol: str
    pod: str
    node: str
    entered: str
    broken: str
    broken_at_s: float
    gap_s: float
    gap_at_s: float


@dataclass(frozen=True, slots=True)
class RequestSeen:
    """One new connection with one request; error: "" or what became of it."""

    service: str
    start_s: float
    took_s: float
    error: str


@dataclass(frozen=True, slots=True)
class FaultSeen:
    """A step of the timeline: when it was begun, and when it was in place."""

    at_s: float
    done_s: float
    text: str


@dataclass(frozen=True, slots=True)
class HopsSeen:
    """A change of a switch's kernel route: from then on it has these next hops."""

    at_s: float
    service: str
    switch: str
    hops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was seen. gone: pods that the drill itself ended. dead: machines without power."""

    flows: tuple[FlowSeen, ...]
    requests: tuple[RequestSeen, ...]
    faults: tuple[FaultSeen, ...]
    hops: tuple[HopsSeen, ...]
    dead: frozenset[str]
    gone: frozenset[str]
    services: Mapping[str, str]
    began_s: float
    ended_s: float

    def living(self, protocol: str) -> tuple[FlowSeen, ...]:
        """The flows whose pods live."""
        return tuple(
            flow
            for flow in self.flows
            if flow.protocol == protocol
            and flow.node not in self.dead
            and flow.pod not in self.gone
        )

    def failed(self) -> tuple[RequestSeen, ...]:
        """The new connections that got no answer."""
        return tuple(request for request in self.requests if request.error)

    def outage_s(self) -> float:
        """The longest time from a fault to the start of a new connection that failed after it.

        Counted from the last fault that had begun by then; 0 if none failed.
        """
        longest_s = 0.0
        for request in self.failed():
            begun = [fault.at_s for fault in self.faults if fault.at_s <= request.start_s]
            if begun:
                longest_s = max(longest_s, request.start_s - max(begun))
        return longest_s

    def last_hops(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Next hops at the end, by service and living switch."""
        found = {(seen.service, seen.switch): seen.hops for seen in self.hops}
        return {key: hops for key, hops in sorted(found.items()) if key[1] not in self.dead}


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation: what was wanted, what was found."""

    name: str
    wanted: str
    found: str
    held: bool


def judge(drill: Drill, seen: Evidence) -> tuple[Check, ...]:
    """Hold what was seen against what must hold, in the order of the file format."""
    expect = drill.expect
    checks = [*_broken(expect, seen), *_failures(expect, seen), *_shares(expect, seen)]
    if expect.next_hops is not None:
        wanted = tuple(sorted(expect.next_hops))
        for (service, switch), hops in seen.last_hops().items():
            checks.append(
                Check(
                    f"next hops of {service} on {switch} at the end",
                    ", ".join(wanted) or "none",
                    ", ".join(hops) or "none",
                    hops == wanted,
                )
            )
    return tuple(checks)


def unharmed(drill: Drill, seen: Evidence) -> tuple[str, ...]:
    """The expectations that the drill's sabotage should have broken, and that held all the same."""
    expected = drill.expect.model_dump(by_alias=True)
    found = []
    for key in drill.sabotage_fails:
        alone = replace(drill, expect=Expect.model_validate({key: expected[key]}))
        if all(check.held for check in judge(alone, seen)):
            found.append(key)
    return tuple(found)


def _broken(expect: Expect, seen: Evidence) -> list[Check]:
    checks = []
    for limit, protocol, what in (
        (expect.broken, "TCP", "connections to living pods broken"),
        (expect.datagrams_broken, "UDP", "UDP flows to living pods broken"),
    ):
        if limit is not None:
            living = seen.living(protocol)
            broken = [flow for flow in living if flow.broken]
            found = f"{len(broken)} of {len(living)}"
            if broken:
                found += f" (first: {broken[0].broken} at {broken[0].broken_at_s:.2f} s)"
            checks.append(Check(what, f"at most {limit}", found, len(broken) <= limit))
    if expect.gap is not None:
        gap_s = max((f.gap_s for f in seen.living("TCP") if not f.broken), default=0.0)
        wanted = f"at most {expect.gap:g} s"
        checks.append(Check("longest silence", wanted, f"{gap_s:.2f} s", gap_s <= expect.gap))
    return checks


def _failures(expect: Expect, seen: Evidence) -> list[Check]:
    checks = []
    failed = seen.failed()
    if expect.failed is not None:
        found = f"{len(failed)} of {len(seen.requests)}"
        if failed:
            found += f" (first: {failed[0].error} at {failed[0].start_s:.2f} s)"
        held = len(failed) <= expect.failed and bool(seen.requests)
        checks.append(Check("new connections failed", f"at most {expect.failed}", found, held))
    if expect.outage is not None:
        outage_s = seen.outage_s()
        wanted = f"at most {expect.outage:g} s"
        held = outage_s <= expect.outage and bool(seen.requests)
        checks.append(Check("outage of new connections", wanted, f"{outage_s:.2f} s", held))
    return checks


def _shares(expect: Expect, seen: Evidence) -> list[Check]:
    """What proves that the drill could have failed."""
    flows = [flow for flow in seen.flows if flow.entered]
    count = max(1, len(flows))
    checks = []
    for node, share in sorted((expect.entered or {}).items()):
        found = sum(1 for flow in flows if flow.entered == node) / count
        checks.append(
            Check(
                f"flows that entered at {node}",
                f"{share:.0%} or more",
                f"{found:.0%}",
                found >= share,
            )
        )
    if expect.steered is not None:
        found = sum(1 for flow in flows if flow.entered != flow.node) / count
        wanted = f"{expect.steered:.0%} or more"
        checks.append(
            Check("flows that were steered", wanted, f"{found:.0%}", found >= expect.steered)
        )
    return checks
