"""`/v1/state`: what one manager knows, as dataclasses and as JSON.

Rules: the manager fills these, `lbctl` reads them; both ends are this module. JSON keys are the
field names, addresses and enums their text. Unknown keys are ignored and fields with a default may
be missing, so that replicas of two versions can be asked during a roll-out.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lbctl.core.model import Address, NodeState, ObjectRef, Phase
from lbctl.core.reasons import Reason
from lbctl.errors import MessageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ConfigState:
    """The configuration that this manager runs.

    hash, generation: of the accepted text, "" and 0 before the first. stale: ConfigMap `lbctl`
    holds something else than what is accepted. errors: why that was refused.
    """

    hash: str = ""
    generation: int = 0
    stale: bool = False
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool: addresses in all, with an EIP object (Bound or Releasing), and those that it can give
    to who asks for none of them (only the leader knows: reserved ones are not free, nor are the
    cluster's own)."""

    name: str
    total: int
    used: int
    free: int | None = None


@dataclass(frozen=True, slots=True)
class HopState:
    """One node in view of one EIP. `next_hop` is the address announced for it, None if none is."""

    node: str
    reason: Reason
    next_hop: Address | None = None


@dataclass(frozen=True, slots=True)
class EipState:
    """An EIP object, and what this manager announces for it.

    reason: of the announcement as a whole, None before there was a decision. detail: a release's
    progress. sharers: the other Services on it.
    """

    address: Address
    pool: str
    owner: ObjectRef
    phase: Phase
    forwarding: bool = True
    hops: tuple[HopState, ...] = ()
    detail: str = ""
    reason: Reason | None = None
    sharers: tuple[ObjectRef, ...] = ()

    @property
    def members(self) -> tuple[ObjectRef, ...]:
        """All Services on it, the owner first."""
        return (self.owner, *self.sharers)

    @property
    def next_hops(self) -> tuple[Address, ...]:
        """The addresses announced, in the order of the nodes' names."""
        return tuple(hop.next_hop for hop in self.hops if hop.next_hop is not None)


@dataclass(frozen=True, slots=True)
class ServiceState:
    """What was decided about a Service; only the leader knows the sentence."""

    ref: ObjectRef
    reason: Reason
    sentence: str = ""
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionState:
    """A BGP session.

    add_path: None while it is down. paths: sent, None if not known. families: what it carries.
    """

    peer: str
    address: Address
    up: bool
    reason: Reason
    add_path: bool | None = None
    detail: str = ""
    paths: int | None = None
    families: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as this manager judges it. `reason`: why it is no next hop at all, None if it may be.

    digest: of its table, in hexadecimal. answer_age_s: since its last answer, None if never.
    """

    name: str
    state: NodeState
    held: bool = False
    reason: Reason | None = None
    confirmed: int = 0
    digest: str = ""
    answer_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class ManagerState:
    """Everything that one manager tells. Tuples are sorted by name, address or ref."""

    manager: str
    leader: bool
    boot_s: float
    config: ConfigState = ConfigState()
    pools: tuple[PoolState, ...] = ()
    eips: tuple[EipState, ...] = ()
    services: tuple[ServiceState, ...] = ()
    sessions: tuple[SessionState, ...] = ()
    nodes: tuple[NodeStatus, ...] = ()
    now_s: float = 0.0
    holder: str = ""  # manager id in the Lease, as this manager sees it


def to_plain(value: object) -> Any:
    """Any of these dataclasses (or what is in them) as what `json.dumps` takes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, IPv4Address | IPv6Address):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return value


def to_json(state: ManagerState) -> bytes:
    """The body of `GET /v1/state`."""
    return json.dumps(to_plain(state), ensure_ascii=False, separators=(",", ":")).encode()


def from_json(body: bytes | str) -> ManagerState:
    """Read a body of `GET /v1/state`. Raises MessageError if it is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a manager's state is not JSON: {error}") from error
    return from_plain(found)


def from_plain(value: object) -> ManagerState:
    """Read what `json.loads` made of such a body. Raises MessageError if it is none."""
    return _read(value, ManagerState, "state")


def _read(value: object, kind: Callable[..., T], where: str) -> T:
    """A dataclass from a JSON object."""
    if not isinstance(value, dict):
        raise MessageError(f"a manager's {where} is not an object")
    given: dict[str, Any] = {}
    for name, (hint, required) in _fields_of(kind).items():
        if name in value:
            given[name] = _convert(value[name], hint, f"{where}.{name}")
        elif required:
            raise MessageError(f"a manager's {where} lacks {name}")
    return kind(**given)


@cache
def _fields_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING)
        for f in fields(kind)
    }


def _convert(value: object, hint: Any, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = get_args(hint)
        if value is None and type(None) in kinds:
            return None
        return _convert(value, _only(kinds), where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise MessageError(f"a manager's {where} is not a list")
        item = get_args(hint)[0]
        return tuple(_convert(one, item, f"{where}[{n}]") for n, one in enumerate(value))
    if is_dataclass(hint) and isinstance(hint, type):
        return _read(value, hint, where)
    return _scalar(value, hint, where)


def _only(kinds: tuple[Any, ...]) -> Any:
    """`Address | None` and `X | None` are the only unions here."""
    rest = [kind for kind in kinds if kind is not type(None)]
    return IPv4Address if IPv4Address in rest else rest[0]


def _scalar(value: object, hint: Any, where: str) -> Any:
    try:
        if hint is IPv4Address:  # stands for either family
            return ip_address(value)  # type: ignore[arg-type]  # TypeErrors are ValueErrors here
        if isinstance(hint, type) and issubclass(hint, Enum):
            return hint(value)
    except ValueError as error:
        raise MessageError(f"a manager's {where} is not understood: {str(value)[:60]}") from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise MessageError(f"a manager's {where} should be {hint.__name__}")
    return value
