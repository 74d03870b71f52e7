"""What a configuration would do to Services: one table test per outlook."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from lbctl.core.config import Config, parse
from lbctl.core.forecast import (
    Forecast,
    Outlook,
    changes,
    cluster_addresses,
    forecast,
    refusals,
)
from lbctl.core.model import Eip, Node, ObjectRef, Protocol, Service, ServicePort
from lbctl.core.reasons import Reason

WEB = ObjectRef("default", "web")


def config(addresses: str = "198.51.100.0/30", more: str = "", pool: str = "") -> Config:
    return parse(
        f"version: 1\npools: [{{name: public, addresses: [{addresses}]{pool}}}]\n"
        "bgp: {asn: 64512, peers: [{name: tor-a, address: 192.0.2.1, asn: 64500}]}\n" + more
    )


def service(name: str = "web", *shown: str, **other: object) -> Service:
    ports = (ServicePort("", Protocol.TCP, 80),)
    addresses = tuple(ip_address(one) for one in shown)
    made = Service(ObjectRef("default", name), f"uid-{name}", 0.0, ports, True, ingress=addresses)
    return replace(made, **other)  # type: ignore[arg-type]


def eip(address: str, name: str = "web", pool: str = "public") -> Eip:
    return Eip(ip_address(address), pool, ObjectRef("default", name), f"uid-{name}")


def one(
    new: Config, services: tuple[Service, ...], eips: tuple[Eip, ...] = (), name: str = "web"
) -> Forecast:
    found = forecast(new, services, eips)
    return next(item for item in found if item.service.name == name)


def test_a_service_keeps_what_its_eip_says() -> None:
    found = one(config(), (service("web", "198.51.100.2"),), (eip("198.51.100.2"),))
    assert found.outlook is Outlook.KEEPS and found.after == found.before


def test_a_service_keeps_what_another_controller_gave_it() -> None:
    found = one(config(), (service("web", "198.51.100.2"),))
    assert found.outlook is Outlook.KEEPS


def test_a_service_without_an_address_gets_one() -> None:
    found = one(config(), (service(),))
    assert found.outlook is Outlook.GETS and [str(a) for a in found.after] == ["198.51.100.0"]


def test_a_service_waits_when_the_pool_is_full() -> None:
    new = config("198.51.100.0/32")
    found = one(new, (service("a"), service("b")), name="b")
    assert (found.outlook, found.reason) == (Outlook.WAITS, Reason.POOL_EXHAUSTED)


def test_a_pool_that_goes_is_refused_by_the_names_of_its_services() -> None:
    services, eips = (service("web", "198.51.100.2"),), (eip("198.51.100.2"),)
    new = config("203.0.113.0/30")
    said = refusals(new, forecast(new, services, eips), eips)
    assert len(said) == 1 and "default/web" in said[0] and "198.51.100.2" in said[0]


def test_a_pool_that_lets_go_is_not_refused() -> None:
    services, eips = (service("web", "198.51.100.2"),), (eip("198.51.100.2"),)
    new = config("203.0.113.0/30", pool=", release: true")
    assert refusals(new, forecast(new, services, eips), eips) == ()


def test_a_change_of_the_class_rule_takes_nothing() -> None:
    """A class cannot change while the status stands: what was given under another rule stays."""
    services = (service("web", "198.51.100.2", load_balancer_class="example.com/other"),)
    (found,) = forecast(config(), services, (eip("198.51.100.2"),))
    assert found.outlook is Outlook.KEEPS


def test_a_service_that_is_no_longer_ours_would_lose_its_address() -> None:
    services = (service("web", "198.51.100.2", is_load_balancer=False),)
    eips = (eip("198.51.100.2"),)
    (said,) = refusals(config(), forecast(config(), services, eips), eips)
    assert "default/web would lose 198.51.100.2" in said
    free = config(pool=", release: true")
    assert refusals(free, forecast(free, services, eips), eips) == ()


def test_an_address_that_the_rules_deny_would_be_lost_and_that_is_refused() -> None:
    services = (service("web", "198.51.100.2"),)
    new = config(pool=", namespaces: [elsewhere]")
    (said,) = refusals(new, forecast(new, services, ()), ())
    assert "default/web would lose 198.51.100.2" in said and "does not serve namespace" in said


def test_labels_of_namespaces_count() -> None:
    new = config(pool=", namespaceSelectors: [{matchLabels: {team: web}}]")
    assert forecast(new, (service(),), ())[0].outlook is Outlook.WAITS
    labels = {"default": {"team": "web"}}
    assert forecast(new, (service(),), (), (), labels)[0].outlook is Outlook.GETS


def test_services_that_are_nobodys_are_not_spoken_of() -> None:
    foreign = service("theirs", "203.0.113.9", load_balancer_class="example.com/other")
    plain = service("plain", is_load_balancer=False)
    assert forecast(config(), (foreign, plain), ()) == ()


def test_the_order_of_what_is_given_does_not_matter() -> None:
    services = tuple(service(name) for name in ("c", "a", "b"))
    assert forecast(config(), services, ()) == forecast(config(), services[::-1], ())


def test_addresses_of_the_cluster_are_never_forecast() -> None:
    node = Node("n", addresses=(ip_address("198.51.100.0"),), pod_cidrs=(ip_network("10.0.0.0/8"),))
    kept = cluster_addresses((node,), config())
    assert ip_address("192.0.2.1") in kept and ip_network("10.0.0.0/8") in kept
    (found,) = forecast(config(), (service(),), (), kept)
    assert str(found.after[0]) == "198.51.100.1"


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (config(), ()),
        (config("198.51.100.0/29"), ("pool public changes",)),
        (config(more="announce: {maxPaths: 8}\n"), ("section announce changes",)),
    ],
)
def test_changes_are_said(new: Config, said: tuple[str, ...]) -> None:
    assert changes(config(), new) == said


def test_changes_of_peers_and_our_as_are_said() -> None:
    text = (
        "version: 1\npools: []\n"
        "bgp: {asn: 64513, peers: [{name: tor-b, address: 192.0.2.2, asn: 64500}]}\n"
    )
    said = changes(config(), parse(text))
    assert said[:3] == ("pool public goes", "peer tor-b is new", "peer tor-a goes")
    assert "every session restarts" in said[3]
    assert changes(None, config()) == ("there is no configuration in force yet",)
