"""A cluster in memory of any size, as manager and agent see it, for the pure benches."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address

from lbctl.core import config
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    Node,
    NodeState,
    NodeView,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from lbctl.core.pmap import PSet

NODES = 8
PODS = 4  # of each Service
CONFIG_TEXT = """\
version: 1
pools: [{name: big, addresses: [198.18.0.0/15]}]
bgp: {asn: 64512, peers: [{name: tor-a, address: 192.0.2.1, asn: 64500}]}
"""
CONFIG = config.parse(CONFIG_TEXT)
FIRST = int(ip_address("198.18.0.0"))
POD_NETWORK = int(ip_address("10.0.0.0"))


class Cluster:
    """`count` Services with an EIP and so many pods each, on so many nodes, all well.

    first: address of the first node; the others follow.
    """

    def __init__(
        self, count: int, nodes: int = NODES, pods: int = PODS, first: str = "192.0.2.20"
    ) -> None:
        self.size, self.pods = nodes, pods
        self._pod_bits = 16 if nodes <= 256 else 14  # of the addresses of a node's pods
        self.refs = [ObjectRef("default", f"s{n:05}") for n in range(count)]
        self.addresses: list[Address] = [ip_address(FIRST + n) for n in range(count)]
        self.eips = {
            address: Eip(address, "big", ref, str(ref))
            for address, ref in zip(self.addresses, self.refs, strict=True)
        }
        port = (ServicePort("", Protocol.TCP, 80),)
        self.services = {ref: Service(ref, str(ref), 0.0, port, True) for ref in self.refs}
        self.endpoints = {ref: self.behind(n) for n, ref in enumerate(self.refs)}
        self.nodes = tuple(
            Node(
                f"n{n}",
                addresses=(ip_address(first) + n,),
                pod_cidrs=(IPv4Network((self._pods(n), 32 - self._pod_bits)),),
            )
            for n in range(nodes)
        )
        every = PSet(self.addresses)
        self.views = {
            node.name: NodeView(node.name, NodeState.UP, confirmed=every, local_ready=every)
            for node in self.nodes
        }

    def _pods(self, node: int) -> int:
        return POD_NETWORK + (node << self._pod_bits)

    def behind(self, number: int, pods: int | None = None) -> ServiceEndpoints:
        """The endpoints of Service `number` with so many pods."""
        size = self.size
        found = tuple(
            Endpoint(
                ip_address(
                    self._pods((number + p) % size) + number // 250 * 256 + 2 + number % 250
                ),
                8080,
                f"n{(number + p) % size}",
                "pod",
            )
            for p in range(self.pods if pods is None else pods)
        )
        return ServiceEndpoints(
            self.refs[number], (PortEndpoints("", Protocol.TCP, tuple(sorted(found))),)
        )
