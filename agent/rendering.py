"""From the common tables and this node's view to the ruleset that its kernel is to hold. Pure.

Rule: what did not change since the last state is taken over as the same objects, so that both the
rendering and the difference of two rulesets cost what changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from agent.inputs import Inputs
from lbctl.core import forwarding, nft, nodeview
from lbctl.core.elements import PortKey
from lbctl.core.forwarding import EVERYWHERE, Table
from lbctl.core.model import Address, Network
from lbctl.core.names import TUNNEL_DEVICE
from lbctl.core.nft import Ruleset
from lbctl.core.nftsets import Policy
from lbctl.core.nodeview import PortElements, PortView
from lbctl.core.pmap import PMap, changed, persistent

_Ranges = tuple[tuple[Address, Address], ...]


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a restart needs; written to the snapshot whole.

    macs: of the other nodes' addresses, the last that were seen. down: nodes called down. strays:
    EIPs outside every accepted pool. externals: of an EIP, the endpoints on no node. usable,
    usable6: the nodes that can be steered to by IPv4 and by IPv6. tunnel_peers, tunnel_mtu: who may
    send to us through the tunnel, and what fits into it.
    """

    inputs: Inputs = field(default_factory=Inputs)
    down: frozenset[str] = frozenset()
    table: Table = forwarding.EMPTY
    view: Mapping[Address, tuple[PortView, ...]] = field(default_factory=PMap)
    index: Mapping[str, int] = field(default_factory=dict)
    macs: Mapping[Address, str] = field(default_factory=dict)
    rules: Ruleset = field(default_factory=Ruleset)
    usable: tuple[str, ...] = ()
    usable6: tuple[str, ...] = ()
    tunnel_peers: tuple[Address, ...] = ()
    tunnel_mtu: int = 0
    shape: str = ""
    strays: PMap[Address, None] = field(default_factory=PMap)
    externals: PMap[Address, tuple[Address, ...]] = field(default_factory=PMap)

    @property
    def steerable(self) -> dict[int, dict[str, int]]:
        """The nodes that can be steered to, with their numbers, by IP version."""
        return {
            version: {name: self.index[name] for name in names}
            for version, names in ((4, self.usable), (6, self.usable6))
        }


def render(
    state: State,
    me: str,
    generation: int,
    uplinks: tuple[str, ...],
    before: State | None = None,
) -> State:
    """Return the state with the ruleset that it makes on node `me`.

    before: the last rendered state of this node, of which unchanged ports stay the same objects.
    """
    before = State() if before is None else before
    touched = changed(before.table.eips, state.table.eips)
    strays = _strays(before, state, touched)
    peers = tuple(sorted(set(state.macs.values())))
    state = replace(state, strays=strays, externals=_externals(before, state, touched))
    silent = sorted(state.index[name] for name in state.down if name in state.index)
    rules = Ruleset(
        generation,
        uplinks,
        peers,
        _ranges(before, state, strays),
        _ports(before, state, me),
        _sources(before, state, touched),
        _policy(before, state, touched, uplinks),
        tuple(silent),
    )
    return replace(state, rules=rules)


def _ranges(before: State, state: State, strays: PMap[Address, None]) -> _Ranges:
    """The pools and what is outside them, but for the nodes' own addresses."""
    was, now = before.inputs, state.inputs
    if was.ranges == now.ranges and was.nodes is now.nodes and before.strays is strays:
        return before.rules.ranges
    return nft.merged(
        [*now.ranges, *((a, a) for a in strays)],
        [a for node in now.nodes for a in node.addresses],
    )


def _ports(before: State, state: State, me: str) -> PMap[PortKey, PortElements]:
    index = state.steerable
    if before.steerable == index:
        addresses = changed(before.view, state.view)
    else:
        addresses = set(before.view) | set(state.view)
    old = persistent(before.rules.ports)
    gone = {_key(a, view) for a in addresses for view in before.view.get(a, ())}
    fresh: dict[PortKey, PortElements] = {}
    for address in addresses:
        for view in state.view.get(address, ()):
            key = _key(address, view)
            made = nodeview.elements(address, view, me, index[address.version])
            known = old.get(key)
            fresh[key] = known if known == made else made
    return old.updated(fresh, gone - fresh.keys())


def _key(address: Address, view: PortView) -> PortKey:
    return address, view.table.protocol.value, view.table.port


def _sources(
    before: State, state: State, touched: Iterable[Address]
) -> PMap[Address, tuple[Network, ...]]:
    found = {a: entry.sources for a in touched if (entry := state.table.eips.get(a)) is not None}
    fresh = {address: sources for address, sources in found.items() if sources}
    return persistent(before.rules.sources).updated(fresh, set(touched) - fresh.keys())


def _policy(
    before: State, state: State, touched: Iterable[Address], uplinks: tuple[str, ...]
) -> Policy:
    options = state.inputs.forwarding
    pingable = persistent(before.rules.policy.pingable)
    if not options.ping:
        pingable = PMap()
    else:
        if not before.inputs.forwarding.ping:
            touched = state.table.eips
        here = {a: None for a in touched if a in state.table.eips}
        pingable = pingable.updated(here, set(touched) - here.keys())
    mtus = tuple((name, state.tunnel_mtu) for name in uplinks if name != TUNNEL_DEVICE)
    return Policy(
        pingable,
        options.new_flows_per_second,
        tuple(sorted(set(chain(*state.externals.values())), key=lambda a: (a.version, int(a)))),
        tunnel_peers=state.tunnel_peers,
        tunnel_mtus=mtus if state.tunnel_peers else (),
    )


def _externals(
    before: State, state: State, touched: Iterable[Address]
) -> PMap[Address, tuple[Address, ...]]:
    """The endpoints that every node delivers itself, by EIP: few, in most clusters none."""
    tables = {a: entry for a in touched if (entry := state.table.eips.get(a)) is not None}
    found = {
        a: tuple(e.address for port in entry.ports for e in port.endpoints if e.node == EVERYWHERE)
        for a, entry in tables.items()
    }
    fresh = {address: endpoints for address, endpoints in found.items() if endpoints}
    return before.externals.updated(fresh, set(touched) - fresh.keys())


def _strays(before: State, state: State, touched: Iterable[Address]) -> PMap[Address, None]:
    """The EIPs outside the pools: rare, and all that `ranges` needs to know of the EIPs."""
    spans = state.inputs.ranges
    known = before.strays
    if before.inputs.ranges != spans:
        touched, known = state.table.eips, PMap()
    outside = {a: None for a in touched if a in state.table.eips and not _within(a, spans)}
    return known.updated(outside, set(touched) - outside.keys())


def _within(address: Address, spans: _Ranges) -> bool:
    number, version = int(address), address.version
    return any(a.version == version and int(a) <= number <= int(b) for a, b in spans)
