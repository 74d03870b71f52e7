"""Processor times of small pieces of work: others on the machine do not count."""

from __future__ import annotations

import time
from collections.abc import Callable

Measured = tuple[str, tuple[float, ...], str]


def timed(work: Callable[[], object], runs: int) -> tuple[float, ...]:
    """Milliseconds of each run. What `work` returns is let go of off the clock."""
    found = []
    for _ in range(runs):
        begin = time.process_time()
        made = work()
        found.append((time.process_time() - begin) * 1000)
        del made
    return tuple(found)
