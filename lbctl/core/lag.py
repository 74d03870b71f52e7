"""Which nodes' tables lag behind the majority's.

Rule (DESIGN.md, "Second hop"): a node whose digest has differed from that of more than half of the
nodes for LAG_S is no next hop, unless it is the last. Without such a majority nobody lags.
One that is back after it was gone is not waited for: what it confirmed before may be of long ago,
pods and even the Service of an EIP are others now, and its agent may not have heard of it yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from math import inf

LAG_S = 5.0


def differing(
    digests: Mapping[str, int],
    since_s: Mapping[str, float],
    now_s: float,
    back: Set[str] = frozenset(),
) -> dict[str, float]:
    """Return for each node that differs from the majority since when it does.

    digests: of the nodes that answer. since_s: the last result. back: the nodes that have come back
    since then; they have differed for ever.
    """
    if not digests:
        return {}
    digest, count = min(Counter(digests.values()).items(), key=lambda item: (-item[1], item[0]))
    if 2 * count <= len(digests):
        return {}
    return {
        name: -inf if name in back else since_s.get(name, now_s)
        for name, own in sorted(digests.items())
        if own != digest
    }


def lagging(since_s: Mapping[str, float], now_s: float) -> frozenset[str]:
    """Return the nodes that have differed for too long."""
    return frozenset(name for name, since in since_s.items() if now_s - since >= LAG_S)
