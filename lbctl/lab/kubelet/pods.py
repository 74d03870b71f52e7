"""One pod on one node: network, volumes, containers, status, and its orderly end.

Rules: a pod is served from the moment it is bound until it is deleted from the API server by us
(grace period 0, its uid as precondition). An API server that is away delays status and nothing
else. Errors of a pod stay the pod's: they are shown in its status and tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import structlog

from lbctl.errors import Conflict, KubeError, LabError, NotFound, Unreachable
from lbctl.lab.kubelet import api as kube
from lbctl.lab.kubelet import podspec, probes, status
from lbctl.lab.kubelet.addresses import Pool
from lbctl.lab.kubelet.containers import Container, Surroundings
from lbctl.lab.kubelet.launch import Launch
from lbctl.lab.kubelet.runtime import Runtime
from lbctl.lab.kubelet.volumes import PodVolumes

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
_RETRY_S: Final = 0.5
_OFFLINE_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class NodeServices:
    """What a pod needs of its node's kubelet."""

    node: str
    addresses: tuple[str, ...]
    runtime: Runtime
    api: kube.Api
    pool: Pool
    ca_file: Path
    api_host: str
    api_port: int
    search: str
    keep: tuple[str, ...]
    look_up: Callable[[str, str, str], Object | None]


class Pod:
    """A pod that is bound to this node."""

    def __init__(self, pod: Object, node: NodeServices) -> None:
        self.uid: str = pod["metadata"]["uid"]
        self.pod = pod
        self._node = node
        self._dirty = asyncio.Event()
        self._ending = asyncio.Event()
        self._gone = False
        self._inputs = asyncio.Event()
        self._started_s = time.time()
        self._sent: Object = {}
        self._ips: tuple[str, ...] = ()
        self.containers: list[Container] = []
        self._volumes: list[Object] = []
        self._store: PodVolumes | None = None
        self.update(pod)

    @property
    def name(self) -> str:
        """NAMESPACE/NAME."""
        meta = self.pod["metadata"]
        return f"{meta['namespace']}/{meta['name']}"

    # what the kubelet tells us

    def update(self, pod: Object) -> None:
        """The object has changed."""
        self.pod = pod
        if pod["metadata"].get("deletionTimestamp"):
            self._ending.set()
        if self._sent and _differs(self._sent, pod.get("status") or {}):
            self._dirty.set()  # someone else wrote our status, such as the node controller

    def gone(self) -> None:
        """The object is no longer there: end at once, and leave no status."""
        self._gone = True
        self._ending.set()

    def inputs_changed(self, kind: str, namespace: str, name: str) -> None:
        """A Secret or ConfigMap has changed."""
        same = namespace == self.pod["metadata"]["namespace"]
        store = self._store
        if same and (store is None or store.uses(self._volumes, kind, name)):
            self._inputs.set()

    # the pod's life

    async def run(self) -> None:
        """Serve the pod until it is gone. Ends by cancellation when the node loses power."""
        writer = asyncio.create_task(self._write_status())
        life = asyncio.create_task(self._live())
        try:
            await self._ending.wait()
            await self._end()
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            await self._node.runtime.remove(self.uid)
            await self._delete(writer)
        finally:
            self._node.pool.release(self.uid)
            for task in (life, writer):
                task.cancel()
            await asyncio.gather(life, writer, return_exceptions=True)

    async def _live(self) -> None:
        over = (self.pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
        if over or self._ending.is_set():
            return
        try:
            await self._set_up()
            async with asyncio.TaskGroup() as group:
                for container in self.containers:
                    group.create_task(container.run())
                if self._store is not None:
                    group.create_task(self._store.keep_tokens(self._volumes))
                    group.create_task(self._refresh_volumes(self._store))
        except* LabError as errors:
            if not self._node.runtime.lost.is_set():
                _log.error("pod_failed", pod=self.name, error=str(errors.exceptions[0]))
        except* Exception:  # noqa: BLE001 - a task root: an odd manifest must not go unheard
            _log.exception("pod_failed", pod=self.name)

    async def _set_up(self) -> None:
        """Network and volumes; tried until they can be made. The reason is shown in the status."""
        before = self.pod.get("status", {}).get("containerStatuses") or []
        restarts = {
            item["name"]: int(item.get("restartCount", 0)) + 1
            for item in before
            if item.get("containerID")
        }
        around = Surroundings(
            self.pod, self._node.runtime, self._prepare, self._target, self._dirty.set
        )
        self.containers = [
            Container(spec, around, restarts.get(spec["name"], 0))
            for spec in podspec.containers(self.pod)
        ]
        while True:
            self._inputs.clear()
            try:
                await self._network()
                await self._mount()
                return
            except (LabError, KubeError) as error:
                if self._node.runtime.lost.is_set():
                    raise LabError(str(error)) from error
                self._waiting("ContainerCreating", str(error))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._inputs.wait(), _RETRY_S)

    def _waiting(self, reason: str, message: str) -> None:
        for container in self.containers:
            container.state.state = status.waiting(reason, message)
        self._dirty.set()

    async def _network(self) -> None:
        if self._ips:
            return
        if self.pod["spec"].get("hostNetwork"):
            self._ips = self._node.addresses
            return
        wanted = [item["ip"] for item in self.pod.get("status", {}).get("podIPs") or []]
        addresses = self._node.pool.take(self.uid, wanted)
        await self._node.runtime.sandbox(self.uid, addresses)
        self._ips = tuple(entry["address"] for entry in addresses)

    async def _mount(self) -> None:
        """Volumes, for the pods that can see them: those that run a program."""
        specs = podspec.containers(self.pod)
        if all(podspec.served(spec) for spec in specs):
            return
        context = self._context()
        self._volumes = list(self.pod["spec"].get("volumes") or [])
        if not any(podspec.mounted_token(spec) for spec in specs):
            account = await self._account()
            if access := podspec.api_access(self.pod["spec"], account):
                self._volumes.append(access)
        node = self._node
        if self._store is None:
            self._store = PodVolumes(self.pod, context, node.runtime, node.api, node.ca_file)
        await self._store.mount(self._volumes)

    async def _account(self) -> Object | None:
        name = self.pod["spec"].get("serviceAccountName") or "default"
        namespace = self.pod["metadata"]["namespace"]
        return await self._node.api.get(kube.path("serviceaccounts", namespace, name))

    async def _refresh_volumes(self, store: PodVolumes) -> None:
        while True:
            await self._inputs.wait()
            self._inputs.clear()
            await store.refresh(self._volumes)

    def _context(self) -> podspec.Context:
        node = self._node
        return podspec.Context(
            node=node.node,
            host_ips=node.addresses,
            pod_ips=self._ips,
            api_host=node.api_host,
            api_port=node.api_port,
            search=node.search,
            keep=node.keep,
            look_up=node.look_up,
        )

    def _prepare(self, spec: Object) -> Launch:
        places = self._store.places if self._store else {}
        log = f"{self.pod['metadata']['name']}/{spec['name']}.log"
        if podspec.TOKEN_VOLUME in places and not podspec.mounted_token(spec):
            mount = {
                "name": podspec.TOKEN_VOLUME,
                "mountPath": podspec.TOKEN_DIR,
                "readOnly": True,
            }
            spec = {**spec, "volumeMounts": [*(spec.get("volumeMounts") or []), mount]}
        return podspec.launch(self.pod, spec, self._context(), places, log)

    def _target(
        self, spec: Object, run: Callable[..., Awaitable[tuple[int | None, str]]]
    ) -> probes.Target:
        names = {
            port["name"]: int(port["containerPort"])
            for port in spec.get("ports") or []
            if port.get("name")
        }
        return probes.Target(self._ips[0], names, self._node.api.socket, run)

    async def _end(self) -> None:
        grace = 0.0 if self._gone else podspec.grace_s(self.pod)
        stops = [asyncio.create_task(container.stop(grace)) for container in self.containers]
        await asyncio.gather(*stops)

    # status

    def _status(self) -> Object:
        states = [container.state for container in self.containers]
        return status.pod_status(
            self.pod, states, self._node.addresses, self._ips, self._started_s, time.time()
        )

    async def _write_status(self) -> None:
        """Write the status whenever it has changed; what cannot be written now is written later."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            fresh = self._status()
            if not self.containers or (
                fresh == self._sent and not _differs(fresh, self.pod.get("status") or {})
            ):
                continue
            try:
                await self._node.api.patch(self._url("status"), self._patch(fresh))
                self._sent = fresh
            except Unreachable:
                self._dirty.set()
                await asyncio.sleep(_OFFLINE_RETRY_S)
            except (NotFound, Conflict):
                return  # it is another pod of that name by now; ours is about to be told
            except KubeError as error:
                _log.warning("pod_status_failed", pod=self.name, error=str(error))
                self._dirty.set()
                await asyncio.sleep(_OFFLINE_RETRY_S)

    def _patch(self, fresh: Object) -> Object:
        return {"metadata": {"uid": self.uid}, "status": fresh}

    def _url(self, sub: str = "") -> str:
        meta = self.pod["metadata"]
        base = kube.path("pods", meta["namespace"], meta["name"])
        return f"{base}/{sub}" if sub else base

    async def _delete(self, writer: asyncio.Task[None]) -> None:
        """The kubelet's last word: the object goes, unless it is another pod's by now."""
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        body = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": self.uid},
        }
        while not self._gone:
            try:
                await self._node.api.delete(self._url(), body)
                return
            except (NotFound, Conflict):
                return
            except KubeError as error:
                _log.info("pod_delete_late", pod=self.name, error=str(error))
                await asyncio.sleep(_OFFLINE_RETRY_S)


def _differs(ours: Object, theirs: Object) -> bool:
    def essence(item: Object) -> Object:
        ready = {c["type"]: c.get("status") for c in item.get("conditions") or []}
        return {"phase": item.get("phase"), "ip": item.get("podIP"), "ready": ready.get("Ready")}

    return essence(ours) != essence(theirs)
