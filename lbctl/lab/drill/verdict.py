"""What a drill saw, and whether it is what must hold. Pure.

Rules: times are seconds from the beginning of the timeline. A flow counts against the drill if its
pod lives: its node never lost power, or it broke before that, and the pod was not removed or
crashed by the drill. What was expected of nothing that was seen does not hold. A share that proves
that the drill could have failed is an expectation like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lbctl.lab.downloads import BIN_S
from lbctl.lab.drill.spec import Drill, Expect

_SETTLE_S: Final = 3.0  # until TCP has found its rate
_SAME_S: Final = 1e-6  # what two numbers for one moment may differ by


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
    """A step of the timeline: when it was begun, and when it was in place.

    number: of the drill's own steps, from 1; 0 for one of its sabotage.
    """

    at_s: float
    done_s: float
    text: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class HopsSeen:
    """A change of a switch's kernel route: from then on it has these next hops."""

    at_s: float
    service: str
    switch: str
    hops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReceivedSeen:
    """Bytes that downloads got from a pod, in the half second from `at_s`."""

    at_s: float
    service: str
    node: str
    size: int


@dataclass(frozen=True, slots=True)
class FloodSeen:
    """A flood: packets asked for and sent."""

    service: str
    asked: int
    sent: int


@dataclass(frozen=True, slots=True)
class RolledSeen:
    """Pods that a step rolled: how many there are at the end, ready and of the new template."""

    what: str
    renewed: int
    pods: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was seen. gone: pods that the drill itself ended.

    dead: machines that lost their power, and when first; off: those without it at the end.
    leaders: who held the Lease before the timeline and at its end.
    """

    flows: tuple[FlowSeen, ...]
    requests: tuple[RequestSeen, ...]
    faults: tuple[FaultSeen, ...]
    hops: tuple[HopsSeen, ...]
    dead: Mapping[str, float]
    gone: frozenset[str]
    services: Mapping[str, str]
    began_s: float
    ended_s: float
    received: tuple[ReceivedSeen, ...] = ()
    floods: tuple[FloodSeen, ...] = ()
    leaders: tuple[str, str] = ("", "")
    off: frozenset[str] = frozenset()
    rolled: tuple[RolledSeen, ...] = ()

    def living(self, protocol: str) -> tuple[FlowSeen, ...]:
        """The flows whose pods live."""
        return tuple(
            flow
            for flow in self.flows
            if flow.protocol == protocol
            and flow.pod not in self.gone
            and (flow.node not in self.dead or self._broke_before(flow))
        )

    def _broke_before(self, flow: FlowSeen) -> bool:
        """Whether it broke while its node still had power."""
        return bool(flow.broken) and flow.broken_at_s < self.dead[flow.node]

    def failed(self) -> tuple[RequestSeen, ...]:
        """The new connections that got no answer."""
        return tuple(request for request in self.requests if request.error)

    def outage_s(self) -> float:
        """The longest time from a fault to the start of a new connection that failed after it.

        Counted from the last fault that had begun when it failed: what waits for its answer when a
        node dies was not kept waiting by what was before. 0 if none failed.
        """
        longest_s = 0.0
        for request in self.failed():
            failed_s = request.start_s + request.took_s
            begun = [fault.at_s for fault in self.faults if fault.at_s <= failed_s]
            if begun:
                longest_s = max(longest_s, request.start_s - max(begun))
        return longest_s

    def gap_s(self) -> float:
        """The longest silence of a TCP flow to a living pod that did not break."""
        return max((f.gap_s for f in self.living("TCP") if not f.broken), default=0.0)

    def last_hops(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Next hops at the end, by service and living switch."""
        found = {(seen.service, seen.switch): seen.hops for seen in self.hops}
        return {key: hops for key, hops in sorted(found.items()) if key[1] not in self.off}


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation: what was wanted, what was found.

    value: the same as a number, in `unit` ("" for a count); None where it is none.
    """

    name: str
    wanted: str
    found: str
    held: bool
    value: float | None = None
    unit: str = ""


def judge(drill: Drill, seen: Evidence) -> tuple[Check, ...]:
    """Hold what was seen against what must hold, in the order of the file format.

    Whatever a drill expects, what it rolls must have been rolled.
    """
    rolled = [
        Check(
            f"{one.what} rolled at the end",
            "all pods",
            f"{one.renewed} of {one.pods}",
            0 < one.pods == one.renewed,
        )
        for one in seen.rolled
    ]
    return (*_expected(drill, seen), *rolled)


def _expected(drill: Drill, seen: Evidence) -> tuple[Check, ...]:
    expect = drill.expect
    return (
        *_broken(expect, seen),
        *_failures(expect, seen),
        *_shares(expect, seen),
        *_throughput(drill, seen),
        *_latency(expect, seen),
        *_calm(expect, seen),
        *_next_hops(expect, seen),
    )


def _next_hops(expect: Expect, seen: Evidence) -> list[Check]:
    if expect.next_hops is None:
        return []
    wanted = tuple(sorted(expect.next_hops))
    said = ", ".join(wanted) or "none"
    checks = [
        Check(
            f"next hops of {service} on {switch} at the end",
            said,
            ", ".join(hops) or "none",
            hops == wanted,
        )
        for (service, switch), hops in seen.last_hops().items()
    ]
    return checks or [Check("next hops at the end", said, "no switch is on", False)]


def unharmed(drill: Drill, seen: Evidence) -> tuple[str, ...]:
    """The expectations that the drill's sabotage should have broken, and that held all the same."""
    expected = drill.expect.model_dump(by_alias=True)
    found = []
    for key in drill.sabotage_fails:
        alone = replace(drill, expect=Expect.model_validate({key: expected[key]}))
        if all(check.held for check in _expected(alone, seen)):
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
            held = len(broken) <= limit and bool(living)
            checks.append(Check(what, f"at most {limit}", found, held, len(broken)))
    if expect.gap is not None:
        gap_s = seen.gap_s()
        wanted = f"at most {expect.gap:g} s"
        held = gap_s <= expect.gap and bool(seen.living("TCP"))
        checks.append(Check("longest silence", wanted, f"{gap_s:.2f} s", held, gap_s, "s"))
    return checks


def _failures(expect: Expect, seen: Evidence) -> list[Check]:
    checks = []
    failed = seen.failed()
    if expect.failed is not None:
        found = f"{len(failed)} of {len(seen.requests)}"
        if failed:
            found += f" (first: {failed[0].error} at {failed[0].start_s:.2f} s)"
        held = len(failed) <= expect.failed and bool(seen.requests)
        wanted = f"at most {expect.failed}"
        checks.append(Check("new connections failed", wanted, found, held, len(failed)))
    if expect.outage is not None:
        outage_s = seen.outage_s()
        wanted = f"at most {expect.outage:g} s"
        held = outage_s <= expect.outage and bool(seen.requests)
        found = f"{outage_s:.2f} s"
        checks.append(Check("outage of new connections", wanted, found, held, outage_s, "s"))
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
                100 * found,
                "%",
            )
        )
    if expect.steered is not None:
        found = sum(1 for flow in flows if flow.entered != flow.node) / count
        wanted, held = f"{expect.steered:.0%} or more", found >= expect.steered
        checks.append(
            Check("flows that were steered", wanted, f"{found:.0%}", held, 100 * found, "%")
        )
    return checks


def _throughput(drill: Drill, seen: Evidence) -> list[Check]:
    checks = []
    own = [fault.at_s for fault in seen.faults if fault.number]
    last_s = max((fault.done_s for fault in seen.faults), default=0.0) + drill.after_s
    for wanted in drill.expect.throughput or ():
        begun = [fault for fault in seen.faults if fault.number == wanted.after]
        from_s = begun[0].done_s + _SETTLE_S if begun else math.inf
        later = [at_s for at_s in own if begun and at_s > begun[0].done_s]
        end_s = min(later, default=last_s)
        first_s, span_s = _whole_bins(seen.received, from_s, end_s)
        by_node: dict[str, float] = {}
        for part in seen.received:
            if -_SAME_S <= part.at_s - first_s < span_s - _SAME_S:
                by_node[part.node] = by_node.get(part.node, 0.0) + part.size
        span_s = max(span_s, _SAME_S)
        mbit = sum(by_node.values()) * 8 / span_s / 1e6
        shares = ", ".join(
            f"{node or '?'} {size * 8 / span_s / 1e6:.1f}" for node, size in sorted(by_node.items())
        )
        found = f"{mbit:.1f} Mbit/s in {span_s:.0f} s ({shares or 'nothing'})"
        what = f"downloads after step {wanted.after}"
        limit, held = f"{wanted.mbit:g} Mbit/s or more", mbit >= wanted.mbit
        checks.append(Check(what, limit, found, held, mbit, "Mbit/s"))
    return checks


def _whole_bins(parts: Sequence[ReceivedSeen], from_s: float, end_s: float) -> tuple[float, float]:
    """Where the first bin begins that is wholly in this time, and how long all such take."""
    if not parts or math.isinf(from_s):
        return from_s, 0.0
    first_s = from_s + (parts[0].at_s - from_s) % BIN_S
    return first_s, max(0.0, (end_s - first_s + _SAME_S) // BIN_S * BIN_S)


def _latency(expect: Expect, seen: Evidence) -> list[Check]:
    """Nine of ten new connections: how long they took at most, before the faults and after."""
    checks = []
    first_s, last_s = (seen.faults[0].at_s, seen.faults[-1].done_s) if seen.faults else (0.0, 0.0)
    for service, factor in sorted((expect.latency or {}).items()):
        ours = [r for r in seen.requests if r.service == service]
        before = _most_took_s([r for r in ours if r.start_s < first_s])
        after = _most_took_s([r for r in ours if r.start_s >= last_s])
        checks.append(
            Check(
                f"time of nine of ten new connections to {service}",
                f"at most {factor:g} times what it was",
                f"{after * 1000:.1f} ms, {before * 1000:.1f} ms before",
                0 < after <= factor * before,
                after * 1000,
                "ms",
            )
        )
    return checks


def _most_took_s(requests: list[RequestSeen]) -> float:
    took = sorted(request.took_s for request in requests)
    return took[len(took) * 9 // 10] if took else 0.0


def _calm(expect: Expect, seen: Evidence) -> list[Check]:
    checks = []
    if expect.flooded is not None:
        for flood in seen.floods:
            share = flood.sent / flood.asked
            found = f"{flood.sent} of {flood.asked} packets ({share:.0%})"
            wanted = f"{expect.flooded:.0%} or more"
            checks.append(
                Check(
                    f"flood at {flood.service}",
                    wanted,
                    found,
                    share >= expect.flooded,
                    100 * share,
                    "%",
                )
            )
        if not seen.floods:
            checks.append(Check("floods", "1 or more", "none", False))
    if expect.leader is not None:
        before, after = seen.leaders
        checks.append(Check("leader", f"still {before}", after or "nobody", before == after != ""))
    if expect.changes is not None:
        first_s = seen.faults[0].at_s if seen.faults else -math.inf
        later = [change for change in seen.hops if change.at_s > first_s]
        found = f"{len(later)}" + (f" (first: {later[0].switch} {later[0].hops})" if later else "")
        wanted = f"at most {expect.changes}"
        held = len(later) <= expect.changes and bool(seen.hops)
        checks.append(Check("changes of next hops", wanted, found, held, len(later)))
    return checks
