"""An EIP's ranking of the nodes: what is kept and repaired is what would be found anew."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core.ranking import Ranking, ranked

EIP = ip_address("198.51.100.1")
MANY = frozenset(f"n{n}" for n in range(24))


def test_the_ranking_is_for_ever() -> None:
    """Literal values: another one would move EIPs between nodes when managers are upgraded."""
    nodes = frozenset(f"n{n}" for n in range(1, 10))
    assert ranked(EIP, nodes, 4).best[:4] == ("n4", "n3", "n8", "n6")
    assert ranked(ip_address("2001:db8::1"), nodes, 4).best[:4] == ("n6", "n3", "n1", "n4")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.frozensets(st.sampled_from(sorted(MANY))), max_size=6), st.integers(1, 8))
def test_a_repaired_ranking_begins_as_a_fresh_one(steps: list[frozenset[str]], count: int) -> None:
    kept: Ranking | None = None
    for names in steps:
        kept = ranked(EIP, names, count, kept)
        whole = ranked(EIP, names, len(MANY)).best
        assert kept.best == whole[: len(kept.best)]
        assert min(count, len(names)) <= len(kept.best) <= 2 * count


@pytest.mark.parametrize("moves", [1, 4])
def test_nodes_that_are_none_of_the_first_change_nothing(moves: int) -> None:
    kept = ranked(EIP, MANY, 8)
    last = ranked(EIP, MANY, len(MANY)).best[-moves:]
    fewer = ranked(EIP, MANY.difference(last), 8, kept)
    assert fewer.best is kept.best
    assert ranked(EIP, MANY, 8, fewer).best is kept.best
