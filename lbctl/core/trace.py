"""Where a packet for an EIP goes, and by which rule: computed from what every node computes from.

Rules: `judge` says what the table that all nodes share makes of a new flow's first packet, or a
node's own where it has one (`localDelivery: strict`); `trace` adds what each node does with it, and
which switches may choose that node. An established flow stays where it is, and for 30 s after a
change of endpoints a new one of UDP may go to its bucket's former owner; with session affinity it
is a new client's, for one that is pinned keeps its pod. Nothing is asked of the
kernel: where an agent's digest differs from the one computed here, its node is marked, for it may
do otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from lbctl.core import packet as hashing
from lbctl.core.config import Config
from lbctl.core.forwarding import EVERYWHERE, PortTable, Table, restricted
from lbctl.core.model import (
    Address,
    Eip,
    Node,
    NodeState,
    ObjectRef,
    Protocol,
    ServiceEndpoints,
    Steering,
)
from lbctl.core.reasons import Reason
from lbctl.core.sharing import served
from lbctl.core.state import EipState, HopState, ManagerState, SessionState

_GONE: Final = (NodeState.SUSPECT, NodeState.DOWN)


class Action(StrEnum):
    """What a node does with the packet when it comes in there."""

    DELIVERS = "delivers"
    STEERS = "steers"
    REFUSES = "refuses"  # TCP: a RST, UDP: port unreachable
    DROPS = "drops"
    LEAVES = "leaves"  # no address of ours: the node's own rules decide


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a flow. `source` is the client's port."""

    eip: Address
    port: int
    client: Address
    source: int
    protocol: Protocol = Protocol.TCP


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a table makes of it. Without an endpoint nobody gets it, for `reason`; but with
    OWN_ENDPOINTS each node's own table has another answer.

    buckets: size of the port's table, 0 without one. by_client: the bucket is the client's
    address's alone. node: of the endpoint, EVERYWHERE if it is on none. pod: "" if it is none.
    """

    reason: Reason
    action: Action
    service: ObjectRef | None = None
    buckets: int = 0
    bucket: int = 0
    by_client: bool = False
    endpoint: Address | None = None
    port: int = 0
    node: str = ""
    pod: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """How one manager judges a node, and why it announces it or not (None: it does not say)."""

    manager: str
    state: NodeState
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Ingress:
    """One node that the packet may come in by.

    verdict: of its own table. to, via: the node that it steers to and that one's address.
    switches: those that may choose it. digest: of its table, "" if no manager knows; differs: from
    the one computed.
    """

    node: str
    verdict: Verdict
    action: Action
    to: str = ""
    via: Address | None = None
    switches: tuple[str, ...] = ()
    judged: tuple[Judged, ...] = ()
    digest: str = ""
    differs: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """What a trace is computed from. agents: the nodes that have one; None: not known."""

    config: Config
    table: Table
    nodes: tuple[Node, ...]
    managers: tuple[ManagerState, ...]
    agents: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """The whole answer. `steering` is the configured one. `digest` is what a table should have."""

    packet: Packet
    verdict: Verdict
    ingress: tuple[Ingress, ...]
    steering: Steering
    digest: str

    @property
    def arrives(self) -> bool:
        """Whether it is delivered, by whichever switch it comes."""
        arriving = (Action.DELIVERS, Action.STEERS)
        return any(one.switches and one.action in arriving for one in self.ingress)


def trace(packet: Packet, scene: Scene) -> Trace:
    """Say where a new flow's first packet goes."""
    verdict = judge(packet, scene.config, scene.table)
    digest = f"{scene.table.digest:016x}"
    addresses = {node.name: _address(node, packet.eip.version) for node in scene.nodes}
    ingress = []
    for name in sorted(addresses if scene.agents is None else addresses.keys() & scene.agents):
        own = judge(packet, scene.config, scene.table, name)
        action, to = _does(own, name, addresses)
        known = _digest(scene.managers, name)
        ingress.append(
            Ingress(
                name,
                own,
                action,
                to,
                addresses.get(to),
                _switches(packet.eip, name, scene.managers),
                _judged(packet.eip, name, scene.managers),
                known,
                known not in ("", digest),
            )
        )
    steering = scene.config.forwarding.steering
    return Trace(packet, verdict, tuple(ingress), steering, digest)


def judge(packet: Packet, config: Config, table: Table, node: str = "") -> Verdict:
    """What the table that all nodes share makes of it, or the one of a node."""
    if config.pool_of(packet.eip) is None:
        return Verdict(Reason.ADDRESS_OUTSIDE_POOLS, Action.LEAVES)
    eip = table.sources.eips.get(packet.eip)
    if eip is None:
        return Verdict(Reason.NOT_AN_EIP, Action.REFUSES)
    entry = table.eips.get(packet.eip)
    if entry is None:
        return Verdict(Reason.RELEASING, Action.REFUSES, eip.owner)
    if entry.sources and not any(packet.client in network for network in entry.sources):
        return Verdict(Reason.SOURCE_REFUSED, Action.DROPS, eip.owner)
    wanted = (packet.protocol, packet.port)
    port = next((p for p in entry.ports if (p.protocol, p.port) == wanted), None)
    service = _whose(eip, wanted, table)
    if service is None:
        return Verdict(Reason.NO_SUCH_PORT, Action.REFUSES, eip.owner)
    if port is None:
        return Verdict(Reason.NO_ENDPOINTS, Action.REFUSES, service)
    if port.closed:
        return Verdict(Reason.NO_NEW_FLOWS, Action.REFUSES, service, len(port.owners))
    if port.strict:
        if not node:
            return Verdict(Reason.OWN_ENDPOINTS, Action.DELIVERS, service)
        port = restricted(port, node)
        if not port.owners:
            return Verdict(Reason.NO_LOCAL_ENDPOINT, Action.DROPS, service)
    return _delivered(packet, service, port, table.sources.endpoints.get(service))


def _whose(eip: Eip, wanted: tuple[Protocol, int], table: Table) -> ObjectRef | None:
    """Which of the Services on the address has the port there."""
    known = (table.sources.services.get(ref) for ref in eip.members)
    shown = served([service for service in known if service is not None])
    ports = ((service.ref, (p.protocol, p.port)) for service, own in shown for p in own)
    return next((ref for ref, port in ports if port == wanted), None)


def _delivered(
    packet: Packet, service: ObjectRef, port: PortTable, known: ServiceEndpoints | None
) -> Verdict:
    size = len(port.owners)
    bucket = hashing.bucket(packet.client, None if port.by_client else packet.source, size)
    owner = port.owner(bucket)
    return Verdict(
        Reason.DELIVERED,
        Action.DELIVERS,
        service,
        size,
        bucket,
        port.by_client,
        owner.address,
        owner.port,
        owner.node,
        _pod(known, owner.address, owner.port),
    )


def _pod(known: ServiceEndpoints | None, address: Address, port: int) -> str:
    every = (e for part in (known.ports if known else ()) for e in part.endpoints)
    return next((e.pod for e in every if (e.address, e.port) == (address, port)), "")


def _address(node: Node, version: int) -> Address | None:
    return next((a for a in node.addresses if a.version == version), None)


def _does(verdict: Verdict, node: str, addresses: dict[str, Address | None]) -> tuple[Action, str]:
    if verdict.endpoint is None or verdict.node in (node, EVERYWHERE):
        return verdict.action, ""
    if addresses.get(verdict.node) is None:
        return Action.DROPS, ""
    return Action.STEERS, verdict.node


def _digest(managers: Iterable[ManagerState], name: str) -> str:
    """Of the node's table, as the manager that heard it last has it."""
    heard = [
        (node.answer_age_s, node.digest)
        for state in managers
        for node in state.nodes
        if node.name == name and node.answer_age_s is not None
    ]
    return min(heard)[1] if heard else ""


def _seen(state: ManagerState, eip: Address) -> EipState | None:
    return next((one for one in state.eips if one.address == eip), None)


def _hop(seen: EipState | None, node: str) -> HopState | None:
    return next((hop for hop in seen.hops if hop.node == node), None) if seen else None


def _judged(eip: Address, name: str, managers: Iterable[ManagerState]) -> tuple[Judged, ...]:
    found = []
    for state in managers:
        node = next((one for one in state.nodes if one.name == name), None)
        seen = _seen(state, eip)
        hop = _hop(seen, name)
        reason = hop.reason if hop else (seen.reason if seen else None)
        judged = node.state if node else NodeState.UNKNOWN
        found.append(Judged(state.manager, judged, reason))
    return tuple(found)


def _switches(eip: Address, name: str, managers: Iterable[ManagerState]) -> tuple[str, ...]:
    """The switches that have the node as a next hop, of whichever manager."""
    found = set()
    for state in managers:
        seen = _seen(state, eip)
        hop = _hop(seen, name)
        if seen is None or hop is None or hop.next_hop is None:
            continue
        first = min(seen.next_hops, key=int)
        for session in state.sessions:
            if _carries(session, eip) and (session.add_path or hop.next_hop == first):
                found.add(session.peer)
    return tuple(sorted(found))


def _carries(session: SessionState, eip: Address) -> bool:
    return session.up and (not session.families or eip.version in session.families)


def down_set(managers: Iterable[ManagerState], nodes: Iterable[Node]) -> frozenset[str]:
    """The nodes whose endpoints take no new flows, as agents conclude it from these managers.

    `lbctl.core.downset` has the rule: all managers agree, and at most half of the nodes.
    """
    each = [
        frozenset(n.name for n in state.nodes if n.state in _GONE and not n.held)
        for state in managers
    ]
    names = frozenset(node.name for node in nodes)
    down = (frozenset.intersection(*each) if each else frozenset()) & names
    return down if 2 * len(down) <= len(names) else frozenset()
