"""The three patch formats: JSON patch (RFC 6902), merge patch (RFC 7386), strategic merge patch.

Pure: each takes an object that it may change and returns the patched one. The strategic one takes
merge keys from the schema, and knows `$patch`, `$retainKeys`, `$setElementOrder/…` and
`$deleteFromPrimitiveList/…` (Kubernetes, "Strategic Merge Patch").
"""

from __future__ import annotations

import copy
from typing import Any

from lbctl.lab.apiserver import status
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.schema import Schemas


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902. Raises ApiRefusal 422 when an operation does not apply."""
    if not isinstance(operations, list):
        raise status.bad_request("a JSON patch is a list of operations")
    document = copy.deepcopy(target)
    for operation in operations:
        document = _operate(document, operation)
    return document


def _operate(document: Any, operation: Obj) -> Any:
    name = operation.get("op", "")
    path = _pointer(operation.get("path", ""))
    if name in {"add", "replace"}:
        return _place(document, path, copy.deepcopy(operation.get("value")), name)
    if name == "remove":
        return _take(document, path)
    if name == "test":
        if _look(document, path) != operation.get("value"):
            raise _refuse(f"testing value {operation.get('path')} failed")
        return document
    if name in {"move", "copy"}:
        source = _pointer(operation.get("from", ""))
        value = copy.deepcopy(_look(document, source))
        if name == "move":
            document = _take(document, source)
        return _place(document, path, value, "add")
    raise status.bad_request(f"unexpected JSON patch operation: {name}")


def _pointer(text: str) -> list[str]:
    if text and not text.startswith("/"):
        raise status.bad_request(f"not a JSON pointer: {text}")
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _refuse(message: str) -> Exception:
    return status.fail(
        422, "Invalid", f"the server rejected our request due to an error: {message}"
    )


def _index(node: list[Any], key: str, limit: int) -> int:
    if key == "-":
        return len(node)
    if not key.isdigit() or int(key) > limit:
        raise _refuse(f"array index out of bounds: {key}")
    return int(key)


def _look(document: Any, path: list[str]) -> Any:
    node = document
    for key in path:
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list):
            node = node[_index(node, key, len(node) - 1)]
        else:
            raise _refuse(f"missing path: /{'/'.join(path)}")
    return node


def _place(document: Any, path: list[str], value: Any, name: str) -> Any:
    if not path:
        return value
    parent = _look(document, path[:-1])
    key = path[-1]
    if isinstance(parent, list):
        if name == "add":
            parent.insert(_index(parent, key, len(parent)), value)
        else:
            parent[_index(parent, key, len(parent) - 1)] = value
        return document
    if not isinstance(parent, dict) or (name == "replace" and key not in parent):
        raise _refuse(f"{name} operation does not apply: doc is missing path: /{'/'.join(path)}")
    parent[key] = value
    return document


def _take(document: Any, path: list[str]) -> Any:
    parent = _look(document, path[:-1])
    key = path[-1]
    if isinstance(parent, list):
        parent.pop(_index(parent, key, len(parent) - 1))
    elif isinstance(parent, dict) and key in parent:
        del parent[key]
    else:
        raise _refuse(f"remove operation does not apply: doc is missing path: /{'/'.join(path)}")
    return document


def strategic_patch(schemas: Schemas, schema: Obj, target: Any, patch: Any) -> Any:
    """Strategic merge patch of an object of type `schema`."""
    if not isinstance(patch, dict):
        raise status.bad_request("a strategic merge patch is an object")
    return _merge_map(schemas, schema, target if isinstance(target, dict) else {}, patch)


def _merge_map(schemas: Schemas, schema: Obj, target: Obj, patch: Obj) -> Obj:
    directive = patch.get("$patch")
    if directive == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    if directive == "delete":
        return {}
    result = dict(target)
    retained = patch.get("$retainKeys")
    if retained is not None:
        result = {key: value for key, value in result.items() if key in retained}
    for key, value in patch.items():
        if key.startswith("$"):
            _list_directive(schemas, schema, result, patch, key)
        elif value is None:
            result.pop(key, None)
        else:
            child = schemas.child(schema, key) or {}
            result[key] = _merge_value(schemas, child, result.get(key), value)
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            _reorder(schemas, schema, result, key.split("/", 1)[1], order)
    return result


def _merge_value(schemas: Schemas, schema: Obj, target: Any, patch: Any) -> Any:
    if isinstance(patch, dict):
        if schema.get("x-kubernetes-map-type") == "atomic" and "properties" in schema:
            return merge_patch({}, patch)
        return _merge_map(schemas, schema, target if isinstance(target, dict) else {}, patch)
    if isinstance(patch, list) and "merge" in schema.get("x-kubernetes-patch-strategy", ""):
        return _merge_list(schemas, schema, target if isinstance(target, list) else [], patch)
    return patch


def _merge_list(schemas: Schemas, schema: Obj, target: list[Any], patch: list[Any]) -> list[Any]:
    key = schema.get("x-kubernetes-patch-merge-key")
    if key is None:
        return target + [item for item in patch if item not in target]
    items = schemas.resolve(schema.get("items", {}))
    if any(item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
    result = list(target)
    for entry in patch:
        if key not in entry:
            raise status.bad_request(f"map: {entry} does not contain declared merge key: {key}")
        places = [i for i, item in enumerate(result) if item.get(key) == entry[key]]
        if entry.get("$patch") == "delete":
            result = [item for item in result if item.get(key) != entry[key]]
        elif places:
            result[places[0]] = _merge_map(schemas, items, result[places[0]], entry)
        else:
            result.append(_merge_map(schemas, items, {}, entry))
    return result


def _list_directive(schemas: Schemas, schema: Obj, result: Obj, patch: Obj, key: str) -> None:
    """`$deleteFromPrimitiveList/FIELD`; the other directives are handled elsewhere."""
    if not key.startswith("$deleteFromPrimitiveList/"):
        return
    name = key.split("/", 1)[1]
    gone = patch[key]
    result[name] = [item for item in result.get(name) or () if item not in gone]


def _reorder(schemas: Schemas, schema: Obj, result: Obj, name: str, order: list[Any]) -> None:
    """`$setElementOrder/FIELD`: the named elements in that order, others after their neighbours."""
    current = result.get(name)
    if not isinstance(current, list):
        return
    key = (schemas.child(schema, name) or {}).get("x-kubernetes-patch-merge-key")

    def identity(item: Any) -> Any:
        return item.get(key) if key and isinstance(item, dict) else item

    wanted = [identity(item) for item in order]
    rank = {value: index for index, value in enumerate(wanted)}
    last, ranked = -1, []
    for position, item in enumerate(current):
        last = rank.get(identity(item), last)
        ranked.append((last, 0 if identity(item) in rank else 1, position, item))
    result[name] = [item for *_, item in sorted(ranked, key=lambda entry: entry[:3])]
