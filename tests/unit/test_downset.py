"""The down set: agreed by all who are heard, undone by one, bounded, held in silence."""

from __future__ import annotations

from lbctl.core.downset import FORGET_S, HEARD_S, SILENT_S, DownSet, hear, resolve
from lbctl.core.probe import Request, node_hash

NODES = ("a", "b", "c", "d")
HASH = {name: node_hash(name) for name in NODES}


def say(
    state: DownSet, manager: str, names: str, now_s: float, *, sequence: int = 0, boot: int = 1
) -> DownSet:
    down = frozenset(HASH[name] for name in names)
    number = sequence or int(now_s * 1000) + 1
    request = Request(manager, boot, number, nonce=9, judging=True, down=down)
    return resolve(hear(state, request, now_s), NODES, now_s)


def test_one_manager_alone_decides() -> None:
    assert say(DownSet(), "m1", "a", 0.0).down == {"a"}


def test_all_heard_must_agree_and_one_undoes_it() -> None:
    state = say(DownSet(), "m1", "a", 0.0)
    state = say(state, "m2", "", 0.1)
    assert state.down == frozenset()
    state = say(state, "m2", "ab", 0.2)
    assert state.down == {"a"}
    assert say(state, "m1", "b", 0.3).down == {"b"}


def test_a_silent_manager_does_not_count_after_a_second() -> None:
    state = say(DownSet(), "m2", "", 0.0)
    assert say(state, "m1", "a", HEARD_S).down == frozenset()
    assert say(state, "m1", "a", HEARD_S + 0.1).down == {"a"}


def test_a_manager_that_dies_with_its_host_has_no_say_about_it() -> None:
    """Nor one that is slow for a moment, if the others call its host down; others' hosts count."""
    for host, down in (("a", {"a"}), ("b", set()), ("", set())):
        request = Request("m1", 1, 1, nonce=9, judging=True)
        state = resolve(hear(DownSet(), request, 0.0, host), NODES, 0.0)
        state = say(state, "m2", "a", SILENT_S / 2)
        assert state.down == frozenset()
        assert say(state, "m2", "a", SILENT_S + 0.01).down == down
        assert say(state, "m2", "a", HEARD_S + 0.1).down == {"a"}
    request = Request("m1", 1, 1, nonce=9, judging=True, down=frozenset({HASH["b"]}))
    alone = hear(DownSet(), request, 0.0, "b")
    assert resolve(alone, NODES, HEARD_S - 0.1).down == {"b"}


def test_held_while_nobody_is_heard() -> None:
    state = say(DownSet(), "m1", "a", 0.0)
    assert resolve(state, NODES, 500.0).down == {"a"}


def test_at_most_half_is_added_but_what_is_undone_is_undone() -> None:
    assert say(DownSet(), "m1", "ab", 0.0).down == {"a", "b"}
    state = say(DownSet(), "m1", "a", 0.0)
    assert say(state, "m1", "abc", 0.1).down == {"a"}
    assert say(state, "m1", "bcd", 0.1).down == frozenset()


def test_more_than_half_is_added_when_two_managers_agree() -> None:
    state = say(say(DownSet(), "m1", "abc", 0.0), "m2", "abd", 0.1)
    assert state.down == {"a", "b"}
    state = say(state, "m2", "abcd", 0.2)
    assert state.down == {"a", "b", "c"}
    # The one that is left adds nothing, and takes nothing back.
    assert say(state, "m1", "abcd", 0.3 + HEARD_S).down == {"a", "b", "c"}


def test_a_manager_that_does_not_judge_yet_neither_agrees_nor_disagrees() -> None:
    state = say(DownSet(), "m1", "a", 0.0)
    fresh = Request("m2", 1, 1, nonce=1, judging=False)
    state = resolve(hear(state, fresh, 0.1), NODES, 0.1)
    assert state.down == {"a"}


def test_a_replayed_request_changes_nothing() -> None:
    state = say(DownSet(), "m1", "", 0.0, sequence=5)
    assert say(state, "m1", "a", 0.1, sequence=5) == state
    assert say(state, "m1", "a", 0.1, sequence=4) == state
    assert say(state, "m1", "a", 0.1, sequence=9, boot=0) == state
    assert say(state, "m1", "a", 0.1, sequence=1, boot=2).down == {"a"}


def test_a_manager_silent_for_long_may_come_back_with_an_older_clock() -> None:
    state = say(DownSet(), "m1", "", 0.0, boot=9)
    assert say(state, "m1", "a", FORGET_S - 1, boot=2).down == frozenset()
    assert say(state, "m1", "a", FORGET_S + 3, boot=2).down == {"a"}, "it is the only one"
    state = say(state, "m2", "", FORGET_S + 1)
    assert say(state, "m1", "a", FORGET_S + 3, boot=2).down == {"a"}


def test_unknown_hashes_and_other_nodes_are_ignored() -> None:
    request = Request("m1", 1, 1, nonce=1, judging=True, down=frozenset({1, 2, 3, HASH["a"]}))
    assert resolve(hear(DownSet(), request, 0.0), NODES, 0.0).down == {"a"}
    assert resolve(hear(DownSet(), request, 0.0), ("a",), 0.0).down == frozenset()
