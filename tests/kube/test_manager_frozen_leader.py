"""A leader that freezes exactly between its decision and its write, and thaws under another.

The leader's API client is handed in, and is one that stops before a chosen write; all else is
real. Its leadership check has already passed by then, so only the API server can stop it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from lbctl import errors
from lbctl.core import names
from lbctl.kube.client import MERGE, Client
from lbctl.lab.cluster.handle import Cluster
from tests.kube.manager_parts import Replica, Site, Timing, connect, until

pytestmark = pytest.mark.alone
LEASE: Timing = {"lease_duration_s": 3.0, "renew_deadline_s": 2.0, "retry_period_s": 0.3}


class Freezing(Client):
    """Stops before a write that `freezes` chooses, until `thaw` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.freeze_on = ""
        self.frozen = asyncio.Event()
        self.thaw = asyncio.Event()
        self.outcomes: list[str] = []

    async def _maybe_freeze(self, what: str) -> None:
        if self.freeze_on and self.freeze_on in what:
            self.freeze_on = ""
            self.frozen.set()
            await self.thaw.wait()

    async def create(self, path: str, body: Mapping[str, Any]) -> Any:
        await self._maybe_freeze(f"create {path}")
        return await self._noted(super().create(path, body), f"create {path}")

    async def patch(self, path: str, body: Any, content_type: str = MERGE) -> Any:
        await self._maybe_freeze(f"patch {path}")
        return await self._noted(super().patch(path, body, content_type), f"patch {path}")

    async def _noted(self, call: Any, what: str) -> Any:
        try:
            answer = await call
        except Exception as error:
            self.outcomes.append(f"{what}: {type(error).__name__}")
            raise
        self.outcomes.append(f"{what}: ok")
        return answer


class Frozen(Freezing):
    """As `Freezing`; its write outlives its task's cancellation, as in a frozen process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.late: asyncio.Task[Any] | None = None

    async def create(self, path: str, body: Mapping[str, Any]) -> Any:
        if self.freeze_on and self.freeze_on in f"create {path}":
            self.late = asyncio.create_task(super().create(path, body))
            return await asyncio.shield(self.late)
        return await super().create(path, body)

    async def patch(self, path: str, body: Any, content_type: str = MERGE) -> Any:
        if self.freeze_on and self.freeze_on in f"patch {path}":
            self.late = asyncio.create_task(super().patch(path, body, content_type))
            return await asyncio.shield(self.late)
        return await super().patch(path, body, content_type)


async def _thaw(writer: Frozen) -> str:
    """Let the frozen write go on; what became of it."""
    assert writer.late is not None
    before = len(writer.outcomes)
    writer.thaw.set()
    await asyncio.wait([writer.late], timeout=60)
    assert writer.late.done(), "the thawed write did not end in 60 s"
    assert isinstance(writer.late.exception(), errors.Conflict)
    return writer.outcomes[before]


async def test_frozen_before_creating_the_eip(cluster: Cluster) -> None:
    async with connect(cluster) as client:
        site = Site(client)
        await site.open("198.51.100.1/32")
        try:
            await _frozen_before_create(cluster, site)
        finally:
            await site.close()


async def _frozen_before_create(cluster: Cluster, site: Site) -> None:
    writer = connect(cluster, Frozen)
    assert isinstance(writer, Frozen)
    writer.freeze_on = "create /apis/lbctl.io/v1/eips"
    async with Replica(cluster, site, "one", writer, **LEASE).running() as one:
        await until("one to lead", one.elector.is_leader)
        await site.add("first")
        await until("one to be about to write", writer.frozen.is_set)
        assert one.elector.is_leader() and not await site.eips()
        # Frozen: one renews no more. Its own clock would say so, but it is past that check.
        one.client.url = "http://127.0.0.1:9"
        async with Replica(cluster, site, "two", **LEASE).running() as two:
            two.living = {"two"}
            # The first Service is gone by the time that two leads, a second one has come.
            await _strip_and_delete(site, "first")
            await site.add("second")
            await until("two to lead", two.elector.is_leader)
            assert await site.address("second") == "198.51.100.1"
            assert await _thaw(writer) == "create /apis/lbctl.io/v1/eips: Conflict"
            eips = await site.eips()
            assert eips["198.51.100.1"].owner.name == "second"
            second = await site.service("second")
            assert second is not None and str(second.ingress[0]) == "198.51.100.1"
            assert await site.service("first") is None


async def _strip_and_delete(site: Site, name: str) -> None:
    """Delete a Service and its finalizer, as an administrator in a hurry does."""
    path = f"/api/v1/namespaces/{site.namespace}/services/{name}"
    await site.client.patch(path, {"metadata": {"finalizers": None}})
    await site.client.delete(path)


async def test_frozen_before_writing_the_status(cluster: Cluster) -> None:
    async with connect(cluster) as client:
        site = Site(client)
        await site.open("198.51.100.2/32")
        try:
            await _frozen_before_status(cluster, site)
        finally:
            await site.close()


async def _frozen_before_status(cluster: Cluster, site: Site) -> None:
    writer = connect(cluster, Frozen)
    assert isinstance(writer, Frozen)
    writer.freeze_on = "/status"
    async with Replica(cluster, site, "one", writer, **LEASE).running() as one:
        await until("one to lead", one.elector.is_leader)
        await site.add("web")
        await until("one to be about to write", writer.frozen.is_set)
        assert (await site.eips())["198.51.100.2"].owner.name == "web"
        one.client.url = "http://127.0.0.1:9"
        async with Replica(cluster, site, "two", **LEASE).running() as two:
            two.living = {"two"}
            await until("two to lead", two.elector.is_leader)
            # What exists is restored, not given anew; then the Service goes, its address with it.
            assert await site.address("web") == "198.51.100.2"
            await site.delete("web")
            await _give_back(site, two)
            await site.add("other")
            assert await site.address("other") == "198.51.100.2"
            await site.add("web")  # the same name again, for which there is no address
            assert (await _thaw(writer)).endswith("/status: Conflict")
            web = await site.service("web")
            assert web is not None and not web.ingress
            assert set(await site.eips()) == {"198.51.100.2"}
            assert names.FINALIZER in (await site.service("other")).finalizers  # type: ignore[union-attr]


async def _give_back(site: Site, replica: Replica) -> None:
    """Be the announcer that withdraws, then wait for the address to be free."""
    async with asyncio.timeout(60):
        while eips := await site.eips():
            for eip in eips.values():
                if eip.phase == "Releasing" and not eip.withdrawn_by:
                    body = {"spec": {"withdrawnBy": {replica.name: "2026-01-01T00:00:00Z"}}}
                    await site.client.patch(f"/apis/lbctl.io/v1/eips/{eip.address}", body)
            await asyncio.sleep(0.1)


async def test_frozen_before_releasing_the_eip(cluster: Cluster) -> None:
    async with connect(cluster) as client:
        site = Site(client)
        await site.open("198.51.100.3/32")
        try:
            await _frozen_before_release(cluster, site)
        finally:
            await site.close()


async def _frozen_before_release(cluster: Cluster, site: Site) -> None:
    """Same Service, same uid, same EIP content: its resourceVersion must tell old from new."""
    writer = connect(cluster, Frozen)
    assert isinstance(writer, Frozen)
    async with Replica(cluster, site, "one", writer, **LEASE).running() as one:
        await site.add("web")
        assert await site.address("web") == "198.51.100.3"
        writer.freeze_on = "patch /apis/lbctl.io/v1/eips"
        path = f"/api/v1/namespaces/{site.namespace}/services/web"
        await site.client.patch(path, {"spec": {"type": "ClusterIP"}})
        await until("one to be about to release", writer.frozen.is_set)
        one.client.url = "http://127.0.0.1:9"
        await site.client.patch(path, {"spec": {"type": "LoadBalancer"}})
        async with Replica(cluster, site, "two", **LEASE).running() as two:
            two.living = {"two"}
            await until("two to lead", two.elector.is_leader)
            assert await site.address("web") == "198.51.100.3"
            assert (await _thaw(writer)).endswith("/198.51.100.3: Conflict")
            assert (await site.eips())["198.51.100.3"].phase == "Bound"
