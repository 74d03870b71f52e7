"""Server-side printing: the columns that `kubectl get` shows, per kind and for custom resources.

Columns and cells are those of Kubernetes' `pkg/printers/internalversion/printers.go`.
"""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

from lbctl.lab.apiserver.resources import Obj, Resource

Cell: TypeAlias = str | int | bool | None
Printer: TypeAlias = Callable[[Obj], list[Cell]]
_NONE: Final = "<none>"
_UNKNOWN: Final = "<unknown>"


def column(name: str, kind: str = "string", *, wide: bool = False) -> Obj:
    """A column definition."""
    return {
        "name": name,
        "type": kind,
        "format": "name" if name == "Name" else "",
        "description": "",
        "priority": 1 if wide else 0,
    }


def table(resource: Resource, objects: Iterable[Obj], meta: Obj, include: str) -> Obj:
    """A meta.k8s.io/v1 Table. `include` is Metadata (default), Object or None."""
    columns, printer = _printer(resource)
    rows = []
    for obj in objects:
        row: Obj = {"cells": printer(obj)}
        if include == "Object":
            row["object"] = obj
        elif include != "None":
            row["object"] = {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": obj["metadata"],
            }
        rows.append(row)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "columnDefinitions": columns,
        "rows": rows,
    }


def _printer(resource: Resource) -> tuple[list[Obj], Printer]:
    if resource.custom:
        return _custom(resource)
    found = _PRINTERS.get(resource.key)
    if found is None:
        return [column("Name"), column("Created At", "date")], lambda obj: [
            obj["metadata"]["name"],
            obj["metadata"].get("creationTimestamp"),
        ]
    columns, printer = found
    return columns, printer


def _custom(resource: Resource) -> tuple[list[Obj], Printer]:
    entries = [dict(entry) for entry in resource.columns]
    columns = [column("Name")]
    for entry in entries:
        shown = column(entry["name"], entry["type"], wide=entry.get("priority", 0) > 0)
        columns.append({**shown, "format": entry.get("format", "")})

    def cells(obj: Obj) -> list[Cell]:
        row: list[Cell] = [obj["metadata"]["name"]]
        for entry in entries:
            value = json_path(obj, entry["jsonPath"])
            row.append(age(value) if entry["type"] == "date" else value)
        return row

    return columns, cells


def json_path(obj: Any, path: str) -> Any:
    """The value at a simple JSON path (`.a.b[0]['c.d']`); None if it is not there."""
    for dotted, index, quoted in re.findall(r"\.([\w-]+)|\[(\d+)\]|\['([^']+)'\]", path):
        if index:
            obj = obj[int(index)] if isinstance(obj, list) and int(index) < len(obj) else None
        else:
            obj = obj.get(dotted or quoted) if isinstance(obj, dict) else None
    return obj


def seconds(stamp: str) -> float:
    """Seconds since the epoch of an RFC 3339 time."""
    return dt.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def age(stamp: str | None) -> str:
    """How long ago, as kubectl prints it."""
    return human(time.time() - seconds(stamp)) if stamp else _UNKNOWN


def human(elapsed_s: float) -> str:
    """Kubernetes' HumanDuration."""
    s = int(elapsed_s)
    if s < 0:
        return "<invalid>" if s < -1 else "0s"
    m, h, d = s // 60, s // 3600, s // 86400
    for limit, text in (
        (s < 120, f"{s}s"),
        (m < 10, f"{m}m{s % 60}s" if s % 60 else f"{m}m"),
        (h < 3, f"{m}m"),
        (h < 8, f"{h}h{m % 60}m" if m % 60 else f"{h}h"),
        (h < 48, f"{h}h"),
        (d < 8, f"{d}d{h % 24}h" if h % 24 else f"{d}d"),
        (d < 730, f"{d}d"),
        (d < 2920, f"{d // 365}y{d % 365}d" if d % 365 else f"{d // 365}y"),
    ):
        if limit:
            return text
    return f"{d // 365}y"


def _name(obj: Obj) -> str:
    return str(obj["metadata"]["name"])


def _age(obj: Obj) -> str:
    return age(obj["metadata"].get("creationTimestamp"))


def _listed(values: Iterable[str], most: int = 3) -> str:
    items = list(values)
    if not items:
        return _NONE
    if len(items) > most:
        return f"{','.join(items[:most])} + {len(items) - most} more..."
    return ",".join(items)


def _labels(labels: Obj | None) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted((labels or {}).items())) or _NONE


def _selector(selector: Obj | None) -> str:
    """A LabelSelector as a query string."""
    if not selector:
        return _NONE
    parts = [f"{k}={v}" for k, v in sorted((selector.get("matchLabels") or {}).items())]
    for entry in selector.get("matchExpressions") or ():
        key, operator = entry["key"], entry["operator"]
        values = ",".join(sorted(entry.get("values") or ()))
        shown = {"Exists": key, "DoesNotExist": f"!{key}", "In": f"{key} in ({values})"}
        parts.append(shown.get(operator, f"{key} notin ({values})"))
    return ",".join(parts) or _NONE


def _containers(template: Obj) -> list[Cell]:
    containers = template.get("spec", {}).get("containers", ())
    names = ",".join(container["name"] for container in containers)
    return [names, ",".join(container.get("image", "") for container in containers)]


def _pod(obj: Obj) -> list[Cell]:
    spec, state = obj["spec"], obj.get("status", {})
    statuses = state.get("containerStatuses", [])
    ready = sum(bool(entry.get("ready")) for entry in statuses)
    restarts = sum(entry.get("restartCount", 0) for entry in statuses)
    shown = str(restarts)
    ended = [
        entry.get("lastState", {}).get("terminated", {}).get("finishedAt") for entry in statuses
    ]
    if restarts and any(ended):
        shown += f" ({age(max(filter(None, ended)))} ago)"
    ips = state.get("podIPs") or [{"ip": state.get("podIP")}]
    return [
        _name(obj),
        f"{ready}/{len(spec.get('containers', ()))}",
        _pod_reason(obj, statuses),
        shown,
        _age(obj),
        ips[0].get("ip") or _NONE,
        spec.get("nodeName") or _NONE,
        state.get("nominatedNodeName") or _NONE,
        _NONE,
    ]


def _pod_reason(obj: Obj, statuses: list[Obj]) -> str:
    state = obj.get("status", {})
    reason = str(state.get("reason") or state.get("phase", "Unknown"))
    running = False
    for entry in reversed(statuses):
        now = entry.get("state", {})
        if now.get("waiting", {}).get("reason"):
            reason = now["waiting"]["reason"]
        elif "terminated" in now:
            ended = now["terminated"]
            reason = ended.get("reason") or f"ExitCode:{ended.get('exitCode', 0)}"
        elif entry.get("ready") and "running" in now:
            running = True
    if reason == "Completed" and running:
        reason = "Running"
    if "deletionTimestamp" in obj["metadata"]:
        return "Unknown" if state.get("reason") == "NodeLost" else "Terminating"
    return reason


def _service(obj: Obj) -> list[Cell]:
    spec = obj["spec"]
    kind = spec.get("type", "ClusterIP")
    ports = []
    for port in spec.get("ports") or ():
        node = f":{port['nodePort']}" if port.get("nodePort") else ""
        ports.append(f"{port['port']}{node}/{port.get('protocol', 'TCP')}")
    return [
        _name(obj),
        kind,
        spec.get("clusterIP") or _NONE,
        _external(obj, kind),
        ",".join(ports) or _NONE,
        _age(obj),
        _labels(spec.get("selector")),
    ]


def _external(obj: Obj, kind: str) -> str:
    spec = obj["spec"]
    fixed = spec.get("externalIPs") or []
    if kind == "ExternalName":
        return str(spec.get("externalName"))
    if kind != "LoadBalancer":
        return ",".join(fixed) or _NONE
    ingress = obj.get("status", {}).get("loadBalancer", {}).get("ingress") or []
    given = [entry.get("ip") or entry.get("hostname", "") for entry in ingress]
    return ",".join([*given, *fixed]) or "<pending>"


def _replicas(obj: Obj) -> list[Cell]:
    spec, state = obj["spec"], obj.get("status", {})
    counts = [spec.get("replicas", 0), state.get("replicas", 0), state.get("readyReplicas", 0)]
    return [
        _name(obj),
        *counts,
        _age(obj),
        *_containers(spec["template"]),
        _selector(spec.get("selector")),
    ]


def _deployment(obj: Obj) -> list[Cell]:
    spec, state = obj["spec"], obj.get("status", {})
    return [
        _name(obj),
        f"{state.get('readyReplicas', 0)}/{spec.get('replicas', 0)}",
        state.get("updatedReplicas", 0),
        state.get("availableReplicas", 0),
        _age(obj),
        *_containers(spec["template"]),
        _selector(spec.get("selector")),
    ]


def _daemon_set(obj: Obj) -> list[Cell]:
    spec, state = obj["spec"], obj.get("status", {})
    counts = (
        "desiredNumberScheduled",
        "currentNumberScheduled",
        "numberReady",
        "updatedNumberScheduled",
        "numberAvailable",
    )
    return [
        _name(obj),
        *(state.get(key, 0) for key in counts),
        _labels(spec["template"]["spec"].get("nodeSelector")),
        _age(obj),
        *_containers(spec["template"]),
        _selector(spec.get("selector")),
    ]


def _stateful_set(obj: Obj) -> list[Cell]:
    spec, state = obj["spec"], obj.get("status", {})
    ready = f"{state.get('readyReplicas', 0)}/{spec.get('replicas', 0)}"
    return [_name(obj), ready, _age(obj), *_containers(spec["template"])]


def _node(obj: Obj) -> list[Cell]:
    state, labels = obj.get("status", {}), obj["metadata"].get("labels") or {}
    ready = [c["status"] for c in state.get("conditions") or () if c["type"] == "Ready"]
    word = ("Ready" if ready[0] == "True" else "NotReady") if ready else "Unknown"
    if obj.get("spec", {}).get("unschedulable"):
        word += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    roles = sorted(key.removeprefix(prefix) for key in labels if key.startswith(prefix))
    info = state.get("nodeInfo", {})
    kinds: dict[str, str] = {}
    for entry in state.get("addresses") or ():
        kinds.setdefault(entry["type"], entry["address"])
    return [
        _name(obj),
        word,
        ",".join(filter(None, roles)) or _NONE,
        _age(obj),
        info.get("kubeletVersion", ""),
        kinds.get("InternalIP", _NONE),
        kinds.get("ExternalIP", _NONE),
        info.get("osImage") or _UNKNOWN,
        info.get("kernelVersion") or _UNKNOWN,
        info.get("containerRuntimeVersion") or _UNKNOWN,
    ]


def _event(obj: Obj) -> list[Cell]:
    about, source = obj.get("involvedObject", {}), obj.get("source") or {}
    series = obj.get("series") or {}
    count = series.get("count") or obj.get("count") or 1
    first = obj.get("firstTimestamp") or obj.get("eventTime")
    last = series.get("lastObservedTime") or obj.get("lastTimestamp") or first
    seen = age(last)
    if count > 1:
        seen = f"{seen} (x{count} over {age(first)})"
    name = about.get("name", "")
    kind = about.get("kind", "").lower()
    component = source.get("component") or obj.get("reportingComponent", "")
    host = source.get("host") or ""
    return [
        seen,
        obj.get("type", ""),
        obj.get("reason", ""),
        f"{kind}/{name}" if kind else name,
        about.get("fieldPath", ""),
        f"{component}, {host}" if host else component,
        (obj.get("message") or "").strip(),
        age(first),
        count,
        _name(obj),
    ]


def _endpoint_slice(obj: Obj) -> list[Cell]:
    ports = [str(port.get("port", "*")) for port in obj.get("ports") or ()]
    addresses = [
        a for endpoint in obj.get("endpoints") or () for a in endpoint.get("addresses", ())
    ]
    return [
        _name(obj),
        obj.get("addressType"),
        _listed(ports) if ports else "<unset>",
        _listed(addresses) if addresses else "<unset>",
        _age(obj),
    ]


def _binding(obj: Obj) -> list[Cell]:
    role = obj["roleRef"]
    subjects = obj.get("subjects") or ()

    def of(kind: str) -> str:
        shown = []
        for subject in subjects:
            if subject["kind"] == kind:
                space = subject.get("namespace")
                shown.append(f"{space}/{subject['name']}" if space else subject["name"])
        return ", ".join(shown)

    people = [of("User"), of("Group"), of("ServiceAccount")]
    return [_name(obj), f"{role['kind']}/{role['name']}", _age(obj), *people]


def _data(obj: Obj) -> int:
    return len(obj.get("data") or {}) + len(obj.get("binaryData") or {})


def _columns(names: str, *, ints: str = "") -> list[Obj]:
    """Definitions from "Name|Ready|*IP": a star marks those of -o wide."""
    numbers = set(ints.split("|"))
    return [
        column(name.lstrip("*"), "integer" if name in numbers else "string", wide=name[0] == "*")
        for name in names.split("|")
    ]


_TEMPLATE: Final = "|*Containers|*Images|*Selector"
_ROLE: Final[tuple[list[Obj], Printer]] = (
    _columns("Name|Created At"),
    lambda obj: [_name(obj), obj["metadata"].get("creationTimestamp")],
)
_ROLE_BINDING: Final[tuple[list[Obj], Printer]] = (
    _columns("Name|Role|Age|*Users|*Groups|*ServiceAccounts"),
    _binding,
)
_PRINTERS: Final[dict[str, tuple[list[Obj], Printer]]] = {
    "pods": (
        _columns("Name|Ready|Status|Restarts|Age|*IP|*Node|*Nominated Node|*Readiness Gates"),
        _pod,
    ),
    "services": (
        _columns("Name|Type|Cluster-IP|External-IP|Port(s)|Age|*Selector"),
        _service,
    ),
    "replicasets.apps": (
        _columns("Name|Desired|Current|Ready|Age" + _TEMPLATE, ints="Desired|Current|Ready"),
        _replicas,
    ),
    "deployments.apps": (_columns("Name|Ready|Up-to-date|Available|Age" + _TEMPLATE), _deployment),
    "daemonsets.apps": (
        _columns(
            "Name|Desired|Current|Ready|Up-to-date|Available|Node Selector|Age" + _TEMPLATE,
            ints="Desired|Current|Ready|Up-to-date|Available",
        ),
        _daemon_set,
    ),
    "statefulsets.apps": (_columns("Name|Ready|Age|*Containers|*Images"), _stateful_set),
    "nodes": (
        _columns(
            "Name|Status|Roles|Age|Version|*Internal-IP|*External-IP|*OS-Image|*Kernel-Version"
            "|*Container-Runtime"
        ),
        _node,
    ),
    "events": (
        _columns(
            "Last Seen|Type|Reason|Object|*Subobject|*Source|Message|*First Seen|*Count|*Name"
        ),
        _event,
    ),
    "namespaces": (
        _columns("Name|Status|Age"),
        lambda obj: [_name(obj), obj.get("status", {}).get("phase"), _age(obj)],
    ),
    "secrets": (
        _columns("Name|Type|Data|Age", ints="Data"),
        lambda obj: [_name(obj), obj.get("type"), _data(obj), _age(obj)],
    ),
    "configmaps": (
        _columns("Name|Data|Age", ints="Data"),
        lambda obj: [_name(obj), _data(obj), _age(obj)],
    ),
    "serviceaccounts": (_columns("Name|Age"), lambda obj: [_name(obj), _age(obj)]),
    "leases.coordination.k8s.io": (
        _columns("Name|Holder|Age"),
        lambda obj: [_name(obj), obj.get("spec", {}).get("holderIdentity", ""), _age(obj)],
    ),
    "endpointslices.discovery.k8s.io": (
        _columns("Name|AddressType|Ports|Endpoints|Age"),
        _endpoint_slice,
    ),
    "roles.rbac.authorization.k8s.io": _ROLE,
    "clusterroles.rbac.authorization.k8s.io": _ROLE,
    "rolebindings.rbac.authorization.k8s.io": _ROLE_BINDING,
    "clusterrolebindings.rbac.authorization.k8s.io": _ROLE_BINDING,
    "customresourcedefinitions.apiextensions.k8s.io": _ROLE,
}
