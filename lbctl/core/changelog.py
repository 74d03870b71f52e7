"""What an agent has confirmed, with the generation of each change, so that managers can catch up.

Rules: `replace` takes the whole state and works out the difference; the generation rises by one for
each replace that changes something. A page lists changes in the order (generation, address), so an
entry that changes while somebody reads simply appears again later, and nothing is missed. Removals
are remembered for the last MAX_REMOVED; whoever is further behind gets the full list. Both ends
use persistent maps, so that a change costs what changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import islice

from lbctl.core.model import Address, Behind
from lbctl.core.pmap import PMap, PSet, changed, persistent
from lbctl.core.probe import PAGE_ROOM, Cursor, Entry, Page, PageRequest, address_key, entry_bytes

MAX_REMOVED = 4096


class ChangeLog:
    """The list of one agent process. `boot` names the process: generations start anew with it."""

    def __init__(self, boot: int) -> None:
        self.boot = boot
        self.generation = 0
        self._floor = 0  # removals up to this generation are forgotten
        self._changed: dict[bytes, tuple[int, Entry]] = {}
        self._confirmed: Mapping[Address, Behind] = PMap()
        self._removed: dict[bytes, int] = {}  # the oldest first
        self._order: list[tuple[int, bytes]] = []  # with outdated places, skipped when read

    def replace(self, confirmed: Mapping[Address, Behind]) -> bool:
        """Take the whole of what is confirmed: EIP → what is behind it.

        Returns whether something changed.
        """
        touched = changed(self._confirmed, confirmed)
        self._confirmed = persistent(confirmed)
        changes: dict[bytes, Entry] = {}
        for address in touched:
            key, behind = address_key(address), confirmed.get(address)
            entry = Entry(address, behind is not None, behind or Behind.NOTHING)
            if self._entry(key) != entry:
                changes[key] = entry
        if not changes:
            return False
        self.generation += 1
        for key in sorted(changes):
            self._changed[key] = (self.generation, changes[key])
            self._order.append((self.generation, key))
            self._removed.pop(key, None)
            if not changes[key].present:
                self._removed[key] = self.generation
        self._forget()
        return True

    def confirmed(self) -> int:
        """Return how many EIPs are confirmed."""
        return len(self._confirmed)

    def page(self, request: PageRequest) -> Page:
        """Answer a PageRequest; the answer fits into one datagram."""
        known = request.boot == self.boot and request.since >= self._floor
        cursor = request.cursor if known else Cursor(0)
        room = PAGE_ROOM
        entries: list[Entry] = []
        last = cursor
        start = bisect_right(self._order, (cursor.generation, cursor.address))
        for generation, key in self._order[start:]:
            changed, entry = self._changed.get(key, (0, None))
            if entry is None or changed != generation or not (known or entry.present):
                continue
            room -= entry_bytes(entry.address)
            if room < 0:
                return self._page(request.nonce, not known, entries, last)
            entries.append(entry)
            last = Cursor(generation, key)
        return self._page(request.nonce, not known, entries, None)

    def _page(self, nonce: int, full: bool, entries: list[Entry], cursor: Cursor | None) -> Page:
        return Page(nonce, self.boot, self.generation, full, tuple(entries), cursor)

    def _entry(self, key: bytes) -> Entry | None:
        found = self._changed.get(key)
        return found[1] if found else None

    def _forget(self) -> None:
        """Drop the oldest removals beyond the bound, and the outdated places of the order."""
        for key in list(islice(self._removed, max(0, len(self._removed) - MAX_REMOVED))):
            self._floor = self._removed.pop(key)
            del self._changed[key]
        if len(self._order) > 2 * len(self._changed) + 64:
            self._order = sorted((gen, key) for key, (gen, _) in self._changed.items())


class PageReader:
    """The manager's side: asks for pages until the list is complete; keeps the last complete one.

    Pure: `request(nonce)` says what to send, `take(page)` takes what came back.
    """

    def __init__(self) -> None:
        self.boot = 0
        self.generation = 0
        self.confirmed: PSet[Address] = PSet()
        self.empty: PSet[Address] = PSet()
        self.local_ready: PSet[Address] = PSet()
        self._boot = 0  # of the list that is being read
        self._since = 0
        self._cursor = Cursor(0)
        self._reading: PMap[Address, None] = PMap()
        self._empty: PMap[Address, None] = PMap()
        self._local: PMap[Address, None] = PMap()

    def current(self, boot: int, generation: int) -> bool:
        """Return whether the complete list is that of this boot and generation."""
        return (boot, generation) == (self.boot, self.generation)

    def request(self, nonce: int) -> PageRequest:
        """Return the next request; the same again (with a new nonce) when a page was lost."""
        return PageRequest(nonce, self._boot, self._since, self._cursor)

    def take(self, page: Page) -> bool:
        """Take a page that answers the last request. Returns whether the list is complete."""
        if page.full or page.boot != self._boot:
            # Removals after this moment will be listed; those before concern nothing we hold.
            self._reading, self._boot, self._since = PMap(), page.boot, page.generation
            self._empty = self._local = PMap()
        latest = {entry.address: entry for entry in page.entries}
        there = {a: None for a, entry in latest.items() if entry.present}
        empty = {a: None for a in there if latest[a].behind is Behind.NOTHING}
        local = {a: None for a in there if latest[a].behind is Behind.HERE}
        self._reading = self._reading.updated(there, latest.keys() - there.keys())
        self._empty = self._empty.updated(empty, latest.keys() - empty.keys())
        self._local = self._local.updated(local, latest.keys() - local.keys())
        if page.cursor is not None:
            self._cursor = page.cursor
            return False
        self.boot, self.generation = page.boot, page.generation
        self._since = page.generation
        self._cursor = Cursor(page.generation, b"\xff")
        self.confirmed, self.empty = PSet(self._reading), PSet(self._empty)
        self.local_ready = PSet(self._local)
        return True
