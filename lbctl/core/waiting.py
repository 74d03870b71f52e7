"""Who waits for what: a line for each pool and family that is full, and for each spent quota.

Rules: first in line is first by the order of a batch, whenever it came. A line costs what is woken
from it; whoever left meanwhile costs nothing later.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from lbctl.core.model import ObjectRef
from lbctl.core.supply import Line

Key = tuple[bool, float, str, str]


class Waiting:
    """Lines of Services."""

    def __init__(self) -> None:
        self._queues: dict[Line, list[tuple[Key, ObjectRef]]] = {}
        self._waits: dict[ObjectRef, tuple[Line, ...]] = {}
        self._sizes: dict[Line, int] = {}

    def enter(self, ref: ObjectRef, key: Key, lines: Iterable[Line]) -> None:
        """A Service waits in these lines from now on, and in no others."""
        self.leave(ref)
        found = tuple(lines)
        if not found:
            return
        self._waits[ref] = found
        for line in found:
            queue = self._queues.setdefault(line, [])
            heapq.heappush(queue, (key, ref))
            self._sizes[line] = self._sizes.get(line, 0) + 1
            if len(queue) > 2 * self._sizes[line] + 64:  # left behind by changes
                queue[:] = {entry for entry in queue if line in self._waits.get(entry[1], ())}
                heapq.heapify(queue)

    def leave(self, ref: ObjectRef) -> None:
        """A Service waits no more."""
        for line in self._waits.pop(ref, ()):
            self._sizes[line] -= 1

    def wake(self, line: Line, most: int) -> list[ObjectRef]:
        """The first `most` in a line, who leave it and every other."""
        queue = self._queues.get(line, [])
        woken: list[ObjectRef] = []
        while queue and len(woken) < most:
            _, ref = heapq.heappop(queue)
            if line in self._waits.get(ref, ()):
                self.leave(ref)
                woken.append(ref)
        if not queue:
            self._queues.pop(line, None)
            self._sizes.pop(line, None)
        return woken
