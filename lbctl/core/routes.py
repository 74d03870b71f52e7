"""Which nodes are announced as next hops of which EIP, and why (not).

Pure and incremental: `select` remembers, through `previous`, what did not change. Rules:
- Only Bound EIPs inside the accepted pools whose Service has something behind it
  (`lbctl.core.serving`) have paths. The
  pool check is made here on its own, whatever the allocator believes.
- A next hop is a node that is Up (or AgentSilent, or held by panic) and has confirmed the EIP, with
  an address of the EIP's family, neither excluded, out of service nor draining; with policy Local
  it has a ready endpoint, and says so itself.
- If nobody is left: nodes that flap or lag; after those, the node that became Suspect last. Down is
  the only state that takes the last next hop away.
- Of more than `max_paths` a stable subset by rendezvous hashing. `perManager`: each living manager
  announces another one of that ranking.
- With `nextHop: recursive` EIPs that the same nodes have confirmed share a virtual next hop, and
  the ranking is that of its address (`lbctl.core.virtual`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from heapq import nsmallest
from typing import NamedTuple, TypeAlias

from lbctl.core.config import Config
from lbctl.core.forwarding import Locator
from lbctl.core.health import AT_ONCE_S
from lbctl.core.model import (
    Address,
    Eip,
    Node,
    NodeState,
    NodeView,
    ObjectRef,
    Path,
    Phase,
    Service,
    ServiceEndpoints,
    TrafficPolicy,
    host_route,
)
from lbctl.core.reasons import Reason
from lbctl.core.serving import serving
from lbctl.core.virtual import VirtualHop, virtual_address


@dataclass(frozen=True, slots=True)
class EipSelection:
    """The paths of one EIP. `reason`: of the EIP as a whole; `reasons`: per node, sorted by name.

    A node whose path is announced in spite of something has that as its reason: AGENT_SILENT,
    HELD_BY_PANIC or LAST_NEXT_HOP. `hop`: what may be announced in place of the paths.
    """

    paths: frozenset[Path]
    reason: Reason
    reasons: Mapping[str, Reason]
    hop: VirtualHop | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Each EIP's part. `facts` is what it was made from, for the next time."""

    eips: Mapping[Address, EipSelection]
    facts: Mapping[Address, tuple[object, ...]] = field(default_factory=dict, repr=False)

    @property
    def paths(self) -> frozenset[Path]:
        """All paths."""
        return frozenset().union(*(selection.paths for selection in self.eips.values()))

    def reasons(self) -> dict[tuple[Address, str], Reason]:
        """Return the reason of every (EIP, node)."""
        return {
            (address, node): reason
            for address, selection in self.eips.items()
            for node, reason in selection.reasons.items()
        }


class PathIds:
    """Path ids that are never given to two: `path_id`, with a salt where two hash alike.

    make: the hash, as `path_id`.
    """

    def __init__(self, make: Callable[..., int] | None = None) -> None:
        self._make = make or path_id
        self._owners: dict[int, tuple[object, ...]] = {}
        self._ids: dict[tuple[object, ...], int] = {}

    def get(
        self,
        node: str,
        next_hop: Address,
        communities: tuple[str, ...] = (),
        med: int | None = None,
    ) -> int:
        """Return the id of (node, next hop, attributes), always the same."""
        owner = (node, next_hop, communities, med)
        known = self._ids.get(owner)
        if known is not None:
            return known
        salt = 0
        while True:
            number = self._make(node, next_hop, communities, med, salt)
            if self._owners.setdefault(number, owner) == owner:
                self._ids[owner] = number
                return number
            salt += 1


def path_id(
    node: str,
    next_hop: Address,
    communities: tuple[str, ...] = (),
    med: int | None = None,
    salt: int = 0,
) -> int:
    """Return the ADD-PATH identifier (RFC 7911: 32 bits) of a node and attribute set.

    Deterministic, so that all managers and all restarts agree; never 0, which peers without
    ADD-PATH stand for.
    """
    attributes = f"{node}|{next_hop}|{','.join(communities)}|{med}|{salt}"
    return int.from_bytes(blake2b(attributes.encode(), digest_size=4).digest(), "big") or 1


class _Tier(IntEnum):
    """How good a next hop is; the best tier that has a node is announced."""

    GOOD = 0
    DOUBTFUL = 1
    SUSPECT = 2
    NEVER = 3


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What holds for a node whatever the EIP. `reason` is that of announcing or not.

    hops: next hop and path id, for IPv4 and for IPv6.
    """

    tier: _Tier
    reason: Reason
    since_s: float
    hops: tuple[tuple[Address, int] | None, tuple[Address, int] | None]


@dataclass(frozen=True, slots=True)
class Rules:
    """What of the configuration and of the other managers concerns selection.

    managers: ids of the living managers, this one's included; they count for `perManager` only.
    """

    config: Config
    me: str = ""
    managers: tuple[str, ...] = ()


Evidence: TypeAlias = Callable[[Address], tuple[frozenset[str], frozenset[str]]]


def _asked(nodes: Iterable[str], views: Mapping[str, NodeView]) -> Evidence:
    known = [(name, views[name]) for name in nodes if name in views]
    return lambda address: (
        frozenset(n for n, v in known if address in v.confirmed and address not in v.empty),
        frozenset(name for name, view in known if address in view.local_ready),
    )


def select(
    rules: Rules,
    eips: Iterable[Eip],
    services: Mapping[ObjectRef, Service],
    endpoints: Mapping[ObjectRef, ServiceEndpoints],
    nodes: Mapping[str, Node],
    views: Mapping[str, NodeView],
    ids: PathIds,
    previous: Selection | None = None,
    evidence: Evidence | None = None,
    locator: Locator | None = None,
) -> Selection:
    """Select the paths of all EIPs; one whose facts are those of `previous` costs a comparison.

    evidence: what the views say of each EIP, and locator: of these nodes, if somebody keeps them.
    """
    verdicts = {name: _verdict(nodes[name], views.get(name), ids) for name in sorted(nodes)}
    locator = locator or Locator(nodes.values())
    common = (rules, tuple(verdicts.items()), locator.key)
    if previous is not None and previous.facts:
        # Tuples compare by identity first: one comparison here makes all those below cheap.
        old = next(iter(previous.facts.values()))[0]
        common = old if old == common else common
    evidence = evidence if evidence is not None else _asked(verdicts, views)
    judge = _Judge(rules, verdicts, locator)
    selections: dict[Address, EipSelection] = {}
    facts: dict[Address, tuple[object, ...]] = {}
    for eip in sorted(eips, key=lambda eip: (eip.address.version, eip.address)):
        service, behind = standing(eip, services, endpoints)
        confirmed, local = evidence(eip.address)
        fact = (common, eip, service, behind, confirmed, local)
        facts[eip.address] = fact
        if previous is not None and previous.facts.get(eip.address) == fact:
            selections[eip.address] = previous.eips[eip.address]
            continue
        selections[eip.address] = _select(rules, eip, service, behind, (confirmed, local), judge)
    return Selection(selections, facts)


def standing(
    eip: Eip,
    services: Mapping[ObjectRef, Service],
    endpoints: Mapping[ObjectRef, ServiceEndpoints],
) -> tuple[Service | None, ServiceEndpoints | None]:
    """The Service that speaks for an EIP, and the endpoints behind all Services on it.

    Those that share one agree on what a route depends on (`lbctl.core.sharing`).
    """
    if not eip.sharers:
        return services.get(eip.owner), endpoints.get(eip.owner)
    every = [services[ref] for ref in eip.members if ref in services]
    here = [service for service in every if not service.deleting] or every
    behind = [endpoints[service.ref] for service in here if service.ref in endpoints]
    ports = tuple(port for known in behind for port in known.ports)
    return here[0] if here else None, ServiceEndpoints(eip.owner, ports)


def select_eip(
    rules: Rules,
    eip: Eip,
    service: Service | None,
    endpoints: ServiceEndpoints | None,
    nodes: Mapping[str, Node],
    views: Mapping[str, NodeView],
    ids: PathIds,
) -> EipSelection:
    """Select the paths of one EIP."""
    services = {eip.owner: service} if service else {}
    behind = {eip.owner: endpoints} if endpoints else {}
    return select(rules, (eip,), services, behind, nodes, views, ids).eips[eip.address]


class _Judged(NamedTuple):
    """Whom EIPs with the same evidence go through, before the ranking; why the others not.

    hop: their virtual next hop, if there is one.
    """

    chosen: tuple[str, ...]
    reasons: Mapping[str, Reason]
    hop: VirtualHop | None


class _Judge:
    """The nodes in view of one EIP after another; what is alike for many is worked out once."""

    def __init__(self, rules: Rules, verdicts: Mapping[str, _Verdict], locator: Locator) -> None:
        self.rules = rules
        self.verdicts = verdicts
        self.locator = locator
        self._known: dict[object, _Judged] = {}

    def __call__(
        self,
        version: int,
        confirmed: frozenset[str],
        only: frozenset[str] | None,
    ) -> _Judged:
        """confirmed: the nodes that have endpoints for it; only: with policy Local.

        A table without endpoints refuses new connections: it is not enough that the manager knows
        some.
        """
        key = version, confirmed, only
        judged = self._known.get(key)
        if judged is None:
            judged = self._known[key] = self._judge(version, confirmed, only)
        return judged

    def _judge(
        self, version: int, confirmed: frozenset[str], only: frozenset[str] | None
    ) -> _Judged:
        reasons: dict[str, Reason] = {}
        tiers: dict[_Tier, list[str]] = {tier: [] for tier in _Tier}
        for name, verdict in self.verdicts.items():
            tier, reasons[name] = verdict.tier, verdict.reason
            obstacle = _obstacle(name, version, verdict, confirmed, only)
            if obstacle is None:
                tiers[tier].append(name)
            elif tier not in (_Tier.NEVER, _Tier.SUSPECT):
                reasons[name] = obstacle
        group = frozenset(name for names in tiers.values() for name in names)
        chosen = tuple(_chosen(tiers, self.verdicts, reasons))
        return _Judged(chosen, reasons, self._hop(version, group, chosen))

    def _hop(self, version: int, group: frozenset[str], chosen: Sequence[str]) -> VirtualHop | None:
        announce = self.rules.config.announce
        ranges = announce.virtual_next_hops if announce.next_hop == "recursive" else ()
        address = virtual_address(ranges, version, group)
        if address is None:
            return None
        keep = _ranked(self.rules, address, chosen)
        return VirtualHop(address, group, _paths(address, keep, self.verdicts))


class _Beyond(Mapping[str, Reason]):
    """The reasons of an EIP that has more nodes than paths: those of all but the left out."""

    def __init__(self, judged: _Judged, keep: Iterable[str]) -> None:
        self._reasons = judged.reasons
        self._left_out = frozenset(judged.chosen).difference(keep)

    def __getitem__(self, name: str) -> Reason:
        return Reason.OVER_MAX_PATHS if name in self._left_out else self._reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


def _select(
    rules: Rules,
    eip: Eip,
    service: Service | None,
    endpoints: ServiceEndpoints | None,
    evidence: tuple[frozenset[str], frozenset[str]],
    judge: _Judge,
) -> EipSelection:
    refusal = _refusal(rules.config, eip, service)
    if refusal is not None or service is None:
        return EipSelection(frozenset(), refusal or Reason.NO_ENDPOINTS, {})
    external = rules.config.endpoints.external
    alone = None if eip.sharers else service
    behind = serving(alone, endpoints, eip.address.version, judge.locator, external)
    if behind.reason is not None:
        return EipSelection(frozenset(), behind.reason, {})
    (confirmed, local), only = evidence, None
    if service.policy is TrafficPolicy.LOCAL:
        confirmed, only = confirmed & local, behind.nodes
    judged = judge(eip.address.version, confirmed, only)
    hop = judged.hop
    keep = _ranked(rules, hop.address if hop else eip.address, judged.chosen)
    reasons = judged.reasons if len(keep) == len(judged.chosen) else _Beyond(judged, keep)
    paths = _paths(eip.address, keep, judge.verdicts)
    return EipSelection(paths, Reason.ANNOUNCED if paths else Reason.NO_NEXT_HOP, reasons, hop)


def _refusal(config: Config, eip: Eip, service: Service | None) -> Reason | None:
    if config.pool_of(eip.address) is None:
        return Reason.ADDRESS_OUTSIDE_POOLS
    if eip.phase is not Phase.BOUND or not eip.forwarding:
        return Reason.RELEASING
    return Reason.RELEASING if service is not None and service.deleting else None


def _verdict(node: Node, view: NodeView | None, ids: PathIds) -> _Verdict:
    def hop(version: int) -> tuple[Address, int] | None:
        found = (a for a in (*node.next_hops, *node.addresses) if a.version == version)
        address = next(found, None)
        return None if address is None else (address, ids.get(node.name, address))

    tier, reason = _tier(node, view or NodeView(node.name))
    since_s = view.since_s if view and tier is _Tier.SUSPECT else 0.0
    return _Verdict(tier, reason, since_s, (hop(4), hop(6)))


def _tier(node: Node, view: NodeView) -> tuple[_Tier, Reason]:
    if node.excluded:
        return _Tier.NEVER, Reason.NODE_EXCLUDED
    if node.out_of_service:
        return _Tier.NEVER, Reason.NODE_OUT_OF_SERVICE
    if node.draining or node.deleting:
        return _Tier.NEVER, Reason.NODE_DRAINING
    match view.state:
        case NodeState.UNKNOWN:
            return _Tier.NEVER, Reason.NODE_UNKNOWN
        case NodeState.DOWN:
            return _Tier.NEVER, Reason.NODE_DOWN if node.ready else Reason.NODE_NOT_READY
        case NodeState.SUSPECT if not view.held:
            return _Tier.SUSPECT, Reason.NODE_SUSPECT
    if not view.stable:
        return _Tier.DOUBTFUL, Reason.NODE_FLAPPING
    if view.lags:
        return _Tier.DOUBTFUL, Reason.NODE_LAGS
    if view.state is NodeState.SUSPECT:
        return _Tier.GOOD, Reason.HELD_BY_PANIC
    silent = view.state is NodeState.AGENT_SILENT
    return _Tier.GOOD, Reason.AGENT_SILENT if silent else Reason.ANNOUNCED


def _obstacle(
    name: str,
    version: int,
    verdict: _Verdict,
    confirmed: frozenset[str],
    only: frozenset[str] | None,
) -> Reason | None:
    """Why such an EIP in particular does not go through the node. only: with policy Local."""
    if verdict.hops[version == 6] is None:
        return Reason.NODE_NO_ADDRESS
    if only is not None and name not in only:
        return Reason.NO_LOCAL_ENDPOINT
    if name not in confirmed:
        return Reason.NOT_CONFIRMED
    return None


def _chosen(
    tiers: Mapping[_Tier, list[str]],
    verdicts: Mapping[str, _Verdict],
    reasons: dict[str, Reason],
) -> list[str]:
    """The best tier that has nodes. Of the Suspects, those that fell last stay."""
    if tiers[_Tier.GOOD]:
        return tiers[_Tier.GOOD]
    chosen = tiers[_Tier.DOUBTFUL]
    if not chosen and tiers[_Tier.SUSPECT]:
        last_s = max(verdicts[name].since_s for name in tiers[_Tier.SUSPECT])
        chosen = [n for n in tiers[_Tier.SUSPECT] if verdicts[n].since_s > last_s - AT_ONCE_S]
    reasons.update(dict.fromkeys(chosen, Reason.LAST_NEXT_HOP))
    return chosen


def _ranked(rules: Rules, eip: Address, names: Sequence[str]) -> Sequence[str]:
    announce = rules.config.announce
    if announce.paths == "addPath" and len(names) <= announce.max_paths:
        return names
    ranking = ranked(eip, names, announce.max_paths)
    if announce.paths == "addPath" or not ranking:
        return ranking
    managers = sorted({*rules.managers, rules.me})
    return [ranking[managers.index(rules.me) % len(ranking)]]


def ranked(eip: Address, names: Iterable[str], count: int) -> list[str]:
    """The first nodes of an EIP's rendezvous ranking (Thaler and Ravishankar, 1998): few EIPs have
    others when a node comes or goes.
    """
    start = blake2b(f"{eip}|".encode(), digest_size=8)

    def score(name: str) -> tuple[bytes, str]:
        own = start.copy()
        own.update(name.encode())
        return own.digest(), name

    return nsmallest(count, names, key=score)


def _paths(eip: Address, names: Iterable[str], verdicts: Mapping[str, _Verdict]) -> frozenset[Path]:
    prefix = host_route(eip)
    hops = ((name, verdicts[name].hops[eip.version == 6]) for name in names)
    return frozenset(Path(prefix, hop[0], hop[1], name) for name, hop in hops if hop is not None)
