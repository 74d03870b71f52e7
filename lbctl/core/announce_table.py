"""One peer's routes: what it shall have, what it has, and what is under way.

Pure; the rules are in `lbctl.core.announce`, which owns the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

from lbctl.core import exabgp
from lbctl.core.exabgp import Verb

Texts = dict[str, None]  # attributes of a prefix's paths, in order; shared, so never changed
Grouped = dict[str, dict[str, None]]  # attributes -> prefixes, in order
_NOTHING: Final[Texts] = {}


class Route(NamedTuple):
    """A prefix with its attributes text, as one command carries it."""

    attributes: str
    prefix: str

    @property
    def version(self) -> int:
        """Of the prefix: 4 or 6."""
        return 6 if ":" in self.prefix else 4


@dataclass(slots=True)
class Table:
    """One peer: what it shall have, what it has, and what is under way."""

    peer: str
    modes: Mapping[int, bool] | None = None  # by family: ADD-PATH agreed; None: never negotiated
    up: bool = False
    due: int = 0  # End-of-RIB, when this number is on the wire; 0: it was sent
    blocked: bool = False  # the modes changed: no announce until the old kind is gone
    wanted: dict[str, Texts] = field(default_factory=dict)  # by prefix, as far as it is planned
    held: set[Route] = field(default_factory=set)
    unsure: set[Route] = field(default_factory=set)
    busy: dict[Route, int] = field(default_factory=dict)  # to the id of the command in flight
    pending: dict[Route, int] = field(default_factory=dict)  # not right yet, since number n
    deferred: dict[Route, list[Route]] = field(default_factory=dict)
    refused: set[Route] = field(default_factory=set)
    todo: dict[Verb, Grouped] = field(
        default_factory=lambda: {Verb.WITHDRAW: {}, Verb.ANNOUNCE: {}}
    )
    kin: dict[str, set[str]] = field(default_factory=dict)  # hop or id -> attributes of wanted
    known: set[str] = field(default_factory=set)  # attributes in `kin`
    slots: dict[str, set[str]] = field(default_factory=dict)  # id -> attributes of held, unsure

    def foreign(self, route: Route) -> bool:
        """Whether the route is of the kind that the peer's modes do not have."""
        several = (self.modes or {}).get(route.version)
        return (exabgp.path_id(route.attributes) is not None) is not several

    def wants(self, route: Route) -> bool:
        """Whether it is wanted."""
        return route.attributes in self.wanted.get(route.prefix, _NOTHING)

    def want(self, prefix: str, texts: Texts) -> list[Route]:
        """Want exactly these of a prefix; returns what this changes, the routes gone first."""
        old = self.wanted.get(prefix, _NOTHING)
        if old is texts:
            return []
        if texts:
            self.wanted[prefix] = texts
        else:
            self.wanted.pop(prefix, None)
        self._relate(texts)
        gone = [Route(text, prefix) for text in old if text not in texts]
        return gone + [Route(text, prefix) for text in texts if text not in old]

    def _relate(self, texts: Texts) -> None:
        for attributes in texts:
            if attributes not in self.known:
                self.known.add(attributes)
                for key in _keys(attributes):
                    self.kin.setdefault(key, set()).add(attributes)

    def empty(self) -> None:
        """Want nothing."""
        self.wanted, self.kin, self.known = {}, {}, set()

    def prune(self) -> None:
        """Forget the kinship of routes that are no longer wanted or there."""
        self.slots, self.kin, self.known = {}, {}, set()
        for route in self.held | self.unsure:
            self.slots.setdefault(_keys(route.attributes)[1], set()).add(route.attributes)
        for texts in self.wanted.values():
            self._relate(texts)

    def has(self, prefix: str) -> bool:
        """Whether a route that is wanted of the prefix is there."""
        return any(Route(text, prefix) in self.held for text in self.wanted.get(prefix, _NOTHING))

    def successor(self, old: Route) -> Route | None:
        """A wanted route, not there yet, that takes the place of `old`."""
        attributes, texts = old.attributes, self.wanted.get(old.prefix, _NOTHING)
        if not texts or self.foreign(old):
            return None
        others = {a for key in _keys(attributes) for a in self.kin.get(key, ()) if a != attributes}
        for other in sorted(others) if self.has(old.prefix) else (*sorted(others), *texts):
            new = Route(other, old.prefix)
            if other in texts and new not in self.held:
                return new
        return None

    def learn(self, attributes: str, routes: list[Route], sure: bool) -> None:
        """These routes, all with these attributes, are there, or may be."""
        (self.held if sure else self.unsure).update(routes)
        if sure:
            self.unsure.difference_update(routes)
        self.slots.setdefault(_keys(attributes)[1], set()).add(attributes)

    def displace(self, attributes: str, routes: list[Route]) -> list[Route]:
        """A command for them was done: what else was in their slots is not there any more."""
        others = self.slots.get(_keys(attributes)[1], set()) - {attributes}
        candidates = [Route(a, route.prefix) for a in sorted(others) for route in routes]
        gone = [other for other in candidates if other in self.held or other in self.unsure]
        self.lose(gone)
        return gone

    def lose(self, routes: list[Route]) -> None:
        """The routes are not there."""
        self.held.difference_update(routes)
        self.unsure.difference_update(routes)

    def take(self, verb: Verb, attributes: str, prefixes: tuple[str, ...], id: int) -> None:
        """These are in the command `id` now; what is left of their queue goes behind the others."""
        queue = self.todo[verb].pop(attributes)
        for prefix in prefixes:
            del queue[prefix]
            self.busy[Route(attributes, prefix)] = id
        if queue:
            self.todo[verb][attributes] = queue

    def enqueue(self, route: Route, verb: Verb | None) -> None:
        """Put the route into the queue of `verb` and no other."""
        for other, grouped in self.todo.items():
            if other is verb:
                grouped.setdefault(route.attributes, {})[route.prefix] = None
            elif (prefixes := grouped.get(route.attributes)) is not None:
                prefixes.pop(route.prefix, None)
                if not prefixes:
                    del grouped[route.attributes]

    def consider(self, route: Route, number: int) -> None:
        """Queue what the route needs now. Called whenever anything about it has changed."""
        if route in self.busy or route in self.refused:
            self.pending.setdefault(route, number)
            return
        verb = None
        if self.wants(route):
            if route not in self.held:
                verb = Verb.ANNOUNCE
        elif route in self.held or route in self.unsure:
            if (new := self.successor(route)) is not None:
                self.deferred.setdefault(new, []).append(route)
                self.enqueue(route, None)
                self.pending.setdefault(route, number)
                return
            verb = Verb.WITHDRAW
        self.enqueue(route, verb)
        if verb is None:
            self.pending.pop(route, None)
        else:
            self.pending.setdefault(route, number)

    def forget(self) -> None:
        """Drop all knowledge of what the peer has."""
        for grouped in self.todo.values():
            grouped.clear()
        for known in (self.held, self.unsure, self.refused):
            known.clear()
        self.busy.clear()
        self.slots.clear()
        self.pending.clear()
        self.deferred.clear()

    def stray(self) -> bool:
        """Whether something of the kind that the modes do not have may still be there."""
        return any(
            self.foreign(route)
            for known in (self.held, self.unsure, self.busy.keys())
            for route in known
        )


@lru_cache(maxsize=1 << 16)
def _keys(attributes: str) -> tuple[str, str]:
    """What routes are kin by: the next hop, and the slot."""
    return f"hop {exabgp.next_hop(attributes)}", f"id {exabgp.path_id(attributes)}"
