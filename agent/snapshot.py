"""The agent's state on the node's disk, so that a restart needs no API server.

Rules: kept after each applied table (`lbctl.kept`). It holds what tables are made of, not the
tables: what is read is built and checked like anything else. A snapshot that is damaged, of another
version or of another node is as good as none. What did not change since the last write is not
encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.inputs import Inputs
from agent.rendering import State, render
from lbctl.core import forwarding, nodeview
from lbctl.core.forwarding import Holder, Locator, Sources, Table
from lbctl.core.maglev import FORMAT, SIZES
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    ForwardingOptions,
    Node,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
    Sharer,
    TrafficPolicy,
)
from lbctl.core.nodeview import PortView
from lbctl.core.pmap import PMap, changed
from lbctl.kept import Kept

VERSION: Final = 5
FILE: Final = "agent.json"


class Store:
    """The snapshot file of a node."""

    def __init__(self, directory: Path, node: str) -> None:
        self._node = node
        self._latest: State | None = None
        self._parts = _Parts()
        self.kept = Kept(directory / FILE, self._content)

    def save(self, state: State) -> None:
        """Keep this state from now on."""
        self._latest = state
        self.kept.changed()

    def _content(self) -> bytes:
        assert self._latest is not None
        return msgspec.json.encode(_packed(self._node, self._latest, self._parts))

    def load(self) -> State | None:
        """The state of the last run; None if there is none that can be used."""
        found = self.kept.read()
        if found is None:
            return None
        try:
            if (found["version"], found["format"], found["node"]) != (VERSION, FORMAT, self._node):
                return None
            return _unpacked(found)
        except (msgspec.MsgspecError, KeyError, ValueError, TypeError, IndexError) as error:
            self.kept.refuse(error)
            return None


def _packed(node: str, state: State, parts: _Parts) -> dict[str, Any]:
    inputs = state.inputs
    return {
        "version": VERSION,
        "format": FORMAT,
        "node": node,
        "generation": state.rules.generation,
        "shape": state.shape,
        "config_generation": inputs.config_generation,
        "down": sorted(state.down),
        "index": dict(state.index),
        "macs": {str(address): mac for address, mac in state.macs.items()},
        "uplinks": state.rules.uplinks,
        "usable": state.usable,
        "usable6": state.usable6,
        "tunnel_mtu": state.tunnel_mtu,
        "tunnel_peers": [str(address) for address in state.tunnel_peers],
        "forwarding": inputs.forwarding,
        "ranges": [[str(first), str(last)] for first, last in inputs.ranges],
        "nodes": [_node(entry) for entry in inputs.nodes],
        "doubtful": sorted(inputs.doubtful),
        **parts.of(state),
    }


class _Part:
    """The encoded entries of one map; each is encoded anew when it is another object."""

    def __init__(self, pack: Callable[[Any, Any], Any]) -> None:
        self._pack = pack
        self._known: tuple[Mapping[Any, Any], Mapping[Any, Any]] = PMap(), PMap()
        self._encoded: dict[Any, msgspec.Raw] = {}

    def of(self, items: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> list[msgspec.Raw]:
        """Those entries of `items` whose key is in `wanted`."""
        for key in changed(self._known[0], items) | changed(self._known[1], wanted):
            value = items.get(key) if key in wanted else None
            packed = None if value is None else self._pack(key, value)
            if packed is None:
                self._encoded.pop(key, None)
            else:
                self._encoded[key] = msgspec.Raw(msgspec.json.encode(packed))
        self._known = items, wanted
        return list(self._encoded.values())


class _Parts:
    """What there may be thousands of."""

    def __init__(self) -> None:
        self._eips = _Part(lambda _, eip: _eip(eip) if eip.forwarding else None)
        self._services = _Part(lambda _, service: _service(service))
        self._endpoints = _Part(lambda _, known: _endpoints(known))
        self._before = _Part(lambda address, views: [str(address), [_before(v) for v in views]])

    def of(self, state: State) -> dict[str, list[msgspec.Raw]]:
        """The entries of the snapshot; only Services that have an EIP."""
        inputs, owned = state.inputs, state.table.owned
        return {
            "eips": self._eips.of(inputs.eips, inputs.eips),
            "services": self._services.of(inputs.services, owned),
            "endpoints": self._endpoints.of(inputs.endpoints, owned),
            "before": self._before.of(state.view, state.view),
        }


def _eip(eip: Eip) -> list[Any]:
    sharers = [[sharer.ref.namespace, sharer.ref.name, sharer.uid] for sharer in eip.sharers]
    owner = eip.owner
    return [str(eip.address), eip.pool, owner.namespace, owner.name, eip.owner_uid, sharers]


def _unpacked(found: Mapping[str, Any]) -> State:
    inputs = Inputs(
        eips=PMap({e.address: e for e in map(_eip_of, found["eips"])}),
        services=PMap({s.ref: s for s in map(_service_of, found["services"])}),
        endpoints=PMap({e.service: e for e in map(_endpoints_of, found["endpoints"])}),
        nodes=tuple(map(_node_of, found["nodes"])),
        doubtful=frozenset(found.get("doubtful", ())),  # not in those of an older version
        ranges=tuple((ip_address(a), ip_address(b)) for a, b in found["ranges"]),
        forwarding=msgspec.convert(found["forwarding"], ForwardingOptions),
        config_generation=int(found["config_generation"]),
    )
    down = frozenset(found["down"])
    locator = Locator(inputs.nodes, inputs.forwarding.located_by)
    sources = Sources(
        inputs.eips,
        inputs.services,
        inputs.endpoints,
        locator,
        down,
        inputs.forwarding,
        doubtful=inputs.doubtful,
    )
    table = forwarding.revise(forwarding.EMPTY, sources)
    bare = State(
        inputs,
        down,
        table,
        _view(table, found["node"], {ip_address(a): past for a, past in found["before"]}),
        {str(name): int(number) for name, number in found["index"].items()},
        {ip_address(a): str(mac) for a, mac in found["macs"].items()},
        usable=tuple(found["usable"]),
        usable6=tuple(found["usable6"]),
        tunnel_peers=tuple(map(ip_address, found["tunnel_peers"])),
        tunnel_mtu=int(found["tunnel_mtu"]),
        shape=str(found["shape"]),
    )
    return render(bare, found["node"], int(found["generation"]), tuple(found["uplinks"]))


def _eip_of(packed: list[Any]) -> Eip:
    address, pool, namespace, name, uid, sharers = packed
    others = tuple(Sharer(ObjectRef(space, other), its) for space, other, its in sharers)
    return Eip(ip_address(address), pool, ObjectRef(namespace, name), uid, sharers=others)


def _view(table: Table, me: str, before: Mapping[Address, list[Any]]) -> nodeview.View:
    """The table with the past of its buckets; what does not fit any more has none."""
    view: dict[Address, tuple[PortView, ...]] = {}
    for address, entry in table.eips.items():
        packed = before.get(address, [])
        ports = []
        for number, made in enumerate(nodeview.fresh_view(port, me) for port in entry.ports):
            size = len(made.table.owners)
            past = packed[number] if number < len(packed) else [[], []]
            if size and len(past[1]) in SIZES[SIZES.index(size) :]:
                former = tuple(tuple(map(_holder, line)) for line in past[0])
                row = nodeview.past_row(former, past[1])
                ports.append(replace(made, former=former, before=row))
            else:
                ports.append(made)
        view[address] = tuple(ports)
    return view


def _before(view: PortView) -> list[Any]:
    """Lines of former owners, and a place among them plus one for each bucket, 0 for none."""
    places = list(view.before) if view.former else []
    return [[[[str(e.address), e.port, e.node] for e in line] for line in view.former], places]


def _holder(packed: list[Any]) -> Holder:
    address, port, node = packed
    return Holder(ip_address(address), port, node)


def _node(node: Node) -> list[Any]:
    return [
        node.name,
        [str(a) for a in node.addresses],
        [str(c) for c in node.pod_cidrs],
        [str(a) for a in node.next_hops],
    ]


def _node_of(packed: list[Any]) -> Node:
    name, addresses, cidrs, next_hops = packed
    return Node(
        str(name),
        addresses=tuple(map(ip_address, addresses)),
        pod_cidrs=tuple(map(ip_network, cidrs)),
        next_hops=tuple(map(ip_address, next_hops)),
    )


def _service(service: Service) -> list[Any]:
    ports = [[p.name, p.protocol.value, p.port] for p in service.ports]
    sources = [str(network) for network in service.source_ranges]
    chosen = [service.policy.value, service.selector]  # what sharers have to agree on
    return [service.ref.namespace, service.ref.name, ports, service.affinity_s, sources, chosen]


def _service_of(packed: list[Any]) -> Service:
    namespace, name, ports, affinity_s, sources, (policy, selector) = packed
    return Service(
        ObjectRef(namespace, name),
        "",
        0.0,
        tuple(ServicePort(n, Protocol(protocol), int(port)) for n, protocol, port in ports),
        True,
        policy=TrafficPolicy(policy),
        selector=tuple((key, value) for key, value in selector),
        affinity_s=affinity_s,
        source_ranges=tuple(map(ip_network, sources)),
    )


def _endpoints(known: ServiceEndpoints) -> list[Any]:
    ports = [
        [
            port.name,
            port.protocol.value,
            [
                [str(e.address), e.port, e.node, e.pod, e.ready, e.serving, e.terminating]
                for e in port.endpoints
            ],
        ]
        for port in known.ports
    ]
    return [known.service.namespace, known.service.name, ports]


def _endpoints_of(packed: list[Any]) -> ServiceEndpoints:
    namespace, name, ports = packed
    return ServiceEndpoints(
        ObjectRef(namespace, name),
        tuple(
            PortEndpoints(
                n, Protocol(protocol), tuple(Endpoint(ip_address(a), *rest) for a, *rest in given)
            )
            for n, protocol, given in ports
        ),
    )
