"""Wall-clock times of small pieces of work."""

from __future__ import annotations

import time
from collections.abc import Callable

Measured = tuple[str, tuple[float, ...], str]


def timed(work: Callable[[], object], runs: int) -> tuple[float, ...]:
    """Milliseconds of each run."""
    found = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        found.append((time.perf_counter() - begin) * 1000)
    return tuple(found)
