"""This node's part of the common tables, with what each bucket was before.

Rules: a bucket remembers its last owners while these endpoints exist on living nodes: of a few
nodes, and several on each, for a node is asked as long as one of its own is there. First come those
that take new flows, for another may be on a node that has just died; last the present owner's node,
which is asked anyway. That node hands established flows that it does not know to the first (`prev`:
the second chance), who passes those that it does not know either on.
A datagram does not say whether its flow is new: of a port that is not TCP, new flows are handed
over too, so only an owner that takes these is remembered, and only until `settle`.
What a node gets from another by an older or other table goes to one of its own pods (`spare`), to
one that ends or is not ready if there is no other, and on to the owner by its own table if there is
none at all (`homed`); but for established TCP that it does not know: the pod would reset it.
Sizes are powers of two and a bucket is a range of the hash. Where a Service changes its size, the
past is kept at the finer of the two sizes, and no flow's former owner is forgotten; it goes back to
the table's own size as soon as nothing is lost by that.
What there is for each bucket is a row of small numbers (`maglev.Row`) into a short list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Final, TypeAlias

from lbctl.core import maglev
from lbctl.core.forwarding import (
    Holder,
    PortTable,
    Sources,
    Table,
    restricted,
    revise,
)
from lbctl.core.maglev import Row
from lbctl.core.model import Address, Protocol, snapshot
from lbctl.core.pmap import PMap, changed, persistent
from lbctl.core.sticky import Sticky, sticky

SPARES: Final = 8  # pods that share what comes astray
NOTHING: Final = 0  # the number of no target, and of no former owner
REMEMBERED: Final = 3  # nodes of a bucket's former owners (two others than its own), and on each
Line: TypeAlias = tuple[Holder, ...]  # who had a bucket, in the order in which they are asked


@snapshot
class PortView:
    """A port's table on this node and, per past bucket, who had it before and is still there.

    shared: the table of all nodes; `table` is another one only where it is strict. `before` holds
    places in `former` plus one, and NOTHING; it is as long as the table, or a power of two times.
    """

    shared: PortTable
    table: PortTable
    former: tuple[Line, ...]
    before: Row


View: TypeAlias = Mapping[Address, tuple[PortView, ...]]
Target: TypeAlias = int | tuple[Address, int] | None  # a node's number, a pod here, or nothing


@snapshot
class PortElements:
    """What this node's kernel holds for one EIP:protocol:port.

    now, past: for each bucket the place of its target in `targets`, of which the first is None.
    Nodes of `now` are in the map `steer` and pods in `deliver`; nodes of `past` are in `prev`.
    spare: by a bucket's last bits, who takes new flows of others' that were steered here all the
    same; empty without a pod here. sticky: of a port with session affinity.
    """

    address: Address
    protocol: Protocol
    port: int
    sticky: Sticky | None
    closed: bool
    targets: tuple[Target, ...]
    now: Row
    past: Row
    spare: Row = b""

    @property
    def homed(self) -> bool:
        """Whether a pod here takes new flows, of buckets of ours or of any."""
        return bool(self.spare) or any(
            isinstance(target, tuple) and place in self.now
            for place, target in enumerate(self.targets)
        )

    def counts(self) -> dict[str, int]:
        """Number of elements by map, for those of buckets and of pods' numbers."""
        pods = [place for place, target in enumerate(self.targets) if isinstance(target, tuple)]
        own, none = sum(map(self.now.count, pods)), self.now.count(NOTHING)
        named = self.sticky
        return {
            "deliver": len(named.pods) if named else own,
            "holders": own + len(named.pods) + len(named.nodes) if named else 0,
            "prev": len(self.past) - self.past.count(NOTHING),
            "spare": len(self.spare),
            "steer": len(self.now) - none - own,
        }


def advance(
    old: View, table: Table, me: str, since: Table | None = None
) -> PMap[Address, tuple[PortView, ...]]:
    """Take a new table in on node `me`: every bucket whose owner changed remembers the old one.

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
            and all(view.shared is port for view, port in zip(known, entry.ports, strict=True))
        ):
            continue
        by_key = {(v.table.protocol, v.table.port, v.table.by_client): v for v in known}
        fresh[address] = tuple(
            _view(port, by_key.get((port.protocol, port.port, port.by_client)), me)
            for port in entry.ports
        )
    return persistent(old).updated(fresh, gone)


def live_through(view: View, table: Table, steps: Iterable[Sources], me: str) -> tuple[Table, View]:
    """The last table of these and the view of node `me`, where `view` is of `table`.

    Other nodes may have had the tables between, so their owners are remembered too.
    """
    for sources in steps:
        made = revise(table, sources)
        table, view = made, advance(view, made, me, table)
    return table, view


def _view(shared: PortTable, old: PortView | None, me: str) -> PortView:
    if old is not None and old.shared is shared:
        return old
    made = fresh_view(shared, me)
    if old is None or not old.table.owners:
        return made
    former, before = _before(made.table, old)
    return replace(made, former=former, before=before)


def settle(view: View, addresses: Iterable[Address]) -> PMap[Address, tuple[PortView, ...]]:
    """Let the ports of these EIPs that are not TCP forget their past: new flows go to new owners.

    The established ones have left an entry in conntrack by then, which leads them on.
    """
    fresh = {
        address: tuple(
            replace(port, former=(), before=_nothing(len(port.table.owners)))
            if unsettled(port)
            else port
            for port in view[address]
        )
        for address in addresses
        if address in view
    }
    return persistent(view).updated(fresh)


def unsettled(view: PortView) -> bool:
    """Whether new flows of the port go to former owners, who keep them; pins need no such time."""
    known = view.table.protocol is Protocol.TCP or view.table.by_client
    return bool(view.former) and not known


def fresh_view(shared: PortTable, me: str) -> PortView:
    """The view of a port without a past, on node `me`."""
    table = restricted(shared, me) if shared.strict else shared
    return PortView(shared, table, (), _nothing(len(table.owners)))


def past_row(former: tuple[Line, ...], places: Sequence[int]) -> Row:
    """`PortView.before` from what was stored. Raises ValueError for places that are not there."""
    if any(not NOTHING <= place <= len(former) for place in places):
        raise ValueError("a bucket's former owner is not there")
    return maglev.row(places)


_NOTHING: Final = {size: bytes(size) for size in (0, *maglev.SIZES)}


def _nothing(size: int) -> bytes:
    return _NOTHING[size]


def _before(table: PortTable, old: PortView) -> tuple[tuple[Line, ...], Row]:
    size, old_size, old_past = len(table.owners), len(old.table.owners), len(old.before)
    if not size:
        return (), b""
    past = max(size, old_size, old_past)
    rows = (_stretched(row, past) for row in (table.owners, old.table.owners, old.before))
    buckets = list(zip(*rows, strict=True))
    holders = sorted({*table.endpoints, *old.table.endpoints, *chain.from_iterable(old.former)})
    lines = _lines(table, old, holders, set(buckets))
    former = sorted(set(lines.values()) - {()})
    place = {line: number for number, line in enumerate(((), *former))}
    found = {bucket: place[line] for bucket, line in lines.items()}
    row = maglev.row(_coarsest([found[bucket] for bucket in buckets], size))
    return tuple(tuple(holders[n] for n in line) for line in former), row


_Bucket: TypeAlias = tuple[int, ...]  # its owner's place now and before, and its old line's place


def _lines(
    table: PortTable, old: PortView, holders: list[Holder], buckets: Iterable[_Bucket]
) -> dict[_Bucket, tuple[int, ...]]:
    """Who is remembered of each of these, as places in `holders`: to hash them takes long."""
    number = {holder: n for n, holder in enumerate(holders)}
    nows, weres = ([number[h] for h in known.endpoints] for known in (table, old.table))
    pasts = [(), *(tuple(number[h] for h in line) for line in old.former)]
    takes = frozenset(nows)
    there = {number.get(h, -1) for h in table.members}
    known = there if table.protocol is Protocol.TCP else takes
    nodes = [holder.node for holder in holders]
    lines = {}
    for bucket in buckets:
        now, was, place = bucket
        owner = nows[now]
        every = dict.fromkeys((weres[was], *pasts[place]))
        line = [one for one in every if one in known and one != owner]
        if len(line) > 1:
            line.sort(key=lambda n, here=nodes[owner]: (nodes[n] == here, n not in takes))  # type: ignore[misc]
        if len(line) > REMEMBERED:
            by_node: dict[str, list[int]] = {}
            for one in line:
                by_node.setdefault(nodes[one], []).append(one)
            line = [n for mine in [*by_node.values()][:REMEMBERED] for n in mine[:REMEMBERED]]
        lines[bucket] = tuple(line)
    return lines


def _stretched(row: Row, size: int) -> Row:
    """The row at a multiple of its size."""
    times = size // len(row)
    return row if times == 1 else maglev.row([number for number in row for _ in range(times)])


def _coarsest(past: list[int], size: int) -> list[int]:
    """The shortest list, of `size` entries or more, that says the same."""
    while len(past) > size and past[::2] == past[1::2]:
        past = past[::2]
    while len(past) not in maglev.SIZES:  # only these can be hashed to
        past = [entry for entry in past for _ in range(2)]
    return past


def elements(address: Address, view: PortView, me: str, index: Mapping[str, int]) -> PortElements:
    """Return what the node `me` needs of one port. index: the nodes that it can steer to."""
    table = view.table
    aims: list[Target] = [_aim(holder, me, index) for holder in table.endpoints]
    lines = [[_aim(holder, me, index) for holder in line] for line in view.former]
    handed: list[Target] = [_first_node(line) for line in lines]
    passed = [_next_node(line) if table.protocol is Protocol.TCP else None for line in lines]
    pods = [aim for aim in aims if isinstance(aim, tuple)]
    spares = [] if pods else [(h.address, h.port) for h in table.spare if h.at(me)]
    targets: tuple[Target, ...] = tuple(dict.fromkeys((None, *aims, *handed, *passed, *spares)))
    place = {target: number for number, target in enumerate(targets)}
    own = [place[aim] for aim in aims]
    # Without an endpoint (a strict port of other nodes) there is a chain, but no entry: dropped.
    now = maglev.translated(table.owners, own) if own else _nothing(maglev.SIZES[0])
    past = view.before or now
    if not pods and not any(passed):
        past = _nothing(len(past))  # no bucket is or was ours
    elif lines:
        ours = [isinstance(target, tuple) for target in targets]
        here = _stretched(now, len(past))
        give = maglev.translated(past, [NOTHING, *(place[aim] for aim in handed)])
        give_on = maglev.translated(past, [NOTHING, *(place[aim] for aim in passed)])
        past = maglev.row(
            [
                owned if ours[new] else lent
                for new, owned, lent in zip(here, give, give_on, strict=True)
            ]
        )
    taking = [place[pod] for pod in pods or spares]
    spare = b"" if table.closed else maglev.row((taking * SPARES)[:SPARES])
    pinned = _sticky(table, aims)
    head = (address, table.protocol, table.port, pinned, table.closed)
    return PortElements(*head, targets, now, past, spare)


def _sticky(table: PortTable, aims: list[Target]) -> Sticky | None:
    if table.affinity_s is None:
        return None
    pods = dict.fromkeys(aim for aim in aims if isinstance(aim, tuple))
    return sticky(table.affinity_s, pods, (aim for aim in aims if isinstance(aim, int)))


def _first_node(line: list[Target]) -> int | None:
    """Whom the owner of a bucket hands flows to; what was with its own pods is in conntrack."""
    return next((aim for aim in line if isinstance(aim, int)), None)


def _next_node(line: list[Target]) -> int | None:
    """To whom this node, if it is one of the former owners, passes on what it was handed.

    Not only to one before it: who handed it over may have skipped a table that this node had.
    """
    return _first_node(line) if any(isinstance(aim, tuple) for aim in line) else None


def _aim(holder: Holder, me: str, index: Mapping[str, int]) -> Target:
    return (holder.address, holder.port) if holder.at(me) else index.get(holder.node)
