"""Leader election against a server that hangs, fails and conflicts; times scaled down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from lbctl.kube.client import Client
from lbctl.kube.lease import LeaderElector
from tests.unit.scripted import Scripted
from tests.unit.test_kube_cache import until

LEASES = "/apis/coordination.k8s.io/v1/namespaces/lbctl-system/leases"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as running:
        running.objects[LEASES] = {}
        yield running


class Candidate:
    """An elector whose work waits for ever, and what became of it."""

    def __init__(self, server: Scripted, identity: str) -> None:
        self.client = Client.with_token(server.url, "token", timeout_s=60.0)
        self.told: list[bool] = []
        self.working = False
        self.elector = LeaderElector(
            self.client,
            identity,
            lease_duration_s=3.0,
            renew_deadline_s=2.0,
            retry_period_s=0.2,
            on_change=self.told.append,
        )
        self.task = asyncio.create_task(self.elector.run(self._work))

    async def _work(self) -> None:
        self.working = True
        try:
            await asyncio.Event().wait()
        finally:
            self.working = False

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task], timeout=30)
        await self.client.close()


def holder(server: Scripted) -> str:
    lease = server.objects[LEASES].get("lbctl-manager")
    return str(lease["spec"]["holderIdentity"]) if lease else ""


async def test_one_leads_and_the_other_follows_after_release(server: Scripted) -> None:
    one = Candidate(server, "one")
    await until("one to lead", lambda: one.working)
    two = Candidate(server, "two")
    try:
        await until("two to look", lambda: two.elector.holder == "one")
        assert one.elector.is_leader() and not two.elector.is_leader()
        start = asyncio.get_running_loop().time()
        await one.stop()
        assert one.told == [True, False] and not one.working
        await until("two to lead", lambda: two.working)
        # Released, so not the whole lease duration; the limit leaves room for a busy machine.
        assert asyncio.get_running_loop().time() - start < 2.9
    finally:
        await two.stop()


@pytest.mark.parametrize("fault", ["hang", "error", "reset"])
async def test_stops_leading_by_the_deadline_whatever_the_server_does(
    server: Scripted, fault: str
) -> None:
    one = Candidate(server, "one")
    try:
        await until("one to lead", lambda: one.working)
        loop = asyncio.get_running_loop()
        server.mode = fault
        start = loop.time()
        await until("is_leader() to end", lambda: not one.elector.is_leader(), 10)
        assert loop.time() - start < 2.9, "led on after the renew deadline"
        await until("the work to be cancelled", lambda: not one.working, 10)
        assert one.told == [True, False]
        server.mode = "normal"
        await until("one to lead again", lambda: one.working)
    finally:
        await one.stop()


async def test_never_two_leaders_while_one_hangs(server: Scripted) -> None:
    one = Candidate(server, "one")
    await until("one to lead", lambda: one.working)
    two = Candidate(server, "two")
    try:
        await until("two to look", lambda: two.elector.holder == "one")
        # One's requests go nowhere from now on; two's do not.
        one.client.url = "http://127.0.0.1:9"
        both = 0
        async with asyncio.timeout(30):
            while not two.elector.is_leader():
                both += one.elector.is_leader() and two.elector.is_leader()
                await asyncio.sleep(0.005)
        assert not one.elector.is_leader() and not both
        assert holder(server) == "two"
    finally:
        await one.stop()
        await two.stop()


async def test_a_foreign_holder_ends_leadership(server: Scripted) -> None:
    one = Candidate(server, "one")
    try:
        await until("one to lead", lambda: one.working)
        lease = server.objects[LEASES]["lbctl-manager"]
        server.put(
            LEASES, "lbctl-manager", {**lease, "spec": {**lease["spec"], "holderIdentity": "x"}}
        )
        await until("one to stop", lambda: one.told == [True, False])
        await until("the work to be cancelled", lambda: not one.working)
    finally:
        await one.stop()


async def test_work_that_fails_releases_the_lease_and_says_so(server: Scripted) -> None:
    async def work() -> None:
        raise RuntimeError("the work failed")

    async with Client.with_token(server.url, "token") as client:
        told: list[bool] = []
        elector = LeaderElector(client, "one", on_change=told.append)
        with pytest.raises(RuntimeError, match="the work failed"):
            await elector.run(work)
    assert told == [True, False] and holder(server) == ""
