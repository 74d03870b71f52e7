"""Who has what: every Service that is known, its EIPs, and what is planned but not yet answered.

Rules: bookkeeping for the allocator, which decides; an EIP belongs to all of its members. One
record per namespace/name, so that a change costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from lbctl.core.annotations import NOTHING, Asked
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.supply import Supply


class Decision(Struct, frozen=True, gc=False):
    """What was decided about a Service; `said` is why it lacks what it asks for. apart: why its
    address is one of its own in spite of a sharing key. Both are "" if there is no such thing."""

    ref: ObjectRef
    reason: Reason
    said: str = ""
    addresses: tuple[Address, ...] = ()
    apart: str = ""

    @property
    def sentence(self) -> str:
        """For people."""
        if self.said or not self.addresses:
            return self.said or f"Service {self.ref}: {SENTENCE[self.reason]}"
        had = ", ".join(str(address) for address in self.addresses)
        return f"Service {self.ref} has {had}: {self.apart or SENTENCE[self.reason]}"


class Record(Struct, eq=False, gc=False):
    """What is known of one namespace/name. `asked` is what its Service asks for; `eips` are sorted
    by address; `planned` are the addresses whose EIP it is about to write, `new` those that have
    none yet and get one, `joins` those that it comes onto once another's write is done."""

    ref: ObjectRef
    service: Service | None = None
    asked: Asked = NOTHING
    eips: tuple[Eip, ...] = ()
    planned: tuple[Address, ...] = ()
    new: tuple[Address, ...] = ()
    joins: tuple[Address, ...] = ()
    decision: Decision | None = None
    refused: bool = False
    dirty: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its Service has one family, and asks for, has, shows and waits for nothing."""
        service = self.service
        if service is None or len(service.families) > 1 or service.host_names:
            return False
        return self.asked is NOTHING and not (self.eips or service.ingress or self.refused)

    @property
    def claims(self) -> bool:
        """Whether the status shows an address without an EIP, and a family has none."""
        if self.service is None or not self.service.ingress:
            return False
        bound = [eip.address for eip in self.eips if eip.phase is Phase.BOUND]
        families = self.service.families
        return len(bound) < len(families) and not set(self.service.ingress) <= set(bound)

    @property
    def differs(self) -> bool:
        """Whether it has an address alone under another key than it asks for."""
        key = self.asked.sharing
        return self.asked.problem is None and any(
            eip.sharing_key != key and not eip.sharers and eip.phase is Phase.BOUND
            for eip in self.eips
        )

    def add(self, eip: Eip) -> None:
        """One EIP more."""
        mine = (*self.eips, eip)
        self.eips = mine if len(mine) == 1 else tuple(sorted(mine, key=by_address))


class Holdings:
    """All records and EIPs.

    pending: which Service is about to write an EIP that exists. wishes: who wants to hear when
    something about an address changes. seekers: who would share one, by key.
    """

    def __init__(self, supply: Supply) -> None:
        self.supply = supply
        self.records: dict[ObjectRef, Record] = {}
        self.eips: Mapping[Address, Eip] = supply.eips
        self.pending: dict[Address, ObjectRef] = {}
        self.wishes: dict[Address, set[ObjectRef]] = {}
        self.seekers: dict[str, set[ObjectRef]] = {}
        self._keys: dict[str, set[Address]] = {}

    def record(self, ref: ObjectRef) -> Record:
        """The record of a namespace/name, made if there is none."""
        found = self.records.get(ref)
        if found is None:
            found = self.records[ref] = Record(ref)
        return found

    def service(self, ref: ObjectRef) -> Service | None:
        """A Service, None if it is gone."""
        found = self.records.get(ref)
        return found.service if found is not None else None

    def members(self, eip: Eip) -> list[Service]:
        """The Services on an address that exist, in the order in which they came."""
        found = (self.service(ref) for ref in eip.members)
        return [service for service in found if service is not None]

    def put(self, eip: Eip) -> Eip | None:
        """An EIP as it is now; what it was before."""
        before = self.supply.put(eip)
        if before is not None:
            self._unlink(before)
        for ref in eip.members:
            record = self.record(ref)
            record.add(eip)
        if eip.sharing_key:
            self._keys.setdefault(eip.sharing_key, set()).add(eip.address)
        return before

    def create(self, record: Record, eip: Eip) -> None:
        """An EIP of one Service that is planned."""
        address = eip.address
        record.new = (*record.new, address)
        record.add(eip)
        if eip.sharing_key:
            self._keys.setdefault(eip.sharing_key, set()).add(address)
        self.supply.take(eip)

    def drop(self, address: Address) -> Eip | None:
        """The EIP of an address is gone; what it was."""
        before = self.supply.drop(address)
        if before is not None:
            self._unlink(before)
        return before

    def _unlink(self, eip: Eip) -> None:
        for ref in eip.members:
            record = self.records[ref]
            record.eips = tuple(e for e in record.eips if e.address != eip.address)
        self._forget(eip)

    def _forget(self, eip: Eip) -> None:
        """A key that an EIP had, or was about to have."""
        if eip.sharing_key in self._keys:
            shared = self._keys[eip.sharing_key]
            shared.discard(eip.address)
            if not shared:
                del self._keys[eip.sharing_key]

    def shared(self, key: str) -> Iterable[Eip]:
        """The EIPs that have a sharing key or are about to have it, by address."""
        return sorted((self.eips[a] for a in self._keys.get(key, ())), key=by_address)

    def answered(self, address: Address) -> set[ObjectRef]:
        """Nothing about an address is under way any more; who wanted to hear of it."""
        ref = self._writer(address)
        if ref is not None:
            self.pending.pop(address, None)
            planned, now = self.supply.answered(address), self.eips.get(address)
            if planned is not None and (now is None or now.sharing_key != planned.sharing_key):
                self._forget(planned)
            record = self.records[ref]
            record.planned = tuple(a for a in record.planned if a != address)
            record.new = tuple(a for a in record.new if a != address)
        return self.wishes.pop(address, set()) if self.wishes else set()

    def expect(self, record: Record, eip: Eip) -> None:
        """A Service is about to make the EIP of an address this."""
        address = eip.address
        self.supply.expect(eip)
        if eip.sharing_key:
            self._keys.setdefault(eip.sharing_key, set()).add(address)
        if self.pending.get(address) != record.ref:
            self.pending[address] = record.ref
            record.planned = (*record.planned, address)

    def busy(self, address: Address, ref: ObjectRef) -> bool:
        """Whether another Service's write to the EIP of an address is under way."""
        return self._writer(address) not in (None, ref)

    def _writer(self, address: Address) -> ObjectRef | None:
        """Which Service is about to write the EIP of an address, new or not."""
        eip = self.eips.get(address)
        if eip is not None and address in self.records[eip.owner].new:
            return eip.owner
        return self.pending.get(address) if self.pending else None


def by_address(eip: Eip) -> tuple[int, int]:
    """Order of EIPs."""
    return eip.address.version, int(eip.address)
