"""The keys of a pool, one rule a test: docs/addresses.md has them in the same order."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from lbctl.core.actions import CreateEip
from lbctl.core.model import Phase
from lbctl.core.reasons import Reason
from tests.unit.address_rules import World, config, service

A = "name: a, addresses: [10.0.0.0/29]"


def test_pools_are_tried_by_priority_then_name_and_0_comes_last() -> None:
    world = World(
        config(
            "name: z, addresses: [10.0.9.0/32]",
            "name: b, addresses: [10.0.2.0/32], priority: 2",
            "name: a, addresses: [10.0.1.0/32], priority: 2",
            "name: c, addresses: [10.0.3.0/32], priority: 1",
            "name: d, addresses: [10.0.4.0/32]",
        )
    )
    for number in range(5):
        world.put(service(f"s{number}", number))
    assert list(world.addresses().values()) == [
        "10.0.3.0",
        "10.0.1.0",
        "10.0.2.0",
        "10.0.4.0",
        "10.0.9.0",
    ]


def test_auto_assign_false_gives_on_request_only() -> None:
    world = World(config(A + ", autoAssign: false"))
    world.put(service("plain"), service("asks", requested="10.0.0.3"))
    world.put(service("pool", annotations={"lbctl.io/address-pool": "a"}))
    assert world.addresses() == {"asks": "10.0.0.3", "pool": "10.0.0.0"}
    assert world.reason("plain") is Reason.NO_POOL


def test_avoid_buggy_ips_gives_neither_0_nor_255() -> None:
    world = World(config("name: a, addresses: [10.0.0.254-10.0.1.1], avoidBuggyIPs: true"))
    world.put(*(service(f"s{n}", n) for n in range(3)))
    assert world.addresses() == {"s0": "10.0.0.254", "s1": "10.0.1.1"}
    assert world.reason("s2") is Reason.POOL_EXHAUSTED
    world.put(service("asks", requested="10.0.0.255"))
    assert world.reason("asks") is Reason.REQUEST_NOT_ALLOWED


def test_avoided_addresses_are_usable_when_reserved() -> None:
    pool = "name: a, addresses: [10.0.0.0/30], avoidBuggyIPs: true, reserved: [10.0.0.0]"
    world = World(config(pool))
    world.put(service("asks", requested="10.0.0.0"), service("plain"))
    assert world.addresses() == {"asks": "10.0.0.0", "plain": "10.0.0.1"}


def test_namespaces_and_selectors_of_namespaces_let_in() -> None:
    pool = A + ", namespaces: [shop], namespaceSelectors: [{matchLabels: {tier: front}}]"
    world = World(config(pool), labels={"web": {"tier": "front"}, "db": {"tier": "back"}})
    world.put(service("shop/s"), service("web/w"), service("db/d"), service("none/n"))
    assert set(world.addresses()) == {"s", "w"}
    assert world.reason("db/d") is Reason.POOL_NOT_FOR_NAMESPACE


def test_a_namespace_that_gets_the_label_is_served() -> None:
    world = World(config(A + ", namespaceSelectors: [{matchLabels: {tier: front}}]"))
    world.put(service("web/w"))
    assert not world.addresses()
    world.allocator.set_namespace("web", {"tier": "front"})
    world.settle()
    assert world.addresses() == {"w": "10.0.0.0"}


def test_service_selectors_choose_by_labels() -> None:
    pool = A + (
        ", serviceSelectors: [{matchExpressions: [{key: app, operator: In, values: [x]}]},"
        " {matchLabels: {public: 'yes'}}]"
    )
    world = World(config(pool, "name: b, addresses: [10.0.1.0/24]"))
    world.put(
        service("x", labels={"app": "x"}),
        service("y", labels={"app": "y"}),
        service("z", labels={"public": "yes"}),
    )
    assert world.addresses() == {"x": "10.0.0.0", "y": "10.0.1.0", "z": "10.0.0.1"}


@pytest.mark.parametrize(
    ("requests", "wish", "reason"),
    [
        ("any", "10.0.0.5", Reason.ALLOCATED),
        ("any", "10.0.0.2", Reason.ALLOCATED),
        ("listed", "10.0.0.2", Reason.ALLOCATED),
        ("listed", "10.0.0.5", Reason.REQUEST_NOT_ALLOWED),
        ("none", "10.0.0.2", Reason.REQUEST_NOT_ALLOWED),
        ("none", "10.0.0.5", Reason.REQUEST_NOT_ALLOWED),
    ],
)
def test_requests(requests: str, wish: str, reason: Reason) -> None:
    world = World(config(A + f", requests: {requests}, reserved: [10.0.0.2]"))
    world.put(service("asks", requested=wish))
    assert world.reason("asks") is reason
    assert world.addresses() == ({"asks": wish} if reason is Reason.ALLOCATED else {})


def test_reserved_addresses_are_not_given_by_themselves() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/30], reserved: [10.0.0.0/31]"))
    world.put(*(service(f"s{n}", n) for n in range(3)))
    assert world.addresses() == {"s0": "10.0.0.2", "s1": "10.0.0.3"}
    world.put(service("asks", requested="10.0.0.1"))
    assert world.addresses()["asks"] == "10.0.0.1"


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_reserved_with_owners_whatever_the_order_of_creation(order: list[int]) -> None:
    reserved = ", ".join(
        f"{{address: 10.0.0.{n + 3}, owner: db/node-{n}}}, "
        f"{{address: '2001:db8::{n + 3}', owner: db/node-{n}}}"
        for n in range(3)
    )
    pool = f"name: a, addresses: [10.0.0.0/29, '2001:db8::/64'], reserved: [{reserved}]"
    world = World(config(pool + ", requests: none"))
    for number in order:
        world.put(service(f"db/node-{number}", families=(4, 6)))
    for number in range(3):
        assert world.shown(f"db/node-{number}") == [
            f"10.0.0.{number + 3}",
            f"2001:db8::{number + 3}",
        ]


def test_quota_counts_per_namespace_and_the_next_in_line_is_served() -> None:
    world = World(config(A + ", quota: {shop: 2, '*': 1}"))
    world.put(*(service(f"shop/s{n}", n) for n in range(4)), service("web/w", 9))
    assert world.addresses() == {"s0": "10.0.0.0", "s1": "10.0.0.1", "w": "10.0.0.2"}
    assert world.reason("shop/s2") is Reason.QUOTA_EXCEEDED
    world.remove("shop/s0")
    assert world.reason("shop/s2") is Reason.QUOTA_EXCEEDED  # still on its way back
    world.free("10.0.0.0")
    assert world.addresses()["s2"] == "10.0.0.0"
    assert world.reason("shop/s3") is Reason.QUOTA_EXCEEDED


def test_a_quota_that_grows_serves_who_waits() -> None:
    world = World(config(A + ", quota: 1"))
    world.put(*(service(f"s{n}", n) for n in range(3)))
    world.configure(config(A + ", quota: 2"))
    assert set(world.addresses()) == {"s0", "s1"}


def test_a_smaller_quota_takes_nothing_back() -> None:
    world = World(config(A))
    world.put(*(service(f"s{n}", n) for n in range(3)))
    world.configure(config(A + ", quota: 1"))
    assert len(world.addresses()) == 3


def test_a_spent_quota_does_not_keep_others_from_a_free_address() -> None:
    """The first in line may not have what was freed; the second may."""
    world = World(config("name: a, addresses: [10.0.0.0/31], quota: {shop: 1}"))
    world.put(service("shop/one", 1), service("web/two", 2))
    world.put(service("shop/first", 3), service("web/second", 4))
    assert world.reason("shop/first") is Reason.QUOTA_EXCEEDED
    assert world.reason("web/second") is Reason.POOL_EXHAUSTED
    world.remove("web/two")
    world.free("10.0.0.1")
    assert world.addresses()["second"] == "10.0.0.1"


def test_moving_within_a_pool_does_not_need_a_second_place_in_the_quota() -> None:
    world = World(config(A + ", quota: 1"))
    world.put(service("web"))
    world.put(service("web", requested="10.0.0.5"))
    assert world.addresses() == {"web": "10.0.0.5"}


def test_a_draining_pool_keeps_what_it_gave_and_gives_no_more() -> None:
    world = World(config(A))
    world.put(service("old"))
    world.configure(config(A + ", drain: true"))
    world.put(
        service("plain", 1),
        service("asks", 1, requested="10.0.0.5"),
        service("pool", 1, annotations={"lbctl.io/address-pool": "a"}),
    )
    assert world.addresses() == {"old": "10.0.0.0"}
    assert world.reason("asks") is world.reason("pool") is Reason.POOL_DRAINING
    world.vanish("old")
    world.put(service("old", 2, uid="second"))  # not even the one that rests
    assert not world.addresses()


def test_a_draining_pool_gives_its_reserved_addresses_neither() -> None:
    pool = A + ", reserved: [{address: 10.0.0.4, owner: default/web}], drain: true"
    world = World(config(pool, "name: b, addresses: [10.0.1.0/24]"))
    world.put(service("web"))
    assert not world.addresses() and world.reason("web") is Reason.POOL_DRAINING


def test_release_lets_a_shrink_take_addresses_away() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/30]"))
    world.put(service("web", requested="10.0.0.3"))
    world.put(service("web"))
    world.done.clear()
    world.configure(config("name: a, addresses: [10.0.0.0/31], release: true"))
    assert world.addresses() == {"web": "10.0.0.0"}
    assert world.done == ["CreateEip", "WriteStatus", "Told", "ReleaseEip"]
    assert world.reasons("web") == [Reason.POOL_RELEASED]
    assert world.eips["10.0.0.3"].phase is Phase.RELEASING


def test_release_of_a_whole_pool_leaves_no_address_shown() -> None:
    world = World(config(A))
    world.put(service("web"))
    world.configure(config("name: a, addresses: [], release: true"))
    assert not world.addresses()
    assert world.reasons("web") == [Reason.POOL_RELEASED, Reason.NO_POOL]
    assert world.eips["10.0.0.0"].phase is Phase.RELEASING


def test_free_is_what_a_pool_can_give_without_being_asked() -> None:
    pools = (
        "name: a, addresses: [10.0.0.0/24], avoidBuggyIPs: true, reserved: [10.0.0.8/30]",
        "name: old, addresses: [10.1.0.0/30], drain: true",
    )
    world = World(config(*pools))
    world.put(service("web"))
    world.allocator.configure(config(*pools), (ip_address("10.0.0.9"), ip_address("10.0.0.20")))
    assert world.allocator.free() == {"a": {4: 256 - 2 - 4 - 1 - 1}, "old": {}}


def test_free_is_told_by_family_unless_all_of_it_is_reserved() -> None:
    """A huge IPv6 range must not hide that IPv4 is used up."""
    both = "name: b, addresses: [10.0.0.0/32, '2001:db8::/64']"
    kept = "name: k, addresses: [10.1.0.0/32], reserved: [10.1.0.0/32]"
    world = World(config(both, kept))
    assert world.allocator.free() == {"b": {4: 1, 6: 1 << 64}, "k": {}}
    world.put(service("web"))
    assert world.allocator.free()["b"] == {4: 0, 6: 1 << 64}


def test_one_allocation_in_a_huge_pool_looks_at_one_address() -> None:
    world = World(config("name: a, addresses: ['2001:db8::/64']"))
    world.allocator.set_service(service("web", families=(6,)))
    made = [action for action in world.allocator.plan() if isinstance(action, CreateEip)]
    assert [str(action.eip.address) for action in made] == ["2001:db8::"]
