"""Kubernetes Events, deduplicated: for people who run `kubectl describe`.

Rules: `emit` never blocks and never fails; Events are a courtesy, so they are dropped when the
queue is full or the API server is away. The same (object, reason, message) has one name on every
replica and after every restart: it exists once, and its count is raised at most every `repeat_s`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import structlog

from lbctl import errors
from lbctl.core.model import ObjectRef
from lbctl.kube import client as api
from lbctl.kube.values import timestamp

_log = structlog.get_logger()
_REMEMBER: Final = 4096
_MESSAGE_LIMIT: Final = 1024  # the API server's own limit for an Event's message


@dataclass(frozen=True, slots=True)
class Subject:
    """What an Event is about. `ref.namespace` is empty for cluster-scoped objects."""

    kind: str
    ref: ObjectRef
    uid: str = ""
    api: str = "v1"


@dataclass(frozen=True, slots=True)
class _Notice:
    subject: Subject
    reason: str
    message: str
    warning: bool


class EventRecorder:
    """Writes Events from a queue. Start `run()` as a task."""

    def __init__(
        self, client: api.Client, component: str, instance: str, repeat_s: float = 60.0
    ) -> None:
        self._client = client
        self._component = component
        self._instance = instance
        self._repeat_s = repeat_s
        self._queue: asyncio.Queue[_Notice] = asyncio.Queue(maxsize=1000)
        self._last: OrderedDict[_Notice, float] = OrderedDict()
        self.dropped = 0

    def emit(self, subject: Subject, reason: str, message: str, warning: bool = False) -> None:
        """Say something about an object. reason: UpperCamelCase; message: a sentence or lines."""
        notice = _Notice(subject, reason, message[:_MESSAGE_LIMIT], warning)
        now = time.monotonic()
        last = self._last.get(notice)
        if last is not None and now - last < self._repeat_s:
            return
        self._last[notice] = now
        self._last.move_to_end(notice)
        if len(self._last) > _REMEMBER:
            self._last.popitem(last=False)
        try:
            self._queue.put_nowait(notice)
        except asyncio.QueueFull:
            self.dropped += 1

    async def run(self) -> None:
        """Write for ever; ends only by cancellation."""
        while True:
            notice = await self._queue.get()
            try:
                await self._write(notice)
            except errors.KubeError as error:
                self.dropped += 1
                self._last.pop(notice, None)
                _log.info("event_dropped", reason=notice.reason, error=str(error))

    async def _write(self, notice: _Notice) -> None:
        namespace = notice.subject.ref.namespace or "default"
        body = self._body(notice, namespace)
        name = body["metadata"]["name"]
        try:
            await self._client.create(api.EVENTS.path(namespace), body)
        except errors.Conflict:
            path = api.EVENTS.path(namespace, name)
            known = await self._client.get(path)
            again = {
                "count": int(known.get("count") or 1) + 1,
                "lastTimestamp": body["lastTimestamp"],
            }
            await self._client.patch(path, again)

    def _body(self, notice: _Notice, namespace: str) -> dict[str, Any]:
        subject = notice.subject
        text = "\0".join((subject.kind, subject.uid, notice.reason, notice.message))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        now = timestamp(time.time())
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{subject.ref.name[:200]}.{digest}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": subject.api,
                "kind": subject.kind,
                "name": subject.ref.name,
                **({"namespace": subject.ref.namespace} if subject.ref.namespace else {}),
                **({"uid": subject.uid} if subject.uid else {}),
            },
            "reason": notice.reason,
            "message": notice.message,
            "type": "Warning" if notice.warning else "Normal",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": self._component, "host": self._instance},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
        }
