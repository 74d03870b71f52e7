"""A list+watch cache of one kind, that notices a watch which has gone silent.

Rules: an object that cannot be decoded is skipped, logged and counted, and its last good version
is kept (fail static). 410 lists again; silence, resets and refusals reconnect with back-off. What
is known stays served while the API server is away, and so may what a former run knew (`recall`).
`on_change` gets real differences only.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import msgspec
import structlog

from lbctl import errors
from lbctl.core.model import ObjectRef
from lbctl.kube.backoff import Backoff
from lbctl.kube.client import Client, error_of
from lbctl.kube.objects import Kind

T = TypeVar("T")
_YIELD_EVERY: Final = 100  # objects of a list between two turns of the event loop
_log = structlog.get_logger()


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 500
    message: str = ""


class Cache(Generic[T]):
    """The objects of a kind, followed by list and watch. Start `run()` as a task.

    on_change(key, old, new) is called in the event loop, once per key that really changed; new is
    None when it is gone; it must be quick and must not raise. watch_s: a watch lasts so long
    (jittered by a tenth); slack_s beyond that without a byte, and it is taken for dead.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind[T],
        *,
        namespace: str = "",
        params: Mapping[str, str] | None = None,
        on_change: Callable[[ObjectRef, T | None, T | None], None] | None = None,
        watch_s: float = 60.0,
        slack_s: float = 5.0,
        cap_s: float = 10.0,
    ) -> None:
        self._client = client
        self._kind = kind
        self._path = kind.resource.path(namespace)
        self._params = dict(params or {})
        self._on_change = on_change
        self._watch_s = watch_s
        self._slack_s = slack_s
        self._backoff = Backoff(cap_s=cap_s)
        self._items: dict[ObjectRef, T] = {}
        self._version = ""
        self._log = _log.bind(kind=kind.name)
        self.synced = asyncio.Event()  # it has been listed
        self.recalled = False  # what a former run knew was put in
        self.skipped = 0  # objects that could not be decoded
        self.lists = 0  # lists made
        self._contact_s = time.monotonic()  # last word from the API server; first: our start

    @property
    def items(self) -> MappingProxyType[ObjectRef, T]:
        """A read-only view of what is known, by namespace and name."""
        return MappingProxyType(self._items)

    @property
    def name(self) -> str:
        """The kind's name."""
        return self._kind.name

    def get(self, key: ObjectRef) -> T | None:
        """One object, None if unknown."""
        return self._items.get(key)

    def age_s(self) -> float:
        """Seconds since the API server last spoke; if it never did, since our start."""
        return time.monotonic() - self._contact_s

    async def recall(self, items: Mapping[ObjectRef, T], age_s: float) -> None:
        """Serve what a former run knew so long ago, until there is a list; then that replaces it.

        Returns when one of the two is served.
        """
        for number, (key, item) in enumerate(items.items()):
            if number % _YIELD_EVERY == _YIELD_EVERY - 1:
                await asyncio.sleep(0)
            if self.lists:
                await self.synced.wait()
                return
            self._put(key, item)
        self.recalled = True
        self._contact_s = time.monotonic() - age_s

    async def run(self) -> None:
        """Follow for ever; ends only by cancellation."""
        while True:
            try:
                if not self._version:
                    await self._relist()
                await self._watch()
                continue
            except errors.Gone:
                self._version = ""
                self._log.info("watch_expired")
            except errors.KubeError as error:
                self._log.warning("watch_broken", error=str(error))
            await asyncio.sleep(self._backoff.next_s())

    async def _relist(self) -> None:
        page = await self._client.list(self._path, self._params)
        self.lists += 1
        self._contact_s = time.monotonic()
        seen: set[ObjectRef] = set()
        for number, raw in enumerate(page.items or ()):
            if number % _YIELD_EVERY == _YIELD_EVERY - 1:
                await asyncio.sleep(0)
            key = self._take(raw)
            if key is not None:
                seen.add(key)
        for key in sorted(self._items.keys() - seen):
            self._put(key, None)
        self._version = page.metadata.resourceVersion
        if not self.synced.is_set():
            self._log.info("cache_synced", objects=len(self._items))
        self.synced.set()

    async def _watch(self) -> None:
        lasts_s = self._watch_s * random.uniform(0.9, 1.1)
        params = {
            **self._params,
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(lasts_s))),
        }
        started = time.monotonic()
        spoke = False
        lines = self._client.watch(self._path, params, lasts_s + self._slack_s)
        async with aclosing(lines) as stream:
            async for line in stream:
                self._contact_s = time.monotonic()
                self._event(line)
                if not spoke:
                    spoke = True
                    self._backoff.reset()
        if not spoke and time.monotonic() - started < min(1.0, self._watch_s / 2):
            # A server that ends every watch at once would otherwise be asked in a tight loop.
            raise errors.Unreachable("the watch ended at once")

    def _event(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except msgspec.MsgspecError as error:
            # The stream itself is damaged: nothing after it can be trusted.
            self._version = ""
            raise errors.Unreachable(f"not a watch event: {error}") from error
        if event.type == "ERROR":
            raise _refused(event.object)
        head = _head(event.object)
        if event.type == "DELETED" and head is not None:
            self._put(head.metadata.ref, None)
        elif event.type in ("ADDED", "MODIFIED"):
            self._take(event.object)
        if head is not None and head.metadata.resourceVersion:
            self._version = head.metadata.resourceVersion

    def _take(self, raw: msgspec.Raw) -> ObjectRef | None:
        """Decode and store; the key, None if not even that can be read."""
        head = _head(raw)
        key = head.metadata.ref if head is not None else None
        try:
            item = self._kind.decode(raw)
        except errors.KubeError as error:
            self.skipped += 1
            self._log.warning("object_skipped", key=str(key), error=str(error))
            return key
        if key is not None:
            self._put(key, item)
        return key

    def _put(self, key: ObjectRef, new: T | None) -> None:
        old = self._items.get(key)
        if new is None:
            self._items.pop(key, None)
        else:
            self._items[key] = new
        if old != new and self._on_change is not None:
            self._on_change(key, old, new)


class _NamedMeta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    resourceVersion: str = ""

    @property
    def ref(self) -> ObjectRef:
        return ObjectRef(self.namespace, self.name)


class _Named(msgspec.Struct):
    metadata: _NamedMeta


def _head(raw: Any) -> _Named | None:
    # A bookmark has no name, and an odd object may have odd labels: only these three are needed.
    try:
        return msgspec.json.decode(raw, type=_Named)
    except msgspec.MsgspecError:
        return None


def _refused(raw: msgspec.Raw) -> errors.KubeError:
    try:
        status = msgspec.json.decode(raw, type=_Status)
    except msgspec.MsgspecError:
        return errors.Unreachable("watch error")
    return error_of(status.code, status.message)
