"""Types of the objects: Kubernetes' own OpenAPI definitions (schema.json) and those of CRDs.

One walk (`clean`) does what a real server does when it decodes: unknown fields are dropped and
named, nulls are dropped, wrong types are named. Patches and server-side apply ask the same
definitions for the keys of lists (`x-kubernetes-…`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.status import Cause, invalid_value, required, unsupported

REF: Final = "#/definitions/"
OBJECT_META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_GVK: Final = "x-kubernetes-group-version-kind"
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


@dataclass(slots=True)
class Findings:
    """What a walk found wrong. `types` are for 400 (built-in) or 422 (custom) answers."""

    unknown: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)


class Schemas:
    """The definitions by name and by kind."""

    def __init__(self) -> None:
        text = Path(__file__).with_name("schema.json").read_bytes()
        self.definitions: dict[str, Obj] = msgspec.json.decode(text)["definitions"]
        self._kinds: dict[tuple[str, str, str], str] = {}
        for name, definition in self.definitions.items():
            for gvk in definition.get(_GVK, ()):
                self._kinds.setdefault((gvk["group"], gvk["version"], gvk["kind"]), name)
        # A Quantity may be written as a number; an int-or-string is what its name says.
        self._loose = {REF + "io.k8s.apimachinery.pkg.api.resource.Quantity"}

    def add(self, resource: Resource, schema: Obj) -> None:
        """The schema of a custom resource (openAPIV3Schema of its version)."""
        properties = {
            **schema.get("properties", {}),
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"$ref": REF + OBJECT_META},
        }
        gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        name = ".".join((*reversed(resource.group.split(".")), resource.version, resource.kind))
        self.definitions[name] = {**schema, "properties": properties, _GVK: [gvk]}
        self._kinds[(resource.group, resource.version, resource.kind)] = name

    def name_of(self, resource: Resource) -> str:
        """Name of the definition of a resource's kind."""
        return self._kinds[(resource.group, resource.version, resource.kind)]

    def kind_name(self, group: str, version: str, kind: str) -> str:
        """Name of the definition of a kind, or ""."""
        return self._kinds.get((group, version, kind), "")

    def of_resource(self, resource: Resource) -> Obj:
        """The definition of a resource's kind."""
        return self.definitions[self.name_of(resource)]

    def resolve(self, node: Obj) -> Obj:
        """A node with its $ref followed; keys beside the $ref (list and patch keys) win."""
        ref = node.get("$ref")
        if ref is None:
            return node
        target = self.definitions.get(ref.removeprefix(REF), {})
        return target if len(node) == 1 else {**target, **node}

    def child(self, node: Obj, key: str) -> Obj | None:
        """The schema of a field; None if the type has no such field."""
        found = node.get("properties", {}).get(key)
        if found is None:
            extra = node.get("additionalProperties")
            found = extra if isinstance(extra, dict) else None
        return None if found is None else self.resolve(found)

    def clean(self, node: Obj, value: Any, path: str, found: Findings, *, custom: bool) -> Any:
        """`value` without unknown fields and nulls. What was wrong is added to `found`."""
        if node.get("format") == "int-or-string" or node.get("x-kubernetes-int-or-string"):
            return self._leaf_of((int, str), "integer,string", value, path, found, custom)
        kind = node.get("type")
        if kind is None or value is None:
            return value
        wanted: tuple[type, ...] = _TYPES[kind]
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            return self._leaf_of(wanted, kind, value, path, found, custom)
        if isinstance(value, list):
            items = self.resolve(node.get("items", {}))
            return [
                self.clean(items, entry, f"{path}[{index}]", found, custom=custom)
                for index, entry in enumerate(value)
            ]
        if isinstance(value, dict):
            return self._object(node, value, path, found, custom)
        if custom:
            _restrictions(node, value, path, found)
        return value

    def _leaf_of(
        self,
        wanted: tuple[type, ...],
        kind: str,
        value: Any,
        path: str,
        found: Findings,
        custom: bool,
    ) -> Any:
        if value is None or (isinstance(value, wanted) and not isinstance(value, bool)):
            return value
        actual = _type_name(value)
        if custom:
            text = f'{path} in body must be of type {kind}: "{actual}"'
            found.causes.append(
                Cause(path, "FieldValueTypeInvalid", f'Invalid value: "{actual}": {text}')
            )
        else:
            go = {"integer": "int32", "boolean": "bool", "integer,string": "IntOrString"}
            found.types.append(
                f"json: cannot unmarshal {_JSON_NAME[actual]} into Go struct field {path} "
                f"of type {go.get(kind, kind)}"
            )
        return value

    def _object(self, node: Obj, value: Obj, path: str, found: Findings, custom: bool) -> Obj:
        properties = node.get("properties")
        extra = node.get("additionalProperties")
        if properties is None and not extra:
            return value  # free form: RawExtension, FieldsV1, preserved fields
        cleaned = {}
        for key, entry in value.items():
            if entry is None:
                continue
            at = f"{path}.{key}" if path else key
            schema = properties.get(key) if properties else None
            if schema is None and isinstance(extra, dict):
                schema = extra
            if schema is None:
                if extra or node.get("x-kubernetes-preserve-unknown-fields"):
                    cleaned[key] = entry
                else:
                    found.unknown.append(at)
                continue
            if schema.get("$ref") in self._loose and isinstance(entry, (int, float)):
                entry = str(entry)
            inside = custom and schema.get("$ref") != REF + OBJECT_META
            cleaned[key] = self.clean(self.resolve(schema), entry, at, found, custom=inside)
        if custom:
            _complete(node, cleaned, path, found)
        return cleaned

    def closure(self, names: Iterator[str]) -> dict[str, Obj]:
        """Definitions and all that they refer to."""
        kept: dict[str, Obj] = {}
        todo = list(names)
        while todo:
            name = todo.pop()
            if name not in kept and name in self.definitions:
                kept[name] = self.definitions[name]
                todo += _refs(kept[name])
        return kept


def _complete(node: Obj, value: Obj, path: str, found: Findings) -> None:
    """Defaults of a CRD's object, then what it requires."""
    for key, schema in (node.get("properties") or {}).items():
        if "default" in schema and key not in value:
            value[key] = copy.deepcopy(schema["default"])
    for key in node.get("required", ()):
        if key not in value:
            found.causes.append(required(f"{path}.{key}" if path else key))


def _restrictions(node: Obj, value: Any, path: str, found: Findings) -> None:
    """enum, pattern, length, minimum and maximum of a CRD's leaf."""
    allowed = node.get("enum")
    if allowed and value not in allowed:
        found.causes.append(unsupported(path, value, [str(item) for item in allowed]))
    pattern = node.get("pattern")
    if pattern and isinstance(value, str) and not _compiled(pattern).search(value):
        found.causes.append(invalid_value(path, value, f"{path} in body should match '{pattern}'"))
    for key, text, sign in (
        ("minimum", "greater than or equal to", 1),
        ("maximum", "less than or equal to", -1),
    ):
        limit = node.get(key)
        if limit is not None and sign * value < sign * limit:
            detail = f"{path} in body should be {text} {limit}"
            found.causes.append(invalid_value(path, value, detail))
    longest = node.get("maxLength")
    if longest is not None and len(value) > longest:
        found.causes.append(
            Cause(path, "FieldValueTooLong", f"Too long: may not be more than {longest} bytes")
        )
    shortest = node.get("minLength")
    if shortest is not None and len(value) < shortest:
        detail = f"{path} in body should be at least {shortest} chars long"
        found.causes.append(invalid_value(path, value, detail))


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    for name, types in _TYPES.items():
        if isinstance(value, types):
            return name
    return "null"


_JSON_NAME: Final = {
    "string": "string",
    "integer": "number",
    "number": "number",
    "boolean": "bool",
    "array": "array",
    "object": "object",
    "null": "null",
}


def _refs(node: Any) -> list[str]:
    if isinstance(node, list):
        return [ref for item in node for ref in _refs(item)]
    if not isinstance(node, dict):
        return []
    found = [ref for value in node.values() for ref in _refs(value)]
    ref = node.get("$ref")
    return [*found, ref.removeprefix(REF)] if isinstance(ref, str) else found
