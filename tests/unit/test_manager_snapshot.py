"""What a manager keeps for its next start, used until there is something newer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import pytest

from lbctl.core import names
from lbctl.core.model import ObjectRef
from lbctl.kube.client import Client
from manager.inputs import Feed, Inputs
from manager.metrics import Metrics
from manager.snapshot import Snapshots
from tests.unit.scripted import Scripted
from tests.unit.test_kube_cache import until

OURS = f"/api/v1/namespaces/{names.NAMESPACE}"
NODES, SERVICES, EIPS = "/api/v1/nodes", "/api/v1/services", "/apis/lbctl.io/v1/eips"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
HIDDEN = "aHVudGVyMg=="
WEB = {
    "metadata": {
        "namespace": "default",
        "uid": "u1",
        "creationTimestamp": "2026-11-22T10:00:00Z",
        "labels": {"app": "web"},
        "annotations": {"lbctl.io/pool": "public"},
        "finalizers": [names.FINALIZER],
    },
    "spec": {
        "type": "LoadBalancer",
        "loadBalancerClass": names.LOAD_BALANCER_CLASS,
        "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"port": 80}],
        "externalTrafficPolicy": "Local",
        "ipFamilies": ["IPv4", "IPv6"],
        "clusterIPs": ["10.96.0.9", "fd00:10:96::9"],
        "loadBalancerSourceRanges": ["203.0.113.0/24", "2001:db8:3::/64"],
        "sessionAffinity": "ClientIP",
        "selector": {"app": "web"},
    },
    "status": {
        "loadBalancer": {"ingress": [{"ip": "198.51.100.1"}, {"hostname": "web.example"}]},
        "conditions": [
            {"type": names.CONDITION_ANNOUNCED, "status": "True", "reason": "Announced"}
        ],
    },
}
EIP = {
    "spec": {
        "address": "198.51.100.1",
        "pool": "public",
        "owner": {"namespace": "default", "name": "web", "uid": "u1"},
        "phase": "Releasing",
        "releasedAt": "2026-11-22T10:00:00Z",
        "sharers": [{"namespace": "default", "name": "dns", "uid": "u2"}],
        "withdrawnBy": {"m-1": "2026-11-22T10:00:00Z"},
    }
}
SLICE = {
    "metadata": {"namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv6",
    "ports": [{"name": "dns", "port": 5353, "protocol": "UDP"}],
    "endpoints": [
        {"addresses": ["fd00:10:244:1::5"], "nodeName": "n1", "conditions": {"terminating": True}}
    ],
}
ACCEPTED = {"metadata": {"namespace": names.NAMESPACE}, "data": {"config.yaml": "version: 1"}}
POD = {
    "metadata": {"namespace": names.NAMESPACE, "labels": {"app.kubernetes.io/name": "lbctl-agent"}},
    "spec": {"nodeName": "n1"},
    "status": {"podIP": "192.0.2.21", "phase": "Running"},
}
SECRET = {"metadata": {"namespace": names.NAMESPACE}, "data": {"password": HIDDEN}}


def node(address: str) -> dict[str, Any]:
    return {
        "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as running:
        running.put(NODES, "n1", node("192.0.2.21"))
        running.put(NODES, "n2", node("2001:db8:1::22"))
        running.put(SERVICES, "web", WEB)
        running.put(EIPS, "198.51.100.1", EIP)
        running.put(SLICES, "web-1", SLICE)
        running.put(f"{OURS}/configmaps", names.ACCEPTED_CONFIG_MAP, ACCEPTED)
        running.put(f"{OURS}/pods", "agent-1", POD)
        running.put(f"{OURS}/secrets", "tor", SECRET)
        yield running


class Life:
    """A manager's inputs from a start to a SIGKILL. `heard`: what changed since `known`."""

    def __init__(self, server: Scripted, directory: Path) -> None:
        self.client = Client.with_token(server.url, "token")
        self.inputs = Inputs(self.client)
        self.snapshots = Snapshots(directory, self.inputs, answer_s=0.3)
        self.heard: list[str] = []
        for feed in self.kept:
            feed.listen(lambda key, _old, new: self.heard.append(f"{key.name} {bool(new)}"))

    @property
    def kept(self) -> tuple[Feed[Any], ...]:
        return (*self.inputs.feeds(), self.inputs.accepted, self.inputs.pods)

    def items(self) -> list[dict[ObjectRef, Any]]:
        return [dict(feed.cache.items) for feed in self.kept]

    async def __aenter__(self) -> Self:
        self.tasks = [asyncio.create_task(run) for run in (self.inputs.run(), self.snapshots.run())]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self.tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait(self.tasks)
        await self.client.close()


async def lived(server: Scripted, directory: Path) -> list[dict[ObjectRef, Any]]:
    """What a manager knew and kept."""
    async with Life(server, directory) as first:
        await until("all to be known", first.inputs.known.is_set)
        await until("six files", lambda: len(list(directory.glob("*.json"))) == 6)
        return first.items()


async def test_a_start_without_the_api_server_goes_on_with_what_was_read(
    server: Scripted, tmp_path: Path
) -> None:
    """All of it, and when the API server is back only what really changed is heard."""
    before = await lived(server, tmp_path)
    assert all(before), "nothing to keep of some kind"
    server.mode = "error"
    async with Life(server, tmp_path) as second:
        await until("what was read to be known", second.inputs.known.is_set)
        assert second.items() == before
        assert not second.inputs.secrets.cache.items and second.inputs.unsynced()
        assert 0 <= cast(float, second.inputs.snapshot_age_s()) < 60
        metrics = Metrics()
        second.inputs.measure(metrics)
        assert metrics.registry.get_sample_value("lbctl_snapshot_in_use") == 1
        second.heard.clear()
        server.put(NODES, "n1", node("192.0.2.29"))
        server.remove(EIPS, "198.51.100.1")
        server.mode = "normal"
        await until("the lists", lambda: not second.inputs.unsynced())
        assert sorted(second.heard) == ["198.51.100.1 False", "n1 True"]
        assert second.inputs.snapshot_age_s() is None


async def test_what_is_kept_is_private_and_has_no_secret(server: Scripted, tmp_path: Path) -> None:
    await lived(server, tmp_path)
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
        assert HIDDEN not in file.read_text()


async def test_what_changes_is_kept_too(server: Scripted, tmp_path: Path) -> None:
    await lived(server, tmp_path)
    async with Life(server, tmp_path):
        server.put(SERVICES, "late", WEB)
        await until("the new Service", lambda: "late" in (tmp_path / "service.json").read_text())


def _other_version(text: str) -> str:
    return text.replace('"version":1', '"version":0', 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        lambda text: text.replace('"192.0.2.21"', '"192.0.2.999"'),
        lambda text: text.replace('"kind":"node"', '"kind":"eip"'),
        _other_version,
    ],
)
async def test_a_damaged_file_is_as_good_as_none(
    server: Scripted, tmp_path: Path, damage: Callable[[str], str]
) -> None:
    await lived(server, tmp_path)
    file = tmp_path / "node.json"
    text = file.read_text()
    assert json.loads(text)["items"]
    file.write_text(damage(text))
    inputs = Life(server, tmp_path).inputs
    await Snapshots(tmp_path, inputs).recall()
    assert not inputs.nodes.cache.items and not inputs.known.is_set()
    file.write_text(text)
    await Snapshots(tmp_path, inputs).recall()
    assert inputs.nodes.cache.items and inputs.known.is_set()


async def test_what_was_listed_is_never_replaced(server: Scripted, tmp_path: Path) -> None:
    await lived(server, tmp_path)
    server.put(NODES, "n1", node("192.0.2.29"))
    async with Life(server, tmp_path) as second:
        await until("the lists", lambda: not second.inputs.unsynced())
        now = second.items()
        await second.snapshots.recall()
        assert second.items() == now and second.inputs.snapshot_age_s() is None
