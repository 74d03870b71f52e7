"""Which addresses can be given out: pools, less what is in use, less what must never be given.

Rules: pure bookkeeping for the allocator. A change costs O(log gaps), never O(addresses); only a
new configuration or a new set of forbidden addresses rebuilds everything. Pools are tried by
priority, then name. What is reserved, or avoided by `avoidBuggyIPs`, is not given by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from msgspec import Struct

from lbctl.core import tenancy
from lbctl.core.config import Config
from lbctl.core.config_pools import Pool
from lbctl.core.model import Address, Eip, Network, Service
from lbctl.core.space import Space, to_address

Forbidden = Address | Network

Line = tuple[str, int | str]
"""What a Service can wait for: an address of a pool's family, or a namespace's quota of a pool."""


class Free(Struct, frozen=True, gc=False):
    """An address that can be given."""

    pool: str
    address: Address


_NO_LABELS: Final[Mapping[str, str]] = {}


class _Stock:
    """A pool: what it can give by itself, and who has how much of it."""

    __slots__ = ("by_namespace", "name", "offers", "pool", "quota", "selects", "spaces")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.name = pool.name
        self.quota = bool(pool.quota)
        self.selects = bool(pool.service_selectors)
        self.spaces: dict[int, Space] = {}
        self.by_namespace: Counter[str] = Counter()
        for part in pool.addresses:
            space = self.spaces.setdefault(part.version, Space())
            for start, end in _runs(int(part.first), int(part.last), pool, part.version):
                space.add(start, end)
        for entry in pool.reserved:
            part = entry.addresses
            if part.version in self.spaces:
                self.spaces[part.version].remove(int(part.first), int(part.last))
        had = sorted(version for version, space in self.spaces.items() if space.free)
        self.offers = () if pool.drain else tuple(had)

    def gives(self, address: Address, config: Config) -> bool:
        """Whether it may be given to one that does not ask for it."""
        return not self.pool.avoids(address) and config.reserved_at(address) is None

    def take(self, eip: Eip) -> None:
        """One of its addresses gets an EIP object."""
        number = int(eip.address)
        self.spaces[eip.address.version].remove(number, number)
        if self.quota:
            self.by_namespace.update(eip.namespaces)

    def room(self, namespace: str) -> int:
        """How many addresses more a namespace may have."""
        limit = self.pool.quota_of(namespace) if self.quota else None
        return 1 << 30 if limit is None else limit - self.by_namespace[namespace]


class Supply:
    """Free addresses per pool and family, and every namespace's share.

    eips: every EIP object that exists or is about to be made; only read elsewhere. reserved: for
    whom which address, by family.
    """

    def __init__(self, config: Config | None = None, forbidden: Iterable[Forbidden] = ()) -> None:
        self.config = config
        self.forbidden = frozenset(forbidden)
        self._never: dict[int, Space] = {}
        self.eips: dict[Address, Eip] = {}
        self.planned: dict[Address, Eip] = {}  # what EIPs are about to become
        self._cluster: Counter[Address] = Counter()  # ClusterIPs; how many Services have it
        self._stocks: dict[str, _Stock] = {}
        self._labels: dict[str, Mapping[str, str]] = {}
        self._open: dict[tuple[str, int], tuple[_Stock, ...]] = {}
        self.freed: set[Line] = set()  # since the allocator last looked
        self._build()

    def _build(self) -> None:
        ranked = self.config.ranked if self.config else ()
        # `takeover: adopt`: what a status shows is somebody's in use, ours or not.
        self.adopting = self.config is not None and self.config.takeover == "adopt"
        self.reserved = self.config.owned if self.config else {}
        self._stocks = {pool.name: _Stock(pool) for pool in ranked}
        self._open.clear()
        self._never = {4: Space(), 6: Space()}
        for item in self.forbidden:
            low, high = _ends(item)
            self._never[item.version].add(low, high)
            for stock in self._stocks.values():
                if item.version in stock.spaces:
                    stock.spaces[item.version].remove(low, high)
        for address in self._cluster:
            self._withhold(address)
        for eip in self.eips.values():
            self._take(eip)
        for eip in self.planned.values():
            self.lend(eip, 1)

    def configure(self, config: Config | None, forbidden: Iterable[Forbidden]) -> bool:
        """Take a new configuration; True if anything differs from before."""
        wanted = frozenset(forbidden)
        if config == self.config and wanted == self.forbidden:
            return False
        self.config, self.forbidden = config, wanted
        self._build()
        return True

    def set_namespace(self, name: str, labels: Mapping[str, str] | None) -> bool:
        """The labels of a namespace, None if it is gone; True if they differ from before."""
        if self._labels.get(name) == labels:
            return False
        self._labels.pop(name, None)
        if labels is not None:
            self._labels[name] = labels
        self._open.clear()
        return True

    def labels(self, namespace: str) -> Mapping[str, str]:
        """The labels of a namespace, as far as they are known."""
        return self._labels.get(namespace, _NO_LABELS)

    def pool_of(self, address: Address) -> Pool | None:
        """The pool that holds the address, None without one."""
        return self.config.pool_of(address) if self.config else None

    def _stock_of(self, address: Address) -> _Stock | None:
        pool = self.pool_of(address)
        return self._stocks[pool.name] if pool is not None else None

    def take(self, eip: Eip) -> None:
        """A free address of the pool that it names gets an EIP object."""
        self.eips[eip.address] = eip
        self._stocks[eip.pool].take(eip)

    def put(self, eip: Eip) -> Eip | None:
        """An EIP object as it is now; what it was before."""
        before = self.eips.get(eip.address)
        if before is not None and before.namespaces == eip.namespaces:
            self.eips[eip.address] = eip
            return before
        if before is not None:
            self.drop(eip.address)
        self.eips[eip.address] = eip
        self._take(eip)
        return before

    def _take(self, eip: Eip) -> None:
        stock = self._stock_of(eip.address)
        if stock is not None:
            stock.take(eip)

    def drop(self, address: Address) -> Eip | None:
        """The address has no EIP object any more; what it was."""
        before, stock = self.eips.pop(address, None), self._stock_of(address)
        if before is not None and stock is not None:
            if stock.quota:
                stock.by_namespace.subtract(before.namespaces)
                self.freed.update((stock.name, space) for space in before.namespaces)
            self._put_back(address, stock)
        return before

    def expect(self, eip: Eip) -> None:
        """A write is planned that makes an EIP this: who comes onto the address by it counts for
        the quota already, until `answered`."""
        self.answered(eip.address)
        self.planned[eip.address] = eip
        self.lend(eip, 1)

    def answered(self, address: Address) -> Eip | None:
        """No write to the EIP of an address is planned any more; what was planned."""
        eip = self.planned.pop(address, None)
        if eip is not None:
            self.freed.update(self.lend(eip, -1))
        return eip

    def lend(self, eip: Eip, times: int) -> list[Line]:
        """Count who would come onto an address (1), or undo that (-1): whose quota it is."""
        stock, before = self._stock_of(eip.address), self.eips.get(eip.address)
        if stock is None or not stock.quota:
            return []
        coming = set(eip.namespaces).difference(before.namespaces if before else ())
        stock.by_namespace.update(dict.fromkeys(coming, times))
        return [(stock.pool.name, namespace) for namespace in coming]

    def _put_back(self, address: Address, stock: _Stock) -> None:
        if self.config is None or self.is_forbidden(address):
            return
        if stock.gives(address, self.config):
            stock.spaces[address.version].add(int(address), int(address))
            self.freed.add((stock.name, address.version))

    def forbid(self, address: Address) -> None:
        """A Service has it as its ClusterIP: it is not given out as long as that is so."""
        self._cluster[address] += 1
        if self._cluster[address] == 1:
            self._withhold(address)

    def allow(self, address: Address) -> bool:
        """Undo one `forbid`; True if an address of a pool can be given out by that."""
        self._cluster[address] -= 1
        if self._cluster[address] > 0:
            return False
        del self._cluster[address]
        stock = self._stock_of(address)
        if stock is None or address in self.eips or self.is_forbidden(address):
            return False
        self._put_back(address, stock)
        return True

    def _withhold(self, address: Address) -> None:
        stock = self._stock_of(address)
        if stock is not None:
            stock.spaces[address.version].remove(int(address), int(address))

    def free(self) -> dict[str, dict[int, int]]:
        """How many addresses each pool can still give to who asks for none of them, by family.

        Without families of which it never could: they are reserved, or the pool is drained.
        """
        return {
            name: {version: stock.spaces[version].free for version in stock.offers}
            for name, stock in self._stocks.items()
        }

    def is_forbidden(self, address: Address) -> bool:
        """Whether the address belongs to the cluster itself (a node, a peer, a ClusterIP …)."""
        return address in self._cluster or int(address) in self._never[address.version]

    def first(self, service: Service, version: int, pool: str = "") -> Free | tuple[Line, ...]:
        """The next address of a family for a Service: its pool and itself, or what to wait for
        (nothing, if no pool is for it).

        pool: only that one, whether it gives by itself or not.
        """
        lines: list[Line] = []
        namespace = service.ref.namespace
        for stock in self._candidates(namespace, version, pool):
            if stock.selects and not tenancy.serves(stock.pool, service):
                continue
            if stock.quota and stock.room(namespace) < 1:
                lines.append((stock.name, namespace))
            elif (number := stock.spaces[version].first()) is None:
                lines.append((stock.name, version))
            else:
                return Free(stock.name, to_address(version, number))
        return tuple(lines)

    def _candidates(self, namespace: str, version: int, pool: str) -> tuple[_Stock, ...]:
        """Where to look for an address; whom a pool selects is not looked at."""
        if pool:
            stock = self._stocks[pool]
            return (stock,) if version in stock.spaces else ()
        opened = self._open.get((namespace, version))
        if opened is None:
            opened = self._open[namespace, version] = self._opened(namespace, version)
        return opened

    def _opened(self, namespace: str, version: int) -> tuple[_Stock, ...]:
        """Pools that give by themselves to a namespace."""
        labels = self.labels(namespace)
        return tuple(
            stock
            for stock in self._stocks.values()
            if version in stock.spaces
            and stock.pool.gives
            and tenancy.serves_namespace(stock.pool, namespace, labels)
        )

    def has_room(self, address: Address, namespace: str, credit: bool = False) -> bool:
        """Whether a namespace may have one more address of an address's pool. credit: it gives one
        back for it."""
        stock = self._stock_of(address)
        return stock is not None and stock.room(namespace) + credit > 0

    def capacity(self, line: Line) -> int:
        """How many of those who wait in a line can be served."""
        stock, what = self._stocks.get(line[0]), line[1]
        if stock is None:
            return 0
        if isinstance(what, str):
            return max(0, stock.room(what))
        return stock.spaces[what].free if what in stock.spaces else 0


def _runs(first: int, last: int, pool: Pool, version: int) -> Iterator[tuple[int, int]]:
    """A range, without what `avoidBuggyIPs` keeps back."""
    if version == 6 or not pool.avoid_buggy_ips:
        yield first, last
        return
    for base in range(first & ~255, last + 1, 256):
        start, end = max(first, base + 1), min(last, base + 254)
        if start <= end:
            yield start, end


def _ends(item: Forbidden) -> tuple[int, int]:
    if isinstance(item, IPv4Network | IPv6Network):
        return int(item.network_address), int(item.broadcast_address)
    return int(item), int(item)
