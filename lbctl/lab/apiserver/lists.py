"""Lists and watches over HTTP: selectors, pages, bookmarks, tables, timeouts.

A list of stored JSON is joined, not encoded. Pages come from a snapshot that is kept for a while,
so that they show one moment. A watch writes whatever is pending in one go.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec
from aiohttp import web

from lbctl.errors import ApiRefusal
from lbctl.lab.apiserver import selectors, status, tables
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.store import Item, Match, Store, Watcher, event_line

_BOOKMARK_S: Final = 30.0  # at least this often, if asked for
_BEFORE_END_S: Final = 2.0  # and this long before the server ends the watch
_DEFAULT_TIMEOUT_S: Final = 2400.0
_SNAPSHOTS: Final = 64
_INITIAL_END: Final = "k8s.io/initial-events-end"


@dataclass(frozen=True, slots=True)
class Query:
    """What a list or a watch asks for. `table` is set when a Table is accepted: includeObject."""

    resource: Resource
    namespace: str | None
    match: Match | None
    version: str
    version_match: str
    limit: int
    next_page: str
    table: str | None
    bookmarks: bool
    initial: bool | None
    timeout_s: float


def parse(resource: Resource, namespace: str, query: Mapping[str, str], accept: str) -> Query:
    """The query of a request. Raises ApiRefusal 400."""
    labels = selectors.parse_labels(query.get("labelSelector", ""))
    fields = selectors.parse_fields(query.get("fieldSelector", ""), resource)
    initial = query.get("sendInitialEvents")
    try:
        limit = int(query.get("limit") or 0)
        timeout = float(query.get("timeoutSeconds") or 0)
        version = query.get("resourceVersion", "")
        if version:
            int(version)
    except ValueError as error:
        raise status.bad_request(f"not a number in the query: {error}") from error
    return Query(
        resource=resource,
        namespace=namespace or None,
        match=selectors.both(labels, fields),
        version=version,
        version_match=query.get("resourceVersionMatch", ""),
        limit=limit,
        next_page=query.get("continue", ""),
        table=query.get("includeObject", "Metadata") if "as=Table" in accept else None,
        bookmarks=query.get("allowWatchBookmarks") in {"true", "1"},
        initial=None if initial is None else initial in {"true", "1"},
        timeout_s=timeout or _DEFAULT_TIMEOUT_S,
    )


@dataclass(slots=True)
class _Snapshot:
    items: list[Item]
    version: int


class Lists:
    """Answers lists; holds the snapshots of those that come in pages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._snapshots: OrderedDict[str, _Snapshot] = OrderedDict()

    def answer(self, query: Query) -> bytes:
        """The body of a list. Raises ApiRefusal 410 or 504."""
        if query.next_page:
            token, start = self._resume(query.next_page)
            snapshot = self._snapshots.get(token)
            if snapshot is None:
                raise status.continue_expired()
        else:
            self._check_version(query)
            token, start = secrets.token_hex(8), 0
            snapshot = _Snapshot(self._select(query), self._store.version)
        meta: Obj = {"resourceVersion": str(snapshot.version)}
        page = snapshot.items[start:]
        if query.limit and len(page) > query.limit:
            page = page[: query.limit]
            end = start + query.limit
            meta["continue"] = self._keep(token, snapshot, end)
            if query.match is None:
                meta["remainingItemCount"] = len(snapshot.items) - end
        return encode_list(query, page, meta)

    def _select(self, query: Query) -> list[Item]:
        items = self._store.items(query.resource.key, query.namespace)
        if query.match is None:
            return items
        return [item for item in items if query.match(item.obj)]

    def _check_version(self, query: Query) -> None:
        wanted, current = int(query.version or 0), self._store.version
        if wanted > current:
            raise status.too_large_version(wanted, current)
        if query.version_match == "Exact" and wanted and wanted != current:
            raise status.expired(wanted, current)

    def _keep(self, token: str, snapshot: _Snapshot, start: int) -> str:
        self._snapshots[token] = snapshot
        self._snapshots.move_to_end(token)
        while len(self._snapshots) > _SNAPSHOTS:
            self._snapshots.popitem(last=False)
        return base64.urlsafe_b64encode(f"{token}:{start}".encode()).rstrip(b"=").decode()

    def _resume(self, text: str) -> tuple[str, int]:
        try:
            plain = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
            token, _, start = plain.partition(":")
            return token, int(start)
        except ValueError as error:
            raise status.bad_request(f"continue key is not valid: {error}") from error


def encode_list(query: Query, items: list[Item], meta: Obj) -> bytes:
    """A list or a Table of stored objects."""
    resource = query.resource
    if query.table is not None:
        shown = tables.table(resource, (item.obj for item in items), meta, query.table)
        return msgspec.json.encode(shown)
    head = {"kind": f"{resource.kind}List", "apiVersion": resource.group_version, "metadata": meta}
    return (
        msgspec.json.encode(head)[:-1]
        + b',"items":['
        + b",".join(item.raw for item in items)
        + b"]}"
    )


async def watch(store: Store, query: Query, request: web.Request) -> web.StreamResponse:
    """Serve a watch until its time is up, the client goes, or it cannot keep up."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.enable_chunked_encoding()
    watcher = Watcher(query.namespace, query.match)
    key = query.resource.key
    try:
        first = _begin(store, query, watcher)
    except ApiRefusal as refusal:
        await response.prepare(request)
        await response.write(event_line("ERROR", msgspec.json.encode(refusal.status)))
        return response
    try:
        await response.prepare(request)
        if first:
            await response.write(first)
        await _stream(store, query, watcher, response)
    except ConnectionResetError:
        pass  # the client went away
    finally:
        store.unwatch(key, watcher)
    return response


def _begin(store: Store, query: Query, watcher: Watcher) -> bytes:
    """Register the watcher; the events that come first (what exists now, if asked for)."""
    key = query.resource.key
    wants_state = query.version in {"", "0"} if query.initial is None else query.initial
    if not wants_state:
        since = int(query.version) if query.version not in {"", "0"} else None
        store.watch(key, watcher, since)
        return b""
    store.watch(key, watcher, None)
    lines = []
    encode = _Encoder(query)
    for item in store.items(key, query.namespace):
        if query.match is None or query.match(item.obj):
            lines.append(encode("ADDED", item, event_line("ADDED", item.raw)))
    if query.initial and query.bookmarks:
        lines.append(_bookmark(store, query, {_INITIAL_END: "true"}))
    return b"".join(lines)


class _Encoder:
    """Encodes events; a Table's columns are sent once."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._first = True

    def __call__(self, event: str, item: Item, line: bytes) -> bytes:
        if self._query.table is None:
            return line
        meta = {"resourceVersion": item.obj["metadata"]["resourceVersion"]}
        shown = tables.table(self._query.resource, [item.obj], meta, self._query.table)
        if not self._first:
            shown["columnDefinitions"] = []
        self._first = False
        return event_line(event, msgspec.json.encode(shown))


def _bookmark(store: Store, query: Query, annotations: dict[str, str] | None = None) -> bytes:
    meta: Obj = {"resourceVersion": str(store.version), "creationTimestamp": None}
    if annotations:
        meta["annotations"] = annotations
    resource = query.resource
    obj = {"kind": resource.kind, "apiVersion": resource.group_version, "metadata": meta}
    if query.table is not None:
        obj = tables.table(resource, (), meta, query.table)
    return event_line("BOOKMARK", msgspec.json.encode(obj))


async def _stream(
    store: Store, query: Query, watcher: Watcher, response: web.StreamResponse
) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + query.timeout_s
    marks = [end - _BEFORE_END_S] if query.timeout_s > _BEFORE_END_S else []
    mark = min([loop.time() + _BOOKMARK_S, *marks])
    encode = _Encoder(query)
    while not watcher.closed:
        until = min(end, mark) if query.bookmarks else end
        try:
            async with asyncio.timeout_at(until):
                await watcher.wake.wait()
        except TimeoutError:
            if loop.time() >= end:
                return
            await response.write(_bookmark(store, query))
            later = loop.time() + _BOOKMARK_S
            mark = min([later, *(m for m in marks if m > loop.time())])
            continue
        watcher.wake.clear()
        pending = [watcher.pending.popleft() for _ in range(len(watcher.pending))]
        if pending:
            await response.write(b"".join(encode(*entry) for entry in pending))
