"""Attempts to take what a namespace may not have, one a test. Each is refused, and aloud."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from lbctl.core.model import Phase, Service
from lbctl.core.reasons import Reason
from tests.unit.address_rules import World, config, ports, service, sharing

SHOP = "name: shop, addresses: [10.0.0.0/29], namespaces: [shop]"
OPEN = "name: open, addresses: [10.1.0.0/29], autoAssign: false"
ASKS: dict[str, dict[str, Any]] = {
    "loadBalancerIP": {"requested": "10.0.0.1"},
    "annotation": {"annotations": {"lbctl.io/loadBalancerIPs": "10.0.0.1"}},
    "foreign annotation": {"annotations": {"metallb.io/loadBalancerIPs": "10.0.0.1"}},
    "pool annotation": {"annotations": {"lbctl.io/address-pool": "shop"}},
}


@pytest.mark.parametrize("how", ASKS)
def test_another_namespaces_pool(how: str) -> None:
    world = World(config(SHOP, OPEN))
    world.put(service("evil/e", **ASKS[how]))
    assert not world.addresses() and not world.eips
    assert world.reasons("evil/e") == [Reason.POOL_NOT_FOR_NAMESPACE]


def test_a_namespace_without_the_label() -> None:
    pool = "name: a, addresses: [10.0.0.0/29], namespaceSelectors: [{matchLabels: {team: shop}}]"
    world = World(config(pool), labels={"evil": {"team": "other"}})
    world.put(service("evil/e", requested="10.0.0.1"))
    assert not world.eips and world.reasons("evil/e") == [Reason.POOL_NOT_FOR_NAMESPACE]


def test_a_service_whose_labels_are_not_selected() -> None:
    pool = "name: a, addresses: [10.0.0.0/29], serviceSelectors: [{matchLabels: {public: 'yes'}}]"
    world = World(config(pool))
    world.put(service("evil/e", requested="10.0.0.1"))
    assert not world.eips and world.reasons("evil/e") == [Reason.POOL_NOT_FOR_SERVICE]


def test_more_than_the_quota_by_asking_for_addresses() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29], quota: 1"))
    world.put(service("evil/one", 1))
    world.put(service("evil/two", 2, requested="10.0.0.5"))
    world.put(service("evil/three", 3, annotations={"lbctl.io/address-pool": "a"}))
    assert set(world.addresses()) == {"one"}
    assert world.reasons("evil/two") == world.reasons("evil/three") == [Reason.QUOTA_EXCEEDED]


def test_more_than_the_quota_by_a_written_status() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29], quota: 1"))
    world.put(service("evil/one", 1))
    world.put(service("evil/two", 2, ingress=["10.0.0.5"]))
    assert set(world.addresses()) == {"one"}
    assert world.reasons("evil/two") == [Reason.STATUS_OVERWRITTEN, Reason.QUOTA_EXCEEDED]


def test_more_than_the_quota_by_sharing() -> None:
    pool = (
        "name: a, addresses: [10.0.0.0/29], quota: {evil: 0}, shareAcrossNamespaces: [shop, evil]"
    )
    world = World(config(pool))
    world.put(sharing("shop/s", 1, "k"))
    world.put(sharing("evil/e", 2, "k", ports=ports("81")))
    assert set(world.addresses()) == {"s"} and world.reason("evil/e") is Reason.QUOTA_EXCEEDED


def test_an_address_reserved_for_another() -> None:
    pool = "name: a, addresses: [10.0.0.0/29], reserved: [{address: 10.0.0.4, owner: shop/db}]"
    world = World(config(pool))
    world.put(service("evil/db", requested="10.0.0.4"))
    assert not world.addresses()
    ((_, reason, said),) = world.said
    assert reason is Reason.ADDRESS_RESERVED and "shop" not in said


def test_an_address_reserved_for_another_by_a_written_status() -> None:
    pool = "name: a, addresses: [10.0.0.0/29], reserved: [{address: 10.0.0.4, owner: shop/db}]"
    world = World(config(pool))
    world.put(service("evil/db", ingress=["10.0.0.4"]))
    assert world.addresses() == {"db": "10.0.0.0"}
    assert world.reasons("evil/db") == [Reason.STATUS_OVERWRITTEN]


def test_another_namespaces_pool_by_a_written_status() -> None:
    world = World(config(SHOP, OPEN))
    world.put(service("evil/e", ingress=["10.0.0.1"]))
    assert not world.addresses() and not world.eips
    assert Reason.STATUS_OVERWRITTEN in world.reasons("evil/e")


def test_another_services_address_by_a_written_status() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(service("shop/s", 1))
    world.put(service("evil/e", 2))
    world.put(service("evil/e", 2, ingress=["10.0.0.0"]))
    assert world.addresses() == {"s": "10.0.0.0", "e": "10.0.0.1"}
    assert world.reasons("evil/e") == [Reason.CLAIM_LOST]
    assert world.eips["10.0.0.0"].owner.name == "s"


def test_another_services_address_by_asking() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(service("shop/s", 1))
    world.put(service("evil/e", 0, requested="10.0.0.0"))  # claims to be older
    assert world.addresses() == {"s": "10.0.0.0"} and world.reason("evil/e") is Reason.ADDRESS_TAKEN


def test_anothers_address_while_it_rests() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.hold("10.0.0.3", "shop/s", Phase.RELEASING, forwarding=False)
    world.put(service("evil/s", requested="10.0.0.3"))  # the same name, another namespace
    assert not world.addresses() and world.reason("evil/s") is Reason.ADDRESS_TAKEN


def test_joining_without_a_key() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(service("shop/s", 1))
    world.put(sharing("shop/t", 2, "k", requested="10.0.0.0", ports=ports("81")))
    assert world.reason("shop/t") is Reason.ADDRESS_TAKEN
    assert world.eips["10.0.0.0"].sharers == ()


@pytest.mark.parametrize("asks", [{}, {"requested": "10.0.0.0"}])
def test_joining_from_another_namespace(asks: dict[str, str]) -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29], shareAcrossNamespaces: [shop, web]"))
    world.put(sharing("shop/s", 1, "k"))
    world.put(sharing("evil/e", 2, "k", ports=ports("81"), **asks))
    assert world.eips["10.0.0.0"].sharers == ()
    assert world.addresses().get("e") == (None if asks else "10.0.0.1")
    if asks:
        assert world.reason("evil/e") is Reason.SHARING_REFUSED


def test_joining_a_pool_that_does_not_serve_the_namespace() -> None:
    world = World(config(SHOP + ", shareAcrossNamespaces: [shop, evil]", OPEN))
    world.put(sharing("shop/s", 1, "k"))
    world.put(sharing("evil/e", 2, "k", ports=ports("81")))
    assert world.eips["10.0.0.0"].sharers == () and not world.shown("evil/e")


def test_joining_by_guessing_the_key_of_an_address_asked_for() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(sharing("shop/s", 1, "secret"))
    world.put(sharing("shop/t", 2, "guess", requested="10.0.0.0", ports=ports("81")))
    assert world.reason("shop/t") is Reason.SHARING_REFUSED


def test_a_pool_that_exists_for_nobody_else_is_not_told_apart_by_its_name() -> None:
    world = World(config(SHOP))
    world.put(service("evil/e", annotations={"lbctl.io/address-pool": "none\n'; drop"}))
    ((_, reason, said),) = world.said
    assert reason is Reason.POOL_UNKNOWN and "\n" not in said


def test_a_drained_pool_on_request_and_by_joining() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(sharing("shop/s", 1, "k"))
    world.configure(config("name: a, addresses: [10.0.0.0/29], drain: true"))
    late: list[Service] = [
        service("shop/asks", 2, requested="10.0.0.3"),
        sharing("shop/joins", 2, "k", ports=ports("81"), requested="10.0.0.0"),
    ]
    world.put(*late)
    assert set(world.addresses()) == {"s"}
    assert world.reason("shop/asks") is world.reason("shop/joins") is Reason.POOL_DRAINING


def test_a_cleared_sharing_key_counts_though_the_rest_is_refused() -> None:
    """Nobody joins what its owner no longer shares, whatever else it asks for in vain."""
    world = World(config("name: a, addresses: [10.0.0.0/24]"))
    world.put(sharing("web", 1, "k"))
    world.put(service("web", 1, annotations={"lbctl.io/address-pool": "none"}))
    assert world.reason("web") is Reason.POOL_UNKNOWN
    world.put(sharing("dns", 2, "k", ports=ports("53/UDP")))
    assert world.addresses() == {"web": "10.0.0.0", "dns": "10.0.0.1"}


def test_more_than_the_quota_by_dual_stack() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29, '2001:db8::/125'], quota: 1"))
    world.put(service("evil/e", families=(4, 6)))
    assert world.shown("evil/e") == ["10.0.0.0"] and world.reason("evil/e") is Reason.QUOTA_EXCEEDED


def test_more_than_the_quota_by_sharing_two_at_once() -> None:
    pool = (
        "name: a, addresses: [10.0.0.0/29], quota: {evil: 1}, shareAcrossNamespaces: [shop, evil]"
    )
    world = World(config(pool))
    world.put(sharing("shop/k", 1, "k"), sharing("shop/l", 1, "l"))
    world.put(
        sharing("evil/k", 2, "k", ports=ports("81")), sharing("evil/l", 2, "l", ports=ports("81"))
    )
    assert world.shown("evil/k") and not world.shown("evil/l")


def test_an_address_that_became_a_nodes_while_it_rested() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.hold("10.0.0.3", "shop/s", Phase.RELEASING, forwarding=False)
    world.allocator.configure(world.config, (ip_address("10.0.0.3"),))
    world.put(service("shop/s"))
    assert world.addresses() == {"s": "10.0.0.0"}


def test_sharing_an_address_that_became_a_nodes() -> None:
    """Who has it keeps it; nobody comes onto it."""
    world = World(config("name: a, addresses: [10.0.0.0-10.0.0.1]"))
    world.put(sharing("web", 1, "k"))
    world.allocator.configure(world.config, [ip_address("10.0.0.0")])
    world.put(sharing("web2", 2, "k", ports=ports("81")))
    assert world.addresses() == {"web": "10.0.0.0", "web2": "10.0.0.1"}
