"""Persistent maps: whole states whose difference costs what changed, not what there is.

Pure. A map never changes; `updated` returns another one that shares all but the touched parts, and
`changed` skips what two maps share. So a port takes the whole desired state, each stage works out
its difference to the last, and no event can be lost between them: nobody passes deltas on.

Rules: values count as unchanged when they are the same object. The order of iteration is that of
the hashes, no order at all: sort where it matters.
"""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterable, Iterator, Mapping, Set, ValuesView
from operator import is_
from typing import Any, Final, Self, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_WIDTH: Final = 64  # branches of the root, and leaves of a branch
_LEAVES: Final = _WIDTH * _WIDTH
_Leaf = dict[Any, Any]
_Branch = tuple[_Leaf, ...]
_NO_BRANCH: Final[_Branch] = ({},) * _WIDTH
_MISSING: Final = object()


class PMap(Mapping[K, V]):
    """An immutable map of two levels: 4,096 small dicts, shared between versions.

    One change copies two tuples of 64 and one dict of a 4,096th of the entries.
    """

    __slots__ = ("_branches", "_size")

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = ()) -> None:
        self._branches: tuple[_Branch, ...] = (_NO_BRANCH,) * _WIDTH
        self._size = 0
        if isinstance(items, PMap):
            self._branches, self._size = items._branches, items._size
        else:
            self._branches, self._size = self._with(dict(items), ())

    def updated(self, put: Mapping[K, V], drop: Iterable[K] = ()) -> Self:
        """Return the map without `drop` and with `put`; itself if that changes nothing."""
        branches, size = self._with(put, drop)
        if branches is self._branches:
            return self
        made = type(self).__new__(type(self))
        made._branches, made._size = branches, size
        return made

    def _with(self, put: Mapping[K, V], drop: Iterable[K]) -> tuple[tuple[_Branch, ...], int]:
        if not self._size and len(put) >= _LEAVES:
            return _built(put), len(put)
        leaves: dict[int, _Leaf] = {}
        size = self._size

        def own(number: int) -> _Leaf:
            leaf = leaves.get(number)
            if leaf is None:
                leaf = leaves[number] = dict(self._branches[number // _WIDTH][number % _WIDTH])
            return leaf

        for key in drop:
            if key not in put and key in self:
                size -= own(hash(key) % _LEAVES).pop(key, _MISSING) is not _MISSING
        for key, value in put.items():
            number = hash(key) % _LEAVES
            known = self._branches[number // _WIDTH][number % _WIDTH].get(key, _MISSING)
            if known is not value:
                own(number)[key] = value
                size += known is _MISSING
        return (self._grown(leaves), size) if leaves else (self._branches, size)

    def _grown(self, leaves: Mapping[int, _Leaf]) -> tuple[_Branch, ...]:
        fresh: dict[int, list[_Leaf]] = {}
        for number, leaf in leaves.items():
            place = number // _WIDTH
            if place not in fresh:
                fresh[place] = list(self._branches[place])
            fresh[place][number % _WIDTH] = leaf
        branches = list(self._branches)
        for place, made in fresh.items():
            branches[place] = tuple(made)
        return tuple(branches)

    def _leaf(self, key: object) -> _Leaf:
        number = hash(key) % _LEAVES
        return self._branches[number // _WIDTH][number % _WIDTH]

    def __getitem__(self, key: K) -> V:
        found: V = self._leaf(key)[key]
        return found

    def get(self, key: K, default: Any = None) -> Any:
        """The value, or the default."""
        number = hash(key) % _LEAVES
        return self._branches[number // _WIDTH][number % _WIDTH].get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._leaf(key)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[K]:
        for branch in self._branches:
            if branch is not _NO_BRANCH:
                for leaf in branch:
                    yield from leaf

    def items(self) -> ItemsView[K, V]:
        """Keys with their values."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """The values."""
        return _Values(self)

    def entries(self) -> Iterator[tuple[K, V]]:
        """Keys with their values, without looking each up."""
        for branch in self._branches:
            if branch is not _NO_BRANCH:
                for leaf in branch:
                    yield from leaf.items()

    def __repr__(self) -> str:
        return f"PMap({dict(self)!r})"


class _Items(ItemsView[K, V]):
    _mapping: PMap[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._mapping.entries()


class _Values(ValuesView[V]):
    _mapping: PMap[Any, V]

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping.entries())


def _built(items: Mapping[Any, Any]) -> tuple[_Branch, ...]:
    """The branches of a big map of these entries alone."""
    leaves: list[_Leaf] = [{} for _ in range(_LEAVES)]
    for key, value in items.items():
        leaves[hash(key) % _LEAVES][key] = value
    return tuple(tuple(leaves[n : n + _WIDTH]) for n in range(0, _LEAVES, _WIDTH))


def changed(old: Mapping[K, V], new: Mapping[K, V]) -> set[K]:
    """Return the keys whose value is another object, or that only one of the maps has."""
    return {key for key, _, _ in differences(old, new)}


def differences(old: Mapping[K, V], new: Mapping[K, V]) -> list[tuple[K, V | None, V | None]]:
    """The same keys, each once, with what the one and the other map has, None if nothing."""
    if old is new:
        return []
    if not isinstance(old, PMap) or not isinstance(new, PMap):
        return _apart(old, new)
    found: list[tuple[K, V | None, V | None]] = []
    for was, now in zip(old._branches, new._branches, strict=True):
        if was is not now:
            for before, after in zip(was, now, strict=True):
                if before is not after:
                    found += _apart(before, after)
    return found


def _apart(old: Mapping[K, V], new: Mapping[K, V]) -> list[tuple[K, V | None, V | None]]:
    # A key's hash is most of the work for addresses. Versions of one map mostly have the same keys
    # in the same order, or one of them none at all: then none is hashed.
    if len(old) == len(new) and all(map(is_, old, new)):
        pairs = zip(old.items(), new.values(), strict=True)
        return [(key, was, now) for (key, was), now in pairs if was is not now]
    found: list[tuple[K, V | None, V | None]] = [
        (key, was, None) for key, was in old.items() if not new or key not in new
    ]
    for key, now in new.items():
        was = old.get(key) if old else None
        if was is not now or (was is None and key not in old):
            found.append((key, was, now))
    return found


class PSet(Set[K]):
    """An immutable set upon a persistent map, whose values are all None."""

    __slots__ = ("_map",)

    def __init__(self, items: PMap[K, None] | Iterable[K] = ()) -> None:
        self._map = items if isinstance(items, PMap) else PMap(dict.fromkeys(items))

    def __contains__(self, key: object) -> bool:
        return key in self._map

    def __iter__(self) -> Iterator[K]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PSet):
            return len(self) == len(other) and not changed(self._map, other._map)
        return super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash()

    def __repr__(self) -> str:
        return f"PSet({set(self)!r})"


def differing(one: Set[K], other: Set[K]) -> set[K]:
    """Return what only one of the sets has."""
    if one is other:
        return set()
    if isinstance(one, PSet) and isinstance(other, PSet):
        return changed(one._map, other._map)
    return set(one).symmetric_difference(other)


def persistent(items: Mapping[K, V]) -> PMap[K, V]:
    """Return the map itself if it is persistent, else a persistent one of the same entries."""
    return items if isinstance(items, PMap) else PMap(items)
