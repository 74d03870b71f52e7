"""What ExaBGP holds for one peer and has to send: its outgoing RIB, with the routes kept packed.

It stands in for ExaBGP's `OutgoingRIB`, which keeps four objects per route and peer, sorts and
packs them one by one: with 10,000 prefixes × 8 next hops that was 80 % of the processor time of a
load. Here a route is its NLRI as bytes, and all routes of one attributes text share a `Group`.
Rules, the same as ExaBGP's:

- The newest change of a route that has not been sent yet is the only one sent; different routes are
  sent in the order of their commands, so a new path goes out before the one that it replaces goes.
- What is being sent is not changed any more: what comes meanwhile follows it.
- A new session gets everything that is held, and nothing that was waiting when the old one ended.
- A route whose next hop is a route of ours too (a virtual next hop) is sent `RESOLVE_S` after that
  was new to the session, and what it replaces is withdrawn then: FRR 8.4 may leave out for ever
  what it could not resolve when it came.

Pure, but for the clock and the types of ExaBGP that it is handed. NLRI: RFC 4271 section 4.3; IPv6:
RFC 4760; path-ids: RFC 7911; one kind of route per UPDATE: RFC 7606 section 5.1.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from struct import pack
from typing import Any, Final, TypeAlias

Family: TypeAlias = tuple[Any, Any]  # ExaBGP's (AFI, SAFI)
Kind: TypeAlias = tuple[Family, bool]  # with whether the routes have a path-id

MARKER: Final = b"\xff" * 16
UPDATE: Final = 2
HEADER: Final = 19
LENGTHS: Final = 4  # of an UPDATE's withdrawn routes and of its attributes
MP: Final = 9  # of an MP attribute without next hop and routes: its header, family, lengths
MP_REACH, MP_UNREACH = 14, 15
OPTIONAL_LONG: Final = 0x90  # attribute flags: optional, two octets of length
ADD_PATH: Final = 4
IPV4: Final = 1
FEW: Final = 64
RESOLVE_S: Final = 0.5  # from a virtual next hop's routes to those that use it


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """What the routes of one attributes text share. `path_id`: four octets, or none."""

    family: Family
    path_id: bytes
    next_hop: bytes
    attributes: Any  # ExaBGP's Attributes

    @property
    def kind(self) -> Kind:
        """Of its routes."""
        return self.family, bool(self.path_id)

    def route(self, prefix: str) -> bytes:
        """The NLRI of a prefix; OSError or ValueError if it is none."""
        address, _, bits = prefix.partition("/")
        version = socket.AF_INET if self.family[0] == IPV4 else socket.AF_INET6
        packed = socket.inet_pton(version, address)
        return b"%b%c%b" % (self.path_id, int(bits), packed[: (int(bits) + 7) // 8])


@dataclass(eq=False, slots=True)
class Section:
    """Routes to be sent together: of one group, or withdrawn if `group` is None."""

    kind: Kind
    group: Group | None
    due_s: float = 0.0  # not to be sent before
    routes: dict[bytes, None] = field(default_factory=dict)

    def messages(self, negotiated: Any, include_withdraw: bool = True) -> Iterator[bytes]:
        """The UPDATEs for a session; without withdraws if it never had anything."""
        family, has_id = self.kind
        if family not in negotiated.families or (self.group is None and not include_withdraw):
            return
        routes: Iterable[bytes] = self.routes
        if negotiated.addpath.send(*family) != has_id:
            routes = [r[ADD_PATH:] if has_id else bytes(ADD_PATH) + r for r in routes]
        shared = b"" if self.group is None else self.group.attributes.pack(negotiated)
        hop = b"" if self.group is None else self.group.next_hop
        native = family[0] == IPV4
        size = negotiated.msg_size - HEADER - LENGTHS - len(shared)
        for nlri in _chunks(routes, size if native else size - MP - len(hop)):
            if not native:
                body = _attributes(shared + self._mp(family, hop, nlri))
            elif self.group is None:
                body = pack("!H", len(nlri)) + nlri + pack("!H", 0)
            else:
                body = _attributes(shared) + nlri
            yield MARKER + pack("!HB", HEADER + len(body), UPDATE) + body

    def _mp(self, family: Family, hop: bytes, nlri: bytes) -> bytes:
        afi, safi = family
        value = pack("!HB", int(afi), int(safi))
        if self.group is not None:
            value += pack("!B", len(hop)) + hop + bytes(1)
        code = MP_UNREACH if self.group is None else MP_REACH
        return pack("!BBH", OPTIONAL_LONG, code, len(value) + len(nlri)) + value + nlri


def _attributes(packed: bytes) -> bytes:
    return pack("!HH", 0, len(packed)) + packed


def _chunks(routes: Iterable[bytes], size: int) -> Iterator[bytes]:
    chunk: list[bytes] = []
    length = 0
    for route in routes:
        if length + len(route) > size:
            yield b"".join(chunk)
            chunk, length = [], 0
        chunk.append(route)
        length += len(route)
    if chunk:
        yield b"".join(chunk)


def _address(kind: Kind, route: bytes) -> bytes:
    return route[ADD_PATH + 1 :] if kind[1] else route[1:]


class Outbox:
    """One peer's routes. The methods that ExaBGP calls bear the names that it gives them."""

    def __init__(
        self,
        cache: bool,
        families: Iterable[Family],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.families = families
        self._clock = clock
        self.sending = 0  # updates that are under way
        self._held: dict[Kind, dict[bytes, Group]] = {}
        self._waiting: list[Section] = []
        self._section: dict[Kind, dict[bytes, Section]] = {}  # of each waiting route
        self._refresh: dict[Family, bool] = {}  # asked for again; whether its ends are marked
        self._came_s: dict[bytes, float] = {}  # by address of ours: when a path was new
        self._latest_s = 0.0  # after this nothing that waits is held back

    def announce(self, group: Group, routes: Iterable[bytes]) -> None:
        """Hold these routes and send them, but for those that the peer has been given just so."""
        held = self._held.setdefault(group.kind, {})
        fresh = [route for route in routes if held.get(route) is not group]
        held.update(dict.fromkeys(fresh, group))
        came_s = self._came_s.get(group.next_hop)
        if came_s is None:  # nothing leads to what is led on
            addresses = [_address(group.kind, route) for route in fresh]
            self._came_s.update(dict.fromkeys(addresses, self._clock()))
        self._queue(group.kind, group, fresh, 0.0 if came_s is None else came_s + RESOLVE_S)

    def withdraw(self, group: Group, routes: Iterable[bytes]) -> None:
        """Withdraw these routes, whether they were there or not."""
        held, gone = self._held.setdefault(group.kind, {}), list(routes)
        for route in gone:
            held.pop(route, None)
        self._forget()
        later = self._later()
        if not later:
            self._queue(group.kind, None, gone)
            return
        for route in gone:
            newer, due_s = later.get(_address(group.kind, route), (route, 0.0))
            self._queue(group.kind, None, (route,), 0.0 if newer == route else due_s)

    def _forget(self) -> None:
        """Drop the times of addresses that are ours no more, when they may be most."""
        if len(self._came_s) > 2 * sum(map(len, self._held.values())) + FEW:
            ours = {_address(kind, route) for kind, held in self._held.items() for route in held}
            self._came_s = {one: at_s for one, at_s in self._came_s.items() if one in ours}

    def _later(self) -> dict[bytes, tuple[bytes, float]]:
        """By address: what is not to be sent yet, and until when."""
        now_s = self._clock() if self._latest_s else 0.0
        if now_s >= self._latest_s:
            return {}
        return {
            _address(section.kind, route): (route, section.due_s)
            for section in self._waiting
            if section.due_s > now_s
            for route in section.routes
        }

    def _queue(
        self, kind: Kind, group: Group | None, routes: Iterable[bytes], due_s: float = 0.0
    ) -> None:
        self._latest_s = max(self._latest_s, due_s)
        last = self._waiting[-1] if self._waiting else None
        if last is None or (last.kind, last.group, last.due_s) != (kind, group, due_s):
            last = Section(kind, group, due_s)
            self._waiting.append(last)
        where = self._section.setdefault(kind, {})
        for route in routes:
            older = where.get(route)
            if older is not None:
                del older.routes[route]
            last.routes[route] = None
            where[route] = last

    # what ExaBGP calls

    def pending(self) -> bool:
        """Whether something is to be sent now."""
        now_s = self._clock() if self._waiting else 0.0
        return bool(self._refresh) or any(section.due_s <= now_s for section in self._waiting)

    @property
    def flushed(self) -> bool:
        """Whether all is sent."""
        return not (self._waiting or self._refresh or self.sending)

    def updates(self, grouped: bool) -> Generator[Any, None, None]:
        """What waits, as things that have `messages`."""
        from exabgp.bgp.message.refresh import RouteRefresh

        refresh, waiting, now_s = self._refresh, self._waiting, self._clock()
        self.reset()
        self._waiting = [section for section in waiting if section.due_s > now_s]
        for section in self._waiting:
            where = self._section.setdefault(section.kind, {})
            where.update(dict.fromkeys(section.routes, section))
        self.sending += 1
        try:
            for family, marked in refresh.items():
                if marked:
                    yield RouteRefresh(*family, RouteRefresh.start)
                yield from self._all(family)
                if marked:
                    yield RouteRefresh(*family, RouteRefresh.end)
            yield from (section for section in waiting if section.due_s <= now_s)
        finally:
            self.sending -= 1

    def _all(self, family: Family) -> list[Section]:
        sections: dict[Group, Section] = {}
        for kind, held in self._held.items():
            if kind[0] == family:
                for route, group in held.items():
                    if group not in sections:
                        sections[group] = Section(kind, group)
                    sections[group].routes[route] = None
        return list(sections.values())

    def reset(self) -> None:
        """Forget what waits: the session ended."""
        self._waiting, self._section, self._refresh = [], {}, {}

    def clear(self) -> None:
        """Forget everything."""
        self._held, self._came_s = {}, {}
        self.reset()

    def resend(self, enhanced: bool, family: Family | None = None) -> None:
        """The peer asked for a family again; enhanced: its ends are marked (RFC 7313)."""
        for one in self.families if family is None else (family,):
            self._refresh[one] = enhanced

    def replace_restart(self, previous: list[Any], new: list[Any]) -> None:
        """A session came up: send everything. There are no routes in the configuration."""
        now_s = self._clock()
        sections = [section for family in self.families for section in self._all(family)]
        self._came_s = {
            _address(section.kind, route): now_s
            for section in sections
            if section.group is not None and section.group.next_hop not in self._came_s
            for route in section.routes
        }
        for section in sections:
            hop = b"" if section.group is None else section.group.next_hop
            due_s = now_s + RESOLVE_S if hop in self._came_s else 0.0
            self._queue(section.kind, section.group, section.routes, due_s)

    def replace_reload(self, previous: list[Any], new: list[Any]) -> None:
        """The configuration was loaded again. There are no routes in it."""

    def delete_cached_family(self, families: Iterable[Family]) -> None:
        """Forget the routes of all other families."""
        self._held = {kind: held for kind, held in self._held.items() if kind[0] in families}
