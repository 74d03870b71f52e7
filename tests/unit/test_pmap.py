"""Persistent maps against dicts, and their difference against comparing everything."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import pmap
from lbctl.core.pmap import PMap, PSet, changed, differences, differing

# Few keys, of which many share a leaf: multiples of 4,096 hash into the same one.
KEYS = st.integers(-3, 3).map(lambda n: n * 4096) | st.integers(0, 300)
STEPS = st.lists(
    st.tuples(st.dictionaries(KEYS, st.sampled_from("abc"), max_size=5), st.sets(KEYS, max_size=4)),
    max_size=12,
)


@settings(deadline=None)
@given(STEPS)
def test_it_is_a_map_and_old_versions_stay(steps: list[tuple[dict[int, str], set[int]]]) -> None:
    versions: list[tuple[PMap[int, str], dict[int, str]]] = [(PMap(), {})]
    for put, drop in steps:
        made, plain = versions[-1]
        plain = {key: value for key, value in plain.items() if key not in drop} | put
        versions.append((made.updated(put, drop), plain))
    for made, plain in versions:
        assert made == plain and len(made) == len(plain) and set(made) == set(plain)
        assert all(made[key] is plain[key] and key in made for key in plain)
        assert dict(made.items()) == plain and sorted(made.values()) == sorted(plain.values())
        assert made.get(12345) is None and 12345 not in made
        for other, as_dict in versions:
            apart = {k for k in plain.keys() | as_dict.keys() if plain.get(k) != as_dict.get(k)}
            assert changed(made, other) == apart == changed(plain, as_dict)
            both = {(k, plain.get(k), as_dict.get(k)) for k in apart}
            assert set(differences(made, other)) == both == set(differences(plain, as_dict))
            assert differing(PSet(plain), PSet(as_dict)) == plain.keys() ^ as_dict.keys()
            assert (PSet(plain) == PSet(as_dict)) == (plain.keys() == as_dict.keys())


def test_no_change_is_the_same_object() -> None:
    made = PMap({n: str(n) for n in range(1000)})
    assert made.updated({5: made[5]}, [4096 * 7 + 3]) is made
    assert pmap.persistent(made) is made and len(PMap(made)) == 1000


def test_a_change_shares_all_but_one_leaf() -> None:
    made = PMap({n: str(n) for n in range(10_000)})
    assert len(made) == 10_000 and made[9_999] == "9999"
    other = made.updated({77: "new"})
    was = [leaf for branch in made._branches for leaf in branch]
    now = [leaf for branch in other._branches for leaf in branch]
    assert sum(a is not b for a, b in zip(was, now, strict=True)) == 1
    assert changed(made, other) == {77}


def test_a_set_is_as_any_other() -> None:
    made = PSet([1, 2, 3])
    assert made == {1, 2, 3} and {1, 2, 3} == made and 2 in made and 4 not in made
    assert made - {1} == {2, 3} and made ^ {3, 4} == {1, 2, 4} and made != {1}
    assert hash(made) == hash(PSet([3, 2, 1])) and frozenset(made) == {1, 2, 3}
