"""Conntrack is told of pods that left beside the agent's passes, never on a change's path.

Asking conntrack costs a walk over its whole hash table (4 to 8 ms at 262,144 buckets, however few
flows there are), twice what a change of one Service costs. So what left is gathered, and asked for
at once when conntrack has not been asked lately.
Rules: after the tables have it, so that no new flow leads there; what came back meanwhile is left
alone; at most a tenth of the time is spent on it; what fails is tried again; when the agent stops,
what waits is done first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from agent import conntrack
from agent.conntrack import Target
from lbctl.errors import DataplaneError

REST: Final = 9  # times as long as the last walk took
AGAIN_S: Final = 1.0  # after a walk that failed
_log = structlog.get_logger()


class Forgetting:
    """Ends flows to pods that left. `still_gone` gives those of the targets that did not return.

    forget: ends the flows of these, and says how many; raises DataplaneError.
    """

    def __init__(
        self,
        still_gone: Callable[[Iterable[Target]], tuple[Target, ...]],
        forget: Callable[[Iterable[Target]], int] = conntrack.forget,
        again_s: float = AGAIN_S,
    ) -> None:
        self._still_gone = still_gone
        self._conntrack = forget
        self._again_s = again_s
        self._waiting: set[Target] = set()
        self._wake = asyncio.Event()
        self.failures = 0

    def add(self, gone: Iterable[Target]) -> None:
        """Take in targets that the kernel's tables have no more."""
        self._waiting.update(gone)
        if self._waiting:
            self._wake.set()

    async def run(self) -> None:
        """Forget for ever; ends only by cancellation."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                started_s = time.monotonic()
                gone = self._taken()
                if await asyncio.to_thread(self._forget, gone):
                    await asyncio.sleep(REST * (time.monotonic() - started_s))
                else:
                    self.add(gone)
                    await asyncio.sleep(self._again_s)
        finally:
            self._forget(self._taken())

    def _taken(self) -> tuple[Target, ...]:
        gone = self._still_gone(self._waiting)
        self._waiting.clear()
        return gone

    def _forget(self, gone: tuple[Target, ...]) -> bool:
        """Whether their flows are ended."""
        if not gone:
            return True
        try:
            count = self._conntrack(gone)
        except DataplaneError as error:  # the tables are right all the same
            self.failures += 1
            _log.error("flows_kept", error=str(error))
            return False
        _log.info("flows_forgotten", count=count, targets=len(gone))
        return True
