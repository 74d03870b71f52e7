"""The Services of type LoadBalancer, and the namespaces' labels, in manifests that people write.

Rules: they are decoded as the API server's own objects are; what a user wrote is checked here,
because nobody else has: names, and types at their line and column. Other kinds are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Final, TypeAlias, TypeVar

from lbctl.core.config_values import parse_label, show
from lbctl.core.eip_plan import POD_LABEL, Wanted
from lbctl.core.manifests import Manifest, Place, manifests
from lbctl.core.model import ObjectRef
from lbctl.core.positions import Loc
from lbctl.errors import ConfigError, KubeError
from lbctl.kube import objects
from lbctl.kube.client import SERVICES, Client

T = TypeVar("T")
Labels: TypeAlias = dict[str, dict[str, str]]
Planned: TypeAlias = tuple[tuple[Wanted, ...], Labels]
# msgspec's words after the kind that was decoded: "Service: Expected … - at `$.spec.ports`"
_WHERE: Final = re.compile(r"\A(?:Service|Named): (?P<text>.*?)(?: - at `\$(?P<path>.*)`)?\Z")
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")


def read(files: Iterable[tuple[str, str]], namespace: str) -> Planned:
    """Name and text of each file → its Services in order, and labels of Namespaces.

    namespace: of what names none. Raises ConfigError with every problem at FILE:LINE:COLUMN.
    """
    wanted: dict[ObjectRef, Wanted] = {}
    labels: Labels = {}
    problems: list[str] = []
    for source, text in files:
        try:
            found = manifests(text, source)
        except ConfigError as error:
            problems += error.problems
            continue
        for one in found:
            try:
                _take(one, namespace, wanted, labels)
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(tuple(problems))
    return tuple(wanted.values()), labels


async def filled_in(
    client: Client, wanted: Iterable[Wanted], known: Collection[ObjectRef]
) -> tuple[tuple[Wanted, ...], tuple[str, ...]]:
    """New Services with the families that the API server would fill in: it is asked by a create
    that stores nothing. known: Services that exist, whose families are there.

    Also a sentence for each that could not be asked for (no such namespace, no right to create):
    it is as it was, for `core.eip_plan` to fill in by its own rule. Never raises KubeError.
    """
    found: list[Wanted] = []
    told: list[str] = []
    for one in wanted:
        ref = one.service.ref
        if ref not in known:
            try:
                one = await _asked(client, one)
            except KubeError as error:
                told.append(f"Service {ref}: IP families by rule, not by the API server: {error}")
        found.append(one)
    return tuple(found), tuple(told)


async def _asked(client: Client, one: Wanted) -> Wanted:
    ref = one.service.ref
    spec: dict[str, object] = {"type": "LoadBalancer", "ports": [{"port": 80}]}
    if one.families:
        spec["ipFamilies"] = [f"IPv{family}" for family in one.families]
    if one.policy:
        spec["ipFamilyPolicy"] = one.policy
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": ref.name}, "spec": spec}
    made = await client.would_create(SERVICES.path(ref.namespace), body)
    families = tuple(int(family[-1]) for family in made["spec"]["ipFamilies"])
    return replace(one, families=families, policy=made["spec"]["ipFamilyPolicy"])


def _take(found: Manifest, namespace: str, wanted: dict[ObjectRef, Wanted], labels: Labels) -> None:
    place = found.place
    if not found.kind:
        hint = "a configuration is given by --config"
        raise ConfigError((place.problem(f"kind: is missing: no Kubernetes object ({hint})"),))
    if (found.api, found.kind) == ("v1", "Namespace"):
        name = _label(place.at("metadata", "name"))
        labels[name] = dict(_decoded(place, objects.to_namespace, "").labels)
    elif (found.api, found.kind) == ("v1", "Service"):
        if place.at("spec", "type").value != "LoadBalancer":
            return
        one = _service(place, namespace)
        ref = one.service.ref
        if ref in wanted:
            said = f"Service {ref} is there twice (first at {wanted[ref].place})"
            raise ConfigError((place.at("metadata", "name").problem(said),))
        wanted[ref] = one


def _service(place: Place, namespace: str) -> Wanted:
    _label(place.at("metadata", "name"))
    space = place.at("metadata", "namespace")
    if space.value is not None:
        namespace = _label(space)
    made = _decoded(place, objects.to_service, namespace)
    pod = place.at("spec", "selector", POD_LABEL)
    if pod.value is not None:
        _label(pod)
    spec = place.at("spec")
    listed = bool(spec.at("ipFamilies").value)
    return Wanted(
        made,
        f"{place.source}:{place.document.mark(place.loc).line}",
        families=made.families if listed else (),
        policy=str(spec.at("ipFamilyPolicy").value or ""),
    )


def _label(place: Place) -> str:
    """A name, or whatever else is a DNS label."""
    value = place.value
    if value is None:
        raise ConfigError((place.problem("is missing"),))
    try:
        return parse_label(value)
    except ValueError as error:
        raise ConfigError((place.problem(str(error)),)) from error


def _decoded(place: Place, decode: Callable[[bytes], T], namespace: str) -> T:
    """An object as it would come from the API server."""
    assert isinstance(place.value, dict)
    whole = {key: value for key, value in place.value.items() if key != "status"}
    meta = _mapping(place.at("metadata"))
    whole["metadata"] = {**meta, "namespace": meta.get("namespace") or namespace}
    try:
        return decode(json.dumps(whole).encode())
    except KubeError as error:
        raise ConfigError((_problem(place, str(error)),)) from error


def _mapping(place: Place) -> dict[str, object]:
    value = place.value
    if not isinstance(value, dict):
        raise ConfigError((place.problem(f"must be a mapping, not {show(value)}"),))
    return value


def _problem(place: Place, said: str) -> str:
    """What the decoder says about `$.spec.ports[0].port`, at its place."""
    found = _WHERE.match(said)
    text, path = (found["text"], found["path"] or "") if found else (said, "")
    loc: Loc = tuple(key or int(index) for key, index in _STEP.findall(path))
    text = text.replace("`", "")
    return place.at(*loc).problem(text[:1].lower() + text[1:])
