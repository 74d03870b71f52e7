"""A small client for the API server, for the lab's kubelet alone: plain dictionaries, aiohttp.

It connects from inside a machine's network namespace, so that a node that is cut off cannot renew
its lease. Third-party errors become `lbctl.errors`; every call has a limit.
Source: https://kubernetes.io/docs/reference/using-api/api-concepts/ (list, watch, bookmarks, 410).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket as sockets
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import aiohttp
import structlog

from lbctl import errors
from lbctl.lab.kubelet import linux

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
_LIMIT_S: Final = 10.0
_WATCH_S: Final = 50  # short, so that a connection whose far end lost power is not waited for long
_SILENT_S: Final = _WATCH_S + 10
_BACKOFF_S: Final = (0.05, 0.2, 0.5, 1.0, 2.0)
MERGE: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
_BY_STATUS: Final[dict[int, type[errors.KubeError]]] = {
    401: errors.Forbidden,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    410: errors.Gone,
    429: errors.Unreachable,
}


def path(plural: str, namespace: str = "", name: str = "", group: str = "v1") -> str:
    """URL path of a resource; `group` is `v1` or `GROUP/VERSION`."""
    root = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    scope = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{scope}/{plural}" + (f"/{name}" if name else "")


class Api:
    """One connection pool to the API server. Use as an async context manager."""

    def __init__(self, url: str, ca_file: Path, token: str, netns: Path | None = None) -> None:
        """netns: file of the network namespace to connect from (None: the caller's)."""
        self._url = url
        self._tls = ssl.create_default_context(cafile=str(ca_file))
        self._token = token
        self._netns = netns
        self._fds: tuple[int, int] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        if self._netns is not None:
            self._fds = (
                os.open(self._netns, os.O_RDONLY | os.O_CLOEXEC),
                os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC),
            )
        connector = aiohttp.TCPConnector(
            ssl=self._tls, limit=0, socket_factory=self._socket, enable_cleanup_closed=False
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"Authorization": f"Bearer {self._token}"},
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
        for fd in self._fds or ():
            os.close(fd)
        self._fds = None

    def socket(self, family: int, kind: int, protocol: int = 0) -> sockets.socket:
        """A socket in this client's network namespace."""
        if self._fds is None:
            return sockets.socket(family, kind, protocol)
        with linux.inside(*self._fds):
            return sockets.socket(family, kind, protocol)

    def _socket(self, info: Any) -> sockets.socket:
        family, kind, protocol, _, _ = info
        return self.socket(family, kind, protocol)

    async def request(
        self,
        method: str,
        url: str,
        body: Object | list[Object] | None = None,
        kind: str = "application/json",
    ) -> Object:
        """One call; the decoded answer. Raises a KubeError."""
        assert self._session is not None
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": kind} if data is not None else {}
        limit = aiohttp.ClientTimeout(total=_LIMIT_S)
        try:
            async with self._session.request(
                method, self._url + url, data=data, headers=headers, timeout=limit
            ) as answer:
                text = await answer.read()
                if answer.status >= 400:
                    raise _error(method, url, answer.status, text)
                return _object(text)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise errors.Unreachable(f"{method} {url}: {error!r}") from error

    async def get(self, url: str) -> Object:
        """GET."""
        return await self.request("GET", url)

    async def create(self, url: str, body: Object) -> Object:
        """POST to a collection or a subresource."""
        return await self.request("POST", url, body)

    async def patch(self, url: str, body: Object, kind: str = MERGE) -> Object:
        """PATCH, a merge patch unless told otherwise."""
        return await self.request("PATCH", url, body, kind)

    async def delete(self, url: str, body: Object | None = None) -> Object:
        """DELETE."""
        return await self.request("DELETE", url, body)

    async def stream(self, url: str, event: Callable[[Object], None]) -> None:
        """Watch until the server ends it. Raises a KubeError, Gone for a stale version."""
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=None, sock_connect=_LIMIT_S, sock_read=_SILENT_S)
        try:
            async with self._session.get(self._url + url, timeout=limit) as answer:
                if answer.status >= 400:
                    raise _error("WATCH", url, answer.status, await answer.read())
                rest = b""
                async for chunk in answer.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in filter(None, lines):
                        event(_object(line))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise errors.Unreachable(f"WATCH {url}: {error!r}") from error


def _object(text: bytes) -> Object:
    try:
        decoded = json.loads(text) if text else {}
    except ValueError as error:
        raise errors.KubeError(f"not JSON from the API server: {text[:200]!r}") from error
    return decoded if isinstance(decoded, dict) else {}


def _error(method: str, url: str, status: int, text: bytes) -> errors.KubeError:
    try:
        message = str(json.loads(text).get("message", ""))
    except (ValueError, AttributeError):
        message = text[:200].decode(errors="replace")
    kind = _BY_STATUS.get(status, errors.Unreachable if status >= 500 else errors.KubeError)
    return kind(f"{method} {url}: {status} {message}")


class Reflector:
    """A copy of one collection, kept by list and watch.

    `objects` is keyed by (namespace, name). `changed(key, object)` is called for each change, with
    None when the object is gone. `run` never returns; what it cannot reach it tries again.
    """

    def __init__(
        self, api: Api, url: str, changed: Callable[[tuple[str, str], Object | None], None]
    ) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.synced = asyncio.Event()
        self._api = api
        self._url = url
        self._changed = changed
        self._version = ""

    async def run(self) -> None:
        """List and watch for ever."""
        failures = 0
        while True:
            try:
                if not self._version:
                    await self._list()
                failures = 0
                await self._api.stream(
                    f"{self._url}?watch=1&allowWatchBookmarks=true&timeoutSeconds={_WATCH_S}"
                    f"&resourceVersion={self._version}",
                    self._event,
                )
            except errors.Gone:
                self._version = ""
            except errors.KubeError as error:
                if failures == 0:
                    _log.info("watch_lost", url=self._url, error=str(error))
                failures += 1
            except Exception:  # noqa: BLE001 - a task root: one odd answer must not end the daemon
                _log.exception("watch_broken", url=self._url)
                failures += 1
                self._version = ""
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    async def _list(self) -> None:
        answer = await self._api.get(self._url)
        fresh = {_key(item): item for item in answer.get("items") or []}
        for key in sorted(self.objects.keys() - fresh.keys()):
            del self.objects[key]
            self._changed(key, None)
        for key, item in sorted(fresh.items()):
            known = self.objects.get(key)
            self.objects[key] = item
            if known is None or _version(known) != _version(item):
                self._changed(key, item)
        self._version = str(answer["metadata"]["resourceVersion"])
        self.synced.set()

    def _event(self, event: Object) -> None:
        item: Object = event.get("object") or {}
        if event.get("type") == "ERROR":
            self._version = ""
            raise errors.Gone(str(item.get("message", "the watch ended with an error")))
        self._version = _version(item) or self._version
        if event.get("type") == "BOOKMARK":
            return
        key = _key(item)
        if event.get("type") == "DELETED":
            self.objects.pop(key, None)
            self._changed(key, None)
        else:
            self.objects[key] = item
            self._changed(key, item)


def _key(item: Object) -> tuple[str, str]:
    meta = item["metadata"]
    return str(meta.get("namespace", "")), str(meta["name"])


def _version(item: Object) -> str:
    return str(item.get("metadata", {}).get("resourceVersion", ""))
