"""Which Service has which address.

Rules: an EIP object that exists is the truth, whoever made it; addresses once given do not move;
what exists is restored before anything new is given. A batch is served in the order of
creationTimestamp, then namespace/name, those first that name an address; so the result does not
depend on the order of arrival. Nothing on the path of one change is proportional to the number of
Services. `core.choosing` has the rules for one Service, `core.tenancy` those of the pools.

Use: feed every change (`set_service`, `set_eip` …; all EIP objects and Services before the first
plan), call `plan()`, carry out all of it, feeding each written object back (`set_eip` with the
API server's answer), then call it again when something changed. After a failed action call
`failed(action)`; on a 409 feed the fresh object first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from lbctl.core import names
from lbctl.core.actions import (
    Action,
    AddFinalizer,
    ClearStatus,
    CreateEip,
    LeaveEip,
    RebindEip,
    Refused,
    ReleaseEip,
    RemoveFinalizer,
    Told,
    WriteStatus,
)
from lbctl.core.annotations import asked
from lbctl.core.choosing import Chooser, Pick, one_family, without
from lbctl.core.classes import class_rule, not_ours, was_ours
from lbctl.core.config import Config
from lbctl.core.holdings import Decision, Holdings, Record
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service
from lbctl.core.reasons import Reason
from lbctl.core.supply import Forbidden, Free, Supply
from lbctl.core.waiting import Key, Waiting

_HOW_IT_CAME: Final = (Reason.ALLOCATED, Reason.RECREATED)


def plan(
    config: Config | None,
    services: Iterable[Service],
    eips: Iterable[Eip],
    forbidden: Iterable[Forbidden] = (),
    labels: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[Action, ...]:
    """What has to be done, given everything. The same for any order of the arguments.

    labels: of the namespaces. What statuses claim without an EIP comes alone, the rest after it.
    """
    allocator = Allocator(config, forbidden)
    for name, found in (labels or {}).items():
        allocator.set_namespace(name, found)
    for eip in eips:
        allocator.set_eip(eip)
    for service in services:
        allocator.set_service(service)
    return allocator.plan()


class Allocator:
    """The incremental form of `plan`."""

    def __init__(self, config: Config | None = None, forbidden: Iterable[Forbidden] = ()) -> None:
        self._supply = Supply(config, forbidden)
        self._held = Holdings(self._supply)
        self._chooser = Chooser(self._held)
        self._waiting = Waiting()
        self._dirty: list[Record] = []
        self._refused: set[ObjectRef] = set()
        self._rule = class_rule(config)

    # What is known

    def configure(self, config: Config | None, forbidden: Iterable[Forbidden] = ()) -> None:
        """The accepted configuration (None before the first) and what is never given out."""
        before = self._supply.config
        if not self._supply.configure(config, forbidden):
            return
        self._rule = class_rule(config)
        self._mark_all(self._refused)
        before_rule = (before.services, before.takeover) if before is not None else None
        if config is None or before_rule != (config.services, config.takeover):
            self._mark_all(self._held.records)
        if before != config:
            for eip in self._held.eips.values():
                pool = self._supply.pool_of(eip.address)
                if pool is None or pool.name != eip.pool:
                    self._mark_all(eip.members)

    def set_namespace(self, name: str, labels: Mapping[str, str] | None) -> None:
        """The labels of a namespace, None if it is gone."""
        if self._supply.set_namespace(name, labels):
            self._mark_all(ref for ref in self._refused if ref.namespace == name)

    def set_service(self, service: Service) -> None:
        """A Service appeared or changed."""
        record = self._held.record(service.ref)
        before = record.service
        record.service = service  # even if equal: its version may be newer
        if before is None or before != service:
            record.asked = asked(service)
            self._mark(record)
            gone = before.cluster_ips if before is not None else ()
            if gone or service.cluster_ips:
                self._keep_off(service.cluster_ips, gone)
            for eip in record.eips:
                if eip.sharing_key:  # its ports count for the others
                    self._mark_all(eip.members)
                    self._mark_all(self._held.wishes.get(eip.address, ()))
                    self._mark_all(self._held.seekers.pop(eip.sharing_key, ()))

    def remove_service(self, ref: ObjectRef) -> None:
        """A Service is gone."""
        record = self._held.records.get(ref)
        if record is not None and record.service is not None:
            self._keep_off((), record.service.cluster_ips)
            record.service = None
            self._mark(record)

    def _keep_off(self, now: Iterable[Address], before: Iterable[Address]) -> None:
        """ClusterIPs, of whatever Service, are never given out."""
        for address in now:
            self._supply.forbid(address)
            self._mark_all(self._held.wishes.pop(address, ()))
        for address in before:
            self._mark_all(self._held.wishes.pop(address, ()))
            if self._supply.allow(address):
                self._mark_all(self._refused)

    def set_eip(self, eip: Eip) -> None:
        """An EIP object appeared or changed."""
        self._mark_all(self._held.answered(eip.address))
        before = self._held.put(eip)
        if before != eip:
            self._mark_all(eip.members)
            self._mark_all(self._held.seekers.pop(eip.sharing_key, ()))
        if before is not None and before.members != eip.members:
            self._mark_all(before.members)

    def remove_eip(self, address: Address) -> None:
        """An EIP object is gone: its address is free, and who waits for it is served."""
        waiting = self._held.answered(address)
        before = self._held.drop(address)
        if before is not None:
            self._mark_all(before.members)
        self._mark_all(waiting)

    def failed(self, action: Action) -> None:
        """An action, and with it the rest of its Service's, was not carried out; plan it again.

        For a CreateEip that met 409, feed the existing object with `set_eip` first.
        """
        ref = action.service
        record = self._held.record(ref)
        for address in record.new:
            self.remove_eip(address)
        for address in record.planned:
            self._mark_all(self._held.answered(address))
        if isinstance(action, Refused):
            record.decision = None
        self._mark(record)

    def _mark(self, record: Record) -> None:
        if not record.dirty:
            record.dirty = True
            self._dirty.append(record)

    def _mark_all(self, refs: Iterable[ObjectRef]) -> None:
        for ref in refs:
            record = self._held.records.get(ref)
            if record is not None and not record.dirty:
                record.dirty = True
                self._dirty.append(record)

    # What people ask

    def decision(self, ref: ObjectRef) -> Decision | None:
        """What was last decided about a Service."""
        record = self._held.records.get(ref)
        return record.decision if record is not None else None

    def decisions(self) -> dict[ObjectRef, Decision]:
        """What was last decided, for every Service that is known."""
        return {
            ref: record.decision
            for ref, record in self._held.records.items()
            if record.decision is not None
        }

    def free(self) -> dict[str, dict[int, int]]:
        """How many addresses each pool can still give to who asks for none of them, by family."""
        return self._supply.free()

    def owned(self, ref: ObjectRef) -> tuple[Eip, ...]:
        """The EIP objects that a namespace/name is on, sorted by address."""
        record = self._held.records.get(ref)
        return record.eips if record is not None else ()

    # What follows from it

    def plan(self) -> tuple[Action, ...]:
        """What has to be done about everything that changed since the last call."""
        actions: list[Action] = []
        while True:
            self._wake()
            if not self._dirty:
                return tuple(actions)
            dirty, self._dirty = self._dirty, []
            gone: list[tuple[Record, Reason]] = []
            here: list[Record] = []
            claiming: list[Record] = []
            for record in dirty:
                record.dirty = False
                if (why := self._not_ours(record)) is not None:
                    gone.append((record, why))
                    continue
                here.append(record)
                if record.claims or (record.eips and record.differs):
                    claiming.append(record)
            for record, why in sorted(gone, key=lambda pair: self._key(pair[0])):
                actions += self._take_back(record, record.service, why)
            here.sort(key=self._key)
            if claims := self._claims(claiming):
                for record in here:
                    self._mark(record)
                return (*actions, *claims)
            for record in here:
                self._look(record, actions)

    def _claims(self, claiming: list[Record]) -> list[Action]:
        """What a status shows without an EIP, and a changed key, come first, everything else in the
        next plan: nobody gets what one that claims has yet to be given, or what could be shared."""
        claims: list[Action] = []
        for record in sorted(claiming, key=lambda r: self._key(r)[1:]):
            service = record.service
            assert service is not None
            picks = [pick for pick in self._chooser.picks(record, service, True) if pick.eip]
            if any(pick.eip is not pick.seen for pick in picks):
                carry = self._carry if record.claims else self._set_aside
                carry(record, service, picks, claims)
        return claims

    def _not_ours(self, record: Record) -> Reason | None:
        """Why it gives back what it has, None for a Service of ours."""
        service = record.service
        if service is None:
            return Reason.RELEASED
        why = not_ours(service, self._rule)
        return None if why is Reason.OTHER_CLASS and was_ours(service, record.eips) else why

    def _look(self, record: Record, todo: list[Action]) -> None:
        service = record.service
        assert service is not None
        if record.is_plain and not self._supply.reserved:
            found = self._supply.first(service, service.families[0])
            if isinstance(found, Free):
                self._give(record, service, found, todo)
                return
        self._carry(record, service, self._chooser.picks(record, service), todo)

    def _give(self, record: Record, service: Service, free: Free, todo: list[Action]) -> None:
        """What `_carry` would do, with less ado: most Services of a large batch are plain."""
        ref, address = service.ref, free.address
        eip, addresses = Eip(address, free.pool, ref, service.uid), (address,)
        if mark := _to_mark(service, free.pool):
            todo.append(AddFinalizer(ref, service, Reason.ALLOCATED, mark))
        self._held.create(record, eip)
        todo.append(CreateEip(ref, eip, Reason.ALLOCATED))
        todo.append(WriteStatus(ref, service, addresses, Reason.ALLOCATED))
        record.decision = Decision(ref, Reason.ALLOCATED, "", addresses)

    def _key(self, record: Record) -> Key:
        """Order of a batch: who is gone, who names an address or has one reserved, the others."""
        service, ref, reserved = record.service, record.ref, self._supply.reserved
        if service is None:
            return False, -1.0, ref.namespace, ref.name
        named = record.asked.addresses or (reserved and ref in reserved)
        return not named, service.created_s, ref.namespace, ref.name

    def _wake(self) -> None:
        """As many of those who wait as can be served, the first in line first."""
        freed = self._supply.freed
        for line in sorted(freed, key=lambda line: (line[0], str(line[1]))):
            woken = self._waiting.wake(line, self._supply.capacity(line))
            if not woken:
                freed.discard(line)
            self._mark_all(woken)

    def _settle(self, record: Record) -> None:
        """It waits for nothing any more, as far as is known."""
        record.refused = False
        self._refused.discard(record.ref)
        self._waiting.leave(record.ref)

    def _take_back(self, record: Record, service: Service | None, why: Reason) -> list[Action]:
        """The Service is gone or not ours: its EIPs go the long way round (`core.release`), or to
        those that it shares them with."""
        if record.refused:
            self._settle(record)
        record.decision = Decision(record.ref, why) if service is not None else None
        actions: list[Action] = []
        left = 0
        for eip in record.eips:
            given_up = self._give_up(record, eip, service)
            left += not (eip.sharers and given_up)
            actions += given_up
        if service is None:
            if not record.eips:
                self._held.records.pop(record.ref, None)
            return actions
        if left or why is Reason.OTHER_CLASS:
            return actions
        # A finalizer that was set just before its Service went, with no EIP made since. Other
        # controllers use the same one: it is taken off only where it keeps a Service from going,
        # or where ours was the address that it was set for.
        if actions and service.ingress:
            actions.append(ClearStatus(record.ref, service, Reason.RELEASED))
        if (actions or service.deleting) and names.FINALIZER in service.finalizers:
            actions.append(RemoveFinalizer(record.ref, service, Reason.RELEASED))
        return actions

    def _give_up(self, record: Record, eip: Eip, service: Service | None) -> list[Action]:
        """One address less for a Service."""
        ref = record.ref
        if eip.phase is not Phase.BOUND or eip.address in record.new:
            return []
        if not eip.sharers:
            self._held.expect(record, replace(eip, phase=Phase.RELEASING))  # nobody joins it now
            return [ReleaseEip(ref, eip, Reason.RELEASING, service)]
        if self._held.busy(eip.address, ref):
            self._held.wishes.setdefault(eip.address, set()).add(ref)
            return []
        left = without(eip, ref)
        self._held.expect(record, left)
        return [LeaveEip(ref, eip, left, Reason.RELEASING, service)]

    def _carry(
        self, record: Record, service: Service, picks: list[Pick], todo: list[Action]
    ) -> None:
        """Everything for one Service that is ours, in an order that is safe to stop in."""
        if record.refused:
            self._settle(record)
        record.joins = ()
        pools: list[str] = []
        addresses: tuple[Address, ...] = ()
        first: Pick | None = None
        for pick in picks:
            eip, seen = pick.eip, pick.seen
            if eip is None:
                continue
            if seen is not None and self._busy(record, service, eip, pick):
                self._set_aside(record, service, picks, todo)
                return
            first = first or pick
            addresses += (eip.address,)
            if eip.pool not in pools:
                pools.append(eip.pool)
        if first is not None and (mark := _to_mark(service, ",".join(pools))):
            todo.append(AddFinalizer(service.ref, service, first.reason, mark))
        for pick in picks:
            if pick.eip is not None:
                self._bind(record, service, pick.eip, pick, todo)
        if addresses != service.ingress:
            self._status(record, service, addresses, first, todo)
        for eip in record.eips:
            if eip.address not in addresses:
                todo += self._give_up(record, eip, service)
        self._decide(record, service, picks, addresses, todo)

    def _busy(self, record: Record, service: Service, eip: Eip, pick: Pick) -> bool:
        """Whether another Service is about to write the EIP: that comes first."""
        if eip == pick.seen and eip.address in service.ingress:
            return False
        if pick.busy:
            self._supply.expect(eip)
            record.joins = (*record.joins, eip.address)
        elif not self._held.busy(eip.address, service.ref):
            return False
        self._held.wishes.setdefault(eip.address, set()).add(service.ref)
        return True

    def _set_aside(
        self, record: Record, service: Service, picks: list[Pick], todo: list[Action]
    ) -> None:
        """While it waits in one family, nobody younger gets what it comes to have in the other."""
        for pick in picks:
            eip, seen = pick.eip, pick.seen
            if eip is None or eip == seen or (seen and self._busy(record, service, eip, pick)):
                continue
            if names.FINALIZER not in service.finalizers:
                todo.append(AddFinalizer(service.ref, service, pick.reason, eip.pool))
            self._bind(record, service, eip, pick, todo)

    def _bind(
        self, record: Record, service: Service, eip: Eip, pick: Pick, todo: list[Action]
    ) -> None:
        seen = pick.seen
        if seen is None:
            if eip.address not in record.new:
                self._held.create(record, eip)
                todo.append(CreateEip(service.ref, eip, pick.reason, pick.apart))
        elif eip.address not in record.new and (eip != seen or eip.address not in service.ingress):
            # one that is not shown yet is bound anew first: see `core.actions`
            self._held.expect(record, eip)
            reason = Reason.RESTORED if pick.refusal else pick.reason  # `Refused` says the refusal
            todo.append(RebindEip(service.ref, seen, eip, reason))

    def _status(
        self,
        record: Record,
        service: Service,
        addresses: tuple[Address, ...],
        first: Pick | None,
        todo: list[Action],
    ) -> None:
        ref, shown = service.ref, service.ingress
        if self._supply.adopting and not set(shown) <= set(addresses):
            return
        if first is not None:
            if len(addresses) != len(shown) or set(addresses) != set(shown):
                todo.append(WriteStatus(ref, service, addresses, first.reason))
                self._tell(record, service, todo)
            return
        # An address of ours without an EIP object behind it may be another Service's by now.
        # One that is in no pool was written by somebody else: leave it.
        mine = {eip.address for eip in record.eips}
        if any(address in mine or self._supply.pool_of(address) for address in shown):
            todo.append(ClearStatus(ref, service, Reason.RELEASED))
            self._tell(record, service, todo)

    def _tell(self, record: Record, service: Service, todo: list[Action]) -> None:
        """A status that showed what the Service does not have is replaced, and not silently."""
        for reason, said in self._chooser.lost(record, service):
            todo.append(Told(record.ref, service, reason, f"Service {record.ref}: {said}"))

    def _decide(
        self,
        record: Record,
        service: Service,
        picks: list[Pick],
        addresses: tuple[Address, ...],
        todo: list[Action],
    ) -> None:
        """Remember what was decided; say it once if something could not be given."""
        missing: list[Pick] = []
        for pick in picks:
            if pick.refusal:
                missing.append(pick)
        if missing:
            self._refuse(record, service, missing)
        ref, before = service.ref, record.decision
        if not missing or (addresses and not service.needs_both and one_family(missing)):
            reason = picks[0].reason if picks[0].eip is not None else Reason.ALLOCATED
            apart = "; ".join(p.apart for p in picks if p.apart) if record.asked.sharing else ""
            kept = before if before and before.addresses == addresses else None
            if kept and reason is Reason.RESTORED and kept.reason in _HOW_IT_CAME:
                reason, apart = kept.reason, kept.apart if record.asked.sharing else ""
            record.decision = Decision(ref, reason, "", addresses, apart)
            return
        sentence = "; ".join(dict.fromkeys(pick.refusal for pick in missing))
        record.decision = Decision(ref, missing[0].reason, sentence, addresses)
        if record.decision != before:
            todo.append(Refused(ref, service, missing[0].reason, sentence))

    def _refuse(self, record: Record, service: Service, missing: list[Pick]) -> None:
        """It is looked at again as soon as it may get what it has not, told of it or not."""
        record.refused = True
        self._refused.add(record.ref)
        if key := record.asked.sharing:
            self._held.seekers.setdefault(key, set()).add(record.ref)
        lines = [line for pick in missing for line in pick.lines]
        self._waiting.enter(record.ref, self._key(record), lines)
        for pick in missing:
            if pick.wish is not None:
                self._held.wishes.setdefault(pick.wish, set()).add(record.ref)


def _to_mark(service: Service, pools: str) -> str:
    """The pools to be written on a Service, "" if it has its finalizer and says so already."""
    if names.FINALIZER not in service.finalizers:
        return pools
    return pools if dict(service.annotations).get(names.ANNOTATION_POOL) != pools else ""
