"""OpenELB and Porter: Eip, BgpConf and BgpPeer of group network.kubesphere.io.

Source: OpenELB's api/v1alpha1 and api/v1alpha2. BgpConf and BgpPeer hold GoBGP's structures; the
parts of them that only GoBGP has are read as they are and spoken of in comments.
"""

from __future__ import annotations

from typing import Final

from pydantic import Field

from lbctl.core.config_values import show
from lbctl.core.imports.draft import Draft, Item
from lbctl.core.imports.metallb_configmap import LAYER2, PEER_WHY, basics
from lbctl.core.imports.reading import Anything, Camel, Seconds, Selector, Text, read
from lbctl.core.manifests import Manifest, Place

GROUP: Final = "network.kubesphere.io"
_DEFAULTS: Final = (
    "eip.openelb.kubesphere.io/is-default-eip",
    "eip.porter.kubesphere.io/is-default-eip",
)
_CONF_WHY: Final = {
    "as_per_rack": "we have one AS number to all peers",
    "router_id": PEER_WHY["router_id"],
    "listen_port": "we dial the switches and do not listen",
    "listen_addresses": "we dial the switches and do not listen",
    "families": "one session carries both families",
    "use_multiple_paths": "we accept no routes",
    "graceful_restart": PEER_WHY["enable_graceful_restart"],
    "policy": "we accept no routes and announce every EIP to every peer",
}
_PEER_WHY: Final = {
    "graceful_restart": PEER_WHY["enable_graceful_restart"],
    "afi_safis": "ADD-PATH and both families are offered on every session",
    "node_selector": PEER_WHY["node_selectors"],
}
_PEER_CONF_WHY: Final = {
    "description": "peers have a name only",
    "peer_group": "there are no groups of peers",
    "peer_type": "it follows from the AS numbers",
    "remove_private_as": "our routes have no path but our own AS",
    "route_flap_damping": "we accept no routes",
    "send_community": "routes carry no communities; set them on the switch",
    "neighbor_interface": PEER_WHY["interface"],
    "vrf": PEER_WHY["vrf"],
    "allow_own_as": "we accept no routes",
    "replace_peer_as": "our routes have no path but our own AS",
    "admin_down": "to shut a session, leave the peer out",
}


class _EipSpec(Camel):
    address: Text
    protocol: Text = "bgp"
    interface: Text = ""
    disable: bool = False
    using_known_ips: bool = Field(default=False, alias="usingKnownIPs")
    priority: int | None = None
    namespaces: tuple[Text, ...] = ()
    namespace_selector: dict[str, Text] = Field(default_factory=dict)


class _ConfSpec(Camel):
    as_: int | None = Field(default=None, alias="as")
    as_per_rack: Anything = None
    router_id: Text = ""
    listen_port: Anything = None
    listen_addresses: Anything = None
    families: Anything = None
    use_multiple_paths: Anything = None
    graceful_restart: Anything = None
    policy: Anything = None


class _PeerConf(Camel):
    auth_password: Text = ""
    description: Text = ""
    local_as: int | None = None
    neighbor_address: Text = ""
    peer_as: int | None = None
    peer_group: Anything = None
    peer_type: Anything = None
    remove_private_as: Anything = None
    route_flap_damping: Anything = None
    send_community: Anything = None
    neighbor_interface: Anything = None
    vrf: Anything = None
    allow_own_as: Anything = None
    replace_peer_as: Anything = None
    admin_down: Anything = None


class _Multihop(Camel):
    enabled: bool = False
    multihop_ttl: int | None = None


class _TimersConfig(Camel):
    connect_retry: Seconds | None = None
    hold_time: Seconds | None = None
    keepalive_interval: Seconds | None = None
    minimum_advertisement_interval: Seconds | None = None


class _Timers(Camel):
    config: _TimersConfig = _TimersConfig()


class _Transport(Camel):
    mtu_discovery: Anything = None
    passive_mode: bool = False
    remote_address: Anything = None
    remote_port: int | None = None
    tcp_mss: Anything = None


class _PeerSpec(Camel):
    conf: _PeerConf = _PeerConf()
    ebgp_multihop: _Multihop = _Multihop()
    timers: _Timers = _Timers()
    transport: _Transport = _Transport()
    graceful_restart: Anything = None
    afi_safis: Anything = None
    node_selector: Selector | None = None


def convert(found: Manifest, draft: Draft) -> bool:
    """Add one object to the draft; False if its kind is none of these. Raises ConfigError."""
    take = {"Eip": _eip, "BgpConf": _conf, "BgpPeer": _peer}.get(found.kind)
    if take is not None:
        take(found, draft)
    return take is not None


def _eip(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_EipSpec, place)
    item = draft.pool(found.name, found.place.at("metadata", "name"))
    draft.addresses(item, place, [(place.at("address"), spec.address)])
    annotations = found.place.at("metadata", "annotations").value
    marks = annotations if isinstance(annotations, dict) else {}
    default = any(marks.get(name) in ("true", True) for name in _DEFAULTS)
    if not default and not spec.namespaces and not spec.namespace_selector:
        item.keys["autoAssign"] = False
        item.note(place, "not the default Eip: given to Services that name it")
    if spec.namespaces:
        item.keys["namespaces"] = spec.namespaces
    if spec.namespace_selector:
        selector = {"matchLabels": spec.namespace_selector}
        item.keys["namespaceSelectors"] = [selector]
    if spec.priority is not None:
        item.keys["priority"] = spec.priority
    if spec.disable:
        item.keys["drain"] = True
    if spec.protocol != "bgp":
        item.note(place.at("protocol"), f"{spec.protocol}: {LAYER2}")
    why = {
        "interface": "traffic comes in where forwarding.interfaces says",
        "using_known_ips": "an address that is asked for is given if it is in a pool",
    }
    item.leave_out(place, spec, why)


def _conf(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_ConfSpec, place)
    if spec.as_ is not None:
        draft.asns[spec.as_] += 1
    note = Item(place, {})
    note.leave_out(place, spec, _CONF_WHY)
    draft.notes += note.notes


def _peer(found: Manifest, draft: Draft) -> None:
    place = found.place.at("spec")
    spec = read(_PeerSpec, place)
    conf = spec.conf
    if not conf.neighbor_address or not conf.peer_as:
        draft.notes.append(f"{place}: left out: a session needs conf.neighborAddress and peerAs")
        return
    item = draft.peer(found.name, place, conf.local_as or None)
    basics(draft, item, place, conf.neighbor_address, conf.peer_as)
    if spec.transport.remote_port:
        item.keys["port"] = spec.transport.remote_port
    if spec.timers.config.hold_time is not None:
        where = place.at("timers", "config", "holdTime")
        draft.hold_time(item, where, spec.timers.config.hold_time)
    if conf.auth_password:
        draft.secret(item, place.at("conf", "authPassword"))
    if spec.ebgp_multihop.enabled:
        item.keys["multihop"] = spec.ebgp_multihop.multihop_ttl or 255
    item.leave_out(place, spec, _PEER_WHY)
    item.leave_out(place.at("conf"), conf, _PEER_CONF_WHY)
    _timing(item, place, spec)


def _timing(item: Item, place: Place, spec: _PeerSpec) -> None:
    timers = {
        "connect_retry": PEER_WHY["connect_time"],
        "keepalive_interval": PEER_WHY["keepalive_time"],
        "minimum_advertisement_interval": "routes are sent at once",
    }
    item.leave_out(place.at("timers", "config"), spec.timers.config, timers)
    transport = {
        "mtu_discovery": "the host's setting holds",
        "remote_address": "the session goes to conf.neighborAddress",
        "tcp_mss": "the host's setting holds",
    }
    where = place.at("transport")
    item.leave_out(where, spec.transport, transport)
    if spec.transport.passive_mode:
        said = show(spec.transport.passive_mode)
        item.note(where.at("passiveMode"), f"not taken over {said}: we dial the switches")
