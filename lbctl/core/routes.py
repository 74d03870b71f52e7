"""Which nodes are announced as next hops of which EIP, and why (not).

Pure. What is alike for many EIPs is worked out once, in `Verdicts`; what an EIP went through
before is repaired for the nodes that moved. Rules:
- Only Bound EIPs inside the accepted pools whose Service has something behind it
  (`lbctl.core.serving`) have paths. The pool check is made here on its own, whatever the
  allocator believes.
- A next hop is a node that is Up (or AgentSilent, or held by panic) and has confirmed the EIP, with
  an address of the EIP's family that a switch takes. It is neither excluded, out of service nor
  draining; with policy Local it has a ready endpoint, and says so itself.
- If nobody is left: nodes that flap or lag; after those, the node that became Suspect last. Down is
  the only state that takes the last next hop away.
- Of more than `max_paths` a stable subset by rendezvous hashing (`lbctl.core.ranking`).
  `perManager`: each living manager announces another one of that ranking.
- The path of this manager's own host is left to the other managers while one announces and the EIP
  has another path: a host that dies takes its manager along, and a switch keeps that one's routes
  for the hold time. Not with policy Local: there a route that changes hands may break connections.
- With `nextHop: recursive` EIPs that the same nodes have confirmed share a virtual next hop, and
  the ranking is that of its address (`lbctl.core.virtual`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import Final, NamedTuple

from lbctl.core.config import Config
from lbctl.core.confirmations import Confirmations
from lbctl.core.forwarding import Locator, deliverable
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
)
from lbctl.core.ranking import Ranking, ranked
from lbctl.core.reasons import Reason
from lbctl.core.serving import serving
from lbctl.core.virtual import VirtualHop, virtual_address

_MANY: Final = 256  # sets of nodes whose judgement is kept; usually all EIPs have the same few


@dataclass(frozen=True, slots=True)
class EipSelection:
    """The paths of one EIP. `reason`: of the EIP as a whole; `reasons`: per node, sorted by name.

    A node whose path is announced in spite of something has that as its reason: AGENT_SILENT,
    HELD_BY_PANIC or LAST_NEXT_HOP. `hop`: what may be announced in place of the paths. `case`,
    `ranked`, `ranking`: how it came to its paths, for the next time.
    """

    paths: frozenset[Path]
    reason: Reason
    reasons: Mapping[str, Reason]
    hop: VirtualHop | None = None
    case: Case | None = field(default=None, repr=False, compare=False)
    ranked: tuple[Path, ...] = field(default=(), repr=False)
    ranking: Ranking | None = field(default=None, repr=False, compare=False)


class Case(NamedTuple):
    """What selection makes of an EIP before it looks at how nodes are judged.

    of: all that this rests on. reason: why it has no path whoever is up. confirmed: the nodes that
    have endpoints for it; only: those that may have its path, with policy Local.
    """

    of: tuple[object, ...]
    reason: Reason | None = None
    confirmed: frozenset[str] = frozenset()
    only: frozenset[str] | None = None


class PathIds:
    """Paths whose ids are never given to two: `path_id`, with a salt where two hash alike.

    make: the hash, as `path_id`.
    """

    def __init__(self, make: Callable[..., int] | None = None) -> None:
        self._make = make or path_id
        self._owners: dict[int, tuple[object, ...]] = {}
        self._paths: dict[tuple[object, ...], Path] = {}

    def get(
        self,
        node: str,
        next_hop: Address,
        communities: tuple[str, ...] = (),
        med: int | None = None,
    ) -> Path:
        """Return the path of (node, next hop, attributes), always the same object."""
        owner = (node, next_hop, communities, med)
        known = self._paths.get(owner)
        if known is not None:
            return known
        salt = 0
        while True:
            number = self._make(node, next_hop, communities, med, salt)
            if self._owners.setdefault(number, owner) == owner:
                path = self._paths[owner] = Path(next_hop, number, node, communities, med)
                return path
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

    paths: for IPv4 and for IPv6.
    """

    tier: _Tier
    reason: Reason
    since_s: float
    paths: tuple[Path | None, Path | None]


@dataclass(frozen=True, slots=True)
class Rules:
    """What of the configuration and of the other managers concerns selection.

    managers: ids of the living managers, this one's included; they count for `perManager` only.
    left: the node that is left to other managers, "" if none announces.
    """

    config: Config
    me: str = ""
    managers: tuple[str, ...] = ()
    left: str = ""


def select(
    verdicts: Verdicts,
    eips: Iterable[Eip],
    services: Callable[[ObjectRef], Service | None],
    endpoints: Callable[[ObjectRef], ServiceEndpoints | None],
    confirmations: Confirmations,
    previous: Mapping[Address, EipSelection],
) -> dict[Address, EipSelection]:
    """Select the paths of these EIPs.

    previous: what was selected for them last; it decides what this costs, and nothing else.
    """
    selections: dict[Address, EipSelection] = {}
    for eip in eips:
        behind = standing(eip, services, endpoints)
        evidence = confirmations(eip.address)
        old = previous.get(eip.address)
        selections[eip.address] = _select(verdicts, eip, behind, evidence, old)
    return selections


def standing(
    eip: Eip,
    services: Callable[[ObjectRef], Service | None],
    endpoints: Callable[[ObjectRef], ServiceEndpoints | None],
) -> tuple[Service | None, ServiceEndpoints | None]:
    """The Service that speaks for an EIP, and the endpoints behind all Services on it.

    Those that share one agree on what a route depends on (`lbctl.core.sharing`).
    """
    if not eip.sharers:
        return services(eip.owner), endpoints(eip.owner)
    every = [service for ref in eip.members if (service := services(ref)) is not None]
    here = [service for service in every if not service.deleting] or every
    behind = [endpoints(service.ref) for service in here]
    ports = tuple(port for known in behind if known is not None for port in known.ports)
    return here[0] if here else None, ServiceEndpoints(eip.owner, ports)


class _Judged(NamedTuple):
    """What EIPs with the same evidence have in common.

    names: of whom they go through, before the ranking. ranked: the paths that they all have, None
    if each has a ranking of its own; paths: the same. virtual: their virtual next hop, if any.
    reasons: of them all.
    """

    names: frozenset[str]
    ranked: tuple[Path, ...] | None
    paths: frozenset[Path]
    virtual: VirtualHop | None
    reasons: _Reasons


class Verdicts:
    """The nodes in view of all EIPs; what is alike for many of these is worked out once.

    To be made anew when something of it changes. locator: of these nodes. doubtful: those whose
    Pods' readiness is not known.
    """

    def __init__(
        self,
        rules: Rules,
        nodes: Mapping[str, Node],
        views: Mapping[str, NodeView],
        ids: PathIds,
        locator: Locator,
        doubtful: frozenset[str] = frozenset(),
    ) -> None:
        self.rules = rules
        self.locator, self.doubtful = locator, doubtful
        self.nodes = {name: _verdict(nodes[name], views.get(name), ids) for name in sorted(nodes)}
        self._by_family = [
            {path.node: path for verdict in self.nodes.values() if (path := verdict.paths[family])}
            for family in (0, 1)
        ]
        self._known: dict[object, _Judged] = {}

    def judged(self, version: int, case: Case) -> _Judged:
        """What EIPs of a family with such a case come to.

        A table without endpoints refuses new connections: it is not enough that the manager knows
        some.
        """
        key = version, case.confirmed, case.only
        judged = self._known.get(key)
        if judged is None:
            if len(self._known) >= _MANY:
                self._known.clear()
            judged = self._known[key] = self._judge(*key)
        return judged

    def first(self, version: int, ranking: Ranking, local: bool) -> tuple[Path, ...]:
        """By which paths something with this ranking goes. local: with policy Local."""
        announce = self.rules.config.announce
        best = ranking.best[: announce.max_paths]
        if announce.paths == "perManager" and best:
            managers = sorted({*self.rules.managers, self.rules.me})
            best = (best[managers.index(self.rules.me) % len(best)],)
        return self._paths(version, best, local)

    def _paths(self, version: int, names: Iterable[str], local: bool) -> tuple[Path, ...]:
        paths = self._by_family[version == 6]
        every = tuple([paths[name] for name in names])
        if local or not self.rules.left:
            return every
        return tuple([path for path in every if path.node != self.rules.left]) or every

    def _judge(
        self, version: int, confirmed: frozenset[str], only: frozenset[str] | None
    ) -> _Judged:
        tiers: dict[_Tier, list[str]] = {tier: [] for tier in _Tier}
        able = confirmed if only is None else confirmed & only
        for name in sorted(able):
            verdict = self.nodes.get(name)
            if verdict is not None and verdict.paths[version == 6] is not None:
                tiers[verdict.tier].append(name)
        group = frozenset(name for names in tiers.values() for name in names)
        chosen = _chosen(tiers, self.nodes)
        announce = self.rules.config.announce
        ranges = announce.virtual_next_hops if announce.next_hop == "recursive" else ()
        local = only is not None
        address, names, every = virtual_address(ranges, version, group), frozenset(chosen), None
        if address is not None:
            ranking = ranked(address, names, announce.max_paths)
            names, every = ranking.names, self.first(version, ranking, local)
        elif announce.paths == "addPath" and len(chosen) <= announce.max_paths:
            every = self._paths(version, chosen, local)
        paths = frozenset(every or ())
        virtual = None if address is None else VirtualHop(address, group, paths)
        reasons = _Reasons(self, version, (confirmed, only), names, every or ())
        return _Judged(names, every, paths, virtual, reasons)


class _Reasons(Mapping[str, Reason]):
    """The reasons of one EIP, worked out for those who ask: thousands of EIPs have them."""

    def __init__(
        self,
        verdicts: Verdicts,
        version: int,
        evidence: tuple[frozenset[str], frozenset[str] | None],
        chosen: frozenset[str],
        paths: Iterable[Path],
    ) -> None:
        self._verdicts, self._left = verdicts.nodes, verdicts.rules.left
        self._version = version
        self._evidence = evidence
        self._chosen = chosen
        self._paths = paths

    def __getitem__(self, name: str) -> Reason:
        verdict = self._verdicts[name]
        if name in self._chosen:
            if all(path.node != name for path in self._paths):
                return Reason.LEFT_TO_OTHERS if name == self._left else Reason.OVER_MAX_PATHS
            return verdict.reason if verdict.tier is _Tier.GOOD else Reason.LAST_NEXT_HOP
        if verdict.tier in (_Tier.NEVER, _Tier.SUSPECT):
            return verdict.reason
        return _obstacle(name, self._version, verdict, *self._evidence) or verdict.reason

    def __iter__(self) -> Iterator[str]:
        return iter(self._verdicts)

    def __len__(self) -> int:
        return len(self._verdicts)


def _select(
    verdicts: Verdicts,
    eip: Eip,
    behind: tuple[Service | None, ServiceEndpoints | None],
    evidence: tuple[frozenset[str], frozenset[str]],
    old: EipSelection | None,
) -> EipSelection:
    of = verdicts.rules.config, verdicts.locator, verdicts.doubtful, eip, behind, evidence
    case = old.case if old is not None else None
    if case is None or case.of != of:
        case = _case(verdicts, eip, behind, evidence, of)
    if case.reason is not None:
        return EipSelection(frozenset(), case.reason, {}, case=case)
    version = eip.address.version
    judged, ranking = verdicts.judged(version, case), None
    first, paths, reasons = judged.ranked, judged.paths, judged.reasons
    if first is None:
        most = verdicts.rules.config.announce.max_paths
        ranking = ranked(eip.address, judged.names, most, old.ranking if old else None)
        first = verdicts.first(version, ranking, case.only is not None)
        reasons = _Reasons(verdicts, version, case[2:], judged.names, first)
    if old is not None and old.ranked == first:
        paths = old.paths
    elif ranking is not None:
        paths = frozenset(first)
    reason = Reason.ANNOUNCED if paths else Reason.NO_NEXT_HOP
    return EipSelection(paths, reason, reasons, judged.virtual, case, first, ranking)


def _case(
    verdicts: Verdicts,
    eip: Eip,
    behind: tuple[Service | None, ServiceEndpoints | None],
    evidence: tuple[frozenset[str], frozenset[str]],
    of: tuple[object, ...],
) -> Case:
    config, (service, endpoints), (confirmed, local) = verdicts.rules.config, behind, evidence
    refusal = _refusal(config, eip, service)
    if refusal is not None or service is None:
        return Case(of, refusal or Reason.NO_ENDPOINTS)
    alone, external = None if eip.sharers else service, config.endpoints.external
    nodes = verdicts.locator, external, verdicts.doubtful
    found = serving(alone, endpoints, eip.address.version, *nodes)
    if service.policy is TrafficPolicy.LOCAL:
        return Case(of, found.reason, confirmed & local, found.nodes)
    return Case(of, found.reason, confirmed)


def _refusal(config: Config, eip: Eip, service: Service | None) -> Reason | None:
    if config.pool_of(eip.address) is None:
        return Reason.ADDRESS_OUTSIDE_POOLS
    if eip.phase is not Phase.BOUND or not eip.forwarding:
        return Reason.RELEASING
    return Reason.RELEASING if service is not None and service.deleting else None


def _verdict(node: Node, view: NodeView | None, ids: PathIds) -> _Verdict:
    def path(version: int) -> Path | None:
        # What its owner got wrong there was meant to go before its addresses.
        known = (*node.next_hops, *(() if node.odd_hops else node.addresses))
        address = next((a for a in known if a.version == version and _announceable(a)), None)
        return None if address is None else ids.get(node.name, address)

    tier, reason = _tier(node, view or NodeView(node.name))
    since_s = view.since_s if view and tier is _Tier.SUSPECT else 0.0
    return _Verdict(tier, reason, since_s, (path(4), path(6)))


def _announceable(hop: Address) -> bool:
    """Whether a switch takes it as a next hop; over another, FRR ends the session and with it every
    EIP's routes (RFC 4271 section 6.3)."""
    local = hop.version == 6 and hop.is_link_local
    return deliverable(hop) and not hop.is_reserved and not local


def withheld(node: Node) -> Reason | None:
    """Why its owner wants a node to be no next hop, whatever its health; None if it may be one."""
    if node.excluded:
        return Reason.NODE_EXCLUDED
    if node.out_of_service:
        return Reason.NODE_OUT_OF_SERVICE
    return Reason.NODE_DRAINING if node.draining or node.deleting else None


def _tier(node: Node, view: NodeView) -> tuple[_Tier, Reason]:
    if (reason := withheld(node)) is not None:
        return _Tier.NEVER, reason
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
    if verdict.paths[version == 6] is None:
        return Reason.NODE_NO_ADDRESS
    if only is not None and name not in only:
        return Reason.NO_LOCAL_ENDPOINT
    if name not in confirmed:
        return Reason.NOT_CONFIRMED
    return None


def _chosen(tiers: Mapping[_Tier, list[str]], verdicts: Mapping[str, _Verdict]) -> list[str]:
    """The best tier that has nodes. Of the Suspects, those that fell last stay."""
    chosen = tiers[_Tier.GOOD] or tiers[_Tier.DOUBTFUL]
    if not chosen and tiers[_Tier.SUSPECT]:
        last_s = max(verdicts[name].since_s for name in tiers[_Tier.SUSPECT])
        chosen = [n for n in tiers[_Tier.SUSPECT] if verdicts[n].since_s > last_s - AT_ONCE_S]
    return chosen
