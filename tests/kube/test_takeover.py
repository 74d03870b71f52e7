"""`takeover: observe` and `adopt` on a cluster where another controller gave addresses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lbctl.core import names
from lbctl.core.model import ObjectRef
from lbctl.core.reasons import Reason
from lbctl.kube import client as api
from lbctl.lab.cluster.handle import Cluster
from tests.kube.manager_parts import (
    Replica,
    Site,
    Timing,
    configuration,
    connect,
    eventually,
    until,
)

pytestmark = pytest.mark.alone
LEASE: Timing = {"lease_duration_s": 3.0, "renew_deadline_s": 2.0, "retry_period_s": 0.3}
POOL = "198.51.100.16/30"


def stage(takeover: str, *more: str) -> str:
    return configuration(POOL, *more) + f"takeover: {takeover}\n"


@pytest.fixture
async def site(cluster: Cluster) -> AsyncIterator[Site]:
    async with connect(cluster) as client:
        made = Site(client)
        await made.open(POOL)
        try:
            yield made
        finally:
            await made.close()


@contextlib.asynccontextmanager
async def leader(cluster: Cluster, site: Site) -> AsyncIterator[Replica]:
    async with Replica(cluster, site, "one", **LEASE).running() as replica:
        await until("one to lead", replica.elector.is_leader)
        yield replica


async def give(site: Site, ref: ObjectRef, *addresses: str) -> None:
    """What the other controller does."""
    path = api.SERVICES.path(ref.namespace, ref.name, "status")
    ingress = [{"ip": address} for address in addresses]
    await site.client.patch(path, {"status": {"loadBalancer": {"ingress": ingress}}})


async def raw(site: Site, ref: ObjectRef) -> dict[str, Any]:
    """The whole object."""
    found: dict[str, Any] = await site.client.get(api.SERVICES.path(ref.namespace, ref.name))
    return found


async def says(one: Replica, ref: ObjectRef, text: str) -> None:
    """Wait until the decision about a Service holds a text."""

    def there() -> bool:
        found = one.allocating.decision(ref)
        return found is not None and text in found.sentence

    await until(f"{text!r} about {ref}", there)


async def test_observe_writes_nothing_and_adopt_keeps_everything(
    cluster: Cluster, site: Site
) -> None:
    await site.configure(stage("observe"))
    old = await site.add("old")
    await give(site, old, "198.51.100.18")
    asks = await site.add("asks", loadBalancerIP="198.51.100.19")
    await give(site, asks, "198.51.100.17")
    outside = await site.add("outside")
    await give(site, outside, "203.0.113.9")
    new = await site.add("new")
    before = {ref: await raw(site, ref) for ref in (old, asks, outside, new)}
    async with leader(cluster, site) as one:
        await says(one, old, "would keep 198.51.100.18")
        await says(one, asks, "would keep 198.51.100.17")
        await says(one, outside, "would stay at 203.0.113.9, which is not ours")
        await says(one, new, "would get 198.51.100.16")
        # The other controller is still at it: what it does is seen, and never undone.
        await give(site, new, "198.51.100.16")
        await says(one, new, "would keep 198.51.100.16")
        before[new] = await raw(site, new)
        assert {ref: await raw(site, ref) for ref in before} == before
        assert not await site.eips()
        told = {action.service for action in one.told if action.reason is Reason.OBSERVING}
        assert told == set(before)

        await site.configure(stage("adopt"))

        async def adopted() -> bool:
            return sorted(await site.eips()) == ["198.51.100.16", "198.51.100.17", "198.51.100.18"]

        await eventually("three addresses to be adopted", adopted)
        await says(one, outside, "is in no pool")
        found = await site.service("outside")
        assert found is not None and [str(a) for a in found.ingress] == ["203.0.113.9"]
        assert names.FINALIZER not in found.finalizers
        for ref in (old, asks, new):
            shown = (await raw(site, ref))["status"]["loadBalancer"]
            assert shown == before[ref]["status"]["loadBalancer"], f"{ref} moved"
        await site.configure(stage("adopt", "203.0.113.9/32"))

        async def all_four() -> bool:
            return "203.0.113.9" in await site.eips()

        await eventually("the last one to be adopted", all_four)
        owners = {text: eip.owner.name for text, eip in (await site.eips()).items()}
        assert owners == {
            "198.51.100.16": "new",
            "198.51.100.17": "asks",
            "198.51.100.18": "old",
            "203.0.113.9": "outside",
        }


def _takeover(one: Replica) -> str:
    current = one.configuration.current
    return current.config.takeover if current is not None else ""


def _deleting(one: Replica, name: str) -> bool:
    return any(
        service.ref.name == name and service.deleting
        for service in one.inputs.services.cache.items.values()
    )


async def test_back_to_observe_leaves_what_there_is(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site) as one:
        await site.add("a")
        address = await site.address("a")
        await site.configure(stage("observe"))
        await until("observe to be in force", lambda: _takeover(one) == "observe")
        late = await site.add("late")
        await says(one, late, "would get")
        await site.delete("a")
        await until("the leader to see it", lambda: _deleting(one, "a"))
        await says(one, late, "would get")
        assert [eip.phase for eip in (await site.eips()).values()] == ["Bound"]
        await site.configure(configuration(POOL))
        assert await site.address("late") != address
