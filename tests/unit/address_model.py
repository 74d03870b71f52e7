"""The rules of docs/addresses.md once more, slow and plain: who has which address, and why not.

Written from the documents, not from the allocator. Every Service is looked at in order of age, and
for each every address of every pool, until a round changes nothing. `Rules.refusal` has a line for
each rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Literal, TypeAlias

from lbctl.core.model import Address, ObjectRef, Service, TrafficPolicy
from lbctl.core.reasons import Reason

CLASS = "lbctl.io/bgp"
How: TypeAlias = Literal["asked", "reserved", "rest", "claimed", "shared", "free"]


@dataclass(frozen=True)
class PoolSpec:
    """A pool as a user writes it. `tier`, `app`: the one label that its selectors name."""

    name: str
    addresses: tuple[str, ...]
    auto_assign: bool = True
    avoid_buggy: bool = False
    priority: int = 0
    namespaces: tuple[str, ...] = ()
    tier: str = ""
    app: str = ""
    requests: Literal["any", "listed", "none"] = "any"
    share_across: tuple[str, ...] = ()
    reserved: tuple[tuple[str, str], ...] = ()  # with the owner, "" for none
    quota: int | None = None
    drain: bool = False
    release: bool = False

    def yaml(self) -> str:
        """As a flow mapping of the configuration."""
        reserved = [
            f"{{address: '{address}'" + (f", owner: {owner}}}" if owner else "}")
            for address, owner in self.reserved
        ]
        parts = [
            f"name: {self.name}",
            "addresses: [{}]".format(", ".join(f"'{text}'" for text in self.addresses)),
            f"autoAssign: {self.auto_assign}".lower().replace("autoassign", "autoAssign"),
            f"avoidBuggyIPs: {str(self.avoid_buggy).lower()}",
            f"priority: {self.priority}",
            f"namespaces: [{', '.join(self.namespaces)}]",
            f"namespaceSelectors: [{{matchLabels: {{tier: {self.tier}}}}}]" if self.tier else "",
            f"serviceSelectors: [{{matchLabels: {{app: {self.app}}}}}]" if self.app else "",
            f"requests: {self.requests}",
            f"shareAcrossNamespaces: [{', '.join(self.share_across)}]",
            f"reserved: [{', '.join(reserved)}]",
            f"quota: {self.quota}" if self.quota is not None else "",
            f"drain: {str(self.drain).lower()}",
            f"release: {str(self.release).lower()}",
        ]
        return "{" + ", ".join(part for part in parts if part) + "}"

    def of(self, family: int) -> list[Address]:
        """Its addresses of a family, lowest first."""
        found = [ip_address(text) for text in self.addresses]
        return sorted((a for a in found if a.version == family), key=int)


@dataclass
class Held:
    """An address in use: the Services on it, the owner first; resting: its owner gave it back."""

    pool: str
    members: list[ObjectRef]
    key: str = ""
    resting: bool = False

    def __str__(self) -> str:
        members = " ".join(map(str, self.members))
        return f"{self.pool}: {members} {self.key}" + (" resting" if self.resting else "")


@dataclass(frozen=True)
class Wish:
    """What a Service says of its addresses."""

    addresses: dict[int, Address] = field(default_factory=dict)
    pool: str = ""
    key: str = ""
    error: Reason | None = None


def wish_of(service: Service) -> Wish:
    """Our annotations, MetalLB's where ours is absent, and spec.loadBalancerIP."""
    notes = dict(service.annotations)
    said = {
        kind: notes.get(f"lbctl.io/{kind}", notes.get(f"metallb.io/{kind}", ""))
        for kind in ("loadBalancerIPs", "address-pool", "allow-shared-ip")
    }
    addresses: dict[int, Address] = {}
    for text in (said["loadBalancerIPs"], service.requested or ""):
        families = []
        for part in filter(None, text.replace(" ", "").split(",")):
            try:
                address = ip_address(part)
            except ValueError:
                return Wish(error=Reason.REQUEST_INVALID)
            if address.version in families:
                return Wish(error=Reason.REQUEST_INVALID)
            families.append(address.version)
            if addresses.setdefault(address.version, address) != address:
                return Wish(error=Reason.ANNOTATIONS_CONFLICT)
    return Wish(addresses, said["address-pool"], said["allow-shared-ip"])


@dataclass
class Rules:
    """The cluster as far as addresses go, and who has which."""

    pools: tuple[PoolSpec, ...]
    without_class: bool = True
    adopting: bool = False
    never: frozenset[Address] = frozenset()
    services: dict[ObjectRef, Service] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    held: dict[Address, Held] = field(default_factory=dict)
    why: dict[ObjectRef, Reason | None] = field(default_factory=dict)
    moved: bool = False

    # Who is served, in which order

    def ours(self, service: Service) -> bool:
        """A change of the class rule takes nothing from a Service that has an address."""
        of, has = service.load_balancer_class, self.has(service.ref)
        wanted = of == CLASS or (of is None and self.without_class) or {*has} & {*service.ingress}
        return service.is_load_balancer and not service.deleting and bool(wanted)

    def by_age(self) -> list[Service]:
        """Those that are ours, the oldest first."""
        found = [service for service in self.services.values() if self.ours(service)]
        return sorted(found, key=lambda s: (s.created_s, s.ref))

    def settle(self) -> None:
        """The first in turn who should come to have more or less does, until there is nobody."""
        self.moved = True
        while self.moved:
            self.moved, self.why = False, {}
            self.part()
            self.claim()
            for service in sorted(self.by_age(), key=lambda service: self.turn(service.ref)):
                if not self.moved:
                    self.why[service.ref] = self.serve(service)
                    self.services[service.ref] = replace(service, ingress=self.shows(service))

    def turn(self, ref: ObjectRef) -> tuple[int, float, ObjectRef]:
        """Who is gone goes first, then who names an address or has one reserved, then by age."""
        service = self.services.get(ref)
        if service is None:
            return 0, 0, ref
        named = wish_of(service).addresses or self.reserved_for(service)
        return 1 if named else 2, service.created_s, ref

    def part(self) -> None:
        """Who is gone, or not ours, gives back."""
        for address, held in self.held.items():
            for ref in sorted(held.members, key=self.turn):
                service = self.services.get(ref)
                if not held.resting and (service is None or not self.ours(service)):
                    self.leave(ref, address)

    def claim(self) -> None:
        """What exists is restored, and keys count, before anything new is given."""
        for service in self.by_age():
            wish = replace(wish_of(service), pool="")
            for family in service.families:
                for held in [self.held[address] for address in self.has(service.ref, family)]:
                    alone = held.members == [service.ref] and not wish.error
                    if alone and held.key != wish.key:
                        held.key, self.moved = wish.key, True
                shown = sorted((a for a in service.ingress if a.version == family), key=int)
                for address in shown[:1] if self.adopting else shown:
                    why = self.refusal(service, wish, address, "claimed")
                    if why is None and not self.has(service.ref, family):
                        self.take(service, wish, address)

    # One Service

    def serve(self, service: Service) -> Reason | None:
        """Give it what it should have; why it has not all of that."""
        wish = wish_of(service)
        for address in self.has(service.ref):
            if address.version not in service.families:
                self.leave(service.ref, address)
        found = [self.serve_family(service, wish, family) for family in service.families]
        reasons = [reason for reason in found if reason]
        if len(found) == 2 and reasons == [Reason.NO_POOL] and not service.needs_both:
            return None
        return reasons[0] if reasons else None

    def serve_family(self, service: Service, wish: Wish, family: int) -> Reason | None:
        """Keep what it has, or give it the first that it may have."""
        has = next(iter(self.has(service.ref, family)), None)
        if self.adopting and any(a.version == family for a in service.ingress):
            return None if has in service.ingress else Reason.NOT_ADOPTED
        if wish.error or any(a.version not in service.families for a in wish.addresses.values()):
            return wish.error or Reason.ADDRESS_OUTSIDE_POOLS
        pool = self.pool_of(has)
        if has and not pool:  # the pool gave it up
            self.leave(service.ref, has)
            has = None
        asked = wish.addresses.get(family)
        if has and pool and asked in (None, has) and wish.pool in ("", pool.name):
            return self.beside(service, wish, has)
        for how, address in self.candidates(service, wish, family, has):
            reason = self.refusal(service, wish, address, how)
            if reason is None:
                self.take(service, wish, address)
                if has:
                    self.leave(service.ref, has)
            if reason is None or address == asked or how == "reserved":
                return reason
        return self.why_none(service, wish, family)

    def candidates(
        self, service: Service, wish: Wish, family: int, has: Address | None
    ) -> Iterator[tuple[How, Address]]:
        """In the order in which it should have them."""
        in_use = sorted((a for a in self.held if a.version == family), key=int)
        own = [a for a in in_use if self.held[a].resting and self.held[a].members == [service.ref]]
        if family in wish.addresses:
            yield "rest" if wish.addresses[family] in own else "asked", wish.addresses[family]
            return
        for address in self.reserved_for(service):
            pool = self.pool_of(address)
            asked = pool is not None and wish.pool in ("", pool.name)
            if address.version == family and asked and not has:
                yield "rest" if address in own else "reserved", address
        for address in sorted(own, key=lambda a: a not in service.ingress):
            yield "rest", address
        for address in in_use:
            if wish.key and not self.held[address].resting:
                yield "shared", address
        for pool in self.ranked():
            for address in pool.of(family):
                if address not in self.held:
                    yield "free", address

    def beside(self, service: Service, wish: Wish, has: Address) -> Reason | None:
        """Who differs from those that were there before keeps the address, but not its ports."""
        held = self.held[has]
        if len(held.members) == 1:
            return None
        before = held.members[: held.members.index(service.ref)]
        clash = wish.key != held.key or self.clash(before, service)
        return Reason.SHARING_REFUSED if clash else None

    def why_none(self, service: Service, wish: Wish, family: int) -> Reason:
        """Why no address of any pool could be given to one that names none."""
        if wish.pool and wish.pool not in [pool.name for pool in self.pools]:
            return Reason.POOL_UNKNOWN
        found = [
            self.pool_refusal(service, wish, pool, "free")
            or self.over_quota(service, pool)
            or Reason.POOL_EXHAUSTED
            for pool in self.ranked()
            if pool.of(family) and wish.pool in ("", pool.name)  # of those that give at all
        ]
        better = [Reason.POOL_EXHAUSTED, Reason.QUOTA_EXCEEDED]
        found = [reason for reason in found if reason is not Reason.NO_POOL]
        found.sort(key=lambda r: better.index(r) if r in better else len(better))
        return found[0] if found else Reason.NO_POOL

    # The rules

    def refusal(self, service: Service, wish: Wish, address: Address, how: How) -> Reason | None:
        """Why a Service may not come to have an address, None if it may."""
        pool = self.pool_of(address)
        if pool is None or address in self.never or address in self.cluster_ips():
            return Reason.ADDRESS_OUTSIDE_POOLS
        if self.adopting and how == "claimed":
            return self.occupied(service, wish, address)
        owner = dict(pool.reserved).get(address.compressed)
        mine, listed = owner == str(service.ref), owner is not None
        buggy = pool.avoid_buggy and str(address).endswith((".0", ".255")) and not listed
        barred = pool.requests == "none" or (pool.requests == "listed" and not listed)
        rules = {
            Reason.ADDRESS_RESERVED: listed and not mine and (owner != "" or how == "free"),
            Reason.REQUEST_NOT_ALLOWED: how == "asked" and (barred or buggy) and not mine,
            Reason.POOL_EXHAUSTED: how == "free" and buggy,
        }
        return (
            self.pool_refusal(service, wish, pool, how)
            or next((reason for reason, broken in rules.items() if broken), None)
            or self.occupied(service, wish, address)
            or self.over_quota(service, pool, address, how)
        )

    def pool_refusal(self, service: Service, wish: Wish, pool: PoolSpec, how: How) -> Reason | None:
        """Why a pool does not serve a Service, whichever address it is."""
        namespace = service.ref.namespace
        labels = self.labels.get(namespace, {})
        bound = bool(pool.namespaces or pool.tier)
        welcome = namespace in pool.namespaces or bool(
            pool.tier and labels.get("tier") == pool.tier
        )
        foreign = pool.app and dict(service.labels).get("app") != pool.app
        unasked = how == "free" and not pool.auto_assign and wish.pool != pool.name
        rules = {
            Reason.ADDRESS_OUTSIDE_POOLS: wish.pool not in ("", pool.name),
            Reason.NO_POOL: unasked,
            Reason.POOL_NOT_FOR_NAMESPACE: bound and not welcome,
            Reason.POOL_NOT_FOR_SERVICE: foreign,
            Reason.POOL_DRAINING: pool.drain and how != "claimed",
        }
        return next((reason for reason, broken in rules.items() if broken), None)

    def over_quota(
        self, service: Service, pool: PoolSpec, address: Address | None = None, how: How = "free"
    ) -> Reason | None:
        """A shared address counts once for each namespace on it, one that rests counts too; who
        asks for another of the same pool may have one too many until it gives one back for it."""
        has = {
            found
            for found, held in self.held.items()
            if self.pool_of(found) is pool
            and any(ref.namespace == service.ref.namespace for ref in held.members)
        }
        back = address and any(
            self.pool_of(a) is pool for a in self.has(service.ref, address.version)
        )
        too_many = 1 if how == "asked" and back else 0
        over = pool.quota is not None and len(has) >= pool.quota + too_many
        return Reason.QUOTA_EXCEEDED if over and address not in has else None

    def occupied(self, service: Service, wish: Wish, address: Address) -> Reason | None:
        """Why a Service cannot come onto an address that is in use."""
        held = self.held.get(address)
        if held is None or held.members == [service.ref]:
            return None
        if held.resting or not held.key or not wish.key:
            return Reason.ADDRESS_TAKEN
        pool = self.pool_of(address)
        assert pool is not None
        together = all(
            service.ref.namespace == ref.namespace
            or {service.ref.namespace, ref.namespace} <= set(pool.share_across)
            for ref in held.members
        )
        fits = held.key == wish.key and together and not self.clash(held.members, service)
        return None if fits else Reason.SHARING_REFUSED

    def clash(self, members: list[ObjectRef], service: Service) -> bool:
        """Whether a Service cannot be on an address with those that were there before."""
        before = [self.services[ref] for ref in members]
        first, ports = before[:1], {(port.protocol, port.port) for port in service.ports}
        return any(
            one.policy != service.policy
            or (one.policy is TrafficPolicy.LOCAL and one.selector != service.selector)
            or one.source_ranges != service.source_ranges
            for one in first
        ) or any((port.protocol, port.port) in ports for one in before for port in one.ports)

    # The state

    def has(self, ref: ObjectRef, family: int = 0) -> list[Address]:
        """The addresses of a Service, lowest first."""
        found = [a for a, held in self.held.items() if not held.resting and ref in held.members]
        return sorted((a for a in found if family in (0, a.version)), key=int)

    def take(self, service: Service, wish: Wish, address: Address) -> None:
        pool, held = self.pool_of(address), self.held.get(address)
        assert pool is not None
        self.moved = True
        if held is None or held.resting:
            self.held[address] = Held(pool.name, [service.ref], wish.key)
        else:
            held.members.append(service.ref)

    def leave(self, ref: ObjectRef, address: Address) -> None:
        """The next one owns it; the last one's address rests."""
        held = self.held[address]
        self.moved = True
        if held.members == [ref]:
            held.resting, held.key = True, ""
        else:
            held.members.remove(ref)

    def ranked(self) -> list[PoolSpec]:
        """Lower priority first, 0 last, ties by name."""
        return sorted(self.pools, key=lambda pool: (pool.priority or 9999, pool.name))

    def pool_of(self, address: Address | None) -> PoolSpec | None:
        return next((p for p in self.pools if address and address.compressed in p.addresses), None)

    def reserved_for(self, service: Service) -> list[Address]:
        """What waits for a Service of this name."""
        pairs = [pair for pool in self.ranked() for pair in pool.reserved]
        return [ip_address(text) for text, owner in pairs if owner == str(service.ref)]

    def cluster_ips(self) -> set[Address]:
        return {address for service in self.services.values() for address in service.cluster_ips}

    def refuses(self, pools: tuple[PoolSpec, ...]) -> bool:
        """A shrink takes no address that a Service uses, unless the pool says `release`."""
        after, letting = Rules(pools), {pool.name for pool in pools if pool.release}
        return any(
            after.pool_of(address) is None and not held.resting and held.pool not in letting
            for address, held in self.held.items()
        )

    def shows(self, service: Service) -> tuple[Address, ...]:
        """What its status has to be. What is in no pool, and never was, is left to who has none,
        and while adopting what cannot become ours."""
        has, shown = tuple(self.has(service.ref)), service.ingress
        had = [a for a, held in self.held.items() if service.ref in held.members]
        strange = not has and not any(self.pool_of(a) or a in had for a in shown)
        return shown if strange or (self.adopting and not {*shown} <= {*has}) else has
