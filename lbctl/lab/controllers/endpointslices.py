"""EndpointSlices of Services with a selector, in the real controller's shape.

`desired` is pure: groups of endpoints by address family and resolved ports. The controller fits
them into the slices that exist with as few writes as it can, at most 100 endpoints in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Final, TypeAlias

import msgspec

from lbctl.lab.apiserver.api import Api
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.store import Change, Item, Key
from lbctl.lab.controllers.base import (
    Controller,
    Index,
    deleting,
    is_ready,
    node_of,
    owner_reference,
)

SLICES: Final = "endpointslices.discovery.k8s.io"
MANAGER: Final = "endpointslice-controller.k8s.io"
SERVICE_LABEL: Final = "kubernetes.io/service-name"
MANAGER_LABEL: Final = "endpointslice.kubernetes.io/managed-by"
HEADLESS_LABEL: Final = "service.kubernetes.io/headless"
ZONE_LABEL: Final = "topology.kubernetes.io/zone"
MAX_ENDPOINTS: Final = 100
Group: TypeAlias = tuple[str, bytes]  # address type, ports as JSON


class EndpointSlices(Controller):
    """The EndpointSlice controller."""

    name = "endpointslice"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._by_label = Index(self.store, "services", _first_pair)
        self._pods = Index(self.store, "pods", _label_pairs)
        self._slices = Index(self.store, SLICES, _owner_service)
        self._on_node = Index(self.store, "pods", node_of)
        self.store.subscribe("services", self.on_change)
        self.store.subscribe("pods", self._pod_changed)
        self.store.subscribe(SLICES, self._slice_changed)
        self.store.subscribe("nodes", self._node_changed)
        for item in self.store.items("services"):
            self.add((item.obj["metadata"]["namespace"], item.obj["metadata"]["name"]))

    def _pod_changed(self, change: Change) -> None:
        for item in (change.item, change.old):
            if item is not None:
                self._add_services(item.obj)

    def _node_changed(self, change: Change) -> None:
        """Pods on a node that does not exist are no endpoints."""
        if change.type != "MODIFIED":
            for item in self._on_node.get(change.key[1]):
                self._add_services(item.obj)

    def _add_services(self, pod: Obj) -> None:
        labels = pod["metadata"].get("labels") or {}
        for pair in _label_pairs(pod):
            for service in self._by_label.get(pair):
                if _selects(service.obj, labels):
                    meta = service.obj["metadata"]
                    self.add((meta["namespace"], meta["name"]))

    def _slice_changed(self, change: Change) -> None:
        for key in _owner_service(change.item.obj):
            self.add(key)

    def reconcile(self, key: Key) -> None:
        """Write what differs between the wanted and the existing slices of a Service."""
        item = self.store.get("services", *key)
        if item is None or deleting(item.obj):
            return
        service = item.obj
        if not service["spec"].get("selector") or service["spec"]["type"] == "ExternalName":
            return
        wanted = desired(service, self._selected(service), self._node)
        existing: dict[Group, list[Item]] = {}
        for found in self._slices.get(key):
            existing.setdefault(_group_of(found.obj), []).append(found)
        for family in service["spec"].get("ipFamilies") or ():
            if not any(group[0] == family for group in wanted):
                wanted[_placeholder(family, existing)] = {}
        for group, endpoints in wanted.items():
            self._fit(service, group, endpoints, existing.pop(group, []))
        for left in existing.values():
            for stale in left:
                self._delete(stale)

    def _selected(self, service: Obj) -> list[Obj]:
        """Candidates by one label pair, then the whole selector."""
        pairs = _first_pair(service)
        found = self._pods.get(pairs[0]) if pairs else []
        return [
            item.obj
            for item in found
            if _selects(service, item.obj["metadata"].get("labels") or {})
        ]

    def _node(self, name: str) -> Obj | None:
        item = self.store.get("nodes", "", name)
        return item.obj if item else None

    def _fit(
        self, service: Obj, group: Group, endpoints: dict[str, Obj], slices: list[Item]
    ) -> None:
        """Keep endpoints where they are, add new ones where there is room, then in new slices."""
        left = dict(endpoints)
        plans: list[tuple[Item | None, list[Obj]]] = []
        for item in slices:
            kept = []
            for endpoint in item.obj["endpoints"] or ():
                fresh = left.pop(_identity(endpoint), None)
                if fresh is not None:
                    kept.append(fresh)
            plans.append((item, kept))
        rest = list(left.values())
        for _, kept in plans:
            room = MAX_ENDPOINTS - len(kept)
            kept += rest[:room]
            rest = rest[room:]
        while rest:
            plans.append((None, rest[:MAX_ENDPOINTS]))
            rest = rest[MAX_ENDPOINTS:]
        if not plans:
            plans.append((None, []))
        filled = [plan for plan in plans if plan[1]] or plans[:1]
        for plan in plans:
            if plan not in filled and plan[0] is not None:
                self._delete(plan[0])
        for item_or_none, members in filled:
            self._write(service, group, item_or_none, members)

    def _write(self, service: Obj, group: Group, item: Item | None, endpoints: list[Obj]) -> None:
        meta = service["metadata"]
        labels = {
            **(meta.get("labels") or {}),
            SERVICE_LABEL: meta["name"],
            MANAGER_LABEL: MANAGER,
        }
        if service["spec"].get("clusterIP") == "None":
            labels[HEADLESS_LABEL] = ""
        content = {
            "addressType": group[0],
            "endpoints": endpoints or None,
            "ports": msgspec.json.decode(group[1]),
        }
        if item is None:
            head = {
                "generateName": f"{meta['name']}-",
                "labels": labels,
                "ownerReferences": [owner_reference(service)],
            }
            resource = self.resource(SLICES)
            self.api.create(resource, meta["namespace"], {"metadata": head, **content})
            return
        obj = item.copy()
        obj["metadata"]["labels"] = labels
        obj.update(content)
        if obj != item.obj:
            obj["metadata"]["generation"] = obj["metadata"].get("generation", 0) + 1
            self.store.put(SLICES, obj)

    def _delete(self, item: Item) -> None:
        meta = item.obj["metadata"]
        self.api.delete(self.resource(SLICES), meta["namespace"], meta["name"], DeleteOptions())


def _label_pairs(obj: Obj) -> list[tuple[str, str, str]]:
    meta = obj["metadata"]
    space = meta.get("namespace", "")
    return [(space, key, value) for key, value in (meta.get("labels") or {}).items()]


def _first_pair(service: Obj) -> list[tuple[str, str, str]]:
    selector = service["spec"].get("selector") or {}
    space = service["metadata"].get("namespace", "")
    return [(space, key, value) for key, value in sorted(selector.items())][:1]


def _selects(service: Obj, labels: Obj) -> bool:
    selector = service["spec"].get("selector") or {}
    return bool(selector) and selector.items() <= labels.items()


def _owner_service(obj: Obj) -> list[Key]:
    """Of a slice that this controller manages."""
    labels = obj["metadata"].get("labels") or {}
    if labels.get(MANAGER_LABEL) != MANAGER or SERVICE_LABEL not in labels:
        return []
    return [(obj["metadata"].get("namespace", ""), labels[SERVICE_LABEL])]


def _group_of(obj: Obj) -> Group:
    return obj["addressType"], msgspec.json.encode(obj["ports"])


def _placeholder(family: str, existing: dict[Group, list[Item]]) -> Group:
    """Without endpoints an existing slice keeps its ports; else an empty slice without ports."""
    for group in existing:
        if group[0] == family:
            return group
    return family, b"null"


def _identity(endpoint: Obj) -> str:
    return f"{(endpoint.get('targetRef') or {}).get('uid')}/{endpoint['addresses'][0]}"


def desired(
    service: Obj, pods: Iterable[Obj], node: Callable[[str], Obj | None]
) -> dict[Group, dict[str, Obj]]:
    """Endpoints by group and identity. `node(name)` is a Node, or None if there is none.

    As with the real controller a Pod on a node that does not exist is left out, unless the Service
    publishes Pods that are not ready.
    """
    found: dict[Group, dict[str, Obj]] = {}
    families = service["spec"].get("ipFamilies") or ()
    ready_anyway = bool(service["spec"].get("publishNotReadyAddresses"))
    for pod in pods:
        if pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}:
            continue
        where = node(pod["spec"].get("nodeName", ""))
        if where is None and not ready_anyway:
            continue
        ports = msgspec.json.encode(resolved_ports(service, pod) or None)
        for address in _addresses(pod):
            family = f"IPv{ip_address(address).version}"
            if family in families:
                endpoint = _endpoint(service, pod, address, ready_anyway, where)
                found.setdefault((family, ports), {})[_identity(endpoint)] = endpoint
    return found


def _addresses(pod: Obj) -> list[str]:
    state = pod.get("status", {})
    listed = [entry["ip"] for entry in state.get("podIPs") or () if entry.get("ip")]
    return listed or [ip for ip in [state.get("podIP")] if ip]


def _endpoint(service: Obj, pod: Obj, address: str, ready_anyway: bool, node: Obj | None) -> Obj:
    meta, spec = pod["metadata"], pod["spec"]
    serving, ending = is_ready(pod), deleting(pod)
    endpoint: Obj = {
        "addresses": [address],
        "conditions": {
            "ready": ready_anyway or (serving and not ending),
            "serving": serving,
            "terminating": ending,
        },
    }
    if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
        endpoint["hostname"] = spec["hostname"]
    endpoint["targetRef"] = {
        "kind": "Pod",
        "namespace": meta["namespace"],
        "name": meta["name"],
        "uid": meta["uid"],
    }
    if spec.get("nodeName"):
        endpoint["nodeName"] = spec["nodeName"]
    zone = (node or {"metadata": {}})["metadata"].get("labels", {}).get(ZONE_LABEL)
    if zone:
        endpoint["zone"] = zone
    return endpoint


def resolved_ports(service: Obj, pod: Obj) -> list[Obj]:
    """The Service's ports with the Pod's numbers; a named one that the Pod lacks is left out."""
    found = []
    for port in service["spec"].get("ports") or ():
        number = _number(port, pod)
        if number is None:
            continue
        entry: Obj = {
            "name": port.get("name", ""),
            "protocol": port.get("protocol", "TCP"),
            "port": number,
        }
        if port.get("appProtocol"):
            entry["appProtocol"] = port["appProtocol"]
        found.append(entry)
    return found


def _number(port: Obj, pod: Obj) -> int | None:
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target
    for container in pod["spec"].get("containers", ()):
        for entry in container.get("ports") or ():
            same = entry.get("protocol", "TCP") == port.get("protocol", "TCP")
            if entry.get("name") == target and same:
                return int(entry["containerPort"])
    return None
