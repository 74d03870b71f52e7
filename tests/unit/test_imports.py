"""Other controllers' manifests (tests/unit/imports) → our configuration and its comments."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from lbctl.core.config import Config, parse
from lbctl.core.imports.convert import convert
from lbctl.core.imports.draft import PLACEHOLDER_ASN
from lbctl.core.positions import load
from lbctl.errors import ConfigError
from tests.command import lbctl

FILES = Path(__file__).parent / "imports"
ORIGINS = sorted(path.stem for path in FILES.glob("*.yaml"))


def text_of(origin: str) -> str:
    return (FILES / f"{origin}.yaml").read_text()


def converted(text: str) -> tuple[Config, str]:
    made = convert([("their.yaml", text)])
    return parse(made), made


def refused(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        convert([("their.yaml", text)])
    return error.value.problems


def comment(made: str, *words: str) -> str:
    """The one comment that has all these words."""
    lines = [line.strip() for line in made.splitlines() if line.strip().startswith("#")]
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, f"{words} in {found or lines}"
    return found[0]


def test_metallb_configmap() -> None:
    config, made = converted(text_of("metallb"))
    gold, office = config.pools
    assert (gold.name, gold.auto_assign, office.name) == ("gold-pool", False, "office")
    assert ip_address("198.51.100.205") in gold and ip_address("2001:db8:100::1") in gold
    assert ip_address("10.20.30.1") in office, "Go takes a CIDR with bits after the prefix"
    assert config.bgp.asn == 64512
    one, two = config.bgp.peers
    assert (one.port, one.hold_time_s, one.multihop) == (1179, 90, 255)
    assert one.password_secret == "bgp-peer-192-0-2-1" and "hunter2" not in made
    assert (str(two.address), two.hold_time_s) == ("192.0.2.2", 9)
    for word in (
        "source-address",
        "keepalive-time",
        "router-id",
        "node-selectors",
        "bfd-profile:",
        "localpref",
        "communities: not",
        "aggregation-length: not taken over 32",
        "aggregation-length-v6",
        "bgp-communities",
        "bfd-profiles[0]",
    ):
        assert comment(made, word).startswith("# their.yaml:")
    assert "AS 64512 to all peers, not 64513" in comment(made, "peers[2]")
    assert "create secret generic bgp-peer-192-0-2-1" in comment(made, "password")
    assert '"Gold Pool"' in comment(made, "address-pools[0].name")


def test_metallb_configmap_without_its_manifest() -> None:
    bare = "peers: []\naddress-pools:\n- {name: a, protocol: bgp, cidr: [198.51.100.0/24]}\n"
    config, _ = converted(bare)
    assert config.pools[0].size == 256


def test_metallb_resources() -> None:
    config, made = converted(text_of("metallb-resources"))
    (pool,) = config.pools
    assert pool.name == "production" and ip_address("2001:db8:100::10") in pool
    (peer,) = config.bgp.peers
    assert (peer.name, peer.hold_time_s, peer.password_secret) == ("tor-a", 90, "tor-a-password")
    for word in (
        "sourceAddress",
        "keepaliveTime",
        "connectTime",
        "routerID",
        "bfdProfile",
        "vrf",
        "aggregationLength: ",
        "aggregationLengthV6",
        "localPref",
        "ipAddressPools:",
        "ipAddressPoolSelectors",
        "spec.peers",
        "vpn-only not",
        "kind: fast",
        "kind: office",
        "items[1].spec: left out",
    ):
        comment(made, word)


def test_openelb() -> None:
    config, made = converted(text_of("openelb"))
    assert config.bgp.asn == 50000
    default, shop, old = config.pools
    assert default.auto_assign and default.size == 11
    assert (shop.name, shop.size) == ("eip-shop", 16)
    assert not old.auto_assign
    (peer,) = config.bgp.peers
    assert (peer.asn, peer.port, peer.hold_time_s, peer.multihop) == (50001, 1179, 30, 2)
    assert peer.password_secret and "hunter2" not in made
    for word in ("listenPort", "routerId", "asPerRack", "passiveMode", "afiSafis", "nodeSelector"):
        comment(made, f"{word}:")


def test_kube_vip() -> None:
    config, made = converted(text_of("kubevip"))
    pools = {pool.name: pool for pool in config.pools}
    assert sorted(pools) == ["global", "shop"]
    assert pools["global"].size == 6, "a /29 without its ends"
    assert pools["shop"].size == 2 + 3 + 3
    assert config.bgp.asn == PLACEHOLDER_ASN and not config.bgp.peers
    comment(made, "put yours here")
    for word in ("search-order", "interface-shop", "allow-share-shop", "range-lan"):
        comment(made, word)


def test_cilium() -> None:
    config, made = converted(text_of("cilium"))
    blue, red = config.pools
    assert blue.size == 16 + 11 + 1
    assert red.size == 6 + 2, "allowFirstLastIPs: No, but a /31 has nothing else"
    comment(made, "before 1.16")


def test_rules_on_who_may_have_addresses_are_taken_over() -> None:
    (metallb,) = converted(text_of("metallb-resources"))[0].pools
    assert metallb.avoid_buggy_ips and metallb.priority == 50
    assert metallb.namespaces == ("shop", "blog")
    assert metallb.namespace_selectors[0].matches({"team": "web"})
    assert metallb.service_selectors[0].matches({"app": "80"})
    _, shop, old = converted(text_of("openelb"))[0].pools
    assert shop.namespaces == ("shop",) and shop.priority == 10 and old.drain
    assert shop.namespace_selectors[0].matches({"team": "web"})
    vip = {pool.name: pool for pool in converted(text_of("kubevip"))[0].pools}
    assert vip["shop"].namespaces == ("shop",) and vip["shop"].rank < vip["global"].rank
    blue, red = converted(text_of("cilium"))[0].pools
    assert blue.namespaces == ("shop",) and red.drain
    assert blue.service_selectors[0].matches({"color": "blue"})
    assert not blue.service_selectors[0].matches({"color": "cyan"}), "both have to hold"


@pytest.mark.parametrize(
    "selector",
    [
        "{matchLabels: {io.kubernetes.service.name: web}}",
        "{matchExpressions: [{key: io.kubernetes.service.name, operator: In, values: [web]}]}",
        "{matchExpressions: [{key: io.kubernetes.service.namespace, operator: Exists}]}",
    ],
)
def test_a_rule_that_cannot_be_taken_over_never_widens_a_pool(selector: str) -> None:
    spec = f"{{blocks: [{{cidr: 198.51.100.0/28}}], serviceSelector: {selector}}}"
    kind = "apiVersion: cilium.io/v2\nkind: CiliumLoadBalancerIPPool\nmetadata: {name: a}\n"
    config, made = converted(f"{kind}spec: {spec}\n")
    assert not config.pools[0].auto_assign
    comment(made, "given on request only")


def test_several_origins_in_several_files() -> None:
    files = [(f"{origin}.yaml", text_of(origin)) for origin in ("openelb", "kubevip")]
    with pytest.raises(ConfigError, match="overlaps"):
        convert(files)
    files[1] = ("kubevip.yaml", text_of("kubevip").replace("198.51.100", "203.0.113"))
    assert len(parse(convert(files)).pools) == 5


@pytest.mark.parametrize(
    ("origin", "old", "new", "where", "said"),
    [
        ("metallb", "      bfd-profile: fast", "      bfd-profil: fast", "23:7", "did you mean"),
        ("metallb", "      auto-assign: false", "      autoassign: false", "40:7", "auto-assign?"),
        ("metallb", "      minimum-ttl: 254", "      ttl: 254", "59:7", "known here are name,"),
        ("metallb", "        localpref: 100", "        localpref: high", "43:20", "whole number"),
        ("metallb", "bgp-communities:", "communities:", "31:5", "did you mean bgp-communities?"),
        ("metallb", "64512:1", "64512-1", "44:37", "neither a community"),
        ("metallb", "[10.20.30.40/24]", "[10.20.30.400/24]", "49:19", "IPv4"),
        ("metallb", "layer2", "layer3", "48:17", "is not bgp or layer2"),
        ("metallb-resources", "  autoAssign: true", "  autoAsign: true", "12:3", "autoAssign?"),
        ("metallb-resources", "    peerASN: 64500", "    peerAsn: 64500", "31:5", "peerASN?"),
        ("openelb", "listenPort", "listenPorts", "31:19", "did you mean listenPort?"),
        ("openelb", "usingKnownIPs", "usingKnownIps", "26:47", "usingKnownIPs?"),
        ("kubevip", "search-order", "searchorder", "11:3", "unknown key"),
        ("cilium", "disabled: true", "disable: true", "19:3", "did you mean disabled?"),
        ("cilium", "{start: 198.51.100.100, ", "{begin: 198.51.100.100, ", "7:6", "unknown key"),
    ],
)
def test_a_mistake_is_an_error_at_its_place(
    origin: str, old: str, new: str, where: str, said: str
) -> None:
    text = text_of(origin)
    assert old in text
    problems = refused(text.replace(old, new, 1))
    assert any(p.startswith(f"their.yaml:{where}: ") and said in p for p in problems), (
        f"{where} {said} in {problems}"
    )


def test_every_error_of_every_object_at_once() -> None:
    text = text_of("metallb-resources").replace("localPref", "localpref").replace("myASN", "asn")
    assert len(refused(text)) >= 3


@pytest.mark.parametrize(
    "text", ["kind: Pod\nmetadata: {name: x}\n", "a: 1\n", "", "---\n---\n", "- 1\n"]
)
def test_what_is_nobodys_configuration_is_said(text: str) -> None:
    assert refused(text)


def test_objects_that_stand_beside_are_left_out_aloud() -> None:
    beside = "---\napiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: speaker}\n"
    _, made = converted(text_of("cilium") + beside)
    assert "DaemonSet speaker" in comment(made, "not ours to read")


def test_a_comment_cannot_break_out_of_its_line() -> None:
    text = 'address-pools:\n- {name: "a\\nversion: 2", addresses: [198.51.100.0/24]}\n'
    config, _ = converted(text)
    assert config.pools[0].name == "a-version-2"


def test_quoted_configuration_in_a_config_map() -> None:
    inner = "address-pools:\\n- {name: a, adresses: []}\\n"
    text = f'kind: ConfigMap\nmetadata: {{name: config}}\ndata: {{config: "{inner}"}}\n'
    (problem,) = refused(text)
    assert problem.startswith("their.yaml: data.config:2:13: address-pools[0].adresses: unknown")


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_files_are_what_this_reads(origin: str) -> None:
    assert not any(load(part).problems for part in text_of(origin).split("---\n"))


def test_the_command() -> None:
    path = str(FILES / "metallb.yaml")
    done = lbctl("config", "import", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse(done.stdout).pools[0].name == "gold-pool"
    checked = lbctl("config", "validate", "-", stdin=done.stdout)
    assert checked.returncode == 0
    done = lbctl("config", "import", "-", stdin="kind: Pod\n")
    assert done.returncode == 1 and not done.stdout and "stdin: nothing of MetalLB" in done.stderr
