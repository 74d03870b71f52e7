"""The packed RIB: what is held, what goes out, in which order, and as which bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from manager.speaker.outbox import FEW, RESOLVE_S, Group, Outbox, Section

FOUR, SIX = (1, 1), (2, 1)


def group(number: int, family: tuple[int, int] = FOUR, path_id: bytes | None = None) -> Group:
    """A group whose attributes pack to one octet, its number."""
    hop = bytes((192, 0, 2, number)) if family == FOUR else bytes(15) + bytes((number,))
    attributes = SimpleNamespace(pack=lambda _: bytes((number,)))
    return Group(family, bytes((0, 0, 0, number)) if path_id is None else path_id, hop, attributes)


ONE, TWO = group(1), group(2)
A, B, C = "198.51.100.1/32", "198.51.100.2/32", "198.51.100.3/32"


def session(add_path: bool = True, size: int = 4096) -> SimpleNamespace:
    """What was negotiated, as far as it matters."""
    add = SimpleNamespace(send=lambda *_: add_path)
    return SimpleNamespace(families=[FOUR, SIX], addpath=add, msg_size=size)


def outbox() -> Outbox:
    """An empty one."""
    return Outbox(True, [FOUR, SIX])


VIRTUAL = "100.64.0.9/32"
LED = Group(FOUR, bytes((0, 0, 0, 99)), bytes((100, 64, 0, 9)), None)  # through VIRTUAL


def timed() -> tuple[Outbox, list[float]]:
    """One with a clock that is set by hand."""
    now = [100.0]
    return Outbox(True, [FOUR, SIX], lambda: now[0]), now


def announce(box: Outbox, one: Group, *prefixes: str) -> None:
    """As the command does."""
    box.announce(one, [one.route(prefix) for prefix in prefixes])


def withdraw(box: Outbox, one: Group, *prefixes: str) -> None:
    """As the command does."""
    box.withdraw(one, [one.route(prefix) for prefix in prefixes])


def sent(box: Outbox) -> list[tuple[int | None, list[int]]]:
    """In order: the group's number, None for a withdraw, and the last octets of the prefixes."""
    return [
        (
            None if section.group is None else section.group.next_hop[-1],
            [route[-1] for route in section.routes],
        )
        for section in box.updates(True)
        if section.routes
    ]


def wire(box: Outbox, negotiated: SimpleNamespace, withdraws: bool = True) -> list[bytes]:
    """The bodies of the messages; their headers are right."""
    bodies = []
    for section in box.updates(True):
        for message in section.messages(negotiated, withdraws):
            assert message[:16] == b"\xff" * 16
            assert message[18] == 2
            assert int.from_bytes(message[16:18]) == len(message) <= negotiated.msg_size
            bodies.append(message[19:])
    return bodies


def test_the_newest_change_of_a_route_is_the_only_one_sent() -> None:
    """In the place of the newest, whatever was there before."""
    box = outbox()
    same = group(9, path_id=ONE.path_id)
    announce(box, ONE, A, B)
    announce(box, same, A)
    withdraw(box, same, A)
    announce(box, ONE, A)
    assert sent(box) == [(1, [2]), (1, [1])]
    assert not box.pending()


def test_routes_go_out_in_the_order_of_their_commands() -> None:
    """A new path goes out before the one that it replaces goes, whatever waited before."""
    box = outbox()
    withdraw(box, ONE, B)
    announce(box, TWO, A)
    withdraw(box, ONE, A)
    assert sent(box) == [(None, [2]), (2, [1]), (None, [1])]


def test_a_withdraw_of_what_was_never_sent_is_sent_alone() -> None:
    """The peer may have it from before."""
    box = outbox()
    announce(box, ONE, A)
    withdraw(box, ONE, A)
    assert sent(box) == [(None, [1])]


def test_what_a_peer_was_given_is_not_sent_twice() -> None:
    """Until it was withdrawn, or came with other attributes."""
    box = outbox()
    announce(box, ONE, A)
    assert sent(box) == [(1, [1])]
    announce(box, ONE, A)
    assert sent(box) == []
    announce(box, group(9, path_id=ONE.path_id), A)
    announce(box, ONE, A)
    assert sent(box) == [(1, [1])]


def test_a_new_session_gets_what_is_held_and_nothing_else() -> None:
    """What waited when the old one ended is forgotten with it."""
    box = outbox()
    announce(box, ONE, A, B)
    announce(box, TWO, A)
    withdraw(box, ONE, B)
    box.reset()
    assert not box.pending()
    box.replace_restart([], [])
    assert sent(box) == [(1, [1]), (2, [1])]


def test_a_refresh_sends_one_family_again() -> None:
    """Before what waits, which may withdraw some of it."""
    box = outbox()
    announce(box, ONE, A, B)
    announce(box, group(3, SIX), "2001:db8::1/128")
    assert len(sent(box)) == 2
    withdraw(box, ONE, B)
    box.resend(False, FOUR)
    assert box.pending()
    assert sent(box) == [(1, [1]), (None, [2])]


def test_sending_is_known_until_the_last_update() -> None:
    """Also when it is broken off, as a session's end does; new changes wait for the next time."""
    box = outbox()
    announce(box, ONE, A)
    announce(box, TWO, A)
    updates = box.updates(True)
    assert box.sending == 0
    next(updates)
    assert (box.sending, box.pending()) == (1, False)
    withdraw(box, TWO, A)
    updates.close()
    assert (box.sending, box.pending()) == (0, True)
    assert sent(box) == [(None, [1])]


def test_messages_are_filled_and_no_longer_than_agreed() -> None:
    """One attribute set, thousands of prefixes: some hundreds in each message, none lost."""
    box = outbox()
    prefixes = [f"198.51.{number // 256}.{number % 256}/32" for number in range(5000)]
    announce(box, ONE, *prefixes)
    bodies = wire(box, session())
    routes = [body[5 + at : 14 + at] for body in bodies for at in range(0, len(body) - 5, 9)]
    assert routes == [ONE.route(prefix) for prefix in prefixes]
    assert len(bodies) == 12
    assert all(body[:5] == b"\0\0\0\1\1" for body in bodies)


def test_path_ids_are_as_the_session_agreed() -> None:
    """Left out without ADD-PATH; zero where a route has none and the session wants one."""
    box, plain = outbox(), group(4, path_id=b"")
    announce(box, ONE, A)
    announce(box, plain, B)
    assert [body[5:] for body in wire(box, session(False))] == [
        b"\x20\xc6\x33\x64\x01",
        b"\x20\xc6\x33\x64\x02",
    ]
    box.replace_restart([], [])
    assert [body[5:9] for body in wire(box, session())] == [b"\0\0\0\1", b"\0\0\0\0"]


def test_a_session_that_never_had_anything_gets_no_withdraws() -> None:
    """Nor anything of a family that it did not agree to."""
    box = outbox()
    withdraw(box, ONE, A)
    announce(box, group(3, SIX), "2001:db8::1/128")
    only_four = session()
    only_four.families = [FOUR]
    assert wire(box, only_four, withdraws=False) == []


def test_what_leads_to_a_route_of_ours_is_held_back_in_a_new_session() -> None:
    """Until its next hop has been there for RESOLVE_S; the others go at once."""
    box, now = timed()
    announce(box, ONE, VIRTUAL, A)
    announce(box, LED, B, C)
    now[0] += 60
    assert len(sent(box)) == 2
    box.reset()
    box.replace_restart([], [])
    assert sent(box) == [(1, [9, 1])]
    assert not box.pending()
    assert not box.flushed
    now[0] += RESOLVE_S
    assert box.pending()
    assert sent(box) == [(9, [2, 3])]
    assert box.flushed


def test_a_virtual_next_hop_that_is_new_holds_back_too() -> None:
    """One that has been there does not."""
    box, now = timed()
    announce(box, ONE, VIRTUAL)
    announce(box, LED, A)
    assert sent(box) == [(1, [9])]
    now[0] += RESOLVE_S
    assert sent(box) == [(9, [1])]
    announce(box, LED, B)
    assert sent(box) == [(9, [2])]


def test_what_is_replaced_stays_until_its_successor_is_sent() -> None:
    """Else the EIP had no route for so long. A withdraw of what nothing replaces goes at once."""
    box, now = timed()
    announce(box, TWO, A, B)
    announce(box, ONE, VIRTUAL)
    assert sent(box) == [(2, [1, 2]), (1, [9])]
    announce(box, LED, A)
    withdraw(box, TWO, A)
    withdraw(box, TWO, B)
    assert sent(box) == [(None, [2])]
    now[0] += RESOLVE_S
    assert sent(box) == [(9, [1]), (None, [1])]


def test_an_eip_that_goes_does_not_wait() -> None:
    """What was held back of it is never sent."""
    box, now = timed()
    announce(box, ONE, VIRTUAL)
    announce(box, LED, A, B)
    sent(box)
    withdraw(box, LED, A)
    assert sent(box) == [(None, [1])]
    now[0] += RESOLVE_S
    assert sent(box) == [(9, [2])]


def test_addresses_that_came_and_went_are_forgotten() -> None:
    """An EIP a second is given for years; one that stays, and what leads on, does not suffer."""
    box, now = timed()
    announce(box, ONE, VIRTUAL)
    for number in range(1000):
        address = f"198.51.{number // 256}.{number % 256}/32"
        announce(box, TWO, address)
        withdraw(box, TWO, address)
        assert len(box._came_s) <= 2 * 2 + FEW
    sent(box)
    announce(box, LED, C)
    assert sent(box) == []
    now[0] += RESOLVE_S
    assert sent(box) == [(9, [3])]


V4 = [f"198.51.100.{number}/32" for number in range(4)]
GROUPS = [ONE, TWO, group(1, SIX), group(5, path_id=ONE.path_id), LED]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["announce", "withdraw"]),
            st.integers(0, len(GROUPS) - 1),
            st.sets(st.integers(0, 4)),
        ),
        st.tuples(st.just("send"), st.integers(0, 5), st.none()),
        st.tuples(st.just("flap"), st.booleans(), st.none()),
        st.tuples(st.just("refresh"), st.sampled_from([FOUR, SIX]), st.none()),
        st.tuples(st.just("wait"), st.sampled_from([0.1, RESOLVE_S]), st.none()),
    ),
    max_size=60,
)


class Switch:
    """A session's other end: what it was told, and what it should have been."""

    def __init__(self) -> None:
        self.box, self.now = timed()
        self.there: dict[bytes, Group] = {}
        self.wanted: dict[bytes, Group] = {}
        self.came_s = 0.0  # of the virtual next hop
        self.updates: Iterator[Section] | None = None
        self.refreshed = self.late = False  # a refresh is asked for, or is being sent

    def announce(self, one: int, which: set[int]) -> None:
        if GROUPS[one] is LED and not self.leads:
            return  # as the announcer: first what it leads to
        prefixes = self.prefixes(GROUPS[one], which)
        if VIRTUAL in prefixes and not self.leads:
            self.came_s = self.now[0]
        announce(self.box, GROUPS[one], *prefixes)
        self.wanted.update({GROUPS[one].route(p): GROUPS[one] for p in prefixes})

    def withdraw(self, one: int, which: set[int]) -> None:
        """What something leads to stays, as with the announcer."""
        led = LED in self.wanted.values()
        prefixes = [p for p in self.prefixes(GROUPS[one], which) if not (led and p == VIRTUAL)]
        routes = [GROUPS[one].route(prefix) for prefix in prefixes]
        self.box.withdraw(GROUPS[one], routes)
        for route in routes:
            self.wanted.pop(route, None)

    @property
    def leads(self) -> bool:
        """Whether the virtual next hop is announced."""
        return any(route[5:] == LED.next_hop for route in self.wanted)

    def prefixes(self, one: Group, which: set[int]) -> list[str]:
        """Only routes to nodes lead to the virtual next hop."""
        if one.family == SIX:
            return [f"2001:db8::{number}/128" for number in sorted(which)]
        every = [*V4, V4[0] if one is LED else VIRTUAL]
        return [every[number] for number in sorted(which)]

    def send(self, count: int, _: None) -> None:
        """So many updates; 0: all."""
        if self.updates is None:
            self.updates, self.late = self.box.updates(True), self.refreshed
        for section in islice(self.updates, count or None):
            for route in section.routes:
                self.take(route, section.group)
        if not count:
            self.updates, self.refreshed = None, self.refreshed and not self.late

    def take(self, route: bytes, one: Group | None) -> None:
        if one is None:
            self.there.pop(route, None)
            return
        if one is LED and not self.refreshed:
            assert self.now[0] >= self.came_s + RESOLVE_S, "it cannot be resolved yet"
        self.there[route] = one

    def flap(self, twice: bool, _: None) -> None:
        self.there.clear()
        self.came_s = self.now[0]
        self.updates = None
        for _number in range(1 + twice):
            self.box.reset()
            self.box.replace_restart([], [])

    def refresh(self, family: tuple[int, int], _: None) -> None:
        self.refreshed = True
        self.box.resend(False, family)

    def wait(self, seconds: float, _: None) -> None:
        self.now[0] += seconds


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_history_ends_with_what_is_held(
    steps: list[tuple[str, Any, Any]],
) -> None:
    """Whatever is sent when, and whenever the session ends: nothing missing, nothing stale."""
    switch = Switch()
    for kind, one, two in steps:
        getattr(switch, kind)(one, two)
    for _ in range(3):
        switch.send(0, None)
        switch.wait(RESOLVE_S, None)
    assert switch.there == switch.wanted
    assert switch.box.flushed
