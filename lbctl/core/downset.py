"""The agent's side of the down set: nodes whose endpoints take no new flows.

Rules (DESIGN.md, "Probe protocol"): a node is in the set when every manager heard in the last
second calls it down; out again as soon as one disagrees; at most half of the nodes, beyond that
nothing is added, unless two managers say so (as announcing does in a panic); the set stays as it is
while no manager is heard. A manager that does not judge yet is not heard in this sense, nor one
that has fallen silent and whose own host all others call down: it died with that, and would speak
for it for a second. Each request counts once: (boot, sequence) must rise per manager.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lbctl.core.probe import Request, node_hash

HEARD_S = 1.0
SILENT_S = 0.2  # four requests missed, where nodes are few
FORGET_S = 60.0  # a manager silent for so long is new when it comes back


@dataclass(frozen=True, slots=True)
class Voice:
    """The last request of one manager, from the node `host`. `heard_s` is monotonic."""

    manager: str
    host: str
    boot: int
    sequence: int
    heard_s: float
    judging: bool
    down: frozenset[int]


@dataclass(frozen=True, slots=True)
class DownSet:
    """What the managers said last, and what follows: `down` holds node names."""

    voices: tuple[Voice, ...] = ()
    down: frozenset[str] = frozenset()


def hear(state: DownSet, request: Request, now_s: float, host: str = "") -> DownSet:
    """Take an authenticated, fresh request. A repeated or older one changes nothing.

    host: the node that it came from, "" if that is none.
    """
    known = tuple(voice for voice in state.voices if now_s - voice.heard_s < FORGET_S)
    for voice in known:
        if voice.manager == request.manager and (voice.boot, voice.sequence) >= (
            request.boot,
            request.sequence,
        ):
            return state
    others = tuple(voice for voice in known if voice.manager != request.manager)
    number = request.boot, request.sequence
    voice = Voice(request.manager, host, *number, now_s, request.judging, request.down)
    return DownSet((*others, voice), state.down)


def resolve(state: DownSet, nodes: Iterable[str], now_s: float) -> DownSet:
    """Work out `down` anew. `nodes` are the names of all nodes of the cluster."""
    heard = [v for v in state.voices if v.judging and now_s - v.heard_s <= HEARD_S]
    heard = [v for v in heard if now_s - v.heard_s < SILENT_S or not _gone(v, heard)]
    if not heard:
        return state
    names = tuple(nodes)
    owners = _owners(names)
    agreed = frozenset.intersection(*(voice.down for voice in heard))
    down = frozenset(owners[number] for number in agreed if owners.get(number))
    if 2 * len(down) > len(names) and len(heard) == 1:
        down = down & state.down
    return state if down == state.down else DownSet(state.voices, down)


def _gone(voice: Voice, heard: Iterable[Voice]) -> bool:
    """Whether all others that are heard, and there are any, call a manager's host down."""
    said = [node_hash(voice.host) in other.down for other in heard if other is not voice]
    return bool(voice.host and said) and all(said)


def heard(state: DownSet, now_s: float) -> frozenset[int]:
    """Return the hashes of the managers heard within the last second, judging or not."""
    return frozenset(node_hash(v.manager) for v in state.voices if now_s - v.heard_s <= HEARD_S)


@lru_cache(maxsize=4)
def _owners(names: tuple[str, ...]) -> dict[int, str]:
    """Node of each hash; "" where two have the same: they cannot be told apart, so none is down."""
    owners: dict[int, str] = {}
    for name in names:
        number = node_hash(name)
        owners[number] = "" if number in owners else name
    return owners
