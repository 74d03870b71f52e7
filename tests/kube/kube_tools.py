"""What the contract tests use: kubectl as a user runs it, plain HTTP, polling, manifests."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from tests import programs

LIMIT_S = 90.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
Obj = dict[str, Any]


def until(what: str, probe: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """The first true result of `probe`; fails with what was waited for and the last result."""
    end = time.monotonic() + limit_s
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > end:
            pytest.fail(f"waited {limit_s:.0f} s for: {what}; last: {found!r}")
        time.sleep(0.02)


class Kubectl:
    """`kubectl(...)` returns standard output; a failure fails the test with its words."""

    def __init__(self, kubeconfig: Path, namespace: str = "") -> None:
        self._program = programs.kubectl()
        self._kubeconfig = kubeconfig
        self._namespace = namespace

    def run(self, *arguments: str, stdin: Any = None) -> subprocess.CompletedProcess[str]:
        """Run it and look at everything. `stdin` is text, or an object written as JSON."""
        space = ["--namespace", self._namespace] if self._namespace else []
        text = stdin if isinstance(stdin, str) or stdin is None else json.dumps(stdin)
        cache = self._kubeconfig.parent / "kubectl-cache"
        return subprocess.run(
            [self._program, "--cache-dir", str(cache), *space, *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={**os.environ, "KUBECONFIG": str(self._kubeconfig)},
        )

    def __call__(self, *arguments: str, stdin: Any = None) -> str:
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def fails(self, *arguments: str, stdin: Any = None) -> str:
        """Standard error of a command that must fail."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode != 0, f"kubectl {' '.join(arguments)} succeeded: {done.stdout}"
        return done.stderr

    def json(self, *arguments: str) -> Obj:
        """`get … -o json`, decoded."""
        found: Obj = json.loads(self(*arguments, "-o", "json"))
        return found


class Answer:
    """Status code and decoded body."""

    def __init__(self, code: int, body: Any) -> None:
        self.code = code
        self.body = body

    def ok(self) -> Obj:
        """The body of a success."""
        assert 200 <= self.code < 300, f"{self.code}: {self.body}"
        found: Obj = self.body
        return found


class Raw:
    """Requests without a client library. Bodies are JSON."""

    def __init__(self, url: str, ca_file: Path, token: str | None) -> None:
        self._host = urlsplit(url).netloc
        self._context = ssl.create_default_context(cafile=str(ca_file))
        self._token = token
        self._open: list[http.client.HTTPSConnection] = []

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in self._open:
            connection.close()

    def _send(
        self, method: str, path: str, body: Any, kind: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPSConnection(self._host, context=self._context, timeout=LIMIT_S)
        self._open.append(connection)
        sent = {"Accept": "application/json", **headers}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            sent["Content-Type"] = kind
            data = body if isinstance(body, (str, bytes)) else json.dumps(body)
        connection.request(method, path, body=data, headers=sent)
        return connection.getresponse()

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        kind: str = "application/json",
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Answer:
        url = path + (f"?{urlencode(query)}" if query else "")
        response = self._send(method, url, body, kind, headers or {})
        data = response.read()
        try:
            found = json.loads(data)
        except ValueError:
            found = data.decode(errors="replace")
        return Answer(response.status, found)

    def watch(self, path: str, **query: Any) -> Iterator[Obj]:
        """Events of a watch until the server ends it."""
        url = f"{path}?{urlencode({'watch': 'true', **query})}"
        response = self._send("GET", url, None, "", {})
        if response.status != 200:
            yield {"type": "HTTP", "object": json.loads(response.read())}
            return
        for line in response:
            yield json.loads(line)


def service(name: str = "web", **spec: Any) -> Obj:
    """A LoadBalancer Service for `app=NAME` on port 80."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "type": "LoadBalancer",
            "loadBalancerClass": "lbctl.io/bgp",
            "selector": {"app": name},
            "ports": [{"port": 80, "targetPort": "http"}],
            **spec,
        },
    }


def pod_template(name: str) -> Obj:
    """One container with a named port."""
    return {
        "metadata": {"labels": {"app": name}},
        "spec": {
            "containers": [
                {
                    "name": "web",
                    "image": "lbctl/pod:1",
                    "ports": [{"name": "http", "containerPort": 8080}],
                }
            ]
        },
    }


def workload(kind: str, name: str = "web", **spec: Any) -> Obj:
    """A Deployment, ReplicaSet, DaemonSet or StatefulSet."""
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": pod_template(name),
            **spec,
        },
    }


def config_map(name: str, **data: str) -> Obj:
    """A ConfigMap."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def now() -> str:
    """As a Kubernetes time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class HeartbeatNode:
    """A ready Node whose Lease is renewed as long as its context lasts."""

    def __init__(self, client: Callable[[], Raw], name: str, **labels: str) -> None:
        self.name = name
        self._client = client
        self._ended = threading.Event()
        lease = {
            "metadata": {"name": name},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": 40},
        }
        with client() as raw:
            raw("POST", "/api/v1/nodes", node_body(name, **labels)).ok()
            raw("POST", LEASES, lease).ok()
            path = f"/api/v1/nodes/{name}"
            until(
                "the taint of a new node to go",
                lambda: not raw("GET", path).ok().get("spec", {}).get("taints"),
            )
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        kind = "application/merge-patch+json"
        while not self._ended.wait(3.0):
            with self._client() as raw:
                spec = {"renewTime": now().replace("Z", ".000000Z")}
                raw("PATCH", f"{LEASES}/{self.name}", {"spec": spec}, kind)

    def __enter__(self) -> HeartbeatNode:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the beat and delete the Node and its Lease."""
        self._ended.set()
        self._thread.join()
        with self._client() as raw:
            raw("DELETE", f"/api/v1/nodes/{self.name}")
            raw("DELETE", f"{LEASES}/{self.name}")


def node_body(name: str, **labels: str) -> Obj:
    """A Node as a kubelet registers it, ready."""
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "KubeletReady",
        "message": "it plays one",
        "lastHeartbeatTime": now(),
        "lastTransitionTime": now(),
    }
    info = {
        "kubeletVersion": "v1.36.4",
        "osImage": "Debian",
        "kernelVersion": "6",
        "containerRuntimeVersion": "lab://1",
        "architecture": "amd64",
        "operatingSystem": "linux",
    }
    info |= dict.fromkeys(("bootID", "kubeProxyVersion", "machineID", "systemUUID"), "")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {
            "conditions": [condition],
            "addresses": [{"type": "InternalIP", "address": "192.0.2.77"}],
            "nodeInfo": info,
        },
    }


class Kubelet:
    """Plays scheduler and kubelet by hand: binds Pods, reports them ready, ends them."""

    def __init__(self, raw: Raw, namespace: str) -> None:
        self._raw = raw
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._count = 0

    def pods(self, labels: str = "") -> list[Obj]:
        """All Pods, oldest name first."""
        query: dict[str, Any] = {"labelSelector": labels} if labels else {}
        items: list[Obj] = self._raw("GET", self._pods, **query).ok()["items"]
        return items

    def bind(self, pod: str, node: str) -> None:
        """As a scheduler does."""
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        self._raw("POST", f"{self._pods}/{pod}/binding", body).ok()

    def ready(self, pod: str, *, ready: bool = True, address: str = "", second: str = "") -> None:
        """Report the Pod as running, with an address of its own; `second` of the other family."""
        if not address:
            self._count += 1
            address = f"10.244.{self._count // 200}.{self._count % 200 + 1}"
        stamp = now()
        value = "True" if ready else "False"
        conditions = [
            {"type": kind, "status": value, "lastTransitionTime": stamp}
            for kind in ("Ready", "ContainersReady")
        ]
        state = {
            "phase": "Running",
            "conditions": conditions,
            "podIP": address,
            "podIPs": [{"ip": ip} for ip in (address, second) if ip],
            "startTime": stamp,
        }
        patch = {"status": state}
        kind = "application/strategic-merge-patch+json"
        self._raw("PATCH", f"{self._pods}/{pod}/status", patch, kind).ok()

    def run_all(self, node: str, labels: str = "") -> None:
        """Bind and start whatever waits; finish whatever is being deleted."""
        for pod in self.pods(labels):
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                self.finish(name)
            elif not pod["spec"].get("nodeName"):
                self.bind(name, node)
                self.ready(name)

    def finish(self, pod: str) -> None:
        """What a kubelet does when the containers have ended."""
        answer = self._raw("DELETE", f"{self._pods}/{pod}", {"gracePeriodSeconds": 0})
        assert answer.code in {200, 404}, answer.body


def crd() -> Path:
    """The manifest of eips.lbctl.io."""
    return Path(__file__).parents[2] / "deploy" / "kustomize" / "base" / "crd.yaml"
