"""Field ownership (metadata.managedFields) and server-side apply.

A set of fields is a set of paths; a path is a tuple of FieldsV1 elements: `f:NAME`, `k:{KEYS}` (an
element of a list with keys), `v:VALUE` (an element of a set). Source: Kubernetes, "Server-Side
Apply", and the structured-merge-diff library whose format this is.
Simpler than the real one: ownership is per apiVersion as written, and an update that only changes
metadata of the server's own tracks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from lbctl.lab.apiserver import status
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.schema import Schemas

Path: TypeAlias = tuple[str, ...]
_KEY_DEFAULTS: Final[dict[str, Any]] = {"protocol": "TCP", "port": None}
_KUBECTL: Final = "kubectl"
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_CLIENT_SIDE: Final = "kubectl-client-side-apply"
_UNTRACKED: Final = frozenset(
    ("f:metadata", f"f:{name}")
    for name in (
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "resourceVersion",
        "generation",
        "managedFields",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "generateName",
    )
)


def fields(schemas: Schemas, schema: Obj, value: Obj, *, with_status: bool) -> set[Path]:
    """The paths of an object that someone can own."""
    found = set(_paths(schemas, schema, value, ()))
    return {
        path
        for path in found
        if path[0] not in {"f:apiVersion", "f:kind"}
        and path[:2] not in _UNTRACKED
        and path != ("f:metadata",)
        and (with_status or path[0] != "f:status")
    }


def _paths(schemas: Schemas, schema: Obj, value: Any, prefix: Path) -> Iterator[Path]:
    if isinstance(value, dict):
        if not value or schema.get("x-kubernetes-map-type") == "atomic":
            yield prefix
            return
        for key, entry in value.items():
            child = schemas.child(schema, key) or {}
            yield from _paths(schemas, child, entry, (*prefix, f"f:{key}"))
    elif isinstance(value, list):
        kind = schema.get("x-kubernetes-list-type")
        if kind == "map" and value:
            items = schemas.resolve(schema.get("items", {}))
            for entry in value:
                at = (*prefix, _key(schema, entry))
                yield at
                yield from _paths(schemas, items, entry, at)
        elif kind == "set" and value:
            for entry in value:
                yield (*prefix, f"v:{_compact(entry)}")
        else:
            yield prefix
    else:
        yield prefix


def _key(schema: Obj, entry: Obj) -> str:
    names = sorted(schema["x-kubernetes-list-map-keys"])
    found = {name: entry.get(name, _KEY_DEFAULTS.get(name)) for name in names}
    return f"k:{_compact({name: value for name, value in found.items() if value is not None})}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


_MISSING: Final = object()


def _look(schemas: Schemas, schema: Obj, value: Any, path: Path) -> Any:
    """The value at a path, or `_MISSING`."""
    for element in path:
        if element.startswith("f:"):
            if not isinstance(value, dict) or element[2:] not in value:
                return _MISSING
            value = value[element[2:]]
            schema = schemas.child(schema, element[2:]) or {}
        elif not isinstance(value, list):
            return _MISSING
        elif element.startswith("k:"):
            found = [entry for entry in value if _key(schema, entry) == element]
            if not found:
                return _MISSING
            value, schema = found[0], schemas.resolve(schema.get("items", {}))
        else:
            return True if json.loads(element[2:]) in value else _MISSING
    return value


def to_fields_v1(paths: set[Path]) -> Obj:
    """Paths as FieldsV1."""
    root: Obj = {}
    for path in sorted(paths):
        node = root
        for element in path:
            node = node.setdefault(element, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    return root


def from_fields_v1(node: Obj, prefix: Path = ()) -> set[Path]:
    """FieldsV1 as paths."""
    found: set[Path] = set()
    for key, entry in node.items():
        if key == ".":
            found.add(prefix)
        elif entry:
            found |= from_fields_v1(entry, (*prefix, key))
        else:
            found.add((*prefix, key))
    return found


def _owners(obj: Obj) -> list[tuple[Obj, set[Path]]]:
    entries = obj["metadata"].get("managedFields") or ()
    return [
        (entry, from_fields_v1(entry.get("fieldsV1", {})))
        for entry in entries
        if entry.get("manager")
    ]


def _write(obj: Obj, owners: list[tuple[Obj, set[Path]]]) -> None:
    kept = [{**entry, "fieldsV1": to_fields_v1(paths)} for entry, paths in owners if paths]
    if kept:
        obj["metadata"]["managedFields"] = kept
    else:
        obj["metadata"].pop("managedFields", None)


def _entry(resource: Resource, manager: str, operation: str, sub: str, time: str) -> Obj:
    entry = {
        "manager": manager,
        "operation": operation,
        "apiVersion": resource.group_version,
        "time": time,
        "fieldsType": "FieldsV1",
        "fieldsV1": {},
    }
    if sub:
        entry["subresource"] = sub
    return entry


def _is(entry: Obj, manager: str, operation: str, sub: str) -> bool:
    return (entry["manager"], entry["operation"], entry.get("subresource", "")) == (
        manager,
        operation,
        sub,
    )


def updated(
    schemas: Schemas,
    resource: Resource,
    old: Obj | None,
    obj: Obj,
    manager: str,
    sub: str,
    time: str,
) -> None:
    """Give `manager` what an update changed, and take it from all others. Changes `obj`."""
    schema = schemas.of_resource(resource)
    with_status = bool(sub) or not resource.status
    after = fields(schemas, schema, obj, with_status=with_status)
    before = fields(schemas, schema, old, with_status=with_status) if old else set()
    changed = {
        path
        for path in after
        if path not in before
        or (
            not path[-1].startswith("k:")
            and _look(schemas, schema, old, path) != _look(schemas, schema, obj, path)
        )
    }
    lost = before - after
    if not changed and not lost:
        return
    owners = []
    mine: tuple[Obj, set[Path]] | None = None
    for entry, paths in _owners(obj):
        if _is(entry, manager, "Update", sub):
            mine = ({**entry, "time": time}, (paths - lost) | changed)
            owners.append(mine)
        else:
            owners.append((entry, paths - changed - lost))
    if mine is None:
        owners.append((_entry(resource, manager, "Update", sub, time), changed))
    _write(obj, owners)


def applied(
    schemas: Schemas,
    resource: Resource,
    live: Obj,
    config: Obj,
    manager: str,
    force: bool,
    sub: str,
    time: str,
) -> Obj:
    """`live` with `config` applied by `manager`. Raises ApiRefusal 409 on fields of others."""
    schema = schemas.of_resource(resource)
    wanted = fields(schemas, schema, config, with_status=bool(sub) or not resource.status)
    owners = _owners(live)
    others = [(e, paths) for e, paths in owners if not _is(e, manager, "Apply", sub)]
    mine = [(e, paths) for e, paths in owners if _is(e, manager, "Apply", sub)]

    def differs(path: Path) -> bool:
        if path[-1].startswith("k:"):
            return False
        found = _look(schemas, schema, live, path)
        return found is _MISSING or found != _look(schemas, schema, config, path)

    clashes = [(e, {p for p in paths & wanted if differs(p)}) for e, paths in others]
    own = manager == _KUBECTL
    refused = _without_former_self(schemas, schema, live, clashes) if own else clashes
    if any(paths for _, paths in refused) and not force:
        raise _conflict(refused)
    lost = {path for _, paths in clashes for path in paths}
    others = [(e, paths - lost) for e, paths in others]
    merged: Obj = _merge(schemas, schema, live, config)
    had = mine[0][1] if mine else set()
    kept = {path for _, paths in others for path in paths}
    _drop(schemas, schema, merged, had - wanted - kept, kept | wanted)
    same = bool(mine) and had == wanted and not lost and _content(merged) == _content(live)
    entry = mine[0][0] if same else _entry(resource, manager, "Apply", sub, time)
    _write(merged, [(entry, wanted), *others])
    if same:
        merged["metadata"]["managedFields"] = live["metadata"]["managedFields"]
    return merged


def _drop(schemas: Schemas, schema: Obj, obj: Obj, lost: set[Path], kept: set[Path]) -> None:
    """Remove the fields that nobody owns any more, elements of lists before what is in them."""
    for path in sorted(lost, key=len):
        if not any(other[: len(path)] == path for other in kept):
            _take(schemas, schema, obj, path)


def _without_former_self(
    schemas: Schemas, schema: Obj, live: Obj, clashes: list[tuple[Obj, set[Path]]]
) -> list[tuple[Obj, set[Path]]]:
    """kubectl's server-side apply takes over what its client-side apply set and nobody changed."""
    text = (live["metadata"].get("annotations") or {}).get(_LAST_APPLIED)
    last: Any = json.loads(text) if text else {}

    def changed(path: Path) -> bool:
        return bool(_look(schemas, schema, last, path) != _look(schemas, schema, live, path))

    return [
        (entry, {p for p in paths if entry["manager"] != _CLIENT_SIDE or changed(p)})
        for entry, paths in clashes
    ]


def _content(obj: Obj) -> Obj:
    meta = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return {**obj, "metadata": meta}


def _conflict(clashes: list[tuple[Obj, set[Path]]]) -> Exception:
    causes = []
    texts = []
    for entry, paths in clashes:
        if not paths:
            continue
        who = f'conflict with "{entry["manager"]}"'
        if entry.get("subresource"):
            who += f' with subresource "{entry["subresource"]}"'
        who += f" using {entry['apiVersion']}"
        shown = [_show(path) for path in sorted(paths)]
        texts.append(
            f"{who}: {shown[0]}" if len(shown) == 1 else who + ":\n- " + "\n- ".join(shown)
        )
        causes += [
            {"reason": "FieldManagerConflict", "message": who, "field": path} for path in shown
        ]
    count = len(causes)
    plural = "" if count == 1 else "s"
    joined = (
        texts[0]
        if len(texts) == 1
        else "conflicts with " + "\n".join(text.removeprefix("conflict with ") for text in texts)
    )
    message = f"Apply failed with {count} conflict{plural}: {joined}"
    return status.fail(409, "Conflict", message, {"causes": causes})


def _show(path: Path) -> str:
    text = ""
    for element in path:
        kind, _, rest = element.partition(":")
        if kind == "f":
            text += f".{rest}"
        elif kind == "k":
            pairs = json.loads(rest)
            text += "[" + ",".join(f"{k}={_compact(v)}" for k, v in pairs.items()) + "]"
        else:
            text += f"[={rest}]"
    return text


def _merge(schemas: Schemas, schema: Obj, live: Any, config: Any) -> Any:
    if isinstance(config, dict) and isinstance(live, dict):
        if schema.get("x-kubernetes-map-type") == "atomic":
            return config
        result = dict(live)
        for key, value in config.items():
            child = schemas.child(schema, key) or {}
            result[key] = _merge(schemas, child, live[key], value) if key in live else value
        return result
    if isinstance(config, list) and isinstance(live, list):
        kind = schema.get("x-kubernetes-list-type")
        if kind == "set":
            return live + [entry for entry in config if entry not in live]
        if kind == "map":
            return _merge_list(schemas, schema, live, config)
    return config


def _merge_list(schemas: Schemas, schema: Obj, live: list[Any], config: list[Any]) -> list[Any]:
    """Applied elements first, in their order; the others after them."""
    items = schemas.resolve(schema.get("items", {}))
    have = {_key(schema, entry): entry for entry in live}
    wanted = {_key(schema, entry): entry for entry in config}
    merged = [
        _merge(schemas, items, have[key], entry) if key in have else entry
        for key, entry in wanted.items()
    ]
    return merged + [entry for key, entry in have.items() if key not in wanted]


def _take(schemas: Schemas, schema: Obj, obj: Obj, path: Path) -> None:
    """Remove the field at a path, copying nothing: `obj` must be the caller's own."""
    parent_schema = schema
    for element in path[:-1]:
        if element.startswith("f:"):
            parent_schema = schemas.child(parent_schema, element[2:]) or {}
        else:
            parent_schema = schemas.resolve(parent_schema.get("items", {}))
    parent = _look(schemas, schema, obj, path[:-1])
    last = path[-1]
    if isinstance(parent, dict) and last.startswith("f:"):
        parent.pop(last[2:], None)
    elif isinstance(parent, list) and last.startswith("k:"):
        parent[:] = [entry for entry in parent if _key(parent_schema, entry) != last]
    elif isinstance(parent, list) and last.startswith("v:"):
        parent[:] = [entry for entry in parent if _compact(entry) != last[2:]]
