"""Which address a Service gets in one family: the rules of docs/addresses.md, in their order.

What it has stays, and what its status shows counts as had, until it is asked away, and then until
the new one can be had. That is the address asked for (or reserved for the Service), else the one
that it is giving back, else one that it can share, else a free one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from msgspec import Struct, structs

from lbctl.core import sharing, tenancy
from lbctl.core.annotations import Asked, value_of
from lbctl.core.config_pools import Pool
from lbctl.core.holdings import Holdings, Record
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service, Sharer
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.supply import Free, Line


class Pick(Struct, frozen=True, gc=False):
    """The answer for one family: an EIP (`seen` if it exists already), or why there is none.

    refusal: why it is not what the Service asks for. lines, wish: what may change that. busy:
    another Service's write to this address has to come first, `eip` is then what follows it.
    apart: why it is a new one of its own, though another has the sharing key.
    """

    eip: Eip | None
    seen: Eip | None = None
    reason: Reason = Reason.RESTORED
    refusal: str = ""
    lines: tuple[Line, ...] = ()
    wish: Address | None = None
    busy: Address | None = None
    apart: str = ""


class Chooser:
    """Decides upon `holdings`; changes nothing."""

    def __init__(self, holdings: Holdings) -> None:
        self._held = holdings
        self._supply = holdings.supply

    def picks(self, record: Record, service: Service, claims: bool = False) -> list[Pick]:
        """For each family its address. What the first one gets counts for the quota of the other.
        claims: only what it has, by its key, and what its status shows beside that."""
        wanted, choose = record.asked, self._claimed if claims else self.pick
        found: list[Pick] = []
        for family in service.families:
            first = found[0].eip if found else None
            if first is not None:
                self._supply.lend(first, 1)
            found.append(choose(record, service, wanted, family))
            if first is not None:
                self._supply.lend(first, -1)
        return found

    def _claimed(self, record: Record, service: Service, asked: Asked, family: int) -> Pick:
        have = self._have(record, service, family)
        if have is None:
            return self.claim(record, service, asked, family)
        return Pick(self._own(service, have, None if asked.problem else asked), have)

    def pick(self, record: Record, service: Service, asked: Asked, family: int) -> Pick:
        """The address of one family."""
        if self._supply.adopting and (adopted := self._adopt(record, service, asked, family)):
            return adopted
        have = self._have(record, service, family) if record.eips else None
        if have is None and service.ingress:
            claimed = self.claim(record, service, asked, family)
            if claimed.eip is not None:
                return claimed
        if asked.problem is not None:
            return self._refuse(service, None, have, *asked.problem)
        if asked.addresses and (said := _no_family(service, asked)):
            return self._refuse(service, asked, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        wish, why = asked.address(family) if asked.addresses else None, "is asked for"
        reserved = self._supply.reserved
        if reserved and wish is None and have is None:
            kept = reserved.get(service.ref, {}).get(family)
            if kept is not None and not self._elsewhere(asked, kept):
                wish, why = kept, "is reserved for it"
        stays = have if have is not None and not self._elsewhere(asked, have.address) else None
        if wish is not None and (stays is None or stays.address != wish):
            return self._wish(record, service, asked, wish, why, have)
        if stays is not None:
            return self._keep(service, asked, stays)
        for eip in record.eips:
            if eip.address.version == family and self._returns(service, eip.address, asked):
                return self._rebound(service, asked, eip)
        return self._new_one(service, asked, family, have)

    def _adopt(self, record: Record, service: Service, asked: Asked, family: int) -> Pick | None:
        """`takeover: adopt`: what the status shows stays, whatever the rules of giving say.

        None if that is not so, or the status shows nothing of this family.
        """
        shown = sorted((a for a in service.ingress if a.version == family), key=int)
        if not shown:
            return None
        for eip in record.eips:
            if eip.address in shown and eip.phase is Phase.BOUND:
                kept = self._own(service, eip, asked)
                return Pick(kept, eip, Reason.SHARED if eip.sharers else Reason.RESTORED)
        address, holder = shown[0], self._held.eips.get(shown[0])
        if self._supply.pool_of(address) is None:
            why = "which is in no pool"
        elif self._supply.is_forbidden(address):
            why = "which belongs to the cluster itself"
        elif holder is None:
            return self._new(service, asked, address, Reason.ADOPTED)
        elif holder in record.eips:
            return self._rebound(service, asked, holder)
        else:
            joined = self._join(service, asked, holder) if asked.sharing else None
            if isinstance(joined, Pick):
                return joined
            why = f"which Service {holder.owner} holds"
        said = f"its status shows {address}, {why}; it is left as it is"
        return self._refuse(service, asked, None, Reason.NOT_ADOPTED, said, wish=address)

    def _have(self, record: Record, service: Service, family: int) -> Eip | None:
        """The EIP of a family that is its own now."""
        return min(
            (
                eip
                for eip in record.eips
                if eip.phase is Phase.BOUND
                and eip.address.version == family
                and self._stays(service, eip)
            ),
            key=lambda e: (e.address not in service.ingress, int(e.address)),
            default=None,
        )

    def _stays(self, service: Service, eip: Eip) -> bool:
        """Not so for what its pool gave up, and for one that nobody was told of and nobody will
        announce: a frozen leader's, made by a configuration that is no longer in force."""
        if self._supply.config is None or self._supply.pool_of(eip.address) is not None:
            return True
        return eip.address in service.ingress and not self._released(eip)

    def _released(self, eip: Eip) -> bool:
        """Whether its pool gave it up."""
        config = self._supply.config
        if config is None or self._supply.pool_of(eip.address) is not None:
            return False
        return config.lets_go(eip.pool)

    def lost(self, record: Record, service: Service) -> Iterator[tuple[Reason, str]]:
        """What a status shows that its Service does not have, each with the reason and in words."""
        mine = {eip.address: eip for eip in record.eips}
        for address in service.ingress:
            if address in mine:
                if self._released(mine[address]):
                    yield Reason.POOL_RELEASED, f"its pool gave up {address}"
            elif (holder := self._held.eips.get(address)) is not None:
                said = f"its status showed {address}, which Service {holder.owner} has"
                yield Reason.CLAIM_LOST, said
            else:
                said = f"its status showed {address}, which it does not have"
                yield Reason.STATUS_OVERWRITTEN, said
        for name in service.host_names:
            said = f"its status showed host name {value_of(name)}, which it does not have"
            yield Reason.STATUS_OVERWRITTEN, said

    def _elsewhere(self, asked: Asked, address: Address) -> bool:
        """Whether another pool is asked for."""
        pool = self._supply.pool_of(address)
        return pool is not None and asked.pool not in ("", pool.name)

    def _keep(self, service: Service, asked: Asked, have: Eip) -> Pick:
        pool = self._supply.pool_of(have.address)
        if self._supply.config is not None and pool is None:
            said = f"it has {have.address}, which is in none of the accepted pools"
            return self._refuse(service, asked, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        kept = self._own(service, have, asked)
        if have.sharers:
            said = sharing.clash(self._before(service, have), service)
            if asked.sharing != have.sharing_key:
                said = "its sharing key changed, but others are on the address, which it keeps"
            if said:
                sentence = f"Service {service.ref} on {have.address}: {said}"
                return Pick(kept, have, Reason.SHARING_REFUSED, sentence)
        return Pick(kept, have, Reason.SHARED if have.sharers else Reason.RESTORED)

    def _before(self, service: Service, eip: Eip) -> list[Service]:
        """The members that came before a Service: it gives way to them."""
        found = self._held.members(eip)
        at = [member.ref for member in found].index(service.ref)
        return found[:at]

    def _own(self, service: Service, have: Eip, asked: Asked | None = None) -> Eip:
        """The EIP with what may have changed about this member."""
        eip = have
        if eip.uid_of(service.ref) != service.uid:
            eip = _with_uid(eip, service)
        pool = self._supply.pool_of(eip.address)
        if pool is not None and pool.name != eip.pool:
            eip = replace(eip, pool=pool.name)
        if asked is not None and not eip.sharers and eip.sharing_key != asked.sharing:
            eip = replace(eip, sharing_key=asked.sharing)
        return eip

    def claim(self, record: Record, service: Service, asked: Asked, family: int) -> Pick:
        """A status is believed as far as the rules allow: then nobody moves in a cluster that was
        restored without `eips`, whatever else is asked for."""
        if self._supply.adopting and (adopted := self._adopt(record, service, asked, family)):
            return adopted
        for address in sorted(service.ingress, key=int):
            holder = self._held.eips.get(address)
            if address.version != family or not self._returns(service, address):
                continue
            if holder in record.eips:
                return self._rebound(service, asked, holder)
            if holder is not None:
                joined = self._join(service, asked, holder) if asked.sharing else None
                if isinstance(joined, Pick):
                    return joined
            elif self._supply.has_room(address, service.ref.namespace):
                return self._new(service, asked, address, Reason.RESTORED)
        return Pick(None)

    def _returns(self, service: Service, address: Address, asked: Asked | None = None) -> bool:
        """Whether a Service may still have what it had, or what its status shows."""
        config, pool = self._supply.config, self._supply.pool_of(address)
        if config is None or pool is None or self._supply.is_forbidden(address):
            return False
        if asked is not None and asked.pool not in ("", pool.name):
            return False
        if pool.drain and address not in service.ingress:
            return False
        labels = self._supply.labels(service.ref.namespace)
        return tenancy.may_have(config, pool, service, labels, address) is None

    def _wish(
        self,
        record: Record,
        service: Service,
        asked: Asked,
        wish: Address,
        why: str,
        have: Eip | None,
    ) -> Pick:
        """An address asked for. The old one is kept until the new one can be had."""
        config, pool = self._supply.config, self._supply.pool_of(wish)
        if config is None:
            return self._refuse(service, asked, have, Reason.WAITING_FOR_CONFIG, "")
        mine = next((eip for eip in record.eips if eip.address == wish), None)
        if pool is None or self._supply.is_forbidden(wish):
            said = f"{wish} {why}, but it is in none of the accepted pools"
            if pool is not None:
                said = f"{wish} {why}, but it belongs to the cluster itself"
            return self._refuse(service, asked, have, Reason.ADDRESS_OUTSIDE_POOLS, said, wish=wish)
        if asked.pool not in ("", pool.name):
            said = f"{wish} {why}, but it is not in pool {value_of(asked.pool)}, asked for as well"
            return self._refuse(service, asked, have, Reason.ADDRESS_OUTSIDE_POOLS, said)
        labels = self._supply.labels(service.ref.namespace)
        if mine is not None and self._returns(service, wish):
            return self._rebound(service, asked, mine)
        denial = tenancy.may_ask(config, pool, service, labels, wish)
        if denial is not None:
            return self._refuse(service, asked, have, *denial, wish=wish)
        holder = self._held.eips.get(wish)
        if holder is not None:
            return self._wish_held(service, asked, holder, why, have)
        credit = have is not None and have.pool == pool.name
        if not self._supply.has_room(wish, service.ref.namespace, credit):
            said, line = self._quota(pool, service), (pool.name, service.ref.namespace)
            return self._refuse(service, asked, have, Reason.QUOTA_EXCEEDED, said, (line,), wish)
        return self._new(service, asked, wish)

    def _wish_held(
        self, service: Service, asked: Asked, holder: Eip, why: str, have: Eip | None
    ) -> Pick:
        """An address asked for that somebody has: joined if it is shared, else waited for."""
        address, reason = holder.address, Reason.ADDRESS_TAKEN
        said = f"{address} {why}, but Service {holder.owner} holds it"
        if holder.phase is Phase.RELEASING:
            said = f"{address} {why}, but Service {holder.owner} is still giving it back"
        elif asked.sharing and holder.sharing_key:
            joined = self._join(service, asked, holder)
            if isinstance(joined, Pick):
                return joined
            reason, said = joined[0], f"{address} {why}, but {joined[1]}"
        line = (holder.pool, service.ref.namespace)
        lines = (line,) if reason is Reason.QUOTA_EXCEEDED else ()
        return self._refuse(service, asked, have, reason, said, lines, address)

    def _join(self, service: Service, asked: Asked, seen: Eip) -> Pick | tenancy.Denial:
        """Onto an address that others have, or why not. While its EIP is being written it is judged
        by what that will be, and is joined after."""
        busy = self._held.busy(seen.address, service.ref)
        eip = self._supply.planned.get(seen.address, seen) if busy else seen
        config, pool = self._supply.config, self._supply.pool_of(eip.address)
        if config is None or pool is None or eip.phase is not Phase.BOUND:
            return Reason.ADDRESS_TAKEN, "it is not in use"
        if eip.sharing_key != asked.sharing:
            return Reason.SHARING_REFUSED, "it is shared under another key"
        space, shown = service.ref.namespace, eip.address in service.ingress
        if not _may_share(pool, {space, *eip.namespaces}):
            said = f"pool {pool.name} does not let namespace {space} share with others"
            return Reason.SHARING_REFUSED, said
        if said := sharing.clash(self._held.members(eip), service):
            return Reason.SHARING_REFUSED, said
        if not (shown and self._supply.adopting):
            labels, rule = self._supply.labels(space), tenancy.admits if shown else tenancy.gives
            denial = rule(pool, service, labels)
            denial = denial or tenancy.may_have(config, pool, service, labels, eip.address)
            if denial is not None:
                return denial
            if space not in eip.namespaces and not self._supply.has_room(eip.address, space):
                return Reason.QUOTA_EXCEEDED, self._quota(pool, service)
        joined = replace(eip, sharers=(*eip.sharers, Sharer(service.ref, service.uid)))
        return Pick(joined, seen, Reason.SHARED, busy=seen.address if busy else None)

    def _new_one(self, service: Service, asked: Asked, family: int, have: Eip | None) -> Pick:
        """One that it can share, else a free one of the pool asked for, or of the pools that give
        by themselves."""
        lines: tuple[Line, ...] = ()
        apart = ""
        if asked.sharing:
            joined = self._shared(service, asked, family)
            if isinstance(joined, Pick):
                return joined
            lines, apart = joined
        if self._supply.config is None:
            return self._refuse(service, asked, have, Reason.WAITING_FOR_CONFIG, "")
        if asked.pool and (denial := self._pool_denied(service, asked.pool, family)):
            return self._refuse(service, asked, have, *denial, lines)
        found = self._supply.first(service, family, asked.pool)
        if isinstance(found, Free):
            new = self._new(service, asked, found.address, pool=found.pool)
            return structs.replace(new, apart=apart) if apart else new
        reason, said = self._none_free(service, family, found)
        return self._refuse(service, asked, have, reason, said, found + lines)

    def _shared(
        self, service: Service, asked: Asked, family: int
    ) -> Pick | tuple[tuple[Line, ...], str]:
        """One that it can share; or the quotas that it has to wait for, and in what it differs from
        the first of the key that it might share else, "" if there is none."""
        lines: list[Line] = []
        apart = ""
        joins = self._held.record(service.ref).joins  # chosen in its turn, before younger ones came
        for eip in sorted(self._held.shared(asked.sharing), key=lambda e: e.address not in joins):
            address = eip.address
            if self._elsewhere(asked, address) or self._supply.is_forbidden(address):
                continue
            if address.version == family:
                joined = self._join(service, asked, eip)
                if isinstance(joined, Pick):
                    return joined
                reason, said = joined
                if reason is Reason.QUOTA_EXCEEDED:
                    lines.append((eip.pool, service.ref.namespace))
                elif reason is Reason.SHARING_REFUSED and not apart:
                    pool = self._supply.pool_of(address)
                    if _may_share(pool, {service.ref.namespace, *eip.namespaces}):
                        apart = f"an address of its own, as it could not share {address}: {said}"
        return tuple(lines), apart

    def _pool_denied(self, service: Service, name: str, family: int) -> tenancy.Denial | None:
        config = self._supply.config
        pool = config.by_name.get(name) if config is not None else None
        if pool is None:
            return Reason.POOL_UNKNOWN, f"pool {value_of(name)} is asked for, but there is none"
        if not any(part.version == family for part in pool.addresses):
            return Reason.NO_POOL, f"pool {name} has no IPv{family} addresses"
        return tenancy.gives(pool, service, self._supply.labels(service.ref.namespace))

    def _none_free(self, service: Service, family: int, lines: tuple[Line, ...]) -> tenancy.Denial:
        """Why no pool has an address for it."""
        config = self._supply.config
        assert config is not None
        full = [pool for pool, what in lines if what == family]
        if full:
            return Reason.POOL_EXHAUSTED, f"no IPv{family} address of {', '.join(full)} is free"
        if lines:
            return Reason.QUOTA_EXCEEDED, self._quota(config.by_name[lines[0][0]], service)
        labels = self._supply.labels(service.ref.namespace)
        for pool in config.ranked:
            if pool.auto_assign and any(part.version == family for part in pool.addresses):
                denial = tenancy.gives(pool, service, labels)
                if denial is not None:
                    return denial
        said = f"no pool gives out IPv{family} addresses without being asked for one"
        return Reason.NO_POOL, said

    def _quota(self, pool: Pool, service: Service) -> str:
        limit = pool.quota_of(service.ref.namespace)
        return (
            f"namespace {service.ref.namespace} has as many addresses of pool {pool.name}"
            f" as its quota allows ({limit})"
        )

    def _new(
        self,
        service: Service,
        asked: Asked,
        address: Address,
        reason: Reason = Reason.ALLOCATED,
        pool: str = "",
    ) -> Pick:
        if not pool:
            found = self._supply.pool_of(address)
            pool = found.name if found is not None else ""
        eip = Eip(address, pool, service.ref, service.uid)
        if asked.sharing:
            eip = replace(eip, sharing_key=asked.sharing)
        return Pick(eip, None, reason)

    def _rebound(self, service: Service, asked: Asked, seen: Eip) -> Pick:
        if seen.sharers:
            return Pick(self._own(service, seen), seen, Reason.SHARED)
        pool = self._supply.pool_of(seen.address)
        eip = Eip(
            seen.address,
            pool.name if pool is not None else seen.pool,
            service.ref,
            service.uid,
            sharing_key=asked.sharing,
            version=seen.version,
        )
        same = seen.owner_uid == service.uid
        return Pick(eip, seen, Reason.RESTORED if same else Reason.RECREATED)

    def _refuse(
        self,
        service: Service,
        asked: Asked | None,
        have: Eip | None,
        reason: Reason,
        said: str,
        lines: tuple[Line, ...] = (),
        wish: Address | None = None,
    ) -> Pick:
        kept = self._own(service, have, asked) if have is not None else None
        sentence = f"Service {service.ref}: {said or SENTENCE[reason]}"
        return Pick(kept, have, reason, sentence, lines, wish)


def _may_share(pool: Pool | None, namespaces: set[str]) -> bool:
    """Whether Services of these namespaces may be on one address of a pool."""
    across = pool.share_across_namespaces if pool is not None else ()
    return len(namespaces) == 1 or namespaces <= set(across)


def _no_family(service: Service, asked: Asked) -> str:
    """Which address is asked for in vain, as the Service is not of its family; "" if none is."""
    for address in asked.addresses:
        if address.version not in service.families:
            return f"{address} is asked for, but the Service has no IPv{address.version} family"
    return ""


def one_family(missing: Iterable[Pick]) -> bool:
    """Dual stack where it is not a must, and the pools have one family only."""
    return all(pick.reason is Reason.NO_POOL for pick in missing)


def _with_uid(eip: Eip, service: Service) -> Eip:
    if eip.owner == service.ref:
        return replace(eip, owner_uid=service.uid)
    return replace(
        eip,
        sharers=tuple(
            replace(sharer, uid=service.uid) if sharer.ref == service.ref else sharer
            for sharer in eip.sharers
        ),
    )


def without(eip: Eip, ref: ObjectRef) -> Eip:
    """A shared EIP after a member has left it; the next one owns it."""
    if eip.owner != ref:
        rest = tuple(sharer for sharer in eip.sharers if sharer.ref != ref)
        return replace(eip, sharers=rest)
    first, *others = eip.sharers
    return replace(eip, owner=first.ref, owner_uid=first.uid, sharers=tuple(others))
