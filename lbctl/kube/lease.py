"""Leader election on a Lease (coordination.k8s.io/v1), with client-go's timing: 15/10/2 s.

Rules: time is the monotonic clock; another's lease runs out when *we* have seen it unchanged for
its whole duration, so clocks need not agree. Leadership ends `renew_deadline_s` after the last
renewal was *sent*, 5 s before anyone else may take it, even while a request hangs. `is_leader()`
is asked before every write. Whatever happens, the work is cancelled and `on_change(False)`
is called.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from lbctl import errors
from lbctl.core import names
from lbctl.kube import client as api
from lbctl.kube.values import timestamp

_log = structlog.get_logger()
_REQUEST_SHARE: Final = 0.4  # of the renew deadline: a hung request leaves time for another


class LeaderElector:
    """One candidate. `identity` must differ between candidates, restarts included.

    lease_duration_s, renew_deadline_s, retry_period_s: client-go's, in that order descending.
    on_change(leading) is called in the event loop at each change, and must be quick.
    """

    def __init__(
        self,
        client: api.Client,
        identity: str,
        *,
        name: str = names.LEASE,
        namespace: str = names.NAMESPACE,
        lease_duration_s: float = 15.0,
        renew_deadline_s: float = 10.0,
        retry_period_s: float = 2.0,
        on_change: Callable[[bool], None] | None = None,
    ) -> None:
        if not lease_duration_s > renew_deadline_s > retry_period_s > 0:
            raise ValueError("lease duration > renew deadline > retry period > 0")
        self._client = client
        self.identity = identity
        self._collection = api.LEASES.path(namespace)
        self._path = api.LEASES.path(namespace, name)
        self._name = name
        self._duration_s = lease_duration_s
        self._deadline_s = renew_deadline_s
        self._retry_s = retry_period_s
        self._on_change = on_change
        self._valid_until_s = -1.0
        self._seen: tuple[str, float] = ("", -1.0)  # another's lease as last seen, and when
        self.holder = ""  # who led when we last looked

    def is_leader(self) -> bool:
        """Whether a write may still be made, by the monotonic clock alone."""
        return time.monotonic() < self._valid_until_s

    async def run(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Stand for election for ever; while leading, `lead()` runs as a task.

        If `lead()` raises, the lease is released and the exception is passed on. On cancellation
        the lease is released too.
        """
        while True:
            await self._acquire()
            await self._reign(lead)

    async def _acquire(self) -> None:
        while True:
            if await self._try():
                return
            await asyncio.sleep(self._retry_s)

    async def _reign(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        _log.info("leading", identity=self.identity)
        self._tell(True)
        work = asyncio.create_task(lead(), name="lead")
        try:
            await self._hold(work)
        finally:
            self._valid_until_s = -1.0
            self._tell(False)
            work.cancel()
            _log.warning("stopped_leading", identity=self.identity)
            await asyncio.wait([work])
            await self._release()
        if not work.cancelled():
            work.result()

    async def _hold(self, work: asyncio.Task[None]) -> None:
        """Renew until the deadline passes unrenewed, another holds the lease, or the work ends."""
        while not work.done():
            left = self._valid_until_s - time.monotonic()
            if left <= 0:
                return
            await asyncio.wait([work], timeout=min(self._retry_s, left))
            if work.done():
                return
            left = self._valid_until_s - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left)):
                    renewed = await self._try()
            except TimeoutError:
                return
            if not renewed and self.holder not in ("", self.identity):
                return

    async def _try(self) -> bool:
        """One attempt to take or renew the lease. Never raises a `KubeError`."""
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(self._deadline_s * _REQUEST_SHARE):
                taken = await self._take()
        except TimeoutError:
            _log.warning("lease_timeout", identity=self.identity)
            return False
        except errors.Conflict:
            return False
        except errors.KubeError as error:
            _log.warning("lease_error", identity=self.identity, error=str(error))
            return False
        if taken:
            self.holder = self.identity
            self._valid_until_s = sent_s + self._deadline_s
        return taken

    async def _take(self) -> bool:
        try:
            lease = await self._client.get(self._path)
        except errors.NotFound:
            await self._client.create(self._collection, self._body({}, 0))
            return True
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        self.holder = holder
        if holder not in ("", self.identity) and not self._expired(lease, spec):
            return False
        changes = int(spec.get("leaseTransitions") or 0) + (holder != self.identity)
        body = self._body(lease.get("metadata") or {}, changes)
        if holder == self.identity and spec.get("acquireTime"):
            body["spec"]["acquireTime"] = spec["acquireTime"]
        await self._client.replace(self._path, body)
        return True

    def _expired(self, lease: dict[str, Any], spec: dict[str, Any]) -> bool:
        version = str((lease.get("metadata") or {}).get("resourceVersion"))
        now = time.monotonic()
        if self._seen[0] != version:
            self._seen = (version, now)
        duration = float(spec.get("leaseDurationSeconds") or self._duration_s)
        return now - self._seen[1] > duration

    def _body(self, metadata: dict[str, Any], transitions: int) -> dict[str, Any]:
        now = timestamp(time.time(), micro=True)
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {**metadata, "name": self._name},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": max(1, round(self._duration_s)),
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }

    async def _release(self) -> None:
        """Give the lease back, if it is still ours; a second's delay for others instead of 15."""
        try:
            async with asyncio.timeout(min(2.0, self._deadline_s * _REQUEST_SHARE)):
                lease = await self._client.get(self._path)
                spec = lease.get("spec") or {}
                if spec.get("holderIdentity") != self.identity:
                    return
                spec["holderIdentity"] = ""
                spec["leaseDurationSeconds"] = 1
                await self._client.replace(self._path, lease)
        except (errors.KubeError, TimeoutError) as error:
            _log.info("lease_not_released", identity=self.identity, error=str(error))

    def _tell(self, leading: bool) -> None:
        if self._on_change is not None:
            self._on_change(leading)
