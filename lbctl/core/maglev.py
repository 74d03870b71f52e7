"""Maglev tables: which endpoint a bucket belongs to, the same on every node.

Rules: a table is a function of the *set* of endpoint identities alone (the order that they arrive
in changes nothing), of `SEED` and of `FORMAT`; adding or removing one endpoint moves few buckets of
the others. Sizes are powers of two, each a multiple of the smaller ones, and skips are odd: so
every permutation is complete without the sizes being prime, and when a Service outgrows a size the
old bucket of a packet is its new bucket shifted right (nft's `jhash … mod M` is floor(h·M / 2^32)),
which keeps the second chance exact over the change.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

FORMAT: Final = 1  # part of every digest; raise it whenever the same input gives another table
SEED: Final = 0x6C626374  # of the permutations here and of the packet hash in nftables
SIZES: Final = (64, 256, 1024, 4096)
_PER_ENDPOINT: Final = 20  # buckets: the spread is then within 1/20


def size_for(count: int) -> int:
    """Return the number of buckets for `count` endpoints, one of SIZES.

    Up to 204 endpoints the largest share is within 5 % of the smallest; beyond, 4096 it stays.
    """
    for size in SIZES:
        if count * _PER_ENDPOINT <= size:
            return size
    return SIZES[-1]


def table(identities: Iterable[str]) -> tuple[str, ...]:
    """Return the owner of every bucket; () without identities.

    In: unique strings that identify an endpoint on every node alike. Out: `size_for` entries.
    """
    walkers = sorted((_hash(identity), identity) for identity in set(identities))
    if not walkers:
        return ()
    size = size_for(len(walkers))
    mask = size - 1
    positions = [value & mask for value, _ in walkers]
    skips = [(value >> 32) & mask | 1 for value, _ in walkers]
    owners = [-1] * size
    left = size
    while True:
        for index, skip in enumerate(skips):
            position = positions[index]
            while owners[position] >= 0:
                position = (position + skip) & mask
            owners[position] = index
            positions[index] = (position + skip) & mask
            left -= 1
            if not left:
                names = [identity for _, identity in walkers]
                return tuple(names[owner] for owner in owners)


def _hash(identity: str) -> int:
    text = f"{FORMAT}|{SEED}|{identity}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
