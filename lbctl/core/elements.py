"""What changes in the big maps between two states, before it is text or bytes.

Rules: the maps with an element per bucket (`deliver holders prev spare steer`) and those with one
per port (`svc past closed homed asks pin`) change together, port by port. With session affinity a
bucket leads to a pod's number (`holders`), and the number to the pod (`deliver`). A whole load is
the difference to nothing. The cost is that of the ports that differ. `nft` makes text of it,
`nfbatch` netlink messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Final, NamedTuple, TypeAlias

from lbctl.core import maglev
from lbctl.core.maglev import Row
from lbctl.core.model import Address, Protocol
from lbctl.core.names import MARK_BASE
from lbctl.core.nftfamily import BUCKET_BASE
from lbctl.core.nftpins import pin_chain
from lbctl.core.nftrules import hash_chain
from lbctl.core.nodeview import NOTHING, PortElements, Target
from lbctl.core.pmap import changed
from lbctl.core.sticky import PINNED, TAKING, Sticky

PortKey: TypeAlias = tuple[Address, str, int]  # EIP, protocol as Kubernetes spells it, port
_ROOM: Final = BUCKET_BASE - MARK_BASE  # from nodes' marks to buckets'
Value: TypeAlias = Target | str  # a node's number, a pod, a chain; None in a set
WHOLE: Final = -1  # in place of a bucket, in the maps that have one element for a port
BUCKET_MAPS: Final = ("deliver", "holders", "prev", "spare", "steer")


class Delta(NamedTuple):
    """What one map loses and gains for one port.

    gone, fresh: buckets; one that changes its value is in both. places: for each in `fresh`, where
    its new value is in `values`; all that are used are of one kind (nodes, pods or chains).
    """

    key: PortKey
    map: str
    gone: Sequence[int]
    fresh: Sequence[int] = ()
    places: Row = b""
    values: Sequence[Value] = ()

    @property
    def total(self) -> int:
        """How many elements it deletes and adds."""
        return len(self.gone) + len(self.fresh)


def deltas(
    old: Mapping[PortKey, PortElements], new: Mapping[PortKey, PortElements]
) -> Iterator[list[Delta]]:
    """Yield for each port that differs, in order of address, protocol and port, what does."""
    for key in sorted(changed(old, new), key=lambda k: (k[0].version, int(k[0]), k[1], k[2])):
        found = [d for d in _port(key, old.get(key), new.get(key)) if d.gone or d.fresh]
        if found:
            yield found


def counts(port: PortElements) -> dict[str, int]:
    """How many elements of each map a port has."""
    return {name: len(of(port)) for name, of in _OF_PORT.items()} | port.counts()


def _port(key: PortKey, old: PortElements | None, new: PortElements | None) -> Iterator[Delta]:
    if old is not None and new is not None and _renumbered(old.sticky, new.sticky):
        yield from _port(key, old, None)
        yield from _port(key, None, new)
        return
    port = new or old
    sticky = port.sticky if port else None
    was, now = (port.targets if port else (None,) for port in (old, new))
    # There are no pods in the past, and no nodes among the spare.
    rows = (("now", "deliver", "steer"), ("past", "prev", "prev"), ("spare", "spare", "spare"))
    for name, of_pod, of_node in rows:
        one: Row = getattr(old, name) if old else b""
        other: Row = getattr(new, name) if new else b""
        known = sticky if name == "now" else None
        maps = of_pod if known is None else "holders", of_node
        for delta in _rows(key, maps, (was, one), (now, other)):
            yield delta if known is None or delta.map != "holders" else _numbered(delta, known)
    if sticky is not None:
        yield from _numbers(key, old.sticky if old else None, new.sticky if new else None)
    for name, values in _OF_PORT.items():
        before, after = values(old), values(new)
        if before != after:
            number = len(after)
            yield Delta(key, name, [WHOLE] * len(before), [WHOLE] * number, bytes(number), after)


_Targets = tuple[tuple[Target, ...], Row]


def _rows(key: PortKey, maps: tuple[str, str], old: _Targets, new: _Targets) -> tuple[Delta, ...]:
    """What the maps of pods and of nodes lose and gain by the buckets whose target differs."""
    (was, one), (now, other) = old, new
    if old == new or (not one and other.count(NOTHING) == len(other)):
        return ()
    coming = other
    gone: tuple[Sequence[int], Sequence[int]] = (), ()
    if one:  # a whole load does without
        names = {target: number for number, target in enumerate(now)}
        same = [names.get(target, -1) for target in was]
        pairs = list(zip_longest(one, other, fillvalue=NOTHING))
        gone = _by_kind(was, maglev.row([a if same[a] != b else NOTHING for a, b in pairs]))
        coming = maglev.row([b if same[a] != b else NOTHING for a, b in pairs])
    fresh = _by_kind(now, coming)
    return tuple(
        Delta(key, name, left, come, _picked(coming, come), now)
        for name, left, come in zip(maps, gone, fresh, strict=True)
    )


def _by_kind(targets: Sequence[Target], row: Row) -> tuple[Sequence[int], Sequence[int]]:
    """The buckets that lead to pods, and those that lead to nodes."""
    kinds = maglev.translated(row, [_kind(target) for target in targets]) if row else b""
    return _where(kinds, _POD), _where(kinds, _NODE)


_POD, _NODE = 1, 2


def _kind(target: Target) -> int:
    if target is None:
        return 0
    return _POD if isinstance(target, tuple) else _NODE


def _where(kinds: Row, kind: int) -> Sequence[int]:
    """The buckets of this kind; often all are, or none."""
    number = kinds.count(kind)
    if number in (0, len(kinds)):
        return range(number)
    return [bucket for bucket, known in enumerate(kinds) if known == kind]


def _picked(row: Row, buckets: Sequence[int]) -> Row:
    return row if len(buckets) == len(row) else maglev.row([row[bucket] for bucket in buckets])


# -- session affinity ----------------------------------------------------------------------------
def _renumbered(old: Sticky | None, new: Sticky | None) -> bool:
    """Whether buckets lead to other elements than before, though their pods are the same."""
    if old is None or new is None:
        return old is not new
    known = old.numbers
    return any(known.get(pod, number) != number for pod, number in new.pods)


def _numbered(pods: Delta, known: Sticky) -> Delta:
    """Buckets that lead to pods' numbers in place of the pods."""
    numbers = known.numbers
    values = [
        _ROOM + TAKING + numbers[pod] if isinstance(pod, tuple) and pod in numbers else None
        for pod in pods.values
    ]
    return pods._replace(map="holders", values=values)


def _numbers(key: PortKey, old: Sticky | None, new: Sticky | None) -> Iterator[Delta]:
    """From a pin to the pod that takes new flows, and the nodes that may be asked about pins."""
    for name, of in (("deliver", _pods), ("holders", _pins)):
        was, now = of(old), of(new)
        gone = [place for place in was if now.get(place) != was[place]]
        fresh = [place for place in now if was.get(place) != now[place]]
        places = maglev.row(range(len(fresh)))
        yield Delta(key, name, gone, fresh, places, [now[place] for place in fresh])


def _pods(known: Sticky | None) -> dict[int, Value]:
    return {TAKING + number: pod for pod, number in known.pods} if known else {}


def _pins(known: Sticky | None) -> dict[int, Value]:
    if known is None:
        return {}
    # A node's mark is not in the buckets' room, but before it.
    nodes: dict[int, Value] = {node - _ROOM: node for node in known.nodes}
    return nodes | {PINNED + number: _ROOM + TAKING + number for _, number in known.pods}


# -- maps with one element for a port ------------------------------------------------------------
def _chain_of(port: PortElements | None) -> tuple[Value, ...]:
    return (hash_chain(len(port.now), port.sticky is not None),) if port else ()


def _past_chain_of(port: PortElements | None) -> tuple[Value, ...]:
    """Who asks about pins asks about each datagram, and hands over none unasked."""
    if port is None or (port.sticky and port.protocol is not Protocol.TCP):
        return ()
    return (hash_chain(len(port.past), port.sticky is not None),)


def _asks_chain_of(port: PortElements | None) -> tuple[Value, ...]:
    return (hash_chain(len(port.past), True),) if port and port.sticky else ()


def _pin_chain_of(port: PortElements | None) -> tuple[Value, ...]:
    return (pin_chain(port.sticky.timeout_s),) if port and port.sticky else ()


def _closed(port: PortElements | None) -> tuple[Value, ...]:
    return (None,) if port and port.closed else ()


def _homed(port: PortElements | None) -> tuple[Value, ...]:
    return (None,) if port and port.homed else ()


_OF_PORT: Final[Mapping[str, Callable[[PortElements | None], tuple[Value, ...]]]] = {
    "svc": _chain_of,
    "past": _past_chain_of,
    "asks": _asks_chain_of,
    "pin": _pin_chain_of,
    "closed": _closed,
    "homed": _homed,
}
PORT_MAPS: Final = tuple(sorted(_OF_PORT))
