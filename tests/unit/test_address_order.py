"""Who comes first, and who is woken by what: one rule a test, each once broken."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from lbctl.core import names
from lbctl.core.actions import CreateEip
from lbctl.core.allocator import plan
from lbctl.core.model import Phase
from lbctl.core.reasons import Reason
from tests.unit.address_rules import World, config, ports, service, sharing

A = "name: a, addresses: [10.0.0.0/30]"
B = "name: b, addresses: [10.1.0.0/32]"


def asking(ref: str, created_s: float, /, address: str = "", pool: str = "", **more: Any) -> Any:
    asked = {"lbctl.io/loadBalancerIPs": address, "lbctl.io/address-pool": pool}
    notes = {key: text for key, text in asked.items() if text}
    return service(ref, created_s, annotations=notes, **more)


@pytest.mark.parametrize("wish", [{"address": "10.0.0.1"}, {"pool": "b"}, {"address": "x"}])
def test_a_claim_stands_whatever_else_cannot_be_had(wish: dict[str, str]) -> None:
    """Restored without EIP objects, and asking for what another one has."""
    world = World(config(A, B))
    world.put(
        service("one", 1, ingress=["10.0.0.1"]),
        service("two", 2, ingress=["10.1.0.0"]),
        asking("web", 0, **wish, ingress=["10.0.0.2"]),
    )
    assert world.addresses() == {"one": "10.0.0.1", "two": "10.1.0.0", "web": "10.0.0.2"}


def test_a_claim_in_a_draining_pool_stands_if_it_is_asked_for_too() -> None:
    world = World(config(A + ", drain: true"))
    world.put(asking("web", 1, "10.0.0.2", ingress=["10.0.0.2"]))
    assert world.addresses() == {"web": "10.0.0.2"}


def test_claims_come_before_what_an_older_one_asks_for() -> None:
    world = World(config(A))
    world.put(asking("older", 1, "10.0.0.2"), service("web", 2, ingress=["10.0.0.2"]))
    assert world.addresses() == {"web": "10.0.0.2"}


def test_who_loses_a_claim_takes_nobodys() -> None:
    world = World(config(A))
    world.put(
        service("one", 1, ingress=["10.0.0.1"]),
        service("loses", 2, ingress=["10.0.0.1"]),
        service("two", 3, ingress=["10.0.0.0"]),
    )
    assert world.addresses() == {"one": "10.0.0.1", "loses": "10.0.0.2", "two": "10.0.0.0"}


def test_who_claims_one_family_is_not_overtaken_in_the_other() -> None:
    """Dual stack, restored without EIP objects: what it had comes first, the rest by age."""
    world = World(config("name: a, addresses: [10.0.0.0/30, '2001:db8::/127']"))
    older = service("older", 1, families=(4, 6), ingress=["10.0.0.1"])
    world.put(service("web", 2, families=(4, 6)), older)
    assert world.shown("older") == ["10.0.0.1", "2001:db8::"]
    assert world.shown("web") == ["10.0.0.0", "2001:db8::1"]


def test_who_waits_to_share_is_not_overtaken_in_the_other_family() -> None:
    """The address that it comes onto has to be written for its owner first."""
    world = World(config("name: a, addresses: [10.0.0.0/30, '2001:db8::/127']"))
    world.put(
        sharing("one", 1, "k", ports=ports("81")),
        sharing("older", 2, "k", families=(4, 6)),
        service("web", 3, families=(4, 6)),
    )
    assert world.shown("older") == ["10.0.0.0", "2001:db8::"]
    assert world.shown("web") == ["10.0.0.1", "2001:db8::1"]


def test_who_waits_to_share_is_not_overtaken_where_it_shares_in_the_other_family() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/30, '2001:db8::/127']"))
    world.put(sharing("six", 0, "k", ports=ports("66"), families=(6,)))
    world.put(
        sharing("one", 1, "k", ports=ports("81")),
        sharing("older", 2, "k", families=(4, 6)),
        sharing("web", 3, "k", families=(6,)),
    )
    assert world.shown("older") == ["10.0.0.0", "2001:db8::"]
    assert world.shown("web") == ["2001:db8::1"]


def test_a_claim_in_one_family_comes_first_with_an_eip_in_the_other() -> None:
    """One of two EIP objects was lost."""
    world = World(config("name: a, addresses: [10.0.0.0/32, '2001:db8::/127']"))
    world.hold("2001:db8::", "web")
    shown = ["10.0.0.0", "2001:db8::"]
    world.put(service("older", 1), service("web", 2, families=(4, 6), ingress=shown))
    assert world.shown("web") == shown
    assert world.reason("older") is Reason.POOL_EXHAUSTED


def test_what_is_reserved_comes_before_the_rest_of_the_quota() -> None:
    pool = A + ", quota: 1, reserved: [{address: 10.0.0.3, owner: default/db}]"
    world = World(config(pool))
    world.put(service("older", 1), service("db", 2))
    assert world.addresses() == {"db": "10.0.0.3"}


def test_a_key_of_another_namespace_holds_nobody_up() -> None:
    world = World(config(A))
    world.put(sharing("x/a", 1, "k"), sharing("y/b", 2, "k"), service("x/c", 3))
    assert world.addresses() == {"a": "10.0.0.0", "b": "10.0.0.1", "c": "10.0.0.2"}


def test_who_waits_shares_what_comes_to_be_shared() -> None:
    world = World(config(B))
    world.put(service("one", 1))
    world.put(sharing("two", 2, "k", ports=ports("81")))
    assert world.reason("two") is Reason.POOL_EXHAUSTED
    world.put(sharing("one", 1, "k"))
    assert world.addresses() == {"one": "10.1.0.0", "two": "10.1.0.0"}


def test_who_waits_shares_when_the_ports_no_longer_clash() -> None:
    world = World(config(B))
    world.put(sharing("one", 1, "k"), sharing("two", 2, "k"))
    assert world.addresses() == {"one": "10.1.0.0"}
    world.put(sharing("one", 1, "k", ports=ports("81")))
    assert world.addresses() == {"one": "10.1.0.0", "two": "10.1.0.0"}


def test_who_waits_to_share_is_woken_by_its_quota() -> None:
    pool = "name: a, addresses: [10.0.0.0/30], quota: {y: 1}, shareAcrossNamespaces: [x, y]"
    world = World(config(pool))
    world.put(sharing("x/one", 1, "k"), service("y/two", 2))
    world.put(sharing("y/three", 3, "k", requested="10.0.0.0", ports=ports("81")))
    assert world.reason("y/three") is Reason.QUOTA_EXCEEDED
    world.vanish("y/two")
    world.free("10.0.0.1")
    assert world.shown("y/three") == ["10.0.0.0"]


def test_another_pool_is_entered_by_sharing_too() -> None:
    world = World(config(A, B))
    world.put(sharing("one", 1, "k", ports=ports("81")), service("web", 2))
    assert world.addresses() == {"one": "10.0.0.0", "web": "10.0.0.1"}
    world = World(config(A, B + ", autoAssign: false"))
    world.put(asking("one", 1, "10.1.0.0"), service("web", 2))
    key = {"lbctl.io/allow-shared-ip": "k"}
    world.put(service("one", 1, annotations={**key, "lbctl.io/loadBalancerIPs": "10.1.0.0"}))
    notes = {**key, "lbctl.io/address-pool": "b"}
    world.put(service("web", 2, annotations=notes, ports=ports("81")))
    assert world.addresses() == {"one": "10.1.0.0", "web": "10.1.0.0"}


def test_back_in_a_pool_while_the_address_of_it_rests() -> None:
    world = World(config(A, B))
    world.hold("10.1.0.0", "web", Phase.RELEASING, forwarding=False, pool="b")
    world.hold("10.0.0.0", "web")
    world.put(asking("web", 1, pool="b", ingress=["10.0.0.0"]))
    assert world.addresses() == {"web": "10.1.0.0"}


def test_a_pool_that_drains_says_so_to_who_asks_for_nothing() -> None:
    world = World(config(A + ", drain: true"))
    world.put(service("web", 1))
    assert world.reasons("web") == [Reason.POOL_DRAINING]


def test_who_asks_for_its_address_and_for_another_pool_stays_and_is_told() -> None:
    world = World(config(A, B))
    world.put(asking("web", 1, "10.1.0.0"))
    world.put(asking("web", 1, "10.1.0.0", pool="a"))
    assert world.addresses() == {"web": "10.1.0.0"}
    assert world.reason("web") is Reason.ADDRESS_OUTSIDE_POOLS


@pytest.mark.parametrize("pool, address", [("", "10.0.0.3"), ("a", "10.0.0.3"), ("b", "10.1.0.0")])
def test_what_is_reserved_is_given_to_who_asks_for_its_pool_too(pool: str, address: str) -> None:
    world = World(config(A + ", reserved: [{address: 10.0.0.3, owner: default/db}]", B))
    world.put(asking("db", 1, pool=pool))
    assert world.addresses() == {"db": address}


def test_who_waits_to_share_comes_where_it_would_have_come_by_its_age() -> None:
    """Meanwhile one that cannot be there got a lower address, which could be shared too."""
    world = World(config("name: a, addresses: [10.0.0.0/30]"))
    key = {"lbctl.io/allow-shared-ip": "k"}
    world.put(
        service("one", 1, requested="10.0.0.3", annotations=key, ports=ports("80")),
        sharing("older", 2, "k", ports=ports("81")),
        sharing("young", 3, "k", ports=ports("80")),
    )
    assert world.addresses() == {"one": "10.0.0.3", "older": "10.0.0.3", "young": "10.0.0.0"}


@pytest.mark.parametrize("young, expected", [("k", "10.0.0.0"), ("", "10.0.0.1")])
def test_a_changed_key_counts_before_the_older_is_served(young: str, expected: str) -> None:
    """Whoever has an address alone says who may come onto it, whatever the order of a batch."""
    world = World(config("name: a, addresses: [10.0.0.0/30]"))
    world.put(sharing("young", 9, "" if young else "k"))
    world.put(
        sharing("old", 1, "k", ports=ports("81")),
        sharing("young", 9, young),
        sharing("third", 2, "k", ports=ports("82")),
    )
    assert world.addresses() == {"young": "10.0.0.0", "old": expected, "third": expected}


def test_who_is_no_longer_ours_leaves_before_who_is_older_comes() -> None:
    world = World(config("name: a, addresses: [10.0.0.0-10.0.0.1]"))
    world.put(sharing("going", 2, "k"))
    changes = [
        service("going", 2, is_load_balancer=False),
        sharing("older", 1, "k", ports=ports("81")),
    ]
    for one in changes:
        world.services[one.ref] = one
        world.allocator.set_service(one)
    world.settle()
    assert world.addresses() == {"older": "10.0.0.1"}


def test_who_waits_is_told_when_its_address_becomes_the_clusters_own() -> None:
    world = World(config(A + ", reserved: [{address: 10.0.0.1, owner: y/db}]"))
    world.put(asking("web", 1, "10.0.0.1"))
    assert world.reason("web") is Reason.ADDRESS_RESERVED
    world.put(service("own", 2, is_load_balancer=False, cluster_ips=(ip_address("10.0.0.1"),)))
    assert world.reason("web") is Reason.ADDRESS_OUTSIDE_POOLS


def test_the_short_way_for_plain_services_decides_as_the_long_one() -> None:
    pools = "name: a, addresses: [10.0.0.0/31]", "name: b, addresses: [10.0.1.0/32], priority: 1"
    many = [service(f"s{n}", -n) for n in range(4)]
    marked = {"finalizers": (names.FINALIZER,), "annotations": {names.ANNOTATION_POOL: "a"}}
    many.append(service("web/marked", -9, **marked))
    short = plan(config(*pools), many, ())
    unrelated = "name: c, addresses: [10.0.2.0/32], autoAssign: false"
    unrelated += ", reserved: [{address: 10.0.2.0, owner: x/y}]"
    assert short == plan(config(*pools, unrelated), many, ())  # who reserves, has no short way
    given = [action for action in short if isinstance(action, CreateEip)]
    assert [str(action.eip.address) for action in given] == ["10.0.1.0", "10.0.0.0", "10.0.0.1"]


def test_who_waits_is_told_when_its_address_is_the_clusters_own_no_more() -> None:
    world = World(config(A))
    world.put(service("has", 1, requested="10.0.0.1"))
    own = service("own", 2, is_load_balancer=False, cluster_ips=(ip_address("10.0.0.1"),))
    world.put(own, asking("web", 3, "10.0.0.1"))
    assert world.reason("web") is Reason.ADDRESS_OUTSIDE_POOLS
    world.vanish("own")
    assert world.reason("web") is Reason.ADDRESS_TAKEN
