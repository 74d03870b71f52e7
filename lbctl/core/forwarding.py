"""What every node does with a packet for an EIP: the tables that all nodes share.

Rules:
- `build` is a function of the cluster alone, the same on every node; history and this node's
  part are `lbctl.core.nodeview`'s. The digest covers what `build` gives, so two nodes with the same
  digest steer every packet alike.
- A port whose endpoints all refuse new flows is `closed`: established flows keep their table, new
  ones are refused at once. A port without any endpoint is in no table: everything is refused.
- An endpoint's node is found by pod CIDRs and node addresses. nodeName counts only where *no* node
  has a pod CIDR (some CNIs allocate elsewhere), for Pods alone: anyone may write an EndpointSlice.
- `revise` makes the next table from the last: persistent maps (`lbctl.core.pmap`) tell what changed
  between two whole inputs, so that a change costs its own EIPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from lbctl.core import maglev
from lbctl.core.endpoints import eligible
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    Network,
    Node,
    ObjectRef,
    Protocol,
    Service,
    ServiceEndpoints,
)
from lbctl.core.pmap import PMap, changed, persistent
from lbctl.core.sharing import served

_WORD: Final = 1 << 64
_CARRIED: Final = (Protocol.TCP, Protocol.UDP)


@dataclass(frozen=True, slots=True)
class PortTable:
    """The buckets of one EIP:protocol:port.

    `owners[b]` indexes `endpoints`; `members` are all living endpoints, also those without a
    bucket, with address, port and node only. `by_client`: the hash takes the client's address
    alone (session affinity).
    """

    protocol: Protocol
    port: int
    by_client: bool
    closed: bool
    endpoints: tuple[Endpoint, ...]
    owners: tuple[int, ...]
    members: frozenset[Endpoint]

    def owner(self, bucket: int) -> Endpoint:
        """The endpoint that a bucket belongs to."""
        return self.endpoints[self.owners[bucket]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An endpoint that no node may deliver to, and why, in words."""

    endpoint: Endpoint
    why: str


@dataclass(frozen=True, slots=True)
class EipTable:
    """One EIP as every node forwards it.

    `inputs`, `nodes` (of its endpoints) and `down` (those of them) are what it was made of, to see
    that nothing changed.
    """

    address: Address
    service: ObjectRef
    ports: tuple[PortTable, ...]
    refused: tuple[Refusal, ...]
    digest: int
    sources: tuple[Network, ...] = ()  # loadBalancerSourceRanges of the family; () lets all in
    inputs: object = field(default=None, repr=False, compare=False)
    nodes: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    down: frozenset[str] = field(default=frozenset(), repr=False, compare=False)


class Locator:
    """Which node an endpoint's address is on. A function of the nodes alone."""

    __slots__ = ("_addresses", "_cidrs", "_lengths", "_names", "key")

    def __init__(self, nodes: Iterable[Node]) -> None:
        every = sorted(nodes, key=lambda node: node.name)
        self.key = tuple((node.name, node.addresses, node.pod_cidrs) for node in every)
        self._names = frozenset(node.name for node in every)
        self._addresses = {a: node.name for node in reversed(every) for a in node.addresses}
        cidrs = [(cidr, node.name) for node in reversed(every) for cidr in node.pod_cidrs]
        # By numbers: making a network of an address took most of a table's time.
        self._cidrs = {_place(c.network_address, c.prefixlen): name for c, name in cidrs}
        self._lengths = sorted({(c.version, c.prefixlen) for c, _ in cidrs}, reverse=True)

    def locate(self, endpoint: Endpoint) -> str | None:
        """The node's name; None if the address is on no node."""
        address = endpoint.address
        if address.is_loopback or address.is_multicast or address.is_unspecified:
            return None
        if name := self._addresses.get(address):
            return name
        for version, length in self._lengths:
            if version == address.version:
                name = self._cidrs.get(_place(address, length))
                if name:
                    return name
        if not self._cidrs and endpoint.pod and endpoint.node in self._names:
            return endpoint.node
        return None


def _place(address: Address, length: int) -> tuple[int, int, int]:
    return address.version, length, int(address) >> (address.max_prefixlen - length)


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """All that a table is made of. down: nodes whose endpoints take no new flows."""

    eips: Mapping[Address, Eip]
    services: Mapping[ObjectRef, Service]
    endpoints: Mapping[ObjectRef, ServiceEndpoints]
    locator: Locator
    down: frozenset[str] = frozenset()


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
) -> Table:
    """Return the tables of all EIPs that are to be forwarded: `revise` for plain collections."""
    known = {eip.address: eip for eip in eips}
    return revise(previous, Sources(known, services, endpoints, locator, down))


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
    if old.down != sources.down or old.locator.key != sources.locator.key:
        touched = set(sources.eips) | set(previous.eips)
    else:
        refs = changed(old.services, sources.services) | changed(old.endpoints, sources.endpoints)
        touched = touched.union(*(owned.get(ref, ()) for ref in refs))
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
    inputs = (members, sources.locator.key)
    old = previous.eips.get(address)
    if old is not None and old.down == sources.down & old.nodes and old.inputs == inputs:
        return old
    return _eip(eip, members, sources.locator, sources.down, inputs)


def _eip(
    eip: Eip,
    members: tuple[tuple[ObjectRef, Service | None, ServiceEndpoints | None], ...],
    locator: Locator,
    down: frozenset[str],
    inputs: object,
) -> EipTable:
    ports: list[PortTable] = []
    refused: list[Refusal] = []
    nodes: set[str] = set()
    behind = {ref: known.ports for ref, _, known in members if known is not None}
    shown = served([service for _, service, _ in members if service is not None])
    for service, own in shown:
        by_port = {(p.name, p.protocol): p.endpoints for p in behind.get(service.ref, ())}
        for port in sorted(own):
            if port.protocol not in _CARRIED:
                continue
            given = by_port.get((port.name, port.protocol), ())
            located, odd = _located(eip.address, given, locator)
            refused += odd
            nodes.update(endpoint.node for endpoint in located)
            by_client = service.affinity_s is not None
            table = _port(port.protocol, port.port, by_client, located, down)
            if table is not None:
                ports.append(table)
    sources = _sources(eip.address, shown[0][0] if shown else None)
    return EipTable(
        eip.address,
        eip.owner,
        tuple(ports),
        tuple(refused),
        _digest(eip.address, sources, ports),
        sources,
        inputs,
        frozenset(nodes),
        down & nodes,
    )


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


def _located(
    eip: Address, given: Iterable[Endpoint], locator: Locator
) -> tuple[list[Endpoint], list[Refusal]]:
    """Endpoints with the node that they are really on, one per address and port; and the rest."""
    found: dict[tuple[int, int], Endpoint] = {}
    refused: list[Refusal] = []
    for endpoint in sorted(
        (e for e in given if e.address.version == eip.version),
        key=lambda e: (int(e.address), e.port, not e.ready),
    ):
        node = locator.locate(endpoint)
        if node is None:
            refused.append(Refusal(endpoint, "its address is on no node"))
        elif (int(endpoint.address), endpoint.port) not in found:
            found[int(endpoint.address), endpoint.port] = replace(endpoint, node=node)
    return list(found.values()), refused


def _port(
    protocol: Protocol,
    port: int,
    by_client: bool,
    located: list[Endpoint],
    down: frozenset[str],
) -> PortTable | None:
    alive = tuple(e for e in located if e.node not in down)
    chosen = eligible(alive)
    closed = not chosen
    # With nowhere to send new flows, established ones stay where they are, on down nodes too:
    # should the judgement be wrong, nothing was lost by it.
    holders = chosen or alive or tuple(located)
    if not holders:
        return None
    by_identity = {identity(e): _bare(e) for e in holders}
    names = sorted(by_identity)
    index = {name: number for number, name in enumerate(names)}
    return PortTable(
        protocol,
        port,
        by_client,
        closed,
        tuple(by_identity[name] for name in names),
        tuple(index[name] for name in maglev.table(names)),
        frozenset(_bare(e) for e in alive),
    )


def _bare(endpoint: Endpoint) -> Endpoint:
    # A bucket's owner stays equal to itself however its conditions change.
    return Endpoint(endpoint.address, endpoint.port, endpoint.node)


def identity(endpoint: Endpoint) -> str:
    """What an endpoint is hashed by: its address and port, never its name or its node."""
    return f"{endpoint.address}|{endpoint.port}"


def _digest(address: Address, sources: tuple[Network, ...], ports: Iterable[PortTable]) -> int:
    total = blake2b(f"{maglev.FORMAT}|{maglev.SEED}|{address}".encode(), digest_size=8)
    total.update(",".join(map(str, sources)).encode())
    for table in ports:
        total.update(f"\n{table.protocol}|{table.port}|{table.by_client}|{table.closed}".encode())
        for endpoint in table.endpoints:
            total.update(f"\n{identity(endpoint)}|{endpoint.node}".encode())
        total.update(repr(table.owners).encode())
    return int.from_bytes(total.digest(), "big")
