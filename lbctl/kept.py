"""A file that holds the newest of a state, for the next start of the process that writes it.

Rules: written whole, by rename, mode 0600, in a worker thread. Many changes are one write, and it
rests after each in proportion to what that cost: a twentieth of a processor, however often a large
state changes. A file that cannot be read, and what its reader refuses, is as good as none.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

_EVERY_S: Final = 1.0  # at most one write in that time
_RESTS: Final = 19  # times what a write has cost,
_LATEST_S: Final = 10.0  # but what changed is never written later than that
_log = structlog.get_logger()


class Kept:
    """content: the state as JSON, as of when it is called (in the worker thread)."""

    def __init__(self, path: Path, content: Callable[[], bytes]) -> None:
        self.path = path
        self._content = content
        self._writing = threading.Lock()
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """There is something new; `run` writes it."""
        self._changed.set()

    async def run(self) -> None:
        """Write what changes, for ever; on cancellation what is left."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                cost_s = await asyncio.to_thread(self.write)
                await asyncio.sleep(min(max(_EVERY_S, _RESTS * cost_s), _LATEST_S))
        finally:
            if self._changed.is_set():
                self.write()

    def write(self) -> float:
        """Write now; the processor time that it took. A failure is logged."""
        began_s = time.thread_time()
        temporary = self.path.with_suffix(".new")
        with self._writing:
            data = self._content()
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                temporary.replace(self.path)
            except OSError as error:
                _log.error("snapshot_not_written", file=str(self.path), error=str(error))
        return time.thread_time() - began_s

    def read(self) -> Any:
        """What the last run wrote, decoded; None if there is nothing that can be read."""
        try:
            return msgspec.json.decode(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            self.refuse(error)
            return None

    def refuse(self, error: Exception) -> None:
        """Say that what was read makes no sense."""
        _log.warning("snapshot_unreadable", file=str(self.path), error=repr(error))

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
