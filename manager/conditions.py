"""What people read on a Service: condition `lbctl.io/Announced` and Events.

Rules: only the leader writes; a condition is written when its status or reason changes, not for
each change of its text; at most `_PER_S` a second, so that a fault that touches every Service does
not drown the API server. One that is refused waits longer each time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from lbctl import errors
from lbctl.core import names
from lbctl.core.actions import Action, CreateEip, RebindEip, Refused, Told
from lbctl.core.holdings import Decision
from lbctl.core.model import ObjectRef, Service
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.kube import client as api
from lbctl.kube.backoff import Backoff
from lbctl.kube.cache import Cache
from lbctl.kube.client import Client
from lbctl.kube.events import EventRecorder, Subject
from lbctl.kube.values import timestamp
from manager.metrics import Metrics

_PER_S: Final = 100.0
_SETTLE_S: Final = 0.2  # a new Service passes through several states in its first moments
_ACTION: Final = "Condition"  # in the metrics
_log = structlog.get_logger()


class Conditions:
    """Keeps the condition of every Service of ours.

    decision: the allocator's, of a Service. announced: Announced, or why nothing is.
    """

    def __init__(
        self,
        client: Client,
        services: Cache[Service],
        events: EventRecorder,
        is_leader: Callable[[], bool],
        metrics: Metrics,
        decision: Callable[[ObjectRef], Decision | None],
        announced: Callable[[ObjectRef], Reason],
    ) -> None:
        self._client = client
        self._services = services
        self._events = events
        self._is_leader = is_leader
        self._metrics = metrics
        self._decision = decision
        self._announced = announced
        self._dirty: dict[ObjectRef, None] = {}
        # what was written upon which version, for as long as the watch shows no newer one
        self._written: dict[ObjectRef, tuple[str, tuple[str, str, str]]] = {}
        self._waits: dict[ObjectRef, Backoff] = {}
        # refused just now; each is marked again when due
        self._resting: dict[ObjectRef, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()

    def mark(self, ref: ObjectRef) -> None:
        """Something about a Service changed. Cheap; costs nothing while another leads."""
        if self._is_leader():
            self._dirty[ref] = None
            self._wake.set()

    def written(self, action: Action) -> None:
        """An action was carried out: the Event that goes with it."""
        if isinstance(action, Refused | Told):
            uid, warning = action.seen.uid, action.reason is not Reason.OBSERVING
            self._say(action.service, uid, action.reason, action.sentence, warning)
        elif isinstance(action, CreateEip | RebindEip):
            eip, apart = action.eip, action.apart if isinstance(action, CreateEip) else ""
            text = f"{eip.address} of pool {eip.pool}: {apart or SENTENCE[action.reason]}"
            self._say(action.service, eip.uid_of(action.service) or "", action.reason, text)
        self.mark(action.service)

    def _say(
        self, ref: ObjectRef, uid: str, reason: Reason, text: str, warning: bool = False
    ) -> None:
        self._events.emit(Subject("Service", ref, uid), reason, text, warning)

    async def lead(self) -> None:
        """The leader's task. Ends only by cancellation."""
        self._written.clear()
        self._waits.clear()
        while self._resting:
            self._resting.popitem()[1].cancel()
        for ref in self._services.items:
            self.mark(ref)
        while True:
            await self._wake.wait()
            await asyncio.sleep(_SETTLE_S)
            self._wake.clear()
            dirty, self._dirty = self._dirty, {}
            for ref in dirty:
                if ref not in self._resting and await self._update(ref):
                    await asyncio.sleep(1 / _PER_S)

    async def _update(self, ref: ObjectRef) -> bool:
        """Write it if need be; whether the API server was asked."""
        service = self._services.get(ref)
        wanted = self._wanted(ref)
        if service is None or wanted is None or not self._is_leader():
            self._written.pop(ref, None)
            self._waits.pop(ref, None)
            return False
        version, written = self._written.get(ref, ("", None))
        now = written if version == service.version else service.condition
        if now == wanted:
            self._waits.pop(ref, None)
            return False
        try:
            await self._write(ref, wanted, anew=now is None or now[0] != wanted[0])
        except errors.KubeError as error:
            self._refused(ref, error)
            return True
        self._metrics.writes.labels(_ACTION, "ok").inc()
        self._waits.pop(ref, None)
        self._written[ref] = (service.version, wanted)
        _log.info("condition", service=str(ref), status=wanted[0], reason=wanted[1])
        return True

    async def _write(self, ref: ObjectRef, wanted: tuple[str, str, str], anew: bool) -> None:
        """anew: its status is another one than before. Raises KubeError."""
        status, reason, message = wanted
        entry = {
            "type": names.CONDITION_ANNOUNCED,
            "status": status,
            "reason": reason,
            "message": message,
        }
        if anew:
            entry["lastTransitionTime"] = timestamp(time.time())
        path = api.SERVICES.path(ref.namespace, ref.name, "status")
        await self._client.patch(path, {"status": {"conditions": [entry]}}, api.STRATEGIC)

    def _refused(self, ref: ObjectRef, error: errors.KubeError) -> None:
        self._metrics.writes.labels(_ACTION, type(error).__name__).inc()
        if isinstance(error, errors.NotFound):  # the Service is gone
            self._waits.pop(ref, None)
            return
        _log.warning("condition_not_written", service=str(ref), error=str(error))
        wait_s = self._waits.setdefault(ref, Backoff(_SETTLE_S, 30.0)).next_s()
        self._resting[ref] = asyncio.get_running_loop().call_later(wait_s, self._rested, ref)

    def _rested(self, ref: ObjectRef) -> None:
        self._resting.pop(ref, None)
        self.mark(ref)

    def _wanted(self, ref: ObjectRef) -> tuple[str, str, str] | None:
        decision = self._decision(ref)
        service = self._services.get(ref)
        if decision is None or service is None or decision.reason is Reason.OBSERVING:
            return None
        foreign = (Reason.NOT_LOAD_BALANCER, Reason.OTHER_CLASS)
        # Not written before there is a configuration either: it may say `takeover: observe`.
        silent = (*foreign, Reason.WAITING_FOR_CONFIG)
        if decision.reason in silent and service.condition is None:
            return None
        if decision.reason in foreign or not decision.addresses:
            return "False", str(decision.reason), decision.sentence[:1024]
        reason = self._announced(ref)
        if reason is not Reason.ANNOUNCED:
            return "False", str(reason), SENTENCE[reason]
        return "True", str(reason), "the switches have a route to it"
