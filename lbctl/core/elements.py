"""What changes in the big maps between two states, before it is text or bytes.

Rules: the maps with an element per bucket (`deliver prev spare steer`) and those with one per
port (`svc past closed`) change together, port by port. A whole load is the difference to nothing.
The cost is that of the ports that differ. `nft` makes text of it, `nfbatch` netlink messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from lbctl.core.model import Address
from lbctl.core.nftrules import hash_chain
from lbctl.core.nodeview import NOTHING, PortElements, Target
from lbctl.core.pmap import changed

PortKey: TypeAlias = tuple[Address, str, int]  # EIP, protocol as Kubernetes spells it, port
Value: TypeAlias = Target | str  # a node's number, a pod, a chain; None in a set
WHOLE: Final = -1  # in place of a bucket, in the maps that have one element for a port
BUCKET_MAPS: Final = ("deliver", "prev", "spare", "steer")
PORT_MAPS: Final = ("closed", "past", "svc")


class Delta(NamedTuple):
    """What one map loses and gains for one port.

    gone: buckets. fresh: buckets by their new value; one that changes its value is in both.
    """

    key: PortKey
    map: str
    gone: list[int]
    fresh: Mapping[Value, list[int]] = MappingProxyType({})

    @property
    def total(self) -> int:
        """How many elements it deletes and adds."""
        return len(self.gone) + sum(map(len, self.fresh.values()))


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
    return {"closed": int(port.closed), "past": 1, "svc": 1, **port.counts()}


def _port(key: PortKey, old: PortElements | None, new: PortElements | None) -> Iterator[Delta]:
    was, now = (port.targets if port else (None,) for port in (old, new))
    # There are no pods in the past, and no nodes among the spare.
    rows = (("now", "deliver", "steer"), ("past", "prev", "prev"), ("spare", "spare", "spare"))
    for name, of_pod, of_node in rows:
        one: Sequence[int] = getattr(old, name) if old else b""
        other: Sequence[int] = getattr(new, name) if new else b""
        yield from _rows(key, (of_pod, of_node), (was, one), (now, other))
    for name, values in (("svc", _chain_of), ("past", _past_chain_of), ("closed", _closed)):
        before, after = values(old), values(new)
        if before != after:
            yield Delta(key, name, [WHOLE] if before else [], {value: [WHOLE] for value in after})


_Targets = tuple[tuple[Target, ...], Sequence[int]]


def _rows(key: PortKey, maps: tuple[str, str], old: _Targets, new: _Targets) -> tuple[Delta, ...]:
    """What the maps of pods and of nodes lose and gain by the buckets whose target differs."""
    (was, one), (now, other) = old, new
    if old == new or (not one and other.count(NOTHING) == len(other)):
        return ()
    names = {target: number for number, target in enumerate(now)}
    same = [names.get(target, -1) for target in was]
    gone: tuple[list[int], list[int]] = [], []
    leaving = [gone[not isinstance(target, tuple)] for target in was]
    fresh: list[list[int]] = [[] for _ in now]
    if not one:  # a whole load: twice as fast
        for bucket, after in enumerate(other):
            fresh[after].append(bucket)
    else:
        for bucket, (before, after) in enumerate(zip_longest(one, other, fillvalue=NOTHING)):
            if same[before] != after:
                if before:
                    leaving[before].append(bucket)
                fresh[after].append(bucket)
    coming: tuple[dict[Value, list[int]], ...] = {}, {}
    for target, buckets in zip(now, fresh, strict=True):
        if buckets and target is not None:
            coming[not isinstance(target, tuple)][target] = buckets
    return tuple(map(Delta, (key, key), maps, gone, coming))


def _chain_of(port: PortElements | None) -> tuple[Value, ...]:
    return (hash_chain(len(port.now), port.by_client),) if port else ()


def _past_chain_of(port: PortElements | None) -> tuple[Value, ...]:
    return (hash_chain(len(port.past), port.by_client),) if port else ()


def _closed(port: PortElements | None) -> tuple[Value, ...]:
    return (None,) if port and port.closed else ()
