"""Parts of a manager put together for tests: caches, configuration, allocation; no speaker.

Every test has a namespace of its own for the ConfigMaps, the Lease and the Services, and a pool of
its own; allocation looks at the whole cluster, so files that allocate are marked `alone`.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec
import pytest
import yaml

from lbctl import errors
from lbctl.core import names
from lbctl.core.actions import Action
from lbctl.core.model import Eip, ObjectRef, Service
from lbctl.core.release import Facts
from lbctl.kube import client as api
from lbctl.kube import objects
from lbctl.kube.client import Client
from lbctl.kube.events import EventRecorder
from lbctl.kube.lease import LeaderElector
from lbctl.lab.cluster.handle import Cluster
from manager.allocating import Allocating
from manager.configuration import Configuration
from manager.inputs import Inputs
from manager.metrics import Metrics
from tests import command

CRD = Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "crd.yaml"


async def until(what: str, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Poll; fails with what was waited for."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110 (what is waited for is in another process)
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"waited {limit_s} s for: {what}")


async def eventually(
    what: str, condition: Callable[[], Awaitable[bool]], limit_s: float = 60.0
) -> None:
    """As `until`, for a condition that has to ask the API server."""
    try:
        async with asyncio.timeout(limit_s):
            while not await condition():  # noqa: ASYNC110 (it is in another process)
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"waited {limit_s} s for: {what}")


def connect(cluster: Cluster, kind: type[Client] = Client) -> Client:
    """An administrator's client."""
    return kind.with_token(cluster.url, cluster.admin_token, cluster.ca_file, timeout_s=30.0)


async def define(client: Client) -> None:
    """Make the kind EIP known, as `deploy/` does, and wait until it is served."""
    body = yaml.safe_load(CRD.read_text())
    with contextlib.suppress(errors.Conflict):
        await client.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
    async with asyncio.timeout(60):
        while True:
            try:
                await client.list(api.EIPS.path())
                return
            except (errors.NotFound, errors.Unreachable):  # 429 while it prepares storage
                await asyncio.sleep(0.05)


async def lbctl(cluster: Cluster, *words: str, stdin: str = "") -> tuple[int, str, str]:
    """Run the command on a cluster; exit code, stdout, stderr."""
    words = (*words, "--kubeconfig", str(cluster.kubeconfig))
    async with asyncio.timeout(120):
        done = await asyncio.to_thread(command.lbctl, *words, stdin=stdin)
    return done.returncode, done.stdout, done.stderr


def configuration(*addresses: str) -> str:
    """A configuration with one pool."""
    pool = ", ".join(addresses)
    return (
        "version: 1\npools:\n"
        f"  - {{name: test, addresses: [{pool}]}}\n"
        "bgp:\n  asn: 64512\n  peers:\n"
        "    - {name: tor-a, address: 192.0.2.1, asn: 64500}\n"
        "announce: {drainTime: 100ms, reuseAfter: 300ms}\n"
    )


class Site:
    """A namespace with a configuration and Services; removes what it made."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.namespace = f"mgr-{uuid.uuid4().hex[:8]}"

    async def open(self, *addresses: str) -> None:
        """Create the namespace, and the ConfigMap with a pool of these addresses."""
        await define(self.client)
        body = {"metadata": {"name": self.namespace}}
        await self.client.create("/api/v1/namespaces", body)
        await self.configure(configuration(*addresses))

    async def configure(self, text: str) -> None:
        """Write ConfigMap `lbctl`."""
        body = {
            "metadata": {"name": names.CONFIG_MAP, "namespace": self.namespace},
            "data": {names.CONFIG_KEY: text},
        }
        path = api.CONFIG_MAPS.path(self.namespace)
        try:
            await self.client.create(path, body)
        except errors.Conflict:
            await self.client.patch(f"{path}/{names.CONFIG_MAP}", {"data": body["data"]})

    async def add(self, name: str, **spec: Any) -> ObjectRef:
        """Create a Service of type LoadBalancer."""
        ports = [{"port": 80, "targetPort": 8080}]
        body = {
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"type": "LoadBalancer", "ports": ports, "selector": {"app": name}, **spec},
        }
        await self.client.create(api.SERVICES.path(self.namespace), body)
        return ObjectRef(self.namespace, name)

    async def delete(self, name: str) -> None:
        """Ask for a Service's deletion."""
        await self.client.delete(api.SERVICES.path(self.namespace, name))

    async def service(self, name: str) -> Service | None:
        """A Service as the API server has it."""
        try:
            got = await self.client.get(api.SERVICES.path(self.namespace, name))
        except errors.NotFound:
            return None
        return objects.to_service(msgspec.json.encode(got))

    async def eips(self) -> dict[str, Eip]:
        """The EIP objects of this namespace's Services, by address."""
        page = await self.client.list(api.EIPS.path())
        found = [objects.to_eip(raw) for raw in page.items or ()]
        return {str(eip.address): eip for eip in found if eip.owner.namespace == self.namespace}

    async def address(self, name: str, limit_s: float = 60.0) -> str:
        """Wait for a Service's address."""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    found = await self.service(name)
                    if found is not None and found.ingress:
                        return str(found.ingress[0])
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"waited {limit_s} s for the address of {self.namespace}/{name}")

    async def close(self) -> None:
        """Remove everything: finalizers first, nobody works on them any more."""
        page = await self.client.list(api.SERVICES.path(self.namespace))
        for raw in page.items or ():
            found = objects.to_service(raw)
            path = api.SERVICES.path(self.namespace, found.ref.name)
            await self.client.patch(path, {"metadata": {"finalizers": None}})
            await self.client.delete(path)
        for eip in (await self.eips()).values():
            await self.client.delete(api.EIPS.path(name=str(eip.address)))
        await self.client.delete(f"/api/v1/namespaces/{self.namespace}")


class Timing(TypedDict, total=False):
    """Of the lease; what is absent is the elector's default."""

    lease_duration_s: float
    renew_deadline_s: float
    retry_period_s: float


class Replica:
    """One manager's allocating half, running as tasks in the test's loop.

    writer: the client of the allocating executor, so that a test can pause it.
    """

    def __init__(
        self,
        cluster: Cluster,
        site: Site,
        name: str,
        writer: Client | None = None,
        **lease: Unpack[Timing],
    ) -> None:
        self.name = name
        self.client = connect(cluster)
        self.writer = writer or self.client
        self.metrics = Metrics()
        self.inputs = Inputs(self.client, site.namespace)
        self.events = EventRecorder(self.client, "lbctl-manager", name)
        self.elector = LeaderElector(self.client, name, namespace=site.namespace, **lease)
        self.told: list[Action] = []
        self.allocating = Allocating(
            self.writer,
            self.inputs,
            self.elector.is_leader,
            self.metrics,
            self._facts,
            self.told.append,
        )
        self.configuration = Configuration(
            self.client,
            self.events,
            self.metrics,
            lambda: self.inputs.eips.cache.items.values(),
            self.allocating.configure,
            site.namespace,
        )
        self.inputs.wanted.listen(lambda _k, _o, new: self.configuration.change_wanted(new))
        self.inputs.accepted.listen(lambda _k, _o, new: self.configuration.change_accepted(new))
        self.living: set[str] = {name}
        self.reigns = 0

    def _facts(self) -> Facts:
        return Facts(living=self.living, hold_time_s=0.5, drain_time_s=0.1, reuse_after_s=0.3)

    async def _lead(self) -> None:
        self.reigns += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(self.configuration.lead())
            await self.allocating.lead()
            raise errors.NotLeader("allocation has ended")

    async def _stand(self) -> None:
        async def lead() -> None:
            with contextlib.suppress(ExceptionGroup):
                await self._lead()

        await self.elector.run(lead)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        """Run while the context lasts."""
        tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (self.inputs.run(), self.events.run(), self._stand())
        ]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self.client.close()
            if self.writer is not self.client:
                await self.writer.close()
