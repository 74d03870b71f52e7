"""What every node does with a packet for an EIP: the tables that all nodes share.

Rules:
- `build` is a function of the cluster alone, the same on every node; history and this node's
  part are `lbctl.core.nodeview`'s. The digest covers what `build` gives, so two nodes with the same
  digest steer every packet alike.
- A port whose endpoints all refuse new flows is `closed`: established flows keep their table, new
  ones are refused at once. A port without any endpoint is in no table: everything is refused.
- An endpoint's node is found by pod CIDRs and node addresses. nodeName counts only where *no* node
  has a pod CIDR, or where the configuration says so (some CNIs allocate elsewhere), for Pods alone:
  anyone may write an EndpointSlice.
- `revise` makes the next table from the last: persistent maps (`lbctl.core.pmap`) tell what changed
  between two whole inputs, so that a change costs its own EIPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final, NamedTuple

from lbctl.core import maglev
from lbctl.core.endpoints import taking
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    ForwardingOptions,
    LocatedBy,
    Network,
    Node,
    ObjectRef,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
    TrafficPolicy,
    snapshot,
)
from lbctl.core.pmap import PMap, changed, persistent
from lbctl.core.reasons import Reason
from lbctl.core.sharing import served

_WORD: Final = 1 << 64
DEFAULTS: Final = ForwardingOptions()
EVERYWHERE: Final = "*"  # the node of an endpoint that every node delivers itself


class Holder(NamedTuple):
    """An endpoint as far as packets go: a bucket's owner is equal to itself in any condition."""

    address: Address
    port: int
    node: str

    def at(self, node: str) -> bool:
        """Whether a node delivers to it itself."""
        return self.node in (node, EVERYWHERE)


@snapshot
class PortTable:
    """The buckets of one EIP:protocol:port.

    `owners[b]` indexes `endpoints`; `members` are all endpoints that established flows may still be
    with, also those without a bucket; `spare` are those of them that may well answer a new flow:
    they do not terminate, or serve on. `affinity_s`: None, or the hash takes the client's address
    alone, and a client keeps its pod for so long after its last packet. `strict`: a node delivers
    to its own endpoints only, by a table of its own (`restricted`).
    """

    protocol: Protocol
    port: int
    affinity_s: int | None
    closed: bool
    endpoints: tuple[Holder, ...]
    owners: maglev.Row
    members: tuple[Holder, ...]
    strict: bool = False
    spare: tuple[Holder, ...] = ()

    @property
    def by_client(self) -> bool:
        """Whether the port has session affinity."""
        return self.affinity_s is not None

    def owner(self, bucket: int) -> Holder:
        """The endpoint that a bucket belongs to."""
        return self.endpoints[self.owners[bucket]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An endpoint that no node may deliver to, and why."""

    endpoint: Endpoint
    why: Reason


@snapshot
class EipTable:
    """One EIP as every node forwards it.

    `inputs`, `nodes` (of its endpoints) and `judged` (those of them that are down, fallen or
    doubtful) are what it was made of, to see that nothing changed.
    """

    address: Address
    service: ObjectRef
    ports: tuple[PortTable, ...]
    refused: tuple[Refusal, ...]
    digest: int
    sources: tuple[Network, ...] = ()  # loadBalancerSourceRanges of the family; () lets all in
    inputs: object = field(default=None, repr=False, compare=False)
    nodes: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    judged: tuple[frozenset[str], ...] = field(default=(), repr=False, compare=False)


class Locator:
    """Which node an endpoint is on. A function of the nodes and of `endpoints.nodes` alone.

    by: "podCIDR", or "nodeName": a Pod is on the node that its endpoint names, and pod CIDRs mean
    nothing.
    """

    __slots__ = ("_addresses", "_cidrs", "_names", "_shifts", "by", "key")

    def __init__(self, nodes: Iterable[Node], by: LocatedBy = "podCIDR") -> None:
        self.by = by
        every = sorted(nodes, key=lambda node: node.name)
        self.key = by, tuple((node.name, node.addresses, node.pod_cidrs) for node in every)
        self._names = frozenset(node.name for node in every)
        # By numbers: to hash an address takes longer than all the rest of `locate`.
        self._addresses = {
            (a.version, int(a)): node.name for node in reversed(every) for a in node.addresses
        }
        self._cidrs: dict[tuple[int, int, int], str] = {}
        shifts = set()
        for node in reversed(every):
            for cidr in node.pod_cidrs if by == "podCIDR" else ():
                shift = cidr.max_prefixlen - cidr.prefixlen
                self._cidrs[cidr.version, shift, int(cidr.network_address) >> shift] = node.name
                shifts.add((cidr.version, shift))
        self._shifts = sorted(shifts)  # the longest prefix of a family first

    def locate(self, endpoint: Endpoint) -> str | None:
        """The node's name; None if the address is on no node."""
        version, number = endpoint.address.version, int(endpoint.address)
        if not _deliverable(version, number):
            return None
        if self.by == "nodeName" and endpoint.pod and endpoint.node in self._names:
            return endpoint.node
        if name := self._addresses.get((version, number)):
            return name
        for family, shift in self._shifts:
            if family == version:
                name = self._cidrs.get((version, shift, number >> shift))
                if name:
                    return name
        if not self._cidrs and endpoint.pod and endpoint.node in self._names:
            return endpoint.node
        return None


def deliverable(address: Address) -> bool:
    """Whether packets can be sent to it at all: not loopback, multicast or unspecified."""
    return _deliverable(address.version, int(address))


def _deliverable(version: int, number: int) -> bool:
    if version == 4:
        return 0 < number >> 24 != 127 and number >> 28 != 0xE
    return number > 1 and number >> 120 != 0xFF


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """All that a table is made of. down: nodes whose endpoints take no new flows.

    fallen: those of `down` that fell so lately that they may be back in a moment: their endpoints'
    established flows are still handed to them, and not reset by another endpoint. doubtful: nodes
    whose Pods' readiness is not known.
    """

    eips: Mapping[Address, Eip]
    services: Mapping[ObjectRef, Service]
    endpoints: Mapping[ObjectRef, ServiceEndpoints]
    locator: Locator
    down: frozenset[str] = frozenset()
    options: ForwardingOptions = DEFAULTS
    fallen: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()

    @property
    def common(self) -> object:
        """What every EIP depends on; compared to see that nothing changed."""
        return self.locator.key, self.options.local_delivery, self.options.external

    @property
    def judged(self) -> tuple[frozenset[str], ...]:
        """What EIPs depend on that have endpoints on these nodes."""
        return self.down, self.fallen, self.doubtful


_NO_SOURCES: Final = Sources(PMap(), PMap(), PMap(), Locator(()))


@dataclass(frozen=True, slots=True)
class Table:
    """All EIPs, and the sum of their digests modulo 2^64.

    `sources` is what it was made of, `owned` which EIPs a Service has in there: for `revise`.
    """

    eips: Mapping[Address, EipTable]
    digest: int
    sources: Sources = field(default=_NO_SOURCES, repr=False, compare=False)
    owned: PMap[ObjectRef, frozenset[Address]] = field(
        default_factory=PMap, repr=False, compare=False
    )


EMPTY: Final = Table(PMap(), 0)


def build(
    eips: Iterable[Eip],
    services: Mapping[ObjectRef, Service],
    endpoints: Mapping[ObjectRef, ServiceEndpoints],
    locator: Locator,
    down: frozenset[str] = frozenset(),
    previous: Table = EMPTY,
    options: ForwardingOptions = DEFAULTS,
    fallen: frozenset[str] = frozenset(),
    doubtful: frozenset[str] = frozenset(),
) -> Table:
    """Return the tables of all EIPs that are to be forwarded: `revise` for plain collections."""
    known = {eip.address: eip for eip in eips}
    sources = Sources(known, services, endpoints, locator, down, options, fallen, doubtful)
    return revise(previous, sources)


def revise(previous: Table, sources: Sources) -> Table:
    """Return the table that `sources` make, whatever `previous` is.

    What did not change since `previous` is taken over. With persistent maps that are versions of
    those before, the cost is that of what changed; a change of nodes or of `down` costs a look at
    every EIP.
    """
    sources = replace(
        sources,
        eips=persistent(sources.eips),
        services=persistent(sources.services),
        endpoints=persistent(sources.endpoints),
    )
    touched = changed(previous.sources.eips, sources.eips)
    owned = _owned(previous, sources, touched)
    old = previous.sources
    if old.common != sources.common:
        touched = set(sources.eips) | set(previous.eips)
    else:
        refs = changed(old.services, sources.services) | changed(old.endpoints, sources.endpoints)
        touched = touched.union(*(owned.get(ref, ()) for ref in refs))
        pairs = zip(old.judged, sources.judged, strict=True)
        differ = frozenset[str]().union(*(was ^ now for was, now in pairs))
        if differ:
            every = previous.eips.items()
            touched |= {a for a, entry in every if not differ.isdisjoint(entry.nodes)}
    fresh: dict[Address, EipTable] = {}
    gone: list[Address] = []
    digest = previous.digest
    for address in touched:
        was, now = previous.eips.get(address), _entry(address, sources, previous)
        digest += (now.digest if now else 0) - (was.digest if was else 0)
        if now is None:
            gone.append(address)
        elif now is not was:
            fresh[address] = now
    tables = persistent(previous.eips).updated(fresh, gone)
    return Table(tables, digest % _WORD, sources, owned)


def _owned(
    previous: Table, sources: Sources, touched: Iterable[Address]
) -> PMap[ObjectRef, frozenset[Address]]:
    """Which EIPs belong to which Service, after those `touched` have changed."""
    owners: dict[ObjectRef, set[Address]] = {}

    def of(ref: ObjectRef) -> set[Address]:
        if ref not in owners:
            owners[ref] = set(previous.owned.get(ref, ()))
        return owners[ref]

    for address in touched:
        was, now = previous.sources.eips.get(address), sources.eips.get(address)
        if was is not None:
            for ref in was.members:
                of(ref).discard(address)
        if now is not None:
            for ref in now.members:
                of(ref).add(address)
    put = {ref: frozenset(mine) for ref, mine in owners.items() if mine}
    return previous.owned.updated(put, owners.keys() - put.keys())


def _entry(address: Address, sources: Sources, previous: Table) -> EipTable | None:
    eip = sources.eips.get(address)
    if eip is None or not eip.forwarding:
        return None
    members = tuple(
        (ref, sources.services.get(ref), sources.endpoints.get(ref)) for ref in eip.members
    )
    inputs = (members, sources.common)
    old = previous.eips.get(address)
    if (
        old is not None
        and old.inputs == inputs
        and old.judged == tuple(names & old.nodes for names in sources.judged)
    ):
        return old
    return _eip(eip, members, sources, inputs, old)


def _eip(
    eip: Eip,
    members: tuple[tuple[ObjectRef, Service | None, ServiceEndpoints | None], ...],
    sources: Sources,
    inputs: object,
    old: EipTable | None,
) -> EipTable:
    ports: list[PortTable] = []
    named: list[_Names] = []
    refused: list[Refusal] = []
    nodes: set[str] = set()
    behind = {ref: known.ports for ref, _, known in members if known is not None}
    shown = served([service for _, service, _ in members if service is not None])
    before = {(p.protocol, p.port): p for p in old.ports} if old else {}
    for service, own in shown:
        by_port = {(p.name, p.protocol): p.endpoints for p in behind.get(service.ref, ())}
        for port in sorted(own):
            given = by_port.get((port.name, port.protocol), ())
            located, odd = _located(eip.address, given, sources)
            refused += odd
            nodes.update(entry.holder.node for entry in located)
            known = before.get((port.protocol, port.port))
            made = _port(port, _way(service, sources.options), located, sources, known)
            if made is not None:
                ports.append(made[0])
                named.append(made[1])
    allowed = _sources(eip.address, shown[0][0] if shown else None)
    return EipTable(
        eip.address,
        eip.owner,
        tuple(ports),
        tuple(refused),
        _digest(eip.address, allowed, zip(ports, named, strict=True)),
        allowed,
        inputs,
        frozenset(nodes),
        tuple(names & nodes for names in sources.judged),
    )


def _way(service: Service, options: ForwardingOptions) -> tuple[int | None, bool]:
    """A Service's session affinity, and whether nodes keep to their own endpoints."""
    local = service.policy is TrafficPolicy.LOCAL and options.local_delivery == "strict"
    return service.affinity_s, local


def _sources(eip: Address, service: Service | None) -> tuple[Network, ...]:
    """The networks that may reach the EIP; () for everyone. Of the other family alone: nobody."""
    given = service.source_ranges if service else ()
    if not given:
        return ()
    if eip.version == 4:
        own = tuple(collapse_addresses(n for n in given if isinstance(n, IPv4Network)))
        return own or (IPv4Network("255.255.255.255/32"),)
    return tuple(collapse_addresses(n for n in given if isinstance(n, IPv6Network))) or (
        IPv6Network("::/128"),
    )


class _Located(NamedTuple):
    name: str  # the holder's identity: making it takes longer than most of what is done with it
    holder: Holder
    endpoint: Endpoint

    @property
    def node(self) -> str:
        """Where it is."""
        return self.holder.node


_Names = tuple[str, ...]  # of a port's endpoints


def _located(
    eip: Address, given: Iterable[Endpoint], sources: Sources
) -> tuple[list[_Located], list[Refusal]]:
    """Endpoints with the node that they are really on, one per address and port; and the rest.

    In the order of their identities.
    """
    found: dict[str, _Located] = {}
    refused: list[Refusal] = []
    version, locate = eip.version, sources.locator.locate
    for endpoint in given:
        if endpoint.address.version != version:
            continue
        node = locate(endpoint) or _elsewhere(endpoint, sources)
        if node is None:
            refused.append(Refusal(endpoint, Reason.ENDPOINT_ON_NO_NODE))
            continue
        holder = Holder(endpoint.address, endpoint.port, node)
        name = identity(holder)
        if name not in found or (endpoint.ready and not found[name].endpoint.ready):
            found[name] = _Located(name, holder, endpoint)
    return [found[name] for name in sorted(found)], refused


def _elsewhere(endpoint: Endpoint, sources: Sources) -> str | None:
    """Where an endpoint on no node is delivered. One of a Pod belongs to a node we do not know."""
    if sources.options.external != "masquerade" or endpoint.pod:
        return None
    return EVERYWHERE if deliverable(endpoint.address) else None


def _port(
    port: ServicePort,
    way: tuple[int | None, bool],
    located: list[_Located],
    sources: Sources,
    old: PortTable | None,
) -> tuple[PortTable, _Names] | None:
    """The port's table, the old one if it says the same, and the identities of its endpoints."""
    down, gone = sources.down, sources.down - sources.fallen
    alive = [entry for entry in located if entry.holder.node not in down]
    chosen = taking(alive, sources.doubtful)
    # With nowhere to send new flows, established ones stay where they are, on down nodes too:
    # should the judgement be wrong, nothing was lost by it.
    entries = chosen or alive or located
    if not entries:
        return None
    affinity_s, strict = way
    holders = tuple(entry.holder for entry in entries)
    members = tuple(entry.holder for entry in located if entry.holder.node not in gone)
    members = holders if members == holders else members
    able = (entry for entry in alive if entry.endpoint.serving or not entry.endpoint.terminating)
    spare = () if members is holders else tuple(entry.holder for entry in able)
    names = tuple([entry.name for entry in entries])
    if old is not None and old.endpoints == holders:
        holders, owners = old.endpoints, old.owners
    else:
        owners = maglev.table(names)
    table = PortTable(
        port.protocol, port.port, affinity_s, not chosen, holders, owners, members, strict, spare
    )
    return old if old is not None and table == old else table, names


def restricted(table: PortTable, node: str) -> PortTable:
    """A strict port's table on one node: its own endpoints alone."""
    groups = (table.endpoints, table.members, table.spare)
    own, members, spare = (tuple(holder for holder in group if holder.at(node)) for group in groups)
    owners = maglev.table([identity(holder) for holder in own])
    return replace(table, endpoints=own, owners=owners, members=members, spare=spare)


def identity(holder: Holder) -> str:
    """What an endpoint is hashed by: its address and port, never its name or its node."""
    address = holder.address
    if address.version == 6:
        return f"{address}|{holder.port}"
    number = int(address)  # str() takes four times as long, for a hundred thousand
    return f"{_upper(number >> 8)}.{number & 255}|{holder.port}"


@lru_cache(maxsize=4096)
def _upper(number: int) -> str:
    """The first three bytes of an IPv4 address, as text."""
    return f"{number >> 16}.{number >> 8 & 255}.{number & 255}"


def _digest(
    address: Address, sources: tuple[Network, ...], ports: Iterable[tuple[PortTable, _Names]]
) -> int:
    total = blake2b(f"{maglev.FORMAT}|{maglev.SEED}|{address}".encode(), digest_size=8)
    total.update(",".join(map(str, sources)).encode())
    for table, names in ports:
        lines = [f"\n{table.protocol}|{table.port}"]
        lines.append(f"{table.by_client}|{table.closed}|{table.strict}")
        lines += [f"{name}|{e.node}" for name, e in zip(names, table.endpoints, strict=True)]
        total.update("\n".join(lines).encode())
        owners = table.owners
        total.update(owners if isinstance(owners, bytes) else repr(owners).encode())
    return int.from_bytes(total.digest(), "big")
