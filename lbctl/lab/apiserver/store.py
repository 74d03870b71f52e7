"""The objects, their history, and who watches them. All in memory, all synchronous.

Rules: objects in the store are never changed in place: a write puts a new one. Each is kept twice,
as dict and as JSON bytes, so that lists and watches encode nothing. Every write takes the next
resourceVersion; versions start at the clock, so those of an earlier run are too old, not wrong.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import msgspec

from lbctl.lab.apiserver import status
from lbctl.lab.apiserver.resources import Obj

EventType: TypeAlias = Literal["ADDED", "MODIFIED", "DELETED"]
Key: TypeAlias = tuple[str, str]  # namespace, name
Match: TypeAlias = Callable[[Obj], bool]
MAX_PENDING: Final = 200_000  # events for a watcher that does not read; then its stream is cut


@dataclass(frozen=True, slots=True)
class Item:
    """One version of one object."""

    obj: Obj
    raw: bytes
    version: int

    def copy(self) -> Obj:
        """A deep copy that may be changed."""
        found: Obj = msgspec.json.decode(self.raw)
        return found


@dataclass(frozen=True, slots=True)
class Change:
    """One write. `old` is None for a creation; for a deletion `item` is the last state."""

    type: EventType
    item: Item
    old: Item | None
    line: bytes  # the watch event, encoded

    @property
    def key(self) -> Key:
        """(namespace, name)."""
        return key_of(self.item.obj)


@dataclass(slots=True, eq=False)
class Watcher:
    """One watch. `pending` are events that match, in order; `wake` is set when there are some."""

    namespace: str | None
    match: Match | None
    pending: deque[tuple[EventType, Item, bytes]] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    def offer(self, change: Change) -> None:
        """Take a change if it concerns this watch; an object may enter or leave the selection."""
        obj = change.item.obj
        if self.namespace and obj["metadata"].get("namespace") != self.namespace:
            return
        event, line = change.type, change.line
        if self.match is not None:
            was = change.old is not None and self.match(change.old.obj)
            now = change.type != "DELETED" and self.match(obj)
            if not was and not now:
                return
            event = "MODIFIED" if was and now else "ADDED" if now else "DELETED"
            if event != change.type:
                line = event_line(event, change.item.raw)
        self.pending.append((event, change.item, line))
        if len(self.pending) > MAX_PENDING:
            self.closed = True
        self.wake.set()


def event_line(event: str, raw: bytes) -> bytes:
    """A watch event: one line of JSON."""
    return b'{"type":"' + event.encode() + b'","object":' + raw + b"}\n"


def key_of(obj: Obj) -> Key:
    """(namespace, name) of an object; the namespace of a cluster-scoped one is ""."""
    meta = obj["metadata"]
    return meta.get("namespace", ""), meta["name"]


@dataclass(slots=True)
class _Table:
    items: dict[Key, Item] = field(default_factory=dict)
    history: deque[Change] = field(default_factory=deque)
    oldest: int = 0  # changes after this version are all in `history`
    watchers: set[Watcher] = field(default_factory=set)
    listeners: list[Callable[[Change], None]] = field(default_factory=list)
    order: list[Key] | None = None  # cached sorted keys


class Store:
    """Objects by resource key. `history` is the number of events kept per resource."""

    def __init__(self, first_version: int, history: int = 10_000) -> None:
        self.version = first_version
        self._start = first_version
        self._history = history
        self._tables: dict[str, _Table] = {}
        self.journal: Callable[[str, Key, Item | None], None] | None = None
        self._all_listeners: list[Callable[[str, Change], None]] = []

    def _table(self, resource: str) -> _Table:
        table = self._tables.get(resource)
        if table is None:
            table = self._tables[resource] = _Table(oldest=self._start)
        return table

    def get(self, resource: str, namespace: str, name: str) -> Item | None:
        """The object, or None. Not to be changed: use `Item.copy`."""
        return self._table(resource).items.get((namespace, name))

    def items(self, resource: str, namespace: str | None = None) -> list[Item]:
        """All, in order of namespace and name."""
        table = self._table(resource)
        if table.order is None:
            table.order = sorted(table.items)
        if namespace:
            return [table.items[key] for key in table.order if key[0] == namespace]
        return [table.items[key] for key in table.order]

    def everything(self) -> list[tuple[str, Item]]:
        """All objects of all resources."""
        return [(name, item) for name in sorted(self._tables) for item in self.items(name)]

    def put(self, resource: str, obj: Obj) -> Item:
        """Create or replace; gives `obj` its resourceVersion and keeps it."""
        table = self._table(resource)
        key = key_of(obj)
        old = table.items.get(key)
        item = self._stamp(obj)
        table.items[key] = item
        if old is None:
            table.order = None
        self._publish(resource, table, "MODIFIED" if old else "ADDED", item, old)
        return item

    def remove(self, resource: str, namespace: str, name: str, last: Obj | None = None) -> Item:
        """Delete; the event carries `last` (else the object as it was), newly versioned."""
        table = self._table(resource)
        old = table.items.pop((namespace, name))
        table.order = None
        item = self._stamp(last if last is not None else old.copy())
        self._publish(resource, table, "DELETED", item, old)
        return item

    def restore(self, resource: str, obj: Obj) -> None:
        """Put an object of an earlier run back as it was: no event, no new version."""
        table = self._table(resource)
        version = int(obj["metadata"]["resourceVersion"])
        table.items[key_of(obj)] = Item(obj, msgspec.json.encode(obj), version)
        table.order = None

    def _stamp(self, obj: Obj) -> Item:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        return Item(obj, msgspec.json.encode(obj), self.version)

    def _publish(
        self, resource: str, table: _Table, event: EventType, item: Item, old: Item | None
    ) -> None:
        change = Change(event, item, old, event_line(event, item.raw))
        if len(table.history) >= self._history:
            table.oldest = table.history.popleft().item.version
        table.history.append(change)
        if self.journal is not None:
            self.journal(resource, change.key, None if event == "DELETED" else item)
        for watcher in table.watchers:
            watcher.offer(change)
        for listener in table.listeners:
            listener(change)
        for everything in self._all_listeners:
            everything(resource, change)

    def subscribe(self, resource: str, listener: Callable[[Change], None]) -> None:
        """Call `listener` after every write, for as long as the process lives."""
        self._table(resource).listeners.append(listener)

    def subscribe_all(self, listener: Callable[[str, Change], None]) -> None:
        """Call `listener` with resource key and change after every write to any resource."""
        self._all_listeners.append(listener)

    def watch(self, resource: str, watcher: Watcher, since: int | None) -> None:
        """Start a watch after version `since` (None: now). Raises ApiRefusal 410 if too old."""
        table = self._table(resource)
        if since is not None:
            if since < table.oldest:
                raise status.expired(since, table.oldest)
            for change in table.history:
                if change.item.version > since:
                    watcher.offer(change)
        table.watchers.add(watcher)

    def unwatch(self, resource: str, watcher: Watcher) -> None:
        """End a watch."""
        self._table(resource).watchers.discard(watcher)

    def drop(self, resource: str) -> None:
        """Forget a resource that is served no more: its watches are cut."""
        table = self._table(resource)
        table.items.clear()
        table.history.clear()
        table.order, table.oldest = None, self.version
        for watcher in table.watchers:
            watcher.closed = True
            watcher.wake.set()

    def reset_start(self, version: int) -> None:
        """After `restore`: versions go on from `version`, and nothing older can be watched."""
        self.version = self._start = max(self.version, version)
        for table in self._tables.values():
            table.oldest = self._start


def decode(data: bytes) -> Any:
    """JSON to plain objects. Raises ApiRefusal 400."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise status.bad_request(f"couldn't read the request body: {error}") from error
