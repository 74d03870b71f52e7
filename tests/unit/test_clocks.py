"""Clocks that are set back: what is remembered goes by one that never steps."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from lbctl.core import probe
from lbctl.core.actions import DeleteEip, SetUnforwarded
from lbctl.core.keys import Keys
from lbctl.core.model import Eip, ObjectRef, Phase
from lbctl.core.probe import Heartbeat
from lbctl.core.release import Facts
from manager.releasing import Releasing
from manager.speaker.ears import FORGET_S, Ears

EIP = Eip(ip_address("198.51.100.1"), "a", ObjectRef("default", "web"), "u", Phase.RELEASING)
RING = Keys(bytes(range(7, 39))).managers()


def test_a_wall_clock_that_is_set_back_holds_no_address() -> None:
    clock, wall = [100.0], [1_700_000_000.0]
    facts = Facts(living={"m"}, drain_time_s=2, reuse_after_s=30)
    releasing = Releasing(
        lambda: facts, lambda _ref: None, lambda _ref: (), lambda: clock[0], lambda: wall[0]
    )
    releasing.set_eip(replace(EIP, withdrawn_by=("m",)))
    assert releasing.plan() == () and releasing.next_s() == 2
    clock[0], wall[0] = 102.0, wall[0] - 3600
    [action] = releasing.plan()
    assert isinstance(action, SetUnforwarded)
    dark = replace(EIP, withdrawn_by=("m",), forwarding=False, unforwarded_s=wall[0])
    releasing.set_eip(dark)
    assert releasing.plan() == () and releasing.next_s() == 30
    clock[0], wall[0] = 132.0, wall[0] - 3600
    [action] = releasing.plan()
    assert isinstance(action, DeleteEip), releasing.steps


def test_a_manager_whose_clock_was_set_back_is_heard_again() -> None:
    now = [100.0]
    ears = Ears(0, lambda: RING, lambda: now[0])

    def beat(boot: int, sequence: int) -> bool:
        message = Heartbeat("m", boot, sequence, True, True, 3, 0, frozenset())
        ears.datagram_received(probe.encode_heartbeat(message, RING.signing), ("", 0))
        return ears.other_announces("me", now[0])

    assert beat(boot=5, sequence=7)
    now[0] += 2
    assert not beat(boot=5, sequence=7), "a replayed one"
    assert not beat(boot=4, sequence=9), "one of before its restart"
    now[0] += FORGET_S
    assert beat(boot=4, sequence=10)
