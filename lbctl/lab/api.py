"""The lab's own hands on the cluster: blocking calls for demo, tests, bench and drills.

One event loop inside, so that callers stay plain. Objects are plain dicts as `kubectl -o json`
prints them. Every wait has a limit and says what it waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import msgspec

from lbctl.core import names
from lbctl.errors import KubeError, LabError, NotFound
from lbctl.kube import client as kube
from lbctl.kube.client import Client, Resource

T = TypeVar("T")

DEPLOYMENTS: Final = Resource("apps/v1", "deployments")
DAEMON_SETS: Final = Resource("apps/v1", "daemonsets")
STATEFUL_SETS: Final = Resource("apps/v1", "statefulsets")
_APPLY: Final = "application/apply-patch+yaml"
_KINDS: Final = {
    "ConfigMap": kube.CONFIG_MAPS,
    "DaemonSet": DAEMON_SETS,
    "Deployment": DEPLOYMENTS,
    "Secret": kube.SECRETS,
    "Service": kube.SERVICES,
    "StatefulSet": STATEFUL_SETS,
}


def wait(
    what: str, look: Callable[[], T | None], limit_s: float = 60.0, every_s: float = 0.05
) -> T:
    """Call `look` until it gives something true; that is the result. Raises LabError at the limit.

    An API server that cannot be reached for a moment counts as "not yet".
    """
    deadline = time.monotonic() + limit_s
    last = ""
    while True:
        try:
            if seen := look():
                return seen
        except KubeError as error:
            last = f" (last: {error})"
        if time.monotonic() > deadline:
            raise LabError(f"waited {limit_s:.0f} s for {what}{last}")
        time.sleep(every_s)


class Api:
    """Blocking access to one cluster. Use as a context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        self._runner = asyncio.Runner()
        self._client: Client = self._runner.run(Client.from_environment(kubeconfig, timeout_s=20))

    def __enter__(self) -> Api:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and the loop."""
        self._runner.run(self._client.close())
        self._runner.close()

    def get(self, resource: Resource, name: str, namespace: str = "default") -> dict[str, Any]:
        """One object. Raises NotFound."""
        found: dict[str, Any] = self._runner.run(self._client.get(resource.path(namespace, name)))
        return found

    def find(
        self, resource: Resource, name: str, namespace: str = "default"
    ) -> dict[str, Any] | None:
        """One object, or None where there is none."""
        try:
            return self.get(resource, name, namespace)
        except NotFound:
            return None

    def all(
        self, resource: Resource, namespace: str = "", selector: str = ""
    ) -> list[dict[str, Any]]:
        """All objects of a kind, in a namespace or in all, by label selector."""
        params = {"labelSelector": selector} if selector else None
        found = self._runner.run(self._client.list(resource.path(namespace), params))
        return [msgspec.json.decode(item) for item in found.items or []]

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Server-side apply of each, as field manager `lbctl-lab`."""
        for item in objects:
            metadata = item["metadata"]
            resource = _KINDS[item["kind"]]
            path = resource.path(metadata.get("namespace", "default"), metadata["name"])
            query = "?fieldManager=lbctl-lab&force=true"
            self._runner.run(self._client.patch(path + query, item, _APPLY))

    def patch(
        self,
        resource: Resource,
        name: str,
        body: Mapping[str, Any],
        namespace: str = "default",
        sub: str = "",
    ) -> None:
        """A JSON merge patch, of the object or of a subresource."""
        self._runner.run(self._client.patch(resource.path(namespace, name, sub), body))

    def delete(self, resource: Resource, name: str, namespace: str = "default") -> None:
        """Delete; gone already is success."""
        self._runner.run(self._client.delete(resource.path(namespace, name)))

    def scale(self, name: str, replicas: int, namespace: str = "default") -> None:
        """Set a Deployment's number of replicas."""
        self.patch(DEPLOYMENTS, name, {"spec": {"replicas": replicas}}, namespace)

    def ready_pods(self, app: str, namespace: str = "default") -> list[str]:
        """Names of the ready, not terminating pods labelled app=NAME, sorted."""
        pods = self.all(kube.PODS, namespace, f"app={app}")
        return sorted(p["metadata"]["name"] for p in pods if is_ready(p))

    def pod_nodes(self, app: str, namespace: str = "default") -> dict[str, str]:
        """Node of each pod labelled app=NAME that is not terminating."""
        pods = self.all(kube.PODS, namespace, f"app={app}")
        return {
            p["metadata"]["name"]: p["spec"].get("nodeName", "")
            for p in pods
            if "deletionTimestamp" not in p["metadata"]
        }

    def eip_of(self, service: str, namespace: str = "default") -> str | None:
        """The first address in the Service's status, None while it is pending."""
        found = self.eips_of(service, namespace)
        return found[0] if found else None

    def eips_of(self, service: str, namespace: str = "default") -> list[str]:
        """All addresses in the Service's status, in its order; [] while it is pending."""
        found = self.find(kube.SERVICES, service, namespace) or {}
        ingress = found.get("status", {}).get("loadBalancer", {}).get("ingress") or []
        return [entry["ip"] for entry in ingress if entry.get("ip")]

    def system_pods(self, app: str) -> list[dict[str, Any]]:
        """Our own pods (`names.MANAGER_APP` or `names.AGENT_APP`), sorted by name."""
        pods = self.all(kube.PODS, names.NAMESPACE, f"app.kubernetes.io/name={app}")
        return sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Ready and not terminating."""
    conditions = pod.get("status", {}).get("conditions") or []
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]
