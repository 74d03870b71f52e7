"""What announcing and probing need of the API server, kept for this container's next start.

Rules: a file per kind, never one of Secrets. It is used only when the API server does not answer at
the start, and only until that kind's first list. Nothing is written before a list is whole. A
file's time is when the API server was last heard. There is no limit to its age: who may be next
hop, and for which EIP, is what agents say now, so what is old costs routes and never makes a wrong
one (docs/failure-model.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec
import structlog

from lbctl.core.model import Eip, Node, ObjectRef, Service
from lbctl.core.plain import reader
from lbctl.errors import MessageError
from lbctl.kept import Kept
from lbctl.kube.cache import Cache
from lbctl.kube.objects import DataObject, Pod, Slice
from manager.inputs import Feed, Inputs

T = TypeVar("T")
VERSION: Final = 1
_STAMP_S: Final = 10.0
_log = structlog.get_logger()


class Snapshots:
    """The files of one manager's caches; says when the inputs are known.

    answer_s: the API server has so long to list everything.
    """

    def __init__(self, directory: Path, inputs: Inputs, answer_s: float = 2.0) -> None:
        self._inputs = inputs
        self._answer_s = answer_s
        self._files = (
            _File(directory, inputs.services, Service),
            _File(directory, inputs.slices, Slice),
            _File(directory, inputs.nodes, Node),
            _File(directory, inputs.eips, Eip),
            _File(directory, inputs.accepted, DataObject),
            _File(directory, inputs.pods, Pod),
        )

    async def run(self) -> None:
        """Recall if need be, then keep what is read; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._begin(), name="recall")
            for file in self._files:
                group.create_task(file.run(), name="snapshot")
            while True:
                await asyncio.sleep(_STAMP_S)
                for file in self._files:
                    file.stamp()

    async def _begin(self) -> None:
        try:
            async with asyncio.timeout(self._answer_s):
                await self._inputs.synced()
        except TimeoutError:
            await self.recall()
            await self._inputs.synced()
            _log.info("everything_listed")
        self._inputs.known.set()

    async def recall(self) -> None:
        """Let the caches serve what the last run knew. All of it is there, or nothing is known."""
        if all([await file.recall() for file in self._files]):
            self._inputs.known.set()
            if (age_s := self._inputs.snapshot_age_s()) is not None:
                _log.warning("snapshot_in_use", age_s=round(age_s, 1))


class _File(Generic[T]):
    """The file of one cache. kind: of its objects."""

    def __init__(self, directory: Path, feed: Feed[T], kind: type[T]) -> None:
        self._label = feed.label
        self._cache: Cache[T] = feed.cache
        self._read = reader(kind)
        self._kept = Kept(directory / f"{feed.label.replace('/', '-')}.json", self._content)
        feed.listen(lambda _key, _old, _new: self._kept.changed())

    async def run(self) -> None:
        """Write it when there is something new."""
        await self._cache.synced.wait()
        self._kept.changed()
        await self._kept.run()

    def stamp(self) -> None:
        """Note in the file when the API server was last heard."""
        if self._cache.synced.is_set():
            at_s = time.time() - self._cache.age_s()
            with contextlib.suppress(OSError):
                os.utime(self._kept.path, (at_s, at_s))

    async def recall(self) -> bool:
        """Let the cache serve what the file holds until it has a list; whether it serves now."""
        found = await asyncio.to_thread(self._load)
        if found is None:
            return self._cache.synced.is_set()
        await self._cache.recall(*found)
        return True

    def _content(self) -> bytes:
        # A copy is one step for the event loop's thread, which goes on changing the cache.
        items = self._cache.items.copy()
        # One by one: a long call would keep the event loop, and with it the probes, waiting.
        packed = [_packed((key.namespace, key.name, item)) for key, item in items.items()]
        return msgspec.json.encode({"version": VERSION, "kind": self._label, "items": packed})

    def _load(self) -> tuple[Mapping[ObjectRef, T], float] | None:
        """The objects of the last run, and their age in seconds; None if there are none."""
        found = self._kept.read()
        if found is None:
            return None
        try:
            if (found["version"], found["kind"]) != (VERSION, self._label):
                return None
            items = {ObjectRef(str(a), str(b)): self._read(c) for a, b, c in found["items"]}
            return items, max(0.0, time.time() - self._kept.path.stat().st_mtime)
        except (MessageError, KeyError, ValueError, TypeError, OSError) as error:
            self._kept.refuse(error)
            return None


def _packed(entry: tuple[str, str, object]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(entry, enc_hook=str))
