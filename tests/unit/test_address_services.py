"""What a Service can ask for, and what becomes of it in odd times: one rule a test."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbctl.core import names
from lbctl.core.actions import CreateEip
from lbctl.core.annotations import SHARING_KEY_LIMIT, TABLE, Kind, asked
from lbctl.core.model import Phase, TrafficPolicy
from lbctl.core.reasons import SENTENCE, Reason
from tests.unit.address_rules import World, config, ports, service, sharing

A = "name: a, addresses: [10.0.0.0/29, '2001:db8::/64']"
B = "name: b, addresses: [10.1.0.0/29, '2001:db8:1::/64']"
BOTH = {"families": (4, 6)}


# Requests


@pytest.mark.parametrize("key", [key for key, kind in TABLE.items() if kind is Kind.ADDRESSES])
def test_an_address_by_each_annotation(key: str) -> None:
    world = World(config(A))
    world.put(service("web", annotations={key: "10.0.0.5, 2001:db8::7"}, **BOTH))
    assert world.shown("web") == ["10.0.0.5", "2001:db8::7"]


@pytest.mark.parametrize("key", [key for key, kind in TABLE.items() if kind is Kind.POOL])
def test_a_pool_by_each_annotation(key: str) -> None:
    world = World(config(A, B))
    world.put(service("web", annotations={key: "b"}))
    assert world.shown("web") == ["10.1.0.0"]


@pytest.mark.parametrize("key", [key for key, kind in TABLE.items() if kind is Kind.SHARING])
def test_sharing_by_each_annotation(key: str) -> None:
    world = World(config(A))
    world.put(service("one", 1, annotations={key: "k"}))
    world.put(service("two", 2, annotations={key: "k"}, ports=ports("443")))
    assert world.addresses() == {"one": "10.0.0.0", "two": "10.0.0.0"}


@pytest.mark.parametrize(
    ("annotations", "requested", "said"),
    [
        (
            {"metallb.io/address-pool": "a", "purelb.io/service-group": "b"},
            None,
            'metallb.io/address-pool says "a", purelb.io/service-group says "b"',
        ),
        (
            {"lbipam.cilium.io/ips": "10.0.0.1", "kube-vip.io/loadbalancerIPs": "10.0.0.2"},
            None,
            "kube-vip.io/loadbalancerIPs asks for 10.0.0.2, lbipam.cilium.io/ips for 10.0.0.1",
        ),
        (
            {"metallb.io/loadBalancerIPs": "10.0.0.1"},
            "10.0.0.2",
            "spec.loadBalancerIP asks for 10.0.0.2, metallb.io/loadBalancerIPs for 10.0.0.1",
        ),
        (
            {"lbctl.io/loadBalancerIPs": "10.0.0.1"},
            "10.0.0.2",
            "spec.loadBalancerIP asks for 10.0.0.2, lbctl.io/loadBalancerIPs for 10.0.0.1",
        ),
        (
            {"metallb.io/allow-shared-ip": "x", "lbipam.cilium.io/sharing-key": "y"},
            None,
            'lbipam.cilium.io/sharing-key says "x"',
        ),
    ],
)
def test_conflicts_name_both_and_change_nothing(
    annotations: dict[str, str], requested: str | None, said: str
) -> None:
    world = World(config(A, B))
    world.put(service("web"))
    world.put(service("web", annotations=annotations, requested=requested))
    world.put(service("new", annotations=annotations, requested=requested))
    assert world.addresses() == {"web": "10.0.0.0"}
    assert [reason for _, reason, _ in world.said] == [Reason.ANNOTATIONS_CONFLICT] * 2
    for _, _, sentence in world.said:
        assert all(key in sentence for key in annotations), sentence
        if "says" not in said:
            assert said in sentence


def test_ours_counts_before_all_others() -> None:
    found = asked(
        service(
            "web",
            annotations={
                "lbctl.io/address-pool": "b",
                "metallb.io/address-pool": "a",
                "purelb.io/service-group": "c",
            },
        )
    )
    assert found.pool == "b" and found.problem is None


def test_the_same_said_twice_is_no_conflict() -> None:
    annotations = {
        "metallb.io/loadBalancerIPs": "2001:db8::7, 10.0.0.5",
        "metallb.universe.tf/loadBalancerIPs": "10.0.0.5,2001:db8:0::7",
    }
    world = World(config(A))
    world.put(service("web", annotations=annotations, requested="10.0.0.5", **BOTH))
    assert world.shown("web") == ["10.0.0.5", "2001:db8::7"]


@pytest.mark.parametrize(
    "text", ["x", "10.0.0.1/32", "10.0.0.1 10.0.0.2", "10.0.0.1,y", "::1%eth0,::2", "2001:db8::7%x"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    world = World(config(A))
    world.put(service("web", annotations={"lbctl.io/loadBalancerIPs": text}))
    assert not world.eips and world.reasons("web") == [Reason.REQUEST_INVALID]


def test_a_sharing_key_that_no_eip_can_hold_is_refused() -> None:
    root = Path(__file__).parents[2]
    crd = yaml.safe_load((root / "deploy/kustomize/base/crd.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert schema["properties"]["sharingKey"]["maxLength"] == SHARING_KEY_LIMIT
    world = World(config(A))
    for name, key in (("fits", "k" * SHARING_KEY_LIMIT), ("long", "k" * (SHARING_KEY_LIMIT + 1))):
        world.put(service(name, annotations={"metallb.io/allow-shared-ip": key}))
    assert world.shown("fits") and world.reasons("long") == [Reason.REQUEST_INVALID]


def test_a_requested_pool_moves_the_service_make_before_break() -> None:
    world = World(config(A, B))
    world.put(service("web"))
    world.done.clear()
    world.put(service("web", annotations={"lbctl.io/address-pool": "b"}))
    assert world.shown("web") == ["10.1.0.0"]
    assert world.done == ["AddFinalizer", "CreateEip", "WriteStatus", "ReleaseEip"]


def test_a_requested_pool_that_cannot_be_had_changes_nothing() -> None:
    world = World(config(A, "name: b, addresses: [10.1.0.0/32]"))
    world.put(service("web"), service("full", annotations={"lbctl.io/address-pool": "b"}))
    for pool, reason in (("b", Reason.POOL_EXHAUSTED), ("none", Reason.POOL_UNKNOWN)):
        world.put(service("web", annotations={"lbctl.io/address-pool": pool}))
        assert world.shown("web") == ["10.0.0.0"] and world.reason("web") is reason
    world.put(service("web", annotations={"lbctl.io/address-pool": "b"}))
    world.remove("full")
    world.free("10.1.0.0")
    assert world.shown("web") == ["10.1.0.0"]


def test_an_address_outside_the_pool_asked_for_as_well() -> None:
    world = World(config(A, B))
    asks = {"lbctl.io/address-pool": "b", "lbctl.io/loadBalancerIPs": "10.0.0.1"}
    world.put(service("web", annotations=asks))
    assert not world.eips and world.reasons("web") == [Reason.ADDRESS_OUTSIDE_POOLS]


# Families


def test_from_single_to_dual_and_back() -> None:
    world = World(config(A))
    world.put(service("web"))
    world.put(service("web", **BOTH))
    assert world.shown("web") == ["10.0.0.0", "2001:db8::"]
    world.put(service("web"))
    assert world.shown("web") == ["10.0.0.0"]
    assert world.eips["2001:db8::"].phase is Phase.RELEASING and not world.said
    world.put(service("web", **BOTH))  # what rests is its own
    assert world.shown("web") == ["10.0.0.0", "2001:db8::"]


def test_dual_stack_preferred_and_required_where_there_is_one_family() -> None:
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(service("prefers", 1, **BOTH), service("needs", 2, needs_both=True, **BOTH))
    assert world.addresses() == {"prefers": "10.0.0.0", "needs": "10.0.0.1"}
    assert world.reasons("prefers") == [] and world.reasons("needs") == [Reason.NO_POOL]


# Classes


@pytest.mark.parametrize(
    ("given", "rest", "ours"),
    [
        (None, "", True),
        (names.LOAD_BALANCER_CLASS, "", True),
        ("example.com/lb", "", False),
        (None, "services: {withoutClass: false}", False),
        ("example.com/lb", "services: {loadBalancerClass: example.com/lb}", True),
        (names.LOAD_BALANCER_CLASS, "services: {loadBalancerClass: example.com/lb}", False),
    ],
)
def test_load_balancer_class(given: str | None, rest: str, ours: bool) -> None:
    world = World(config(A, rest=rest))
    world.put(service("web", load_balancer_class=given, ingress=["192.0.2.1"]))
    assert (world.shown("web") == ["10.0.0.0"]) is ours
    if not ours:
        assert world.done == [], "another's class is left alone"
        assert world.reason("web") is Reason.OTHER_CLASS


def test_a_change_of_the_class_rule_takes_nothing_back() -> None:
    world = World(config(A))
    world.put(service("web"))
    world.configure(config(A, rest="services: {withoutClass: false}"))
    world.put(service("new"))
    assert world.addresses() == {"web": "10.0.0.0"}
    world.remove("web")
    assert world.eips["10.0.0.0"].phase is Phase.RELEASING


# Sharing


def test_sharing_needs_free_ports() -> None:
    world = World(config(A))
    world.put(sharing("dns-tcp", 1, "k", ports=ports("53")))
    world.put(sharing("dns-udp", 2, "k", ports=ports("53/UDP")))
    world.put(sharing("other", 3, "k", ports=ports("53", "80")))
    assert world.addresses() == {"dns-tcp": "10.0.0.0", "dns-udp": "10.0.0.0", "other": "10.0.0.1"}


@pytest.mark.parametrize(
    ("one", "two", "joined"),
    [
        ({}, {}, True),
        ({"policy": TrafficPolicy.LOCAL}, {}, False),
        (
            {"policy": TrafficPolicy.LOCAL, "selector": {"app": "x"}},
            {"policy": TrafficPolicy.LOCAL, "selector": {"app": "x"}},
            True,
        ),
        (
            {"policy": TrafficPolicy.LOCAL, "selector": {"app": "x"}},
            {"policy": TrafficPolicy.LOCAL, "selector": {"app": "y"}},
            False,
        ),
        ({"selector": {"app": "x"}}, {"selector": {"app": "y"}}, True),
        ({"source_ranges": (ip_network("192.0.2.0/24"),)}, {}, False),
    ],
)
def test_sharing_needs_the_same_pods_if_local_and_the_same_sources(
    one: dict[str, Any], two: dict[str, Any], joined: bool
) -> None:
    world = World(config(A))
    world.put(sharing("one", 1, "k", **one))
    world.put(sharing("two", 2, "k", ports=ports("443"), **two))
    assert (world.shown("two") == ["10.0.0.0"]) is joined
    world.put(sharing("asks", 3, "k", ports=ports("8080"), requested="10.0.0.0", **two))
    assert world.reason("asks") is (Reason.SHARED if joined else Reason.SHARING_REFUSED)


@pytest.mark.parametrize(
    ("ref", "changes", "cause"),
    [
        ("two", {}, "default/one has port TCP 80 already"),
        (
            "two",
            {"ports": ports("443"), "policy": TrafficPolicy.LOCAL},
            "its externalTrafficPolicy is Local, that of default/one Cluster",
        ),
        ("shop/two", {}, "default/one has port TCP 80 already"),
        ("web/two", {}, ""),
    ],
)
def test_a_key_that_could_not_be_honoured_is_said(
    ref: str, changes: dict[str, Any], cause: str
) -> None:
    world = World(config(A + ", shareAcrossNamespaces: [default, shop]"))
    world.put(sharing("one", 1, "k"))
    two = sharing(ref, 2, "k", **changes)
    world.services[two.ref] = two
    world.allocator.set_service(two)
    actions = world.allocator.plan()
    (made,) = [action for action in actions if isinstance(action, CreateEip)]
    why = f"an address of its own, as it could not share 10.0.0.0: {cause}" if cause else ""
    assert (made.reason, made.apart) == (Reason.ALLOCATED, why)
    for action in actions:
        world.do(action)
    world.settle()
    said = f"Service {two.ref} has 10.0.0.1: {why or SENTENCE[Reason.ALLOCATED]}"
    decision = world.allocator.decision(two.ref)
    assert decision is not None and (decision.reason, decision.sentence) == (made.reason, said)
    world.put(replace(world.services[two.ref], annotations=()))
    decision = world.allocator.decision(two.ref)
    assert decision is not None and "share" not in decision.sentence, "it wants to share no more"


def test_sharing_across_namespaces_that_the_pool_lists() -> None:
    world = World(config(A + ", shareAcrossNamespaces: [shop, web]"))
    world.put(sharing("shop/s", 1, "k"), sharing("web/w", 2, "k", ports=ports("443")))
    assert world.addresses() == {"s": "10.0.0.0", "w": "10.0.0.0"}


def test_services_that_rest_and_come_back_together_share_again() -> None:
    world = World(config(A))
    one = sharing("one", 1, "k")
    two = sharing("two", 2, "k", ports=ports("443"))
    world.put(one, two)
    for resting in (two, one):
        world.put(replace(resting, is_load_balancer=False))
    world.put(one, two)
    assert {world.shown("one")[0], world.shown("two")[0]} == {"10.0.0.0"}


def test_the_next_one_owns_the_address_when_the_first_one_goes() -> None:
    world = World(config(A))
    for number, name in enumerate(["one", "two", "three"]):
        world.put(sharing(name, number, "k", ports=ports(str(80 + number))))
    world.done.clear()
    world.remove("one")
    assert world.done == ["LeaveEip", "ClearStatus", "RemoveFinalizer"]
    eip = world.eips["10.0.0.0"]
    assert eip.phase is Phase.BOUND and [ref.name for ref in eip.members] == ["two", "three"]
    world.remove("three")
    assert [ref.name for ref in world.eips["10.0.0.0"].members] == ["two"]
    world.remove("two")
    assert world.eips["10.0.0.0"].phase is Phase.RELEASING


def test_all_who_share_go_at_once() -> None:
    world = World(config(A))
    for number in range(3):
        world.put(sharing(f"s{number}", number, "k", ports=ports(str(80 + number))))
    for ref in sorted(world.services):
        world.services[ref] = replace(world.services[ref], deleting=True)
        world.allocator.set_service(world.services[ref])
    world.settle()
    assert world.eips["10.0.0.0"].phase is Phase.RELEASING
    assert len(world.eips["10.0.0.0"].members) == 1


def test_a_batch_that_shares() -> None:
    """Joining waits for the answer to what is planned; nobody loses by 409."""
    world = World(config(A))
    world.put(*(sharing(f"s{n}", n, "k", ports=ports(str(80 + n))) for n in range(5)))
    assert set(world.addresses().values()) == {"10.0.0.0"}
    assert world.done.count("CreateEip") == 1 and world.done.count("RebindEip") == 4


def test_sharers_restored_after_their_statuses_were_lost() -> None:
    world = World(config(A))
    world.put(*(sharing(f"s{n}", n, "k", ports=ports(str(80 + n))) for n in range(3)))
    for ref in sorted(world.services):
        world.services[ref] = replace(world.services[ref], ingress=())
        world.allocator.set_service(world.services[ref])
    world.settle()
    assert set(world.addresses().values()) == {"10.0.0.0"} and len(world.addresses()) == 3


def test_sharers_restored_without_their_eip_objects() -> None:
    world = World(config(A))
    shown = {"ingress": ["10.0.0.5"], "finalizers": (names.FINALIZER,)}
    world.put(*(sharing(f"s{n}", n, "k", ports=ports(str(80 + n)), **shown) for n in range(3)))
    assert set(world.addresses().values()) == {"10.0.0.5"} and not world.said
    assert len(world.eips["10.0.0.5"].members) == 3


def test_a_port_that_came_to_clash_is_refused_to_who_came_later() -> None:
    world = World(config(A))
    world.put(sharing("one", 1, "k", ports=ports("80")))
    world.put(sharing("two", 2, "k", ports=ports("443")))
    world.put(sharing("two", 2, "k", ports=ports("80")))
    assert world.addresses() == {"one": "10.0.0.0", "two": "10.0.0.0"}
    assert world.reasons("two") == [Reason.SHARING_REFUSED] and not world.reasons("one")
    world.put(sharing("one", 1, "k", ports=ports("8080")))
    assert world.reason("two") is Reason.SHARED


def test_a_key_that_changed_keeps_the_address() -> None:
    world = World(config(A))
    world.put(sharing("one", 1, "k"))
    world.put(sharing("one", 1, "other"))
    assert world.eips["10.0.0.0"].sharing_key == "other"
    world.put(sharing("two", 2, "other", ports=ports("443")))
    world.put(sharing("two", 2, "third", ports=ports("443")))
    assert world.shown("two") == ["10.0.0.0"]
    assert world.reason("two") is Reason.SHARING_REFUSED


# Odd times


def test_recreated_within_reuse_after() -> None:
    world = World(config(A))
    world.put(service("other"), service("web"))
    address = world.shown("web")[0]
    world.vanish("web")
    world.put(service("thief", 0.0), service("web", 5.0, uid="second"))
    assert world.shown("web") == [address] and world.shown("thief") != [address]
    assert world.eips[address].owner_uid == "second"
    assert world.reason("web") is Reason.RECREATED


def test_recreated_where_the_pool_is_no_longer_for_it() -> None:
    world = World(config(A))
    world.put(service("web"))
    world.vanish("web")
    world.configure(config(A + ", namespaces: [shop]", B))
    world.put(service("web", uid="second"))
    assert world.shown("web") == ["10.1.0.0"]


def test_restored_without_status() -> None:
    world = World(config(A))
    world.hold("10.0.0.5", "web")
    world.put(service("web", uid="uid-of-the-restored"))
    assert world.shown("web") == ["10.0.0.5"]
    assert world.eips["10.0.0.5"].owner_uid == "uid-of-the-restored"


def test_a_status_written_by_someone_else_is_put_right_and_said() -> None:
    world = World(config(A))
    world.put(service("web"))
    for other in ("10.0.0.6", "192.0.2.1"):
        world.said.clear()
        world.put(service("web", ingress=[other]))
        assert world.shown("web") == ["10.0.0.0"]
        assert world.reasons("web") == [Reason.STATUS_OVERWRITTEN]
    assert list(world.eips) == ["10.0.0.0"]


def test_a_host_name_in_the_status_is_put_right_and_said_as_well() -> None:
    world = World(config(A))
    world.put(service("new", host_names=("lb.example.com",)), service("web"))
    web = replace(world.services[service("web").ref], ingress=(), host_names=("lb.example.com",))
    world.services[web.ref] = web
    world.allocator.set_service(web)
    world.settle()
    assert world.addresses() == {"new": "10.0.0.0", "web": "10.0.0.1"}
    why = 'its status showed host name "lb.example.com", which it does not have'
    assert world.said == [
        (name, Reason.STATUS_OVERWRITTEN, f"Service default/{name}: {why}")
        for name in ("new", "web")
    ]


def test_two_services_claim_one_address_and_the_older_keeps_it() -> None:
    world = World(config(A))
    shown = {"ingress": ["10.0.0.5"]}
    for one in (service("younger", 2.0, **shown), service("older", 1.0, **shown)):
        world.services[one.ref] = one
        world.allocator.set_service(one)
    world.settle()
    assert world.addresses() == {"older": "10.0.0.5", "younger": "10.0.0.0"}
    assert world.reasons("younger") == [Reason.CLAIM_LOST] and not world.reasons("older")


def test_two_services_ask_for_one_address_and_the_older_gets_it() -> None:
    world = World(config(A))
    for one in (service("b", 2.0, requested="10.0.0.5"), service("a", 1.0, requested="10.0.0.5")):
        world.services[one.ref] = one
        world.allocator.set_service(one)
    world.settle()
    assert world.addresses() == {"a": "10.0.0.5"} and world.reason("b") is Reason.ADDRESS_TAKEN
    world.remove("a")
    world.free("10.0.0.5")
    assert world.addresses() == {"b": "10.0.0.5"}


def test_a_pool_under_another_name_keeps_the_addresses() -> None:
    world = World(config(A))
    world.put(service("web"))
    world.configure(config(A.replace("name: a", "name: new")))
    assert world.shown("web") == ["10.0.0.0"] and world.eips["10.0.0.0"].pool == "new"


def test_an_address_reserved_later_does_not_move_who_has_another() -> None:
    world = World(config(A))
    world.put(service("web"))
    pool = A + ", reserved: [{address: 10.0.0.6, owner: default/web}]"
    world.configure(config(pool))
    assert world.shown("web") == ["10.0.0.0"]
    world.remove("web")
    world.free("10.0.0.0")
    world.put(service("web", uid="second"))
    assert world.shown("web") == ["10.0.0.6"]


def test_every_reason_has_a_sentence() -> None:
    assert set(SENTENCE) == set(Reason)


def test_the_other_family_comes_when_a_pool_has_it() -> None:
    """PreferDualStack is served with one family silently, but not for ever."""
    world = World(config("name: a, addresses: [10.0.0.0/29]"))
    world.put(service("web", families=(4, 6)))
    assert world.shown("web") == ["10.0.0.0"]
    world.configure(config('name: a, addresses: [10.0.0.0/29, "2001:db8::/120"]'))
    assert world.shown("web") == ["10.0.0.0", "2001:db8::"]
