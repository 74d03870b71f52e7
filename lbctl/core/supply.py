"""Which addresses can be given out: pools, less what is in use, less what must never be given.

Rules: pure bookkeeping for the allocator. A change costs O(log gaps), never O(addresses); only a
new configuration or a new set of forbidden addresses rebuilds everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network

from lbctl.core.config import Config
from lbctl.core.model import Address, Network
from lbctl.core.space import Space, to_address

Forbidden = Address | Network


class Supply:
    """Free addresses per pool and family."""

    def __init__(self, config: Config | None = None, forbidden: Iterable[Forbidden] = ()) -> None:
        self.config = config
        self.forbidden = frozenset(forbidden)
        self._used: set[Address] = set()
        self._cluster: Counter[Address] = Counter()  # ClusterIPs; how many Services have it
        self._count: Counter[str] = Counter()
        self._spaces: dict[tuple[str, int], Space] = {}
        self._build()

    def _build(self) -> None:
        pools = self.config.pools if self.config else ()
        self._spaces = {}
        for pool in pools:
            for part in pool.addresses:
                space = self._spaces.setdefault((pool.name, part.version), Space())
                space.add(int(part.first), int(part.last))
        for item in self.forbidden:
            low, high = _ends(item)
            for (_, version), space in self._spaces.items():
                if version == item.version:
                    space.remove(low, high)
        for address in self._cluster:
            self._withhold(address)
        self._count.clear()
        for address in self._used:
            self._take(address)

    def configure(self, config: Config | None, forbidden: Iterable[Forbidden]) -> bool:
        """Take a new configuration; True if anything differs from before."""
        wanted = frozenset(forbidden)
        if config == self.config and wanted == self.forbidden:
            return False
        self.config, self.forbidden = config, wanted
        self._build()
        return True

    def pool_of(self, address: Address) -> str | None:
        """Name of the pool that holds the address, None without one."""
        pool = self.config.pool_of(address) if self.config else None
        return pool.name if pool else None

    def _take(self, address: Address) -> None:
        pool = self.pool_of(address)
        if pool is not None:
            self._count[pool] += 1
            self._spaces[pool, address.version].remove(int(address), int(address))

    def use(self, address: Address) -> None:
        """The address has an EIP object, or is about to."""
        if address not in self._used:
            self._used.add(address)
            self._take(address)

    def unuse(self, address: Address) -> None:
        """The address has no EIP object any more."""
        if address in self._used:
            self._used.discard(address)
            pool = self.pool_of(address)
            if pool is None:
                return
            self._count[pool] -= 1
            if not self.is_forbidden(address):
                self._spaces[pool, address.version].add(int(address), int(address))

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
        pool = self.pool_of(address)
        if pool is None or address in self._used or self.is_forbidden(address):
            return False
        self._spaces[pool, address.version].add(int(address), int(address))
        return True

    def _withhold(self, address: Address) -> None:
        pool = self.pool_of(address)
        if pool is not None:
            self._spaces[pool, address.version].remove(int(address), int(address))

    def usage(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and addresses in use (in whatever phase) of each pool, in file order."""
        pools = self.config.pools if self.config else ()
        return tuple((pool.name, pool.size, self._count[pool.name]) for pool in pools)

    def is_free(self, address: Address) -> bool:
        """Whether the address can be given out now."""
        pool = self.pool_of(address)
        return pool is not None and int(address) in self._spaces[pool, address.version]

    def is_forbidden(self, address: Address) -> bool:
        """Whether the address belongs to the cluster itself (a node, a peer, a ClusterIP …)."""
        if address in self.forbidden or address in self._cluster:
            return True
        return any(
            isinstance(item, IPv4Network | IPv6Network)
            and item.version == address.version
            and address in item
            for item in self.forbidden
        )

    def first(self, version: int) -> tuple[str, Address] | None:
        """The next address of a family for a Service that asks for none: pools in file order."""
        for pool in self.config.pools if self.config else ():
            space = self._spaces.get((pool.name, version)) if pool.auto_assign else None
            number = space.first() if space is not None else None
            if number is not None:
                return pool.name, to_address(version, number)
        return None

    def free(self, version: int) -> int:
        """How many addresses `first` could give out."""
        return sum(space.free for _, space in self._auto(version))

    def auto_pools(self, version: int) -> tuple[str, ...]:
        """Names of the pools that serve a family without being asked."""
        return tuple(name for name, _ in self._auto(version))

    def _auto(self, version: int) -> list[tuple[str, Space]]:
        pools = self.config.pools if self.config else ()
        named = [p.name for p in pools if p.auto_assign and (p.name, version) in self._spaces]
        return [(name, self._spaces[name, version]) for name in named]


def _ends(item: Forbidden) -> tuple[int, int]:
    if isinstance(item, IPv4Network | IPv6Network):
        return int(item.network_address), int(item.broadcast_address)
    return int(item), int(item)
