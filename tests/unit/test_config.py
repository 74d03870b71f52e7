"""The configuration: what is accepted, and that every error is said at its place."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core.config import Config, config_hash, parse, shrink_conflicts
from lbctl.core.model import Eip, ForwardingOptions, ObjectRef, Phase
from lbctl.errors import ConfigError

GOOD = """\
version: 1
pools:
  - name: public
    addresses: [198.51.100.0/25, 198.51.100.200-198.51.100.210]
    autoAssign: true            # default
  - {name: six, addresses: ["2001:db8::/64"], autoAssign: false}
bgp:
  asn: 64512
  peers:
    - {name: tor-a, address: 192.0.2.1, asn: 64500}
    - name: tor-b
      address: 192.0.2.2
      asn: 64500
      port: 1790
      holdTime: 30s
      localAddress: 192.0.2.11
      routerId: 10.0.0.1
      passwordSecret: bgp-password
      multihop: 2
announce: {maxPaths: 8, paths: perManager, drainTime: 5m, reuseAfter: 0}
probe: {interval: 100ms, misses: 5, agentGrace: 1h}
forwarding:
  interfaces: [eth0, bond0.100]
  steering: tunnel
  ping: false
  localDelivery: strict
  newFlowsPerSecond: 0
endpoints: {external: masquerade, nodes: nodeName}
"""

MINIMAL = """\
version: 1
pools: []
bgp: {asn: 64512, peers: []}
"""


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value.problems


def with_pools(*addresses: str) -> str:
    return f"version: 1\npools: [{{name: a, addresses: [{', '.join(addresses)}]}}]\n" + (
        "bgp: {asn: 64512, peers: []}\n"
    )


def with_peer(**fields: object) -> str:
    given = {"name": "tor-a", "address": "192.0.2.1", "asn": 64500, **fields}
    body = ", ".join(f"{key}: {value}" for key, value in given.items())
    return f"version: 1\npools: []\nbgp:\n  asn: 64512\n  peers:\n    - {{{body}}}\n"


def test_everything_that_can_be_set() -> None:
    config = parse(GOOD)
    public, six = config.pools
    assert public.name == "public" and public.auto_assign and not six.auto_assign
    assert public.size == 128 + 11 and six.size == 2**64
    assert public.addresses[1].first == ip_address("198.51.100.200")
    assert public.addresses[1].last == ip_address("198.51.100.210")
    first, second = config.bgp.peers
    assert (first.port, first.hold_time_s, first.multihop) == (179, 9, None)
    assert (second.port, second.hold_time_s, second.multihop) == (1790, 30, 2)
    assert second.local_address == ip_address("192.0.2.11")
    assert second.router_id == ip_address("10.0.0.1")
    assert second.password_secret == "bgp-password"
    announce = config.announce
    assert (announce.max_paths, announce.paths) == (8, "perManager")
    assert (announce.drain_time_s, announce.reuse_after_s) == (300, 0)
    assert (config.probe.interval_s, config.probe.misses) == (0.1, 5)
    assert config.probe.agent_grace_s == 3600
    assert config.forwarding_options == ForwardingOptions(
        ("eth0", "bond0.100"), "tunnel", False, "strict", 0, "masquerade", "nodeName"
    )


@pytest.mark.parametrize(
    "text", [MINIMAL, MINIMAL + "announce:\nprobe:\nforwarding:\nendpoints:\n"]
)
def test_defaults(text: str) -> None:
    config = parse(text)
    assert (config.announce.max_paths, config.announce.paths) == (64, "addPath")
    assert (config.announce.drain_time_s, config.announce.reuse_after_s) == (2, 30)
    assert (config.probe.interval_s, config.probe.misses, config.probe.agent_grace_s) == (
        0.05,
        3,
        300,
    )
    assert config.forwarding_options == ForwardingOptions(
        (), "auto", True, "shared", 5000, "refuse"
    )


def test_it_is_frozen_comparable_and_hashable() -> None:
    one, two = parse(GOOD), parse(GOOD + "# a comment\n")
    assert one == two and hash(one) == hash(two)
    assert one != parse(MINIMAL)
    one.pool_of(ip_address("198.51.100.1"))  # fills a cache, which is no part of the value
    assert one == two
    with pytest.raises(ValueError, match="frozen"):
        one.version = 2


def test_the_hash_tells_texts_apart() -> None:
    assert config_hash(GOOD) == config_hash(GOOD) != config_hash(GOOD + " ")
    assert re.fullmatch("[0-9a-f]{16}", config_hash(GOOD))


def test_pool_of() -> None:
    config = parse(GOOD)

    def name(text: str) -> str | None:
        pool = config.pool_of(ip_address(text))
        return pool.name if pool else None

    assert name("198.51.100.0") == name("198.51.100.127") == name("198.51.100.205") == "public"
    assert name("198.51.100.128") is name("198.51.100.199") is name("198.51.100.211") is None
    assert name("2001:db8::ffff") == "six"
    assert name("2001:db7::") is name("2001:db8:0:1::") is None
    assert name("0.0.0.1") is None  # not the IPv6 address of the same number


def test_all_errors_at_once_in_the_order_of_the_file() -> None:
    text = """\
version: 1
pool: 3
pools:
  - name: public
    addresses: [198.51.100.0/25, 10.0.0.5/24]
    autoasign: true
  - name: public
    addresses: [198.51.100.100]
bgp:
  asn: 0
  peers:
    - {name: tor-a, address: 192.0.2.1}
forwarding: {interfaces: [a b]}
"""
    assert problems(text) == (
        "config.yaml:2:1: pool: unknown key; did you mean pools?",
        "config.yaml:5:34: pools[0].addresses[1]: 10.0.0.5/24 has bits set after the prefix; "
        "write 10.0.0.0/24, or 10.0.0.5/32 for that one",
        "config.yaml:6:5: pools[0].autoasign: unknown key; did you mean autoAssign?",
        'config.yaml:7:11: pools[1].name: another pool is called "public" (line 4)',
        "config.yaml:8:17: pools[1].addresses[0]: 198.51.100.100 of pool public overlaps "
        "198.51.100.0/25 of pool public (line 5)",
        "config.yaml:10:8: bgp.asn: AS number 0 is reserved (RFC 7607)",
        "config.yaml:12:7: bgp.peers[0].asn: is missing",
        'config.yaml:13:27: forwarding.interfaces[0]: "a b" is not an interface name: '
        "1 to 15 of letters, digits and _ . - @ +",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1:1: the configuration is empty"),
        ("# nothing\n", "1:1: the configuration is empty"),
        ("- a", "1:1: the configuration must be a mapping that starts `version: 1`"),
        ("version: 2\nnew: {}\n", "1:10: version: 2 is newer than this lbctl understands"),
        ("a: [1", "1:6: not valid YAML: "),
        ("version: 1\n\tpools: []", "2:1: not valid YAML: "),
        ("version: \x01", "1:10: not valid YAML: the character U+0001 is not allowed"),
        ("a: 1\n---\nb: 1", "2:1: a second document starts here"),
        ("a: &x 1\nb: *x", "2:4: b: aliases (`*name`) are not supported"),
        ("a: " + "[" * 100_000, "1:68: nested deeper than 64 levels"),
        ("? [a]\n: 1", "1:3: a key must be plain text"),
    ],
)
def test_what_cannot_be_read_has_one_message_with_its_place(text: str, said: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(f"config.yaml:{said}")


@pytest.mark.parametrize("version", ["0", "'1'", "true", "1.0", "null", "[1]"])
def test_only_version_1(version: str) -> None:
    (found,) = problems(MINIMAL.replace("version: 1", f"version: {version}"))
    assert found.startswith("config.yaml:1:10: version: must be 1, not ")


def test_missing_parts_are_named() -> None:
    assert problems("announce: {}") == (
        "config.yaml:1:1: bgp: is missing",
        "config.yaml:1:1: pools: is missing",
        "config.yaml:1:1: version: is missing; write `version: 1`",
    )


def test_a_key_that_is_there_twice() -> None:
    (found,) = problems(MINIMAL + "probe: {}\nprobe: {interval: nonsense, x: {y: [1]}}\n")
    assert found == "config.yaml:5:1: probe: the key is there twice (first in line 4)"


def test_tags_run_nothing() -> None:
    found = problems(MINIMAL + "probe: !!python/object/apply:os.system ['touch /tmp/x']\n")
    assert "config.yaml:4:8: probe: tags (`!…`) are not supported; write a plain value" in found


def test_huge_input_is_refused_before_it_is_parsed() -> None:
    assert problems("#" * (1 << 20) + "\n") == (
        "config.yaml:1:1: the file is larger than 1047552 bytes",
    )


def test_many_problems_are_cut() -> None:
    found = problems(MINIMAL + "".join(f"x{n}: 1\n" for n in range(300)))
    assert len(found) == 201
    assert found[-1] == "config.yaml: and 100 more problems"


def test_a_message_is_one_line_whatever_the_text() -> None:
    text = MINIMAL + '"evil\\nkey": 1\n'
    text = text.replace("pools: []", 'pools: [{name: "a\\nb", addresses: [10.0.0.1, 10.0.0.1]}]')
    for found in problems(text):
        assert found.isprintable(), found


def test_big_pools_cost_nothing() -> None:
    config = parse(with_pools("10.0.0.0/8", '"2001:db8::/32"'))
    assert config.pools[0].size == 2**24 + 2**96


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        ("nonsense", "is neither a CIDR (198.51.100.0/25) nor a range (FIRST-LAST)"),
        ("5", "must be a CIDR or a range FIRST-LAST, not 5"),
        ("10.0.0.0/33", "the prefix length must be 0 to 32"),
        ("10.0.0.0/255.0.0.0", "the prefix length must be 0 to 32"),
        ('"2001:db8::/129"', "the prefix length must be 0 to 128"),
        ("10.0.0.1/24", "write 10.0.0.0/24, or 10.0.0.1/32"),
        ('"::5/96"', "write ::/96, or ::5/128"),
        ("10.0.0.9-10.0.0.1", "is reversed; write 10.0.0.1-10.0.0.9"),
        ('"10.0.0.1-2001:db8::1"', "mixes IPv4 and IPv6"),
        ("10.0.0.1-10", '"10" is not an IP address'),
        ("127.0.0.0/30", "holds loopback addresses (127.0.0.0/8), which no EIP can have"),
        ("0.0.0.0/0", "holds unspecified addresses"),
        ("169.254.1.1", "holds link-local addresses"),
        ("223.255.255.255-224.0.0.0", "holds multicast addresses"),
        ("255.255.255.255", "holds reserved addresses"),
        ('"::/0"', "holds unspecified addresses"),
        ('"::1"', "holds loopback addresses"),
        ('"fe80::/64"', "holds link-local addresses"),
        ('"ff02::1"', "holds multicast addresses"),
        ('"::ffff:10.0.0.1"', "holds IPv4-mapped addresses"),
        ('"fe80::1%eth0"', "is neither a CIDR"),
    ],
)
def test_bad_addresses_of_a_pool(addresses: str, said: str) -> None:
    (found,) = problems(with_pools(addresses))
    assert found.startswith("config.yaml:2:31: pools[0].addresses[0]: ")
    assert said in found


def test_a_pool_needs_addresses() -> None:
    assert problems(with_pools()) == ("config.yaml:2:30: pools[0].addresses: must not be empty",)


_NETWORKS = st.builds(
    lambda base, length: ip_network((0x0A000000 + base, length), strict=False),
    st.integers(0, 1023),
    st.integers(26, 32),
)


@settings(deadline=None)
@given(st.lists(_NETWORKS, min_size=1, max_size=6))
def test_overlaps_are_found_whatever_the_order(networks: list[object]) -> None:
    text = with_pools(*(str(network) for network in networks))
    meet = any(
        one.overlaps(two)  # type: ignore[attr-defined]
        for n, one in enumerate(networks)
        for two in networks[:n]
    )
    if meet:
        assert all("overlaps" in found and "of pool a" in found for found in problems(text))
    else:
        assert parse(text).pools[0].size == sum(n.num_addresses for n in networks)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": '"tor\\na"'}, '"tor\\na" is not a name'),
        ({"name": '"tor a"'}, '"tor a" is not a name'),
        ({"name": "Tor"}, '"Tor" is not a name'),
        ({"name": "-a"}, '"-a" is not a name'),
        ({"name": "a" * 64}, "is not a name"),
        ({"name": "5"}, "5 is not a name"),
        ({"address": "tor-a"}, '"tor-a" is not an IP address'),
        ({"address": "0.0.0.0"}, "0.0.0.0 is not the address of a machine"),
        ({"address": "224.0.0.5"}, "224.0.0.5 is not the address of a machine"),
        ({"address": '"fe80::1"'}, "fe80::1 is link-local"),
        ({"address": '"fe80::1%eth0"'}, "an address with a zone"),
        ({"asn": 0}, "AS number 0 is reserved (RFC 7607)"),
        ({"asn": 23456}, "AS number 23456 stands for"),
        ({"asn": 65535}, "AS number 65535 is reserved"),
        ({"asn": 4294967295}, "AS number 4294967295 is reserved"),
        ({"asn": 4294967296}, "4294967296 is not an AS number"),
        ({"asn": -1}, "-1 is not an AS number"),
        ({"asn": "true"}, "must be an AS number (a whole number), not true"),
        ({"asn": "'5'"}, 'must be an AS number (a whole number), not "5"'),
        ({"port": 0}, "must be at least 1"),
        ({"port": 65536}, "must be at most 65535"),
        ({"port": "bgp"}, 'must be a whole number, not "bgp"'),
        ({"holdTime": "2s"}, "a hold time is 3s to 65535s"),
        ({"holdTime": "1"}, "a hold time is 3s to 65535s"),
        ({"holdTime": 0}, "0 would keep dead routes"),
        ({"holdTime": "3500ms"}, "a hold time is whole seconds"),
        ({"holdTime": "20h"}, "a hold time is 3s to 65535s"),
        ({"holdTime": "-9"}, "a duration cannot be negative"),
        ({"holdTime": "9 s"}, "must be a duration such as 50ms, 9s or 5m"),
        ({"gracefulRestart": 0}, "a restart time is 1s to 120s (a dead node stays"),
        ({"gracefulRestart": "3m"}, "a restart time is 1s to 120s"),
        ({"gracefulRestart": "1500ms"}, "a restart time is whole seconds"),
        ({"gracefulRestart": "true"}, "must be a duration such as"),
        ({"multihop": 0}, "must be at least 1"),
        ({"multihop": 256}, "must be at most 255"),
        ({"routerId": "0.0.0.0"}, "must look like an IPv4 address other than 0.0.0.0"),
        ({"routerId": '"::1"'}, "must look like an IPv4 address other than 0.0.0.0"),
        ({"localAddress": '"2001:db8::1"'}, "are of different families"),
        ({"passwordSecret": "Pass"}, '"Pass" is not the name of a Secret'),
        ({"passwordSecret": '"a b"'}, '"a b" is not the name of a Secret'),
        ({"hold-time": "9s"}, "unknown key; did you mean holdTime?"),
        ({"hold_time_s": "9s"}, "unknown key; did you mean holdTime?"),
        ({"zzz": "9s"}, "unknown key; known here are name, address, asn, port, holdTime"),
    ],
)
def test_bad_peers(fields: dict[str, object], said: str) -> None:
    (found,) = problems(with_peer(**fields))
    assert re.match(r"config\.yaml:6:\d+: bgp\.peers\[0\]", found)
    assert said in found


@pytest.mark.parametrize("hold, seconds", [("3", 3), ("90s", 90), ("1m", 60)])
def test_hold_times(hold: str, seconds: int) -> None:
    assert parse(with_peer(holdTime=hold)).bgp.peers[0].hold_time_s == seconds


@pytest.mark.parametrize("written, asked, kept", [(None, None, 9), ("20s", 20, 20), ("2s", 2, 9)])
def test_graceful_restart(written: str | None, asked: int | None, kept: int) -> None:
    """Off unless asked for; a manager's routes count for as long as a switch may keep them."""
    bgp = parse(with_peer(**({} if written is None else {"gracefulRestart": written}))).bgp
    assert (bgp.peers[0].graceful_restart_s, bgp.keep_s) == (asked, kept)


def test_peers_must_differ_from_each_other_and_from_the_pools() -> None:
    text = """\
version: 1
pools: [{name: a, addresses: [192.0.2.0/24]}]
bgp:
  asn: 64512
  peers:
    - {name: x, address: 10.0.0.1, asn: 1, localAddress: 192.0.2.7}
    - {name: x, address: 192.0.2.9, asn: 1}
    - {name: y, address: 10.0.0.1, asn: 1, port: 180}
"""
    assert problems(text) == (
        "config.yaml:6:58: bgp.peers[0].localAddress: 192.0.2.7 lies in 192.0.2.0/24 of pool a, "
        "which EIPs come from",
        'config.yaml:7:14: bgp.peers[1].name: another peer is called "x" (line 6)',
        "config.yaml:7:26: bgp.peers[1].address: 192.0.2.9 lies in 192.0.2.0/24 of pool a, "
        "which EIPs come from",
        "config.yaml:8:26: bgp.peers[2].address: another peer has the address 10.0.0.1 (line 6)",
    )


def test_virtual_next_hops_are_nobodys_addresses() -> None:
    """Neither EIPs nor an end of a session."""
    text = with_pools("198.51.100.0/24").replace(
        "peers: []", "peers: [{name: tor, address: 192.0.2.1, asn: 64500}]"
    )
    ranges = "announce: {nextHop: recursive, virtualNextHops: [192.0.0.0/8]}\n"
    assert problems(text + ranges) == (
        "config.yaml:4:50: announce.virtualNextHops[0]: 192.0.0.0-192.255.255.255 holds the "
        "session's 192.0.2.1",
    )
    (found,) = problems(text + ranges.replace("192.0.0.0/8", "198.51.0.0/16"))
    assert "198.51.0.0-198.51.255.255 overlaps 198.51.100.0/24 of pool a" in found
    config = parse(text + ranges.replace("192.0.0.0/8", '100.64.0.0/10, "fd00:76::/64"'))
    assert config.announce.next_hop == "recursive"
    assert [part.version for part in config.announce.virtual_next_hops] == [4, 6]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("announce: {maxPaths: 0}", "announce.maxPaths: must be at least 1"),
        ("announce: {maxPaths: 2.5}", "announce.maxPaths: must be a whole number, not 2.5"),
        (
            "announce: {paths: all}",
            "announce.paths: must be 'addPath' or 'perManager', not \"all\"",
        ),
        ("announce: {nextHop: recursive}", "announce.nextHop: recursive needs virtualNextHops"),
        (
            "announce: {nextHop: recursive, virtualNextHops: [100.64.0.0/10], paths: perManager}",
            "announce.nextHop: recursive needs paths: addPath",
        ),
        (
            "announce: {virtualNextHops: [100.64.0.0/17]}",
            "announce.virtualNextHops[0]: 100.64.0.0-100.64.127.255 is too small",
        ),
        (
            "announce: {virtualNextHops: [100.64.0.0/16, 100.65.0.0/16]}",
            "announce.virtualNextHops[1]: there is an IPv4 range already",
        ),
        ("announce: {drainTime: soon}", 'must be a duration such as 50ms, 9s or 5m, not "soon"'),
        ("announce: {drainTime: 2h}", "announce.drainTime: must be at most 3600s"),
        ("announce: []", "announce: must be a mapping (`key: value`), not a list"),
        ("probe: {interval: 1ms}", "probe.interval: must be at least 0.01s"),
        ("probe: {misses: 0}", "probe.misses: must be at least 1"),
        ("forwarding: {interfaces: eth0}", 'interfaces: must be a list, not "eth0"'),
        ("forwarding: {interfaces: [eth0, eth0]}", 'the interface "eth0" is there twice'),
        ("forwarding: {interfaces: [a/b]}", '"a/b" is not an interface name'),
        ('forwarding: {interfaces: ["*"]}', '"*" is not an interface name'),
        ("forwarding: {interfaces: [abcdefghijklmnop]}", "is not an interface name"),
        ("forwarding: {interfaces: ['']}", '"" is not an interface name'),
        (
            "forwarding: {steering: vxlan}",
            "forwarding.steering: must be 'auto', 'direct' or 'tunnel', not \"vxlan\"",
        ),
        ("forwarding: {ping: 1}", "forwarding.ping: must be true or false, not 1"),
        ("forwarding: {localDelivery: yes}", "must be 'shared' or 'strict', not"),
        ("forwarding: {newFlowsPerSecond: -1}", "newFlowsPerSecond: must be at least 0"),
        ("forwarding: {newFlowsPerSecond: 1000001}", "must be at most 1000000"),
        ("forwarding: {newFlowsPerSec: 1}", "did you mean newFlowsPerSecond?"),
        ("endpoints: {external: accept}", "must be 'refuse' or 'masquerade', not \"accept\""),
        (
            "endpoints: {nodes: pods}",
            "4:20: endpoints.nodes: must be 'podCIDR' or 'nodeName', not \"pods\"",
        ),
        ("endpoints: {node: nodeName}", "unknown key; did you mean nodes?"),
        ("endpoints: {externals: refuse}", "unknown key; did you mean external?"),
        ("endpoint: {external: refuse}", "unknown key; did you mean endpoints?"),
    ],
)
def test_bad_settings(line: str, said: str) -> None:
    (found,) = problems(MINIMAL + line + "\n")
    assert found.startswith("config.yaml:4:")
    assert said in found


def test_a_pool_that_shrinks_under_addresses_in_use() -> None:
    new: Config = parse(with_pools("198.51.100.0/26"))
    web, api = ObjectRef("default", "web"), ObjectRef("default", "api")
    eips = [
        Eip(ip_address("198.51.100.70"), "public", web, "u1"),
        Eip(ip_address("2001:db8::1"), "public", web, "u1"),  # of both families, the same owner
        Eip(ip_address("198.51.100.5"), "public", web, "u1"),
        Eip(ip_address("198.51.100.71"), "public", api, "u2"),
        Eip(ip_address("198.51.100.72"), "public", web, "u3", phase=Phase.RELEASING),
    ]
    assert [str(conflict) for conflict in shrink_conflicts(eips, new)] == [
        "Service default/api uses 198.51.100.71 of pool public",
        "Service default/web uses 198.51.100.70 of pool public",
        "Service default/web uses 2001:db8::1 of pool public",
    ]


_WORDS = st.sampled_from(
    ["version: 1\n", "pools:", "bgp:", "\n", "  ", "- ", "{", "}", "[", "]", ": ", ", ", "name",
     "asn", "peers", "*a", "&a ", "!x ", "|\n", ">\n", "'", '"', "#", "?", "%YAML 1.1\n", "---\n",
     "10.0.0.0/8", "::1", "\t", "\r", "\x85", "﻿", "null", "1", "-1", "é", "<<: "]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(_WORDS, st.text(max_size=3)), max_size=30).map("".join))
def test_no_text_raises_anything_else(text: str) -> None:
    _try(text)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD)), st.integers(0, 8), st.one_of(_WORDS, st.text(max_size=3)))
def test_no_typing_error_raises_anything_else(at: int, length: int, typed: str) -> None:
    _try(GOOD[:at] + typed + GOOD[at + length :])


def _try(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert re.match(r"config\.yaml:\d+:\d+: ", problem), problem
            assert problem.isprintable(), problem
