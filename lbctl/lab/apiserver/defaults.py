"""Defaults that kube-apiserver writes into objects, and what its admission plugins add to Pods.

Rules: `apply` changes the object that it is given and touches only fields that are not set, so it
may run again on every update. Addresses and ports of Services are in `services.py`.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from typing import Any, Final

from lbctl.lab.apiserver.resources import Obj, Resource

_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own: no vowels, no look-alikes
_TOKEN_DIR: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
_PROBES: Final = ("livenessProbe", "readinessProbe", "startupProbe")
_MODES: Final = ("secret", "configMap", "projected", "downwardAPI")


def suffix() -> str:
    """Five characters, as generateName appends."""
    return "".join(random.choices(_ALPHABET, k=5))


def fill(obj: Obj, **values: Any) -> Obj:
    """Set the keys that `obj` lacks."""
    for key, value in values.items():
        obj.setdefault(key, value)
    return obj


def apply(resource: Resource, obj: Obj) -> None:
    """Write the defaults of a kind into `obj`."""
    function = _BY_KEY.get(resource.key)
    if function is not None:
        function(obj)


def _pod_spec(spec: Obj) -> None:
    fill(
        spec,
        restartPolicy="Always",
        terminationGracePeriodSeconds=30,
        dnsPolicy="ClusterFirst",
        securityContext={},
        schedulerName="default-scheduler",
    )
    for container in (*spec.get("containers", ()), *spec.get("initContainers", ())):
        _container(container)
    for volume in spec.get("volumes", ()):
        if len(volume) == 1:
            volume["emptyDir"] = {}
        for kind in _MODES:
            if kind in volume:
                volume[kind].setdefault("defaultMode", 0o644)
        if "hostPath" in volume:
            volume["hostPath"].setdefault("type", "")


def _container(container: Obj) -> None:
    image = container.get("image", "")
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    always = "@" not in image and tag in {"", "latest"}
    fill(
        container,
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
        imagePullPolicy="Always" if always else "IfNotPresent",
        resources={},
    )
    for port in container.get("ports", ()):
        fill(port, protocol="TCP")
    for name in _PROBES:
        if name in container:
            _probe(container[name])
    for variable in container.get("env", ()):
        reference = variable.get("valueFrom", {}).get("fieldRef")
        if reference is not None:
            fill(reference, apiVersion="v1")


def _probe(probe: Obj) -> None:
    fill(probe, timeoutSeconds=1, periodSeconds=10, successThreshold=1, failureThreshold=3)
    if "httpGet" in probe:
        fill(probe["httpGet"], scheme="HTTP", path="/")


def _template(spec: Obj) -> None:
    template = fill(spec, template={})["template"]
    fill(template, metadata={})
    _pod_spec(fill(template, spec={})["spec"])


def _pod(pod: Obj) -> None:
    spec = fill(pod, spec={})["spec"]
    _pod_spec(spec)
    fill(spec, enableServiceLinks=True)
    for container in (*spec.get("containers", ()), *spec.get("initContainers", ())):
        requests = container["resources"]
        if "limits" in requests:
            requests["requests"] = {**requests["limits"], **requests.get("requests", {})}
        for port in container.get("ports", ()) if spec.get("hostNetwork") else ():
            fill(port, hostPort=port["containerPort"])


def _deployment(obj: Obj) -> None:
    spec = fill(obj, spec={})["spec"]
    fill(spec, replicas=1, revisionHistoryLimit=10, progressDeadlineSeconds=600, strategy={})
    strategy = fill(spec["strategy"], type="RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        fill(strategy, rollingUpdate={})
        fill(strategy["rollingUpdate"], maxUnavailable="25%", maxSurge="25%")
    _template(spec)


def _replica_set(obj: Obj) -> None:
    _template(fill(fill(obj, spec={})["spec"], replicas=1))


def _daemon_set(obj: Obj) -> None:
    spec = fill(fill(obj, spec={})["spec"], updateStrategy={}, revisionHistoryLimit=10)
    strategy = fill(spec["updateStrategy"], type="RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        fill(strategy, rollingUpdate={})
        fill(strategy["rollingUpdate"], maxUnavailable=1, maxSurge=0)
    _template(spec)


def _stateful_set(obj: Obj) -> None:
    spec = fill(
        fill(obj, spec={})["spec"],
        replicas=1,
        podManagementPolicy="OrderedReady",
        revisionHistoryLimit=10,
        updateStrategy={},
        persistentVolumeClaimRetentionPolicy={"whenDeleted": "Retain", "whenScaled": "Retain"},
    )
    strategy = fill(spec["updateStrategy"], type="RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        fill(strategy, rollingUpdate={})
        fill(strategy["rollingUpdate"], partition=0)
    _template(spec)


def _service(obj: Obj) -> None:
    spec = fill(fill(obj, spec={}, status={"loadBalancer": {}})["spec"], sessionAffinity="None")
    fill(spec, type="ClusterIP")
    kind = spec["type"]
    for port in spec.get("ports", ()):
        fill(port, protocol="TCP")
        if not port.get("targetPort"):
            port["targetPort"] = port.get("port")
    if kind in {"NodePort", "LoadBalancer"}:
        fill(spec, externalTrafficPolicy="Cluster")
    if kind == "LoadBalancer":
        fill(spec, allocateLoadBalancerNodePorts=True)
    if kind != "ExternalName":
        fill(spec, internalTrafficPolicy="Cluster")
    for entry in obj["status"].get("loadBalancer", {}).get("ingress") or ():
        if entry.get("ip"):
            fill(entry, ipMode="VIP")
    if spec["sessionAffinity"] == "ClientIP":
        fill(spec, sessionAffinityConfig={"clientIP": {"timeoutSeconds": 10800}})
    else:
        spec.pop("sessionAffinityConfig", None)


def _namespace(obj: Obj) -> None:
    meta = obj["metadata"]
    meta.setdefault("labels", {})["kubernetes.io/metadata.name"] = meta["name"]
    fill(obj, spec={}, status={"phase": "Active"})


def _node(obj: Obj) -> None:
    fill(obj, spec={}, status={})


def _secret(obj: Obj) -> None:
    plain = obj.pop("stringData", None)
    fill(obj, type="Opaque")
    if plain:
        data = fill(obj, data={})["data"]
        for key, value in plain.items():
            data[key] = base64.b64encode(value.encode()).decode()


def _slice(obj: Obj) -> None:
    for key in ("endpoints", "ports"):  # an empty list is null here, as from a real server
        obj[key] = obj.get(key) or None
    for port in obj["ports"] or ():
        fill(port, name="", protocol="TCP")


def _binding(obj: Obj) -> None:
    reference = obj.get("roleRef", {})
    fill(reference, apiGroup="rbac.authorization.k8s.io")
    for subject in obj.get("subjects") or ():
        if subject.get("kind") in {"User", "Group"}:
            fill(subject, apiGroup="rbac.authorization.k8s.io")


def _crd(obj: Obj) -> None:
    spec = fill(fill(obj, spec={})["spec"], conversion={"strategy": "None"}, names={})
    kind = spec["names"].get("kind", "")
    fill(spec["names"], singular=kind.lower(), listKind=f"{kind}List")


_BY_KEY: Final[dict[str, Callable[[Obj], None]]] = {
    "pods": _pod,
    "deployments.apps": _deployment,
    "replicasets.apps": _replica_set,
    "daemonsets.apps": _daemon_set,
    "statefulsets.apps": _stateful_set,
    "services": _service,
    "namespaces": _namespace,
    "nodes": _node,
    "secrets": _secret,
    "endpointslices.discovery.k8s.io": _slice,
    "rolebindings.rbac.authorization.k8s.io": _binding,
    "clusterrolebindings.rbac.authorization.k8s.io": _binding,
    "customresourcedefinitions.apiextensions.k8s.io": _crd,
}


def admit_pod(pod: Obj) -> None:
    """What admission adds to a new Pod: account, token volume, tolerations, priority, QoS class."""
    spec = pod["spec"]
    fill(spec, serviceAccountName=spec.get("serviceAccount") or "default")
    spec["serviceAccount"] = spec["serviceAccountName"]
    fill(spec, priority=0, preemptionPolicy="PreemptLowerPriority")
    tolerations = spec.setdefault("tolerations", [])
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(_covers(toleration, key) for toleration in tolerations):
            tolerations.append(
                {
                    "key": key,
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": 300,
                }
            )
    pod["status"] = {"phase": "Pending", "qosClass": _qos(spec)}


def admit_node(node: Obj) -> None:
    """A new node takes no Pods until the node controller has seen it ready."""
    taint = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
    taints = node["spec"].setdefault("taints", [])
    if taint not in taints:
        taints.append(taint)


def _covers(toleration: Obj, key: str) -> bool:
    wanted = toleration.get("key")
    exists = toleration.get("operator") == "Exists"
    effect = toleration.get("effect") in {None, "", "NoExecute"}
    return effect and (wanted == key or (not wanted and exists))


def mount_token(pod: Obj) -> None:
    """The projected volume with ServiceAccount token, CA and namespace, in every container."""
    spec = pod["spec"]
    volumes = spec.setdefault("volumes", [])
    if any(volume["name"].startswith("kube-api-access-") for volume in volumes):
        return
    name = f"kube-api-access-{suffix()}"
    namespace = {"path": "namespace", "fieldRef": {"apiVersion": "v1"}}
    namespace["fieldRef"] = {"apiVersion": "v1", "fieldPath": "metadata.namespace"}
    sources = [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {
            "configMap": {
                "name": "kube-root-ca.crt",
                "items": [{"key": "ca.crt", "path": "ca.crt"}],
            }
        },
        {"downwardAPI": {"items": [namespace]}},
    ]
    used = False
    for container in (*spec.get("initContainers", ()), *spec.get("containers", ())):
        mounts = container.setdefault("volumeMounts", [])
        if not any(mount.get("mountPath") == _TOKEN_DIR for mount in mounts):
            mounts.append({"name": name, "readOnly": True, "mountPath": _TOKEN_DIR})
            used = True
    if used:
        volumes.append({"name": name, "projected": {"sources": sources, "defaultMode": 0o644}})


def _qos(spec: Obj) -> str:
    resources = [container["resources"] for container in spec.get("containers", ())]
    if not any(entry.get("requests") or entry.get("limits") for entry in resources):
        return "BestEffort"
    full = all(
        {"cpu", "memory"} <= set(entry.get("limits", {}))
        and entry.get("limits") == entry.get("requests")
        for entry in resources
    )
    return "Guaranteed" if full else "Burstable"
