"""`lbctl status` and `explain` through an API server: Pods, token, proxy, and what may fail of it.

On the embedded cluster only: the real one's proxy refuses Pods on loopback, and tests stay on it.
`tests/lab` asks the real managers.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from lbctl.core import names
from lbctl.core.state import ConfigState, ManagerState, to_json
from lbctl.kube.client import PODS, SERVICES, TOKEN_REVIEWS, Client
from lbctl.lab.cluster import embedded
from lbctl.lab.cluster.handle import Cluster, ClusterSpec
from tests.kube.manager_parts import connect, lbctl

ONE, TWO = "127.74.80.1", "127.74.80.2"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of this file's own: the Pods here would be other tests' managers."""
    cluster = embedded.start(ClusterSpec(tmp_path_factory.mktemp("cluster")))
    try:
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Manager:
    """Serves a state where a manager's Pod would, and keeps the tokens that it was shown."""

    body: bytes
    tokens: list[str] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        """`/v1/state`."""
        self.tokens.append(request.headers.get(names.STATE_TOKEN_HEADER, ""))
        return web.Response(body=self.body, content_type="application/json")

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[None]:
        """Listen on the state port of `address`."""
        app = web.Application()
        app.router.add_get("/v1/state", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, address, names.MANAGER_HTTP_PORT).start()
        try:
            yield
        finally:
            await runner.cleanup()


async def ensure(client: Client, path: str, kind: str, name: str) -> None:
    """Create a Namespace, ServiceAccount or Node once."""
    body = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
    listed = await client.get(path)
    if name not in {item["metadata"]["name"] for item in listed["items"]}:
        await client.create(path, body)


@asynccontextmanager
async def deployed(cluster: Cluster, *addresses: str) -> AsyncIterator[Client]:
    """Namespace, ServiceAccount, and a Pod of a manager for each address."""
    async with connect(cluster) as client:
        await ensure(client, "/api/v1/namespaces", "Namespace", names.NAMESPACE)
        accounts = f"/api/v1/namespaces/{names.NAMESPACE}/serviceaccounts"
        await ensure(client, accounts, "ServiceAccount", names.VIEWER_ACCOUNT)
        pods = [f"manager-{n}" for n, _ in enumerate(addresses)]
        for pod, address in zip(pods, addresses, strict=True):
            # A Pod on a Node that does not exist would be deleted after a while.
            await ensure(client, "/api/v1/nodes", "Node", node_of(pod))
            await add_pod(client, pod, address)
        try:
            yield client
        finally:
            for pod in pods:
                await client.delete(PODS.path(names.NAMESPACE, pod))


def node_of(pod: str) -> str:
    """The Node that a Pod is on."""
    return f"node-of-{pod}"


async def add_pod(client: Client, name: str, address: str) -> None:
    labels = {"app.kubernetes.io/name": names.MANAGER_APP}
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "finalizers": []},
        "spec": {
            "nodeName": node_of(name),
            "containers": [{"name": "manager", "image": "lbctl:dev"}],
            "terminationGracePeriodSeconds": 0,
        },
    }
    await client.create(PODS.path(names.NAMESPACE), body)
    status = {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}}
    await client.patch(PODS.path(names.NAMESPACE, name, "status"), status)


def state(name: str, leader: bool) -> bytes:
    return to_json(
        ManagerState(name, leader, 0.0, ConfigState("abc", 1), now_s=5.0, holder="manager-0")
    )


async def test_all_managers_are_asked_with_a_token_of_the_viewer(own: Cluster) -> None:
    one, two = Manager(state("manager-0", True)), Manager(state("manager-1", False))
    async with deployed(own, ONE, TWO) as client, one.serving(ONE), two.serving(TWO):
        code, out, err = await lbctl(own, "status", "--output", "json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert sorted(found["managers"]) == ["manager-0", "manager-1"]
        assert found["leader"] == "manager-0"
        for manager in (one, two):
            (header,) = manager.tokens
            assert await user_of(client, header.removeprefix("Bearer ")) == (
                f"system:serviceaccount:{names.NAMESPACE}:{names.VIEWER_ACCOUNT}"
            )


async def user_of(client: Client, token: str) -> str:
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token},
    }
    answer = await client.create(TOKEN_REVIEWS.path(), body)
    return str(answer["status"]["user"]["username"])


async def test_one_manager_is_silent_and_one_talks_nonsense(own: Cluster) -> None:
    async with deployed(own, ONE, TWO), Manager(state("manager-0", True)).serving(ONE):
        code, out, _ = await lbctl(own, "status")
        assert code == 1
        assert "manager manager-1 on node-of-manager-1: it does not answer" in out
        async with Manager(b'{"manager": 5}').serving(TWO):
            code, out, _ = await lbctl(own, "status")
        assert code == 1
        assert "manager manager-1 on node-of-manager-1: a manager's state" in out


async def test_nobody_answers(own: Cluster) -> None:
    async with deployed(own, ONE):
        code, out, err = await lbctl(own, "status")
    assert (code, out) == (2, "")
    assert err.startswith("lbctl: no manager answered (manager-0: it does not answer")
    assert len(err.splitlines()) == 1


async def test_nothing_is_deployed(own: Cluster) -> None:
    async with deployed(own):
        code, out, err = await lbctl(own, "status")
    assert (code, out) == (2, "")
    assert err == f"lbctl: no manager is deployed: namespace {names.NAMESPACE} has no Pod of it\n"


async def test_explain_asks_whether_the_service_exists(own: Cluster) -> None:
    async with deployed(own, ONE) as client, Manager(state("manager-0", True)).serving(ONE):
        code, _, err = await lbctl(own, "explain", "default/none")
        assert (code, err) == (
            2,
            "lbctl: there is no Service default/none, and no EIP that it had\n",
        )
        body = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "there"},
            "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]},
        }
        await client.create(SERVICES.path("default"), body)
        try:
            code, out, _ = await lbctl(own, "explain", "there", "-n", "default")
        finally:
            await client.delete(SERVICES.path("default", "there"))
        assert code == 1
        assert "The leader manager-0 has not decided about it yet." in out


@pytest.mark.parametrize("words", [["a/b/c"], ["/b"], ["a/b", "-n", "c"]])
async def test_a_service_that_is_no_name(own: Cluster, words: list[str]) -> None:
    code, out, err = await lbctl(own, "explain", *words)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1


async def test_the_api_server_is_away(tmp_path: Path, own: Cluster) -> None:
    away = tmp_path / "kubeconfig"
    away.write_text(own.kubeconfig.read_text().replace(own.url, "https://127.74.80.9:1"))

    @dataclass
    class Away:
        kubeconfig: Path

    code, out, err = await lbctl(Away(away), "status")  # type: ignore[arg-type]
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and "Cannot connect" in err
