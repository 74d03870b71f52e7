"""Which nodes confirmed which EIP, kept up as views of nodes change.

Pure. Rule: a view of a node that differs from the last in one EIP costs that EIP, and a thousand
nodes that confirm one after another cost a thousand, not its square.
"""

from __future__ import annotations

from typing import Final

from lbctl.core.model import Address, NodeView
from lbctl.core.pmap import differing

_NOBODY: Final[frozenset[str]] = frozenset()


class _Names:
    """Sets of node names by EIP, changed name by name; sets that are alike are one object."""

    def __init__(self) -> None:
        self._sets: dict[Address, set[str]] = {}
        self._frozen: dict[Address, frozenset[str]] = {}  # of those asked for since they changed
        self._same: dict[frozenset[str], frozenset[str]] = {}  # few distinct ones are kept

    def put(self, address: Address, name: str, there: bool) -> None:
        """The name is in the EIP's set, or not."""
        names = self._sets.setdefault(address, set())
        (names.add if there else names.discard)(name)
        if not names:
            del self._sets[address]
        self._frozen.pop(address, None)

    def of(self, address: Address) -> frozenset[str]:
        """The EIP's set."""
        found = self._frozen.get(address)
        if found is None:
            if len(self._same) > 4096:
                self._same.clear()
            made = frozenset(self._sets.get(address, _NOBODY))
            found = self._frozen[address] = self._same.setdefault(made, made)
        return found


class Confirmations:
    """By EIP: the nodes that confirmed it with endpoints, those that have a ready one themselves.

    `take` costs what differs between two views of a node; an instance is a `routes.Evidence`.
    """

    def __init__(self) -> None:
        self._of: tuple[_Names, _Names, _Names] = _Names(), _Names(), _Names()

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
            for address in touched:
                known.put(address, name, address in now)
            found |= touched
        return found

    def __call__(self, address: Address) -> tuple[frozenset[str], frozenset[str]]:
        """The nodes that confirmed the EIP with endpoints; those that have a ready one."""
        confirmed, empty, local = (known.of(address) for known in self._of)
        return confirmed - empty if empty else confirmed, local
