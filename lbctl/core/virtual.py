"""Recursive announcing: EIPs lead to a virtual next hop, and that leads to nodes.

Pure. With `nextHop: recursive` EIPs that the same nodes have confirmed share one virtual next hop,
an address out of `virtualNextHops` that only stands for these nodes; it is announced as a host
route with a path for each of them that is fit now. A node that goes is then one change of a few
virtual next hops, and none of an EIP. Rules:
- The address is a hash of the nodes' names, whatever their judgement: every manager, and a manager
  that has restarted, finds the same one without asking, and a dead node does not change it.
- Two groups of nodes whose hashes meet share nothing: the EIPs of both are announced directly.
- An EIP leaves before its virtual next hop goes: that stays until `sweep` finds it unused twice.
- A virtual next hop without a path is not announced, and neither is an EIP that would lead to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

from lbctl.core.config_values import AddressRange
from lbctl.core.model import Address, Network, Path, host_route

PATH_ID: Final = 1  # of every path to a virtual next hop: the next one replaces it at the switch
Group: TypeAlias = frozenset[str]


@dataclass(frozen=True, slots=True)
class VirtualHop:
    """A virtual next hop: the names of its nodes, and the paths to those that are fit now."""

    address: Address
    group: Group
    paths: frozenset[Path]


def virtual_address(ranges: Iterable[AddressRange], version: int, group: Group) -> Address | None:
    """Where a group of nodes is; None if it is empty, or no range is of the family."""
    found = next((part for part in ranges if part.version == version), None)
    if found is None or not group:
        return None
    digest = blake2b("|".join(sorted(group)).encode(), digest_size=16).digest()
    number = int(found.first) + int.from_bytes(digest, "big") % found.size
    return IPv4Address(number) if version == 4 else IPv6Address(number)


@lru_cache(maxsize=1 << 12)
def _through(address: Address) -> frozenset[Path]:
    """The paths of what leads to a virtual next hop."""
    return frozenset((Path(address, PATH_ID, ""),))


@dataclass(slots=True)
class _Standing:
    """A virtual next hop that EIPs lead to, or led to until lately."""

    hop: VirtualHop
    users: int = 0
    idle: bool = False  # it had no users at the last sweep


class Levels:
    """The routes of EIPs and of the virtual next hops that they lead to, as they change.

    moved: EIPs that were not asked about have to be asked about again; who reads it, clears it.
    """

    def __init__(self) -> None:
        self.moved = False
        self._claims: dict[Address, Counter[Group]] = {}  # EIPs that would lead there, by group
        self._wanted: dict[Address, VirtualHop] = {}  # by EIP
        self._through: dict[Address, Address] = {}  # by EIP
        self._standing: dict[Address, _Standing] = {}

    def routes(
        self, eips: Iterable[tuple[Address, frozenset[Path], VirtualHop | None]]
    ) -> dict[Network, frozenset[Path]]:
        """What is to be announced now of EIPs, and of virtual next hops that differ; maybe nothing.

        eips: each with its paths to nodes, and the virtual next hop that it may have instead.
        """
        listed = [(eip, paths, hop if paths else None) for eip, paths, hop in eips]
        found: dict[Network, frozenset[Path]] = {}
        for eip, _, hop in listed:
            self._claim(eip, hop)
        for eip, paths, hop in listed:
            left = self._through.pop(eip, None)
            if left is not None:
                self._standing[left].users -= 1
            found[host_route(eip)] = paths
            if hop is not None and self._free(hop):
                found[host_route(eip)] = _through(hop.address)
                found.update(self._lead(eip, hop))
        return found

    def _claim(self, eip: Address, hop: VirtualHop | None) -> None:
        old = self._wanted.pop(eip, None)
        if hop is not None:
            self._wanted[eip] = hop
        if old and hop and (old.address, old.group) == (hop.address, hop.group):
            return
        for one, by in ((old, -1), (hop, 1)):
            if one is not None:
                claims = self._claims.setdefault(one.address, Counter())
                before = len(claims)
                claims[one.group] += by
                if not claims[one.group]:
                    del claims[one.group]
                self.moved |= before + len(claims) == 3  # they meet, or meet no more

    def _free(self, hop: VirtualHop) -> bool:
        """Whether the address stands for this group and no other."""
        standing = self._standing.get(hop.address)
        alone = len(self._claims[hop.address]) == 1
        return alone and (standing is None or standing.hop.group == hop.group)

    def _lead(self, eip: Address, hop: VirtualHop) -> dict[Network, frozenset[Path]]:
        """The EIP goes there; returns the virtual next hop's route if it is another now."""
        standing = self._standing.get(hop.address)
        known = standing is not None and standing.hop.paths == hop.paths
        if standing is None:
            standing = self._standing[hop.address] = _Standing(hop)
        standing.hop, standing.idle = hop, False
        standing.users += 1
        self._through[eip] = hop.address
        return {} if known else {host_route(hop.address): hop.paths}

    def sweep(self) -> set[Network]:
        """The virtual next hops that nobody has used since the last sweep: they are gone now."""
        gone: set[Network] = set()
        for address, standing in sorted(self._standing.items(), key=lambda item: str(item[0])):
            if standing.idle and not standing.users:
                del self._standing[address]
                gone.add(host_route(address))
                self.moved |= bool(self._claims.get(address))
            standing.idle = not standing.users
        return gone
