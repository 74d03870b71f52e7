"""One node's kubelet: registers the Node, renews its Lease, serves the pods that are bound to it.

It lives as long as its machine has power, and starts again with it. All its writes leave from the
node's own network namespace, so a node that is cut off goes NotReady as a real one does.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import structlog

from lbctl.errors import Conflict, KubeError, LabError, NotFound
from lbctl.lab.kubelet import api as kube
from lbctl.lab.kubelet.addresses import Pool
from lbctl.lab.kubelet.pods import NodeServices, Pod
from lbctl.lab.kubelet.runtime import Runtime
from lbctl.lab.kubelet.status import timestamp
from lbctl.lab.topology import plays

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
_LEASE_S: Final = 3.0
_LEASE_DURATION_S: Final = 40
_POWER_POLL_S: Final = 0.1
_RETRY_S: Final = 0.5
_VERSION: Final = "v1.36.4-lab"
CONTROL_LABEL: Final = "node-role.kubernetes.io/control-plane"
ROOT: Final = Path(__file__).resolve().parents[3]


class Machine(Protocol):
    """What the kubelet needs of `lbctl.lab.machine.Machine`."""

    @property
    def name(self) -> str:
        """Node name."""

    @property
    def role(self) -> str:
        """`node` or `control`."""

    @property
    def netns(self) -> Path:
        """File of its network namespace; another one after each power cut."""

    @property
    def pod_cidr(self) -> str:
        """Its pods' networks, comma-separated; "" without."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its own addresses."""

    @property
    def alive(self) -> bool:
        """Whether it has power."""

    @property
    def pid(self) -> int:
        """Its first process. Raises LabError without power."""

    def command(self, *argv: str) -> list[str]:
        """`argv` wrapped so that it runs inside the machine. Raises LabError without power."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all kubelets of the daemon share. `pods` gives every Pod object known now.

    companion: what else runs on a node while it has power, such as kube-proxy.
    """

    url: str
    ca_file: Path
    token: str
    logs: Path
    pods: Callable[[], list[Object]]
    look_up: Callable[[str, str, str], Object | None]
    api_host: str
    api_port: int
    companion: Callable[[Machine], Coroutine[Any, Any, None]] | None = None


class Kubelet:
    """The kubelet of one machine."""

    def __init__(self, machine: Machine, shared: Shared) -> None:
        self.machine = machine
        self.name = machine.name
        self.pods: dict[str, Pod] = {}
        self._shared = shared
        self._tasks: asyncio.TaskGroup | None = None
        self._services: NodeServices | None = None
        self._unready = asyncio.Event()

    async def run(self) -> None:
        """Serve the node for ever, from one power cut to the next."""
        while True:
            try:
                await self._boot()
                await self._powered()
            except (LabError, OSError) as error:
                if self.machine.alive:
                    _log.warning("kubelet_failed", node=self.name, error=str(error))
                await asyncio.sleep(_RETRY_S)
            except Exception:  # noqa: BLE001 - a task root: one node must not take the others down
                _log.exception("kubelet_failed", node=self.name)
                await asyncio.sleep(_RETRY_S)

    async def _boot(self) -> None:
        """Wait for power; nothing tells us of it, so ask."""
        while True:
            if self._booted():
                return
            await asyncio.sleep(_POWER_POLL_S)

    def _booted(self) -> bool:
        """Power is on and the network is there; before that the machine is still being made."""
        try:
            return self.machine.alive and bool(self.machine.addresses)
        except LabError:
            return False

    async def _powered(self) -> None:
        """One life of the machine."""
        runtime = Runtime(self.name, self._exited)
        await runtime.start(self.machine, self._shared.logs / self.name)
        shared = self._shared
        try:
            async with kube.Api(
                shared.url, shared.ca_file, shared.token, self.machine.netns
            ) as api:
                self._services = self._make_services(runtime, api)
                _log.info("kubelet_up", node=self.name, addresses=self._services.addresses)
                await self._serve(runtime, api)
        finally:
            self._services = None
            self.pods.clear()
            await runtime.stop()
            _log.info("kubelet_down", node=self.name)

    async def _serve(self, runtime: Runtime, api: kube.Api) -> None:
        async def life() -> None:
            async with asyncio.TaskGroup() as group:
                self._tasks = group
                group.create_task(self._keep_node(api))
                group.create_task(self._keep_lease(api))
                if self._shared.companion is not None:
                    group.create_task(self._shared.companion(self.machine))
                for pod in self._shared.pods():
                    self.changed(pod)

        living = asyncio.create_task(life())
        lost = asyncio.create_task(runtime.lost.wait())
        try:
            await asyncio.wait([living, lost], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._tasks = None
            living.cancel()
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
            with suppress(asyncio.CancelledError):
                await living

    def _make_services(self, runtime: Runtime, api: kube.Api) -> NodeServices:
        addresses = self.machine.addresses
        shared = self._shared
        cidrs = [cidr.strip() for cidr in self.machine.pod_cidr.split(",") if cidr.strip()]
        keep = {str(ROOT), sys.prefix, os.path.realpath(sys.base_prefix)}
        keep = {path for path in keep if not path.startswith("/usr")}
        outer = {path for path in keep for other in keep if path.startswith(f"{other}/")}
        return NodeServices(
            node=self.name,
            addresses=addresses,
            runtime=runtime,
            api=api,
            pool=Pool(cidrs),
            ca_file=shared.ca_file,
            api_host=shared.api_host,
            api_port=shared.api_port,
            search=str(Path(sys.executable).parent),
            keep=tuple(sorted(keep - outer)),
            look_up=shared.look_up,
        )

    # pods

    def changed(self, pod: Object) -> None:
        """A Pod object is new or has changed; those of other nodes are none of ours."""
        if pod["spec"].get("nodeName") != self.name or self._tasks is None:
            return
        uid = pod["metadata"]["uid"]
        if uid in self.pods:
            self.pods[uid].update(pod)
            return
        self._forget(pod["metadata"]["namespace"], pod["metadata"]["name"])
        assert self._services is not None
        self.pods[uid] = Pod(pod, self._services)
        self._tasks.create_task(self._run_pod(self.pods[uid]))

    async def _run_pod(self, pod: Pod) -> None:
        try:
            await pod.run()
        except LabError as error:
            if self._services is not None and not self._services.runtime.lost.is_set():
                _log.error("pod_failed", pod=pod.name, error=str(error))
        except Exception:  # noqa: BLE001 - a task root: one odd pod must not take the node down
            _log.exception("pod_failed", pod=pod.name)
        finally:
            self.pods.pop(pod.uid, None)

    def removed(self, namespace: str, name: str) -> None:
        """A Pod object is gone."""
        self._forget(namespace, name)

    def _forget(self, namespace: str, name: str) -> None:
        for pod in self.pods.values():
            if pod.name == f"{namespace}/{name}":
                pod.gone()

    def input_changed(self, kind: str, namespace: str, name: str) -> None:
        """A Secret (`secrets`) or ConfigMap (`configMaps`) has changed."""
        for pod in self.pods.values():
            pod.inputs_changed(kind, namespace, name)

    def _exited(self, key: str, code: int) -> None:
        uid, _, name = key.partition("/")
        pod = self.pods.get(uid)
        for container in pod.containers if pod else ():
            if container.name == name:
                container.exited(code)

    # the Node object

    def node_changed(self, node: Object) -> None:
        """Our Node as the API server has it now: repaired when someone calls it not ready."""
        conditions = {
            condition["type"]: condition.get("status")
            for condition in (node.get("status") or {}).get("conditions") or []
        }
        if conditions.get("Ready") != "True":
            self._unready.set()

    async def _keep_node(self, api: kube.Api) -> None:
        """Register, and say Ready whenever someone else has said otherwise."""
        while True:
            self._unready.clear()
            try:
                await self._register(api)
                await api.patch(kube.path("nodes", name=self.name) + "/status", self._status())
            except KubeError as error:
                _log.info("node_status_late", node=self.name, error=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            await self._unready.wait()

    async def _register(self, api: kube.Api) -> None:
        wanted = self._node()
        try:
            await api.create(kube.path("nodes"), wanted)
        except Conflict:
            await api.patch(
                kube.path("nodes", name=self.name),
                {"metadata": {"labels": wanted["metadata"]["labels"]}},
            )

    def _node(self) -> Object:
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "lbctl.io/lab-role": self.machine.role,
        }
        spec: Object = {}
        if plays(self.machine.role, "control"):
            labels[CONTROL_LABEL] = ""
        if self.machine.role == "control":
            spec["taints"] = [{"key": CONTROL_LABEL, "effect": "NoSchedule"}]
        cidrs = [cidr.strip() for cidr in self.machine.pod_cidr.split(",") if cidr.strip()]
        if cidrs:
            spec |= {"podCIDR": cidrs[0], "podCIDRs": cidrs}
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": spec,
        }

    def _status(self) -> Object:
        now = timestamp(time.time())
        quiet = {"status": "False", "lastHeartbeatTime": now, "lastTransitionTime": now}
        conditions = [
            {"type": kind, "reason": f"KubeletHasNo{kind}", **quiet}
            for kind in ("MemoryPressure", "DiskPressure", "PIDPressure")
        ]
        ready = {"type": "Ready", "reason": "KubeletReady", "message": "the lab's kubelet is up"}
        conditions.append({**ready, **quiet, "status": "True"})
        assert self._services is not None
        addresses = [{"type": "InternalIP", "address": ip} for ip in self._services.addresses]
        capacity = {"cpu": "2", "memory": "4Gi", "pods": "110"}
        return {
            "status": {
                "addresses": [*addresses, {"type": "Hostname", "address": self.name}],
                "conditions": conditions,
                "capacity": capacity,
                "allocatable": capacity,
                "nodeInfo": _node_info(),
            }
        }

    async def _keep_lease(self, api: kube.Api) -> None:
        """Renew the Lease in kube-node-lease, from inside the node's network."""
        url = kube.path("leases", "kube-node-lease", group="coordination.k8s.io/v1")
        while True:
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            spec = {"renewTime": now, "leaseDurationSeconds": _LEASE_DURATION_S}
            spec["holderIdentity"] = self.name
            try:
                try:
                    await api.patch(f"{url}/{self.name}", {"spec": spec})
                except NotFound:
                    meta = {"name": self.name, "namespace": "kube-node-lease"}
                    kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
                    await api.create(url, {**kind, "metadata": meta, "spec": spec})
            except KubeError as error:
                _log.info("lease_late", node=self.name, error=str(error))
            await asyncio.sleep(_LEASE_S)


def _node_info() -> Object:
    machine = os.uname()
    return {
        "kubeletVersion": _VERSION,
        "kubeProxyVersion": "",
        "kernelVersion": machine.release,
        "operatingSystem": "linux",
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine.machine, "unknown"),
        "osImage": "lbctl lab",
        "containerRuntimeVersion": "lab://1",
        "machineID": "",
        "systemUUID": "",
        "bootID": "",
    }
