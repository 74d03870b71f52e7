"""This node's part of the common tables, with what each bucket was before.

Rules: a bucket remembers its last other owner while that endpoint exists on a living node. The node
that owns a bucket hands established flows that it does not know to that owner once (`prev`: the
second chance); the old owner goes on taking new flows that a node with an older table steers to it,
but no established one that it does not know: its pod would reset it.
When a Service outgrows a table size, a bucket's past is that of the bucket which it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lbctl.core.forwarding import PortTable, Table
from lbctl.core.model import Address, Endpoint, Protocol


@dataclass(frozen=True, slots=True)
class PortView:
    """A port's table and, per bucket, its last other owner that is still there."""

    table: PortTable
    before: tuple[Endpoint | None, ...]


View: TypeAlias = Mapping[Address, tuple[PortView, ...]]


@dataclass(frozen=True, slots=True)
class PortElements:
    """What this node's kernel holds for one EIP:protocol:port.

    steer, prev: bucket → index of a node. deliver, late: bucket → address and port; late is for new
    flows alone, in buckets that were ours before. `size` buckets.
    """

    address: Address
    protocol: Protocol
    port: int
    size: int
    by_client: bool
    closed: bool
    steer: Mapping[int, int] = field(default_factory=dict)
    prev: Mapping[int, int] = field(default_factory=dict)
    deliver: Mapping[int, tuple[Address, int]] = field(default_factory=dict)
    late: Mapping[int, tuple[Address, int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many map elements it takes."""
        return len(self.steer) + len(self.prev) + len(self.deliver) + len(self.late)


def advance(old: View, table: Table) -> dict[Address, tuple[PortView, ...]]:
    """Take a new table in: every bucket whose owner changed remembers the old one."""
    result: dict[Address, tuple[PortView, ...]] = {}
    for address, entry in table.eips.items():
        known = old.get(address, ())
        if len(known) == len(entry.ports) and all(
            view.table is port for view, port in zip(known, entry.ports, strict=True)
        ):
            result[address] = known
            continue
        by_key = {(v.table.protocol, v.table.port, v.table.by_client): v for v in known}
        result[address] = tuple(
            PortView(port, _before(port, by_key.get((port.protocol, port.port, port.by_client))))
            for port in entry.ports
        )
    return result


def _before(table: PortTable, old: PortView | None) -> tuple[Endpoint | None, ...]:
    size = len(table.owners)
    if old is None:
        return (None,) * size
    # By number and not by endpoint: this runs for every bucket of every changed port.
    number = {endpoint: place for place, endpoint in enumerate(table.endpoints)}
    same = [number.get(endpoint, -1) for endpoint in old.table.endpoints]
    alive = [e if e in table.members else None for e in old.table.endpoints]
    old_owners, old_size = old.table.owners, len(old.table.owners)
    past: list[Endpoint | None] = []
    for bucket, now in enumerate(table.owners):
        # Both sizes are powers of two and a bucket is a range of the hash.
        source = bucket * old_size // size
        was = old_owners[source]
        if same[was] != now:
            past.append(alive[was])
            continue
        older = old.before[source]
        kept = older is not None and older in table.members and older != table.endpoints[now]
        past.append(older if kept else None)
    return tuple(past)


def elements(address: Address, view: PortView, me: str, index: Mapping[str, int]) -> PortElements:
    """Return what the node `me` needs of one port. index: the nodes that it can steer to."""
    table = view.table
    steer: dict[int, int] = {}
    prev: dict[int, int] = {}
    deliver: dict[int, tuple[Address, int]] = {}
    late: dict[int, tuple[Address, int]] = {}
    mine = [(e.address, e.port) if e.node == me else None for e in table.endpoints]
    remote = [index.get(e.node) for e in table.endpoints]
    for bucket, owner in enumerate(table.owners):
        before = view.before[bucket]
        pod = mine[owner]
        if pod is not None:
            deliver[bucket] = pod
            if before is not None and before.node != me and before.node in index:
                prev[bucket] = index[before.node]
            continue
        node = remote[owner]
        if node is not None:
            steer[bucket] = node
        if before is not None and before.node == me:
            late[bucket] = (before.address, before.port)
    return PortElements(
        address,
        table.protocol,
        table.port,
        len(table.owners),
        table.by_client,
        table.closed,
        steer,
        prev,
        deliver,
        late,
    )
