"""Judgement on nodes: every row of DESIGN.md's table, panic, flapping, stalls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import health as h
from lbctl.core.endpoints import KUBELETS_S
from lbctl.core.health import Health, Limits, PeerView, Signal
from lbctl.core.model import NodeState as S
from lbctl.core.probe import node_hash
from lbctl.core.reasons import Reason

LIMITS = Limits()
TICK = LIMITS.interval_s


class World:
    """One manager's view: each step is an interval in which nodes answer, or not."""

    def __init__(self, *names: str) -> None:
        self.now_s = 1000.0
        self.nodes = {name: Health(name) for name in names}
        self.peers: tuple[PeerView, ...] = ()

    def step(self, silent: str = "", kernel: str = "", times: int = 1) -> None:
        """`silent` nodes miss a probe; of those, `kernel` answer TCP."""
        for _ in range(times):
            self.now_s += TICK
            for name, health in self.nodes.items():
                if name not in silent:
                    self.nodes[name] = h.probe_answered(health, self.now_s)
                    continue
                health = h.probe_missed(health, self.now_s)
                if name in kernel:
                    health = h.kernel_answered(health, self.now_s)
                self.nodes[name] = health
            self.judge()

    def judge(self) -> None:
        self.nodes.update(h.judge(self.nodes, self.peers, self.now_s, LIMITS))

    def wait(self, seconds: float, silent: str = "", kernel: str = "") -> None:
        self.step(silent, kernel, times=round(seconds / TICK))

    def peer_says(self, gone: str = "", *, seen: int = 9, judging: bool = True) -> None:
        hashes = frozenset(node_hash(name) for name in gone)
        self.peers = (PeerView("m2", judging, True, seen, hashes),)

    def ready(self, name: str, ready: bool) -> None:
        self.nodes[name] = h.told(self.nodes[name], ready, False, self.now_s)
        self.judge()

    def states(self) -> str:
        """Like "Up Suspect* Down", in order of the names; * is held."""
        return " ".join(
            f"{health.state}{'*' if health.held else ''}"
            for _, health in sorted(self.nodes.items())
        )

    def reason(self, name: str) -> Reason | None:
        return self.nodes[name].reason


def up(*names: str) -> World:
    world = World(*names)
    world.step(times=4)
    assert set(world.states().split()) == {"Up"}
    return world


def test_table_is_complete() -> None:
    assert set(h.TABLE) == {(state, signal) for state in S for signal in Signal}


def test_unknown_until_the_first_answer() -> None:
    world = World("a")
    world.judge()
    assert (world.states(), world.reason("a")) == ("Unknown", Reason.NODE_UNKNOWN)
    world.step()
    assert (world.states(), world.reason("a")) == ("Up", None)


def test_unknown_with_a_living_kernel_stays_unknown() -> None:
    world = World("a", "b")
    world.step(silent="a", kernel="a", times=100)
    assert world.states() == "Unknown Up"


def test_a_node_that_never_answered_anybody_stays_unknown() -> None:
    """No agent runs there: it is in no down set, in no heartbeat and in no panic."""
    world = World(*"abcd")
    world.peer_says("")
    world.wait(60, silent="abc")
    world.ready("b", False)
    world.wait(60, silent="abc")
    assert (world.states(), world.reason("a")) == (
        "Unknown Unknown Unknown Up",
        Reason.NODE_UNKNOWN,
    )
    assert not h.gone(world.nodes.values()) and not h.down_set(world.nodes.values())
    world.peers = ()
    world.step(silent="abcd", times=3)
    assert world.states() == "Unknown Unknown Unknown Suspect"  # alone: not held as if four went


def working(*names: str) -> World:
    """Of a manager that has just started: Kubernetes calls the agents ready."""
    world = World(*names)
    world.nodes = {name: replace(known, agent=True) for name, known in world.nodes.items()}
    return world


def test_a_node_that_died_before_we_began_is_suspect_if_its_agent_had_worked() -> None:
    world = working(*"abcd")
    world.wait(h.UNHEARD_S - 0.5, silent="a")
    assert world.states() == "Unknown Up Up Up"
    world.wait(1.0, silent="a")
    assert (world.states(), world.reason("a")) == ("Suspect Up Up Up", Reason.NODE_SUSPECT)
    assert h.down_set(world.nodes.values()) == {node_hash("a")}
    world.peer_says("a")
    world.step(silent="a")
    assert world.states() == "Down Up Up Up"
    world.step(times=3)
    assert world.states() == "Up Up Up Up" and world.reason("a") is None


def test_a_node_whose_kernel_answers_has_not_died_before_we_began() -> None:
    world = working("a", "b")
    world.wait(LIMITS.agent_grace_s + 10, silent="a", kernel="a")
    assert world.states() == "Unknown Up"


@pytest.mark.parametrize(
    ("silent", "states"),
    [("abc", "Suspect* Suspect* Suspect* Up"), ("ab", "Suspect Suspect Up Up")],
)
def test_most_that_never_answered_are_a_panic(silent: str, states: str) -> None:
    """It may well be that we see nothing."""
    world = working(*"abcd")
    world.wait(h.UNHEARD_S + 1, silent=silent)
    assert world.states() == states


def test_a_fresh_manager_believes_one_that_had_answers() -> None:
    world = World("a", "b")
    world.peer_says("a")
    world.step(silent="a", times=3)
    assert (world.states(), world.reason("a")) == ("Down Up", Reason.NODE_DOWN)
    world.step(times=3)
    assert world.states() == "Up Up"


def test_suspect_at_the_third_miss_not_before() -> None:
    world = up(*"abcd")
    world.step(silent="a", times=2)
    assert world.states() == "Up Up Up Up"
    world.step(silent="a")
    assert (world.states(), world.reason("a")) == ("Suspect Up Up Up", Reason.NODE_SUSPECT)
    world.wait(60, silent="a")
    assert world.states() == "Suspect Up Up Up"


def test_down_when_the_other_manager_agrees_and_suspect_again_when_not() -> None:
    world = up(*"abcd")
    world.peer_says("")
    world.step(silent="a", times=3)
    assert world.states() == "Suspect Up Up Up"
    world.peer_says("a")
    world.judge()
    assert (world.states(), world.reason("a")) == ("Down Up Up Up", Reason.NODE_DOWN)
    world.peer_says("")
    world.step(silent="a")
    assert world.states() == "Suspect Up Up Up"


def test_down_stays_when_the_witness_is_gone() -> None:
    world = up(*"abcd")
    world.peer_says("a")
    world.step(silent="a", times=3)
    world.peers = ()
    world.wait(60, silent="a")
    assert world.states() == "Down Up Up Up"


def test_a_peer_that_does_not_judge_yet_is_no_witness() -> None:
    world = up(*"abcd")
    world.peer_says("a", judging=False)
    world.step(silent="a", times=10)
    assert world.states() == "Suspect Up Up Up"


def test_agent_silent_while_the_kernel_answers() -> None:
    world = up(*"abc")
    world.wait(h.SILENT_S - 2 * TICK, silent="a", kernel="a")
    assert world.states() == "Up Up Up"  # a busy agent: nobody is told
    world.step(silent="a", kernel="a", times=4)
    assert (world.states(), world.reason("a")) == ("AgentSilent Up Up", Reason.AGENT_SILENT)
    world.wait(LIMITS.agent_grace_s - 2, silent="a", kernel="a")
    assert world.states() == "AgentSilent Up Up"
    world.step()
    assert (world.states(), world.nodes["a"].falls) == ("Up Up Up", 0)


def test_agent_grace_ends() -> None:
    world = up(*"abc")
    world.wait(LIMITS.agent_grace_s + 1, silent="a", kernel="a")
    assert world.states() == "Suspect Up Up"


def test_node_dies_while_its_agent_is_silent() -> None:
    world = up(*"abc")
    world.wait(5, silent="a", kernel="a")
    world.wait(LIMITS.kernel_window_s + 2 * TICK, silent="a")
    assert world.states() == "Suspect Up Up"


def test_kernel_answer_just_after_the_third_miss_still_counts() -> None:
    world = up(*"abc")
    world.step(silent="a", times=3)
    world.step(silent="a", kernel="a")
    assert world.states() == "AgentSilent Up Up"


def test_a_rebooted_kernel_does_not_bring_a_node_back() -> None:
    world = up(*"abc")
    world.wait(h.REBOOT_S + 1, silent="a")
    world.wait(20, silent="a", kernel="a")
    assert world.states() == "Suspect Up Up"
    world.step(times=h.RETURN_ANSWERS)
    assert world.states() == "Up Up Up"


def test_return_takes_three_answers_in_a_row() -> None:
    world = up(*"abc")
    world.step(silent="a", times=5)
    world.step(times=2)
    assert world.states() == "Suspect Up Up"
    world.step(silent="a", times=2)
    world.step(times=2)
    assert world.states() == "Suspect Up Up"
    world.step()
    assert world.states() == "Up Up Up"


def test_answers_slower_than_the_interval_still_count() -> None:
    world = up(*"abc")
    world.step(silent="a", times=5)
    for _ in range(h.RETURN_ANSWERS):
        world.step(silent="a")
        world.step()
    assert world.states() == "Up Up Up"


def test_not_ready_is_down_though_it_answers() -> None:
    world = up(*"abcd")
    world.ready("a", False)
    world.wait(KUBELETS_S - 0.2)
    assert world.states() == "Up Up Up Up"  # it may be the first of all
    world.wait(0.4)
    assert (world.states(), world.reason("a")) == ("Down Up Up Up", Reason.NODE_NOT_READY)
    world.ready("a", True)
    assert world.states() == "Up Up Up Up"


def test_not_ready_of_most_answering_nodes_is_kubernetes_problem() -> None:
    """It says so of one after the other."""
    world = up(*"abc")
    for name in "abc":
        world.ready(name, False)
        world.wait(0.5)
        assert world.states() == "Up Up Up"
    world.wait(60)
    assert world.states() == "Up Up Up"
    for name in "bc":  # and takes it back so
        world.ready(name, True)
        world.wait(KUBELETS_S - 0.2)
        assert world.states() == "Up Up Up"
    world.wait(0.4)
    assert world.states() == "Down Up Up"


def test_not_ready_of_most_says_nothing_of_one_that_falls_silent() -> None:
    """Its kernel does, and the other manager."""
    world = up(*"abc")
    for name in "abc":
        world.ready(name, False)
    world.wait(60)
    world.step(silent="a", kernel="a", times=4)
    assert world.states() == "Up Up Up"
    world.step(times=h.RETURN_ANSWERS)
    world.step(silent="a", times=3)
    assert world.states() == "Suspect Up Up"
    world.peer_says("a")
    world.step(silent="a")
    assert world.states() == "Down Up Up"


def test_not_ready_of_most_is_kubernetes_problem_for_a_manager_that_has_just_started_too() -> None:
    """Their first answers come one by one."""
    world = World(*"abcd")
    world.nodes = {name: replace(known, ready=False) for name, known in world.nodes.items()}
    for answers in "abcd":
        world.nodes[answers] = h.probe_answered(world.nodes[answers], world.now_s)
        world.judge()
        world.judge()
        assert "Down" not in world.states()
    assert world.states() == "Up Up Up Up"


def test_two_of_three_at_once_are_held_by_a_lone_manager_for_a_while() -> None:
    world = up(*"abc")
    world.step(silent="ab", times=3)
    assert (world.states(), world.reason("a")) == ("Suspect* Suspect* Up", Reason.HELD_BY_PANIC)
    world.wait(h.PANIC_S - 1, silent="ab")
    assert world.states() == "Suspect* Suspect* Up"
    world.wait(2, silent="ab")
    assert world.states() == "Suspect Suspect Up"


def test_panic_begins_before_the_first_is_withdrawn() -> None:
    """The first to miss three times must not be withdrawn when the rest is one miss behind."""
    world = up(*"abcd")
    world.step(silent="a")
    world.step(silent="abcd", times=2)
    assert world.states().split()[0] == "Suspect*"
    world.step(silent="abcd")
    assert world.states() == "Suspect* Suspect* Suspect* Suspect*"


def test_panic_ends_when_the_other_manager_agrees() -> None:
    world = up(*"abc")
    world.peer_says("", seen=3)
    world.step(silent="ab", times=3)
    assert world.states() == "Suspect* Suspect* Up"
    world.peer_says("ab", seen=1)
    world.judge()
    assert world.states() == "Down Down Up"


def test_panic_holds_for_as_long_as_the_other_sees_more() -> None:
    world = up(*"abcd")
    world.peer_says("", seen=4)
    world.wait(h.PANIC_S * 3, silent="abcd")
    assert world.states() == "Suspect* Suspect* Suspect* Suspect*"
    assert h.gone(world.nodes.values()) == {node_hash(name) for name in "abcd"}
    assert h.down_set(world.nodes.values()) == frozenset()


def test_no_node_is_taken_for_dead_while_no_manager_sees_any() -> None:
    """It may be what is between; both see the same. Where a manager sees one, it is believed."""
    world = up(*"abc")
    for _ in range(3):
        world.peer_says("abc", seen=0)
        world.wait(h.PANIC_S * 3, silent="abc")
        assert world.states() == "Suspect* Suspect* Suspect*"
        assert h.down_set(world.nodes.values()) == frozenset()
        world.step(times=h.RETURN_ANSWERS)
        assert world.states() == "Up Up Up" and world.reason("a") is None
    world.peers = ()
    world.wait(h.PANIC_S * 3, silent="abc")
    assert world.states() == "Suspect* Suspect* Suspect*"
    world.peer_says("bc", seen=1)
    world.wait(h.AT_ONCE_S / 2, silent="abc")
    assert world.states() == "Suspect* Suspect* Suspect*"  # they may be about to answer
    world.now_s += h.AT_ONCE_S
    world.judge()
    assert world.states() == "Suspect* Down Down"


def test_not_ready_decides_where_no_manager_sees_any_node() -> None:
    world = up(*"ab")
    world.peer_says("ab", seen=0)
    world.wait(5, silent="ab")
    world.ready("a", False)
    world.ready("b", False)
    assert world.states() == "Down Down"


def test_what_was_held_stays_so_while_its_answers_come_back() -> None:
    """One after the other; and it has not fallen."""
    world = up(*"abc")
    world.peer_says("abc", seen=0)
    world.wait(1, silent="abc")
    world.step(silent="bc", times=h.RETURN_ANSWERS - 1)
    world.step()
    assert world.states() == "Up Suspect* Suspect*"
    world.step(times=h.RETURN_ANSWERS)
    assert world.states() == "Up Up Up"
    assert not any(health.falls for health in world.nodes.values())


def test_what_answers_a_little_later_than_the_others_has_not_fallen() -> None:
    """And what does not answer at all is gone then, for both managers say so."""
    world = up("a", "b", "c")
    world.peer_says("abc", seen=0)
    world.wait(20.0, "abc")
    world.peer_says("c", seen=2)
    world.step("c", times=3)
    assert world.states() == "Up Up Suspect*"
    world.wait(h.AT_ONCE_S / 2 - 3 * TICK, "c")
    assert world.states() == "Up Up Suspect*"
    nodes, now_s = dict(world.nodes), world.now_s
    world.step(times=3)
    assert world.states() == "Up Up Up" and world.nodes["c"].falls == 0
    world.nodes, world.now_s = nodes, now_s
    world.wait(h.AT_ONCE_S / 2 + TICK, "c")
    assert world.states() == "Up Up Down"


def test_a_blink_spares_nobody() -> None:
    """The last node is busy and late for a moment: the others are dead all the same."""
    world = up("a", "b", "c")
    world.peer_says("abc", seen=0)
    world.step("abc", times=LIMITS.misses)
    assert world.states() == "Suspect* Suspect* Suspect*"
    world.peer_says("bc", seen=1)
    world.step("bc")
    assert world.states() == "Suspect* Down Down"


def test_panic_ends_though_the_other_cannot_name_all_that_it_calls_gone() -> None:
    """A heartbeat has room for so many; both see the same, so neither would ever give in."""
    world = up(*"abcde")
    world.peers = (PeerView("m2", True, True, 1, frozenset({node_hash("a")}), whole=False),)
    world.wait(h.PANIC_S - 1, silent="abcd")
    assert world.states() == "Down Suspect* Suspect* Suspect* Up"
    world.wait(2, silent="abcd")
    assert world.states() == "Down Suspect Suspect Suspect Up"


def test_in_panic_the_one_that_sees_more_withdraws() -> None:
    world = up(*"abcde")
    world.peer_says("de", seen=1)
    world.step(silent="abc", times=3)
    assert world.states() == "Suspect Suspect Suspect Up Up"


def test_not_ready_decides_a_panic() -> None:
    world = up(*"abc")
    world.step(silent="ab", times=3)
    world.ready("a", False)
    assert world.states().split()[0] == "Down"


def test_the_kernel_decides_a_panic() -> None:
    world = up(*"abc")
    world.step(silent="ab", kernel="ab", times=3)
    assert world.states() == "Up Up Up"
    world.wait(h.SILENT_S, silent="ab", kernel="ab")
    assert world.states() == "AgentSilent AgentSilent Up"


def test_nodes_that_go_one_after_another_are_no_panic() -> None:
    world = up(*"abcde")
    for gone in ("a", "ab", "abc", "abcd"):
        world.wait(5, silent=gone)
        assert "*" not in world.states()
    assert world.states() == "Suspect Suspect Suspect Suspect Up"


def test_half_is_not_more_than_half() -> None:
    world = up(*"abcd")
    world.step(silent="ab", times=3)
    assert world.states() == "Suspect Suspect Up Up"


def test_single_node_is_never_a_panic() -> None:
    world = up("a")
    world.step(silent="a", times=3)
    assert world.states() == "Suspect"


def test_flapping_node_waits_longer_each_time() -> None:
    world = up(*"abcd")
    waits = []
    for _ in range(9):
        world.wait(2, silent="a")
        world.step(times=h.RETURN_ANSWERS)
        assert world.nodes["a"].state is S.UP
        start_s = world.now_s
        while world.reason("a") is Reason.NODE_FLAPPING:
            assert not world.nodes["a"].stable(world.now_s)
            world.step()
        waits.append(round(world.now_s - start_s))
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_falls_are_forgiven_after_a_long_time_up() -> None:
    world = up(*"abcd")
    for _ in range(4):
        world.wait(2, silent="a")
        world.wait(1)
    assert world.nodes["a"].falls == 4
    world.wait(h.FORGIVE_S + 1)
    assert world.nodes["a"].falls == 0


def test_stall_shifts_what_is_dated_but_not_into_the_future() -> None:
    world = up(*"ab")
    world.step(silent="a", kernel="a", times=3)
    old = world.nodes["a"]
    new = h.stalled(old, 2.0, world.now_s + 2.0)
    assert old.kernel_s is not None and new.kernel_s == old.kernel_s + 2.0
    assert new.silent_s == old.silent_s + 2.0
    assert h.stalled(old, 9.0, world.now_s + 1.0).kernel_s == world.now_s + 1.0


def test_pardon_is_for_real_stalls_and_not_for_ever() -> None:
    assert h.pardon(0.2, TICK, 0)
    assert not h.pardon(0.02, TICK, 0)
    assert not h.pardon(0.4, 0.5, 0)
    assert not h.pardon(0.2, TICK, h.PARDONS)


class Crowd:
    """A thousand nodes that are probed a tenth at a time; some of them die at once."""

    def __init__(self, dead: Iterable[int]) -> None:
        self.tick_s = 1 / 16
        self.limits = Limits(interval_s=10 * self.tick_s)
        self.order = [f"n{n:03}" for n in range(1000)]
        self.nodes = {name: Health(name, S.UP, reason=None, answers=3) for name in self.order}
        self.dead = {self.order[n] for n in dead}
        self.asked_s: dict[str, float] = {}
        self.ticks = 0

    def tick(self) -> None:
        now_s = self.ticks * self.tick_s
        silent_s = {n: at_s for n, at_s in self.asked_s.items() if self.nodes[n].state is S.UP}
        early = h.early(silent_s, now_s, self.tick_s)
        due = {*self.order[self.ticks % 10 :: 10], *early} & self.dead
        for name in due & self.asked_s.keys():
            self.nodes[name] = h.probe_missed(self.nodes[name], now_s)
        self.nodes.update(h.judge(self.nodes, (), now_s, self.limits))
        self.asked_s.update(dict.fromkeys(due, now_s))
        self.ticks += 1

    def fallen(self, held: bool) -> set[str]:
        return {n for n, one in self.nodes.items() if one.state is S.SUSPECT and one.held is held}


@pytest.mark.parametrize("dead", [[0], [999], range(5, 1000, 40), range(0, 250, 10)])
def test_a_few_of_many_nodes_are_suspect_before_their_turns_come(dead: Iterable[int]) -> None:
    crowd = Crowd(dead)
    while crowd.fallen(held=False) != crowd.dead:
        crowd.tick()
        assert crowd.ticks <= 10 + LIMITS.misses


@pytest.mark.parametrize(
    "dead",
    [
        range(501),
        [*range(0, 1000, 2), 1],
        [n for n in range(1000) if n % 10 > 3 or n < 60],
        [n for n in range(1000) if n % 10 in (2, 5, 6, 7, 8, 9) or n < 80],
    ],
)
def test_panic_holds_most_of_many_nodes_though_some_are_asked_early(dead: Iterable[int]) -> None:
    crowd = Crowd(dead)
    for _ in range(10 * (LIMITS.misses + 1)):
        crowd.tick()
        assert len(crowd.fallen(held=False)) <= h.EARLY
    assert crowd.fallen(held=True) == crowd.dead


def test_interval_grows_with_the_nodes() -> None:
    assert h.interval(0.05, 3) == h.interval(0.05, 50) == 0.05
    assert all(n / h.interval(0.05, n) <= h.MAX_PROBES_PER_S for n in (50, 100, 101, 1000, 9999))


ACTIONS = st.lists(
    st.tuples(
        st.text("abcde", max_size=5),
        st.text("abcde", max_size=5),
        st.sampled_from([None, "", "a", "ab", "abcde"]),
        st.integers(1, 40),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(ACTIONS)
def test_any_history_keeps_the_promises(actions: list[tuple[str, str, str | None, int]]) -> None:
    world = World(*"abcde")
    for silent, kernel, says, times in actions:
        world.peers = ()
        if says is not None:
            world.peer_says(says)
        for _ in range(times):
            before = dict(world.nodes)
            world.step(silent, kernel)
            for name, health in world.nodes.items():
                old = before[name]
                if health.state is S.DOWN and old.state is not S.DOWN:
                    assert says is not None and name in says, "Down without a second witness"
                if health.state in (S.SUSPECT, S.DOWN) and old.state is S.UP:
                    assert name in silent and health.misses >= LIMITS.misses
                assert not health.held or health.state is S.SUSPECT
    world.peers = ()
    world.step(times=h.RETURN_ANSWERS)
    assert set(world.states().split()) == {"Up"}, "who answers is Up in the end"


def tell(one: World, other: World) -> None:
    """A heartbeat."""
    nodes = one.nodes.values()
    other.peers = (PeerView("other", True, True, h.seen(nodes), h.gone(nodes)),)


STEPS = st.tuples(
    *(st.text("abcde", max_size=5) for _ in range(4)), st.booleans(), st.integers(1, 30)
)


@settings(deadline=None, max_examples=30)
@given(st.lists(STEPS, max_size=12), st.text("abcde", max_size=5))
def test_two_managers_agree_in_the_end(
    steps: list[tuple[str, str, str, str, bool, int]], dead: str
) -> None:
    """Whatever each saw, and whichever heartbeats were lost: what is dead for both is Down, what
    answers is Up, and nothing is held any more."""
    one, other = up(*"abcde"), up(*"abcde")
    for silent, silent_there, kernel, kernel_there, heard, times in steps:
        for _ in range(times):
            one.step(silent, kernel)
            other.step(silent_there, kernel_there)
            if heard:
                tell(one, other)
                tell(other, one)
            else:
                one.peers = other.peers = ()
    for silent in (dead, ""):
        for _ in range(30):
            one.step(silent)
            other.step(silent)
            tell(one, other)
            tell(other, one)
        expected = " ".join("Down" if name in silent else "Up" for name in "abcde")
        found = one.states(), other.states()
        if len(silent) == 5:  # no manager sees any: those that went together are held
            found = found[0].replace("Suspect*", "Down"), found[1].replace("Suspect*", "Down")
        assert found == (expected, expected)
