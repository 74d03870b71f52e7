"""A small network for the rules themselves: client, router, two nodes, a pod behind each.

Both families everywhere. No agent: a test gives each node its ruleset, and says by which node the
router leads packets in. Sockets are opened in their namespace by this process, so that a test is
one thread of plain calls.

    c 203.0.113.10 — r — 192.0.2.0/24 — n1 .21 — p1 10.244.1.2
                                      — n2 .22 — p2 10.244.2.2
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar

from agent.nfnetlink import Nfnetlink
from lbctl.core import forwarding, nft, nodeview
from lbctl.core.forwarding import Locator, Table
from lbctl.core.model import (
    Eip,
    Endpoint,
    ForwardingOptions,
    Node,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from lbctl.core.names import MARK_BASE, MARK_MASK, RULE_PRIORITY
from lbctl.core.nft import Ruleset
from lbctl.core.nftsets import Policy

from .agentnet import sh

EIP = {4: "198.51.100.1", 6: "2001:db8:100::1"}
OTHER = {4: "198.51.100.2", 6: "2001:db8:100::2"}
CLIENT = {4: "203.0.113.10", 6: "2001:db8:3::10"}
NODE = {4: "192.0.2.2{}", 6: "2001:db8:1::2{}"}
POD = {4: "10.244.{}.2", 6: "fd00:10:244:{}::2"}
MAC = "02:00:00:00:00:2{}"
ROUTER_MAC = "02:00:00:00:00:01"
GATE_MAC = "02:00:00:00:00:0c"  # of the router towards the client
POOLS = (
    (ip_address("198.51.100.0"), ip_address("198.51.100.127")),
    (ip_address("2001:db8:100::"), ip_address("2001:db8:100::ffff")),
)
PORT, POD_PORT, LIMIT_S = 80, 8080, 30.0
NODES = tuple(
    Node(
        f"n{n}",
        addresses=tuple(ip_address(NODE[v].format(n)) for v in (4, 6)),
        pod_cidrs=(ip_network(f"10.244.{n}.0/24"), ip_network(f"fd00:10:244:{n}::/64")),
    )
    for n in (1, 2)
)
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Flow:
    """A TCP connection: both ends, and the pod's number."""

    client: socket.socket
    server: socket.socket
    pod: int

    def carries(self, size: int = 1) -> bool:
        """Whether so many bytes come through from the pod to the client."""
        self.server.settimeout(LIMIT_S)
        self.server.sendall(b"x" * size)
        left = size
        while left:
            left -= len(self.client.recv(65536))
        return True

    def echoes(self) -> bool:
        """Whether a byte of the client reaches the pod and another one comes back."""
        self.client.send(b"?")
        self.server.settimeout(LIMIT_S)
        return self.server.recv(1) == b"?" and self.carries()

    def close(self) -> None:
        """End it by a reset: a FIN that nobody answers would be repeated into the next test."""
        for end in (self.client, self.server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


class RulesNet:
    """The network. `enter` and `load` come before any traffic."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.names = ("r", "c", "n1", "n2", "p1", "p2")
        self.open: list[socket.socket] = []
        self.listeners: dict[socket.socket, int] = {}
        self.receivers: dict[socket.socket, int] = {}
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    # -- building --------------------------------------------------------------------------------
    def _build(self) -> None:
        for name in self.names:
            sh("ip", "netns", "add", self.ns(name))
            self.run(name, "sysctl", "-qw", *_SETTINGS)
        peer = f"type veth peer name eth0 {{}}netns {self.prefix}-{{}}\nlink set {{}} up\n"
        self.ip(
            "r",
            f"link add br0 address {ROUTER_MAC} type bridge\nlink set br0 up\n"
            f"link add c0 address {GATE_MAC} "
            + peer.format("", "c", "c0")
            + "".join(
                f"link add n{n} {peer.format(f'address {MAC.format(n)} ', f'n{n}', f'n{n}')}"
                f"link set n{n} master br0\n"
                for n in (1, 2)
            )
            + "addr add 192.0.2.1/24 dev br0\naddr add 2001:db8:1::1/64 dev br0 nodad\n"
            "addr add 203.0.113.1/24 dev c0\naddr add 2001:db8:3::1/64 dev c0 nodad\n",
        )
        self.ip(
            "c",
            "link set lo up\nlink set eth0 up\n"
            f"addr add {CLIENT[4]}/24 dev eth0\nroute add default via 203.0.113.1\n"
            f"addr add {CLIENT[6]}/64 dev eth0 nodad\nroute add default via 2001:db8:3::1\n",
        )
        for n in (1, 2):
            self.ip(f"n{n}", f"link add pod {peer.format('', f'p{n}', 'pod')}{self._node(n)}")
            rule = ("rule", "add", "fwmark", f"{MARK_BASE + 3 - n:#x}/{MARK_MASK | 0xFFFF:#x}")
            for flag in ("-4", "-6"):
                where = ("lookup", str(103 - n), "priority", str(RULE_PRIORITY))
                sh("ip", flag, "-n", self.ns(f"n{n}"), *rule, *where)
            self.ip(
                f"p{n}",
                "link set lo up\nlink set eth0 up\n"
                f"addr add {POD[4].format(n)}/32 dev eth0\n"
                f"addr add {POD[6].format(n)}/128 dev eth0 nodad\n"
                f"route add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1\n"
                f"route add fd00::1 dev eth0\nroute add default via fd00::1\n",
            )
        self.enter(1)

    def _node(self, n: int) -> str:
        lines = [
            "link set lo up\nlink set eth0 up\n"
            "addr add 169.254.1.1/32 dev pod\naddr add fd00::1/128 dev pod nodad\n"
            f"addr add {NODE[4].format(n)}/24 dev eth0\n"
            f"addr add {NODE[6].format(n)}/64 dev eth0 nodad\n"
            "route add default via 192.0.2.1\nroute add default via 2001:db8:1::1\n"
        ]
        for version in (4, 6):
            peer = NODE[version].format(3 - n)
            lines.append(f"route add {POD[version].format(n)} dev pod\n")
            lines.append(f"route add {POD[version].format(3 - n)} via {peer}\n")
            lines.append(f"route add default via {peer} table {103 - n}\n")
        return "".join(lines)

    def ns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def ip(self, name: str, text: str) -> None:
        sh("ip", "-n", self.ns(name), "-batch", "-", text=text)

    def run(self, name: str, *command: str) -> str:
        return sh("ip", "netns", "exec", self.ns(name), *command)

    def close(self) -> None:
        for one in self.open:
            one.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self.ns(name)], capture_output=True)

    # -- what a test does ------------------------------------------------------------------------
    def enter(self, node: int) -> None:
        """From now on the router sends what is for EIPs to this node."""
        for version, pool in ((4, "198.51.100.0/25"), (6, "2001:db8:100::/112")):
            self.ip("r", f"route replace {pool} via {NODE[version].format(node)}\n")

    def load(self, node: int, *texts: str) -> None:
        """Give a node's nft these transactions."""
        for text in texts:
            self.run_text(f"n{node}", text)

    def run_text(self, name: str, text: str) -> None:
        sh("ip", "netns", "exec", self.ns(name), "nft", "-f", "-", text=text)

    def inside(self, name: str, make: Callable[[], _T]) -> _T:
        """Call `make` in a namespace: what it opens stays there."""
        with (
            Path("/proc/thread-self/ns/net").open() as home,
            Path(f"/run/netns/{self.ns(name)}").open() as there,
        ):
            _enter(there.fileno())
            try:
                return make()
            finally:
                _enter(home.fileno())

    def opened(self, name: str, version: int, kind: int, number: int = 0) -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        made = self.inside(name, lambda: socket.socket(family, kind, number))
        made.settimeout(LIMIT_S)
        self.open.append(made)
        return made

    def link(self, name: str, interface: str) -> socket.socket:
        """A packet socket: whole frames out of an interface."""
        made = self.inside(name, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        made.bind((interface, 0))
        self.open.append(made)
        return made

    def counters(self, node: int) -> Mapping[str, int]:
        """Packets by counter, both families together."""
        found = self.inside(f"n{node}", Nfnetlink)
        try:
            return found.counters()
        finally:
            found.close()

    def tracked(self, node: int) -> int:
        """How many entries conntrack has."""
        return int(self.run(f"n{node}", "sysctl", "-n", "net.netfilter.nf_conntrack_count"))

    def serve(self) -> None:
        """Let all pods listen, for TCP and UDP of both families."""
        for pod in (1, 2, 3):
            n, port = place(pod)
            for kind, known in (
                (socket.SOCK_STREAM, self.listeners),
                (socket.SOCK_DGRAM, self.receivers),
            ):
                for version in (4, 6):
                    made = self.opened(f"p{n}", version, kind)
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    made.bind((POD[version].format(n), port))
                    if kind == socket.SOCK_STREAM:
                        made.listen(512)
                    known[made] = pod

    def connect(self, version: int, host: str = "", source: int = 0, by: str = "") -> Flow:
        """by: another address of the client's than its first."""
        client = self.opened("c", version, socket.SOCK_STREAM)
        if source or by:
            client.bind((by or CLIENT[version], source))
        client.connect((host or EIP[version], PORT))
        peer = client.getsockname()[:2]
        ready, _, _ = select.select(list(self.listeners), [], [], LIMIT_S)
        for listener in ready:
            server, found = listener.accept()
            self.open.append(server)
            assert found[:2] == peer, f"the pod saw {found}, the client is {peer}"
            return Flow(client, server, self.listeners[listener])
        raise AssertionError("no pod accepted the connection")

    def asked(self, sender: socket.socket, text: bytes, to: tuple[str, int]) -> int:
        """Send a datagram; which pod got it whole, 0 for none within a second."""
        sender.sendto(text, to)
        return self._got(text)

    def asked_connected(self, sender: socket.socket, text: bytes) -> int:
        """The same by a connected socket."""
        sender.send(text)
        return self._got(text)

    def _got(self, text: bytes) -> int:
        ready, _, _ = select.select(list(self.receivers), [], [], 1.0)
        for receiver in ready:
            assert receiver.recv(65536) == text
            return self.receivers[receiver]
        return 0


_SETTINGS = (
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv4.icmp_ratelimit=0",
    "net.ipv6.icmp.ratelimit=0",
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")


def place(pod: int) -> tuple[int, int]:
    """A pod's node and port. The third one is beside the first."""
    return (1, POD_PORT + 1) if pod == 3 else (pod, POD_PORT)


def service(protocol: Protocol = Protocol.TCP, sources: tuple[str, ...] = ()) -> Service:
    return Service(
        ObjectRef("default", "web"),
        "uid",
        0.0,
        (ServicePort("", protocol, PORT), ServicePort("dns", Protocol.UDP, 53)),
        True,
        source_ranges=tuple(ip_network(text) for text in sources),
    )


def table(
    pods: tuple[int, ...] = (1, 2),
    of: Service | None = None,
    unready: tuple[int, ...] = (),
    options: ForwardingOptions = forwarding.DEFAULTS,
    ending: tuple[int, ...] = (),
) -> Table:
    """The common table with these pods behind both EIPs of both families."""
    of = of or service()
    found = tuple(
        Endpoint(ip_address(POD[v].format(node)), port, "", "pod", pod in pods, True, pod in ending)
        for pod, (node, port) in ((pod, place(pod)) for pod in (*pods, *unready, *ending))
        for v in (4, 6)
    )
    behind = ServiceEndpoints(
        of.ref, tuple(PortEndpoints(p.name, p.protocol, found) for p in of.ports)
    )
    eips = [Eip(ip_address(a), "public", of.ref, "uid") for f in (EIP, OTHER) for a in f.values()]
    return forwarding.build(eips, {of.ref: of}, {of.ref: behind}, Locator(NODES), options=options)


def rules(
    of: Table, node: int, policy: Policy | None = None, view: nodeview.View | None = None
) -> Ruleset:
    """What one of the two nodes gives its kernel."""
    view, other = view or nodeview.advance({}, of, f"n{node}"), 3 - node
    if policy is None:
        policy = Policy(pingable=dict.fromkeys(of.eips), new_flows=5000)
    return Ruleset(
        1,
        ("eth0",),
        (MAC.format(other),),
        POOLS,
        {
            (address, port.table.protocol.value, port.table.port): nodeview.elements(
                address, port, f"n{node}", {f"n{other}": other}
            )
            for address, ports in view.items()
            for port in ports
        },
        {a: entry.sources for a, entry in of.eips.items() if entry.sources},
        policy,
    )


def both(net: RulesNet, of: Table, policy: Policy | None = None) -> None:
    """Give both nodes the same table."""
    for node in (1, 2):
        net.load(node, *nft.full(rules(of, node, policy)))


def made(prefix: str) -> RulesNet:
    """The network with listening pods."""
    net = RulesNet(f"{prefix}{os.getpid()}")
    net.serve()
    return net


def mss(connection: socket.socket) -> int:
    """What a connection sends in a segment now, in bytes."""
    size = struct.unpack_from(
        "I", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 16
    )
    return int(size[0])
