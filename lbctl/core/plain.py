"""Dataclasses as plain JSON values, and back with every type checked.

Rules: keys are the field names, addresses, networks and enums their text. Unknown keys are ignored
and fields with a default may be missing, so that programs of two versions understand each other.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from lbctl.errors import MessageError

T = TypeVar("T")
_Reader: TypeAlias = Callable[[Any], Any]
# One of a union stands for both families.
_FAMILIES: dict[Any, _Reader] = {IPv4Address: ip_address, IPv4Network: ip_network}


def to_plain(value: object) -> Any:
    """Any dataclass (or what is in it) as what `json.dumps` takes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, IPv4Address | IPv6Address | IPv4Network | IPv6Network):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return value


def reader(kind: Callable[..., T]) -> Callable[[object], T]:
    """What makes such a dataclass of what `json.loads` gave.

    It raises MessageError, which says where: `.eips[3].phase is not understood: Bund`.
    """
    return cast(Callable[[object], T], _reader(kind))


@cache
def _reader(hint: Any) -> _Reader:
    if get_origin(hint) in (Union, types.UnionType):
        return _either(get_args(hint))
    if get_origin(hint) is tuple:
        return _several(_reader(get_args(hint)[0]))
    if is_dataclass(hint) and isinstance(hint, type):
        return _record(hint)
    return _scalar(hint)


def _either(kinds: tuple[Any, ...]) -> _Reader:
    """`Address`, `Network` and `X | None` are the only unions."""
    rest = [kind for kind in kinds if kind is not type(None)]
    read = _reader(rest[0])
    if len(rest) == len(kinds):
        return read
    return lambda value: None if value is None else read(value)


def _several(read: _Reader) -> _Reader:
    def several(value: Any) -> Any:
        if type(value) is not list:
            raise MessageError(" is not a list")
        done: list[Any] = []
        try:
            for item in value:
                done.append(read(item))
        except MessageError as error:
            raise MessageError(f"[{len(done)}]{error}") from error
        return tuple(done)

    return several


def _record(kind: Any) -> _Reader:
    hints = get_type_hints(kind)
    known = {f.name: _reader(hints[f.name]) for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}

    def record(value: Any) -> Any:
        if type(value) is not dict:
            raise MessageError(" is not an object")
        given = {}
        name = ""
        try:
            for name in value.keys() & known:
                given[name] = known[name](value[name])
        except MessageError as error:
            raise MessageError(f".{name}{error}") from error
        if not needed <= given.keys():
            raise MessageError(f" lacks {min(needed - given.keys())}")
        return kind(**given)

    return record


def _scalar(hint: Any) -> _Reader:
    if hint in _FAMILIES or issubclass(hint, Enum):
        make = _FAMILIES.get(hint, hint)

        def made(value: Any) -> Any:
            try:
                return make(value)
            except ValueError as error:
                raise MessageError(f" is not understood: {str(value)[:60]}") from error

        return made

    def same(value: Any) -> Any:
        if type(value) is hint:
            return value
        if hint is float and type(value) is int:
            return float(value)
        raise MessageError(f" should be {hint.__name__}")

    return same
