"""Frozen leaders, one by one: what `test_allocator_stateful` once found, as sequences of calls.

Rule of all of them: a Service that shows an address owns it, Bound, at every moment; the thawed
leader's release has to lose by 409, whatever it had already asked the API server before it froze.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lbctl.core import actions
from lbctl.core.allocator import plan
from lbctl.core.model import Address, ObjectRef, Phase
from tests.unit.test_allocator import config, eip, kinds, settled
from tests.unit.test_allocator_stateful import World

WEB = ObjectRef("default", "s0")
OTHER = ObjectRef("default", "s1")


def check(world: World) -> None:
    """The invariants, which only hypothesis calls by itself."""
    world.what_is_shown_is_owned()
    world.none_moved()


def served(*refs: ObjectRef) -> World:
    """A world in which these Services have their addresses."""
    world = World()
    world.create(set(refs), None)
    world.lead()
    check(world)
    return world


def shown(world: World, ref: ObjectRef) -> list[str]:
    return [str(address) for address in world.server.services[ref].ingress]


def frozen_before(world: World, done: int) -> list[str]:
    """The leader freezes after `done` requests; what it has not done yet."""
    world.freeze(done)
    return [type(action).__name__ for action in world.frozen[-1].todo]


def thaw_and_settle(world: World, again: bool) -> None:
    """Hardest first: not even for a moment; then, that it comes to rest as it should."""
    world.thaw(again)
    check(world)
    world.teardown()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_type_that_came_back(asked: int, again: bool) -> None:
    """Same Service, same uid, same EIP: only the write before the status tells old from new."""
    world = served(WEB)
    world.change_type({WEB})
    assert frozen_before(world, asked) == ["ReleaseEip"]
    world.change_type({WEB})
    world.lead()
    assert shown(world, WEB) == ["10.0.0.0"]
    thaw_and_settle(world, again)
    assert shown(world, WEB) == ["10.0.0.0"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_name_that_came_back(asked: int, again: bool) -> None:
    world = served(WEB)
    world.delete_by_force({WEB})
    assert frozen_before(world, asked) == ["ReleaseEip"]
    world.create({WEB}, None)
    world.lead()
    thaw_and_settle(world, again)
    assert shown(world, WEB) == ["10.0.0.0"]


def test_a_409_shows_the_eip_of_a_service_that_the_thawed_leader_never_saw() -> None:
    """It reads the EIP that was in its way, takes its owner for gone and would release it, with
    the latest resourceVersion. This is what the whole suite found."""
    world = World()
    world.create({WEB}, None)
    assert frozen_before(world, 1) == ["CreateEip", "WriteStatus"]
    world.delete_by_force({WEB})
    world.create({OTHER}, None)
    world.lead()
    assert shown(world, OTHER) == ["10.0.0.0"]
    old = world.frozen[0]
    old.act()
    old.decide()
    assert actions.ReleaseEip in [type(action) for action in old.todo]
    thaw_and_settle(world, again=True)
    assert shown(world, OTHER) == ["10.0.0.0"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_wish_that_was_taken_back(asked: int, again: bool) -> None:
    """The old address is given up after the new one is shown; then the old one is asked for."""
    world = served(WEB)
    world.ask_for_another({WEB}, "10.0.0.1")
    assert frozen_before(world, 2 + asked) == ["ReleaseEip"]
    assert shown(world, WEB) == ["10.0.0.1"]
    world.server.put_service(replace(world.server.services[WEB], requested="10.0.0.0"))
    world.lead()
    assert shown(world, WEB) == ["10.0.0.0"]
    thaw_and_settle(world, again)
    assert shown(world, WEB) == ["10.0.0.0"]


def test_a_release_that_came_first_is_undone_before_the_status_is_written() -> None:
    """The other way round: the frozen one's write wins, so the leader's own loses, and is anew."""
    world = served(WEB)
    world.change_type({WEB})
    frozen_before(world, 1)
    world.change_type({WEB})
    world.leader.watch()
    world.leader.decide()
    assert [type(action) for action in world.leader.todo] == [
        actions.RebindEip,
        actions.WriteStatus,
    ]
    world.thaw(again=False)
    check(world)
    (eip,) = world.server.eips.values()
    assert eip.phase is Phase.RELEASING and not shown(world, WEB)
    world.leader.act()
    assert not shown(world, WEB), "its EIP is not as it was decided on"
    world.lead()
    check(world)
    assert shown(world, WEB) == ["10.0.0.0"]
    assert {e.phase for e in world.server.eips.values()} == {Phase.BOUND}


def test_a_service_that_changed_before_its_release_is_looked_at_again() -> None:
    """No other leader at all: the watch of Services is late, that of EIPs is not."""
    world = served(WEB)
    address: Address = world.server.services[WEB].ingress[0]
    world.leader.lose(WEB)
    world.lead_before_the_watch_delivers()
    check(world)
    assert world.server.eips[address].phase is Phase.BOUND
    world.teardown()
    assert shown(world, WEB) == [str(address)]


def test_an_address_of_an_older_configuration_goes_with_its_status() -> None:
    """The one case in which a lost status costs an address: it is in no accepted pool, so nobody
    announces it. As long as it is shown it stays, and is refused aloud."""
    world = World()
    world.create({WEB, OTHER}, None)
    frozen_before(world, 0)
    world.resize_pool(1)
    world.delete_by_force({WEB})
    world.lead()
    assert shown(world, OTHER) == ["10.0.0.0"]
    world.delete_by_force({OTHER})
    world.create({WEB}, None)
    old = world.frozen[0]
    old.watch()
    world.thaw(again=True)
    check(world)
    assert shown(world, WEB) == ["10.0.0.1"]
    world.lead()
    assert shown(world, WEB) == ["10.0.0.1"]
    world.status_is_lost({WEB})
    world.teardown()
    assert shown(world, WEB) == ["10.0.0.0"]


def test_a_bound_eip_is_bound_anew_before_it_is_shown() -> None:
    """So that a frozen leader that decided to release it loses by 409: see `core.actions`."""
    web, seen = settled("web"), eip("10.0.0.5", "web")
    actions = plan(config("a 10.0.0.0/24"), [web], [seen])
    assert kinds(actions) == ["RebindEip", "WriteStatus"]
    again = plan(config("a 10.0.0.0/24"), [settled("web", "10.0.0.5")], [seen])
    assert not again, "what is shown is left alone"
