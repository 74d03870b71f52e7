"""`/v1/state`: what one manager knows, as dataclasses and as JSON.

Rules: the manager fills these, `lbctl` reads them; both ends are this module. The JSON is
`core.plain`'s, so replicas of two versions can be asked during a roll-out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from lbctl.core.model import Address, NodeState, ObjectRef, Phase
from lbctl.core.plain import reader, to_plain
from lbctl.core.reasons import Reason
from lbctl.errors import MessageError


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
    snapshot_age_s: float | None = None  # it has not read the API server since its start, but this


_read = reader(ManagerState)


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
    try:
        return _read(value)
    except MessageError as error:
        raise MessageError(f"a manager's state{error}") from error
