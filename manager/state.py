"""`/v1/state`: what this manager knows, gathered from its parts (lbctl.core.state).

Rules: a snapshot, nothing is decided here. Services that are not of type LoadBalancer are left out.
What only the leader knows, another replica takes from the condition that the leader wrote.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lbctl.core import state
from lbctl.core.classes import class_rule, not_ours
from lbctl.core.health import Health
from lbctl.core.model import Address, Eip, NodeState, NodeView, ObjectRef, Phase, Service, Session
from lbctl.core.reasons import Reason
from lbctl.core.routes import EipSelection, withheld
from manager.allocating import Allocating
from manager.announcing import Announcing
from manager.configuration import Configuration
from manager.inputs import Inputs
from manager.neighbours import Neighbours

Judgement = tuple[Health, NodeView, float | None]


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the state comes from."""

    manager: str
    boot_s: float
    inputs: Inputs
    configuration: Configuration
    allocating: Allocating
    announcing: Announcing
    neighbours: Neighbours


def build(
    parts: Parts,
    leader: bool,
    holder: str,
    sessions: tuple[Session, ...],
    nodes: tuple[Judgement, ...],
) -> state.ManagerState:
    """Everything, now."""
    eips = sorted(
        parts.inputs.eips.cache.items.values(), key=lambda e: (e.address.version, int(e.address))
    )
    owned: dict[ObjectRef, list[Eip]] = {}
    for eip in eips:
        for ref in eip.members:
            owned.setdefault(ref, []).append(eip)
    return state.ManagerState(
        manager=parts.manager,
        leader=leader,
        boot_s=parts.boot_s,
        config=_config(parts.configuration),
        pools=_pools(parts.configuration, eips, parts.allocating.free()),
        eips=tuple(_eip(parts, eip) for eip in eips),
        services=tuple(
            _service(parts, service, owned.get(ref, []))
            for ref, service in sorted(parts.inputs.services.cache.items.items())
            if service.is_load_balancer
        ),
        sessions=_sessions(parts, sessions),
        nodes=_nodes(parts, nodes),
        now_s=time.time(),
        holder=holder,
        snapshot_age_s=parts.inputs.snapshot_age_s(),
    )


def _config(configuration: Configuration) -> state.ConfigState:
    current = configuration.current
    return state.ConfigState(
        hash=current.hash if current else "",
        generation=current.generation if current else 0,
        stale=configuration.stale,
        errors=configuration.problems,
    )


def _pools(
    configuration: Configuration, eips: list[Eip], free: Mapping[str, Mapping[int, int]]
) -> tuple[state.PoolState, ...]:
    used = Counter(eip.pool for eip in eips)
    pools = configuration.current.config.pools if configuration.current else ()
    left = {name: sum(families.values()) for name, families in free.items()}
    return tuple(
        state.PoolState(pool.name, pool.size, used[pool.name], left.get(pool.name))
        for pool in sorted(pools, key=lambda pool: pool.name)
    )


def _eip(parts: Parts, eip: Eip) -> state.EipState:
    selection = parts.announcing.selections.get(eip.address)
    return state.EipState(
        address=eip.address,
        pool=eip.pool,
        owner=eip.owner,
        phase=eip.phase,
        forwarding=eip.forwarding,
        hops=_hops(selection) if selection is not None else (),
        detail=parts.allocating.release(eip.address) or "",
        reason=selection.reason if selection is not None else None,
        sharers=eip.members[1:],
    )


def _hops(selection: EipSelection) -> tuple[state.HopState, ...]:
    announced: Mapping[str, Address] = {path.node: path.next_hop for path in selection.paths}
    return tuple(
        state.HopState(node, reason, announced.get(node))
        for node, reason in sorted(selection.reasons.items())
    )


def _service(parts: Parts, service: Service, eips: list[Eip]) -> state.ServiceState:
    decision = parts.allocating.decision(service.ref)
    if decision is not None:
        return state.ServiceState(
            service.ref, decision.reason, decision.sentence, decision.addresses
        )
    bound = tuple(eip.address for eip in eips if eip.phase is Phase.BOUND)
    current = parts.configuration.current
    why = not_ours(service, class_rule(current.config if current else None))
    if why is None and not bound:
        why = _written(service)
    return state.ServiceState(service.ref, why or Reason.RESTORED, "", bound)


def _written(service: Service) -> Reason:
    try:
        return Reason(service.condition[1]) if service.condition else Reason.WAITING_FOR_CONFIG
    except ValueError:
        return Reason.WAITING_FOR_CONFIG


def _sessions(parts: Parts, sessions: tuple[Session, ...]) -> tuple[state.SessionState, ...]:
    current = parts.configuration.current
    known = {session.peer: session for session in sessions}
    found = []
    for peer in sorted(current.config.bgp.peers if current else (), key=lambda p: p.name):
        lacks = parts.neighbours.missing.get(peer.name, "not spoken to yet")
        session = known.get(peer.name) or Session(peer.name, False, (), lacks)
        reason = Reason.SESSION_UP if session.up else Reason.SESSION_DOWN
        carried = tuple(version for version, _ in session.agreed)
        if session.up and not set(parts.announcing.families()).issubset(carried):
            reason = Reason.FAMILY_MISSING
        elif session.up and session.add_path is False:
            reason = Reason.ADD_PATH_MISSING
        found.append(
            state.SessionState(
                peer.name,
                peer.address,
                session.up,
                reason,
                session.add_path,
                session.detail,
                parts.announcing.sent(session),
                carried,
            )
        )
    return tuple(found)


def _nodes(parts: Parts, judged: tuple[Judgement, ...]) -> tuple[state.NodeStatus, ...]:
    """The judged ones, and those that are not probed because no agent is expected there."""
    found = {view.name: _node(health, view, age_s) for health, view, age_s in judged}
    for node in parts.inputs.nodes.cache.items.values():
        unknown = state.NodeStatus(node.name, NodeState.UNKNOWN, False, Reason.NODE_UNKNOWN)
        status = found.setdefault(node.name, unknown)
        if (wish := withheld(node)) is not None:
            found[node.name] = replace(status, reason=wish)
    return tuple(found[name] for name in sorted(found))


def _node(health: Health, view: NodeView, age_s: float | None) -> state.NodeStatus:
    return state.NodeStatus(
        name=view.name,
        state=view.state,
        held=view.held,
        reason=health.reason or (Reason.NODE_LAGS if view.lags else None),
        confirmed=len(view.confirmed),
        digest=f"{view.digest:016x}" if age_s is not None else "",
        answer_age_s=round(age_s, 3) if age_s is not None else None,
    )
