"""An API server for one agent or manager: the lists of a `Cluster`, and watches whose lines the
bench writes. It takes no writes: a manager never leads.

It is as thin as can be, so that what is measured is the agent or manager.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from lbctl.core import names
from lbctl.core.model import Eip, Node, ServiceEndpoints
from lbctl.kube import client
from lbctl.kube.objects import eip_body

from .cluster import CONFIG_TEXT, Cluster

_Object = dict[str, Any]
# What a real server sends with every object, and nobody here reads.
_UNREAD: Final = [
    {
        "manager": "kube-controller-manager",
        "operation": "Update",
        "apiVersion": "v1",
        "time": "2026-11-22T00:00:00Z",
        "fieldsType": "FieldsV1",
        "fieldsV1": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {"f:ports": {}}},
    }
]


class FakeApi:
    """Serves HTTP on a free port of the loopback. Use as an async context manager; again, it is
    back at the same port.

    key: of the probes, as the Secret has it for managers.
    """

    def __init__(self, cluster: Cluster, key: bytes = b"") -> None:
        self._lists = dict(_lists(cluster, key))
        self._watches: dict[str, asyncio.StreamWriter] = {}
        self._version = 1
        self._port = 0

    async def __aenter__(self) -> FakeApi:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()

    def kubeconfig(self, directory: Path) -> Path:
        """Write one that leads here."""
        one = {"cluster": {"server": f"http://127.0.0.1:{self._port}"}, "name": "bench"}
        context = {"context": {"cluster": "bench", "user": "bench"}, "name": "bench"}
        made = {"clusters": [one], "contexts": [context], "users": [{"name": "bench", "user": {}}]}
        path = directory / "kubeconfig"
        path.write_bytes(msgspec.json.encode({**made, "current-context": "bench"}))
        return path

    @property
    def watched(self) -> bool:
        """Whether the agent follows everything."""
        return self._lists.keys() <= self._watches.keys()

    def change(self, behind: ServiceEndpoints) -> None:
        """A Service has other endpoints: one line of the watch, written at once."""
        self._version += 1
        line = {"type": "MODIFIED", "object": _slice(behind, self._version)}
        data = msgspec.json.encode(line) + b"\n"
        self._watches[client.ENDPOINT_SLICES.path()].write(b"%x\r\n%b\r\n" % (len(data), data))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await reader.readline():
            path, _, query = request.split()[1].decode().partition("?")
            length = 0
            while header := (await reader.readline()).strip().lower():
                if header.startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            await reader.readexactly(length)
            if path not in self._lists:
                refusal = b"404 Not Found" if request.startswith(b"GET") else b"409 Conflict"
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 2\r\n\r\n{}" % refusal)
            elif "watch=true" in query:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                self._watches[path] = writer
            else:
                body = self._lists[path]
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()


def _lists(cluster: Cluster, key: bytes) -> Iterable[tuple[str, bytes]]:
    """Path and body of everything that an agent or a manager lists."""
    yield client.SERVICES.path(), _list(map(_service, range(len(cluster.refs))))
    yield client.NODES.path(), _list(map(_node, cluster.nodes))
    yield client.EIPS.path(), _list(map(_eip, cluster.eips.values()))
    yield client.ENDPOINT_SLICES.path(), _list(map(_slice, cluster.endpoints.values()))
    meta = _meta(names.ACCEPTED_CONFIG_MAP, names.NAMESPACE)
    accepted = {"metadata": meta, "data": {names.CONFIG_KEY: CONFIG_TEXT, "generation": "1"}}
    yield client.CONFIG_MAPS.path(names.NAMESPACE), _list([accepted])
    current = base64.b64encode(base64.b64encode(key)).decode()
    secret = {"metadata": _meta(names.PROBE_SECRET, names.NAMESPACE), "data": {"current": current}}
    yield client.SECRETS.path(names.NAMESPACE), _list([secret])
    yield client.PODS.path(names.NAMESPACE), _list([])
    yield client.NAMESPACES.path(), _list([])


def _list(items: Iterable[_Object]) -> bytes:
    return msgspec.json.encode({"metadata": {"resourceVersion": "1"}, "items": list(items)})


def _meta(name: str, namespace: str = "default", version: int = 1, **more: Any) -> _Object:
    return {
        "name": name,
        "namespace": namespace,
        "uid": f"1b4e28ba-2fa1-11d2-883f-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": "2026-11-22T00:00:00Z",
        "labels": {"app": name},
        "managedFields": _UNREAD,
        **more,
    }


def _service(number: int) -> _Object:
    name = f"s{number:05}"
    address = f"10.96.{number // 250}.{1 + number % 250}"
    return {
        "metadata": _meta(name, finalizers=[names.FINALIZER]),
        "spec": {
            "type": "LoadBalancer",
            "loadBalancerClass": names.LOAD_BALANCER_CLASS,
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 8080, "nodePort": 30000}],
            "selector": {"app": name},
            "clusterIP": address,
            "clusterIPs": [address],
            "externalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "sessionAffinity": "None",
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "198.18.0.0", "ipMode": "VIP"}]}},
    }


def _node(node: Node) -> _Object:
    return {
        "metadata": _meta(node.name, ""),
        "spec": {"podCIDRs": [str(cidr) for cidr in node.pod_cidrs]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": str(a)} for a in node.addresses],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def _eip(eip: Eip) -> _Object:
    return {**eip_body(eip), "metadata": _meta(str(eip.address), "")}


def _slice(behind: ServiceEndpoints, version: int = 1) -> _Object:
    (port,) = behind.ports
    name = behind.service.name
    return {
        "metadata": _meta(
            f"{name}-abcde", version=version, labels={"kubernetes.io/service-name": name}
        ),
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [str(end.address)],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": end.node,
                "targetRef": {"kind": "Pod", "name": f"{name}-{number}", "namespace": "default"},
            }
            for number, end in enumerate(port.endpoints)
        ],
        "ports": [{"name": port.name, "protocol": "TCP", "port": 8080}],
    }
