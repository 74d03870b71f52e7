"""Waiting times between attempts: doubling, capped, with jitter."""

from __future__ import annotations

import random


class Backoff:
    """`next_s()` gives the seconds to wait before the next attempt; `reset()` after a success.

    Each wait is drawn from the upper half of the current step, so that many processes that lost the
    same server do not come back in the same instant.
    """

    def __init__(self, first_s: float = 0.1, cap_s: float = 10.0) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._step_s = first_s

    def next_s(self) -> float:
        """Seconds to wait now; the next wait will be up to twice as long."""
        step = self._step_s
        self._step_s = min(self._cap_s, step * 2)
        return step * (0.5 + random.random() / 2)

    def reset(self) -> None:
        """Start again from the first step."""
        self._step_s = self._first_s
