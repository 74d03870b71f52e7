"""`takeover: adopt`: every address that a Service has from another controller stays."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from lbctl.core.actions import Action, ClearStatus, CreateEip, Refused, ReleaseEip, WriteStatus
from lbctl.core.allocator import Allocator
from lbctl.core.config import Config
from lbctl.core.forecast import Outlook, forecast, told
from lbctl.core.model import Service
from lbctl.core.reasons import Reason
from tests.unit.test_forecast import config, eip, service

POOL = "198.51.100.0/29"


def adopting(addresses: str = POOL, pool: str = "") -> Config:
    return config(addresses, more="takeover: adopt\n", pool=pool)


def planned(
    new: Config, *services: Service, eips: tuple[str, ...] = ()
) -> tuple[Allocator, tuple[Action, ...]]:
    allocator = Allocator(new, (ip_address("198.51.100.3"),))
    for address in eips:
        allocator.set_eip(eip(address, "other"))
    for one in services:
        allocator.set_service(one)
    return allocator, allocator.plan()


def given(actions: tuple[Action, ...]) -> dict[str, str]:
    return {a.service.name: str(a.eip.address) for a in actions if isinstance(a, CreateEip)}


def touched(actions: tuple[Action, ...]) -> list[Action]:
    return [a for a in actions if isinstance(a, WriteStatus | ClearStatus | ReleaseEip)]


@pytest.mark.parametrize(
    "rules",
    [
        "",
        ", autoAssign: false",
        ", namespaces: [elsewhere]",
        ", requests: none",
        ", quota: 0",
        ", drain: true",
        ", reserved: [198.51.100.2]",
        ", reserved: [{address: 198.51.100.2, owner: default/another}]",
        ", serviceSelectors: [{matchLabels: {a: b}}]",
    ],
)
def test_what_a_service_has_stays_whatever_the_pool_says_of_giving(rules: str) -> None:
    _, actions = planned(adopting(pool=rules), service("web", "198.51.100.2"))
    assert given(actions) == {"web": "198.51.100.2"}
    assert not touched(actions)


def test_it_stays_whatever_the_service_asks_for() -> None:
    asking = service("web", "198.51.100.2", requested="198.51.100.5")
    allocator, actions = planned(adopting(), asking)
    assert given(actions) == {"web": "198.51.100.2"} and not touched(actions)
    allocator.set_eip(eip("198.51.100.2"))
    allocator.set_service(replace(asking, source_ranges=(), finalizers=("x",)))
    assert given(allocator.plan()) == {}
    decision = allocator.decision(asking.ref)
    assert decision is not None and decision.addresses == (ip_address("198.51.100.2"),)


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("203.0.113.9", "in no pool"),
        ("198.51.100.3", "the cluster itself"),
        ("198.51.100.4", "default/other"),
    ],
)
def test_what_cannot_become_ours_is_left_as_it_is_aloud(shown: str, said: str) -> None:
    _, actions = planned(adopting(), service("web", shown), eips=("198.51.100.4",))
    assert not given(actions) and not touched(tuple(a for a in actions if a.service.name == "web"))
    (refused,) = (a for a in actions if isinstance(a, Refused))
    assert refused.reason is Reason.NOT_ADOPTED and said in refused.sentence


def test_two_services_with_one_address_the_older_is_adopted() -> None:
    older = service("b", "198.51.100.2", created_s=1.0)
    younger = service("a", "198.51.100.2", created_s=2.0)
    allocator, actions = planned(adopting(), younger, older)
    assert given(actions) == {"b": "198.51.100.2"} and not touched(actions)
    assert [a.service.name for a in allocator.plan() if isinstance(a, Refused)] == ["a"]


def test_a_new_service_gets_nothing_that_another_one_shows() -> None:
    services = (service("new"), service("old", "198.51.100.0", created_s=9.0))
    allocator, actions = planned(adopting(), *services)
    assert given(actions) == {"old": "198.51.100.0"}
    assert given(allocator.plan()) == {"new": "198.51.100.1"}


def test_of_two_families_each_is_decided_for_itself_and_the_status_stays() -> None:
    both = service("web", "198.51.100.2", "2001:db8::9", families=(4, 6))
    _, actions = planned(adopting(), both)
    assert given(actions) == {"web": "198.51.100.2"}
    assert not touched(actions), "2001:db8::9 is in no pool, and still in use"


def test_the_family_that_is_missing_is_added() -> None:
    both = service("web", "198.51.100.2", families=(4, 6))
    allocator, actions = planned(adopting('198.51.100.0/29, "2001:db8::/126"'), both)
    assert given(actions) == {"web": "198.51.100.2"} and not touched(actions)
    (write,) = touched(allocator.plan())
    assert isinstance(write, WriteStatus)
    assert set(map(str, write.addresses)) == {"198.51.100.2", "2001:db8::"}


def test_without_takeover_a_status_is_followed_only_as_far_as_the_rules_go() -> None:
    _, actions = planned(config(POOL), service("web", "203.0.113.9"))
    assert given(actions) == {"web": "198.51.100.0"}


def test_the_forecast_of_adopt_loses_nothing() -> None:
    services = (service("in", "198.51.100.2"), service("out", "203.0.113.9"), service("new"))
    found = {f.service.name: f for f in forecast(adopting(), services, ())}
    assert found["in"].outlook is Outlook.KEEPS and found["new"].outlook is Outlook.GETS
    assert found["out"].outlook is Outlook.STAYS
    assert "203.0.113.9" in told(found["out"]) and "in no pool" in told(found["out"])


def test_it_stays_though_the_annotations_contradict_each_other() -> None:
    notes = (("lbctl.io/pool", "a"), ("metallb.io/address-pool", "b"))
    _, actions = planned(adopting(), service("web", "198.51.100.2", annotations=notes))
    assert given(actions) == {"web": "198.51.100.2"} and not touched(actions)


def test_an_older_service_that_asks_for_it_does_not_get_it() -> None:
    older = service("asks", requested="198.51.100.2", created_s=1.0)
    _, actions = planned(adopting(), older, service("has", "198.51.100.2", created_s=2.0))
    assert given(actions) == {"has": "198.51.100.2"}


def test_services_that_share_are_adopted_together() -> None:
    note = (("metallb.universe.tf/allow-shared-ip", "key"),)
    one = service("one", "198.51.100.2", annotations=note, created_s=1.0)
    ports = (replace(one.ports[0], port=81),)
    two = service("two", "198.51.100.2", annotations=note, created_s=2.0, ports=ports)
    allocator, actions = planned(adopting(), one, two)
    assert given(actions) == {"one": "198.51.100.2"} and not touched(actions)
    (made,) = (action.eip for action in actions if isinstance(action, CreateEip))
    allocator.set_eip(made)
    told_later = allocator.plan()
    assert not touched(told_later)
    decision = allocator.decision(two.ref)
    assert decision is not None, told_later
    assert decision.addresses == (ip_address("198.51.100.2"),), decision.sentence
    found = forecast(adopting(), (one, two), ())
    assert [f.outlook for f in found] == [Outlook.KEEPS, Outlook.KEEPS]
