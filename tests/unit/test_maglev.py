"""Maglev tables: even, stable, the same for everyone."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import maglev


def names(count: int) -> list[str]:
    return [f"10.244.0.{n}|8080" for n in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12, 13, 51, 52, 204])
def test_spread_is_within_five_percent(count: int) -> None:
    shares = Counter(maglev.table(names(count)))
    assert len(shares) == count
    assert max(shares.values()) <= min(shares.values()) * 1.05 + 1
    assert sum(shares.values()) == maglev.size_for(count)


@given(st.sets(st.text(min_size=1, max_size=20), max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_changes_nothing(identities: set[str], random: object) -> None:
    shuffled = sorted(identities)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert maglev.table(shuffled) == maglev.table(identities)


def test_one_endpoint_less_moves_few_of_the_others() -> None:
    before, after = maglev.table(names(10)), maglev.table(names(9))
    assert len(before) == len(after)
    gone = names(10)[-1]
    moved = sum(b != a for b, a in zip(before, after, strict=True) if b != gone)
    assert moved <= len(before) * 0.15
    assert gone not in after


def test_nobody_gives_no_table() -> None:
    assert maglev.table([]) == ()


def test_sizes_nest() -> None:
    assert all(big % small == 0 for small in maglev.SIZES for big in maglev.SIZES if big >= small)


def test_the_format_is_frozen() -> None:
    """Another result for the same input needs another FORMAT: nodes would differ."""
    assert maglev.FORMAT == 1
    text = "\n".join(maglev.table(names(10))).encode()
    assert sha256(text).hexdigest()[:16] == "829ae4c2beb9a9bf"
