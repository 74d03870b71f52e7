"""From desired paths to ExaBGP commands and back: what to send next, and what is known to be there.

Pure and sans-IO, as h11 is: the port feeds what arrived (`connected`, `held`, `acknowledged` …) and
asks `take()` what to send. Rules:

- At most `WINDOW` commands are in flight; withdraws go before announces; up to 200 prefixes with
  the same attributes share a command. Attribute sets take turns, so that all next hops of a prefix
  come close together: a switch then works out its route once, not once for each next hop.
- A withdraw carries its announce's attributes. Where a new path replaces one by the same next hop
  or in the same slot, the announce is acknowledged before the old path is withdrawn. A *slot* is
  what BGP tells apart: (prefix, path-id), or the prefix alone towards a peer without ADD-PATH; what
  an announce replaced in its own slot needs no withdraw, and must not get one.
- A peer gets nothing before its first `negotiated`: only then is it known which families it takes,
  and of each how many paths. If that changes, everything of the old kind is withdrawn and on the
  wire before the new is sent.
- What a lost command did is unknown: such routes are `unsure`, and are sent again or withdrawn.
- The desired state is taken whole, as a persistent map by prefix (`by_prefix`): the difference to
  the last is worked out here, at the cost of the prefixes that changed.
- `settled` is the greatest number whose routes are acknowledged and, by a later barrier, on the
  wire of every established session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from lbctl.core import exabgp
from lbctl.core.announce_table import Route, Table
from lbctl.core.exabgp import Command, Verb
from lbctl.core.model import Agreed, Network, Path
from lbctl.core.pmap import PMap, changed
from lbctl.errors import MessageError, SpeakerError

WINDOW: Final = 32
PRUNE_EVERY: Final = 512  # numbers between two clearances of what is remembered for speed


Paths: TypeAlias = frozenset[Path] | PMap[Network, frozenset[Path]]
Routes: TypeAlias = dict[int, list[Route]]  # by family, 4 and 6
_NONE: Final[frozenset[Path]] = frozenset()


def by_prefix(paths: Paths) -> PMap[Network, frozenset[Path]]:
    """The paths of each prefix. What is a map already stays the same object."""
    if isinstance(paths, PMap):
        return paths
    found: dict[Network, set[Path]] = {}
    for path in paths:
        found.setdefault(path.prefix, set()).add(path)
    return PMap({prefix: frozenset(several) for prefix, several in found.items()})


@dataclass(frozen=True, slots=True)
class Held:
    """What the speaker's ledger says of a peer: these prefixes, with these attributes.

    `sure` is False when the command's outcome was never heard.
    """

    peer: str
    attributes: str
    prefixes: tuple[str, ...]
    sure: bool


class LinkState(StrEnum):
    """The link to the speaker."""

    AWAY = "Away"
    SYNCING = "Syncing"  # connected; what ExaBGP holds is not known (yet, or any more)
    READY = "Ready"


class LinkEvent(StrEnum):
    """What happens to the link."""

    CONNECTED = "Connected"
    HELD = "Held"
    PAUSED = "Paused"  # ExaBGP or its relay is gone
    CLOSED = "Closed"


TRANSITIONS: Final[dict[tuple[LinkState, LinkEvent], LinkState]] = {
    (LinkState.AWAY, LinkEvent.CONNECTED): LinkState.SYNCING,
    (LinkState.AWAY, LinkEvent.CLOSED): LinkState.AWAY,
    (LinkState.SYNCING, LinkEvent.HELD): LinkState.READY,
    (LinkState.SYNCING, LinkEvent.PAUSED): LinkState.SYNCING,
    (LinkState.SYNCING, LinkEvent.CLOSED): LinkState.AWAY,
    (LinkState.READY, LinkEvent.HELD): LinkState.READY,
    (LinkState.READY, LinkEvent.PAUSED): LinkState.SYNCING,
    (LinkState.READY, LinkEvent.CLOSED): LinkState.AWAY,
}


@dataclass(frozen=True, slots=True)
class Send:
    """Something to send: a command, or a barrier if `command` is None."""

    id: int
    command: Command | None = None


class Announcer:
    """The planner for all peers. Not thread-safe; every method returns at once."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._state = LinkState.AWAY
        self._number = 0
        self._paths: PMap[Network, frozenset[Path]] = PMap()
        self._tables: dict[str, Table] = {}
        self._modes: dict[str, dict[int, bool]] = {}
        self._up: set[str] = set()
        self._unclaimed: dict[str, list[Held]] = {}  # of peers that are not wanted (yet)
        self._texts: dict[tuple[object, ...], str] = {}
        self._in_flight: dict[int, Command] = {}
        self._next_id = 1
        self._barrier: tuple[int, int] | None = None  # (id, number that was acknowledged then)
        self._flushed = 0

    @property
    def state(self) -> LinkState:
        """Of the link."""
        return self._state

    @property
    def in_flight(self) -> int:
        """Commands sent and not answered."""
        return len(self._in_flight)

    @property
    def settled(self) -> int:
        """The greatest number of `want` that every established session has on the wire."""
        return min(self._flushed, self._acknowledged())

    # what shall be

    def want(self, peers: Iterable[str], paths: Paths) -> int:
        """Set the whole desired state; returns its number.

        `peers` are canonical addresses. SpeakerError, with nothing changed, if a value is not valid
        or one (prefix, path-id) occurs twice.
        """
        before, after = self._paths, by_prefix(paths)
        added: list[tuple[Network, Iterable[Path]]] = []
        removed: list[tuple[Network, Iterable[Path]]] = []
        touched = changed(before, after)
        for prefix in touched:
            was, now = before.get(prefix, _NONE), after.get(prefix, _NONE)
            fresh, lost = now - was, was - now
            _check(prefix, now, fresh)
            if fresh:
                added.append((prefix, fresh))
            if lost:
                removed.append((prefix, lost))
        new, gone = self._routes(added, True), self._routes(removed, True)
        self._number += 1
        if self._number % PRUNE_EVERY == 0:
            self._texts.clear()
            for table in self._tables.values():
                table.prune()
        wanted_peers = sorted(set(peers))
        for peer in sorted(set(self._tables) - set(wanted_peers)):
            table = self._tables.pop(peer)
            left = sorted(table.held | table.unsure | table.busy.keys())
            self._unclaimed[peer] = [Held(peer, r.attributes, (r.prefix,), False) for r in left]
        self._paths = after
        for peer in wanted_peers:
            known = self._tables.get(peer)
            if known is None:
                self._tables[peer] = table = Table(peer, self._modes.get(peer), peer in self._up)
                self._learn(table, self._unclaimed.pop(peer, ()))
                self._fill(table)
            elif touched:
                self._follow(known, new, gone, before, touched)
        return self._number

    def _text(self, path: Path, identified: bool) -> str:
        hop = path.next_hop
        key = (int(hop), hop.version, path.path_id, path.communities, path.med, identified)
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = exabgp.attributes(path, identified)
        return text

    def _routes(self, paths: Iterable[tuple[Network, Iterable[Path]]], several: bool) -> Routes:
        """The routes for a peer, by family and in order: all paths, or the first of each prefix."""
        routes: Routes = {4: [], 6: []}
        for prefix, some in sorted(paths, key=_order):
            ranked = sorted(some, key=_rank)
            text = exabgp.prefix(prefix, *(path.next_hop for path in ranked))
            for path in ranked if several else ranked[:1]:
                routes[prefix.version].append(Route(self._text(path, several), text))
        return routes

    def _fill(self, table: Table) -> None:
        """Make `wanted` anew."""
        old = table.empty()
        fresh = [
            route
            for version, several in sorted((table.modes or {}).items())
            for route in self._routes(_of_family(self._paths, self._paths, version), several)[
                version
            ]
        ]
        for route in fresh:
            table.want(route)
        for route in (*sorted(old - table.wanted), *fresh):
            self._consider(table, route)

    def _follow(
        self,
        table: Table,
        new: Routes,
        gone: Routes,
        before: Mapping[Network, frozenset[Path]],
        touched: set[Network],
    ) -> None:
        """Take in what changed, family by family; new, gone: the routes of a peer with ADD-PATH."""
        for version, several in sorted((table.modes or {}).items()):
            fresh, old = new[version], gone[version]
            if not several:  # look again which path of these prefixes it gets
                fresh = self._routes(_of_family(self._paths, touched, version), False)[version]
                old = self._routes(_of_family(before, touched, version), False)[version]
            table.wanted.difference_update(old)
            for route in fresh:
                table.want(route)
            for route in (*old, *fresh):
                self._consider(table, route)

    def _consider(self, table: Table, route: Route) -> None:
        table.consider(route, self._number)
        if route not in table.wanted or route in table.held:
            for old in table.deferred.pop(route, ()):
                self._consider(table, old)

    # what happens

    def _move(self, event: LinkEvent) -> None:
        state = TRANSITIONS.get((self._state, event))
        if state is None:
            raise MessageError(f"{event} makes no sense while the link is {self._state}")
        self._state = state

    def connected(self) -> None:
        """The socket to the speaker is open."""
        self._move(LinkEvent.CONNECTED)

    def closed(self) -> None:
        """The socket is closed: nothing is known any more."""
        self._move(LinkEvent.CLOSED)
        self._lose()
        self._up.clear()
        for table in self._tables.values():
            table.up = False

    def paused(self) -> None:
        """ExaBGP or its relay went away; a `held` follows when it is back."""
        self._move(LinkEvent.PAUSED)
        self._lose()

    def _lose(self) -> None:
        self._in_flight.clear()
        self._barrier = None
        self._unflush()

    def _unflush(self) -> None:
        """The newest number has to be seen on the wire again."""
        self._flushed = min(self._flushed, max(self._number - 1, 0))

    def held(self, ledger: Iterable[Held]) -> None:
        """What ExaBGP holds, whole: plan from there. Answers to older commands are ignored."""
        self._move(LinkEvent.HELD)
        self._lose()
        for table in self._tables.values():
            table.forget()
        self._unclaimed = {}
        for entry in ledger:
            self._unclaimed.setdefault(entry.peer, []).append(entry)
        for peer, table in sorted(self._tables.items()):
            self._learn(table, self._unclaimed.pop(peer, ()))

    def _learn(self, table: Table, ledger: Iterable[Held]) -> None:
        """Plan for a peer of which exactly this is known."""
        for entry in ledger:
            routes = [Route(entry.attributes, prefix) for prefix in entry.prefixes]
            table.learn(entry.attributes, routes, entry.sure)
        table.unsure -= table.held
        table.blocked = table.modes is not None and table.stray()
        if table.modes is not None:
            for route in sorted(table.wanted | table.held | table.unsure):
                self._consider(table, route)

    def negotiated(self, peer: str, agreed: Agreed) -> None:
        """A session agreed on these families, and whether we may send several paths per prefix."""
        self._modes[peer] = modes = dict(agreed)
        table = self._tables.get(peer)
        if table is None or table.modes == modes:
            return
        table.modes = modes
        table.blocked = table.stray()
        self._fill(table)
        for route in sorted((table.held | table.unsure) - table.wanted):
            self._consider(table, route)

    def established(self, peer: str, up: bool) -> None:
        """A session came up or went down. ExaBGP sends all again by itself when it comes up."""
        (self._up.add if up else self._up.discard)(peer)
        if (table := self._tables.get(peer)) is not None:
            table.up = up
            if up:
                self._unflush()
                self._barrier = None if self._barrier is None else (self._barrier[0], 0)

    def acknowledged(self, id: int, ok: bool) -> None:
        """The answer to a command. Refused routes wait for `retry`; unknown ids are ignored."""
        command = self._in_flight.pop(id, None)
        if command is None:
            if self._barrier is not None and self._barrier[0] == id:
                self._barrier = None
            return
        for peer in command.peers:
            if (table := self._tables.get(peer)) is not None:
                self._answer(table, id, command, ok)

    def _answer(self, table: Table, id: int, command: Command, ok: bool) -> None:
        routes = [Route(command.attributes, prefix) for prefix in command.prefixes]
        # The others were sent for a table of this peer that is no more.
        routes = [route for route in routes if table.busy.get(route) == id]
        for route in routes:
            del table.busy[route]
        if not ok:
            table.refused.update(routes)
            table.held.difference_update(routes)
            table.learn(command.attributes, routes, False)
        elif command.verb is Verb.ANNOUNCE:
            table.learn(command.attributes, routes, True)
            routes += table.displace(command.attributes, routes)
        else:
            table.lose(routes)
            routes += table.displace(command.attributes, routes)
        for route in routes:
            self._consider(table, route)

    def retry(self) -> None:
        """Try again what was refused. The port calls it now and then."""
        for _, table in sorted(self._tables.items()):
            refused, table.refused = sorted(table.refused), set()
            for route in refused:
                self._consider(table, route)

    def barrier(self, id: int, flushed: dict[str, bool]) -> bool:
        """The answer to a barrier; returns whether every established session was flushed."""
        if self._barrier is None or self._barrier[0] != id:
            return True
        number, self._barrier = self._barrier[1], None
        complete = True
        for table in self._tables.values():
            done = not table.up or flushed.get(table.peer, True)
            complete = complete and done
            if done and table.blocked and not table.stray():
                table.blocked = False
        if complete:
            self._flushed = max(self._flushed, number)
        return complete

    # what to send

    def _acknowledged(self) -> int:
        """The greatest number of which nothing is pending."""
        if self._state is not LinkState.READY:
            return 0
        firsts = (next(iter(t.pending.values())) for t in self._tables.values() if t.pending)
        return min(firsts, default=self._number + 1) - 1

    def take(self) -> tuple[Send, ...]:
        """What to send now; all of it must be sent, in this order."""
        sends: list[Send] = []
        if self._state is not LinkState.READY:
            return ()
        while len(self._in_flight) < self._window:
            command = self._batch(Verb.WITHDRAW) or self._batch(Verb.ANNOUNCE)
            if command is None:
                break
            self._in_flight[self._next_id] = command
            sends.append(Send(self._next_id, command))
            self._next_id += 1
        number = self._acknowledged()
        blocked = any(table.blocked and not table.stray() for table in self._tables.values())
        if self._barrier is None and (number > self._flushed or blocked):
            self._barrier = (self._next_id, number)
            sends.append(Send(self._next_id))
            self._next_id += 1
        return tuple(sends)

    def _batch(self, verb: Verb) -> Command | None:
        """The next batch: one attributes text, the peers that all need the same prefixes of it."""
        tables = [
            table
            for _, table in sorted(self._tables.items())
            if table.todo[verb] and not (table.blocked and verb is Verb.ANNOUNCE)
        ]
        if not tables:
            return None
        first = tables[0]
        attributes, queue = next(iter(first.todo[verb].items()))
        prefixes = tuple(
            prefix for prefix, _ in zip(queue, range(exabgp.MAX_PREFIXES), strict=False)
        )
        chosen = [
            table
            for table in tables
            if table is first or table.todo[verb].get(attributes, {}).keys() >= set(prefixes)
        ]
        for table in chosen:
            table.take(verb, attributes, prefixes, self._next_id)
        return Command(verb, tuple(table.peer for table in chosen), attributes, prefixes)


def _order(entry: tuple[Network, object]) -> tuple[int, int, int]:
    prefix = entry[0]
    return prefix.version, int(prefix.network_address), prefix.prefixlen


def _rank(path: Path) -> tuple[int, int]:
    return int(path.next_hop), path.path_id


def _of_family(
    paths: Mapping[Network, frozenset[Path]], prefixes: Iterable[Network], version: int
) -> Iterator[tuple[Network, frozenset[Path]]]:
    return ((p, paths.get(p, _NONE)) for p in prefixes if p.version == version)


def _check(prefix: Network, paths: frozenset[Path], fresh: Iterable[Path]) -> None:
    if any(path.prefix is not prefix and path.prefix != prefix for path in fresh):
        raise SpeakerError(f"a path of {prefix} is for another prefix")
    if len({path.path_id for path in paths}) != len(paths):
        raise SpeakerError("two paths have the same prefix and path-id")
