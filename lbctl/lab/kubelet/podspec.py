"""From a pod's manifest to what the runtime is told: pure.

What is here follows the kubelet and containerd: security context (the pod's, overridden by the
container's), environment with `$(NAME)` and the downward API, ports, mounts. What the lab cannot
honour is refused by name in `ConfigProblem`, never skipped.
Source: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lbctl.errors import LabError
from lbctl.lab.kubelet.launch import Launch
from lbctl.lab.kubelet.linux import CAPABILITIES
from lbctl.lab.kubelet.podserver import Port
from lbctl.lab.kubelet.rootfs import Mount

Object: TypeAlias = dict[str, Any]
TOKEN_DIR: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
TOKEN_VOLUME: Final = "lab-api-access"
_TOKEN_S: Final = 3607  # what the API server's admission plug-in asks for
# containerd's default set
_DEFAULT: Final = frozenset(
    {"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID"}
    | {"SETFCAP", "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"}
)
_REFERENCE: Final = re.compile(r"\$(\$|\(([-._a-zA-Z0-9]+)\))")


class ConfigProblem(LabError):
    """The container cannot be made as its manifest says (CreateContainerConfigError)."""


class Missing(ConfigProblem):
    """A Secret, ConfigMap or key that a pod needs is not there yet."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a node adds to a manifest.

    look_up(kind, namespace, name) gives a Secret or ConfigMap, None if there is none. keep: what of
    the machine its containers see. search: directories put first in PATH.
    """

    node: str
    host_ips: tuple[str, ...]
    pod_ips: tuple[str, ...]
    api_host: str
    api_port: int
    search: str
    keep: tuple[str, ...]
    look_up: Callable[[str, str, str], Object | None]


def served(container: Object) -> bool:
    """Whether the lab's pod server stands in for the container's image: it names no program."""
    return not container.get("command")


def api_access(spec: Object, account: Object | None) -> Object | None:
    """The volume that the ServiceAccount admission plug-in adds, None if the pod wants none.

    `account` is the ServiceAccount, which may say `automountServiceAccountToken: false`.
    """
    wanted = spec.get("automountServiceAccountToken")
    if wanted is None:
        wanted = (account or {}).get("automountServiceAccountToken", True)
    if not wanted:
        return None
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": _TOKEN_S}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]
            }
        },
    ]
    return {"name": TOKEN_VOLUME, "projected": {"sources": sources, "defaultMode": 0o644}}


def mounted_token(container: Object) -> bool:
    """Whether the manifest itself (or the API server's admission) mounts a token."""
    return any(mount["mountPath"] == TOKEN_DIR for mount in container.get("volumeMounts") or [])


def launch(
    pod: Object, container: Object, context: Context, places: Mapping[str, str], log: str
) -> Launch:
    """Everything the runtime needs. `places` maps volume names to paths in the machine.

    Raises ConfigProblem.
    """
    serve = served(container)
    env = {} if serve else environment(pod, container, context)
    argv = [expand(word, env) for word in _command(container)]
    security = _security(pod, container)
    return Launch(
        name=pod["metadata"]["name"],
        argv=argv,
        env=env,
        cwd=container.get("workingDir") or "/",
        serve=ports(container) if serve else None,
        sandbox="" if pod["spec"].get("hostNetwork") else pod["metadata"]["uid"],
        keep=list(context.keep),
        mounts=[] if serve else mounts(container, places),
        uid=security.uid,
        gid=security.gid,
        groups=list(security.groups),
        capabilities=sorted(security.capabilities),
        readonly=security.readonly,
        no_new_privileges=security.no_new_privileges,
        log=log,
    )


def _command(container: Object) -> list[str]:
    return [*(container.get("command") or []), *(container.get("args") or [])]


def ports(container: Object) -> list[Port]:
    """The container's ports, sorted."""
    found = {
        (int(port["containerPort"]), str(port.get("protocol") or "TCP"))
        for port in container.get("ports") or []
    }
    return [Port(port=number, protocol=protocol) for number, protocol in sorted(found)]


@dataclass(frozen=True, slots=True)
class _Security:
    uid: int
    gid: int
    groups: tuple[int, ...]
    capabilities: frozenset[str]
    readonly: bool
    no_new_privileges: bool


def _security(pod: Object, container: Object) -> _Security:
    outer: Object = pod["spec"].get("securityContext") or {}
    inner: Object = container.get("securityContext") or {}

    def either(key: str, default: Any) -> Any:
        return inner[key] if inner.get(key) is not None else outer.get(key, default)

    uid = int(either("runAsUser", 0))
    if either("runAsNonRoot", False) and uid == 0:
        raise ConfigProblem("container has runAsNonRoot and image will run as root")
    groups = [int(group) for group in outer.get("supplementalGroups") or []]
    if outer.get("fsGroup") is not None:
        groups.append(int(outer["fsGroup"]))
    privileged = bool(inner.get("privileged"))
    escalation = inner.get("allowPrivilegeEscalation", True)
    return _Security(
        uid=uid,
        gid=int(either("runAsGroup", 0)),
        groups=tuple(sorted(set(groups))),
        capabilities=_capabilities(inner, privileged),
        readonly=bool(inner.get("readOnlyRootFilesystem")),
        no_new_privileges=not escalation and not privileged,
    )


def _capabilities(security: Object, privileged: bool) -> frozenset[str]:
    if privileged:
        return frozenset(CAPABILITIES)
    asked: Object = security.get("capabilities") or {}
    add = {str(name).removeprefix("CAP_") for name in asked.get("add") or []}
    drop = {str(name).removeprefix("CAP_") for name in asked.get("drop") or []}
    unknown = sorted((add | drop) - set(CAPABILITIES) - {"ALL"})
    if unknown:
        raise ConfigProblem(f"unknown capability: {', '.join(unknown)}")
    base = frozenset(CAPABILITIES) if "ALL" in add else _DEFAULT
    kept = frozenset() if "ALL" in drop else base - drop
    return kept | (add - {"ALL"})


def mounts(container: Object, places: Mapping[str, str]) -> list[Mount]:
    """The container's mounts, outer ones first. Raises ConfigProblem for an unknown volume."""
    found = []
    for mount in container.get("volumeMounts") or []:
        source = places.get(mount["name"])
        if source is None:
            raise ConfigProblem(f"volume {mount['name']} of a mount is not in the pod's volumes")
        if mount.get("subPath"):
            if ".." in mount["subPath"].split("/"):
                raise ConfigProblem("subPath may not contain ..")
            source = f"{source}/{mount['subPath']}"
        found.append(
            Mount(
                source=source,
                target=mount["mountPath"],
                readonly=bool(mount.get("readOnly", False)),
            )
        )
    return sorted(found, key=lambda mount: mount["target"])


def environment(pod: Object, container: Object, context: Context) -> dict[str, str]:
    """The container's environment. Raises ConfigProblem; Missing if a reference is not there."""
    env = {
        "PATH": f"{context.search}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/",
        "HOSTNAME": context.node if pod["spec"].get("hostNetwork") else pod["metadata"]["name"],
        "KUBERNETES_SERVICE_HOST": context.api_host,
        "KUBERNETES_SERVICE_PORT": str(context.api_port),
        "KUBERNETES_SERVICE_PORT_HTTPS": str(context.api_port),
    }
    for source in container.get("envFrom") or []:
        env.update(_from(pod, source, context))
    for entry in container.get("env") or []:
        value = entry.get("value")
        if entry.get("valueFrom"):
            value = _value_from(pod, container, entry["valueFrom"], context)
            if value is None:
                continue
        env[entry["name"]] = expand(str(value or ""), env)
    return env


def _from(pod: Object, source: Object, context: Context) -> dict[str, str]:
    kind = "configMaps" if source.get("configMapRef") else "secrets"
    reference = source.get("configMapRef") or source.get("secretRef") or {}
    data = content(context, kind, pod["metadata"]["namespace"], reference)
    prefix = source.get("prefix") or ""
    return {prefix + key: value.decode() for key, value in sorted((data or {}).items())}


def _value_from(pod: Object, container: Object, source: Object, context: Context) -> str | None:
    if source.get("fieldRef"):
        return field(pod, source["fieldRef"]["fieldPath"], context)
    for key, kind in (("secretKeyRef", "secrets"), ("configMapKeyRef", "configMaps")):
        if source.get(key):
            reference = source[key]
            data = content(context, kind, pod["metadata"]["namespace"], reference)
            if data is not None and reference["key"] in data:
                return data[reference["key"]].decode()
            if reference.get("optional"):
                return None
            raise Missing(f"{reference['name']} has no key {reference['key']}")
    if source.get("resourceFieldRef"):
        resources: Object = container.get("resources") or {}
        group, _, name = source["resourceFieldRef"]["resource"].partition(".")
        return str((resources.get(group) or {}).get(name, "0"))
    raise ConfigProblem(f"the lab does not know valueFrom {sorted(source)}")


def content(
    context: Context, kind: str, namespace: str, reference: Object
) -> dict[str, bytes] | None:
    """Data of a Secret or ConfigMap. None if it is optional and not there; else Missing."""
    name = reference.get("name") or reference.get("secretName") or ""
    found = context.look_up(kind, namespace, name)
    if found is None:
        if reference.get("optional"):
            return None
        raise Missing(f'{kind[:-1].lower()} "{name}" not found')
    return decode(found)


def decode(found: Object) -> dict[str, bytes]:
    """Secret or ConfigMap to bytes by key."""
    secret = found.get("kind") == "Secret" or "type" in found
    data: dict[str, str] = found.get("data") or {}
    plain = {
        key: base64.b64decode(value) if secret else value.encode() for key, value in data.items()
    }
    for key, value in (found.get("binaryData") or {}).items():
        plain[key] = base64.b64decode(value)
    return plain


def field(pod: Object, path: str, context: Context) -> str:
    """The downward API. Raises ConfigProblem for a field it does not offer."""
    meta = pod["metadata"]
    plain: dict[str, Callable[[], object]] = {
        "metadata.name": lambda: meta["name"],
        "metadata.namespace": lambda: meta["namespace"],
        "metadata.uid": lambda: meta["uid"],
        "spec.nodeName": lambda: context.node,
        "spec.serviceAccountName": lambda: pod["spec"].get("serviceAccountName", "default"),
        "status.hostIP": lambda: context.host_ips[0],
        "status.hostIPs": lambda: ",".join(context.host_ips),
        "status.podIP": lambda: context.pod_ips[0],
        "status.podIPs": lambda: ",".join(context.pod_ips),
    }
    if path in plain:
        return str(plain[path]())
    matched = re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path)
    if matched:
        return str((meta.get(matched[1]) or {}).get(matched[2], ""))
    raise ConfigProblem(f"the lab does not offer the field {path}")


def expand(text: str, env: Mapping[str, str]) -> str:
    """`$(NAME)` as Kubernetes expands it: unknown names stay, `$$` is a dollar."""

    def one(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return env.get(match[2], match[0])

    return _REFERENCE.sub(one, text)


def grace_s(pod: Object) -> float:
    """How long the pod's containers get to end."""
    asked = pod["metadata"].get("deletionGracePeriodSeconds")
    if asked is None:
        asked = pod["spec"].get("terminationGracePeriodSeconds")
    return float(30 if asked is None else asked)


def containers(pod: Object) -> Sequence[Object]:
    """The pod's containers."""
    return pod["spec"].get("containers") or []
