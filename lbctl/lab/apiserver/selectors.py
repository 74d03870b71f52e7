"""Label and field selectors: from a query string or a LabelSelector to a predicate on objects.

Sources: Kubernetes API concepts, "Labels and Selectors" and "Field Selectors".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from lbctl.lab.apiserver import status
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.store import Match

Labels = Mapping[str, str]
LabelMatch = Callable[[Labels], bool]
_SET: Final = re.compile(r"^(?P<key>[\w./-]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)$")
_EQUAL: Final = re.compile(r"^(?P<key>[\w./-]+)\s*(?P<op>==|=|!=)\s*(?P<value>[\w.-]*)$")
_EXISTS: Final = re.compile(r"^(?P<no>!?)\s*(?P<key>[\w./-]+)$")
_ALWAYS: Final = ("metadata.name", "metadata.namespace")
_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "pods": (
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ),
    "events": (
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
    "nodes": ("spec.unschedulable",),
    "namespaces": ("status.phase",),
    "secrets": ("type",),
    "services": ("spec.clusterIP", "spec.type"),
    "replicasets.apps": ("status.replicas",),
}


def parse_labels(text: str) -> LabelMatch | None:
    """A labelSelector of a query string; None selects all. Raises ApiRefusal 400."""
    tests = [_label_test(part.strip(), text) for part in _split(text) if part.strip()]
    if not tests:
        return None
    return lambda labels: all(test(labels) for test in tests)


def _split(text: str) -> list[str]:
    """At commas outside parentheses."""
    return re.split(r",(?![^()]*\))", text)


def _label_test(part: str, whole: str) -> LabelMatch:
    if found := _SET.match(part):
        key = found["key"]
        values = {value.strip() for value in found["values"].split(",")}
        if found["op"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if found := _EQUAL.match(part):
        key, value = found["key"], found["value"]
        if found["op"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if found := _EXISTS.match(part):
        key = found["key"]
        if found["no"]:
            return lambda labels: key not in labels
        return lambda labels: key in labels
    raise status.bad_request(
        f'unable to parse requirement: "{part}" of the selector "{whole}" is not understood'
    )


def label_selector(selector: Obj | None) -> LabelMatch:
    """A LabelSelector object (matchLabels, matchExpressions). None selects nothing, {} all."""
    if selector is None:
        return lambda _: False
    wanted = selector.get("matchLabels") or {}
    tests = [_expression(entry) for entry in selector.get("matchExpressions") or ()]

    def match(labels: Labels) -> bool:
        equal = all(labels.get(key) == value for key, value in wanted.items())
        return equal and all(test(labels) for test in tests)

    return match


def _expression(entry: Obj) -> LabelMatch:
    key, values = entry["key"], set(entry.get("values") or ())
    tests: dict[str, LabelMatch] = {
        "In": lambda labels: labels.get(key) in values,
        "NotIn": lambda labels: labels.get(key) not in values,
        "Exists": lambda labels: key in labels,
        "DoesNotExist": lambda labels: key not in labels,
        "Gt": lambda labels: _number(labels.get(key)) > min(map(_number, values)),
        "Lt": lambda labels: _number(labels.get(key, "x"), 1) < max(map(_number, values)),
    }
    return tests.get(entry["operator"], lambda _: False)


def _number(text: str | None, sign: int = -1) -> float:
    try:
        return float(text) if text is not None else sign * float("inf")
    except ValueError:
        return sign * float("inf")


def parse_fields(text: str, resource: Resource) -> Match | None:
    """A fieldSelector of a query string; None selects all. Raises ApiRefusal 400."""
    allowed = (*_ALWAYS, *_FIELDS.get(resource.key, ()))
    tests: list[Match] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.match(r"^([\w.]+)\s*(==|=|!=)\s*(.*)$", part)
        if found is None:
            raise status.bad_request(f"invalid selector: '{part}'; can't understand '{part}'")
        path, operator, value = found.groups()
        if path not in allowed:
            if resource.key in _FIELDS or resource.custom:
                raise status.bad_request(f"field label not supported: {path}")
            raise status.bad_request(
                f'"{path}" is not a known field selector: only "metadata.name", '
                '"metadata.namespace"'
            )
        tests.append(_field_test(path, operator == "!=", value))
    if not tests:
        return None
    return lambda obj: all(test(obj) for test in tests)


def _field_test(path: str, negative: bool, value: str) -> Match:
    keys = path.split(".")

    def test(obj: Obj) -> bool:
        node: Any = obj
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        if path == "source":
            node = (obj.get("source") or {}).get("component") or obj.get("reportingComponent")
        if isinstance(node, bool):
            node = str(node).lower()
        elif path in {"spec.unschedulable", "spec.hostNetwork"}:
            node = "false"
        return ((node or "") != value) if negative else ((node or "") == value)

    return test


def both(labels: LabelMatch | None, fields: Match | None) -> Match | None:
    """One predicate of the two selectors; None if neither selects."""
    if labels is None:
        return fields

    def match(obj: Obj) -> bool:
        return labels(obj["metadata"].get("labels") or {}) and (fields is None or fields(obj))

    return match
