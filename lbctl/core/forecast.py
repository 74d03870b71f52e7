"""What a configuration would do to the Services that there are, without doing it.

Rules: the allocator itself decides, on a copy of the state; so a forecast is what the leader would
do if it saw exactly this. `lbctl config diff` and `takeover: observe` tell it to people.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from lbctl.core.actions import CreateEip, LeaveEip, RebindEip, WriteStatus
from lbctl.core.allocator import Allocator
from lbctl.core.config import Config, shrink_conflicts
from lbctl.core.holdings import Decision
from lbctl.core.model import Address, Eip, Node, ObjectRef, Phase, Service
from lbctl.core.reasons import Reason
from lbctl.core.supply import Forbidden


class Outlook(StrEnum):
    """What becomes of a Service's addresses."""

    KEEPS = "keeps"
    GETS = "gets"
    MOVES = "moves"
    LOSES = "loses"
    WAITS = "waits"  # it has none and gets none
    STAYS = "stays"  # what it shows is not ours and is left as it is (`takeover: adopt`)


@dataclass(frozen=True, slots=True)
class Forecast:
    """One Service of ours. before: what its status shows. sentence: why, for people. refused: it
    does not get all that it asks for."""

    service: ObjectRef
    outlook: Outlook
    before: tuple[Address, ...]
    after: tuple[Address, ...]
    reason: Reason
    sentence: str
    refused: bool = False


_FOREIGN = {Reason.NOT_LOAD_BALANCER, Reason.OTHER_CLASS, Reason.RELEASING}


def cluster_addresses(nodes: Iterable[Node], config: Config) -> frozenset[Forbidden]:
    """What is never given out: the nodes' addresses and pod networks, the switches, ourselves.

    A leader keeps back the gateways of its own host as well.
    """
    found: set[Forbidden] = set()
    for node in nodes:
        found.update(node.addresses, node.next_hops, node.pod_cidrs)
    for peer in config.bgp.peers:
        found.add(peer.address)
        if peer.local_address is not None:
            found.add(peer.local_address)
    return frozenset(found)


def forecast(
    config: Config,
    services: Iterable[Service],
    eips: Iterable[Eip],
    forbidden: Iterable[Forbidden] = (),
    labels: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[Forecast, ...]:
    """Every Service that is ours or has an EIP, sorted. labels: of the namespaces."""
    known = {service.ref: service for service in services}
    owners = {ref for eip in eips if eip.phase is Phase.BOUND for ref in eip.members}
    allocator = Allocator(config, forbidden)
    for name, found_labels in (labels or {}).items():
        allocator.set_namespace(name, found_labels)
    for eip in eips:
        allocator.set_eip(eip)
    for service in known.values():
        allocator.set_service(service)
    _play(allocator, dict(known))
    found = []
    for ref, service in sorted(known.items()):
        decision = allocator.decision(ref)
        if decision is not None and (decision.reason not in _FOREIGN or ref in owners):
            found.append(_of(service, decision))
    return tuple(found)


def _play(allocator: Allocator, services: dict[ObjectRef, Service]) -> None:
    """Let every write succeed at once: who shares an address waits for the write before its own."""
    for _ in range(len(services) + 1):
        actions = allocator.plan()
        if not actions:
            return
        for action in actions:
            if isinstance(action, CreateEip | RebindEip | LeaveEip):
                allocator.set_eip(action.eip)
            elif isinstance(action, WriteStatus):
                shown = replace(services[action.service], ingress=action.addresses)
                services[action.service] = shown
                allocator.set_service(shown)


def _of(service: Service, decision: Decision) -> Forecast:
    before, after = service.ingress, decision.addresses
    if not before:
        outlook = Outlook.GETS if after else Outlook.WAITS
    elif decision.reason is Reason.NOT_ADOPTED:
        outlook = Outlook.STAYS
    elif set(before) <= set(after):
        outlook = Outlook.KEEPS
    else:
        outlook = Outlook.MOVES if after else Outlook.LOSES
    sentence, refused = decision.sentence.rstrip("."), bool(decision.said)
    return Forecast(service.ref, outlook, before, after, decision.reason, sentence, refused)


def told(one: Forecast) -> str:
    """A forecast as a sentence."""
    now = ", ".join(str(address) for address in one.before)
    then = ", ".join(str(address) for address in one.after)
    match one.outlook:
        case Outlook.KEEPS:
            return f"Service {one.service} would keep {then}"
        case Outlook.GETS:
            return f"Service {one.service} would get {then}"
        case Outlook.MOVES:
            return f"Service {one.service} would move from {now} to {then}"
        case Outlook.LOSES:
            return f"Service {one.service} would lose {now}: {one.sentence}"
        case Outlook.STAYS:
            return f"Service {one.service} would stay at {now}, which is not ours: {one.sentence}"
    return f"Service {one.service} would get no address: {one.sentence}"


def refusals(config: Config, forecasts: Iterable[Forecast], eips: Iterable[Eip]) -> tuple[str, ...]:
    """Why a configuration must not be applied: a sentence for each Service that it would rob.

    Not those whose pool says `release: true`.
    """
    held = tuple(eips)
    said = {
        conflict.service: f"{conflict}, which would fall out of the pools"
        for conflict in shrink_conflicts(held, config)
    }
    free = {ref for eip in held if config.lets_go(eip.pool) for ref in eip.members}
    for one in forecasts:
        if one.outlook is Outlook.LOSES and one.service not in free:
            lost = ", ".join(str(address) for address in one.before)
            said.setdefault(one.service, f"Service {one.service} would lose {lost}: {one.sentence}")
    return tuple(said[ref] for ref in sorted(said))


def changes(old: Config | None, new: Config) -> tuple[str, ...]:
    """What differs between two configurations besides the Services' addresses, in sentences."""
    if old is None:
        return ("there is no configuration in force yet",)
    told: list[str] = []
    for what, before, after in (
        ("pool", old.pools, new.pools),
        ("peer", old.bgp.peers, new.bgp.peers),
    ):
        was = {item.name: item for item in before}
        now = {item.name: item for item in after}
        told += [f"{what} {name} is new" for name in now if name not in was]
        told += [f"{what} {name} goes" for name in was if name not in now]
        told += [f"{what} {n} changes" for n in now if n in was and was[n] != now[n]]
    if old.bgp.asn != new.bgp.asn:
        told.append(
            f"our AS becomes {new.bgp.asn} instead of {old.bgp.asn}: every session restarts"
        )
    for name in type(new).model_fields:
        if name not in ("pools", "bgp") and getattr(old, name) != getattr(new, name):
            told.append(f"section {name} changes")
    return tuple(told)
