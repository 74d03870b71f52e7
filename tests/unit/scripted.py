"""A scripted API server in a thread of its own, for faults that a real one cannot be told to have.

It speaks HTTP on loopback: list, watch (with bookmarks), and guarded writes of one collection at a
time. `mode` chooses the fault; it is read at every request and, for watches, ten times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any

from aiohttp import web


class Scripted:
    """Objects by path; each change gets the next resourceVersion."""

    def __init__(self) -> None:
        self.mode = "normal"  # hang, gone, gone-http, silent, reset, error, garbage
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.objects: dict[str, dict[str, dict[str, Any]]] = {}
        self.log: list[tuple[str, str, dict[str, Any]]] = []
        self.version = 100
        self.oldest = 0
        self.url = ""
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> Scripted:
        self._thread.start()
        assert self._started.wait(30), "the scripted server did not start in 30 s"
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the scripted server did not stop in 30 s"

    def put(self, collection: str, name: str, body: dict[str, Any], raw_meta: Any = None) -> None:
        """Create or change an object, as somebody else would."""
        with self._lock:
            known = self.objects.setdefault(collection, {})
            kind = "MODIFIED" if name in known else "ADDED"
            self.version += 1
            meta = {"name": name, **(body.get("metadata") or {})}
            made = {**body, "metadata": {**meta, "resourceVersion": str(self.version)}}
            known[name] = made
            self.log.append((kind, collection, made))

    def remove(self, collection: str, name: str) -> None:
        """Delete an object."""
        with self._lock:
            self.version += 1
            gone = self.objects[collection].pop(name)
            gone["metadata"]["resourceVersion"] = str(self.version)
            self.log.append(("DELETED", collection, gone))

    def forget_history(self) -> None:
        """From now on, watches from before this instant get 410."""
        with self._lock:
            self.oldest = self.version
            self.log.clear()

    def count(self, what: str) -> int:
        """Requests so far: "list", "watch", "GET", "PUT", "POST"."""
        return sum(1 for kind, _, _ in self.requests if kind == what)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        watch = request.query.get("watch") == "true"
        name = request.path.rsplit("/", 1)[1]
        known = any(request.path.startswith(c + "/") for c in self.objects)
        is_list = request.method == "GET" and not watch and not known
        kind = "watch" if watch else "list" if is_list else request.method
        self.requests.append((kind, request.path, dict(request.query)))
        if self.mode == "hang":
            await asyncio.sleep(3600)
        if self.mode == "reset":
            assert request.transport is not None
            request.transport.abort()
        if self.mode == "error":
            return _status(500, "the scripted server is told to fail")
        if watch:
            return await self._watch(request)
        if is_list:
            items = list(self.objects.get(request.path, {}).values())
            return web.json_response(
                {"metadata": {"resourceVersion": str(self.version)}, "items": items}
            )
        collection = request.path.rsplit("/", 1)[0] if known else request.path
        return await self._object(request, collection, name)

    async def _object(self, request: web.Request, collection: str, name: str) -> web.StreamResponse:
        known = self.objects.setdefault(collection, {})
        if request.method == "POST":
            body = await request.json()
            name = body["metadata"]["name"]
            if name in known:
                return _status(409, "already exists")
            self.put(collection, name, body)
        elif name not in known:
            return _status(404, "not found")
        elif request.method == "PUT":
            body = await request.json()
            if (
                body["metadata"].get("resourceVersion")
                != known[name]["metadata"]["resourceVersion"]
            ):
                return _status(409, "changed since")
            self.put(collection, name, body)
        return web.json_response(known[name])

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if self.mode == "gone-http":
            return _status(410, "too old")
        response = web.StreamResponse()
        await response.prepare(request)
        since = int(request.query["resourceVersion"])
        ends = asyncio.get_running_loop().time() + float(request.query["timeoutSeconds"])
        sent = 0
        while asyncio.get_running_loop().time() < ends or self.mode == "silent":
            if self.mode == "gone" or since < self.oldest:
                await response.write(_line("ERROR", {"code": 410, "message": "too old"}))
                return response
            if self.mode == "garbage":
                await response.write(b'{"type": "ADDED", "object": {"metadata"\n')
            if self.mode == "end":
                return response
            if self.mode == "normal":
                for kind, collection, made in self.log[sent:]:
                    version = int(made["metadata"]["resourceVersion"])
                    if collection == request.path and version > since:
                        await response.write(_line(kind, made))
                sent = len(self.log)
            await asyncio.sleep(0.02)
        with contextlib.suppress(ConnectionError):
            bookmark = {"metadata": {"resourceVersion": str(self.version)}}
            await response.write(_line("BOOKMARK", bookmark))
        return response


def _line(kind: str, body: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": body}).encode() + b"\n"


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)
