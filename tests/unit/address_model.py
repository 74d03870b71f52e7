"""The rules of docs/addresses.md once more, slow and plain, to hold the allocator against.

Rules: written from that page and the issue, not from the allocator; every question is answered by
looking at all pools, all addresses and all Services. Only ever one thing happens at a time here:
a write succeeds as soon as it is decided. When an address becomes free is not this model's
business (`core.release`): it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from lbctl.core.model import Address, ObjectRef, Service
from lbctl.core.reasons import Reason

CLASS = "lbctl.io/bgp"


@dataclass(frozen=True)
class PoolText:
    """A pool as its user writes it, with the addresses one by one."""

    name: str
    addresses: tuple[str, ...]
    auto_assign: bool = True
    avoid_buggy: bool = False
    priority: int = 0
    namespaces: tuple[str, ...] = ()
    tier: str = ""  # namespaceSelectors: this value of the label `tier`
    app: str = ""  # serviceSelectors: this value of the label `app`
    requests: str = "any"
    share_across: tuple[str, ...] = ()
    reserved: tuple[tuple[str, str], ...] = ()  # address, owner ("": nobody)
    quota: int | None = None
    drain: bool = False
    release: bool = False

    def yaml(self) -> str:
        """For the configuration."""
        said = [f"name: {self.name}", f"addresses: [{_quoted(self.addresses)}]"]
        said += [f"autoAssign: {str(self.auto_assign).lower()}", f"requests: {self.requests}"]
        said += [f"avoidBuggyIPs: {str(self.avoid_buggy).lower()}", f"priority: {self.priority}"]
        said += [f"drain: {str(self.drain).lower()}", f"release: {str(self.release).lower()}"]
        said += [f"namespaces: [{_quoted(self.namespaces)}]"]
        said += [f"shareAcrossNamespaces: [{_quoted(self.share_across)}]"]
        if self.tier:
            said.append(f"namespaceSelectors: [{{matchLabels: {{tier: {self.tier}}}}}]")
        if self.app:
            said.append(f"serviceSelectors: [{{matchLabels: {{app: {self.app}}}}}]")
        if self.quota is not None:
            said.append(f"quota: {self.quota}")
        entries = [
            f'{{address: "{address}", owner: {owner}}}' if owner else f'"{address}"'
            for address, owner in self.reserved
            if address in self.addresses
        ]
        said.append(f"reserved: [{', '.join(entries)}]")
        return f"{{{', '.join(said)}}}"

    def holds(self, address: Address) -> bool:
        return str(address) in self.addresses


def _quoted(texts: tuple[str, ...]) -> str:
    return ", ".join(f'"{text}"' for text in texts)


@dataclass
class Held:
    """An address in use: by whom, in the order in which they came, and whether for good."""

    pool: str
    members: list[ObjectRef]
    key: str = ""
    releasing: bool = False


@dataclass(frozen=True)
class Wants:
    """What a Service asks for; only our own annotations are used here."""

    addresses: tuple[Address, ...] = ()
    pool: str = ""
    key: str = ""
    problem: Reason | None = None


@dataclass(frozen=True)
class Answer:
    """One family: the address that the Service is to have, and why not the one that it wants."""

    address: Address | None
    refusal: Reason | None = None


def wants(service: Service) -> Wants:
    found = dict(service.annotations)
    addresses: list[Address] = []
    texts = [service.requested or "", found.get("lbctl.io/loadBalancerIPs", "")]
    for text in texts:
        families: list[int] = []
        for word in text.replace(",", " ").split():
            try:
                address = ip_address(word)
            except ValueError:
                return Wants(problem=Reason.REQUEST_INVALID)
            if address.version in families:
                return Wants(problem=Reason.REQUEST_INVALID)
            if any(a.version == address.version and a != address for a in addresses):
                return Wants(problem=Reason.ANNOTATIONS_CONFLICT)
            families.append(address.version)
            if address not in addresses:
                addresses.append(address)
    pool, key = found.get("lbctl.io/address-pool", ""), found.get("lbctl.io/allow-shared-ip", "")
    return Wants(tuple(addresses), pool, key)


def fits(first: Service, other: Service) -> bool:
    """Whether two can be on one address, whatever their ports."""
    if first.policy != other.policy or set(first.source_ranges) != set(other.source_ranges):
        return False
    return first.policy.value != "Local" or first.selector == other.selector


def same_port(one: Service, other: Service) -> bool:
    mine = [(port.protocol, port.port) for port in one.ports]
    return any((port.protocol, port.port) in mine for port in other.ports)


@dataclass
class Rules:
    """The state, and `settle`, which serves everybody until nothing changes any more."""

    pools: tuple[PoolText, ...]
    without_class: bool = True
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    services: dict[ObjectRef, Service] = field(default_factory=dict)
    held: dict[Address, Held] = field(default_factory=dict)
    why: dict[ObjectRef, Reason | None] = field(default_factory=dict)

    # Pools

    def ranked(self) -> list[PoolText]:
        return sorted(self.pools, key=lambda p: (p.priority == 0, p.priority, p.name))

    def pool_of(self, address: Address) -> PoolText | None:
        return next((pool for pool in self.pools if pool.holds(address)), None)

    def refuses(self, new: tuple[PoolText, ...]) -> bool:
        """Whether a configuration takes away what somebody uses, and its pool does not say so."""
        lets_go = [pool.name for pool in new if pool.release]
        return any(
            not held.releasing
            and held.pool not in lets_go
            and not any(pool.holds(address) for pool in new)
            for address, held in self.held.items()
        )

    def admits(self, pool: PoolText, service: Service) -> Reason | None:
        space = service.ref.namespace
        chosen = pool.tier != "" and self.labels.get(space, {}).get("tier") == pool.tier
        if (pool.namespaces or pool.tier) and space not in pool.namespaces and not chosen:
            return Reason.POOL_NOT_FOR_NAMESPACE
        if pool.app and dict(service.labels).get("app") != pool.app:
            return Reason.POOL_NOT_FOR_SERVICE
        return None

    def may_have(self, pool: PoolText, service: Service, address: Address) -> Reason | None:
        owner = dict(pool.reserved).get(str(address), "")
        if (why := self.admits(pool, service)) is not None:
            return why
        return Reason.ADDRESS_RESERVED if owner not in ("", str(service.ref)) else None

    def may_ask(self, pool: PoolText, service: Service, address: Address) -> Reason | None:
        reserved = dict(pool.reserved)
        if (why := self.may_have(pool, service, address)) is not None:
            return why
        if pool.drain:
            return Reason.POOL_DRAINING
        if reserved.get(str(address)) == str(service.ref):
            return None
        listed = str(address) in reserved
        if pool.requests == "none" or (pool.requests == "listed" and not listed):
            return Reason.REQUEST_NOT_ALLOWED
        if not listed and self.avoided(pool, address):
            return Reason.REQUEST_NOT_ALLOWED
        return None

    def avoided(self, pool: PoolText, address: Address) -> bool:
        return pool.avoid_buggy and str(address).endswith((".0", ".255"))

    def room(self, pool: PoolText, space: str) -> int:
        """How many addresses more of a pool a namespace may have: a shared one counts once for
        each namespace on it."""
        used = [
            address
            for address, held in self.held.items()
            if pool.holds(address) and space in [ref.namespace for ref in held.members]
        ]
        return 1000 if pool.quota is None else pool.quota - len(used)

    def returns(self, pool: PoolText, service: Service, address: Address) -> bool:
        """Whether what it had, or shows, may be its own again: a pool that drains gives nothing
        from rest."""
        if pool.drain and address not in service.ingress:
            return False
        return self.may_have(pool, service, address) is None

    # Services

    def mine(self, ref: ObjectRef) -> list[Address]:
        found = [address for address, held in self.held.items() if ref in held.members]
        return sorted(found, key=lambda a: (a.version, int(a)))

    def ours(self, service: Service) -> bool:
        if not service.is_load_balancer or service.deleting:
            return False
        if service.load_balancer_class == CLASS:
            return True
        if service.load_balancer_class is None and self.without_class:
            return True
        # A change of the rule takes nothing from one that has an address.
        return any(
            not self.held[address].releasing and address in service.ingress
            for address in self.mine(service.ref)
        )

    def order(self) -> list[Service]:
        """Those first that name an address, or show one of a pool."""

        def key(service: Service) -> tuple[bool, float, str, str]:
            named = any(self.pool_of(address) for address in service.ingress)
            named = named or bool(wants(service).addresses)
            return not named, service.created_s, service.ref.namespace, service.ref.name

        return sorted(self.services.values(), key=key)

    def settle(self) -> None:
        for ref in sorted({ref for held in self.held.values() for ref in held.members}):
            if ref not in self.services:
                self.give_up(ref, ())
        before = None
        for _ in range(50):
            if before == (now := self.seen()):
                return
            before = now
            for service in self.order():
                self.serve(service)
        raise AssertionError("the model does not come to rest")

    def seen(self) -> object:
        holds = {a: (h.pool, tuple(h.members), h.key, h.releasing) for a, h in self.held.items()}
        return holds, {ref: s.ingress for ref, s in self.services.items()}

    def give_up(self, ref: ObjectRef, but: tuple[Address, ...]) -> None:
        for address in self.mine(ref):
            held = self.held[address]
            if address in but or held.releasing:
                continue
            if len(held.members) == 1:
                held.releasing = True
            else:
                held.members.remove(ref)

    def serve(self, service: Service) -> None:
        ref = service.ref
        if not self.ours(service):
            self.give_up(ref, ())
            self.why.pop(ref, None)
            return
        asked = wants(service)
        answers = [self.answer(service, asked, family) for family in service.families]
        addresses = tuple(a.address for a in answers if a.address is not None)
        for address in addresses:
            self.bind(service, asked, address)
        shown = set(service.ingress)
        if addresses or any(a in self.mine(ref) or self.pool_of(a) for a in shown):
            ingress = service.ingress if set(addresses) == shown else addresses
            self.services[ref] = replace(service, ingress=ingress)
        self.give_up(ref, addresses)
        missing = [a.refusal for a in answers if a.refusal is not None]
        if addresses and not service.needs_both and set(missing) <= {Reason.NO_POOL}:
            missing = []
        self.why[ref] = missing[0] if missing else None

    def bind(self, service: Service, asked: Wants, address: Address) -> None:
        pool, held = self.pool_of(address), self.held.get(address)
        if held is None:
            assert pool is not None
            self.held[address] = Held(pool.name, [service.ref], asked.key)
            return
        held.releasing = False
        if service.ref not in held.members:
            held.members.append(service.ref)
        if len(held.members) == 1 and asked.problem is None:
            held.key = asked.key
        held.pool = pool.name if pool is not None else held.pool

    # One family

    def answer(self, service: Service, asked: Wants, family: int) -> Answer:
        have = self.have(service, family)
        if asked.problem is not None:
            return Answer(have, asked.problem)
        if any(address.version not in service.families for address in asked.addresses):
            return Answer(have, Reason.ADDRESS_OUTSIDE_POOLS)
        wish = next((a for a in asked.addresses if a.version == family), None)
        if wish is None and have is None and not asked.pool:
            wish = self.reserved_for(service, family)
        if wish is not None and wish != have:
            return self.wish(service, asked, wish, have)
        if have is not None:
            return self.keep(service, asked, have)
        back = self.back(service, asked, family) or self.shared(service, asked, family)
        return Answer(back) if back is not None else self.free(service, asked, family, None)

    def have(self, service: Service, family: int) -> Address | None:
        """What it has now; of two (it was just given another) the one that it shows."""
        lets_go = [pool.name for pool in self.pools if pool.release]
        found = [
            address
            for address in self.mine(service.ref)
            if address.version == family
            and not self.held[address].releasing
            and (
                self.pool_of(address) is not None
                or (address in service.ingress and self.held[address].pool not in lets_go)
            )
        ]
        shown = [address for address in found if address in service.ingress]
        return next(iter([*shown, *found]), None)

    def reserved_for(self, service: Service, family: int) -> Address | None:
        for pool in self.pools:
            for text, owner in pool.reserved:
                address = ip_address(text)
                if owner == str(service.ref) and address.version == family and pool.holds(address):
                    return address
        return None

    def wish(self, service: Service, asked: Wants, wish: Address, have: Address | None) -> Answer:
        pool, held = self.pool_of(wish), self.held.get(wish)
        if pool is None or asked.pool not in ("", pool.name):
            return Answer(have, Reason.ADDRESS_OUTSIDE_POOLS)
        if held is not None and service.ref in held.members and self.returns(pool, service, wish):
            return Answer(wish)
        if (why := self.may_ask(pool, service, wish)) is not None:
            return Answer(have, why)
        if held is not None:
            if held.releasing or not asked.key or not held.key:
                return Answer(have, Reason.ADDRESS_TAKEN)
            why = self.joins(service, asked, wish)
            return Answer(wish) if why is None else Answer(have, why)
        credit = have is not None and self.held[have].pool == pool.name
        if self.room(pool, service.ref.namespace) + credit < 1:
            return Answer(have, Reason.QUOTA_EXCEEDED)
        return Answer(wish)

    def keep(self, service: Service, asked: Wants, have: Address) -> Answer:
        pool, held = self.pool_of(have), self.held[have]
        if pool is None:
            return Answer(have, Reason.ADDRESS_OUTSIDE_POOLS)
        if asked.pool not in ("", pool.name):
            return self.free(service, asked, have.version, have)
        if len(held.members) > 1:
            before = held.members[: held.members.index(service.ref)]
            others = [self.services[ref] for ref in before if ref in self.services]
            if asked.key != held.key or not self.side_by_side(others, service):
                return Answer(have, Reason.SHARING_REFUSED)
        return Answer(have)

    def side_by_side(self, others: list[Service], service: Service) -> bool:
        if others and not fits(others[0], service):
            return False
        return not any(same_port(other, service) for other in others)

    def back(self, service: Service, asked: Wants, family: int) -> Address | None:
        """What it is giving back, else what its status shows."""
        own = [address for address in self.mine(service.ref) if address.version == family]
        for address in sorted(own, key=lambda a: a not in service.ingress):
            pool = self.pool_of(address)
            if pool is None or asked.pool not in ("", pool.name):
                continue
            if self.returns(pool, service, address):
                return address
        for address in sorted(service.ingress, key=int):
            pool = self.pool_of(address)
            if address.version != family or pool is None or asked.pool not in ("", pool.name):
                continue
            if not self.returns(pool, service, address):
                continue
            if address in self.held:
                if asked.key and self.joins(service, asked, address) is None:
                    return address
            elif self.room(pool, service.ref.namespace) > 0:
                return address
        return None

    def shared(self, service: Service, asked: Wants, family: int) -> Address | None:
        for address in sorted(self.held, key=int):
            pool = self.pool_of(address)
            if address.version != family or pool is None or asked.pool not in ("", pool.name):
                continue
            if asked.key and self.joins(service, asked, address) is None:
                return address
        return None

    def joins(self, service: Service, asked: Wants, address: Address) -> Reason | None:
        """Why it cannot be on an address with those who have it."""
        pool, held, space = self.pool_of(address), self.held[address], service.ref.namespace
        if pool is None or held.releasing:
            return Reason.ADDRESS_TAKEN
        if held.key != asked.key:
            return Reason.SHARING_REFUSED
        spaces = [ref.namespace for ref in held.members]
        alone = all(other == space for other in spaces)
        if not alone and not all(one in pool.share_across for one in [space, *spaces]):
            return Reason.SHARING_REFUSED
        if (why := self.may_have(pool, service, address)) is not None:
            return why
        if pool.drain and address not in service.ingress:
            return Reason.POOL_DRAINING
        if space not in spaces and self.room(pool, space) < 1:
            return Reason.QUOTA_EXCEEDED
        others = [self.services[ref] for ref in held.members if ref in self.services]
        return None if self.side_by_side(others, service) else Reason.SHARING_REFUSED

    def free(self, service: Service, asked: Wants, family: int, have: Address | None) -> Answer:
        """The lowest free address of the first pool that may serve it."""
        named = [pool for pool in self.pools if pool.name == asked.pool]
        if asked.pool and not named:
            return Answer(have, Reason.POOL_UNKNOWN)
        versions = [ip_address(text).version for pool in named for text in pool.addresses]
        if named and family not in versions:
            return Answer(have, Reason.NO_POOL)
        if named and named[0].drain:
            return Answer(have, Reason.POOL_DRAINING)
        if named and (denial := self.admits(named[0], service)) is not None:
            return Answer(have, denial)
        giving = named or [p for p in self.ranked() if p.auto_assign and not p.drain]
        why: list[Reason] = []
        for pool in giving:
            if not any(ip_address(text).version == family for text in pool.addresses):
                continue
            found = next(self.unused(pool, family), None)
            if (denial := self.admits(pool, service)) is not None:
                why.append(denial)
            elif self.room(pool, service.ref.namespace) < 1:
                why.append(Reason.QUOTA_EXCEEDED)
            elif found is not None:
                return Answer(found)
            else:
                why.append(Reason.POOL_EXHAUSTED)
        for reason in (Reason.POOL_EXHAUSTED, Reason.QUOTA_EXCEEDED):
            if reason in why:
                return Answer(have, reason)
        return Answer(have, why[0] if why else Reason.NO_POOL)

    def unused(self, pool: PoolText, family: int) -> Iterator[Address]:
        kept_back = dict(pool.reserved)
        for address in sorted((ip_address(text) for text in pool.addresses), key=int):
            taken = address in self.held or str(address) in kept_back
            if address.version == family and not taken and not self.avoided(pool, address):
                yield address
