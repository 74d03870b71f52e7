"""Kubernetes Status objects, worded as kube-apiserver words them.

Every function returns an `ApiRefusal` to raise; `fail` is the one shape they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lbctl.errors import ApiRefusal
from lbctl.lab.apiserver.resources import Resource


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that is wrong with an object. `reason` as in metav1.CauseType."""

    field: str
    reason: str
    message: str


def required(field: str, detail: str = "") -> Cause:
    """A field must be there."""
    return Cause(field, "FieldValueRequired", "Required value" + (f": {detail}" if detail else ""))


def invalid_value(field: str, value: Any, detail: str) -> Cause:
    """A field's value is wrong."""
    return Cause(field, "FieldValueInvalid", f"Invalid value: {quoted(value)}: {detail}")


def unsupported(field: str, value: Any, allowed: Sequence[str]) -> Cause:
    """A field's value is not one of those that exist."""
    listed = ", ".join(f'"{item}"' for item in allowed)
    message = f"Unsupported value: {quoted(value)}: supported values: {listed}"
    return Cause(field, "FieldValueNotSupported", message)


def forbidden_field(field: str, detail: str) -> Cause:
    """A field must not be there, or must not change."""
    return Cause(field, "FieldValueForbidden", f"Forbidden: {detail}")


def duplicate(field: str, value: Any) -> Cause:
    """A value is there twice."""
    return Cause(field, "FieldValueDuplicate", f"Duplicate value: {quoted(value)}")


def quoted(value: Any) -> str:
    """A value as Go's field errors print it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return msgspec.json.encode(value).decode()
    return f'"{value}"' if isinstance(value, str) else str(value)


def fail(code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> ApiRefusal:
    """A Status of `status: Failure`."""
    status: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
    }
    if details is not None:
        status["details"] = details
    status["code"] = code
    return ApiRefusal(status)


def _details(resource: Resource, name: str, *, kind: bool = False) -> dict[str, Any]:
    details: dict[str, Any] = {"name": name} if name else {}
    if resource.group:
        details["group"] = resource.group
    details["kind"] = resource.kind if kind else resource.plural
    return details


def not_found(resource: Resource, name: str) -> ApiRefusal:
    """404 of an object."""
    message = f'{resource.key} "{name}" not found'
    return fail(404, "NotFound", message, _details(resource, name))


def no_such_path() -> ApiRefusal:
    """404 of a path."""
    return fail(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(resource: Resource, name: str) -> ApiRefusal:
    """409 of a create."""
    message = f'{resource.key} "{name}" already exists'
    return fail(409, "AlreadyExists", message, _details(resource, name))


def conflict(resource: Resource, name: str, why: str = "") -> ApiRefusal:
    """409 of an update."""
    why = why or (
        "the object has been modified; please apply your changes to the latest version "
        "and try again"
    )
    message = f'Operation cannot be fulfilled on {resource.key} "{name}": {why}'
    return fail(409, "Conflict", message, _details(resource, name))


def invalid(resource: Resource, name: str, causes: Sequence[Cause]) -> ApiRefusal:
    """422 with every cause at once."""
    texts = [f"{cause.field}: {cause.message}" for cause in causes]
    joined = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    kind = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    details = _details(resource, name, kind=True)
    details["causes"] = [
        {"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes
    ]
    return fail(422, "Invalid", f'{kind} "{name}" is invalid: {joined}', details)


def bad_request(message: str) -> ApiRefusal:
    """400."""
    return fail(400, "BadRequest", message)


def forbidden(resource: Resource, name: str, why: str) -> ApiRefusal:
    """403."""
    message = f'{resource.key} "{name}" is forbidden: {why}'
    return fail(403, "Forbidden", message, _details(resource, name))


def unauthorized() -> ApiRefusal:
    """401: a token that nobody knows."""
    return fail(401, "Unauthorized", "Unauthorized")


def method_not_allowed() -> ApiRefusal:
    """405."""
    return fail(
        405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
    )


def unsupported_media_type(got: str, allowed: Sequence[str]) -> ApiRefusal:
    """415."""
    message = (
        "the body of the request was in an unknown format - accepted media types include: "
        f"{', '.join(allowed)} (got {got})"
    )
    return fail(415, "UnsupportedMediaType", message)


def expired(wanted: int, oldest: int) -> ApiRefusal:
    """410: a watch from before the history."""
    return fail(410, "Expired", f"too old resource version: {wanted} ({oldest})")


def continue_expired() -> ApiRefusal:
    """410: a page of a list that nobody remembers."""
    return fail(
        410,
        "Expired",
        "The provided continue parameter is too old to display a consistent list result. "
        "You can start a new list without the continue parameter.",
    )


def too_large_version(wanted: int, current: int) -> ApiRefusal:
    """504: a resourceVersion that is not there yet."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return fail(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {wanted}, current: {current}",
        {"causes": [cause], "retryAfterSeconds": 1},
    )
