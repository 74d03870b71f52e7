"""One peer's routes: what it shall have, what it has, and what is under way.

Pure; the rules are in `lbctl.core.announce`, which owns the tables. A *route* is a prefix with an
attributes text. Routes are kept, and moved, by their attributes: a node that goes is one text and
thousands of prefixes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, TypeAlias

from lbctl.core import exabgp
from lbctl.core.exabgp import Command, Verb

Texts: TypeAlias = dict[str, None]  # attributes of a prefix's paths, in order; shared: not changed
Routes: TypeAlias = defaultdict[str, set[str]]  # attributes -> prefixes
Numbered: TypeAlias = defaultdict[str, dict[str, int]]  # attributes -> prefix -> a number
_NOTHING: Final[Texts] = {}


def _routes() -> Routes:
    return defaultdict(set)


def _numbered() -> Numbered:
    return defaultdict(dict)


@dataclass(slots=True)
class Table:
    """One peer: what it shall have, what it has, and what is under way."""

    peer: str
    modes: Mapping[int, bool] | None = None  # by family: ADD-PATH agreed; None: never negotiated
    up: bool = False
    due: int = 0  # End-of-RIB, when this number is on the wire; 0: it was sent
    blocked: bool = False  # the modes changed: no announce until the old kind is gone
    wanted: dict[str, Texts] = field(default_factory=dict)  # by prefix, as far as it is planned
    held: Routes = field(default_factory=_routes)
    unsure: Routes = field(default_factory=_routes)
    busy: Numbered = field(default_factory=_numbered)  # to the id of the command in flight
    pending: Numbered = field(default_factory=_numbered)  # not right yet, since number n
    # By a route that is to come: the attributes of those that it will replace.
    deferred: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    refused: Routes = field(default_factory=_routes)
    todo: dict[Verb, dict[str, dict[str, None]]] = field(
        default_factory=lambda: {Verb.WITHDRAW: {}, Verb.ANNOUNCE: {}}
    )
    kin: dict[str, set[str]] = field(default_factory=dict)  # hop or id -> attributes of wanted
    known: set[str] = field(default_factory=set)  # attributes in `kin`
    slots: dict[str, set[str]] = field(default_factory=dict)  # id -> attributes of held, unsure

    def foreign(self, attributes: str) -> bool:
        """Whether such routes are of the kind that the peer's modes do not have."""
        several = (self.modes or {}).get(_version(attributes))
        return (exabgp.path_id(attributes) is not None) is not several

    def wants(self, attributes: str, prefix: str) -> bool:
        """Whether the route is wanted."""
        return attributes in self.wanted.get(prefix, _NOTHING)

    def want(self, listed: Iterable[tuple[str, Texts]], number: int) -> None:
        """Want exactly these texts of each prefix; queue what this changes."""
        moves: dict[tuple[int, int], tuple[Texts, Texts, list[str]]] = {}
        for prefix, texts in listed:
            old = self.wanted.get(prefix, _NOTHING)
            if old is texts:
                continue
            if texts:
                self.wanted[prefix] = texts
            else:
                self.wanted.pop(prefix, None)
            move = moves.get((id(old), id(texts)))
            if move is None:
                move = moves[id(old), id(texts)] = old, texts, []
            move[2].append(prefix)
        for _, texts, _ in moves.values():
            self._relate(texts)
        for old, texts, prefixes in moves.values():
            for text in (*(t for t in old if t not in texts), *(t for t in texts if t not in old)):
                self.consider(text, prefixes, number)

    def _relate(self, texts: Texts) -> None:
        for attributes in texts:
            if attributes not in self.known:
                self.known.add(attributes)
                for key in _keys(attributes):
                    self.kin.setdefault(key, set()).add(attributes)

    def empty(self) -> None:
        """Want nothing."""
        self.wanted, self.kin, self.known = {}, {}, set()

    def there(self) -> dict[str, set[str]]:
        """All routes that it may have, or is to be given or rid of."""
        found = _routes()
        for known in (self.held, self.unsure, self.busy, self.pending):
            for attributes, prefixes in known.items():
                if prefixes:
                    found[attributes].update(prefixes)
        return found

    def prune(self) -> None:
        """Forget the attributes that no route has any more."""
        self.slots, self.kin, self.known = {}, {}, set()
        for known in (self.held, self.unsure, self.refused, self.busy, self.pending):
            for attributes in [text for text, prefixes in known.items() if not prefixes]:
                del known[attributes]
        for attributes in (*self.held, *self.unsure):
            self.slots.setdefault(_keys(attributes)[1], set()).add(attributes)
        for texts in {id(texts): texts for texts in self.wanted.values()}.values():
            self._relate(texts)

    def has(self, prefix: str) -> bool:
        """Whether a route that is wanted of the prefix is there."""
        return any(prefix in self.held[text] for text in self.wanted.get(prefix, _NOTHING))

    def oldest(self) -> int | None:
        """The oldest number of which something is pending."""
        firsts = (next(iter(numbers.values())) for numbers in self.pending.values() if numbers)
        return min(firsts, default=None)

    def learn(self, attributes: str, prefixes: Iterable[str], sure: bool) -> None:
        """These routes are there, or may be."""
        (self.held if sure else self.unsure)[attributes].update(prefixes)
        if sure:
            self.unsure[attributes].difference_update(prefixes)
        self.slots.setdefault(_keys(attributes)[1], set()).add(attributes)

    def answer(self, id: int, command: Command, ok: bool, number: int) -> None:
        """What became of a command."""
        attributes, busy = command.attributes, self.busy[command.attributes]
        # The others were sent for a table of this peer that is no more.
        prefixes = [prefix for prefix in command.prefixes if busy.get(prefix) == id]
        for prefix in prefixes:
            del busy[prefix]
        displaced: dict[str, list[str]] = {}
        if not ok:
            self.refused[attributes].update(prefixes)
            self.held[attributes].difference_update(prefixes)
            self.learn(attributes, prefixes, False)
        elif command.verb is Verb.ANNOUNCE:
            self.learn(attributes, prefixes, True)
            displaced = self._displace(attributes, prefixes)
        else:
            self._lose(attributes, prefixes)
            displaced = self._displace(attributes, prefixes)
        self.consider(attributes, prefixes, number)
        for other, gone in displaced.items():
            self.consider(other, gone, number)

    def _displace(self, attributes: str, prefixes: list[str]) -> dict[str, list[str]]:
        """A command for them was done: what else was in their slots is not there any more."""
        found = {}
        for other in sorted(self.slots.get(_keys(attributes)[1], set()) - {attributes}):
            held, unsure = self.held[other], self.unsure[other]
            found[other] = [prefix for prefix in prefixes if prefix in held or prefix in unsure]
            self._lose(other, found[other])
        return found

    def _lose(self, attributes: str, prefixes: list[str]) -> None:
        self.held[attributes].difference_update(prefixes)
        self.unsure[attributes].difference_update(prefixes)

    def take(self, verb: Verb, attributes: str, prefixes: tuple[str, ...], id: int) -> None:
        """These are in the command `id` now; what is left of their queue goes behind the others."""
        queue = self.todo[verb].pop(attributes)
        for prefix in prefixes:
            del queue[prefix]
        self.busy[attributes].update(dict.fromkeys(prefixes, id))
        if queue:
            self.todo[verb][attributes] = queue

    def consider(self, attributes: str, prefixes: Sequence[str], number: int) -> None:
        """Queue what these routes need now. Called whenever anything about them has changed."""
        held, unsure = self.held[attributes], self.unsure[attributes]
        busy, refused = self.busy[attributes], self.refused[attributes]
        announce: list[str] = []
        withdraw: list[str] = []
        right: list[str] = []
        stuck: list[str] = []
        for prefix in prefixes:
            if prefix in busy or prefix in refused:
                stuck.append(prefix)
            elif attributes in self.wanted.get(prefix, _NOTHING):
                (right if prefix in held else announce).append(prefix)
            else:
                (withdraw if prefix in held or prefix in unsure else right).append(prefix)
        later = self._defer(attributes, withdraw) if withdraw else set()
        if later:
            withdraw = [prefix for prefix in withdraw if prefix not in later]
        self._enqueue(Verb.ANNOUNCE, attributes, announce, (*withdraw, *right, *later))
        self._enqueue(Verb.WITHDRAW, attributes, withdraw, (*announce, *right, *later))
        pending = self.pending[attributes]
        for prefix in right:
            pending.pop(prefix, None)
        for prefix in (*stuck, *announce, *withdraw, *later):
            pending.setdefault(prefix, number)
        self._resume(attributes, prefixes, number)

    def _enqueue(
        self, verb: Verb, attributes: str, put: Iterable[str], drop: Iterable[str]
    ) -> None:
        """Put routes into a queue, and take others out."""
        queue = self.todo[verb].setdefault(attributes, {})
        if queue:
            for prefix in drop:
                queue.pop(prefix, None)
        queue.update(dict.fromkeys(put))
        if not queue:
            del self.todo[verb][attributes]

    def _defer(self, attributes: str, prefixes: Iterable[str]) -> set[str]:
        """Of these, not wanted any more, those that wait for another that takes their place."""
        later: set[str] = set()
        if self.foreign(attributes):
            return later
        kin = {a for key in _keys(attributes) for a in self.kin.get(key, ()) if a != attributes}
        rivals = sorted(kin)
        for prefix in prefixes:
            texts = self.wanted.get(prefix, _NOTHING)
            for new in rivals if self.has(prefix) else (*rivals, *texts):
                if new in texts and prefix not in self.held[new]:
                    self.deferred.setdefault(new, {}).setdefault(prefix, []).append(attributes)
                    later.add(prefix)
                    break
        return later

    def _resume(self, attributes: str, prefixes: Iterable[str], number: int) -> None:
        """Look again at what waited for these, if they are there, or wanted no more."""
        waiting, held = self.deferred.get(attributes), self.held[attributes]
        if not waiting:
            return
        for prefix in prefixes:
            if prefix in waiting and (prefix in held or not self.wants(attributes, prefix)):
                for old in waiting.pop(prefix):
                    self.consider(old, [prefix], number)

    def forget(self) -> None:
        """Drop all knowledge of what the peer has."""
        for grouped in self.todo.values():
            grouped.clear()
        for known in (self.held, self.unsure, self.refused, self.busy, self.pending, self.slots):
            known.clear()
        self.deferred.clear()

    def stray(self) -> bool:
        """Whether something of the kind that the modes do not have may still be there."""
        return any(
            prefixes and self.foreign(attributes)
            for known in (self.held, self.unsure, self.busy)
            for attributes, prefixes in known.items()
        )


@lru_cache(maxsize=1 << 16)
def _keys(attributes: str) -> tuple[str, str]:
    """What routes are kin by: the next hop, and the slot."""
    return f"hop {exabgp.next_hop(attributes)}", f"id {exabgp.path_id(attributes)}"


@lru_cache(maxsize=1 << 16)
def _version(attributes: str) -> int:
    """Of the routes, whose next hops are of their own family."""
    return ip_address(exabgp.next_hop(attributes)).version
