"""Pods from templates, the hash of a template, and where a Pod may run. Pure."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, Final

import msgspec

from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.selectors import label_selector
from lbctl.lab.controllers.base import owner_reference

_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"
HASH_LABEL: Final = "pod-template-hash"
REVISION_LABEL: Final = "controller-revision-hash"
_DAEMON_TOLERATED: Final = (
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
)


def template_hash(template: Obj) -> str:
    """Ten characters that name a Pod template."""
    digest = hashlib.sha256(msgspec.json.encode(template, order="sorted")).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:10])


def from_template(owner: Obj, template: Obj, labels: dict[str, str] | None = None) -> Obj:
    """A new Pod of a controller; its name is generated from the owner's."""
    template = copy.deepcopy(template)
    given = template.get("metadata", {})
    meta: Obj = {
        "generateName": owner["metadata"]["name"] + "-",
        "labels": {**(given.get("labels") or {}), **(labels or {})},
        "ownerReferences": [owner_reference(owner)],
    }
    for key in ("annotations", "finalizers"):
        if given.get(key):
            meta[key] = given[key]
    return {"metadata": meta, "spec": template["spec"]}


def pin_to_node(pod: Obj, node: str) -> None:
    """As the DaemonSet controller does: a node affinity that only this node satisfies."""
    term = {"key": "metadata.name", "operator": "In", "values": [node]}
    affinity = pod["spec"].setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.get("nodeSelectorTerms") or [{}]
    required["nodeSelectorTerms"] = [{**entry, "matchFields": [term]} for entry in terms]
    pod["spec"]["tolerations"] = daemon_tolerations(pod["spec"])


def pinned_node(pod: Obj) -> str:
    """The node that a DaemonSet's Pod is on or meant for."""
    spec = pod["spec"]
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    required = (
        spec.get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", {})
    )
    for term in required.get("nodeSelectorTerms") or ():
        for field in term.get("matchFields") or ():
            if field["key"] == "metadata.name":
                return str(field["values"][0])
    return ""


def daemon_tolerations(spec: Obj) -> list[Obj]:
    """A Pod's tolerations and those that every DaemonSet's Pod gets."""
    wanted = list(_DAEMON_TOLERATED)
    if spec.get("hostNetwork"):
        wanted.append(("node.kubernetes.io/network-unavailable", "NoSchedule"))
    found = list(spec.get("tolerations") or ())
    for key, effect in wanted:
        entry = {"key": key, "operator": "Exists", "effect": effect}
        if entry not in found:
            found.append(entry)
    return found


def may_run(spec: Obj, node: Obj) -> tuple[bool, bool]:
    """(should a daemon start here, may a running one stay): selector, affinity, taints."""
    labels = node["metadata"].get("labels") or {}
    wanted = spec.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False, False
    required = (
        spec.get("affinity", {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution")
    )
    if required is not None:
        terms = required.get("nodeSelectorTerms") or ()
        if not any(_term_matches(term, node) for term in terms):
            return False, False
    tolerations = daemon_tolerations(spec)
    left = [
        taint["effect"]
        for taint in node.get("spec", {}).get("taints") or ()
        if not any(tolerates(toleration, taint) for toleration in tolerations)
    ]
    start = not any(effect in {"NoSchedule", "NoExecute"} for effect in left)
    return start, "NoExecute" not in left


def _term_matches(term: Obj, node: Obj) -> bool:
    labels = node["metadata"].get("labels") or {}
    fields = {"metadata.name": node["metadata"]["name"]}
    if not term.get("matchExpressions") and not term.get("matchFields"):
        return False
    expressions = label_selector({"matchExpressions": term.get("matchExpressions") or ()})
    by_field = label_selector({"matchExpressions": term.get("matchFields") or ()})
    return expressions(labels) and by_field(fields)


def tolerates(toleration: Obj, taint: Obj) -> bool:
    """Kubernetes' rule: effect, key and value match; an empty one matches all."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("operator") == "Exists":
        return True
    return bool(toleration.get("key")) and toleration.get("value", "") == taint.get("value", "")


def resolve(value: Any, total: int, *, up: bool) -> int:
    """An int or a percentage of `total`."""
    if isinstance(value, str) and value.endswith("%"):
        share = int(value[:-1]) * total
        return -(-share // 100) if up else share // 100
    return int(value or 0)
