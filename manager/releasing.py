"""The leader's part of giving addresses back: when to look at which EIP again.

Rule: `core.release` decides; this only remembers which EIPs are on their way, which of them
something changed about, and when the clock alone may move one.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lbctl.core.actions import Action
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service
from lbctl.core.release import Facts, Releases, Step


class Releasing:
    """All EIPs in phase Releasing. One per leadership.

    facts: what a release depends on, now. service, owned: as the allocator knows them. clock: any
    that never steps; wall: seconds since the epoch.
    """

    def __init__(
        self,
        facts: Callable[[], Facts],
        service: Callable[[ObjectRef], Service | None],
        owned: Callable[[ObjectRef], Sequence[Eip]],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._facts = facts
        self._service = service
        self._owned = owned
        self._clock = clock
        self._wall = wall
        self._releases = Releases()
        self._eips: dict[Address, Eip] = {}
        self._dirty: set[Address] = set()
        self._due: list[tuple[float, int, int, Address]] = []
        self.steps: dict[Address, Step] = {}

    def set_eip(self, eip: Eip) -> None:
        """An EIP object appeared or changed."""
        if eip.phase is Phase.RELEASING:
            self._eips[eip.address] = eip
            self._dirty.add(eip.address)
        elif eip.address in self._eips:
            self.remove_eip(eip.address)

    def remove_eip(self, address: Address) -> None:
        """An EIP object is gone."""
        self._eips.pop(address, None)
        self._dirty.discard(address)
        self.steps.pop(address, None)
        self._releases.forget(address)

    def touch_owner(self, ref: ObjectRef) -> None:
        """Something about an owner changed."""
        self._dirty |= {e.address for e in self._owned(ref)} & self._eips.keys()

    def touch_all(self) -> None:
        """Something that every release depends on changed: managers, nodes, configuration."""
        self._dirty |= self._eips.keys()

    def plan(self) -> tuple[Action, ...]:
        """What has to be done now, in the order of addresses."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            self._dirty.add(heapq.heappop(self._due)[3])
        dirty, self._dirty = self._dirty & self._eips.keys(), set()
        if not dirty:
            return ()
        facts = replace(self._facts(), epoch_s=self._wall() - now)
        actions: list[Action] = []
        for address in sorted(dirty, key=lambda a: (a.version, int(a))):
            eip = self._eips[address]
            siblings = self._owned(eip.owner)
            step = self._releases.step(eip, self._service(eip.owner), siblings, facts, now)
            self.steps[address] = step
            actions += step.actions
            if step.again_s is not None:
                heapq.heappush(self._due, (step.again_s, address.version, int(address), address))
        return tuple(actions)

    def next_s(self) -> float | None:
        """Seconds until the clock may move one, None if nothing waits for the clock."""
        return max(0.0, self._due[0][0] - self._clock()) if self._due else None
