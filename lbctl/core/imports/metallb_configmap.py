"""MetalLB up to 0.12: the text under `config` of its ConfigMap.

Source: MetalLB's manifests/example-config.yaml and internal/config/config.go, v0.2 to v0.12.
"""

from __future__ import annotations

import re
from typing import Final

from pydantic import ConfigDict, Field

from lbctl.core.imports.draft import Draft, Item
from lbctl.core.imports.reading import Anything, Foreign, Requirement, Seconds, Text, kebab, read
from lbctl.core.manifests import Place

COMMUNITY: Final = re.compile(r"(\d{1,10}:\d{1,10}|large(:\d{1,10}){3})\Z")
PEER_WHY: Final = {
    "source_address": "two managers cannot speak from one address; each uses its host's",
    "src_address": "two managers cannot speak from one address; each uses its host's",
    "router_id": "each manager's own address is its identifier",
    "keepalive_time": "it is a third of the hold time",
    "connect_time": "a session is tried again after at most 5 s",
    "node_selectors": "sessions are the managers', two for the whole cluster, not the nodes'",
    "bfd_profile": "no BFD: the managers' own probes see a dead node in a fraction of a second",
    "enable_graceful_restart": "a second manager announces while one restarts; not every switch "
    "is good for gracefulRestart (docs/operations.md)",
    "vrf": "sessions are made in the host's main routing table",
    "dynamic_asn": "say which AS the switch has, under asn",
    "interface": "sessions need an address",
    "disable_mp": "one session carries both families",
    "dual_stack_address_family": "one session carries both families",
}
ADVERTISEMENT_WHY: Final = {
    "aggregation_length": "every EIP is announced as a host route",
    "aggregation_length_v6": "every EIP is announced as a host route",
    "localpref": "routes carry no LOCAL_PREF; set it on the switch",
    "local_pref": "routes carry no LOCAL_PREF; set it on the switch",
    "communities": "routes carry no communities; set them on the switch",
    "peers": "every EIP is announced to every peer",
    "node_selectors": "next hops are all nodes that can forward; exclude a node by its label",
    "ip_address_pool_selectors": "every pool is announced",
    "service_selectors": "every Service is announced",
}
POOL_WHY: Final = {
    "arp_network": "ARP is not spoken: the switches get routes by BGP",
}


class _Kebab(Foreign):
    model_config = ConfigDict(alias_generator=kebab)


class _NodeSelector(_Kebab):
    match_labels: dict[str, Text] = Field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()


class _Peer(_Kebab):
    my_asn: int
    peer_asn: int
    peer_address: Text
    source_address: Text = ""
    peer_port: int | None = None
    hold_time: Seconds | None = None
    keepalive_time: Seconds | None = None
    router_id: Text = ""
    node_selectors: tuple[_NodeSelector, ...] = ()
    password: Text = ""
    bfd_profile: Text = ""
    ebgp_multihop: bool = False


class _Advertisement(_Kebab):
    aggregation_length: int | None = None
    aggregation_length_v6: int | None = None
    localpref: int | None = None
    communities: tuple[Text, ...] = ()


class _Pool(_Kebab):
    name: Text
    protocol: Text = "bgp"
    addresses: tuple[Text, ...] = ()
    cidr: tuple[Text, ...] = ()  # up to 0.4
    arp_network: Text = ""  # up to 0.4
    avoid_buggy_ips: bool = False
    auto_assign: bool = True
    bgp_advertisements: tuple[_Advertisement, ...] = ()


class _Bfd(_Kebab):
    name: Text
    receive_interval: int | None = None
    transmit_interval: int | None = None
    detect_multiplier: int | None = None
    echo_interval: int | None = None
    echo_mode: bool = False
    passive_mode: bool = False
    minimum_ttl: int | None = None


class _Config(_Kebab):
    peers: tuple[_Peer, ...] = ()
    bgp_communities: dict[str, Text] = Field(default_factory=dict)
    address_pools: tuple[_Pool, ...] = ()
    bfd_profiles: tuple[_Bfd, ...] = ()
    peer_autodiscovery: Anything = None  # 0.8 to 0.9


def convert(place: Place, draft: Draft) -> None:
    """Add what stands at `place` to the draft. Raises ConfigError for what MetalLB refuses."""
    found = read(_Config, place)
    for n, peer in enumerate(found.peers):
        _peer(draft, place.at("peers", n), peer)
    for n, pool in enumerate(found.address_pools):
        _pool(draft, place.at("address-pools", n), pool, found.bgp_communities)
    for name, value in found.bgp_communities.items():
        where = place.at("bgp-communities", name)
        if not COMMUNITY.match(value):
            draft.problems.append(where.problem(f"{value} is not a community (65535:65281)"))
        draft.notes.append(f"{where}: not taken over: {ADVERTISEMENT_WHY['communities']}")
    for n, profile in enumerate(found.bfd_profiles):
        where = place.at("bfd-profiles", n)
        draft.notes.append(f"{where}: {profile.name} not taken over: {PEER_WHY['bfd_profile']}")
    if found.peer_autodiscovery is not None:
        draft.notes.append(
            f"{place.at('peer-autodiscovery')}: not taken over: name the switches under peers"
        )


def _peer(draft: Draft, place: Place, peer: _Peer) -> None:
    item = draft.peer(f"peer-{peer.peer_address}", place, peer.my_asn)
    basics(draft, item, place, peer.peer_address, peer.peer_asn)
    if peer.peer_port not in (None, 0):
        item.keys["port"] = peer.peer_port
    if peer.hold_time is not None:
        draft.hold_time(item, place.at("hold-time"), peer.hold_time)
    if peer.password:
        draft.secret(item, place.at("password"))
    if peer.ebgp_multihop:
        item.keys["multihop"] = 255
    item.leave_out(place, peer, PEER_WHY)


def basics(draft: Draft, item: Item, place: Place, address: str, asn: int) -> None:
    """Address and AS number of a switch."""
    item.keys["address"] = address
    item.keys["asn"] = asn


def _pool(draft: Draft, place: Place, pool: _Pool, aliases: dict[str, str]) -> None:
    item = draft.pool(pool.name, place.at("name"))
    texts = [(place.at("addresses", n), text) for n, text in enumerate(pool.addresses)]
    texts += [(place.at("cidr", n), text) for n, text in enumerate(pool.cidr)]
    draft.addresses(item, place, texts)
    if not pool.auto_assign:
        item.keys["autoAssign"] = False
    if pool.avoid_buggy_ips:
        item.keys["avoidBuggyIPs"] = True
    if pool.protocol not in ("bgp", "layer2", "arp"):
        said = f"{pool.protocol} is not bgp or layer2"
        draft.problems.append(place.at("protocol").problem(said))
    elif pool.protocol != "bgp":
        item.note(place.at("protocol"), f"{pool.protocol}: {LAYER2}")
    item.leave_out(place, pool, POOL_WHY)
    for n, one in enumerate(pool.bgp_advertisements):
        where = place.at("bgp-advertisements", n)
        item.leave_out(where, one, ADVERTISEMENT_WHY)
        for m, community in enumerate(one.communities):
            if community not in aliases and not COMMUNITY.match(community):
                said = f"{community} is neither a community nor under bgp-communities"
                draft.problems.append(where.at("communities", m).problem(said))


LAYER2: Final = "neither ARP nor NDP is spoken: the switches get routes by BGP"
