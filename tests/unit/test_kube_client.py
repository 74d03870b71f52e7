"""HTTP refusals and silences become the exceptions of lbctl.errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from lbctl import errors
from lbctl.kube import client as api
from lbctl.kube.client import Client
from tests.unit.scripted import Scripted

NODES = "/api/v1/nodes"


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as running:
        running.put(NODES, "a", {"spec": {}})
        yield running


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, errors.KubeError),
        (401, errors.Forbidden),
        (403, errors.Forbidden),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (410, errors.Gone),
        (422, errors.KubeError),
        (429, errors.Unreachable),
        (500, errors.Unreachable),
        (503, errors.Unreachable),
    ],
)
def test_codes(code: int, kind: type[errors.KubeError]) -> None:
    made = api.error_of(code, "why")
    assert type(made) is kind and "why" in str(made)


def test_paths() -> None:
    assert api.SERVICES.path() == "/api/v1/services"
    assert api.SERVICES.path("default", "web", "status") == (
        "/api/v1/namespaces/default/services/web/status"
    )
    assert api.EIPS.path(name="198.51.100.1") == "/apis/lbctl.io/v1/eips/198.51.100.1"
    assert api.NODES.path("ignored", "a/b") == "/api/v1/nodes/a%2Fb"


async def test_writes_and_reads(server: Scripted) -> None:
    async with Client.with_token(server.url, "t") as client:
        assert (await client.get(f"{NODES}/a"))["metadata"]["name"] == "a"
        with pytest.raises(errors.NotFound, match="not found"):
            await client.get(f"{NODES}/b")
        with pytest.raises(errors.Conflict, match="already exists"):
            await client.create(NODES, {"metadata": {"name": "a"}})
        stale = {"metadata": {"name": "a", "resourceVersion": "1"}}
        with pytest.raises(errors.Conflict):
            await client.replace(f"{NODES}/a", stale)
        page = await client.list(NODES)
        assert page.metadata.resourceVersion == str(server.version)
        assert len(page.items or ()) == 1


@pytest.mark.parametrize("mode", ["hang", "reset", "error"])
async def test_faults_are_unreachable_within_the_timeout(server: Scripted, mode: str) -> None:
    server.mode = mode
    async with Client.with_token(server.url, "t", timeout_s=0.5) as client:
        start = asyncio.get_running_loop().time()
        with pytest.raises(errors.Unreachable):
            await client.get(f"{NODES}/a")
        assert asyncio.get_running_loop().time() - start < 20


async def test_nobody_listens() -> None:
    async with Client.with_token("http://127.0.0.1:9", "t") as client:
        with pytest.raises(errors.Unreachable):
            await client.list(NODES)


async def test_no_configuration_is_one_error(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/none")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(errors.KubeError, match="no usable Kubernetes configuration"):
        await Client.from_environment()
