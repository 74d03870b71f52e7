"""This node's part of the common tables, with what each bucket was before.

Rules: a bucket remembers its last other owner while that endpoint exists on a living node. The node
that owns a bucket hands established flows that it does not know to that owner once (`prev`: the
second chance); the old owner goes on taking new flows that a node with an older table steers to it,
but no established one that it does not know: its pod would reset it.
Sizes are powers of two and a bucket is a range of the hash. Where a Service changes its size, the
past is kept at the finer of the two sizes, and no flow's former owner is forgotten; it goes back to
the table's own size as soon as nothing is lost by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lbctl.core import maglev
from lbctl.core.forwarding import PortTable, Table
from lbctl.core.model import Address, Endpoint, Protocol
from lbctl.core.pmap import PMap, changed, persistent


@dataclass(frozen=True, slots=True)
class PortView:
    """A port's table and, per past bucket, its last other owner that is still there.

    `before` is as long as the table, or a power of two times that.
    """

    table: PortTable
    before: tuple[Endpoint | None, ...]


View: TypeAlias = Mapping[Address, tuple[PortView, ...]]


@dataclass(frozen=True, slots=True)
class PortElements:
    """What this node's kernel holds for one EIP:protocol:port.

    steer, prev: bucket → index of a node. deliver, late: bucket → address and port; late is for new
    flows alone, in buckets that were ours before. steer and deliver know `size` buckets, prev and
    late `past` of them.
    """

    address: Address
    protocol: Protocol
    port: int
    size: int
    past: int
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


def advance(
    old: View, table: Table, since: Table | None = None
) -> PMap[Address, tuple[PortView, ...]]:
    """Take a new table in: every bucket whose owner changed remembers the old one.

    since: the table that `old` was made with, if known; then only what differs is looked at.
    """
    touched = old.keys() | table.eips.keys() if since is None else changed(since.eips, table.eips)
    fresh: dict[Address, tuple[PortView, ...]] = {}
    gone: list[Address] = []
    for address in touched:
        entry, known = table.eips.get(address), old.get(address, ())
        if entry is None:
            gone.append(address)
            continue
        if (
            address in old
            and len(known) == len(entry.ports)
            and all(view.table is port for view, port in zip(known, entry.ports, strict=True))
        ):
            continue
        by_key = {(v.table.protocol, v.table.port, v.table.by_client): v for v in known}
        fresh[address] = tuple(
            PortView(port, _before(port, by_key.get((port.protocol, port.port, port.by_client))))
            for port in entry.ports
        )
    return persistent(old).updated(fresh, gone)


def _before(table: PortTable, old: PortView | None) -> tuple[Endpoint | None, ...]:
    size = len(table.owners)
    if old is None:
        return (None,) * size
    # By number and not by endpoint: this runs for every bucket of every changed port.
    number = {endpoint: place for place, endpoint in enumerate(table.endpoints)}
    same = [number.get(endpoint, -1) for endpoint in old.table.endpoints]
    alive = [e if e in table.members else None for e in old.table.endpoints]
    old_owners, old_size, old_past = old.table.owners, len(old.table.owners), len(old.before)
    past = max(size, old_size, old_past)
    found: list[Endpoint | None] = []
    for bucket in range(past):
        now = table.owners[bucket * size // past]
        was = old_owners[bucket * old_size // past]
        if same[was] != now:
            found.append(alive[was])
            continue
        older = old.before[bucket * old_past // past]
        kept = older is not None and older in table.members and older != table.endpoints[now]
        found.append(older if kept else None)
    return _coarsest(found, size)


def _coarsest(past: list[Endpoint | None], size: int) -> tuple[Endpoint | None, ...]:
    """The shortest list, of `size` entries or more, that says the same."""
    while len(past) > size and past[::2] == past[1::2]:
        past = past[::2]
    while len(past) not in maglev.SIZES:  # only these can be hashed to
        past = [entry for entry in past for _ in range(2)]
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
        pod, node = mine[owner], remote[owner]
        if pod is not None:
            deliver[bucket] = pod
        elif node is not None:
            steer[bucket] = node
    size, past = len(table.owners), len(view.before)
    targets: dict[int, tuple[Address, int]] = {}  # one object each: it is written out once
    for bucket, before in enumerate(view.before):
        if before is None:
            continue
        here = mine[table.owners[bucket * size // past]] is not None
        if here and before.node != me and before.node in index:
            prev[bucket] = index[before.node]
        elif not here and before.node == me:
            target = (before.address, before.port)
            late[bucket] = targets.setdefault(id(before), target)
    return PortElements(
        address,
        table.protocol,
        table.port,
        size,
        past,
        table.by_client,
        table.closed,
        steer,
        prev,
        deliver,
        late,
    )
