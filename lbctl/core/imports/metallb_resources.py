"""MetalLB from 0.13: its custom resources of group metallb.io.

Source: MetalLB's api/v1beta1 and api/v1beta2. IPAddressPool, BGPPeer, BGPAdvertisement, Community,
BFDProfile; L2Advertisement and the older AddressPool too, as they come in the same files.
"""

from __future__ import annotations

from typing import Final

from pydantic import Field

from lbctl.core.imports.draft import Draft, Item
from lbctl.core.imports.metallb_configmap import (
    ADVERTISEMENT_WHY,
    COMMUNITY,
    LAYER2,
    PEER_WHY,
    basics,
)
from lbctl.core.imports.reading import Anything, Camel, Seconds, Selector, Text, read
from lbctl.core.manifests import Manifest

GROUP: Final = "metallb.io"


class _Allocation(Camel):
    priority: int | None = None
    namespaces: tuple[Text, ...] = ()
    namespace_selectors: tuple[Selector, ...] = ()
    service_selectors: tuple[Selector, ...] = ()


class _PoolSpec(Camel):
    addresses: tuple[Text, ...]
    auto_assign: bool = True
    avoid_buggy_ips: bool = Field(default=False, alias="avoidBuggyIPs")
    service_allocation: _Allocation | None = None


class _Advertisement(Camel):
    aggregation_length: int | None = None
    aggregation_length_v6: int | None = Field(default=None, alias="aggregationLengthV6")
    local_pref: int | None = None
    communities: tuple[Text, ...] = ()
    ip_address_pools: tuple[Text, ...] = ()
    ip_address_pool_selectors: tuple[Selector, ...] = ()
    node_selectors: tuple[Selector, ...] = ()
    peers: tuple[Text, ...] = ()
    service_selectors: tuple[Selector, ...] = ()


class _OldPoolSpec(Camel):
    """AddressPool, of 0.13 to 0.15."""

    protocol: Text = "bgp"
    addresses: tuple[Text, ...]
    auto_assign: bool = True
    avoid_buggy_ips: bool = Field(default=False, alias="avoidBuggyIPs")
    bgp_advertisements: tuple[_Advertisement, ...] = ()


class _SecretRef(Camel):
    name: Text = ""
    namespace: Text = ""


class _PeerSpec(Camel):
    my_asn: int = Field(alias="myASN")
    peer_asn: int | None = Field(default=None, alias="peerASN")
    dynamic_asn: Text = Field(default="", alias="dynamicASN")
    peer_address: Text = ""
    interface: Text = ""
    source_address: Text = ""
    peer_port: int | None = None
    hold_time: Seconds | None = None
    keepalive_time: Seconds | None = None
    connect_time: Seconds | None = None
    router_id: Text = Field(default="", alias="routerID")
    node_selectors: tuple[Selector, ...] = ()
    password: Text = ""
    password_secret: _SecretRef | None = None
    bfd_profile: Text = ""
    enable_graceful_restart: bool = False
    ebgp_multi_hop: bool = False
    vrf: Text = ""
    disable_mp: bool = Field(default=False, alias="disableMP")
    dual_stack_address_family: bool = False


class _Alias(Camel):
    name: Text
    value: Text


class _CommunitySpec(Camel):
    communities: tuple[_Alias, ...] = ()


class _BfdSpec(Camel):
    receive_interval: int | None = None
    transmit_interval: int | None = None
    detect_multiplier: int | None = None
    echo_interval: int | None = None
    echo_mode: bool = False
    passive_mode: bool = False
    minimum_ttl: int | None = None


class _L2Spec(Camel):
    ip_address_pools: tuple[Text, ...] = ()
    ip_address_pool_selectors: tuple[Selector, ...] = ()
    node_selectors: tuple[Selector, ...] = ()
    interfaces: Anything = None
    service_selectors: tuple[Selector, ...] = ()


def convert(found: Manifest, draft: Draft) -> bool:
    """Add one object to the draft; False if its kind is none of these. Raises ConfigError."""
    kinds = {
        "IPAddressPool": _pool,
        "AddressPool": _old_pool,
        "BGPPeer": _peer,
        "BGPAdvertisement": _advertisement,
        "L2Advertisement": _l2,
        "Community": _community,
        "BFDProfile": _bfd,
    }
    take = kinds.get(found.kind)
    if take is not None:
        take(found, draft)
    return take is not None


def _pool(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_PoolSpec, place)
    item = _addresses(found, draft, spec.addresses)
    if not spec.auto_assign:
        item.keys["autoAssign"] = False
    if spec.avoid_buggy_ips:
        item.keys["avoidBuggyIPs"] = True
    rules = spec.service_allocation or _Allocation()
    if rules.priority is not None:
        item.keys["priority"] = rules.priority
    if rules.namespaces:
        item.keys["namespaces"] = rules.namespaces
    if rules.namespace_selectors:
        item.keys["namespaceSelectors"] = [one.plain() for one in rules.namespace_selectors]
    if rules.service_selectors:
        item.keys["serviceSelectors"] = [one.plain() for one in rules.service_selectors]


def _addresses(found: Manifest, draft: Draft, texts: tuple[str, ...]) -> Item:
    place = found.place.at("spec", "addresses")
    item = draft.pool(found.name, found.place.at("metadata", "name"))
    draft.addresses(item, place, [(place.at(n), text) for n, text in enumerate(texts)])
    return item


def _old_pool(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_OldPoolSpec, place)
    item = _addresses(found, draft, spec.addresses)
    if not spec.auto_assign:
        item.keys["autoAssign"] = False
    if spec.avoid_buggy_ips:
        item.keys["avoidBuggyIPs"] = True
    if spec.protocol != "bgp":
        item.note(place.at("protocol"), f"{spec.protocol}: {LAYER2}")
    for n, one in enumerate(spec.bgp_advertisements):
        item.leave_out(place.at("bgpAdvertisements", n), one, ADVERTISEMENT_WHY)


def _peer(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_PeerSpec, place)
    if not spec.peer_address or spec.peer_asn in (None, 0):
        draft.notes.append(
            f"{place}: left out: a session needs peerAddress and peerASN of the switch"
        )
        return
    item = draft.peer(found.name, place, spec.my_asn)
    basics(draft, item, place, spec.peer_address, spec.peer_asn or 0)
    if spec.peer_port not in (None, 0):
        item.keys["port"] = spec.peer_port
    if spec.hold_time is not None:
        draft.hold_time(item, place.at("holdTime"), spec.hold_time)
    if spec.password:
        draft.secret(item, place.at("password"))
    elif spec.password_secret is not None and spec.password_secret.name:
        item.keys["passwordSecret"] = spec.password_secret.name
        item.note(place.at("passwordSecret"), "copy this Secret into namespace lbctl-system")
    if spec.ebgp_multi_hop:
        item.keys["multihop"] = 255
    item.leave_out(place, spec, PEER_WHY)


def _advertisement(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_Advertisement, place)
    note = Item(place, {})
    note.leave_out(place, spec, ADVERTISEMENT_WHY)
    draft.notes += note.notes
    if spec.ip_address_pools:
        where = place.at("ipAddressPools")
        draft.notes.append(f"{where}: not taken over: every pool is announced")


def _l2(found: Manifest, draft: Draft) -> None:
    read(_L2Spec, found.place.at("spec"))
    draft.notes.append(f"{found.place.at('kind')}: {found.name} not taken over: {LAYER2}")


def _community(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    for n, one in enumerate(read(_CommunitySpec, place).communities):
        where = place.at("communities", n)
        if not COMMUNITY.match(one.value):
            draft.problems.append(where.at("value").problem(f"{one.value} is not a community"))
        why = ADVERTISEMENT_WHY["communities"]
        draft.notes.append(f"{where}: {one.name} not taken over: {why}")


def _bfd(found: Manifest, draft: Draft) -> None:
    read(_BfdSpec, found.place.at("spec"))
    said = f"{found.name} not taken over: {PEER_WHY['bfd_profile']}"
    draft.notes.append(f"{found.place.at('kind')}: {said}")
