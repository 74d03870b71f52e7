"""The keys of a pool: what is accepted, and where an error is said."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from lbctl.core.config import Config, parse, shrink_conflicts
from lbctl.core.config_pools import Selector
from lbctl.core.model import Eip, ObjectRef
from lbctl.errors import ConfigError

EVERY = """\
version: 1
pools:
  - name: public
    addresses: [198.51.100.0/24, "2001:db8::/64"]
    autoAssign: true
    avoidBuggyIPs: true
    priority: 10
    namespaces: [shop, web]
    namespaceSelectors:
      - matchLabels: {tier: front}
    serviceSelectors:
      - matchExpressions:
          - {key: app, operator: In, values: [a, b]}
          - {key: example.com/old, operator: DoesNotExist}
    requests: listed
    shareAcrossNamespaces: [shop, web]
    reserved:
      - 198.51.100.9
      - 198.51.100.16/29
      - {address: 198.51.100.40, owner: shop/db-0}
      - {address: "2001:db8::40", owner: shop/db-0}
    quota: {shop: 20, "*": 5}
    drain: true
    release: true
bgp: {asn: 64512, peers: []}
services: {loadBalancerClass: example.com/lb, withoutClass: false}
"""


def pool(*lines: str, addresses: str = "198.51.100.0/24") -> str:
    keys = "".join(f"    {line}\n" for line in lines)
    return (
        f"version: 1\npools:\n  - name: a\n    addresses: [{addresses}]\n{keys}"
        "bgp: {asn: 64512, peers: []}\n"
    )


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    (found,) = caught.value.problems
    return found


def test_every_key_of_a_pool() -> None:
    config = parse(EVERY)
    (found,) = config.pools
    assert (found.auto_assign, found.avoid_buggy_ips, found.priority) == (True, True, 10)
    assert (found.requests, found.drain, found.release, found.gives) == (
        "listed",
        True,
        True,
        False,
    )
    assert [found.quota_of(n) for n in ("shop", "other")] == [20, 5]
    assert found.share_across_namespaces == ("shop", "web")
    reserved = config.reserved_at(ip_address("198.51.100.23"))
    assert reserved is not None and reserved.owner is None
    assert config.reserved_at(ip_address("198.51.100.24")) is None
    owner = ObjectRef("shop", "db-0")
    assert config.reserved_for(owner, 4) == ip_address("198.51.100.40")
    assert config.reserved_for(owner, 6) == ip_address("2001:db8::40")
    assert config.services.load_balancer_class == "example.com/lb"
    assert not config.services.without_class
    assert hash(config) == hash(parse(EVERY))


def test_defaults_of_a_pool() -> None:
    (found,) = parse(pool()).pools
    assert found.gives and found.requests == "any" and found.quota_of("x") is None
    assert parse(pool("quota: 3")).pools[0].quota_of("x") == 3
    assert parse(pool()).services.without_class


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("priority: -1", "5:15: pools[0].priority: must be at least 0"),
        ("requests: some", "5:15: pools[0].requests: must be 'any', 'listed' or 'none'"),
        ("quota: many", "must be a number of addresses, 0 or more"),
        ("quota: {Shop: 1}", '"Shop" is not a namespace'),
        ("namespaces: [Shop]", '"Shop" is not a name'),
        ("reserved: [10.0.0.1]", "reserved[0]: 10.0.0.1 is not in the addresses of the pool"),
        ("reserved: [198.51.100.1, 198.51.100.0/30]", "overlaps 198.51.100.1 of pool a"),
        ("reserved: [{address: 198.51.100.0/30, owner: a/b}]", "an owner has one address"),
        ("reserved: [{address: 198.51.100.1, owner: b}]", '"b" is not a Service'),
        ("reserved: [{adress: 198.51.100.1}]", "unknown key; did you mean address?"),
        (
            "reserved: [{address: 198.51.100.1, owner: a/b}, {address: 198.51.100.2, owner: a/b}]",
            "reserved[1]: a/b has a reserved IPv4 address already (line 5)",
        ),
        ("serviceSelectors: [{matchLabels: {app: 1}}]", "the value of app must be text"),
        (
            "serviceSelectors: [{matchExpressions: [{key: a, operator: In}]}]",
            "matchExpressions[0]: In needs values",
        ),
        (
            "serviceSelectors: [{matchExpressions: [{key: a, operator: Exists, values: [x]}]}]",
            "Exists takes no values",
        ),
        ("avoidBuggyIps: true", "unknown key; did you mean avoidBuggyIPs?"),
    ],
)
def test_bad_keys_of_a_pool(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(pool(line))
    assert said in "\n".join(caught.value.problems)
    assert all(found.startswith("config.yaml:5:") for found in caught.value.problems)


def test_only_a_pool_that_lets_go_may_be_empty() -> None:
    assert problem(pool(addresses="")).endswith("addresses: must not be empty")
    assert parse(pool("release: true", addresses="")).pools[0].size == 0


def test_order_of_the_pools() -> None:
    text = "version: 1\npools:\n"
    for n, (name, priority) in enumerate([("z", 0), ("b", 2), ("a", 2), ("c", 1), ("d", 0)]):
        text += f"  - {{name: {name}, addresses: [10.0.{n}.0/24], priority: {priority}}}\n"
    config = parse(text + "bgp: {asn: 64512, peers: []}\n")
    assert [found.name for found in config.ranked] == ["c", "a", "b", "d", "z"]


@pytest.mark.parametrize(
    ("operator", "values", "matching"),
    [
        ("In", ["x"], ["x"]),
        ("NotIn", ["x"], ["y", None]),
        ("Exists", [], ["x", "y"]),
        ("DoesNotExist", [], [None]),
    ],
)
def test_match_expressions_are_kubernetes_own(
    operator: str, values: list[str], matching: list[str | None]
) -> None:
    selector = Selector.model_validate(
        {"matchExpressions": ({"key": "a", "operator": operator, "values": tuple(values)},)},
        by_alias=True,
        by_name=False,
    )
    labels = {found: {} if found is None else {"a": found} for found in ("x", "y", None)}
    assert [k for k, found in labels.items() if selector.matches(found)] == matching


def test_a_shrink_is_refused_unless_the_pool_lets_go() -> None:
    held = Eip(ip_address("198.51.100.200"), "a", ObjectRef("shop", "web"), "uid")

    def conflicts(text: str) -> list[str]:
        config: Config = parse(text)
        return [str(conflict) for conflict in shrink_conflicts([held], config)]

    refused = ["Service shop/web uses 198.51.100.200 of pool a"]
    assert conflicts(pool(addresses="198.51.100.0/25")) == refused
    assert conflicts(pool("release: true", addresses="198.51.100.0/25")) == []
    assert conflicts(pool("release: true", addresses="")) == []
    assert conflicts(pool("release: true").replace("name: a", "name: b")) == []
    assert conflicts(pool("drain: true", addresses="10.0.0.0/24")) == refused
