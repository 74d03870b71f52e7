"""The lab's daemon: the scheduler and every node's kubelet, in one process.

Run as `python -m lbctl.lab.daemon LAB`; `lbctl.lab.bringup` does. It reads the lab's state (which
machines there are) and `cluster.json` (where the API server is), and watches both for machines that
are added. `kubelet.sock` takes questions and faults: see `lbctl.lab.control`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import structlog

from lbctl import log
from lbctl.errors import LabError
from lbctl.lab import kubeproxy
from lbctl.lab.cluster import binaries
from lbctl.lab.kubelet import api as kube
from lbctl.lab.kubelet.binder import Binder
from lbctl.lab.kubelet.containers import Container
from lbctl.lab.kubelet.kubelet import Kubelet, Machine, Shared
from lbctl.lab.lab import Lab
from lbctl.lab.topology import plays

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
SOCKET: Final = "kubelet.sock"
CLUSTER: Final = "cluster.json"
ADMIN: Final = "cluster/admin.kubeconfig"  # as the cluster writes it: for use inside the lab
ROLES: Final = ("control", "node")
_LOOK_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """How the lab's own processes reach the API server, from inside the lab. In `cluster.json`."""

    kind: str
    url: str
    ca_file: Path
    token: str
    machine: str  # the API server's

    @classmethod
    def read(cls, directory: Path) -> ClusterAccess:
        """Of the lab in `directory`. Raises LabError if no cluster has been started."""
        try:
            data = json.loads((directory / CLUSTER).read_text("utf-8"))
            return cls(**{**data, "ca_file": Path(data["ca_file"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LabError(f"{directory / CLUSTER}: no cluster: {error}") from error

    def write(self, directory: Path) -> None:
        """For `read`; readable by root alone, because of the token."""
        new = directory / f"{CLUSTER}.new"
        new.touch(mode=0o600)
        fields = {name: str(getattr(self, name)) for name in self.__slots__}
        new.write_text(json.dumps(fields), "utf-8")
        new.replace(directory / CLUSTER)


class Daemon:
    """All kubelets, the scheduler and what they share."""

    def __init__(self, lab: Lab, access: ClusterAccess, api: kube.Api) -> None:
        self._lab = lab
        self._api = api
        self._kubelets: dict[str, Kubelet] = {}
        self._written = 0  # when the lab's state that we know was written
        self._pods = kube.Reflector(api, kube.path("pods"), self._pod_changed)
        self._nodes = kube.Reflector(api, kube.path("nodes"), self._node_changed)
        self._inputs = {
            "secrets": kube.Reflector(api, kube.path("secrets"), self._secret_changed),
            "configMaps": kube.Reflector(api, kube.path("configmaps"), self._config_changed),
        }
        self._binder = Binder(api, self._all_pods, lambda: list(self._nodes.objects.values()))
        where = urlsplit(access.url)
        self._shared = Shared(
            url=access.url,
            ca_file=access.ca_file,
            token=access.token,
            logs=lab.directory / "logs",
            pods=self._all_pods,
            look_up=self._look_up,
            api_host=where.hostname or "",
            api_port=where.port or 443,
            companion=self._kube_proxy if access.kind == "kubernetes" else None,
        )

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            for reflector in (self._pods, self._nodes, *self._inputs.values()):
                group.create_task(reflector.run())
            group.create_task(self._binder.run())
            group.create_task(self._serve_control())
            while True:
                for machine in self._machines():
                    if machine.name not in self._kubelets:
                        kubelet = Kubelet(machine, self._shared)
                        self._kubelets[machine.name] = kubelet
                        group.create_task(kubelet.run())
                await asyncio.sleep(_LOOK_S)

    async def _kube_proxy(self, machine: Machine) -> None:
        if not plays(machine.role, "node"):
            return
        program = await asyncio.to_thread(binaries.find, lambda _: None) / "kube-proxy"
        directory = self._lab.directory
        await kubeproxy.keep(machine, program, directory, directory / ADMIN)

    def _machines(self) -> list[Machine]:
        """The nodes of the lab as its state says now; the last known ones while it is written."""
        with suppress(LabError, OSError):
            written = (self._lab.directory / "lab.json").stat().st_mtime_ns
            if written != self._written:
                self._lab = Lab.load(self._lab.name)
                self._written = written
        return list(dict.fromkeys(m for role in ROLES for m in self._lab.of_role(role)))

    def _all_pods(self) -> list[Object]:
        return list(self._pods.objects.values())

    def _look_up(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._inputs[kind].objects.get((namespace, name))

    # watches

    def _pod_changed(self, key: tuple[str, str], pod: Object | None) -> None:
        for kubelet in self._kubelets.values():
            if pod is None:
                kubelet.removed(*key)
            else:
                kubelet.changed(pod)
        self._binder.changed()

    def _node_changed(self, key: tuple[str, str], node: Object | None) -> None:
        kubelet = self._kubelets.get(key[1])
        if kubelet is not None and node is not None:
            kubelet.node_changed(node)
        self._binder.changed()

    def _secret_changed(self, key: tuple[str, str], _: Object | None) -> None:
        for kubelet in self._kubelets.values():
            kubelet.input_changed("secrets", *key)

    def _config_changed(self, key: tuple[str, str], _: Object | None) -> None:
        for kubelet in self._kubelets.values():
            kubelet.input_changed("configMaps", *key)

    # control

    async def _serve_control(self) -> None:
        path = self._lab.directory / SOCKET
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._control, path)
        path.chmod(0o600)
        async with server:
            await server.serve_forever()

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question, one answer, each a JSON line."""
        try:
            try:
                answer = await self._answer(json.loads(await reader.readline()))
            except (LabError, ValueError, KeyError) as error:
                answer = {"error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except OSError as error:
            _log.info("control_lost", error=str(error))
        finally:
            writer.close()

    async def _answer(self, request: Object) -> Object:
        if request["op"] == "containers":
            return {"containers": [self._row(*found) for found in self._containers()]}
        if request["op"] == "kill":
            container = self._find(request["pod"], request["container"])
            await container.kill(float(request["grace_s"]))
            return {}
        raise LabError(f"no such operation: {request['op']}")

    def _containers(self) -> list[tuple[Kubelet, Object, Container]]:
        return [
            (kubelet, pod.pod, container)
            for kubelet in self._kubelets.values()
            for pod in kubelet.pods.values()
            for container in pod.containers
        ]

    @staticmethod
    def _row(kubelet: Kubelet, pod: Object, container: Container) -> Object:
        return {
            "node": kubelet.name,
            "namespace": pod["metadata"]["namespace"],
            "pod": pod["metadata"]["name"],
            "container": container.name,
            "pidns": container.pidns,
            "restarts": container.state.restarts,
            "ready": container.state.ready,
        }

    def _find(self, pod: str, name: str) -> Container:
        """pod: NAME or NAMESPACE/NAME."""
        for _, found, container in self._containers():
            meta = found["metadata"]
            here = pod in (meta["name"], f"{meta['namespace']}/{meta['name']}")
            if here and container.name == name:
                return container
        raise LabError(f"no container {name!r} of a pod {pod!r} runs in this lab")


async def serve(lab: Lab) -> None:
    """Run the daemon of a lab until SIGTERM or SIGINT; its containers end with it."""
    access = ClusterAccess.read(lab.directory)
    netns = lab.machine(access.machine).netns
    loop = asyncio.get_running_loop()
    async with kube.Api(access.url, access.ca_file, access.token, netns) as api:
        running = asyncio.create_task(Daemon(lab, access, api).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, running.cancel)
        with suppress(asyncio.CancelledError):
            await running


def main() -> None:
    """Command line of the module."""
    log.setup()
    asyncio.run(serve(Lab.load(sys.argv[1])))


if __name__ == "__main__":
    main()
