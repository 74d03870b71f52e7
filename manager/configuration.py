"""Which configuration is in force.

Rules: everyone runs what is in `lbctl-accepted`, and only that; the leader moves `lbctl` there,
as a whole, after every check has passed. Whatever is wrong with either leaves the one in force as
it is. Every problem goes to the log, to an Event on the ConfigMap, and to /v1/state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import structlog

from lbctl import errors
from lbctl.core import config, names
from lbctl.core.config import Config
from lbctl.core.model import Eip
from lbctl.core.reasons import Reason
from lbctl.kube import accepted
from lbctl.kube import client as api
from lbctl.kube.accepted import Entry, entry_of
from lbctl.kube.events import EventRecorder, Subject
from lbctl.kube.objects import DataObject
from lbctl.kube.values import timestamp
from manager.history import History
from manager.metrics import Metrics

_RETRY_S: Final = 1.0
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Accepted:
    """The configuration in force. `generation` counts acceptances."""

    config: Config
    hash: str
    generation: int


class Configuration:
    """Feed it both ConfigMaps; `on_accepted` is called with each configuration that comes in force.

    eips: the EIP objects known now, against which a shrinking pool is checked.
    """

    def __init__(
        self,
        client: api.Client,
        events: EventRecorder,
        metrics: Metrics,
        eips: Callable[[], Iterable[Eip]],
        on_accepted: Callable[[Accepted], None],
        namespace: str = names.NAMESPACE,
    ) -> None:
        self._client = client
        self._events = events
        self._metrics = metrics
        self._eips = eips
        self._on_accepted = on_accepted
        self._namespace = namespace
        self._history = History(client, namespace)
        self._wanted: DataObject | None = None
        self._stored: DataObject | None = None
        self._changed = asyncio.Event()
        self._reported: tuple[str, ...] = ()
        self._parsed: tuple[str, Config | None, tuple[str, ...]] | None = None
        self.current: Accepted | None = None
        self.problems: tuple[str, ...] = ()

    @property
    def stale(self) -> bool:
        """Whether ConfigMap `lbctl` says something else than what is in force."""
        text = self._text()
        if text is None:
            return False
        return self.current is None or config.config_hash(text) != self.current.hash

    def change_wanted(self, found: DataObject | None) -> None:
        """ConfigMap `lbctl` as it is now. Gone: what is in force stays."""
        self._wanted = found
        self.review()
        self._changed.set()

    def change_accepted(self, found: DataObject | None) -> None:
        """ConfigMap `lbctl-accepted` as it is now."""
        self._stored = found
        self._changed.set()
        entry = entry_of(found)
        if entry is None:
            return
        if self.current is None or entry.hash != self.current.hash:
            try:
                parsed = config.parse(entry.text, names.CONFIG_KEY)
            except errors.ConfigError as error:
                _log.error("accepted_config_unreadable", problems=error.problems)
                return
            self.current = Accepted(parsed, entry.hash, entry.generation)
            self._metrics.config_generation.set(self.current.generation)
            _log.info("config_in_force", hash=entry.hash, generation=self.current.generation)
            self._on_accepted(self.current)
        self.review()

    def review(self) -> Config | None:
        """Check ConfigMap `lbctl` wholly; the configuration if it may be accepted, else None."""
        text = self._text()
        parsed: Config | None = None
        problems: tuple[str, ...] = ()
        if self._wanted is not None and text is None:
            problems = (f"ConfigMap {self._wanted.ref} has no key {names.CONFIG_KEY}",)
        elif text is not None:
            parsed, problems = self._parse(text)
            if parsed is not None:
                problems = self._shrinks(parsed)
        self.problems = problems
        self._metrics.config_rejected.set(bool(problems))
        return None if problems else parsed

    def _parse(self, text: str) -> tuple[Config | None, tuple[str, ...]]:
        """Parse, remembering the last text: it is looked at again for shrunk pools only."""
        if self._parsed is None or self._parsed[0] != text:
            try:
                self._parsed = text, config.parse(text, names.CONFIG_KEY), ()
            except errors.ConfigError as error:
                self._parsed = text, None, error.problems
        return self._parsed[1], self._parsed[2]

    def _shrinks(self, parsed: Config) -> tuple[str, ...]:
        return tuple(
            f"{names.CONFIG_KEY}: pools: {conflict}, which would fall out of the pools"
            for conflict in config.shrink_conflicts(self._eips(), parsed)
        )

    async def lead(self) -> None:
        """The leader's task: accept what is good. Ends only by cancellation."""
        self._changed.set()
        while True:
            # The timer looks again at a refused shrink: the Services may be gone by now.
            try:
                async with asyncio.timeout(5.0):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self._accept()
                stored = entry_of(self._stored)
                if stored is not None and stored.generation:
                    await self._history.keep(stored)
            except errors.Conflict:
                _log.info("config_write_lost")  # the watch brings what is there now
            except errors.KubeError as error:
                _log.warning("config_not_written", error=str(error))
                await asyncio.sleep(_RETRY_S)
                self._changed.set()

    async def _accept(self) -> None:
        parsed = self.review()
        text, wanted = self._text(), self._wanted
        if wanted is None or self.problems != self._reported:
            self._report(wanted)
        if parsed is None or text is None or wanted is None:
            return
        digest = config.config_hash(text)
        stored, old = self._stored, entry_of(self._stored)
        if old is not None and old.hash == digest:
            return
        number = old.generation + 1 if old is not None else 1
        entry = Entry(number, digest, text, timestamp(time.time()))
        version = stored.version if stored is not None else ""
        body = accepted.body(names.ACCEPTED_CONFIG_MAP, self._namespace, entry, version)
        if stored is None:
            await self._client.create(api.CONFIG_MAPS.path(self._namespace), body)
        else:
            path = api.CONFIG_MAPS.path(self._namespace, names.ACCEPTED_CONFIG_MAP)
            await self._client.replace(path, body)
        _log.info("config_accepted", hash=digest)
        self._events.emit(_subject(wanted), Reason.CONFIG_ACCEPTED, f"accepted, hash {digest}")

    def _report(self, wanted: DataObject | None) -> None:
        self._reported = self.problems
        if wanted is None or not self.problems:
            return
        for problem in self.problems:
            _log.error("config_rejected", problem=problem)
        text = "\n".join(self.problems)
        self._events.emit(_subject(wanted), Reason.CONFIG_REJECTED, text, warning=True)

    def _text(self) -> str | None:
        return self._wanted.get(names.CONFIG_KEY) if self._wanted is not None else None


def _subject(found: DataObject) -> Subject:
    return Subject("ConfigMap", found.ref, found.uid)
