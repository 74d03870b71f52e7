"""Giving back an address: the table of `lbctl.core.release`, row by row."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from lbctl.core import names
from lbctl.core.actions import ClearStatus, DeleteEip, RemoveFinalizer, SetUnforwarded
from lbctl.core.model import Eip, ObjectRef, Phase, Service
from lbctl.core.reasons import Reason
from lbctl.core.release import Facts, Releases, Stage, Step

ADDRESS = ip_address("10.0.0.5")
OTHER = ip_address("2001:db8::5")
REF = ObjectRef("default", "web")
BOUND = Eip(ADDRESS, "a", REF, "uid")
RELEASING = replace(BOUND, phase=Phase.RELEASING, released_s=100.0)
WITHDRAWN = replace(RELEASING, withdrawn_by=("m1", "m2"))
DARK = replace(WITHDRAWN, forwarding=False, unforwarded_s=102.0)
DELETED = Service(
    REF, "uid", 0.0, (), True, deleting=True, finalizers=(names.FINALIZER,), ingress=(ADDRESS,)
)
FACTS = Facts(living={"m1", "m2"}, hold_time_s=9, drain_time_s=2, reuse_after_s=30)


def one(
    eip: Eip, facts: Facts = FACTS, now_s: float = 102.0, service: Service | None = None
) -> Step:
    return Releases().step(eip, service, (eip,), facts, now_s)


def test_the_whole_way() -> None:
    releases = Releases()

    def step(eip: Eip, now_s: float, service: Service | None = DELETED, **facts: object) -> Step:
        known = replace(FACTS, **facts)  # type: ignore[arg-type]
        return releases.step(eip, service, (eip,), known, now_s)

    assert step(BOUND, 99).actions == ()
    found = step(RELEASING, 100)
    assert (found.stage, found.actions, found.again_s) == (Stage.WITHDRAWING, (), None)
    assert "m1, m2" in found.sentence
    assert step(replace(RELEASING, withdrawn_by=("m2",)), 101).stage is Stage.WITHDRAWING
    found = step(WITHDRAWN, 103)
    assert (found.stage, found.actions, found.again_s) == (Stage.DRAINING, (), 105)
    assert step(WITHDRAWN, 104.9).actions == ()
    (action,) = step(WITHDRAWN, 105).actions
    assert isinstance(action, SetUnforwarded)
    assert action == SetUnforwarded(REF, WITHDRAWN, Reason.RELEASING)
    found = step(DARK, 106, confirming={ADDRESS: {"node-2"}})
    assert (found.stage, found.actions) == (Stage.UNPROGRAMMING, ())
    assert "node-2" in found.sentence
    clear, remove = step(DARK, 107).actions
    assert clear == ClearStatus(REF, DELETED, Reason.RELEASED)
    assert remove == RemoveFinalizer(REF, DELETED, Reason.RELEASED)
    found = step(DARK, 110, None)
    assert (found.stage, found.reason, found.again_s) == (Stage.RESTING, Reason.REUSE_DELAY, 132)
    (action,) = step(DARK, 132, None).actions
    assert isinstance(action, DeleteEip)
    assert action == DeleteEip(REF, DARK, Reason.RELEASED)


@pytest.mark.parametrize(
    ("living", "gone", "waits"),
    [
        ({"m1"}, {}, False),
        ({"m1", "m3"}, {}, True),
        ({"m1"}, {"m3": 101.0}, True),  # its routes may stand on a switch until 110
        ({"m1"}, {"m3": 93.0}, False),
        ({"m1"}, {"m2": 101.0}, False),  # it had withdrawn before it went
        (set(), {}, True),  # nobody known is not everybody
    ],
)
def test_whose_withdrawal_counts(living: set[str], gone: dict[str, float], waits: bool) -> None:
    found = one(WITHDRAWN, replace(FACTS, living=living, gone=gone))
    assert (found.stage is Stage.WITHDRAWING) is waits


def test_it_is_asked_again_when_a_vanished_manager_stops_to_count() -> None:
    facts = replace(FACTS, gone={"m3": 101.0, "m4": 100.0})
    assert one(WITHDRAWN, facts).again_s == 109


def test_draining_starts_anew_when_a_manager_comes_that_has_not_withdrawn() -> None:
    releases = Releases()
    assert releases.step(WITHDRAWN, None, (), FACTS, 100).again_s == 102
    more = replace(FACTS, living={"m1", "m2", "m3"})
    assert releases.step(WITHDRAWN, None, (), more, 101).stage is Stage.WITHDRAWING
    assert releases.step(WITHDRAWN, None, (), FACTS, 103).again_s == 105


def test_a_service_that_is_ours_keeps_finalizer_and_status() -> None:
    ours = replace(DELETED, deleting=False, ingress=(ip_address("10.0.0.6"),))
    assert one(DARK, service=ours).stage is Stage.RESTING


def test_an_address_that_is_still_shown_is_not_freed() -> None:
    ours = replace(DELETED, deleting=False)
    found = one(DARK, service=ours, now_s=1000)
    assert (found.stage, found.actions) == (Stage.CLEARING, ())


def test_the_finalizer_goes_with_the_last_address() -> None:
    sibling = replace(DARK, address=OTHER)
    both = replace(DELETED, ingress=(ADDRESS, OTHER))
    releases = Releases()
    for other in (
        replace(sibling, phase=Phase.BOUND),
        replace(sibling, forwarding=True),
    ):
        assert releases.step(DARK, both, (DARK, other), FACTS, 103).actions == ()
    busy = replace(FACTS, confirming={OTHER: {"node-1"}})
    assert releases.step(DARK, both, (DARK, sibling), busy, 103).actions == ()
    found = releases.step(DARK, both, (DARK, sibling), FACTS, 103)
    assert [type(action) for action in found.actions] == [ClearStatus, RemoveFinalizer]


def test_a_status_of_somebody_else_is_left() -> None:
    other = replace(DELETED, load_balancer_class="example.com/lb", deleting=False)
    foreign = replace(other, ingress=(ip_address("192.0.2.1"),), finalizers=())
    assert one(DARK, service=foreign).stage is Stage.RESTING


def test_a_clock_that_was_ahead_does_not_hold_an_address_for_ever() -> None:
    releases = Releases()
    ahead = replace(DARK, unforwarded_s=10_000.0)
    assert releases.step(ahead, None, (), FACTS, 200).again_s == 230
    assert releases.step(ahead, None, (), FACTS, 230).stage is Stage.FREE


def test_no_nodes_at_all_hold_nothing() -> None:
    assert one(DARK, replace(FACTS, confirming={}), now_s=200).stage is Stage.FREE
