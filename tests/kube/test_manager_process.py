"""The real `lbctl-manager` process under its own ServiceAccount, with the roles of `deploy/`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from lbctl import errors
from lbctl.core import names, state
from lbctl.core.reasons import Reason
from lbctl.kube import client as api
from lbctl.kube.client import Client
from lbctl.lab.cluster.handle import Cluster
from manager.access import Gate
from tests.kube.manager_parts import CRD, Site, configuration, connect, define, eventually

pytestmark = pytest.mark.alone
BASE = CRD.parent
CHECKOUT = BASE.parents[2]
PLURAL = {"ServiceAccount": "serviceaccounts", "ConfigMap": "configmaps"}
KINDS = ("namespace", "accounts", "manager-roles", "viewer-roles")


def _path(body: dict[str, Any]) -> str:
    version, kind = body["apiVersion"], body["kind"]
    plural = PLURAL.get(kind, kind.lower() + "s")
    namespaced = "namespace" in body["metadata"]
    resource = api.Resource(version, plural, namespaced)
    return resource.path(body["metadata"].get("namespace", ""))


async def install(client: Client) -> None:
    """Namespace, accounts and roles of deploy/kustomize/base."""
    await define(client)
    for name in KINDS:
        for body in yaml.safe_load_all((BASE / f"{name}.yaml").read_text()):
            with contextlib.suppress(errors.Conflict):
                await client.create(_path(body), body)


async def token(client: Client, account: str) -> str:
    """A token of one of our ServiceAccounts."""
    path = f"/api/v1/namespaces/{names.NAMESPACE}/serviceaccounts/{account}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str((await client.create(path, body))["status"]["token"])


def kubeconfig(cluster: Cluster, secret: str, path: Path) -> Path:
    """A kubeconfig with this token."""
    found = yaml.safe_load(cluster.kubeconfig.read_text())
    found["users"][0]["user"] = {"token": secret}
    path.write_text(yaml.safe_dump(found))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A running manager. `port`: of its HTTP on loopback."""

    def __init__(self, port: int, child: asyncio.subprocess.Process, log: Path) -> None:
        self.port = port
        self.child = child
        self.log = log

    async def get(self, path: str) -> tuple[int, str]:
        """GET from it; (0, "") while it does not listen yet."""
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                    return answer.status, await answer.text()
            except aiohttp.ClientError:
                return 0, ""

    async def state(self) -> state.ManagerState | None:
        """Its state, None while there is none."""
        status, text = await self.get("/v1/state")
        return state.from_json(text) if status == 200 else None


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[Client]:
    async with connect(cluster) as client:
        await install(client)
        yield client
        for path in (
            api.LEASES.path(names.NAMESPACE, names.LEASE),
            api.CONFIG_MAPS.path(names.NAMESPACE, names.CONFIG_MAP),
            api.CONFIG_MAPS.path(names.NAMESPACE, names.ACCEPTED_CONFIG_MAP),
            api.SECRETS.path(names.NAMESPACE, names.PROBE_SECRET),
        ):
            await client.delete(path)


@pytest.fixture
async def manager(cluster: Cluster, admin: Client, tmp_path: Path) -> AsyncIterator[Process]:
    secret = await token(admin, names.MANAGER_ACCOUNT)
    config = kubeconfig(cluster, secret, tmp_path / "kubeconfig")
    port = free_port()
    command = [sys.executable, "-m", "manager.main", "--id", "m-1", "--kubeconfig", str(config)]
    command += ["--http-port", str(port), "--http-host", "127.0.0.1"]
    for own in ("speaker", "snapshot", "keys"):
        command += [f"--{own}-dir", str(tmp_path / own)]
    log = tmp_path / "log"
    with log.open("wb") as out:
        child = await asyncio.create_subprocess_exec(
            *command, cwd=CHECKOUT, stdout=out, stderr=out, env=dict(os.environ)
        )
    try:
        yield Process(port, child, log)
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_serves_a_service_with_the_rights_of_deploy(admin: Client, manager: Process) -> None:
    system = Site(admin)
    system.namespace = names.NAMESPACE
    await system.configure(configuration("198.51.100.64/31"))
    site = Site(admin)
    await admin.create("/api/v1/namespaces", {"metadata": {"name": site.namespace}})
    try:
        ref = await site.add("web")
        assert await site.address("web") in ("198.51.100.64", "198.51.100.65")

        async def told() -> bool:
            found = await site.service("web")
            condition = found.condition if found is not None else None
            return condition is not None and condition[:2] == ("False", Reason.NO_ENDPOINTS)

        await eventually("the condition on the Service to say that it has no endpoints", told)
        known = await manager.state()
        assert known is not None and known.leader and known.manager == known.holder == "m-1"
        assert [s.ref for s in known.services] == [ref]
        refused = [line for line in manager.log.read_text().splitlines() if '"403: ' in line]
        assert not refused, "a right is missing in deploy/"
        secret = await admin.get(api.SECRETS.path(names.NAMESPACE, names.PROBE_SECRET))
        assert secret["data"]["current"]
        status, text = await manager.get("/readyz")
        assert status == 503 and "tor-a" in text, "ready without a speaker"
        assert (await manager.get("/healthz"))[0] == 200
        status, text = await manager.get("/metrics")
        assert status == 200 and "lbctl_leader 1.0" in text
        assert 'lbctl_pool_used_addresses{pool="test"} 1.0' in text
    finally:
        await site.close()


async def test_sigterm_ends_it_and_gives_the_lease_back(admin: Client, manager: Process) -> None:
    async def leads() -> bool:
        known = await manager.state()
        return known is not None and known.leader

    await eventually("the manager to lead", leads)
    manager.child.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(manager.child.wait(), 60) == 0, manager.log.read_text()
    lease = await admin.get(api.LEASES.path(names.NAMESPACE, names.LEASE))
    assert not lease["spec"].get("holderIdentity")


async def test_only_who_may_read_the_state_may(cluster: Cluster, admin: Client) -> None:
    manager_token = await token(admin, names.MANAGER_ACCOUNT)
    viewer = await token(admin, names.VIEWER_ACCOUNT)
    async with Client.with_token(cluster.url, manager_token, cluster.ca_file, 30.0) as client:
        gate = Gate(client)
        assert await gate.check(viewer, "/v1/state") == 200
        assert await gate.check(None, "/v1/state") == 401
        assert await gate.check("nonsense", "/v1/state") == 401
        if cluster.kind == "kubernetes":  # the embedded cluster allows everyone known everything
            assert await gate.check(manager_token, "/v1/state") == 403
            assert await gate.check(viewer, "/other") == 403
