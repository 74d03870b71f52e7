"""The tunnel between nodes: what goes through it, how senders learn its size, who may use it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lbctl.core import nft
from lbctl.core.names import TUNNEL_DEVICE, TUNNEL_PORT, TUNNEL_VNI
from lbctl.core.nftsets import Policy

from . import frames
from .agentnet import wait_for
from .rulesnet import (
    CLIENT,
    EIP,
    NODE,
    NODES,
    PORT,
    RulesNet,
    made,
    mss,
    rules,
    table,
)

INNER = "02:00:00:00:01:0{}"
MTU = 1450
POLICY = Policy(
    new_flows=5000,
    tunnel_peers=NODES[0].addresses + NODES[1].addresses,
    tunnel_mtus=(("eth0", MTU),),
)


@pytest.fixture(scope="module")
def net() -> Iterator[RulesNet]:
    net = made("rt")
    try:
        for node in (1, 2):
            lay(net, node)
            ruleset = replace(rules(table(), node, POLICY), uplinks=("eth0", TUNNEL_DEVICE))
            # The nodes know nothing of each other's MAC: they are in different subnets.
            net.load(node, *nft.full(replace(ruleset, peers=())))
        yield net
    finally:
        net.close()


def lay(net: RulesNet, node: int) -> None:
    """A node's end of the tunnel, and the way to the other node through it."""
    other = 3 - node
    peer, peer6 = NODE[4].format(other), f"fe80::{other}"
    net.ip(
        f"n{node}",
        f"link add {TUNNEL_DEVICE} address {INNER.format(node)} mtu {MTU} type vxlan"
        f" id {TUNNEL_VNI} dstport {TUNNEL_PORT} nolearning local {NODE[4].format(node)} dev eth0\n"
        f"link set {TUNNEL_DEVICE} up\n"
        f"neigh add {peer} lladdr {INNER.format(other)} dev {TUNNEL_DEVICE} nud permanent\n"
        f"neigh add {peer6} lladdr {INNER.format(other)} dev {TUNNEL_DEVICE} nud permanent\n"
        f"route replace default via {peer} dev {TUNNEL_DEVICE} onlink table {100 + other}\n"
        f"route replace default via {peer6} dev {TUNNEL_DEVICE} table {100 + other}\n",
    )
    entry = ("append", INNER.format(other), "dev", TUNNEL_DEVICE, "dst", peer)
    net.run(f"n{node}", "bridge", "fdb", *entry)


@pytest.mark.parametrize("version", [4, 6])
def test_connections_go_through_with_a_fitting_mss(net: RulesNet, version: int) -> None:
    """Steered by the tunnel, answered directly; the client sends nothing that does not fit."""
    before = net.counters(1)["steered"]
    flows = [net.connect(version) for _ in range(20)]
    assert {flow.pod for flow in flows} == {1, 2}
    for flow in flows:
        assert flow.echoes() and flow.carries(100_000)
        assert mss(flow.client) <= MTU - (40 if version == 4 else 60)
        flow.close()
    assert net.counters(1)["steered"] > before
    # Nothing of the tunnel is tracked: a flood of inner flows would fill conntrack by it.
    assert str(TUNNEL_PORT) not in net.run("n2", "cat", "/proc/net/nf_conntrack")


def test_what_does_not_fit_is_told_to_the_sender(net: RulesNet) -> None:
    """A datagram larger than the tunnel, not to be fragmented: the sender gets the size."""
    for _ in range(20):
        client = net.opened("c", 4, socket.SOCK_DGRAM)
        client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, always
        client.connect((EIP[4], 53))
        if net.asked_connected(client, b"small") == 2:
            break
    else:
        raise AssertionError("no flow was steered")
    client.send(b"x" * 1460)

    def refused() -> bool:
        try:
            client.send(b"x" * 1460)
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        return False

    wait_for("the sender to know the path's size", refused)
    assert client.getsockopt(socket.IPPROTO_IP, 14) == MTU  # IP_MTU


def forged(version: int, node: int) -> bytes:
    """What an attacker puts into the tunnel: a packet for an EIP, on its second hop."""
    packet = frames.tcp(CLIENT[version], 50000, EIP[version], PORT)
    return frames.vxlan(
        frames.frame(packet, INNER.format(node), INNER.format(3 - node)), TUNNEL_VNI
    )


@pytest.mark.parametrize("sender", ["c", "p1", "p2", "n2"])
def test_only_the_kernel_of_a_node_sends_into_the_tunnel(net: RulesNet, sender: str) -> None:
    """Not a client, not a pod of this node or of another one, not a process beside the kernel."""
    place = 2 if sender in ("p2", "n2") else 1
    if sender == "p2":  # as many CNIs do for what leaves the cluster's pods
        net.run_text("n2", MASQUERADE)
    before = net.counters(place)["forged"], net.counters(1)["delivered"]
    wire = net.opened(sender, 4, socket.SOCK_DGRAM)
    for _ in range(5):
        try:
            wire.sendto(forged(4, 1), (NODE[4].format(1), TUNNEL_PORT))
        except PermissionError:
            assert sender == "n2"
    wait_for("the forgery to be counted", lambda: net.counters(place)["forged"] == before[0] + 5)
    assert net.counters(1)["delivered"] == before[1]
    wire.close()


MASQUERADE = """
table ip cni { chain out {
  type nat hook postrouting priority srcnat;
  ip saddr 10.244.0.0/16 masquerade
}
}
"""


@pytest.mark.parametrize("version", [4, 6])
def test_the_tunnel_leads_to_eips_only(net: RulesNet, version: int) -> None:
    """Whoever holds a node may not reach another one's services or pods by it."""
    net.run("n2", "nft", "flush", "chain", "ip", "lbctl", "own")
    before = net.counters(1)["forged"]
    link = net.link("n2", TUNNEL_DEVICE)
    for target in (NODE[version].format(1), CLIENT[version]):
        packet = frames.tcp(CLIENT[version], 50001, target, 22)
        link.send(frames.frame(packet, INNER.format(1), INNER.format(2)))
    wait_for("both to be counted", lambda: net.counters(1)["forged"] == before + 2)
    link.close()


def test_a_tunnel_packet_from_an_old_node_is_dropped(net: RulesNet) -> None:
    """A node that has left is no peer any more."""
    net.run("n2", "nft", "flush", "chain", "ip", "lbctl", "own")
    gone = replace(POLICY, tunnel_peers=NODES[0].addresses)
    old, new = (
        replace(rules(table(), 1, p), uplinks=("eth0", TUNNEL_DEVICE)) for p in (POLICY, gone)
    )
    net.load(1, *nft.difference(old, new))
    before = net.counters(1)["forged"]
    link = net.link("n2", TUNNEL_DEVICE)
    packet = frames.tcp(CLIENT[4], 50002, EIP[4], PORT)
    link.send(frames.frame(packet, INNER.format(1), INNER.format(2)))
    wait_for("it to be counted", lambda: net.counters(1)["forged"] == before + 1)
    net.load(1, *nft.difference(new, old))
