"""Free addresses of one family, as sorted gaps.

Rules: nothing is proportional to the number of addresses, only to the number of gaps (at most the
addresses in use plus one), so a /8 or an IPv6 /64 costs what its use costs. The lowest free
address comes first: the result does not depend on what happened before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from lbctl.core.model import Address


def to_address(version: int, number: int) -> Address:
    """The address of a family (4 or 6) with this value."""
    return IPv4Address(number) if version == 4 else IPv6Address(number)


class Space:
    """A set of integers kept as disjoint, non-adjacent runs [start, end], both included."""

    __slots__ = ("_ends", "_free", "_starts")

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._free = 0
        for start, end in sorted(runs):
            self.add(start, end)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def free(self) -> int:
        """How many addresses are free."""
        return self._free

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number <= self._ends[at]

    def first(self) -> int | None:
        """The lowest free one, None if all are taken."""
        return self._starts[0] if self._starts else None

    def remove(self, start: int, end: int) -> None:
        """Take out [start, end], whatever of it is there."""
        if start == end and self._starts and self._starts[0] == start:  # as a batch does
            self._free -= 1
            if self._ends[0] == start:
                del self._starts[0], self._ends[0]
            else:
                self._starts[0] = start + 1
            return
        at = max(bisect_right(self._starts, start) - 1, 0)
        stop = bisect_right(self._starts, end)
        kept: list[tuple[int, int]] = []
        for n in range(at, stop):
            low, high = self._starts[n], self._ends[n]
            if high < start:
                kept.append((low, high))
                continue
            self._free -= min(high, end) - max(low, start) + 1
            if low < start:
                kept.append((low, start - 1))
            if high > end:
                kept.append((end + 1, high))
        self._starts[at:stop] = [low for low, _ in kept]
        self._ends[at:stop] = [high for _, high in kept]

    def add(self, start: int, end: int) -> None:
        """Put [start, end] in; what was there already stays."""
        self.remove(start, end)
        self._free += end - start + 1
        at = bisect_right(self._starts, start)
        if at > 0 and self._ends[at - 1] == start - 1:
            at -= 1
            start = self._starts[at]
            del self._starts[at], self._ends[at]
        if at < len(self._starts) and self._starts[at] == end + 1:
            end = self._ends[at]
            del self._starts[at], self._ends[at]
        self._starts.insert(at, start)
        self._ends.insert(at, end)
