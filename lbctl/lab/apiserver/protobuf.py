"""Kubernetes' protobuf bodies, decoded into the same objects as JSON.

Clients written in Go (kubectl's `create SOMETHING`, `auth can-i`, `drain`) send them for built-in
kinds. Only requests: every client takes JSON as the answer. Field numbers are in `proto.json`,
which `python -m lbctl.lab.apiserver.protobuf DIRECTORIES…` makes from generated.proto files.

Protobuf does not say whether a zero was written or is Go's zero value; it counts as written only
for fields where that matters (`_ZERO_COUNTS`). Source: protobuf.dev, "Encoding"; apimachinery,
`runtime/serializer/protobuf`.
"""

from __future__ import annotations

import base64
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from lbctl.lab.apiserver import status
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.schema import Schemas

MAGIC: Final = b"k8s\x00"
MEDIA_TYPE: Final = "application/vnd.kubernetes.protobuf"
Field: TypeAlias = tuple[str, str, str]  # name, type, "", "repeated" or "map"
_ZERO_COUNTS: Final = frozenset(
    (
        "replicas",
        "terminationGracePeriodSeconds",
        "gracePeriodSeconds",
        "revisionHistoryLimit",
        "automountServiceAccountToken",
        "allocateLoadBalancerNodePorts",
        "enableServiceLinks",
        "optional",
        "controller",
        "blockOwnerDeletion",
        "orphanDependents",
        "allowPrivilegeEscalation",
        "readOnlyRootFilesystem",
        "runAsNonRoot",
        "runAsUser",
        "runAsGroup",
        "fsGroup",
        "privileged",
        "tolerationSeconds",
        "partition",
    )
)


class Decoder:
    """Decodes bodies with the messages of `proto.json`."""

    def __init__(self, schemas: Schemas) -> None:
        text = Path(__file__).with_name("proto.json").read_bytes()
        self._messages: dict[str, dict[str, Field]] = msgspec.json.decode(
            text, type=dict[str, dict[str, Field]]
        )
        self._schemas = schemas

    def body(self, data: bytes) -> Obj:
        """A request's body: the envelope and the object in it. Raises ApiRefusal 400 or 415."""
        if not data.startswith(MAGIC):
            raise status.bad_request("the body is not Kubernetes protobuf")
        try:
            envelope = dict(_fields(data[len(MAGIC) :]))
            kinds = {number: _text(value) for number, value in _fields(_data(envelope[1]))}
            version, kind = kinds.get(1, ""), kinds.get(2, "")
            group, _, short = version.rpartition("/")
            name = self._schemas.kind_name(group, short, kind)
            if name not in self._messages:
                raise status.unsupported_media_type(MEDIA_TYPE, ("application/json",))
            found = self._message(name, _data(envelope.get(2, b"")))
        except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
            raise status.bad_request(f"the protobuf body cannot be decoded: {error!r}") from error
        return {"apiVersion": version, "kind": kind, **found}

    def _message(self, name: str, data: bytes) -> Obj:
        fields = self._messages[name]
        known = self._schemas.definitions.get(name, {}).get("properties")
        found: Obj = {}
        for number, value in _fields(data):
            if str(number) not in fields:
                continue
            key, kind, shape = fields[str(number)]
            if shape == "map":
                entry = dict(_fields(_data(value)))
                inside = self._value(kind, entry.get(2, b""), key, keep=True)
                found.setdefault(key, {})[_text(entry.get(1, b""))] = inside
                continue
            plain = self._value(kind, value, key, keep=shape == "repeated")
            if plain is None:
                continue
            if shape == "repeated":
                found.setdefault(key, []).append(plain)
            elif known is not None and key not in known and isinstance(plain, dict):
                found.update(plain)  # a struct that is inlined in JSON
            else:
                found[key] = plain
        return found

    def _value(self, kind: str, value: int | bytes, key: str, *, keep: bool) -> Any:
        """A field's value; None for what counts as not written."""
        special = _SPECIAL.get(kind.rpartition(".")[2]) if "." in kind else None
        if special is not None:
            return special(_data(value))
        if kind in self._messages:
            inside = self._message(kind, _data(value))
            return inside if inside or keep or key in {"emptyDir", "podSelector"} else None
        plain = _scalar(kind, value)
        written = keep or bool(plain) or key in _ZERO_COUNTS
        return plain if written else None


def _scalar(kind: str, value: int | bytes) -> Any:
    if kind == "string":
        return _text(value)
    if kind == "bytes":
        return base64.b64encode(_data(value)).decode()
    if not isinstance(value, int):
        raise ValueError(f"{kind} expected")
    if kind == "bool":
        return bool(value)
    return value - (1 << 64) if value >> 63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, varint or bytes) of a message, in order."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
            if wire == 2:
                size, at = _varint(data, at)
            if size < 0 or at + size > len(data):
                raise ValueError("a field is cut short")
            yield tag >> 3, data[at : at + size]
            at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7


def _data(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a message expected")
    return value


def _text(value: int | bytes) -> str:
    return _data(value).decode()


def _time(data: bytes) -> str | None:
    found = dict(_fields(data))
    seconds = found.get(1, 0)
    if not isinstance(seconds, int) or not seconds or seconds >> 63:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _micro_time(data: bytes) -> str | None:
    found = dict(_fields(data))
    whole, nanos = _time(data), found.get(2, 0)
    return f"{whole[:-1]}.{int(nanos) // 1000:06d}Z" if whole and isinstance(nanos, int) else None


def _int_or_string(data: bytes) -> int | str:
    found = dict(_fields(data))
    return _text(found.get(3, b"")) if found.get(1) else int(_scalar("int32", found.get(2, 0)))


def _json(data: bytes) -> Any:
    raw = _data(dict(_fields(data)).get(1, b""))
    return msgspec.json.decode(raw) if raw else None


_SPECIAL: Final[dict[str, Callable[[bytes], Any]]] = {
    "Time": _time,
    "MicroTime": _micro_time,
    "IntOrString": _int_or_string,
    "Quantity": lambda data: _text(dict(_fields(data)).get(1, b"")),
    "FieldsV1": _json,
    "RawExtension": _json,
    "ExtraValue": lambda data: [_text(value) for _, value in _fields(data)],
}
_MESSAGE: Final = re.compile(r"^message (\w+) \{(.*?)^\}", re.MULTILINE | re.DOTALL)
_LINE: Final = re.compile(
    r"^\s*(?:(optional|repeated) ([\w.]+)|map<string, ([\w.]+)>) (\w+) = (\d+);", re.MULTILINE
)


def parse(text: str) -> dict[str, dict[str, Field]]:
    """The messages of one generated.proto, by OpenAPI name."""
    package = re.search(r"^package ([\w.]+);", text, re.MULTILINE)
    if package is None:
        raise ValueError("no package in the proto file")
    found: dict[str, dict[str, Field]] = {}
    for name, content in _MESSAGE.findall(text):
        fields: dict[str, Field] = {}
        for label, kind, value, key, number in _LINE.findall(content):
            shape = "map" if value else "repeated" if label == "repeated" else ""
            fields[number] = (key, _type(value or kind, package[1]), shape)
        found[_openapi(f"{package[1]}.{name}")] = fields
    return found


def _type(name: str, package: str) -> str:
    if name in {"string", "bytes", "bool", "int32", "int64", "double"}:
        return name
    return _openapi(name.lstrip(".") if "." in name else f"{package}.{name}")


def _openapi(name: str) -> str:
    """k8s.io.api.core.v1.Pod is io.k8s.api.core.v1.Pod in OpenAPI."""
    return "io.k8s." + name.removeprefix("k8s.io.")


def main() -> None:
    """Write proto.json for the definitions of schema.json to standard output."""
    messages: dict[str, dict[str, Field]] = {}
    for folder in sys.argv[1:]:
        for path in sorted(Path(folder).rglob("generated.proto")):
            messages.update(parse(path.read_text()))
    schemas = Schemas()
    kept: dict[str, dict[str, Field]] = {}
    todo = [name for name in messages if name in schemas.definitions]
    while todo:
        name = todo.pop()
        if name in kept or name not in messages:
            continue
        kept[name] = messages[name]
        todo += [kind for _, kind, _ in messages[name].values()]
    lines = [f'"{name}": {msgspec.json.encode(kept[name]).decode()}' for name in sorted(kept)]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
