"""The lab's scheduler: which node gets which pending pod.

`plan` is pure. It honours nodeName, nodeSelector, required node affinity (labels and
metadata.name), taints and tolerations, and podAntiAffinity by hostname; among the nodes that fit it
takes the one with the fewest pods of the same owner, then the fewest pods, then the first name.
Not honoured, because no manifest of the lab needs it: resources, other topology keys, volumes.
Source: https://kubernetes.io/docs/concepts/scheduling-eviction/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Object: TypeAlias = dict[str, Any]
_HOSTNAME: Final = "kubernetes.io/hostname"
_OVER: Final = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Decision:
    """One pending pod's outcome: a node, or "" and why none fits."""

    namespace: str
    name: str
    uid: str
    node: str
    why: str = ""


def plan(pods: Sequence[Object], nodes: Sequence[Object]) -> tuple[Decision, ...]:
    """Decide on every pod that is bound to no node, oldest first. Pure: no hidden state."""
    ordered = sorted(nodes, key=lambda node: str(node["metadata"]["name"]))
    placed = [pod for pod in pods if _node_of(pod) and _phase(pod) not in _OVER]
    waiting = [pod for pod in pods if not _node_of(pod) and _phase(pod) not in _OVER]
    waiting = [pod for pod in waiting if not pod["metadata"].get("deletionTimestamp")]
    decisions = []
    for pod in sorted(waiting, key=_age):
        if pod["spec"].get("schedulingGates"):
            continue
        decision = _decide(pod, ordered, placed)
        decisions.append(decision)
        if decision.node:
            placed.append(_bound(pod, decision.node))
    return tuple(decisions)


def _age(pod: Object) -> tuple[str, str, str]:
    meta = pod["metadata"]
    return str(meta.get("creationTimestamp", "")), str(meta.get("namespace", "")), meta["name"]


def _bound(pod: Object, node: str) -> Object:
    return {**pod, "spec": {**pod["spec"], "nodeName": node}}


def _node_of(pod: Object) -> str:
    return str(pod["spec"].get("nodeName") or "")


def _phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", ""))


def _decide(pod: Object, nodes: Sequence[Object], placed: Sequence[Object]) -> Decision:
    reasons: Counter[str] = Counter()
    fitting = []
    for node in nodes:
        why = _misfit(pod, node, placed)
        if why:
            reasons[why] += 1
        else:
            fitting.append(node)
    meta = pod["metadata"]
    best = min(fitting, key=lambda node: _rank(pod, node, placed), default=None)
    if best is not None:
        name = str(best["metadata"]["name"])
        return Decision(meta["namespace"], meta["name"], meta["uid"], name)
    told = ", ".join(f"{count} {why}" for why, count in sorted(reasons.items()))
    why = f"0/{len(nodes)} nodes are available: {told or 'there are none'}."
    return Decision(meta["namespace"], meta["name"], meta["uid"], "", why)


def _rank(pod: Object, node: Object, placed: Sequence[Object]) -> tuple[int, int, int, str]:
    name = str(node["metadata"]["name"])
    here = [other for other in placed if _node_of(other) == name]
    owner = _owner(pod)
    siblings = sum(1 for other in here if _owner(other) == owner)
    terms = _anti_affinity(pod).get("preferredDuringSchedulingIgnoredDuringExecution") or []
    disliked = sum(
        int(term.get("weight", 1))
        for term in terms
        if _clashes(term.get("podAffinityTerm", {}), pod, here)
    )
    return disliked, siblings, len(here), name


def _owner(pod: Object) -> tuple[str, str]:
    owners = pod["metadata"].get("ownerReferences") or []
    namespace = str(pod["metadata"].get("namespace", ""))
    return namespace, str(owners[0]["uid"]) if owners else str(pod["metadata"]["name"])


def _misfit(pod: Object, node: Object, placed: Sequence[Object]) -> str:
    """Why the pod cannot go there; "" if it can."""
    spec = pod["spec"]
    labels = _labels(node)
    selector = spec.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        return "node(s) didn't match Pod's node affinity/selector"
    node_affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required and not any(_term(term, node) for term in required.get("nodeSelectorTerms") or []):
        return "node(s) didn't match Pod's node affinity/selector"
    taints = list(node["spec"].get("taints") or [])
    if node["spec"].get("unschedulable"):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    tolerations = spec.get("tolerations") or []
    for taint in taints:
        hard = taint.get("effect") in ("NoSchedule", "NoExecute")
        if hard and not any(tolerates(toleration, taint) for toleration in tolerations):
            return f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
    here = [other for other in placed if _node_of(other) == node["metadata"]["name"]]
    terms = _anti_affinity(pod).get("requiredDuringSchedulingIgnoredDuringExecution") or []
    if any(_clashes(term, pod, here) for term in terms):
        return "node(s) didn't match pod anti-affinity rules"
    if any(_repels(other, pod) for other in here):
        return "node(s) didn't satisfy existing pods anti-affinity rules"
    ports = _host_ports(pod)
    if ports and any(ports & _host_ports(other) for other in here):
        return "node(s) didn't have free ports for the requested pod ports"
    return ""


def _labels(node: Object) -> dict[str, str]:
    return {_HOSTNAME: node["metadata"]["name"], **(node["metadata"].get("labels") or {})}


def _anti_affinity(pod: Object) -> Object:
    return (pod["spec"].get("affinity") or {}).get("podAntiAffinity") or {}


def _repels(other: Object, pod: Object) -> bool:
    terms = _anti_affinity(other).get("requiredDuringSchedulingIgnoredDuringExecution") or []
    return any(_clashes(term, other, [pod]) for term in terms)


def _clashes(term: Object, owner: Object, others: Iterable[Object]) -> bool:
    """Whether one of `others` is what `owner`'s anti-affinity term keeps away from."""
    if term.get("topologyKey") != _HOSTNAME:
        return False
    spaces = term.get("namespaces") or [owner["metadata"].get("namespace")]
    return any(
        other["metadata"].get("namespace") in spaces
        and selects(term.get("labelSelector"), other["metadata"].get("labels") or {})
        for other in others
    )


def _host_ports(pod: Object) -> set[tuple[str, int]]:
    found = set()
    for container in pod["spec"].get("containers") or []:
        for port in container.get("ports") or []:
            number = port.get("hostPort")
            if not number and pod["spec"].get("hostNetwork"):
                number = port.get("containerPort")
            if number:
                found.add((str(port.get("protocol", "TCP")), int(number)))
    return found


def tolerates(toleration: Object, taint: Object) -> bool:
    """Whether a toleration covers a taint."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("operator") == "Exists":
        return not toleration.get("key") or bool(toleration["key"] == taint["key"])
    same_key = toleration.get("key") == taint["key"]
    return bool(same_key and (toleration.get("value") or "") == (taint.get("value") or ""))


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches. None matches nothing, an empty one everything."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_expression(one, labels) for one in selector.get("matchExpressions") or [])


def _term(term: Object, node: Object) -> bool:
    """A node selector term: all its expressions, and an empty term matches nothing."""
    expressions = term.get("matchExpressions") or []
    by_field = term.get("matchFields") or []
    if not expressions and not by_field:
        return False
    fields = {"metadata.name": str(node["metadata"]["name"])}
    labels = _labels(node)
    return all(_expression(one, labels) for one in expressions) and all(
        _expression(one, fields) for one in by_field
    )


def _expression(expression: Object, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression["key"])
    values = expression.get("values") or []
    operator = expression["operator"]
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    if value is None or not value.lstrip("-").isdecimal():
        return False
    if operator == "Gt":
        return int(value) > int(values[0])
    return operator == "Lt" and int(value) < int(values[0])
