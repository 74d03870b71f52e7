"""Single values of API objects: times, addresses, labels, conditions.

Rule: nonsense raises `errors.KubeError`, and so does a zone (`%…`); for a time it is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Address, ip_network
from socket import AF_INET, inet_pton

import msgspec

from lbctl import errors
from lbctl.core.config_values import parse_address
from lbctl.core.model import Address, Network, Protocol


class Condition(msgspec.Struct):
    """An entry of status.conditions."""

    type: str
    status: str = "Unknown"
    reason: str = ""
    message: str = ""


def is_ready(conditions: Iterable[Condition] | None) -> bool:
    """Whether they say that a Node or a Pod is ready."""
    return any(c.type == "Ready" and c.status == "True" for c in conditions or ())


def seconds(text: str | None) -> float | None:
    """RFC 3339 → seconds since the epoch; None for None or nonsense."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def timestamp(at_s: float, micro: bool = False) -> str:
    """Seconds since the epoch → RFC 3339 in UTC; `micro` for MicroTime fields."""
    made = datetime.fromtimestamp(at_s, UTC)
    return made.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


def pairs(given: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((given or {}).items()))


def protocol(text: str) -> Protocol:
    try:
        return Protocol(text)
    except ValueError as error:
        raise errors.KubeError(f"unknown protocol {text!r}") from error


def address(text: str) -> Address:
    try:  # a fifth of the time, and the same strictness; there may be a hundred thousand
        return IPv4Address(inet_pton(AF_INET, text))
    except (OSError, ValueError):
        pass
    try:
        return parse_address(text)
    except ValueError as error:
        raise errors.KubeError(f"not an address: {text!r}") from error


def addresses(text: str) -> tuple[tuple[Address, ...], tuple[str, ...]]:
    """Addresses between commas or blanks, and what there is no address: people write these."""
    found: list[Address] = []
    odd: list[str] = []
    for word in text.replace(",", " ").split():
        try:
            found.append(address(word))
        except errors.KubeError:
            odd.append(word)
    return tuple(found), tuple(odd)


class Key(IPv4Address):
    """An address that is the key of maps: it works out its hash once.

    The library's formats the number as text for each, and an EIP's is asked for a hundred times
    while its table is made: a twentieth of the processor time of a full load.
    """

    __slots__ = ("_hash",)

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def key(text: str) -> Address:
    """As `address`, for one that is looked up again and again."""
    made = address(text)
    return Key(int(made)) if made.version == 4 else made


def network(text: str) -> Network:
    try:
        first, slash, length = text.strip().partition("/")
        return ip_network(f"{parse_address(first)}{slash}{length}", strict=False)
    except ValueError as error:
        raise errors.KubeError(f"not a network: {text!r}") from error
