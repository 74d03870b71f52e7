"""Nothing else passes: what a client or a pod may try against a node, and what becomes of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from lbctl.core.names import MARK_BASE
from lbctl.core.nftsets import Policy

from . import frames
from .agentnet import wait_for
from .rulesnet import (
    CLIENT,
    EIP,
    GATE_MAC,
    MAC,
    NODE,
    NODES,
    PORT,
    ROUTER_MAC,
    RulesNet,
    both,
    made,
    service,
    table,
)

SSHD = 22
POLICY = Policy(new_flows=5000, tunnel_peers=NODES[0].addresses + NODES[1].addresses)


@pytest.fixture(scope="module")
def net() -> Iterator[RulesNet]:
    net = made("ra")
    try:
        both(net, table(), POLICY)
        for node in (1, 2):
            for version in (4, 6):
                sshd = net.opened(f"n{node}", version, socket.SOCK_STREAM)
                sshd.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if version == 6:
                    sshd.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sshd.bind(("", SSHD))
                sshd.listen()
        yield net
    finally:
        net.close()


@pytest.fixture
def wire(net: RulesNet) -> socket.socket:
    return net.link("c", "eth0")


def send(net: RulesNet, wire: socket.socket, packet: bytes, count: int = 1) -> None:
    for _ in range(count):
        wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))


def counted(net: RulesNet, node: int, name: str, at_least: int) -> Any:
    return wait_for(
        f"{at_least} of {name} on n{node}: {net.counters(node)}",
        lambda: net.counters(node)[name] >= at_least,
    )


@pytest.mark.parametrize("version", [4, 6])
def test_unknown_ports_are_refused_at_once(net: RulesNet, version: int) -> None:
    """A reset, an ICMP error; also for the node's own sshd, and for what once was a Service's."""
    unused = "198.51.100.99" if version == 4 else "2001:db8:100::99"
    for host, port in ((EIP[version], SSHD), (EIP[version], 81), (unused, PORT)):
        client = net.opened("c", version, socket.SOCK_STREAM)
        client.settimeout(5)
        with pytest.raises(ConnectionRefusedError):
            client.connect((host, port))
        client.close()
        asker = net.opened("c", version, socket.SOCK_DGRAM)
        asker.connect((host, port))
        asker.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            asker.recv(1)
        asker.close()


@pytest.mark.parametrize("version", [4, 6])
def test_a_second_hop_reaches_no_more(net: RulesNet, version: int) -> None:
    """From a node's MAC: no sshd, no unknown port, no source that the ranges do not let in."""
    allowed = service(sources=("192.0.2.0/24", "2001:db8:1::/64"))
    both(net, table(of=allowed), POLICY)
    try:
        before = dict(net.counters(1))
        link = net.link("n2", "eth0")
        for port in (SSHD, 81):
            packet = frames.tcp(NODE[version].format(9), 40000, EIP[version], port)
            link.send(frames.frame(packet, MAC.format(1), MAC.format(2)))
        counted(net, 1, "stray", before["stray"] + 2)
        for source in range(41000, 41020):
            packet = frames.tcp(CLIENT[version], source, EIP[version], PORT)
            link.send(frames.frame(packet, MAC.format(1), MAC.format(2)))
        counted(net, 1, "sources", before["sources"] + 20)
        assert net.counters(1)["delivered"] == before["delivered"]
    finally:
        both(net, table(), POLICY)


@pytest.mark.parametrize("version", [4, 6])
def test_a_small_ttl_does_not_loop(net: RulesNet, wire: socket.socket, version: int) -> None:
    """Any TTL: the packet ends at a pod, as an ICMP error, or counted; nothing goes round."""
    before = [net.counters(n)["steered"] for n in (1, 2)]
    packets = 0
    for hops in range(1, 9):
        for source in range(42000, 42020):
            packet = frames.tcp(CLIENT[version], source + hops * 100, EIP[version], PORT)
            send(net, wire, frames.with_hops(packet, hops))
            packets += hops > 1
    assert net.connect(version).echoes()
    steered = [net.counters(n)["steered"] - old for n, old in zip((1, 2), before, strict=True)]
    assert 0 < steered[0] <= packets + 10 and steered[1] == 0


@pytest.mark.parametrize("version", [4, 6])
def test_marks_from_outside_are_reset(net: RulesNet, version: int) -> None:
    """A mark of ours that something put on a packet before us steers nothing."""
    family = "ip" if version == 4 else "ip6"
    net.run_text(
        "n1",
        f"table {family} forger {{ chain in {{\n type filter hook prerouting priority -350;\n"
        f' iifname "eth0" meta mark set {MARK_BASE + 2:#x}\n}}\n}}\n',
    )
    try:
        asker = net.opened("c", version, socket.SOCK_STREAM)
        asker.connect((NODE[version].format(1), SSHD))
        pods = {net.connect(version).pod for _ in range(32)}
        assert pods == {1, 2}
    finally:
        net.run("n1", "nft", "delete", "table", family, "forger")


@pytest.mark.parametrize("version", [4, 6])
def test_a_pod_is_not_outside(net: RulesNet, version: int) -> None:
    """What a pod sends to an EIP is none of ours: no hash, no steering, no delivery."""
    names = ("steered", "delivered", "refused", "stray")
    before = [net.counters(1)[name] for name in names]
    pod = net.opened("p1", version, socket.SOCK_STREAM)
    pod.settimeout(1)
    # There is no kube-proxy here: the packet goes to the router, which sends it back from outside.
    net.ip("r", f"route replace blackhole {EIP[version]}\n")
    try:
        with pytest.raises(OSError):
            pod.connect((EIP[version], PORT))
        assert [net.counters(1)[name] for name in names] == before
    finally:
        pod.close()
        net.ip("r", f"route del {EIP[version]}\n")


def test_no_route_leads_back_out(net: RulesNet, wire: socket.socket) -> None:
    """An address of a pool that nothing serves ends here; the router would send it in again."""
    for version, unused in ((4, "198.51.100.77"), (6, "2001:db8:100::77")):
        before = net.counters(1)["refused"]
        send(net, wire, frames.udp(CLIENT[version], 45000, unused, 9), 20)
        send(net, wire, frames.icmp(CLIENT[version], unused, frames.ECHO, 1, b""), 20)
        counted(net, 1, "refused", before + 40)
        assert net.counters(1)["refused"] == before + 40
