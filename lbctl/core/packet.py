"""Which bucket a packet falls into: the kernel's hash, as our nftables rules use it.

Rules: the same number as `jhash saddr [. th sport] mod SIZE seed SEED` gives in the kernel, for
both families; `lbctl.core.nftrules` writes that expression, and tests/lab holds the two together.

Source: Bob Jenkins' lookup3, as include/linux/jhash.h of Linux has it (read little-endian); nft(8)
for `mod`, which is floor(hash * size / 2^32) (`reciprocal_scale`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lbctl.core import maglev
from lbctl.core.model import Address

_MASK: Final = 0xFFFFFFFF
_START: Final = 0xDEADBEEF  # JHASH_INITVAL


def bucket(client: Address, port: int | None, size: int) -> int:
    """The bucket, of `size`, of a packet from this address and port.

    port: None where the hash takes the client's address alone (session affinity).
    """
    packed = client.packed
    words = [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
    if port is not None:
        # A concatenation pads each part to whole words; the port is in network order.
        words.append(int.from_bytes(port.to_bytes(2, "big"), "little"))
    return (jhash(words, maglev.SEED) * size) >> 32


def jhash(words: Sequence[int], seed: int) -> int:
    """The 32-bit hash of whole 32-bit words."""
    a = b = c = (_START + 4 * len(words) + seed) & _MASK
    at = 0
    while len(words) - at > 3:
        a, b, c = (a + words[at]) & _MASK, (b + words[at + 1]) & _MASK, (c + words[at + 2]) & _MASK
        a, b, c = _mix(a, b, c)
        at += 3
    rest = (*words[at:], 0, 0, 0)
    return _final((a + rest[0]) & _MASK, (b + rest[1]) & _MASK, (c + rest[2]) & _MASK)


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for turn in (4, 6, 8, 16, 19, 4):
        a = ((a - c) ^ _turned(c, turn)) & _MASK
        c = (c + b) & _MASK
        a, b, c = b, c, a
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    for turn in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _turned(b, turn)) & _MASK
        a, b, c = b, c, a
    return b


def _turned(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _MASK
