"""An EIP's ranking of the nodes, which says through whom it goes when there are more than paths.

Pure. Rendezvous hashing (Thaler and Ravishankar, 1998): few EIPs have others when a node comes or
goes, and all managers find the same ones without asking. To rank a thousand nodes takes most of a
millisecond, so the beginning of each EIP's ranking is kept, and repaired for the nodes that moved.
Rules:
- What is kept is a beginning of the ranking at any time: who is ranked behind its last is not in.
- It is twice what is needed, and ranked anew only when less than that is left.
- It holds names alone, which all EIPs share: 8 bytes each. Scores are worked out again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from heapq import nsmallest

from lbctl.core.model import Address


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The beginning of an EIP's ranking. names: who was ranked; best: the first of them."""

    names: frozenset[str]
    best: tuple[str, ...]


def ranked(eip: Address, names: frozenset[str], count: int, kept: Ranking | None = None) -> Ranking:
    """Rank these nodes; at least `count` are among the best, or all.

    kept: an earlier ranking for the same EIP. It decides what this costs, and nothing else.
    """
    best = _repaired(eip, names, kept) if kept is not None else ()
    if len(best) < min(count, len(names)):
        best = tuple(nsmallest(2 * count, names, key=_score(eip)))
    return Ranking(names, best[: 2 * count])


def _repaired(eip: Address, names: frozenset[str], kept: Ranking) -> tuple[str, ...]:
    gone, came = _moved(kept.names, names)
    best = kept.best
    if not gone.isdisjoint(best):
        best = tuple([name for name in best if name not in gone])
    if not came or not best:
        return best
    score = _score(eip)
    last = score(best[-1])
    grown = list(best)
    for name in came:
        if score(name) < last:
            insort(grown, name, key=score)
    return tuple(grown) if len(grown) > len(best) else best


def _score(eip: Address) -> Callable[[str], tuple[bytes, str]]:
    start = blake2b(f"{eip}|".encode(), digest_size=8)

    def score(name: str) -> tuple[bytes, str]:
        own = start.copy()
        own.update(name.encode())
        return own.digest(), name

    return score


@lru_cache(maxsize=16)
def _moved(old: frozenset[str], new: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Who went and who came: the same for all EIPs that the same nodes have confirmed."""
    return old - new, new - old
