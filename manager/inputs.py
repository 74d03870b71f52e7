"""Everything the manager watches, and who hears of changes.

Rule: one cache per kind; listeners get (key, old, new) in the event loop and only mark what is to
be looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from lbctl.core import names
from lbctl.core.model import Eip, Node, ObjectRef, Service
from lbctl.kube import objects
from lbctl.kube.cache import Cache
from lbctl.kube.client import Client
from lbctl.kube.objects import DataObject, Kind, Namespace, Pod, Slice
from manager.metrics import Metrics

T = TypeVar("T")
Listener = Callable[[ObjectRef, T | None, T | None], None]
_log = structlog.get_logger()


class Feed(Generic[T]):
    """A cache with any number of listeners."""

    def __init__(
        self, client: Client, kind: Kind[T], *, namespace: str = "", name: str = ""
    ) -> None:
        self._listeners: list[Listener[T]] = []
        params = {"fieldSelector": f"metadata.name={name}"} if name else {}
        self.cache: Cache[T] = Cache(
            client, kind, namespace=namespace, params=params, on_change=self._changed
        )
        self.label = f"{kind.name}/{name}" if name else kind.name

    def listen(self, listener: Listener[T]) -> None:
        """Hear of every change from now on."""
        self._listeners.append(listener)

    def _changed(self, key: ObjectRef, old: T | None, new: T | None) -> None:
        for listener in self._listeners:
            listener(key, old, new)


class Inputs:
    """The watched kinds. Add listeners first, then start `run()` as a task."""

    def __init__(self, client: Client, namespace: str = names.NAMESPACE) -> None:
        self.services: Feed[Service] = Feed(client, objects.SERVICE)
        self.slices: Feed[Slice] = Feed(client, objects.SLICE)
        self.nodes: Feed[Node] = Feed(client, objects.NODE)
        self.nodes.listen(_say_odd_hops)
        self.eips: Feed[Eip] = Feed(client, objects.EIP)
        self.namespaces: Feed[Namespace] = Feed(client, objects.NAMESPACE)
        self.wanted: Feed[DataObject] = Feed(
            client, objects.CONFIG_MAP, namespace=namespace, name=names.CONFIG_MAP
        )
        self.accepted: Feed[DataObject] = Feed(
            client, objects.CONFIG_MAP, namespace=namespace, name=names.ACCEPTED_CONFIG_MAP
        )
        self.secrets: Feed[DataObject] = Feed(client, objects.SECRET, namespace=namespace)
        self.pods: Feed[Pod] = Feed(client, objects.POD, namespace=namespace)
        self.known = asyncio.Event()  # all that announcing needs is here: listed, or recalled

    def feeds(self) -> tuple[Feed[Service] | Feed[Slice] | Feed[Node] | Feed[Eip], ...]:
        """Those that allocation and announcing need."""
        return self.services, self.slices, self.nodes, self.eips

    def all_feeds(self) -> tuple[Feed[object], ...]:
        """Every feed."""
        small = (self.wanted, self.accepted, self.secrets, self.pods, self.namespaces)
        return (*self.feeds(), *small)  # type: ignore[arg-type]  # only kind-free parts are used

    async def run(self) -> None:
        """Follow everything; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            for feed in self.all_feeds():
                group.create_task(feed.cache.run(), name=f"watch {feed.label}")

    async def synced(self) -> None:
        """Until everything has been listed once."""
        for feed in self.all_feeds():
            await feed.cache.synced.wait()

    def unsynced(self) -> tuple[str, ...]:
        """What has not been listed yet."""
        return tuple(f.label for f in self.all_feeds() if not f.cache.synced.is_set())

    def snapshot_age_s(self) -> float | None:
        """How old what a former run knew is by now, if that is all there is of some kind."""
        caches = [feed.cache for feed in self.all_feeds()]
        ages = [c.age_s() for c in caches if c.recalled and not c.synced.is_set()]
        return max(ages, default=None)

    def measure(self, metrics: Metrics) -> None:
        """Fill in the cache metrics."""
        metrics.snapshot_in_use.set(self.snapshot_age_s() is not None)
        for feed in self.all_feeds():
            cache = feed.cache
            metrics.cache_objects.labels(feed.label).set(len(cache.items))
            metrics.cache_skipped.labels(feed.label).set(cache.skipped)
            metrics.cache_age.labels(feed.label).set(cache.age_s())


def _say_odd_hops(_key: ObjectRef, old: Node | None, new: Node | None) -> None:
    """Once for each such annotation, not for each change of the Node."""
    if new is not None and new.odd_hops and (old is None or old.odd_hops != new.odd_hops):
        _log.warning("next_hops_ignored", node=new.name, no_addresses=" ".join(new.odd_hops))
