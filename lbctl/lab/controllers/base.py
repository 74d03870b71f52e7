"""What controllers share: a work queue, indexes over the store, and their helpers on objects.

A reconcile is synchronous: what it reads does not change before it writes, so there are no
expectations to keep and no caches to be stale. Keys are (namespace, name).
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog

from lbctl.errors import ApiRefusal
from lbctl.lab.apiserver.api import Api
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.store import Change, Item, Key, Store
from lbctl.lab.apiserver.tables import seconds

log = structlog.get_logger()
_FIRST_RETRY_S: Final = 0.01
_LAST_RETRY_S: Final = 5.0


class Controller:
    """One loop: keys in, `reconcile` out; a refusal is tried again with a growing delay."""

    name = "controller"

    def __init__(self, api: Api) -> None:
        self.api = api
        self.store: Store = api.store
        self._queue: OrderedDict[Key, None] = OrderedDict()
        self._wake = asyncio.Event()
        self._failures: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        """Reconcile `key` soon, once."""
        self._queue[key] = None
        self._wake.set()

    def add_after(self, key: Key, delay_s: float) -> None:
        """Reconcile `key` in a while."""
        asyncio.get_running_loop().call_later(max(0.0, delay_s), self.add, key)

    def on_change(self, change: Change) -> None:
        """A listener that queues the changed object itself."""
        self.add(change.key)

    def add_all(self, resource: str) -> None:
        """Queue every object of a resource."""
        for item in self.store.items(resource):
            self.add((item.obj["metadata"]["namespace"], item.obj["metadata"]["name"]))

    def reconcile(self, key: Key) -> None:
        """Bring the object at `key` to its desired state. ApiRefusal: it is called again."""
        raise NotImplementedError

    async def run(self) -> None:
        """Work until cancelled. One key at a time, others run in between."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                key, _ = self._queue.popitem(last=False)
                self._once(key)
                await asyncio.sleep(0)

    def _once(self, key: Key) -> None:
        try:
            self.reconcile(key)
            self._failures.pop(key, None)
        except ApiRefusal as refusal:
            count = self._failures[key] = self._failures.get(key, 0) + 1
            delay = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** min(count, 16))
            log.debug("reconcile_refused", controller=self.name, key=key, error=str(refusal))
            self.add_after(key, delay)
        except Exception:  # a task root: one odd object must not end the controller
            self._failures[key] = self._failures.get(key, 0) + 1
            log.exception("reconcile_failed", controller=self.name, key=key)
            self.add_after(key, _LAST_RETRY_S)

    def resource(self, key: str) -> Resource:
        """The resource of a key such as `pods`."""
        return self.api.registry.key(key)

    def set_status(self, resource: Resource, item: Item, state: Obj) -> None:
        """Write a status if it differs."""
        if item.obj.get("status") != state:
            current = self.store.get(resource.key, *_key(item.obj))
            if current is not None:
                self.api.store.put(resource.key, {**current.copy(), "status": state})


def _key(obj: Obj) -> Key:
    meta = obj["metadata"]
    return meta.get("namespace", ""), meta["name"]


class Index:
    """Objects of one resource by a value that a function derives from each."""

    def __init__(self, store: Store, resource: str, values: Callable[[Obj], Iterable[Any]]) -> None:
        self._store = store
        self._resource = resource
        self._values = values
        self._keys: dict[Any, dict[Key, None]] = {}
        for item in store.items(resource):
            self._insert(item.obj)
        store.subscribe(resource, self._changed)

    def _insert(self, obj: Obj) -> None:
        for value in self._values(obj):
            self._keys.setdefault(value, {})[_key(obj)] = None

    def _changed(self, change: Change) -> None:
        if change.old is not None:
            for value in self._values(change.old.obj):
                keys = self._keys.get(value)
                if keys is not None:
                    keys.pop(change.key, None)
                    if not keys:
                        del self._keys[value]
        if change.type != "DELETED":
            self._insert(change.item.obj)

    def values(self) -> list[Any]:
        """All values that some object has."""
        return list(self._keys)

    def get(self, value: Any) -> list[Item]:
        """The objects with that value, in order of name."""
        found = []
        for key in sorted(self._keys.get(value, ())):
            item = self._store.get(self._resource, *key)
            if item is not None:
                found.append(item)
        return found


def node_of(pod: Obj) -> list[str]:
    """The node that a Pod is on, as index values."""
    name = pod["spec"].get("nodeName")
    return [name] if name else []


def controller_of(obj: Obj) -> Obj | None:
    """The owner reference of the controller, if there is one."""
    for reference in obj["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            found: Obj = reference
            return found
    return None


def owner_uids(obj: Obj) -> list[str]:
    """The controller's uid, as index values."""
    reference = controller_of(obj)
    return [reference["uid"]] if reference else []


def owner_reference(owner: Obj) -> Obj:
    """A reference that makes `owner` the controller."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def deleting(obj: Obj) -> bool:
    """Marked for deletion."""
    return "deletionTimestamp" in obj["metadata"]


def condition(obj: Obj, kind: str) -> Obj | None:
    """The status condition of that type."""
    for entry in obj.get("status", {}).get("conditions") or ():
        if entry.get("type") == kind:
            found: Obj = entry
            return found
    return None


def is_ready(pod: Obj) -> bool:
    """Its Ready condition is True."""
    found = condition(pod, "Ready")
    return found is not None and found.get("status") == "True"


def is_active(pod: Obj) -> bool:
    """Counts as a replica: neither ended nor being deleted."""
    return not deleting(pod) and pod.get("status", {}).get("phase") not in {"Succeeded", "Failed"}


def ready_for_s(pod: Obj) -> float:
    """Seconds since it became ready; -1 if it is not."""
    found = condition(pod, "Ready")
    if found is None or found.get("status") != "True":
        return -1.0
    since = found.get("lastTransitionTime")
    return time.time() - seconds(since) if since else float("inf")


def is_available(pod: Obj, min_ready_s: int) -> bool:
    """Ready for at least `min_ready_s`."""
    return is_ready(pod) and (not min_ready_s or ready_for_s(pod) >= min_ready_s)
