"""Validation of the basics, worded as kube-apiserver does: names, fields, what may not change.

`new` and `change` return every cause at once; the caller answers 422. A field that is only wrong in
kind (a string for a number) never comes here: `schema.clean` refuses it first.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any, Final

from lbctl.lab.apiserver import families
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.selectors import label_selector
from lbctl.lab.apiserver.status import (
    Cause,
    duplicate,
    forbidden_field,
    invalid_value,
    required,
    unsupported,
)

_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN: Final = rf"{_LABEL}(\.{_LABEL})*"
_SUBDOMAIN_TEXT: Final = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or "
    "'.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used "
    f"for validation is '{_SUBDOMAIN}')"
)
_LABEL_TEXT: Final = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and "
    "must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used "
    f"for validation is '{_LABEL}')"
)
_QUALIFIED: Final = re.compile(
    r"^(?:[a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
)
_VALUE: Final = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
_VALUE_TEXT: Final = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', "
    "and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or "
    "'12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_TEXT: Final = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end "
    "with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for "
    "validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_LABEL_NAMED: Final = frozenset({"namespaces", "services"})
_WORKLOADS: Final = frozenset(
    {"deployments.apps", "replicasets.apps", "daemonsets.apps", "statefulsets.apps"}
)
_IMMUTABLE_POD: Final = (
    "pod updates may not change fields other than `spec.containers[*].image`,"
    "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only "
    "additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set "
    "to 1 if it was previously negative)"
)


def new(resource: Resource, obj: Obj) -> list[Cause]:
    """What is wrong with an object, whether it is created or changed."""
    causes = _meta(resource, obj["metadata"])
    if resource.key in _WORKLOADS:
        causes += _workload(obj)
    elif resource.key == "pods":
        causes += _pod_spec(obj["spec"], "spec")
    elif resource.key == "services":
        causes += _service(obj["spec"])
    elif resource.key == "customresourcedefinitions.apiextensions.k8s.io":
        causes += _crd(obj)
    elif resource.key == "endpointslices.discovery.k8s.io":
        causes += _slice(obj)
    return causes


def _meta(resource: Resource, meta: Obj) -> list[Cause]:
    return _name(resource, meta.get("name", "")) + _labels(meta)


def _name(resource: Resource, name: str) -> list[Cause]:
    causes: list[Cause] = []
    if not name:
        causes.append(required("metadata.name", "name or generateName is required"))
    elif resource.group == "rbac.authorization.k8s.io":
        if "/" in name or name in {".", ".."}:
            causes.append(invalid_value("metadata.name", name, "may not contain '/'"))
    elif resource.key in _LABEL_NAMED:
        if not re.fullmatch(_LABEL, name):
            causes.append(invalid_value("metadata.name", name, _LABEL_TEXT))
        elif len(name) > 63:
            causes.append(
                invalid_value("metadata.name", name, "must be no more than 63 characters")
            )
    elif not re.fullmatch(_SUBDOMAIN, name):
        causes.append(invalid_value("metadata.name", name, _SUBDOMAIN_TEXT))
    elif len(name) > 253:
        causes.append(invalid_value("metadata.name", name, "must be no more than 253 characters"))
    return causes


def _labels(meta: Obj) -> list[Cause]:
    causes: list[Cause] = []
    for key, value in sorted((meta.get("labels") or {}).items()):
        if not _QUALIFIED.match(key) or len(key.rpartition("/")[2]) > 63:
            causes.append(invalid_value("metadata.labels", key, _KEY_TEXT))
        if not _VALUE.match(value):
            causes.append(invalid_value("metadata.labels", value, _VALUE_TEXT))
        elif len(value) > 63:
            causes.append(
                invalid_value("metadata.labels", value, "must be no more than 63 characters")
            )
    for key in sorted(meta.get("annotations") or {}):
        if not _QUALIFIED.match(key.lower()):
            causes.append(invalid_value("metadata.annotations", key, _KEY_TEXT))
    return causes


def _workload(obj: Obj) -> list[Cause]:
    spec = obj["spec"]
    causes: list[Cause] = []
    labels = spec["template"]["metadata"].get("labels") or {}
    if "selector" not in spec:
        causes.append(required("spec.selector"))
    elif not spec["selector"]:
        causes.append(invalid_value("spec.selector", "{}", "empty selector is invalid"))
    elif not label_selector(spec["selector"])(labels):
        detail = "`selector` does not match template `labels`"
        causes.append(
            Cause("spec.template.metadata.labels", "FieldValueInvalid", _map(labels, detail))
        )
    if spec.get("replicas", 0) < 0:
        causes.append(
            invalid_value("spec.replicas", spec["replicas"], "must be greater than or equal to 0")
        )
    claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates") or ()}
    return causes + _pod_spec(spec["template"]["spec"], "spec.template.spec", claims)


def _map(labels: Obj, detail: str) -> str:
    inside = ",".join(f'"{key}":"{value}"' for key, value in sorted(labels.items()))
    return f"Invalid value: {{{inside}}}: {detail}"


def _pod_spec(spec: Obj, path: str, claims: Set[str] = frozenset()) -> list[Cause]:
    causes: list[Cause] = []
    volumes = claims | {volume["name"] for volume in spec.get("volumes") or ()}
    if not spec.get("containers"):
        causes.append(required(f"{path}.containers"))
    seen: set[str] = set()
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind) or ()):
            at = f"{path}.{kind}[{index}]"
            name = container.get("name")
            if not name:
                causes.append(required(f"{at}.name"))
            elif not re.fullmatch(_LABEL, name):
                causes.append(invalid_value(f"{at}.name", name, _LABEL_TEXT))
            elif name in seen:
                causes.append(duplicate(f"{at}.name", name))
            seen.add(name)
            if not container.get("image"):
                causes.append(required(f"{at}.image"))
            causes += _mounts(container, volumes, at)
    return causes


def _mounts(container: Obj, volumes: Set[str], at: str) -> list[Cause]:
    causes = []
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        if mount.get("name") not in volumes:
            field = f"{at}.volumeMounts[{index}].name"
            causes.append(Cause(field, "FieldValueNotFound", f'Not found: "{mount.get("name")}"'))
    return causes


def _port_number(value: Any, path: str) -> list[Cause]:
    if not isinstance(value, int) or not 1 <= value <= 65535:
        return [invalid_value(path, value or 0, "must be between 1 and 65535, inclusive")]
    return []


def _service(spec: Obj) -> list[Cause]:
    causes: list[Cause] = []
    kind = spec["type"]
    kinds = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
    if kind not in kinds:
        causes.append(unsupported("spec.type", kind, kinds))
    ports = spec.get("ports") or []
    if not ports and kind != "ExternalName" and spec.get("clusterIP") != "None":
        causes.append(required("spec.ports"))
    if kind == "ExternalName" and not spec.get("externalName"):
        causes.append(required("spec.externalName"))
    seen: set[Any] = set()
    for index, port in enumerate(ports):
        causes += _service_port(port, f"spec.ports[{index}]", len(ports) > 1, seen)
    if spec["sessionAffinity"] not in {"None", "ClientIP"}:
        causes.append(
            unsupported("spec.sessionAffinity", spec["sessionAffinity"], ("ClientIP", "None"))
        )
    return causes + _service_policies(spec, kind)


def _service_port(port: Obj, at: str, named: bool, seen: set[Any]) -> list[Cause]:
    causes = _port_number(port.get("port"), f"{at}.port")
    name = port.get("name", "")
    if named and not name:
        causes.append(required(f"{at}.name"))
    elif name and not re.fullmatch(_LABEL, name):
        causes.append(invalid_value(f"{at}.name", name, _LABEL_TEXT))
    elif name and name in seen:
        causes.append(duplicate(f"{at}.name", name))
    if port["protocol"] not in {"TCP", "UDP", "SCTP"}:
        causes.append(unsupported(f"{at}.protocol", port["protocol"], ("SCTP", "TCP", "UDP")))
    pair = (port["protocol"], port.get("port"))
    if pair in seen:
        causes.append(Cause(at, "FieldValueDuplicate", f"Duplicate value: {_go_port(port)}"))
    seen.update({name, pair})
    target = port.get("targetPort")
    if isinstance(target, int):
        causes += _port_number(target, f"{at}.targetPort")
    return causes


def _go_port(port: Obj) -> str:
    return f'{{"port":{port.get("port")},"protocol":"{port["protocol"]}"}}'


def _service_policies(spec: Obj, kind: str) -> list[Cause]:
    causes: list[Cause] = []
    policy = spec.get("externalTrafficPolicy")
    if policy is not None and policy not in {"Cluster", "Local"}:
        causes.append(unsupported("spec.externalTrafficPolicy", policy, ("Cluster", "Local")))
    elif policy is not None and kind not in {"NodePort", "LoadBalancer"}:
        causes.append(
            invalid_value(
                "spec.externalTrafficPolicy",
                policy,
                "may only be set for externally-accessible services",
            )
        )
    if kind != "LoadBalancer":
        for field in ("loadBalancerClass", "allocateLoadBalancerNodePorts"):
            if spec.get(field) is not None:
                detail = "may only be used when `type` is 'LoadBalancer'"
                causes.append(forbidden_field(f"spec.{field}", detail))
    return causes


def _crd(obj: Obj) -> list[Cause]:
    spec, name = obj["spec"], obj["metadata"]["name"]
    wanted = f"{spec['names'].get('plural')}.{spec.get('group')}"
    causes = []
    if name != wanted:
        detail = 'must be spec.names.plural+"."+spec.group'
        causes.append(invalid_value("metadata.name", name, detail))
    if spec.get("scope") not in {"Cluster", "Namespaced"}:
        causes.append(unsupported("spec.scope", spec.get("scope"), ("Cluster", "Namespaced")))
    if sum(bool(version.get("storage")) for version in spec.get("versions") or ()) != 1:
        causes.append(
            invalid_value(
                "spec.versions", "", "must have exactly one version marked as storage version"
            )
        )
    for index, version in enumerate(spec.get("versions") or ()):
        if "openAPIV3Schema" not in version.get("schema", {}):
            field = f"spec.versions[{index}].schema.openAPIV3Schema"
            causes.append(required(field, "schemas are required"))
    return causes


def _slice(obj: Obj) -> list[Cause]:
    kind = obj.get("addressType")
    if kind in {"IPv4", "IPv6", "FQDN"}:
        return []
    if not kind:
        return [required("addressType")]
    return [unsupported("addressType", kind, ("FQDN", "IPv4", "IPv6"))]


def change(resource: Resource, old: Obj, obj: Obj) -> list[Cause]:
    """What must not change did."""
    before, after = old.get("spec") or {}, obj.get("spec") or {}
    if resource.key in _WORKLOADS and before["selector"] != after.get("selector"):
        shown = _map((after.get("selector") or {}).get("matchLabels") or {}, "field is immutable")
        return [Cause("spec.selector", "FieldValueInvalid", shown)]
    if resource.key == "pods" and _fixed_part(before) != _fixed_part(after):
        return [forbidden_field("spec", _IMMUTABLE_POD)]
    if resource.key == "services":
        return _service_change(before, after)
    if resource.key.endswith("bindings.rbac.authorization.k8s.io") and old["roleRef"] != obj.get(
        "roleRef"
    ):
        return [invalid_value("roleRef", obj.get("roleRef"), "cannot change roleRef")]
    return []


def _fixed_part(spec: Obj) -> Obj:
    loose = {"activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds"}
    fixed = {key: value for key, value in spec.items() if key not in loose}
    for kind in ("containers", "initContainers"):
        fixed[kind] = [
            {key: value for key, value in container.items() if key != "image"}
            for container in spec.get(kind) or ()
        ]
    return fixed


def _service_change(before: Obj, after: Obj) -> list[Cause]:
    causes = families.change(before, after)
    both = before["type"] == after["type"] == "LoadBalancer"
    if both and before.get("loadBalancerClass") != after.get("loadBalancerClass"):
        value = after.get("loadBalancerClass")
        causes.append(invalid_value("spec.loadBalancerClass", value, "may not change once set"))
    return causes
