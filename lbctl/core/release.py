"""Giving back an address: docs/internals.md, "Giving back an address", as a state machine.

Rules: pure; the leader calls `Releases.step` for each Releasing EIP whenever something about it
changed and at `Step.again_s`. Each stage is left only by what was observed, never by hope:

| stage         | left when                                             | by action       |
|---------------|-------------------------------------------------------|-----------------|
| Withdrawing   | every manager that lives, or died less than the hold  | (none)          |
|               | time ago, has withdrawn the route                     |                 |
| Draining      | drainTime has passed since                            | SetUnforwarded  |
| Unprogramming | no Up node confirms the address any more              | (none)          |
| Clearing      | the Service's status and finalizer are gone           | ClearStatus,    |
|               |                                                       | RemoveFinalizer |
| Resting       | reuseAfter has passed since `unforwardedAt`           | DeleteEip       |

`drainTime` is counted on the leader's own clock from when it first saw the withdrawal complete,
so that clocks of other hosts do not matter, nor a step of its own: what is remembered goes by a
clock that never steps. A new leader counts again, which only takes longer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lbctl.core import names
from lbctl.core.actions import Action, ClearStatus, DeleteEip, RemoveFinalizer, SetUnforwarded
from lbctl.core.classes import ANY_CLASS_RULE, not_ours
from lbctl.core.config import Services
from lbctl.core.model import Address, Eip, Phase, Service
from lbctl.core.reasons import Reason


class Stage(StrEnum):
    """How far an address is on its way back."""

    BOUND = "Bound"
    WITHDRAWING = "Withdrawing"
    DRAINING = "Draining"
    UNPROGRAMMING = "Unprogramming"
    CLEARING = "Clearing"
    RESTING = "Resting"
    FREE = "Free"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a release depends on.

    living: ids of the managers whose Pods exist (the leader's own among them).
    gone: ids of managers whose Pods vanished, and when (seconds, the clock of `now_s`). Keep an
    entry for at least the hold time.
    confirming: for an address, the names of the Up nodes whose agents still confirm it.
    hold_time_s: how long a switch keeps the routes of a manager that vanished (`Bgp.keep_s`).
    drain_time_s, reuse_after_s, rule (which classes are ours): from the configuration.
    epoch_s: the wall clock less the clock of `now_s`, which steps when the wall clock does.
    """

    living: Collection[str]
    gone: Mapping[str, float] = field(default_factory=dict)
    confirming: Mapping[Address, Collection[str]] = field(default_factory=dict)
    hold_time_s: float = 9.0
    drain_time_s: float = 2.0
    reuse_after_s: float = 30.0
    rule: Services = ANY_CLASS_RULE
    epoch_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now (in this order; stop at the first failure), and when to ask again at the
    latest, None if only a change can help. `sentence` says what is waited for."""

    stage: Stage
    actions: tuple[Action, ...]
    reason: Reason
    sentence: str
    again_s: float | None = None


class Releases:
    """Remembers since when each stage is seen. One per leadership."""

    def __init__(self) -> None:
        self._complete: dict[Address, float] = {}
        self._resting: dict[Address, float] = {}

    def forget(self, address: Address) -> None:
        """The EIP object is gone, or in use again."""
        self._complete.pop(address, None)
        self._resting.pop(address, None)

    def step(
        self, eip: Eip, service: Service | None, siblings: Sequence[Eip], facts: Facts, now_s: float
    ) -> Step:
        """The next step of one EIP.

        service: the owner as it is now, None if it is gone. siblings: all EIP objects of the same
        owner (with or without `eip`); the finalizer goes only after the last of them is clear.
        now_s: seconds of a clock that never steps, the same for the whole leadership.
        """
        if eip.phase is Phase.BOUND:
            self.forget(eip.address)
            return Step(Stage.BOUND, (), Reason.RESTORED, f"{eip.address} is in use")
        if not eip.forwarding:
            return self._unprogramming(eip, service, siblings, facts, now_s)
        waiting = _not_withdrawn(eip, facts, now_s)
        if waiting:
            self.forget(eip.address)
            said = f"{eip.address}: waiting for {_join(waiting)} to withdraw the route"
            return Step(
                Stage.WITHDRAWING, (), Reason.RELEASING, said, _gone_next(eip, facts, now_s)
            )
        since = self._complete.setdefault(eip.address, now_s)
        due = since + facts.drain_time_s
        if now_s < due:
            said = f"{eip.address}: every route is withdrawn; open connections drain"
            return Step(Stage.DRAINING, (), Reason.RELEASING, said, due)
        action = SetUnforwarded(eip.owner, eip, Reason.RELEASING)
        said = f"{eip.address}: drained; the nodes stop forwarding it"
        return Step(Stage.DRAINING, (action,), Reason.RELEASING, said)

    def _unprogramming(
        self, eip: Eip, service: Service | None, siblings: Sequence[Eip], facts: Facts, now_s: float
    ) -> Step:
        nodes = sorted(facts.confirming.get(eip.address, ()))
        if nodes:
            said = f"{eip.address}: waiting for {_join(nodes)} to stop forwarding it"
            return Step(Stage.UNPROGRAMMING, (), Reason.RELEASING, said)
        actions = _clear(eip, service, siblings, facts)
        if actions:
            said = f"{eip.address}: no node forwards it any more; the Service is let go"
            return Step(Stage.CLEARING, actions, Reason.RELEASED, said)
        if service is not None and eip.address in service.ingress:
            said = f"{eip.address}: waiting until Service {eip.owner} no longer shows it"
            return Step(Stage.CLEARING, (), Reason.RELEASING, said)
        seen = self._resting.setdefault(eip.address, now_s)
        # The other host's clock may have been ahead when it wrote `unforwardedAt`.
        said_s = seen if eip.unforwarded_s is None else eip.unforwarded_s - facts.epoch_s
        since = min(seen, said_s)
        due = since + facts.reuse_after_s
        if now_s < due:
            said = f"{eip.address} rests until reuseAfter has passed"
            return Step(Stage.RESTING, (), Reason.REUSE_DELAY, said, due)
        self.forget(eip.address)
        action = DeleteEip(eip.owner, eip, Reason.RELEASED)
        return Step(Stage.FREE, (action,), Reason.RELEASED, f"{eip.address} is free again")


def _not_withdrawn(eip: Eip, facts: Facts, now_s: float) -> list[str]:
    """Managers whose route may still stand on a switch. None known at all is not "all of them"."""
    if not facts.living:
        return ["the managers"]
    recent = {m for m, since in facts.gone.items() if now_s < since + facts.hold_time_s}
    return sorted((set(facts.living) | recent) - set(eip.withdrawn_by))


def _gone_next(eip: Eip, facts: Facts, now_s: float) -> float | None:
    """When the next vanished manager stops to count."""
    due = [
        since + facts.hold_time_s
        for manager, since in facts.gone.items()
        if manager not in eip.withdrawn_by and manager not in facts.living
    ]
    return min((at for at in due if at > now_s), default=None)


def _clear(
    eip: Eip, service: Service | None, siblings: Sequence[Eip], facts: Facts
) -> tuple[Action, ...]:
    """Take address and finalizer off a Service that is no longer ours.

    One that still is ours (it gave up one address of several, or asked for another) keeps both:
    its status is the allocator's.
    """
    if service is None or not_ours(service, facts.rule) is None:
        return ()
    others = [e for e in siblings if e.address != eip.address]
    if any(
        e.phase is Phase.BOUND or e.forwarding or facts.confirming.get(e.address) for e in others
    ):
        return ()
    actions: list[Action] = []
    mine = {eip.address, *(e.address for e in others)}
    if mine & set(service.ingress):
        actions.append(ClearStatus(service.ref, service, Reason.RELEASED))
    if names.FINALIZER in service.finalizers:
        actions.append(RemoveFinalizer(service.ref, service, Reason.RELEASED))
    return tuple(actions)


def _join(words: Sequence[str]) -> str:
    shown = list(words[:3])
    if len(words) > 3:
        shown.append(f"{len(words) - 3} more")
    return ", ".join(shown)
