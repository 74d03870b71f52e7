"""Which nodes confirmed which EIP, kept up as views of nodes change.

Pure. Rule: a view of a node that differs from the last in one EIP costs that EIP, and a thousand
nodes that confirm one after another cost a thousand, not its square.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Final

from lbctl.core.model import Address, NodeView
from lbctl.core.pmap import differing

_NOBODY: Final[frozenset[str]] = frozenset()
_KEPT: Final = 256  # sets that are looked among for one that is alike


class _Names:
    """Sets of node names by EIP. Those that are alike are one object: EIPs are many, sets few."""

    def __init__(self) -> None:
        self._of: dict[Address, frozenset[str]] = {}
        self._same: dict[frozenset[str], frozenset[str]] = {}

    def put(self, name: str, there: Set[Address], addresses: Iterable[Address]) -> None:
        """The name is in the sets of those addresses that are `there`, and in none of the rest."""
        made: dict[tuple[frozenset[str], bool], frozenset[str]] = {}
        for address in addresses:
            step = self._of.get(address, _NOBODY), address in there
            after = made.get(step)
            if after is None:
                after = made[step] = self._one(step[0] | {name} if step[1] else step[0] - {name})
            if after:
                self._of[address] = after
            else:
                self._of.pop(address, None)

    def _one(self, names: frozenset[str]) -> frozenset[str]:
        if len(self._same) >= _KEPT:
            self._same.clear()
        return self._same.setdefault(names, names)

    def of(self, address: Address) -> frozenset[str]:
        """The EIP's set."""
        return self._of.get(address, _NOBODY)


class Confirmations:
    """By EIP: the nodes that confirmed it with endpoints, those that have a ready one themselves.

    `take` costs what differs between two views of a node.
    """

    def __init__(self) -> None:
        self._of: tuple[_Names, _Names, _Names] = _Names(), _Names(), _Names()
        self._told: dict[Address, tuple[frozenset[str], frozenset[str]]] = {}

    def take(self, name: str, old: NodeView | None, new: NodeView | None) -> set[Address]:
        """Take a node's next view in; the EIPs of which it says something else than the last."""
        old, new = old or NodeView(name), new or NodeView(name)
        found: set[Address] = set()
        for known, was, now in (
            (self._of[0], old.confirmed, new.confirmed),
            (self._of[1], old.empty, new.empty),
            (self._of[2], old.local_ready, new.local_ready),
        ):
            touched = differing(was, now)
            known.put(name, now, touched)
            found |= touched
        for address in found:
            self._told.pop(address, None)
        return found

    def __call__(self, address: Address) -> tuple[frozenset[str], frozenset[str]]:
        """The nodes that confirmed the EIP with endpoints; those that have a ready one."""
        told = self._told.get(address)
        if told is None:
            confirmed, empty, local = (known.of(address) for known in self._of)
            told = confirmed - empty if empty else confirmed, local
            if confirmed:  # what nobody confirms any more is forgotten
                self._told[address] = told
        return told
