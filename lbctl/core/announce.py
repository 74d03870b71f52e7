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
- What leads to a prefix of ours (a virtual next hop, `lbctl.core.virtual`) is announced after that.
- A peer gets nothing before its first `negotiated`: only then is it known which families it takes,
  and of each how many paths. If that changes, everything of the old kind is withdrawn and on the
  wire before the new is sent.
- What a lost command did is unknown: such routes are `unsure`, and are sent again or withdrawn.
- The desired state is taken whole, as a persistent map by prefix: the difference to the last is
  worked out here, at the cost of the prefixes that changed. `want` notes what these shall have now;
  `plan` takes some of them at a time, those that lose a path first. Until these are all planned
  no announce is sent: a node that goes overtakes a load in progress, whatever of it is not in
  flight yet.
- End-of-RIB (RFC 4724) is due to each session once, when the desired state that it found is on its
  wire: before the first `want` there is none, and a refused route holds it back.
- `settled` is the greatest number whose routes are acknowledged and, by a later barrier, on the
  wire of every established session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

from lbctl.core import exabgp
from lbctl.core.announce_table import Table, Texts
from lbctl.core.exabgp import Command, Verb
from lbctl.core.model import Agreed, Network, Path
from lbctl.core.pmap import PMap, differences
from lbctl.errors import MessageError, SpeakerError

WINDOW: Final = 32
SLICE: Final = exabgp.MAX_PREFIXES  # prefixes planned at a time: a command for each attributes
PRUNE_EVERY: Final = 512  # numbers between two clearances of what is remembered for speed

Paths: TypeAlias = PMap[Network, frozenset[Path]]
_NONE: Final[frozenset[Path]] = frozenset()


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


class _Desired(NamedTuple):
    """What prefixes of a family shall have: where a peer takes one path, and where several."""

    version: int
    one: Texts
    several: Texts


class Announcer:
    """The planner for all peers. Not thread-safe; every method returns at once."""

    def __init__(self, window: int = WINDOW, slice_: int = SLICE) -> None:
        self._window, self._slice = window, slice_
        self._state = LinkState.AWAY
        self._number = 0
        self._paths: Paths = PMap()
        self._tables: dict[str, Table] = {}
        self._modes: dict[str, dict[int, bool]] = {}
        self._up: set[str] = set()
        self._unclaimed: dict[str, list[Held]] = {}  # of peers that are not wanted (yet)
        self._losing: dict[str, _Desired] = {}  # to be planned, first those that lose a path
        self._coming: dict[str, _Desired] = {}
        self._since = 0  # the number at which there began to be something to plan
        self._known: dict[tuple[int, frozenset[Path]], _Desired] = {}  # by family
        self._in_flight: dict[int, Command] = {}
        self._next_id = 1
        self._barrier: tuple[int, int] | None = None  # (id, number that was acknowledged then)
        self._flushed = 0
        self._complete: list[str] = []

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
        losing: dict[str, _Desired] = {}
        coming: dict[str, _Desired] = {}
        for prefix, was, now in sorted(differences(self._paths, paths), key=lambda d: _order(d[0])):
            before, after = was or _NONE, now or _NONE
            desired = self._desired(prefix.version, after)
            if before != after:
                queue = coming if before <= after else losing
                queue[exabgp.prefix(prefix)] = desired
        self._number += 1
        if self._number % PRUNE_EVERY == 0:
            self._prune()
        self._paths = paths
        self._note(losing, coming, self._number)
        wanted_peers = sorted(set(peers))
        for peer in sorted(set(self._tables) - set(wanted_peers)):
            table = self._tables.pop(peer)
            left = sorted(table.there().items())
            self._unclaimed[peer] = [Held(peer, a, tuple(sorted(p)), False) for a, p in left]
        for peer in wanted_peers:
            if peer not in self._tables:
                self._tables[peer] = table = Table(peer, self._modes.get(peer), peer in self._up)
                self._learn(table, self._unclaimed.pop(peer, ()), self._label())
        return self._number

    def _desired(self, version: int, paths: frozenset[Path]) -> _Desired:
        """What these paths are to prefixes of a family; SpeakerError if they are not valid.

        EIPs are many, sets of paths few.
        """
        known = self._known.get((version, paths))
        if known is None:
            texts = {path: exabgp.attributes(path) for path in paths}
            if any(path.next_hop.version != version for path in paths):
                raise SpeakerError(f"a next hop is not of the family of its prefix, IPv{version}")
            if len({path.path_id for path in paths}) != len(paths):
                raise SpeakerError("two paths have the same prefix and path-id")
            ranked = sorted(paths, key=lambda path: (int(path.next_hop), path.path_id))
            one = dict.fromkeys([exabgp.attributes(path, False) for path in ranked[:1]])
            several = dict.fromkeys([texts[path] for path in ranked])
            known = self._known[version, paths] = _Desired(version, one, several)
        return known

    def _prune(self) -> None:
        self._known.clear()
        for table in self._tables.values():
            table.prune()

    # planning

    def _note(
        self, losing: Mapping[str, _Desired], coming: Mapping[str, _Desired], number: int
    ) -> None:
        """These prefixes have to be planned, as of this number."""
        idle = not self._losing and not self._coming
        self._since = number if idle else min(self._since, number)
        for text in losing:
            self._coming.pop(text, None)
        self._losing.update(losing)
        for text, desired in coming.items():
            (self._losing if text in self._losing else self._coming)[text] = desired

    def plan(self) -> bool:
        """Plan a slice of what changed; returns whether something is left to plan."""
        number, left = self._label(), self._slice
        while left > 0 and (queue := self._losing or self._coming):
            listed = list(islice(queue.items(), left))
            left -= len(listed)
            for text, _ in listed:
                del queue[text]
            for _, table in sorted(self._tables.items()):
                table.want(_texts(listed, table.modes or {}), number)
        return bool(self._losing or self._coming)

    def _fill(self, table: Table, number: int) -> None:
        """Make `wanted` anew, as of this number, in slices if the peer has nothing yet.

        Else in one piece: what it has is withdrawn unless it is wanted.
        """
        table.empty()
        if table.modes is None:
            return
        paths = sorted(self._paths.items(), key=lambda item: _order(item[0]))
        every = {str(prefix): self._desired(prefix.version, some) for prefix, some in paths}
        self._note({}, every, number)
        there = sorted(table.there().items())
        while there and self.plan():
            pass
        for attributes, prefixes in there:
            gone = [prefix for prefix in sorted(prefixes) if not table.wants(attributes, prefix)]
            table.consider(attributes, gone, number)

    def _label(self) -> int:
        """The oldest number that routes which are looked at now may be of."""
        return self._since if self._losing or self._coming else self._number

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
            # What was in flight may be of any number that has not been on the wire yet.
            self._learn(table, self._unclaimed.pop(peer, ()), self._flushed + 1)

    def _learn(self, table: Table, ledger: Iterable[Held], number: int) -> None:
        """Plan for a peer of which exactly this is known."""
        table.due = self._number
        for entry in ledger:
            table.learn(entry.attributes, entry.prefixes, entry.sure)
        for attributes, prefixes in table.unsure.items():
            prefixes -= table.held[attributes]
        table.blocked = table.modes is not None and table.stray()
        self._fill(table, number)

    def negotiated(self, peer: str, agreed: Agreed) -> None:
        """A session agreed on these families, and whether we may send several paths per prefix."""
        self._modes[peer] = modes = dict(agreed)
        table = self._tables.get(peer)
        if table is None or table.modes == modes:
            return
        table.modes = modes
        table.blocked = table.stray()
        self._fill(table, self._label())

    def established(self, peer: str, up: bool) -> None:
        """A session came up or went down. ExaBGP sends all again by itself when it comes up."""
        (self._up.add if up else self._up.discard)(peer)
        if (table := self._tables.get(peer)) is not None:
            table.up = up
            if up:
                table.due = self._number
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
                table.answer(id, command, ok, self._label())

    def retry(self) -> None:
        """Try again what was refused. The port calls it now and then."""
        for _, table in sorted(self._tables.items()):
            refused = sorted(table.refused.items())
            table.refused.clear()
            for attributes, prefixes in refused:
                table.consider(attributes, sorted(prefixes), self._label())

    def barrier(self, id: int, flushed: dict[str, bool]) -> bool:
        """The answer to a barrier; returns whether every established session was flushed."""
        if self._barrier is None or self._barrier[0] != id:
            return True
        number, self._barrier = self._barrier[1], None
        complete = True
        for table in self._tables.values():
            done = not table.up or flushed.get(table.peer, True)
            complete = complete and done
            if done and table.up and table.modes is not None and 0 < table.due <= number:
                table.due = 0
                self._complete.append(table.peer)
            if done and table.blocked and not table.stray():
                table.blocked = False
        if complete:
            self._flushed = max(self._flushed, number)
        return complete

    # what to send

    def completed(self) -> tuple[str, ...]:
        """The peers to which End-of-RIB became due since this was last asked."""
        complete, self._complete = tuple(self._complete), []
        return complete

    def _acknowledged(self) -> int:
        """The greatest number of which nothing is pending."""
        if self._state is not LinkState.READY:
            return 0
        oldest = (table.oldest() for table in self._tables.values())
        firsts = [number for number in oldest if number is not None]
        if self._losing or self._coming:
            firsts.append(self._since)
        return min(firsts, default=self._number + 1) - 1

    def take(self) -> tuple[Send, ...]:
        """What to send now of what is planned; all of it must be sent, in this order."""
        sends: list[Send] = []
        if self._state is not LinkState.READY:
            return ()
        while len(self._in_flight) < self._window:
            command = self._batch(Verb.WITHDRAW)
            if command is None and not self._losing:
                command = self._batch(Verb.ANNOUNCE)
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
        tables = [table for _, table in sorted(self._tables.items()) if table.todo[verb]]
        found = (
            (table, attributes)
            for table in tables
            for attributes in table.todo[verb]
            if self._ready(verb, attributes, table)
        )
        first, attributes = next(found, (None, ""))
        if first is None:
            return None
        prefixes = tuple(islice(first.todo[verb][attributes], exabgp.MAX_PREFIXES))
        chosen = [
            table
            for table in tables
            if table.todo[verb].get(attributes, {}).keys() >= set(prefixes)
            and self._ready(verb, attributes, table)
        ]
        for table in chosen:
            table.take(verb, attributes, prefixes, self._next_id)
        return Command(verb, tuple(table.peer for table in chosen), attributes, prefixes)

    def _ready(self, verb: Verb, attributes: str, table: Table) -> bool:
        """Whether the peer may have it: what leads to a prefix of ours comes after that."""
        if verb is Verb.WITHDRAW:
            return True
        hop = exabgp.host(exabgp.next_hop(attributes))
        return not table.blocked and (not self._paths.get(hop) or table.has(str(hop)))


def _texts(
    listed: Iterable[tuple[str, _Desired]], modes: Mapping[int, bool]
) -> Iterator[tuple[str, Texts]]:
    """What a peer shall have of these prefixes, if it takes their family."""
    for prefix, desired in listed:
        several = modes.get(desired.version)
        if several is not None:
            yield prefix, desired.several if several else desired.one


def _order(prefix: Network) -> tuple[int, int, int]:
    return prefix.version, int(prefix.network_address), prefix.prefixlen
