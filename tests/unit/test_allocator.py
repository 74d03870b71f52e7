"""The allocator, case by case."""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import names
from lbctl.core.actions import (
    Action,
    AddFinalizer,
    ClearStatus,
    CreateEip,
    RebindEip,
    Refused,
    ReleaseEip,
    RemoveFinalizer,
    WriteStatus,
)
from lbctl.core.allocator import Allocator, plan
from lbctl.core.config import Config, parse
from lbctl.core.model import Eip, ObjectRef, Phase, Service
from lbctl.core.reasons import Reason
from tests.unit.allocator_model import marked


def config(*pools: str) -> Config:
    """Pools written `name ADDRESSES…`; a name that starts with `-` does not assign by itself."""
    items = []
    for pool in pools:
        name, *addresses = pool.split()
        auto = "false" if name.startswith("-") else "true"
        listed = ", ".join(f'"{text}"' for text in addresses)
        items.append(f"{{name: {name.lstrip('-')}, addresses: [{listed}], autoAssign: {auto}}}")
    return parse(f"version: 1\npools: [{', '.join(items)}]\nbgp: {{asn: 64512, peers: []}}\n")


def service(name: str, created_s: float = 0.0, **changes: Any) -> Service:
    made = Service(ObjectRef("default", name), f"uid-{name}", created_s, (), True)
    return replace(made, **changes)


def settled(name: str, *addresses: str, **changes: Any) -> Service:
    """A Service that has its finalizer, its status and the name of its pool."""
    ingress = tuple(ip_address(text) for text in addresses)
    return marked(service(name, ingress=ingress, **changes), "a")


def eip(address: str, owner: str, phase: Phase = Phase.BOUND, **changes: object) -> Eip:
    made = Eip(ip_address(address), "a", ObjectRef("default", owner), f"uid-{owner}", phase)
    return replace(made, **changes)  # type: ignore[arg-type]


def kinds(actions: tuple[Action, ...]) -> list[str]:
    return [type(action).__name__ for action in actions]


def given_to(actions: tuple[Action, ...]) -> dict[str, str]:
    return {a.service.name: str(a.eip.address) for a in actions if isinstance(a, CreateEip)}


def refused(actions: tuple[Action, ...]) -> dict[str, Reason]:
    return {a.service.name: a.reason for a in actions if isinstance(a, Refused)}


def accept(allocator: Allocator, actions: tuple[Action, ...]) -> None:
    """Feed back what the API server would hold after these actions."""
    held: dict[ObjectRef, Service] = {}
    for action in actions:
        match action:
            case CreateEip(eip=made) | RebindEip(eip=made):
                allocator.set_eip(made)
            case ReleaseEip(seen=seen):
                allocator.set_eip(replace(seen, phase=Phase.RELEASING))
            case AddFinalizer(service=ref, seen=found, pools=pools):
                held[ref] = marked(held.get(ref, found), pools)
                allocator.set_service(held[ref])
            case WriteStatus(service=ref, seen=found, addresses=addresses):
                held[ref] = replace(held.get(ref, found), ingress=addresses)
                allocator.set_service(held[ref])


def test_one_service() -> None:
    web = service("web")
    actions = plan(config("a 10.0.0.4/30"), [web], [])
    made = Eip(ip_address("10.0.0.4"), "a", web.ref, web.uid)
    assert actions == (
        AddFinalizer(web.ref, web, Reason.ALLOCATED, "a"),
        CreateEip(web.ref, made, Reason.ALLOCATED),
        WriteStatus(web.ref, web, (made.address,), Reason.ALLOCATED),
    )


def test_nothing_to_do_when_all_is_written() -> None:
    assert (
        plan(config("a 10.0.0.4/30"), [settled("web", "10.0.0.5")], [eip("10.0.0.5", "web")]) == ()
    )


def test_who_got_its_address_before_there_was_the_annotation_gets_that_once() -> None:
    old = replace(settled("web", "10.0.0.5"), annotations=(("team", "x"),))
    held = [eip("10.0.0.5", "web")]
    assert plan(config("a 10.0.0.0/24"), [old], held) == (
        AddFinalizer(old.ref, old, Reason.RESTORED, "a"),
    )
    assert plan(config("a 10.0.0.0/24"), [marked(old, "a")], held) == ()


def test_order_of_a_batch() -> None:
    batch = [
        service("young", 5.0),
        service("b", 1.0),
        service("a", 1.0),
        service("asks", 9.0, requested="10.0.0.0"),
    ]
    actions = plan(config("a 10.0.0.0-10.0.0.3"), batch, [])
    assert given_to(actions) == {
        "asks": "10.0.0.0",
        "a": "10.0.0.1",
        "b": "10.0.0.2",
        "young": "10.0.0.3",
    }


@settings(deadline=None)
@given(st.permutations(range(8)), st.permutations(range(4)), st.integers(1, 9))
def test_the_order_of_arrival_does_not_matter(order: list[int], held: list[int], size: int) -> None:
    services = [
        service(f"s{n}", float(n % 3), requested="10.0.0.2" if n in (5, 6) else None)
        for n in range(8)
    ]
    eips = [
        eip("10.0.0.1", "s3"),
        eip("10.0.0.3", "s7", Phase.RELEASING),
        eip("10.0.0.4", "gone"),
        eip("10.0.0.5", "gone", Phase.RELEASING),
    ]
    pools = config(f"a 10.0.0.0-10.0.0.{size}")
    expected = plan(pools, services, eips)
    assert plan(pools, [services[n] for n in order], [eips[n] for n in held]) == expected


def test_what_exists_is_restored_before_anything_new() -> None:
    actions = plan(config("a 10.0.0.0/31"), [service("old", 9.0), service("new", 1.0)], [
        eip("10.0.0.0", "old"),
    ])  # fmt: skip
    assert given_to(actions) == {"new": "10.0.0.1"}
    statuses = {a.service.name: a.addresses for a in actions if isinstance(a, WriteStatus)}
    assert statuses["old"] == (ip_address("10.0.0.0"),)


def test_a_status_without_an_eip_object_is_a_claim() -> None:
    """A cluster restored without its `eips`: nobody moves."""
    allocator = Allocator(config("a 10.0.0.0/31"))
    for one in (service("x", 1.0), settled("y", "10.0.0.0", created_s=5.0)):
        allocator.set_service(one)
    claims = allocator.plan()
    assert given_to(claims) == {"y": "10.0.0.0"}
    assert next(a.reason for a in claims if isinstance(a, CreateEip)) is Reason.RESTORED
    assert given_to(allocator.plan()) == {"x": "10.0.0.1"}


def test_an_address_of_ours_in_a_status_without_right_is_cleared() -> None:
    actions = plan(
        config("a 10.0.0.0/32"),
        [settled("right", "10.0.0.0"), settled("wrong", "10.0.0.0")],
        [eip("10.0.0.0", "right")],
    )
    assert kinds(actions) == ["ClearStatus", "Told", "Refused"]
    assert {a.service.name for a in actions} == {"wrong"}
    foreign = settled("other", "192.0.2.77")
    assert kinds(plan(config("-a 10.0.0.0/32"), [foreign], [])) == ["Refused"]


def test_a_full_pool_and_the_line_before_it() -> None:
    allocator = Allocator(config("a 10.0.0.0/31"))
    for n in range(5):
        allocator.set_service(service(f"s{n}", float(n)))
    actions = allocator.plan()
    assert given_to(actions) == {"s0": "10.0.0.0", "s1": "10.0.0.1"}
    assert refused(actions) == dict.fromkeys(("s2", "s3", "s4"), Reason.POOL_EXHAUSTED)
    accept(allocator, actions)
    assert allocator.plan() == ()  # said once
    allocator.set_service(service("s9", 0.5))  # older than those in line, and none free
    assert refused(allocator.plan()) == {"s9": Reason.POOL_EXHAUSTED}
    allocator.remove_service(ObjectRef("default", "s0"))
    actions = allocator.plan()
    assert kinds(actions) == ["ReleaseEip"]
    accept(allocator, actions)
    assert allocator.plan() == ()  # not free before its EIP object is gone
    allocator.remove_eip(ip_address("10.0.0.0"))
    assert given_to(allocator.plan()) == {"s9": "10.0.0.0"}


def test_who_leaves_the_line_does_not_use_up_the_turn_of_the_next() -> None:
    """Both in one batch: an address is free, and the first in line is gone."""
    allocator = Allocator(config("a 10.0.0.0/32"))
    for number, name in enumerate(["has", "first", "second"]):
        allocator.set_service(service(name, number))
    accept(allocator, allocator.plan())
    for name in ("has", "first"):
        allocator.remove_service(ObjectRef("default", name))
    allocator.remove_eip(ip_address("10.0.0.0"))
    assert given_to(allocator.plan()) == {"second": "10.0.0.0"}


def test_a_bigger_pool_serves_who_waits() -> None:
    allocator = Allocator(config("a 10.0.0.0/32"))
    for n in range(3):
        allocator.set_service(service(f"s{n}", float(n)))
    accept(allocator, allocator.plan())
    allocator.plan()
    allocator.configure(config("a 10.0.0.0/30"))
    assert given_to(allocator.plan()) == {"s1": "10.0.0.1", "s2": "10.0.0.2"}


def test_no_configuration_yet() -> None:
    allocator = Allocator()
    allocator.set_service(service("web"))
    allocator.set_eip(eip("10.0.0.1", "gone"))
    actions = allocator.plan()
    assert kinds(actions) == ["ReleaseEip", "Refused"]  # giving back needs no configuration
    assert refused(actions) == {"web": Reason.WAITING_FOR_CONFIG}
    allocator.configure(config("a 10.0.0.0/31"))
    assert given_to(allocator.plan()) == {"web": "10.0.0.0"}


def test_who_is_not_served() -> None:
    services = [
        service("cluster-ip", is_load_balancer=False),
        service("other", load_balancer_class="example.com/lb"),
        service("going", deleting=True),
        service("ours", load_balancer_class=names.LOAD_BALANCER_CLASS),
    ]
    allocator = Allocator(config("a 10.0.0.0/24"))
    for one in services:
        allocator.set_service(one)
    assert set(given_to(allocator.plan())) == {"ours"}
    reasons = {ref.name: d.reason for ref, d in allocator.decisions().items()}
    assert reasons == {
        "cluster-ip": Reason.NOT_LOAD_BALANCER,
        "other": Reason.OTHER_CLASS,
        "going": Reason.RELEASING,
        "ours": Reason.ALLOCATED,
    }


def test_giving_back() -> None:
    for changes in ({"deleting": True}, {"is_load_balancer": False}):
        web = settled("web", "10.0.0.5", **changes)
        actions = plan(config("a 10.0.0.0/24"), [web], [eip("10.0.0.5", "web")])
        assert actions == (ReleaseEip(web.ref, eip("10.0.0.5", "web"), Reason.RELEASING, web),)
        releasing = eip("10.0.0.5", "web", Phase.RELEASING)
        assert plan(config("a 10.0.0.0/24"), [web], [releasing]) == ()
    assert kinds(plan(config("a 10.0.0.0/24"), [], [eip("10.0.0.5", "web")])) == ["ReleaseEip"]


def test_a_finalizer_without_an_eip_keeps_nothing_from_going() -> None:
    going = settled("web", deleting=True)
    assert kinds(plan(config(), [going], [])) == ["RemoveFinalizer"]
    changed = replace(going, is_load_balancer=False)
    assert kinds(plan(config(), [changed], [])) == ["RemoveFinalizer"]
    assert plan(config(), [replace(changed, deleting=False)], []) == ()
    assert plan(config(), [replace(going, load_balancer_class="example.com/lb")], []) == ()


def test_the_same_name_gets_its_address_back() -> None:
    released = eip(
        "10.0.0.7",
        "web",
        Phase.RELEASING,
        forwarding=False,
        withdrawn_by=("m",),
        released_s=1.0,
        unforwarded_s=2.0,
        version="77",
    )
    again = service("web", uid="second")
    actions = plan(config("a 10.0.0.0/24"), [again], [released])
    assert kinds(actions) == ["AddFinalizer", "RebindEip", "WriteStatus"]
    rebind = actions[1]
    assert isinstance(rebind, RebindEip)
    assert rebind.seen.version == rebind.eip.version == "77"
    assert rebind.eip == Eip(released.address, "a", again.ref, "second")


def test_a_service_made_anew_keeps_its_bound_address() -> None:
    again = service("web", uid="second")
    actions = plan(config("a 10.0.0.0/24"), [again], [eip("10.0.0.7", "web")])
    assert kinds(actions) == ["AddFinalizer", "RebindEip", "WriteStatus"]


def test_two_eips_of_one_service() -> None:
    """A frozen leader's late write. The one in the status stays."""
    web = settled("web", "10.0.0.9")
    actions = plan(config("a 10.0.0.0/24"), [web], [eip("10.0.0.2", "web"), eip("10.0.0.9", "web")])
    assert actions == (ReleaseEip(web.ref, eip("10.0.0.2", "web"), Reason.RELEASING, web),)


def test_what_is_kept_in_spite_of_a_refusal_is_not_written_as_one() -> None:
    asks = settled("web", "10.0.0.7", annotations=(("lbctl.io/address-pool", "a"),))
    actions = plan(config("b 10.0.0.0/24"), [asks], [eip("10.0.0.7", "web")])
    (kept,) = (action for action in actions if isinstance(action, RebindEip))
    assert (kept.eip.pool, kept.reason) == ("b", Reason.RESTORED)
    assert refused(actions) == {"web": Reason.POOL_UNKNOWN}


def test_addresses_stay_when_pools_change() -> None:
    allocator = Allocator(config("a 10.0.0.0/24"))
    allocator.set_eip(eip("10.0.0.7", "web"))
    allocator.set_service(settled("web", "10.0.0.7"))
    allocator.set_service(settled("out", "10.0.0.8"))
    allocator.set_eip(eip("10.0.0.8", "out"))
    assert allocator.plan() == ()
    allocator.configure(config("b 10.0.0.0/27"))
    actions = allocator.plan()
    assert kinds(actions) == ["AddFinalizer", "RebindEip"] * 2  # under the pool's new name
    accept(allocator, actions)
    assert allocator.plan() == ()


def test_an_eip_that_a_leader_of_an_old_configuration_made() -> None:
    pools, made = config("a 10.0.0.0/31"), eip("10.0.9.9", "web")
    actions = plan(pools, [service("web")], [made])  # nobody was told of it
    assert kinds(actions) == ["AddFinalizer", "CreateEip", "WriteStatus", "ReleaseEip"]
    assert given_to(actions) == {"web": "10.0.0.0"}
    (said,) = plan(pools, [settled("web", "10.0.9.9")], [made])  # given: it stays, and is said
    assert isinstance(said, Refused) and said.reason is Reason.ADDRESS_OUTSIDE_POOLS
    assert plan(pools, [settled("web", "10.0.0.1")], [eip("10.0.0.1", "web")]) == ()


def test_409_and_then_another_address() -> None:
    allocator = Allocator(config("a 10.0.0.0/30"))
    allocator.set_service(service("web"))
    first = allocator.plan()
    create = first[1]
    assert isinstance(create, CreateEip)
    allocator.set_eip(eip("10.0.0.0", "thief"))
    allocator.set_service(settled("thief", "10.0.0.0"))
    allocator.failed(create)
    assert given_to(allocator.plan()) == {"web": "10.0.0.1"}


def test_a_plan_that_stopped_early_leaves_no_reservation() -> None:
    allocator = Allocator(config("a 10.0.0.0/32"))
    allocator.set_service(service("web"))
    finalizer = allocator.plan()[0]
    assert isinstance(finalizer, AddFinalizer)
    allocator.failed(finalizer)  # its CreateEip was skipped
    allocator.remove_service(ObjectRef("default", "web"))
    allocator.set_service(service("next"))
    assert given_to(allocator.plan()) == {"next": "10.0.0.0"}


def test_a_failed_event_is_said_again() -> None:
    allocator = Allocator(config())
    allocator.set_service(service("web"))
    (said,) = allocator.plan()
    assert allocator.plan() == ()
    allocator.failed(said)
    assert allocator.plan() == (said,)


# Requests


def test_a_requested_address() -> None:
    pools = config("a 10.0.0.0/30", "-b 10.0.1.0/30")
    for wish in ("10.0.0.3", "10.0.1.3"):
        assert given_to(plan(pools, [service("web", requested=wish)], [])) == {"web": wish}


def test_requests_that_cannot_be_met() -> None:
    pools = config("a 10.0.0.0/30")
    cases = {
        "10.1.0.0": Reason.ADDRESS_OUTSIDE_POOLS,
        "2001:db8::1": Reason.ADDRESS_OUTSIDE_POOLS,
        "web.example.com": Reason.REQUEST_INVALID,
        "10.0.0.1": Reason.ADDRESS_TAKEN,
        "10.0.0.2": Reason.ADDRESS_TAKEN,
    }
    eips = [eip("10.0.0.1", "holder"), eip("10.0.0.2", "was", Phase.RELEASING)]
    holder = settled("holder", "10.0.0.1")
    for wish, reason in cases.items():
        actions = plan(pools, [holder, service("web", requested=wish)], eips)
        assert refused(actions) == {"web": reason}, wish
        assert not given_to(actions)


def test_a_taken_address_is_waited_for() -> None:
    allocator = Allocator(config("a 10.0.0.0/30"))
    allocator.set_eip(eip("10.0.0.1", "was", Phase.RELEASING))
    allocator.set_service(service("web", requested="10.0.0.1"))
    (said,) = allocator.plan()
    assert isinstance(said, Refused) and "still giving it back" in said.sentence
    allocator.remove_eip(ip_address("10.0.0.1"))
    assert given_to(allocator.plan()) == {"web": "10.0.0.1"}


def test_asking_for_another_address_makes_before_it_breaks() -> None:
    pools = config("a 10.0.0.0/30")
    web = settled("web", "10.0.0.0", requested="10.0.0.2")
    actions = plan(pools, [web], [eip("10.0.0.0", "web")])
    assert kinds(actions) == ["CreateEip", "WriteStatus", "ReleaseEip"]
    web = settled("web", "10.0.0.0", requested="10.9.9.9")
    assert kinds(plan(pools, [web], [eip("10.0.0.0", "web")])) == ["Refused"]  # it keeps the old


# Families


def test_dual_stack() -> None:
    both = service("web", families=(6, 4))
    actions = plan(config("a 10.0.0.0/30 2001:db8::/64"), [both], [])
    assert kinds(actions) == ["AddFinalizer", "CreateEip", "CreateEip", "WriteStatus"]
    status = actions[-1]
    assert isinstance(status, WriteStatus)
    assert status.addresses == (ip_address("2001:db8::"), ip_address("10.0.0.0"))


def test_dual_stack_where_the_pools_have_one_family() -> None:
    actions = plan(config("a 10.0.0.0/30"), [service("web", families=(4, 6))], [])
    assert kinds(actions) == ["AddFinalizer", "CreateEip", "WriteStatus"]
    assert refused(plan(config("a 10.0.0.0/30"), [service("web", families=(6,))], [])) == {
        "web": Reason.NO_POOL
    }


def test_from_dual_stack_to_one_family() -> None:
    web = settled("web", "10.0.0.0", "2001:db8::")
    actions = plan(
        config("a 10.0.0.0/30 2001:db8::/64"),
        [web],
        [eip("10.0.0.0", "web"), eip("2001:db8::", "web")],
    )
    assert kinds(actions) == ["WriteStatus", "ReleaseEip"]


# What is never given out


def test_forbidden_addresses() -> None:
    pools = config("a 10.0.0.0-10.0.0.9")
    forbidden = [ip_address("10.0.0.0"), ip_network("10.0.0.2/31"), ip_network("::/0")]
    services = [service(f"s{n}", float(n)) for n in range(3)]
    assert given_to(plan(pools, services, [], forbidden)) == {
        "s0": "10.0.0.1",
        "s1": "10.0.0.4",
        "s2": "10.0.0.5",
    }
    wish = service("web", requested="10.0.0.3")
    actions = plan(pools, [wish], [], forbidden)
    assert refused(actions) == {"web": Reason.ADDRESS_OUTSIDE_POOLS}


def test_a_forbidden_address_does_not_come_back_when_freed() -> None:
    allocator = Allocator(config("a 10.0.0.0/32"))
    allocator.set_eip(eip("10.0.0.0", "was", Phase.RELEASING))
    allocator.configure(config("a 10.0.0.0/32"), [ip_address("10.0.0.0")])
    allocator.remove_eip(ip_address("10.0.0.0"))
    allocator.set_service(service("web"))
    assert refused(allocator.plan()) == {"web": Reason.POOL_EXHAUSTED}


# Scale


def test_ten_thousand_services() -> None:
    """Measured against itself: one change costs a small part of the batch, whatever the machine."""
    allocator = Allocator(config("a 10.0.0.0/8"))
    started = time.process_time()
    for n in range(10_000):
        allocator.set_service(service(f"s{n}", float(n % 7)))
    actions = allocator.plan()
    accept(allocator, actions)
    assert allocator.plan() == ()
    batch_s = time.process_time() - started
    assert len(set(given_to(actions).values())) == 10_000
    assert batch_s < 30, f"{batch_s:.1f} s"  # about 1 s; a quadratic one takes minutes
    started = time.process_time()
    for n in range(100):
        allocator.set_service(service(f"one-{n}"))
        accept(allocator, allocator.plan())
        allocator.plan()
    assert (time.process_time() - started) / 100 < batch_s / 100


def test_many_who_wait_do_not_slow_one_change() -> None:
    allocator = Allocator(config("a 10.0.0.0/32"))
    allocator.set_service(service("first"))
    accept(allocator, allocator.plan())
    for n in range(5000):
        allocator.set_service(service(f"s{n}", 1.0 + n))
    started = time.perf_counter()
    allocator.plan()
    all_s = time.perf_counter() - started
    started = time.perf_counter()
    allocator.remove_eip(ip_address("10.0.0.0"))
    allocator.remove_service(ObjectRef("default", "first"))
    assert given_to(allocator.plan()) == {"s0": "10.0.0.0"}
    assert time.perf_counter() - started < all_s / 10


def test_clear_status_is_what_is_left_after_an_eip_was_deleted_by_hand() -> None:
    allocator = Allocator(config("a 10.0.0.0/32"))
    allocator.set_eip(eip("10.0.0.0", "web"))
    allocator.set_service(settled("web", "10.0.0.0"))
    assert allocator.plan() == ()
    allocator.remove_eip(ip_address("10.0.0.0"))
    actions = allocator.plan()
    assert [type(a) for a in actions] == [CreateEip]  # the same address, at once
    assert not any(isinstance(a, ClearStatus | RemoveFinalizer) for a in actions)
