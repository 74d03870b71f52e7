"""The announcer against a model of ExaBGP: what it sends, in which order, and where it ends."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lbctl.core import exabgp
from lbctl.core.announce import (
    SLICE,
    TRANSITIONS,
    WINDOW,
    Announcer,
    Held,
    LinkEvent,
    LinkState,
    Send,
)
from lbctl.core.exabgp import Command, Verb
from lbctl.core.model import Agreed
from lbctl.errors import MessageError, SpeakerError
from tests.routes import Route, by_prefix

A, B = "192.0.2.1", "192.0.2.2"
BOTH, NONE = ((4, True), (6, True)), ((4, False), (6, False))
Slots = dict[tuple[str, int | None], str]


def path(eip: int = 1, node: int = 1, tag: int = 0) -> Route:
    """A path; `tag` changes its attributes and with them its path-id. From eip 10,000 on: IPv6."""
    if eip >= 10_000:
        prefix = IPv6Network((int(IPv6Address("2001:db8:100::")) + eip, 128))
        four = path(0, node, tag)
        hop = IPv6Address(f"2001:db8:1::{20 + node}")
        return dataclasses.replace(four, prefix=prefix, next_hop=hop)
    return Route(
        IPv4Address(f"192.0.2.{20 + node}"),
        1 + node + 100 * tag,
        f"node-{node}",
        (f"64512:{tag}",) if tag else (),
        prefix=IPv4Network(f"198.51.{eip // 256}.{eip % 256}/32"),
    )


def version(prefix: str) -> int:
    """Of its family."""
    return 6 if ":" in prefix else 4


class Exabgp:
    """A model: per peer and slot the attributes; commands done in order, answers when asked."""

    def __init__(self) -> None:
        self.rib: dict[str, dict[tuple[str, int | None], str]] = {A: {}, B: {}}
        self.wire: dict[str, dict[tuple[str, int | None], str]] = {A: {}, B: {}}
        self.agreed: dict[str, Agreed] = {A: BOTH, B: BOTH}
        self.queue: deque[Send] = deque()
        self.lines: list[Command] = []

    def send(self, sends: tuple[Send, ...]) -> None:
        self.queue.extend(sends)
        self.lines += [send.command for send in sends if send.command is not None]

    def pull(self, announcer: Announcer) -> None:
        """Queue what it sends once all is planned."""
        while announcer.plan():
            pass
        self.send(announcer.take())

    def step(self, announcer: Announcer, ok: bool = True, heard: bool = True) -> None:
        """Do the oldest command; it is answered only if `heard`."""
        send = self.queue.popleft()
        if send.command is None:
            if heard:
                announcer.barrier(send.id, {A: True, B: True})
            return
        if ok:
            self.apply(exabgp.check_command(send.command))
        if heard:
            announcer.acknowledged(send.id, ok)

    def apply(self, command: Command) -> None:
        for peer in command.peers:
            for prefix in command.prefixes:
                number = exabgp.path_id(command.attributes)
                modes = dict(self.agreed[peer])
                there = number if modes.get(version(prefix)) else None
                if command.verb is Verb.ANNOUNCE:
                    self.rib[peer][prefix, number] = command.attributes
                    if version(prefix) in modes:
                        self.wire[peer][prefix, there] = command.attributes
                else:
                    self.rib[peer].pop((prefix, number), None)
                    self.wire[peer].pop((prefix, there), None)

    def ledger(self, sure: bool = False) -> list[Held]:
        """What a speaker would say that it holds: commands in flight may have been done."""
        held = [
            Held(peer, attributes, (prefix,), sure)
            for peer, slots in self.rib.items()
            for (prefix, _), attributes in slots.items()
        ]
        for send in self.queue:
            if send.command is not None and send.command.verb is Verb.ANNOUNCE:
                c = send.command
                held += [Held(peer, c.attributes, c.prefixes, False) for peer in c.peers]
        return held

    def drain(self, announcer: Announcer) -> None:
        for _ in range(100_000):
            self.pull(announcer)
            if not self.queue:
                return
            self.step(announcer)
        raise AssertionError("the announcer never comes to rest")


def ready(*peers: str, slice_: int = SLICE) -> tuple[Announcer, Exabgp]:
    """A linked announcer whose sessions are up."""
    announcer = Announcer(slice_=slice_)
    announcer.connected()
    for peer in peers or (A, B):
        announcer.negotiated(peer, BOTH)
        announcer.established(peer, True)
    announcer.held(())
    return announcer, Exabgp()


def shown(paths: frozenset[Route], agreed: Agreed = BOTH) -> Slots:
    """What a switch shall have."""
    slots: Slots = {}
    modes = dict(agreed)
    for one in sorted(paths, key=lambda p: (str(p.prefix), int(p.next_hop), p.path_id)):
        several = modes.get(one.prefix.version)
        if several is not None:
            number = one.path_id if several else None
            slots.setdefault((str(one.prefix), number), exabgp.attributes(one, several))
    return slots


def test_a_load_is_batched_windowed_and_shared_by_the_peers() -> None:
    """Over 2 nodes, for both peers: no more than the window in flight; the nodes take turns."""
    announcer, model = ready()
    eips = exabgp.MAX_PREFIXES * (WINDOW // 2 + 1)
    paths = frozenset(path(eip, node) for eip in range(eips) for node in (1, 2))
    number = announcer.want((A, B), by_prefix(paths))
    model.pull(announcer)
    assert announcer.in_flight == len(model.queue) == WINDOW
    assert model.lines[0].prefixes == model.lines[1].prefixes
    assert announcer.settled < number
    model.drain(announcer)
    assert len(model.lines) == WINDOW + 2
    assert {line.peers for line in model.lines} == {(A, B)}
    assert max(len(line.prefixes) for line in model.lines) == exabgp.MAX_PREFIXES
    assert model.wire == {A: shown(paths), B: shown(paths)}
    assert announcer.settled == number


def test_an_urgent_withdraw_goes_before_the_rest_of_a_load() -> None:
    """It is the next command after those in flight."""
    announcer, model = ready(A)
    first = frozenset(path(eip) for eip in range(10))
    announcer.want((A,), by_prefix(first))
    model.drain(announcer)
    load = frozenset(path(eip, 2) for eip in range(exabgp.MAX_PREFIXES * (WINDOW + 2)))
    announcer.want((A,), by_prefix(first | load))
    model.pull(announcer)
    announcer.want((A,), by_prefix(load))
    sent = len(model.lines)
    model.step(announcer)
    model.pull(announcer)
    assert model.lines[sent].verb is Verb.WITHDRAW
    assert len(model.lines[sent].prefixes) == 10


def test_a_node_that_goes_overtakes_a_load_that_is_being_planned() -> None:
    """Its withdraws are all planned before anything more is announced, and what was not planned yet
    is planned without it."""
    announcer, model = ready(slice_=100)
    first = frozenset(path(eip, node) for eip in range(300) for node in (1, 2))
    announcer.want((A, B), by_prefix(first))
    model.drain(announcer)
    load = first | {path(eip, node) for eip in range(300, 2000) for node in (1, 2)}
    number = announcer.want((A, B), by_prefix(load))
    assert announcer.plan(), "a load must be planned in slices"
    begun, sent = len(model.lines), announcer.take()
    model.send(sent)
    assert 1 <= len(sent) <= 4, "what is planned must go out while the rest is planned"
    less = frozenset(p for p in load if p.node == "node-2")
    later = announcer.want((A, B), by_prefix(less))
    overtaken = len(model.lines)
    while announcer.plan():
        model.send(announcer.take())
        if model.queue:
            model.step(announcer)
        assert announcer.settled < number
    model.drain(announcer)
    order = [line.verb for line in model.lines[overtaken:]]
    assert order == sorted(order, key=lambda verb: verb is Verb.ANNOUNCE)
    assert (
        len(
            {
                p
                for line in model.lines[overtaken:]
                for p in line.prefixes
                if line.verb is Verb.WITHDRAW
            }
        )
        >= 300
    )
    hop = str(path(1, 1).next_hop)
    late = [line for line in model.lines[begun:] if line.verb is Verb.ANNOUNCE]
    assert sum(len(x.prefixes) for x in late if exabgp.next_hop(x.attributes) == hop) <= 100
    assert model.wire == {A: shown(less), B: shown(less)}
    assert announcer.settled == later


def test_a_change_of_attributes_announces_the_new_path_first() -> None:
    """The old one goes, with its own attributes, when the new one is acknowledged."""
    announcer, model = ready(A)
    announcer.want((A,), by_prefix({path()}))
    model.drain(announcer)
    announcer.want((A,), by_prefix({path(tag=1)}))
    model.pull(announcer)
    assert [line.verb for line in model.lines[1:]] == [Verb.ANNOUNCE]
    model.drain(announcer)
    assert [line.verb for line in model.lines[1:]] == [Verb.ANNOUNCE, Verb.WITHDRAW]
    assert model.lines[2].attributes == model.lines[0].attributes
    assert model.wire[A] == shown(frozenset({path(tag=1)}))


def test_a_reused_path_id_is_replaced_and_never_withdrawn() -> None:
    """The rule is broken by the caller; the switch is right all the same."""
    announcer, model = ready(A)
    announcer.want((A,), by_prefix({path()}))
    model.drain(announcer)
    again = dataclasses.replace(path(), med=5)
    announcer.want((A,), by_prefix({again}))
    model.drain(announcer)
    assert [line.verb for line in model.lines] == [Verb.ANNOUNCE, Verb.ANNOUNCE]
    assert model.wire[A] == shown(frozenset({again}))


def test_without_add_path_a_prefix_has_one_path_and_changes_in_place() -> None:
    """The first by next hop; when that goes, the next replaces it without a withdraw."""
    announcer, model = ready(A)
    model.agreed[A] = NONE
    announcer.negotiated(A, NONE)
    both = frozenset({path(node=1), path(node=2)})
    announcer.want((A,), by_prefix(both))
    model.drain(announcer)
    assert model.wire[A] == shown(both, NONE) and len(model.wire[A]) == 1
    announcer.want((A,), by_prefix({path(node=2)}))
    model.drain(announcer)
    assert [line.verb for line in model.lines] == [Verb.ANNOUNCE, Verb.ANNOUNCE]
    assert model.wire[A] == shown(frozenset({path(node=2)}), NONE)
    announcer.want((A,), by_prefix(()))
    model.drain(announcer)
    assert model.wire[A] == {}


def test_nothing_is_sent_before_it_is_known_how_many_paths_a_peer_takes() -> None:
    """And the other peer does not wait for it."""
    announcer, model = ready(A)
    number = announcer.want((A, B), by_prefix({path()}))
    model.drain(announcer)
    assert {line.peers for line in model.lines} == {(A,)}
    assert announcer.settled == number
    announcer.negotiated(B, BOTH)
    assert announcer.settled < number
    announcer.established(B, True)
    model.drain(announcer)
    assert model.wire[B] == shown(frozenset({path()}))
    assert announcer.settled == number


def test_a_peer_that_loses_add_path_is_emptied_before_it_is_filled() -> None:
    """Withdraws, a barrier, then announces: on such a session a withdraw takes the prefix."""
    announcer, model = ready(A)
    both = frozenset({path(node=1), path(node=2)})
    announcer.want((A,), by_prefix(both))
    model.drain(announcer)
    model.agreed[A], model.wire[A] = NONE, {}
    announcer.negotiated(A, NONE)
    model.pull(announcer)
    while model.queue:
        barrier_next = model.queue[0].command is None
        model.step(announcer)
        sends = announcer.take()
        if not barrier_next:
            assert all(s.command is None or s.command.verb is Verb.WITHDRAW for s in sends)
        model.send(sends)
    assert model.wire[A] == shown(both, NONE)


def test_a_new_manager_keeps_what_is_right_and_removes_what_is_not() -> None:
    """The ledger decides; sure and right means no command at all."""
    announcer, model = Announcer(), Exabgp()
    announcer.connected()
    announcer.negotiated(A, BOTH)
    announcer.established(A, True)
    kept, gone, unsure = path(1), path(2), path(3)
    announcer.held(
        [
            Held(A, exabgp.attributes(kept), (str(kept.prefix),), True),
            Held(A, exabgp.attributes(gone), (str(gone.prefix),), True),
            Held(A, exabgp.attributes(unsure), (str(unsure.prefix),), False),
        ]
    )
    announcer.want((A,), by_prefix({kept, unsure}))
    model.drain(announcer)
    found = {(line.verb, line.prefixes) for line in model.lines}
    assert found == {
        (Verb.WITHDRAW, (str(gone.prefix),)),
        (Verb.ANNOUNCE, (str(unsure.prefix),)),
    }


def test_a_refused_command_is_sent_again_only_after_retry() -> None:
    """No storm; and the number does not settle meanwhile."""
    announcer, model = ready(A)
    number = announcer.want((A,), by_prefix({path()}))
    model.pull(announcer)
    model.step(announcer, ok=False)
    model.pull(announcer)
    assert not model.queue and announcer.settled < number
    announcer.retry()
    model.drain(announcer)
    assert model.wire[A] == shown(frozenset({path()}))
    assert announcer.settled == number


def test_settled_needs_the_wire_of_every_established_session() -> None:
    """A barrier that finds something unsent is not enough; a new session starts it anew."""
    announcer, model = ready()
    number = announcer.want((A, B), by_prefix({path()}))
    model.pull(announcer)
    model.step(announcer)
    (barrier,) = announcer.take()
    assert barrier.command is None
    assert not announcer.barrier(barrier.id, {A: True, B: False})
    assert announcer.settled < number
    (barrier,) = announcer.take()
    announcer.established(B, False)
    assert announcer.barrier(barrier.id, {A: True, B: False})
    assert announcer.settled == number
    announcer.established(B, True)
    assert announcer.settled < number
    model.drain(announcer)
    assert announcer.settled == number


def test_end_of_rib_waits_for_all_that_is_wanted() -> None:
    """Not before the first `want`, not while a route is refused; to each session once."""
    announcer, model = ready()
    model.drain(announcer)
    assert announcer.completed() == (), "nobody has said what is wanted"
    announcer.want((A, B), by_prefix({path(1), path(2, tag=1)}))
    model.pull(announcer)
    model.step(announcer, ok=False)
    model.drain(announcer)
    assert announcer.completed() == (), "a route is refused"
    announcer.retry()
    model.drain(announcer)
    assert announcer.completed() == (A, B)
    announcer.want((A, B), by_prefix({path(1)}))
    model.drain(announcer)
    assert announcer.completed() == (), "these sessions have had theirs"


def test_end_of_rib_is_due_to_each_new_session() -> None:
    """When its own wire is empty; again after a doubt, for then it may have been lost."""
    announcer, model = ready()
    announcer.want((A, B), by_prefix({path()}))
    model.drain(announcer)
    announcer.completed()
    for peer in (A, B):
        announcer.established(peer, False)
        announcer.established(peer, True)
    (barrier,) = announcer.take()
    assert not announcer.barrier(barrier.id, {A: True, B: False})
    assert announcer.completed() == (A,)
    model.drain(announcer)
    assert announcer.completed() == (B,)
    announcer.established(B, False)
    announcer.paused()
    model.queue.clear()
    announcer.held(model.ledger(sure=True))
    model.drain(announcer)
    assert announcer.completed() == (A,), "B has no session"


def test_an_old_number_settles_while_new_ones_keep_coming() -> None:
    """Nobody waits for ever because others are busy."""
    announcer, model = ready(A)
    number = announcer.want((A,), by_prefix({path()}))
    for eip in range(2, 30):
        model.pull(announcer)
        announcer.want((A,), by_prefix(path(other) for other in range(1, eip)))
        if model.queue:
            model.step(announcer)
    assert announcer.settled >= number


def test_bad_values_change_nothing() -> None:
    """The whole set is refused, by name of what is wrong."""
    announcer, model = ready(A)
    good = frozenset({path()})
    announcer.want((A,), by_prefix(good))
    for bad in (
        dataclasses.replace(path(2), path_id=0),
        dataclasses.replace(path(2), communities=("x",)),
        dataclasses.replace(path(2), next_hop=IPv6Address("2001:db8::1")),
        dataclasses.replace(path(), med=7),
    ):
        with pytest.raises(SpeakerError):
            announcer.want((A,), by_prefix(good | {bad}))
    model.drain(announcer)
    assert model.wire[A] == shown(good)


def test_both_families() -> None:
    """IPv6 beside IPv4, each with its own next hop."""
    announcer, model = ready(A)
    hop, prefix = IPv6Address("2001:db8:1::1"), IPv6Network("2001:db8::1/128")
    six = Route(hop, 9, "node-1", prefix=prefix)
    announcer.want((A,), by_prefix({path(), six}))
    model.drain(announcer)
    assert model.wire[A] == shown(frozenset({path(), six}))


@pytest.mark.parametrize(
    "agreed",
    [((4, True), (6, False)), ((4, False), (6, True)), ((4, True),), ((6, False),), ()],
    ids=str,
)
def test_each_family_as_the_switch_takes_it(agreed: Agreed) -> None:
    """ADD-PATH in one family only, one family not at all; and then another session with both."""
    announcer, model = ready(A)
    model.agreed[A] = agreed
    announcer.negotiated(A, agreed)
    paths = frozenset(path(eip, node) for eip in (1, 2, 10_001, 10_002) for node in (1, 2))
    number = announcer.want((A,), by_prefix(paths))
    model.drain(announcer)
    assert model.wire[A] == shown(paths, agreed)
    assert announcer.settled == number
    fewer = frozenset(p for p in paths if p.node != "node-1")
    announcer.want((A,), by_prefix(fewer))
    model.drain(announcer)
    assert model.wire[A] == shown(fewer, agreed)
    model.agreed[A], model.wire[A] = BOTH, {}
    for (prefix, identifier), attributes in model.rib[A].items():
        model.wire[A][prefix, identifier] = attributes
    announcer.negotiated(A, BOTH)
    model.drain(announcer)
    assert model.wire[A] == shown(fewer)


def test_a_peer_that_goes_and_comes_back_gets_all_of_it() -> None:
    """What it had is in doubt: wanted routes are sent again, others withdrawn."""
    announcer, model = ready()
    announcer.want((A, B), by_prefix({path(1), path(2)}))
    model.drain(announcer)
    announcer.want((A,), by_prefix({path(1), path(2)}))
    announcer.want((A, B), by_prefix({path(1)}))
    model.drain(announcer)
    assert model.wire[B] == shown(frozenset({path(1)}))


def test_every_pair_of_state_and_event_is_in_the_table_or_an_error() -> None:
    """One table; what is not in it is refused."""
    doing: dict[LinkEvent, Callable[[Announcer], None]] = {
        LinkEvent.CONNECTED: Announcer.connected,
        LinkEvent.CLOSED: Announcer.closed,
        LinkEvent.PAUSED: Announcer.paused,
        LinkEvent.HELD: lambda announcer: announcer.held(()),
    }
    reach = {
        LinkState.AWAY: (),
        LinkState.SYNCING: (LinkEvent.CONNECTED,),
        LinkState.READY: (LinkEvent.CONNECTED, LinkEvent.HELD),
    }
    for state in LinkState:
        for event in LinkEvent:
            announcer = Announcer()
            for step in reach[state]:
                doing[step](announcer)
            assert announcer.state is state
            if (state, event) in TRANSITIONS:
                doing[event](announcer)
                assert announcer.state is TRANSITIONS[state, event]
            else:
                with pytest.raises(MessageError):
                    doing[event](announcer)


eips = st.sampled_from((1, 2, 3, 10_001, 10_002, 10_003))
agreements = st.builds(
    lambda four, six: ((4, four), (6, six)) if six is not None else ((4, four),),
    st.booleans(),
    st.sampled_from((True, False, None)),
)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("want"),
            st.sets(st.sampled_from((A, B)), min_size=1),
            st.sets(st.tuples(eips, st.integers(0, 3), st.integers(0, 2)), max_size=10),
        ),
        st.tuples(st.just("step"), st.booleans(), st.sampled_from((True, True, True, False))),
        st.tuples(st.just("resync"), st.booleans(), st.booleans()),
        st.tuples(st.just("mode"), st.sampled_from((A, B)), agreements),
        st.tuples(st.just("flap"), st.sampled_from((A, B)), st.booleans()),
        st.tuples(st.just("retry"), st.booleans(), st.booleans()),
        st.tuples(st.just("pause"), st.booleans(), st.booleans()),
    ),
    max_size=40,
)


class Storm:
    """Carries out a script against announcer and model."""

    def __init__(self) -> None:
        self.announcer, self.model = ready(slice_=2)
        self.wanted: frozenset[Route] = frozenset()
        self.texts: dict[int, set[tuple[str, str]]] = {0: set()}  # what was wanted, by number
        self.since: dict[str, int] = {}  # of each peer that is wanted

    def tell(self, peers: set[str]) -> int:
        """Tell the announcer what is wanted."""
        number = self.announcer.want(sorted(peers), by_prefix(self.wanted))
        kinds = (True, False)
        self.texts[number] = {
            (str(p.prefix), exabgp.attributes(p, kind)) for p in self.wanted for kind in kinds
        }
        self.since = {peer: self.since.get(peer, number) for peer in peers}
        return number

    def check(self) -> None:
        """What is settled is so: nothing is there that was not wanted then or since."""
        settled = self.announcer.settled
        wanted = set().union(*(some for n, some in self.texts.items() if n >= settled))
        for peer, since in self.since.items():
            there = {(prefix, text) for (prefix, _), text in self.model.wire[peer].items()}
            assert settled < since or there <= wanted, f"{settled} is settled, and there is more"

    def want(self, peers: set[str], chosen: set[tuple[int, int, int]]) -> None:
        # A path-id belongs to a node and attribute set: one tag per (eip, node).
        tags = {(eip, node): tag for eip, node, tag in sorted(chosen)}
        # Node 0 is a virtual next hop.
        led_there = {(eip, tag) for (eip, node), tag in tags.items() if not node and eip < 10_000}
        self.wanted = frozenset(
            path(eip, node, tag) for (eip, node), tag in tags.items() if node
        ).union(*(virtual(tag, 2) | {led(eip, tag)} for eip, tag in led_there))
        self.tell(peers)

    def step(self, _: bool, ok: bool) -> None:
        if self.model.queue:
            self.model.step(self.announcer, ok=ok)

    def resync(self, done: bool, reconnect: bool) -> None:
        """What is in flight is done or not, and its answers are lost."""
        for _ in range(len(self.model.queue) if done else 0):
            self.model.step(self.announcer, heard=False)
        ledger = self.model.ledger()
        self.model.queue.clear()
        if reconnect:
            self.announcer.closed()
            self.announcer.connected()
            for peer in (A, B):
                self.announcer.negotiated(peer, self.model.agreed[peer])
                self.announcer.established(peer, True)
        self.announcer.held(ledger)

    def mode(self, peer: str, agreed: Agreed) -> None:
        """A new session, which sends all again, with other capabilities."""
        self.model.agreed[peer] = agreed
        modes = dict(agreed)
        self.model.wire[peer] = {
            (prefix, number if modes[version(prefix)] else None): attributes
            for (prefix, number), attributes in self.model.rib[peer].items()
            if version(prefix) in modes
        }
        self.announcer.negotiated(peer, agreed)

    def flap(self, peer: str, up: bool) -> None:
        self.announcer.established(peer, up)

    def pause(self, done: bool, _: bool) -> None:
        """The relay is gone; commands may be done, and some are."""
        for _number in range(len(self.model.queue) if done else 0):
            self.model.step(self.announcer, heard=False)
        if self.announcer.state is LinkState.READY:
            self.announcer.paused()

    def retry(self, _: bool, __: bool) -> None:
        self.announcer.retry()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps)
@example(  # an answer that was for a table of the peer that is no more
    [
        ("want", {A}, {(1, 1, 0)}),
        ("want", {A}, set()),
        ("step", False, True),
        ("want", {B}, set()),
        ("want", {A}, {(1, 1, 0)}),
        ("want", {A}, set()),
    ]
)
@example(  # a withdraw in flight when all is told anew belongs to the number that it came with
    [
        ("want", {A}, {(1, 1, 0)}),
        ("step", True, True),
        ("want", {A}, set()),
        ("want", {A}, set()),
        ("resync", False, False),
        ("step", True, False),
        ("step", True, True),
    ]
)
@example(  # without ADD-PATH, there and back again while both are in flight
    [
        ("mode", A, NONE),
        ("want", {A}, {(1, 1, 0)}),
        ("want", {A}, {(1, 1, 1)}),
        ("want", {A}, {(1, 1, 0)}),
    ]
)
def test_whatever_happens_it_ends_with_what_is_desired(
    script: list[tuple[str, object, object]],
) -> None:
    """Refusals, lost answers, new links, mode changes and flaps in any order."""
    storm = Storm()
    announcer, model = storm.announcer, storm.model
    for kind, one, two in script:
        getattr(storm, kind)(one, two)
        storm.check()
        announcer.plan()
        model.send(announcer.take())
        assert announcer.in_flight <= WINDOW
    number = storm.tell({A, B})
    if announcer.state is not LinkState.READY:
        storm.resync(False, False)
    for _ in range(3):
        announcer.retry()
        model.drain(announcer)
    for peer in (A, B):
        assert model.wire[peer] == shown(storm.wanted, model.agreed[peer]), peer
    assert announcer.settled == number


def led(eip: int, virtual: int) -> Route:
    """A path of an EIP to a virtual next hop."""
    at = IPv4Address("100.64.0.0") + virtual
    return Route(at, 9999, "", prefix=path(eip).prefix)


def virtual(number: int, nodes: int) -> frozenset[Route]:
    """The paths of a virtual next hop."""
    prefix = IPv4Network((int(IPv4Address("100.64.0.0")) + number, 32))
    return frozenset(dataclasses.replace(path(1, node), prefix=prefix) for node in range(nodes))


def test_a_virtual_next_hop_comes_before_what_leads_to_it() -> None:
    """However many there are, and whatever is lost and sent again."""
    announcer, model = ready(A)
    hops = frozenset(p for number in range(300) for p in virtual(number, 3))
    announcer.want([A], by_prefix(hops | {led(eip, eip % 300) for eip in range(600)}))
    model.pull(announcer)
    count = 0
    while model.queue:
        count += 1
        model.step(announcer, ok=count != 2)
        if count == 40:
            announcer.retry()
        model.pull(announcer)
        there = {prefix for prefix, _ in model.wire[A]}
        for (prefix, number), attributes in model.wire[A].items():
            hop = exabgp.next_hop(attributes)
            assert number != 9999 or f"{hop}/32" in there, f"{prefix} leads to {hop}, unknown yet"
    announcer.retry()
    model.drain(announcer)
    assert len(model.wire[A]) == 300 * 3 + 600


def test_no_eip_is_without_a_route_while_it_moves() -> None:
    """From nodes to a virtual next hop, to another one, and back to other nodes."""
    announcer, model = ready(A)
    hops = virtual(1, 2) | virtual(2, 2)
    stages = [
        {path(eip, node) for eip in range(5) for node in (1, 2)},
        hops | {led(eip, 1) for eip in range(5)},
        hops | {led(eip, 2) for eip in range(5)},
        {path(eip, node) for eip in range(5) for node in (3, 4)},
    ]
    for stage in stages:
        announcer.want([A], by_prefix(stage))
        model.pull(announcer)
        while model.queue:
            model.step(announcer)
            model.pull(announcer)
            there = {prefix for prefix, _ in model.wire[A]}
            assert stage is stages[0] or {str(path(eip).prefix) for eip in range(5)} <= there
        assert {(p, n) for p, n in model.wire[A]} == {(str(p.prefix), p.path_id) for p in stage}
