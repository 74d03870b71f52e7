"""`lbctl node drain`: "safe" is said only when every manager that runs has withdrawn it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from lbctl.cli.live import Answer
from lbctl.cli.node import in_the_way, unheard
from lbctl.core.model import ObjectRef, Phase
from lbctl.core.reasons import Reason
from lbctl.core.state import EipState, HopState, ManagerState

HOP = HopState("node-2", Reason.ANNOUNCED, ip_address("192.0.2.22"))
EIP = EipState(ip_address("198.51.100.1"), "public", ObjectRef("default", "web"), Phase.BOUND)


def manager(name: str, *hops: HopState, phase: Phase = Phase.BOUND) -> Answer:
    eip = replace(EIP, hops=hops, phase=phase)
    return Answer(name, state=ManagerState(name, leader=False, boot_s=0.0, eips=(eip,)))


def test_nobody_answers() -> None:
    assert in_the_way("node-2", [Answer("m-0", error="gone")]) == ("no manager answers",)


def test_one_of_two_still_announces() -> None:
    draining = replace(HOP, reason=Reason.NODE_DRAINING, next_hop=None)
    left = in_the_way("node-2", [manager("m-0", draining), manager("m-1", HOP)])
    assert left == ("m-1 still announces it for 198.51.100.1",)
    assert in_the_way("node-2", [manager("m-0", draining), manager("m-1", draining)]) == ()


def test_a_manager_that_runs_and_does_not_answer_may_still_announce() -> None:
    pending = Answer("m-1", error="its Pod is Pending", runs=False)
    assert unheard([manager("m-0"), pending]) == ""
    silent = Answer("m-1", "control-2", error="it does not answer (timed out)")
    said = unheard([manager("m-0"), silent])
    assert "m-1 on control-2 (it does not answer (timed out))" in said and "switches" in said


def test_other_nodes_and_released_eips_are_not_in_the_way() -> None:
    assert in_the_way("node-1", [manager("m-0", HOP)]) == ()
    assert in_the_way("node-2", [manager("m-0", HOP, phase=Phase.RELEASING)]) == ()
