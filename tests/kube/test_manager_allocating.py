"""Allocation against a real API server: full pools, release, leader changes, configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from lbctl.core import config, names
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


@pytest.fixture
async def site(cluster: Cluster) -> AsyncIterator[Site]:
    async with connect(cluster) as client:
        made = Site(client)
        await made.open("198.51.100.16/31")
        try:
            yield made
        finally:
            await made.close()


@contextlib.asynccontextmanager
async def leader(cluster: Cluster, site: Site, name: str = "one") -> AsyncIterator[Replica]:
    async with Replica(cluster, site, name, **LEASE).running() as replica:
        await until(f"{name} to lead", replica.elector.is_leader)
        yield replica


async def withdraw(site: Site, *managers: str) -> None:
    """What the announcing half of every manager does with an EIP that is given back."""
    for eip in (await site.eips()).values():
        if eip.phase == "Releasing" and set(eip.withdrawn_by) != set(managers):
            body = {"spec": {"withdrawnBy": dict.fromkeys(managers, "2026-01-01T00:00:00Z")}}
            await site.client.patch(api.EIPS.path(name=str(eip.address)), body)


async def test_pool_full_then_served_when_an_address_is_freed(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site) as one:
        await site.add("a")
        await site.add("b")
        given = {await site.address("a"), await site.address("b")}
        assert given == {"198.51.100.16", "198.51.100.17"}
        refused = await site.add("c")
        await until(
            "a refusal of c",
            lambda: (d := one.allocating.decision(refused)) is not None and not d.addresses,
        )
        decision = one.allocating.decision(refused)
        assert decision is not None and decision.reason is Reason.POOL_EXHAUSTED
        old = await site.address("a")
        await site.delete("a")
        async with asyncio.timeout(60):
            while not (found := await site.service("c")) or not found.ingress:
                await withdraw(site, "one")
                await asyncio.sleep(0.1)
        assert str(found.ingress[0]) == old
        assert await site.service("a") is None, "the finalizer was not removed"
        assert names.FINALIZER in found.finalizers


async def test_sctp_without_node_ports_gets_an_address_that_kube_proxy_takes(
    cluster: Cluster, site: Site
) -> None:
    """And ipMode VIP is written, so that pods inside reach the EIP through kube-proxy."""
    async with leader(cluster, site):
        ports = [{"port": 80, "targetPort": 8080, "protocol": "SCTP"}]
        await site.add("a", ports=ports, allocateLoadBalancerNodePorts=False)
        address = await site.address("a")
        found = await site.client.get(api.SERVICES.path(site.namespace, "a"))
        assert found["status"]["loadBalancer"]["ingress"] == [{"ip": address, "ipMode": "VIP"}]
        assert not found["spec"]["ports"][0].get("nodePort")


async def test_nothing_is_released_before_every_manager_has_withdrawn(
    cluster: Cluster, site: Site
) -> None:
    async with leader(cluster, site) as one:
        one.living.add("two")
        await site.add("a")
        address = await site.address("a")
        await site.delete("a")

        async def releasing() -> bool:
            return (await site.eips())[address].phase == "Releasing"

        await eventually("the EIP to be given back", releasing)
        await withdraw(site, "one")
        await until(
            "the leader to wait for the other manager",
            lambda: any(
                "two" in (one.allocating.release(eip.address) or "")
                for eip in one.inputs.eips.cache.items.values()
            ),
        )
        eip = (await site.eips())[address]
        assert eip.forwarding and eip.withdrawn_by == ("one",)
        found = await site.service("a")
        assert found is not None and found.ingress, "taken away too early"
        await withdraw(site, "one", "two")

        async def gone() -> bool:
            return not await site.eips() and await site.service("a") is None

        await eventually("the Service and its EIP to be gone", gone)


async def test_addresses_stay_over_a_change_of_leader_and_what_went_meanwhile_goes(
    cluster: Cluster, site: Site
) -> None:
    async with leader(cluster, site, "one"):
        await site.add("a")
        before = await site.address("a")
        await site.add("going")
        free = await site.address("going")
    await site.add("b")
    await site.delete("going")
    held = await site.service("going")
    assert held is not None and held.deleting, "nobody is there to let it go"
    async with leader(cluster, site, "two"):
        async with asyncio.timeout(60):
            while await site.service("going") is not None:
                await withdraw(site, "two")
                await asyncio.sleep(0.1)
        assert await site.address("b") == free and await site.address("a") == before
        assert {e.owner.name for e in (await site.eips()).values()} == {"a", "b"}


async def test_status_that_somebody_clears_comes_back(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site):
        ref = await site.add("a")
        before = await site.address("a")
        path = api.SERVICES.path(ref.namespace, ref.name, "status")
        await site.client.patch(path, {"status": {"loadBalancer": {"ingress": None}}})
        assert await site.address("a") == before


async def test_a_service_that_stops_being_ours_gives_back(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site):
        ref = await site.add("a")
        address = await site.address("a")
        path = api.SERVICES.path(ref.namespace, ref.name)
        await site.client.patch(path, {"spec": {"type": "ClusterIP"}})
        async with asyncio.timeout(60):
            while address in await site.eips():
                await withdraw(site, "one")
                await asyncio.sleep(0.1)
        found = await site.service("a")
        assert found is not None and not found.ingress
        assert names.FINALIZER not in found.finalizers


async def test_a_bad_configuration_changes_nothing_and_says_everything(
    cluster: Cluster, site: Site
) -> None:
    async with leader(cluster, site) as one:
        await until("a configuration in force", lambda: one.configuration.current is not None)
        good = one.configuration.current
        assert good is not None and good.generation == 1
        bad = configuration("198.51.100.300", "198.51.100.16/31").replace("64512", "0")
        await site.configure(bad)
        await until("two problems", lambda: len(one.configuration.problems) == 2)
        assert one.configuration.current == good and one.configuration.stale
        events: list[str] = []
        async with asyncio.timeout(60):
            while not events:
                page = await site.client.get(api.EVENTS.path(site.namespace))
                events = [
                    e["message"] for e in page["items"] if e["reason"] == Reason.CONFIG_REJECTED
                ]
                await asyncio.sleep(0.1)
        assert all(problem in events[0] for problem in one.configuration.problems)
        # A replica that starts beside it runs the accepted one.
        async with Replica(cluster, site, "two", **LEASE).running() as two:
            await until("two to have it", lambda: two.configuration.current is not None)
            assert two.configuration.current == good
        await site.configure(configuration("198.51.100.16/31", "198.51.100.20/32"))
        await until("the repaired one", lambda: one.configuration.current != good)
        now = one.configuration.current
        assert now is not None and now.generation == 2 and not one.configuration.problems


async def test_a_pool_does_not_shrink_under_a_service(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site) as one:
        ref = await site.add("a", loadBalancerIP="198.51.100.17")
        assert await site.address("a") == "198.51.100.17"
        await until("the EIP in the cache", lambda: bool(one.inputs.eips.cache.items))
        await site.configure(configuration("198.51.100.16/32"))
        await until("the refusal", lambda: bool(one.configuration.problems))
        assert str(ref) in one.configuration.problems[0]
        current = one.configuration.current
        assert current is not None and current.config == config.parse(
            configuration("198.51.100.16/31")
        )
        assert await site.address("a") == "198.51.100.17"
