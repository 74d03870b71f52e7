"""What is still missing before a manager is ready.

Rules: ready means caches synced, a configuration accepted, keys known, some node heard if agents
are ready, and every peer that can be reached has the full table. A roll-out takes the next replica
down on this word, so peers get `CONNECT_S` to come up before the others alone decide. Later changes
do not make a manager unready unless they stay undelivered for `LATE_S`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from manager.announcing import Announcing, Speaker
from manager.configuration import Configuration
from manager.inputs import Inputs

CONNECT_S: Final = 20.0
LATE_S: Final = 10.0


class Readiness:
    """Call `look()` now and then (every second or so); `missing()` at any time."""

    def __init__(
        self,
        inputs: Inputs,
        configuration: Configuration,
        announcing: Announcing,
        speaker: Speaker,
        watching: Callable[[], bool],
        unheard: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inputs = inputs
        self._configuration = configuration
        self._announcing = announcing
        self._speaker = speaker
        self._watching = watching
        self._unheard = unheard
        self._clock = clock
        self._first_set_s: float | None = None
        self._settled_s: float | None = None

    def look(self) -> None:
        """Note whether everything is delivered at this moment."""
        now, number = self._clock(), self._announcing.number
        if number is None:
            return
        if self._first_set_s is None:
            self._first_set_s = now
        if self._speaker.is_settled(number) and not self._awaited(now):
            self._settled_s = now

    @property
    def full(self) -> bool:
        """Whether the peers have had the full table at least once, and not too long ago."""
        return self._settled_s is not None and self._clock() - self._settled_s < LATE_S

    def missing(self) -> tuple[str, ...]:
        """Sentences; () when ready."""
        self.look()
        found = [f"not listed yet: {kind}" for kind in self._inputs.unsynced()]
        if (age_s := self._inputs.snapshot_age_s()) is not None:
            found.append(f"what is announced comes from a snapshot that is {age_s:.0f} s old")
        if self._configuration.current is None:
            found.append("no configuration has been accepted")
        if not self._watching():
            found.append("the probe keys are not known yet")
        if self._announcing.number is None and self._unheard():
            found.append("no node has answered though agents are ready: does UDP 7482 pass?")
        elif self._announcing.number is None:
            found.append("the routes are not known yet")
        elif not self.full:
            down = ", ".join(self._awaited(self._clock()))
            found.append(f"waiting for {down}" if down else "the speaker has not settled")
        return tuple(found)

    def _awaited(self, now_s: float) -> list[str]:
        """Peers whose sessions may still come up."""
        if self._first_set_s is None or now_s - self._first_set_s > CONNECT_S:
            return []
        return [session.peer for session in self._speaker.sessions() if not session.up]
