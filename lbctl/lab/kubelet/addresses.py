"""A node's pod addresses: pure. Given in turn, so that none comes back at once."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from lbctl.errors import LabError
from lbctl.lab.kubelet.sandbox import PodAddress

_FIRST = 2  # .0 is the network's, .1 the node's


class Pool:
    """The pod CIDRs of one node, one per family."""

    def __init__(self, cidrs: Sequence[str]) -> None:
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(cidr) for cidr in cidrs]
        self._taken: dict[str, list[PodAddress]] = {}
        self._next = _FIRST

    def take(self, uid: str, wanted: Sequence[str] = ()) -> list[PodAddress]:
        """The addresses of a pod, `wanted` if it had them before. Raises LabError when full."""
        if uid not in self._taken:
            if not self._networks:
                raise LabError("the node has no pod network (podCIDR)")
            number = self._number(wanted)
            self._taken[uid] = [self._address(net, number) for net in self._networks]
        return self._taken[uid]

    def release(self, uid: str) -> None:
        """Give a pod's addresses back."""
        self._taken.pop(uid, None)

    def _number(self, wanted: Sequence[str]) -> int:
        used = {ip_address(entries[0]["address"]) for entries in self._taken.values()}
        net = self._networks[0]
        for text in wanted:
            if ip_address(text) in net and ip_address(text) not in used:
                return int(ip_address(text)) - int(net.network_address)
        size = min(net.num_addresses - 1, 1 << 16)  # the last one is a broadcast address
        for step in range(size - _FIRST):
            number = _FIRST + (self._next - _FIRST + step) % (size - _FIRST)
            if net[number] not in used:
                self._next = number + 1
                return number
        raise LabError(f"no free address in {net}")

    @staticmethod
    def _address(net: IPv4Network | IPv6Network, number: int) -> PodAddress:
        gateway = str(net[1]) if net.version == 4 else ""
        return PodAddress(address=str(net[number]), gateway=gateway, version=net.version)
