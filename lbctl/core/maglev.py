"""Maglev tables: which endpoint a bucket belongs to, the same on every node.

Rules: a table is a function of the *set* of endpoint identities alone (the order that they arrive
in changes nothing), of `SEED` and of `FORMAT`; adding or removing one endpoint moves few buckets of
the others. Skips have no factor in common with the size: so every permutation is complete without
the sizes being prime. Each size is four times the one before: when a Service outgrows a size the
old bucket of a packet is a quarter of its new one (nft's `jhash … mod M` is floor(h·M / 2^32)),
which keeps the second chance exact over the change. An endpoint's order in a big table is its order
in the smaller one, each bucket's four parts together: so outgrowing a size moves little more than
any other endpoint does. With 10,000 Services a table must be small: a size is the smallest whose
shares are even enough, and a row of buckets is bytes.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import gcd
from typing import Any, Final, TypeAlias

FORMAT: Final = 3  # part of every digest; raise it whenever the same input gives another table
SEED: Final = 0x6C626374  # of the permutations here and of the packet hash in nftables
SIZES: Final = (40, 160, 640, 2560, 10240)
MOST: Final = (1, 12, 42, 134, 537)  # endpoints at each size: shares are within 5 % of even
Row: TypeAlias = bytes | tuple[int, ...]  # a small number for each bucket
_PREFIX: Final = f"{FORMAT}|{SEED}|"
_COARSE: Final = 160  # the size whose permutations those of bigger ones follow
_SKIPS: Final = tuple(skip for skip in range(1, _COARSE) if gcd(skip, _COARSE) == 1)


def row(numbers: Sequence[int]) -> Row:
    """Return the numbers as a row: bytes if each fits into one, so that equal rows are equal."""
    try:
        return bytes(numbers)
    except ValueError:
        return tuple(numbers)


def translated(numbers: Row, names: Sequence[int]) -> Row:
    """Return the row with names[n] in place of each n."""
    if isinstance(numbers, bytes) and max(names) < 256:
        return numbers.translate(bytes(names[:256]).ljust(256, b"\0"))
    return row([names[number] for number in numbers])


def size_for(endpoints: int) -> int:
    """Return the number of buckets for so many endpoints, one of SIZES.

    Up to 537 endpoints each one's share is within 5 % of an even one; beyond, the last size it
    stays. The smallest is for a single endpoint, which has all of it: so leaving it moves nothing
    extra.
    """
    for size, most in zip(SIZES, MOST, strict=True):
        if endpoints <= most:
            return size
    return SIZES[-1]


def table(identities: Sequence[str]) -> Row:
    """Return the owner of every bucket, as its place in `identities`; empty without any.

    In: strings that identify an endpoint on every node alike, sorted and unique. Out: `size_for`
    entries.
    """
    if not identities:
        return b""
    size = size_for(len(identities))
    hashes = sorted((_hash(identity), place) for place, identity in enumerate(identities))
    walks = [(_walk(value, size), place) for value, place in hashes]
    owners: list[Any] = [None] * size  # None is quicker to ask for than a number
    for left in range(size, 0, -len(walks)):
        # In the last round there is a bucket for the first few only.
        for walk, place in walks if left >= len(walks) else walks[:left]:
            for position in walk:
                if owners[position] is None:
                    owners[position] = place
                    break
    return row(owners)


def _walk(value: int, size: int) -> Iterator[int]:
    """The buckets in an endpoint's order, each once."""
    if size > _COARSE:
        turn, parts, inside = value >> 40, size // _COARSE, [0]
        while len(inside) < parts:
            inside = [4 * place + (turn + part) % 4 for place in inside for part in range(4)]
        starts = map(parts.__mul__, _walk(value, _COARSE))
        return (start + place for start in starts for place in inside)
    position, skip = value % size, _SKIPS[(value >> 32) % len(_SKIPS)]
    every = _twice(skip, size)
    start = every.index(position)
    return iter(every[start : start + size])


@lru_cache(maxsize=256)
def _twice(skip: int, size: int) -> bytes:
    """The walk from 0, two times; there is one for each skip and size."""
    return bytes(step * skip % size for step in range(size)) * 2


def _hash(identity: str) -> int:
    text = (_PREFIX + identity).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
