"""`lbctl drill chaos`: its plan is a function of the seed, and each invariant can fail."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import ip_address
from itertools import combinations, islice

import pytest

from lbctl.core.model import NodeState, ObjectRef, Phase
from lbctl.core.reasons import Reason
from lbctl.core.state import (
    EipState,
    HopState,
    ManagerState,
    NodeStatus,
    PoolState,
    SessionState,
)
from lbctl.lab.drill import chaos, faults
from lbctl.lab.drill.chaos import Choice, Rack
from lbctl.lab.drill.invariants import EipSeen, ServiceSeen, Snapshot, check

RACK = Rack(
    ("node-1", "node-2"),
    ("control-1", "control-2"),
    ("tor-a", "tor-b"),
    {
        name: ("rack", f"eth{number}")
        for number, name in enumerate(
            ("node-1", "node-2", "control-1", "control-2", "tor-a", "tor-b")
        )
    },
)


def test_a_seed_always_makes_the_same_faults_and_a_longer_plan_begins_with_a_shorter_one() -> None:
    short, long = (chaos.plan(7, RACK, minutes, None) for minutes in (3, 30))
    assert long[: len(short)] == short and 3 < len(short) < len(long)
    assert sum(one.length_s for one in long) <= 30 * 60
    assert chaos.plan(8, RACK, 3, None) != short
    limited = chaos.plan(7, RACK, 30, 10)
    assert sum(len(one.steps) for one in limited) == 10


def test_every_fault_of_the_list_is_chosen_and_can_be_put_in() -> None:
    chosen = set()
    for one in islice(chaos.rounds(1, RACK), 400):
        for step in one.steps:
            assert faults.checked(step.fault, step.arguments) == step.arguments
            assert "{" not in str(step)
            chosen.add((step.fault, *sorted(step.arguments)))
    assert chosen == {(c.fault, *sorted(c.arguments)) for c in chaos._MENU}


def test_services_come_change_and_go_by_turns() -> None:
    there: set[str] = set()
    gone = 0
    for one in islice(chaos.rounds(2, RACK), 200):
        for asked in one.changes:
            if asked.replicas:
                there.add(asked.name)
            else:
                there.remove(asked.name)  # what goes was there
                gone += 1
    assert gone > 20


NODE = Choice("node", "powerCut", {})
DEAF = Choice("manager", "partition", {}, deaf=True)
MANAGER = Choice("manager", "powerCut", {})
CLUSTER = Choice("cluster", "freeze", {})
SWITCH = Choice("switch", "powerCut", {})
RESET = Choice("switch", "resetSessions", {})
WORK = Choice("work", "rollout", {}, asks=True)


@pytest.mark.parametrize(
    ("choices", "survived"),
    [
        ((NODE, MANAGER, SWITCH), True),
        ((NODE, CLUSTER), True),
        ((NODE, NODE), False),
        ((NODE, MANAGER, CLUSTER), False),
        ((WORK, CLUSTER), False),
        ((NODE, DEAF), False),
        ((SWITCH, DEAF), True),
        ((RESET, MANAGER), False),
        ((RESET, NODE, WORK), True),
    ],
)
def test_what_is_not_survived_together_is_not_tried(
    choices: tuple[Choice, ...], survived: bool
) -> None:
    assert chaos.survived(choices) is survived
    if survived:
        assert all(chaos.survived(pair) for pair in combinations(choices, 2))


WEB = ObjectRef("default", "web")
A, B = "198.51.100.0", "198.51.100.1"
HOPS = frozenset({"192.0.2.21", "192.0.2.22"})


def manager(name: str, leader: bool = False, digest: str = "d1", hops: int = 2) -> ManagerState:
    return ManagerState(
        name,
        leader,
        1.0,
        pools=(PoolState("public", 10, 1),),
        eips=(
            EipState(
                ip_address(A),
                "public",
                WEB,
                Phase.BOUND,
                hops=tuple(
                    HopState(f"node-{n}", Reason.ANNOUNCED, ip_address(f"192.0.2.2{n}"))
                    for n in range(1, hops + 1)
                ),
            ),
        ),
        sessions=tuple(
            SessionState(f"tor-{n}", ip_address("192.0.2.1"), True, Reason.SESSION_UP) for n in "ab"
        ),
        nodes=(
            NodeStatus("control-1", NodeState.UNKNOWN),
            NodeStatus("node-1", NodeState.UP, digest="d1"),
            NodeStatus("node-2", NodeState.UP, digest=digest),
        ),
    )


ONE, TWO = manager("m1", True), manager("m2")
GOOD = Snapshot(
    nodes=frozenset({"node-1", "node-2"}),
    services=(ServiceSeen("web", (A,)),),
    eips=(EipSeen(A, "Bound", ("web",)),),
    managers={"control-1": ONE, "control-2": TWO},
    routes={"tor-a": {A: HOPS}, "tor-b": {A: HOPS}},
    tables={"node-1": frozenset({A}), "node-2": frozenset({A})},
    answers={f"web {A}": ""},
    programs={"node-1": Counter({"lbctl-agent": 1})},
    usual={"node-1": Counter({"lbctl-agent": 1})},
)


def test_a_lab_in_order_holds() -> None:
    assert [found.found for found in check(GOOD)] == ["yes"] * 7


def test_services_that_share_by_a_key_are_in_order() -> None:
    both = tuple(ServiceSeen(name, (A,), "k") for name in ("web", "dns"))
    shared = replace(
        GOOD,
        services=both,
        eips=(EipSeen(A, "Bound", ("web", "dns")),),
        answers={f"{name} {A}": "" for name in ("web", "dns")},
    )
    assert all(found.held for found in check(shared))


BLANK = replace(ONE, nodes=tuple(NodeStatus(f"node-{n}", NodeState.UP, digest="") for n in (1, 2)))
DOWN = replace(
    TWO, sessions=(SessionState("tor-a", ip_address("192.0.2.1"), False, Reason.SESSION_DOWN),)
)
DEAD = replace(TWO, nodes=(*TWO.nodes[:2], NodeStatus("node-2", NodeState.DOWN, digest="d1")))


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (replace(GOOD, managers={"control-1": ONE, "control-2": None}), "does not answer"),
        (replace(GOOD, managers={"control-1": ONE, "control-2": DOWN}), "no session control-2"),
        (replace(GOOD, managers={"control-1": ONE, "control-2": DEAD}), "node-2 is not Up"),
        (replace(GOOD, managers={"control-1": TWO, "control-2": TWO}), "0 managers lead"),
        (
            replace(GOOD, managers={"control-1": ONE, "control-2": replace(TWO, sessions=())}),
            "control-2 has 0 sessions to 2 switches",
        ),
        (
            replace(GOOD, managers={"control-1": ONE, "control-2": replace(TWO, eips=())}),
            f"m2 does not know of {A}",
        ),
        (
            replace(GOOD, managers={"control-1": BLANK, "control-2": BLANK}),
            "node-1, node-2: none",
        ),
        (replace(GOOD, services=(*GOOD.services, ServiceSeen("dns", (A,)))), f"{A} is on web, dns"),
        (
            replace(
                GOOD, services=(ServiceSeen("web", (A,), "k"), ServiceSeen("dns", (A,), "other"))
            ),
            f"{A} is on web, dns",
        ),
        (replace(GOOD, eips=(*GOOD.eips, *GOOD.eips)), f"{A} has 2 EIP objects"),
        (replace(GOOD, services=(*GOOD.services, ServiceSeen("dns", ()))), "dns has none"),
        (replace(GOOD, eips=()), f"web shows {A}, which no EIP object gives it"),
        (replace(GOOD, routes={"tor-a": {}, "tor-b": {A: HOPS}}), f"tor-a: {A} to nobody"),
        (replace(GOOD, routes={"tor-a": {A: frozenset({"192.0.2.21"})}}), "to 192.0.2.21, not"),
        (replace(GOOD, routes={}), "no switch is on"),
        (
            replace(GOOD, managers={"control-1": ONE, "control-2": manager("m2", hops=0)}),
            f"m2 announces no next hop of {A}",
        ),
        (replace(GOOD, managers={"control-1": manager("m1", True, "d2")}), "node-2: d2"),
        (replace(GOOD, answers={f"web {A}": "0 of 3"}), f"{A} of web: 0 of 3"),
        (replace(GOOD, answers={}), "was not asked"),
        (replace(GOOD, eips=(*GOOD.eips, EipSeen(B, "Releasing", ("x",)))), f"EIP {B} (Releasing)"),
        (replace(GOOD, eips=(*GOOD.eips, EipSeen(B, "Bound", ("x",)))), f"EIP {B} (Bound) of x"),
        (
            replace(GOOD, routes={**GOOD.routes, "tor-a": {A: HOPS, B: HOPS}}),
            f"route {B} on tor-a",
        ),
        (replace(GOOD, tables={"node-1": frozenset({A, B})}), f"entries of {B} on node-1"),
        (
            replace(GOOD, programs={"node-1": Counter({"lbctl-agent": 2})}),
            "1 x lbctl-agent on node-1",
        ),
        (
            replace(GOOD, programs={"node-1": Counter({"lbctl-agent stopped": 1})}),
            "lbctl-agent is missing on node-1",
        ),
    ],
)
def test_each_invariant_can_fail(seen: Snapshot, said: str) -> None:
    wrong = [found.found for found in check(seen) if not found.held]
    assert any(said in text for text in wrong), wrong
