"""Which Service has which address.

Rules: an EIP object that exists is the truth, whoever made it; addresses once given do not move;
what exists is restored before anything new is given. A batch is served in the order of
creationTimestamp, then namespace/name, those first that name an address; so the result does not
depend on the order of arrival. Nothing on the path of one change is proportional to the number of
Services. The same namespace/name gets an address that is still being released back.

Use: feed every change (`set_service`, `set_eip` …; all EIP objects and Services before the first
plan), call `plan()`, carry out all of it, feeding each written object back (`set_eip` with the
API server's answer), then call it again when something changed. After a failed action call
`failed(action)`; on a 409 feed the fresh object first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address

from lbctl.core import names
from lbctl.core.actions import (
    Action,
    AddFinalizer,
    ClearStatus,
    CreateEip,
    RebindEip,
    Refused,
    ReleaseEip,
    RemoveFinalizer,
    WriteStatus,
)
from lbctl.core.config import Config
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.supply import Forbidden, Supply

_Key = tuple[bool, float, str, str]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about a Service. `sentence` is for people."""

    reason: Reason
    sentence: str
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pick:
    """The answer for one family: an EIP (`seen` if it exists already), or why there is none."""

    eip: Eip | None
    seen: Eip | None = None
    reason: Reason = Reason.RESTORED
    sentence: str = ""


def not_ours(service: Service) -> Reason | None:
    """Why a Service gets no address from us, None if it does.

    A Service without a class is ours, as DESIGN.md has it; one that is being deleted gives back.
    """
    if not service.is_load_balancer:
        return Reason.NOT_LOAD_BALANCER
    if service.load_balancer_class not in (None, names.LOAD_BALANCER_CLASS):
        return Reason.OTHER_CLASS
    if service.deleting:
        return Reason.RELEASING
    return None


def requested_address(service: Service) -> Address | None:
    """The address that the Service asks for. Raises ValueError if a user wrote something else."""
    return ip_address(service.requested) if service.requested else None


def plan(
    config: Config | None,
    services: Iterable[Service],
    eips: Iterable[Eip],
    forbidden: Iterable[Forbidden] = (),
) -> tuple[Action, ...]:
    """What has to be done, given everything. The same for any order of the arguments."""
    allocator = Allocator(config, forbidden)
    for eip in eips:
        allocator.set_eip(eip)
    for service in services:
        allocator.set_service(service)
    return allocator.plan()


class Allocator:
    """The incremental form of `plan`."""

    def __init__(self, config: Config | None = None, forbidden: Iterable[Forbidden] = ()) -> None:
        self._supply = Supply(config, forbidden)
        self._services: dict[ObjectRef, Service] = {}
        self._eips: dict[Address, Eip] = {}
        self._owned: dict[ObjectRef, dict[Address, Eip]] = {}
        self._in_flight: dict[Address, Eip] = {}
        self._dirty: set[ObjectRef] = set()
        self._decisions: dict[ObjectRef, Decision] = {}
        self._refused: set[ObjectRef] = set()
        self._starved: dict[int, set[ObjectRef]] = {4: set(), 6: set()}
        self._queue: dict[int, list[tuple[_Key, ObjectRef]]] = {4: [], 6: []}
        self._wishes: dict[Address, set[ObjectRef]] = {}

    # What is known

    def configure(self, config: Config | None, forbidden: Iterable[Forbidden] = ()) -> None:
        """The accepted configuration (None before the first) and what is never given out."""
        if self._supply.configure(config, forbidden):
            self._dirty |= self._refused

    def set_service(self, service: Service) -> None:
        """A Service appeared or changed."""
        before = self._services.get(service.ref)
        if before != service:
            self._dirty.add(service.ref)
            self._keep_off(service.cluster_ips, before.cluster_ips if before is not None else ())
        self._services[service.ref] = service  # even if equal: its version may be newer

    def remove_service(self, ref: ObjectRef) -> None:
        """A Service is gone."""
        before = self._services.pop(ref, None)
        if before is not None:
            self._dirty.add(ref)
            self._keep_off((), before.cluster_ips)

    def _keep_off(self, now: Iterable[Address], before: Iterable[Address]) -> None:
        """ClusterIPs, of whatever Service, are never given out."""
        for address in now:
            self._supply.forbid(address)
        for address in before:
            if self._supply.allow(address):
                self._dirty |= self._refused

    def set_eip(self, eip: Eip) -> None:
        """An EIP object appeared or changed."""
        self._in_flight.pop(eip.address, None)
        before = self._eips.get(eip.address)
        if before is not None and before.owner != eip.owner:
            self._disown(before)
        if before is None or before != eip:
            self._dirty.add(eip.owner)
        self._own(eip)

    def remove_eip(self, address: Address) -> None:
        """An EIP object is gone: its address is free, and who waits for it is served."""
        self._in_flight.pop(address, None)
        eip = self._eips.get(address)
        if eip is None:
            return
        self._disown(eip)
        self._supply.unuse(address)
        self._dirty |= self._wishes.pop(address, set())

    def failed(self, action: Action) -> None:
        """An action, and with it the rest of its Service's, was not carried out; plan it again.

        For a CreateEip that met 409, feed the existing object with `set_eip` first.
        """
        for address in sorted(self._owned.get(action.service, {}), key=int):
            if address in self._in_flight:
                self.remove_eip(address)
        if isinstance(action, Refused):
            self._decisions.pop(action.service, None)
        self._dirty.add(action.service)

    def _own(self, eip: Eip) -> None:
        self._eips[eip.address] = eip
        self._owned.setdefault(eip.owner, {})[eip.address] = eip
        self._supply.use(eip.address)

    def _disown(self, eip: Eip) -> None:
        del self._eips[eip.address]
        owned = self._owned[eip.owner]
        del owned[eip.address]
        if not owned:
            del self._owned[eip.owner]
        self._dirty.add(eip.owner)

    # What people ask

    @property
    def pending(self) -> bool:
        """Whether `plan()` may have something to say."""
        return bool(self._dirty)

    def decision(self, ref: ObjectRef) -> Decision | None:
        """What was last decided about a Service."""
        return self._decisions.get(ref)

    def decisions(self) -> dict[ObjectRef, Decision]:
        """What was last decided, for every Service that is known."""
        return dict(self._decisions)

    def usage(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and addresses in use (in whatever phase) of each pool, in file order."""
        return self._supply.usage()

    def owned(self, ref: ObjectRef) -> tuple[Eip, ...]:
        """The EIP objects of a namespace/name, sorted by address."""
        return tuple(sorted(self._owned.get(ref, {}).values(), key=_by_address))

    # What follows from it

    def plan(self) -> tuple[Action, ...]:
        """What has to be done about everything that changed since the last call."""
        self._wake()
        dirty, self._dirty = self._dirty, set()
        actions: list[Action] = []
        gone = sorted(ref for ref in dirty if ref not in self._services)
        for ref in gone:
            actions += self._take_back(ref, None, Reason.RELEASED)
        here = sorted((self._services[ref] for ref in dirty - set(gone)), key=self._key)
        for service in here:
            why = not_ours(service)
            if why is None:
                actions += self._serve(service)
            else:
                actions += self._take_back(service.ref, service, why)
        return tuple(actions)

    def _key(self, service: Service) -> _Key:
        """Order of a batch. An address in the status is a claim too: a restored cluster's."""
        named = service.requested is not None or any(
            self._supply.pool_of(address) for address in service.ingress
        )
        return not named, service.created_s, service.ref.namespace, service.ref.name

    def _wake(self) -> None:
        """As many of those who wait as there are free addresses, the first in line first."""
        for family, queue in self._queue.items():
            free = self._supply.free(family)
            while free > 0 and queue:
                _, ref = heapq.heappop(queue)
                if ref in self._starved[family]:
                    self._starved[family].discard(ref)
                    # One that changed is looked at anyway, and may want no address any more.
                    free -= ref not in self._dirty
                    self._dirty.add(ref)

    def _wait(self, service: Service, family: int) -> None:
        if service.ref not in self._starved[family]:
            self._starved[family].add(service.ref)
            queue = self._queue[family]
            heapq.heappush(queue, (self._key(service), service.ref))
            if len(queue) > 2 * len(self._starved[family]) + 64:  # left behind by changes
                queue[:] = {entry for entry in queue if entry[1] in self._starved[family]}
                heapq.heapify(queue)

    def _forget_waiting(self, ref: ObjectRef) -> None:
        self._refused.discard(ref)
        for starved in self._starved.values():
            starved.discard(ref)

    def _take_back(self, ref: ObjectRef, service: Service | None, why: Reason) -> list[Action]:
        """The Service is gone or not ours: its EIPs go the long way round (`core.release`)."""
        self._forget_waiting(ref)
        if service is None:
            self._decisions.pop(ref, None)
        else:
            self._decisions[ref] = Decision(why, f"Service {ref}: {SENTENCE[why]}")
        owned = self.owned(ref)
        bound = [e for e in owned if e.phase is Phase.BOUND and e.address not in self._in_flight]
        if bound:
            return [ReleaseEip(ref, eip, Reason.RELEASING, service) for eip in bound]
        # A finalizer that was set just before its Service went, with no EIP made since. Other
        # controllers use the same one: it is taken off only where it keeps a Service from going.
        stranded = service is not None and service.deleting and not owned
        stranded = stranded and why is not Reason.OTHER_CLASS
        if service is not None and stranded and names.FINALIZER in service.finalizers:
            return [RemoveFinalizer(ref, service, Reason.RELEASED)]
        return []

    def _serve(self, service: Service) -> list[Action]:
        """Everything for one Service that is ours, in an order that is safe to stop in."""
        self._forget_waiting(service.ref)
        picks = [self._pick(service, family) for family in service.families]
        kept = [pick for pick in picks if pick.eip is not None]
        actions: list[Action] = []
        if kept and names.FINALIZER not in service.finalizers:
            actions.append(AddFinalizer(service.ref, service, kept[0].reason))
        for pick in kept:
            actions += self._bind(service, pick)
        addresses = tuple(pick.eip.address for pick in kept if pick.eip is not None)
        actions += self._status(service, addresses, kept)
        for eip in self.owned(service.ref):
            extra = eip.phase is Phase.BOUND and eip.address not in addresses
            if extra and eip.address not in self._in_flight:
                actions.append(ReleaseEip(service.ref, eip, Reason.RELEASING, service))
        return actions + self._decide(service, picks, addresses)

    def _bind(self, service: Service, pick: _Pick) -> list[Action]:
        eip, seen = pick.eip, pick.seen
        if eip is None or eip.address in self._in_flight:
            return []
        if eip == seen and eip.address in service.ingress:
            return []  # one that is not shown yet is bound anew first: see `core.actions`
        if seen is not None:
            return [RebindEip(service.ref, seen, eip, pick.reason)]
        self._in_flight[eip.address] = eip
        self._own(eip)
        return [CreateEip(service.ref, eip, pick.reason)]

    def _status(
        self, service: Service, addresses: tuple[Address, ...], kept: list[_Pick]
    ) -> list[Action]:
        if addresses:
            if set(addresses) == set(service.ingress):
                return []
            return [WriteStatus(service.ref, service, addresses, kept[0].reason)]
        # An address of ours without an EIP object behind it may be another Service's by now.
        # One that is in no pool was written by somebody else: leave it.
        if any(self._supply.pool_of(address) for address in service.ingress):
            return [ClearStatus(service.ref, service, Reason.RELEASED)]
        return []

    def _decide(
        self, service: Service, picks: list[_Pick], addresses: tuple[Address, ...]
    ) -> list[Action]:
        """Remember what was decided; say it once if something could not be given."""
        ref, before = service.ref, self._decisions.get(service.ref)
        missing = [pick for pick in picks if pick.sentence]
        if addresses and all(pick.reason is Reason.NO_POOL for pick in missing):
            missing = []  # dual-stack where the pools have one family only
        if not missing:
            said = ", ".join(str(address) for address in addresses)
            reason = picks[0].reason if picks[0].eip is not None else Reason.ALLOCATED
            if before is not None and before.addresses == addresses:
                reason = before.reason if before.reason is Reason.ALLOCATED else reason
            sentence = f"Service {ref} has {said}: {SENTENCE[reason]}"
            self._decisions[ref] = Decision(reason, sentence, addresses)
            return []
        self._refused.add(ref)
        sentence = "; ".join(dict.fromkeys(pick.sentence for pick in missing))
        now = Decision(missing[0].reason, sentence, addresses)
        self._decisions[ref] = now
        return [] if now == before else [Refused(ref, service, now.reason, sentence)]

    # One family

    def _pick(self, service: Service, family: int) -> _Pick:
        owned = [eip for eip in self.owned(service.ref) if eip.address.version == family]
        bound = [eip for eip in owned if eip.phase is Phase.BOUND and self._stays(service, eip)]
        have = min(
            bound, key=lambda e: (e.address not in service.ingress, int(e.address)), default=None
        )
        try:
            wish = requested_address(service)
        except ValueError:
            said = "spec.loadBalancerIP is not an IP address"
            return self._refuse(service, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        if wish is not None and wish.version != family:
            wish = None if wish.version in service.families else wish
        if wish is not None and (have is None or have.address != wish):
            return self._pick_wish(service, wish, have)
        if have is not None and self._supply.config and not self._supply.pool_of(have.address):
            said = f"it has {have.address}, which is in none of the accepted pools"
            return self._refuse(service, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        if have is not None:
            return _Pick(replace(have, owner_uid=service.uid), have)
        for eip in sorted(owned, key=lambda e: (e.address not in service.ingress, int(e.address))):
            if self._supply.pool_of(eip.address) is not None:
                return self._rebound(service, eip)
        for address in sorted(service.ingress, key=int):
            if address.version == family and self._supply.is_free(address):
                return self._new(service, address, Reason.RESTORED)
        return self._pick_any(service, family)

    def _stays(self, service: Service, eip: Eip) -> bool:
        """Not so for one that nobody was told of and nobody will announce: a frozen leader's,
        made by a configuration that is no longer in force."""
        shown = eip.address in service.ingress or self._supply.config is None
        return shown or self._supply.pool_of(eip.address) is not None

    def _pick_wish(self, service: Service, wish: Address, have: Eip | None) -> _Pick:
        """An address asked for. The old one is kept until the new one can be had."""
        if wish.version not in service.families:
            said = f"{wish} is asked for, but the Service has no IPv{wish.version} family"
            return self._refuse(service, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        mine = self._owned.get(service.ref, {}).get(wish)
        pool = self._supply.pool_of(wish)
        if mine is not None and pool is not None:
            return self._rebound(service, mine)
        if self._supply.config is None:
            return self._refuse(service, have, Reason.WAITING_FOR_CONFIG, "")
        if pool is None or self._supply.is_forbidden(wish):
            said = f"{wish} is asked for, but it is in none of the accepted pools"
            if pool is not None:
                said = f"{wish} is asked for, but it belongs to the cluster itself"
            return self._refuse(service, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        if not self._supply.is_free(wish):
            self._wishes.setdefault(wish, set()).add(service.ref)
            holder = self._eips[wish]
            said = f"{wish} is asked for, but Service {holder.owner} holds it"
            if holder.phase is Phase.RELEASING:
                said = f"{wish} is asked for, but Service {holder.owner} is still giving it back"
            return self._refuse(service, have, Reason.ADDRESS_TAKEN, said)
        return self._new(service, wish, Reason.ALLOCATED)

    def _pick_any(self, service: Service, family: int) -> _Pick:
        if self._supply.config is None:
            return self._refuse(service, None, Reason.WAITING_FOR_CONFIG, "")
        found = self._supply.first(family)
        if found is not None:
            return self._new(service, found[1], Reason.ALLOCATED)
        pools = self._supply.auto_pools(family)
        if not pools:
            said = f"no pool gives out IPv{family} addresses without being asked for one"
            return self._refuse(service, None, Reason.NO_POOL, said)
        self._wait(service, family)
        said = f"every IPv{family} address of {', '.join(pools)} is taken"
        return self._refuse(service, None, Reason.POOL_EXHAUSTED, said)

    def _new(self, service: Service, address: Address, reason: Reason) -> _Pick:
        pool = self._supply.pool_of(address) or ""
        return _Pick(Eip(address, pool, service.ref, service.uid), None, reason)

    def _rebound(self, service: Service, seen: Eip) -> _Pick:
        pool = self._supply.pool_of(seen.address) or seen.pool
        eip = Eip(seen.address, pool, service.ref, service.uid, version=seen.version)
        return _Pick(eip, seen)

    def _refuse(self, service: Service, have: Eip | None, reason: Reason, said: str) -> _Pick:
        kept = replace(have, owner_uid=service.uid) if have is not None else None
        sentence = f"Service {service.ref}: {said or SENTENCE[reason]}"
        return _Pick(kept, have, reason, sentence)


def _by_address(eip: Eip) -> tuple[int, int]:
    return eip.address.version, int(eip.address)
