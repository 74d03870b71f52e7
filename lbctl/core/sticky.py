"""What a client with session affinity is pinned to: numbers of pods in packet marks.

Rules: a pin says a pod's number and not its address, so that a pin of a pod that takes no new flows
leads nowhere. A pod has the same number for as long as it lives; two of one port on one node never
share one. A pin lives for one of `TIMEOUTS_S`, the next that is not shorter than what the Service
says: each is a chain.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, TypeAlias

from lbctl.core.model import Address

# The timeouts of pins, in seconds. The API server takes 1 to 86,400.
TIMEOUTS_S: Final = (
    *(1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600, 900, 1200, 1800),
    *(hours * 3600 for hours in (1, 2, 3, 4, 6, 8, 12, 24)),
)
# Buckets, pods that a client is pinned to, and such that take new flows, in one room of marks.
PINNED: Final = 0x400000
TAKING: Final = 0x800000
KINDS: Final = PINNED | TAKING  # the bits that tell them apart
Pod: TypeAlias = tuple[Address, int]


@dataclass(frozen=True, slots=True)
class Sticky:
    """A port with session affinity on one node.

    timeout_s: of a pin. pods: the endpoints here, with their numbers. nodes: the others' nodes,
    by this node's numbers for them.
    """

    timeout_s: int
    pods: tuple[tuple[Pod, int], ...]
    nodes: tuple[int, ...]

    @property
    def numbers(self) -> dict[Pod, int]:
        """The pods' numbers."""
        return dict(self.pods)


def sticky(affinity_s: int, pods: Iterable[Pod], nodes: Iterable[int]) -> Sticky:
    """Return what pins of a port with these endpoints look like.

    affinity_s: the Service's own timeout. pods: on this node, each once, in the same order always.
    """
    numbered: dict[int, Pod] = {}
    for pod in pods:
        text = f"{pod[0]}|{pod[1]}".encode()
        number = int.from_bytes(blake2b(text, digest_size=4).digest(), "big") % PINNED
        while number in numbered:
            number = (number + 1) % PINNED
        numbered[number] = pod
    named = tuple((pod, number) for number, pod in numbered.items())
    return Sticky(rounded(affinity_s), named, tuple(sorted(set(nodes))))


def rounded(affinity_s: int) -> int:
    """The timeout of a Service's pins; the longest one for what is longer."""
    return TIMEOUTS_S[min(bisect_left(TIMEOUTS_S, affinity_s), len(TIMEOUTS_S) - 1)]
