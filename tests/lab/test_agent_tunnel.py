"""Nodes in two subnets behind a router: steering over the tunnel and beside it, in both families.

n1 and n2 share a subnet, n3 is in another one. The router spreads over all three.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from lbctl.core.names import NFT_TABLE, RULE_PRIORITY, TUNNEL_DEVICE, TUNNEL_PORT, TUNNEL_VNI

from .agentnet import POOL6, Helper, Net, sh, wait_for

EIPS = {4: "198.51.100.1", 6: "2001:db8:100::1"}
CLIENTS = {4: "203.0.113.10", 6: "2001:db8:ff::10"}
PODS = {"p11", "p21", "p31"}
BIG = """
import socket, sys, time
host, port = sys.argv[1], 53
found = None
for number in range(400):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: never fragment
        udp.settimeout(0.2)
        udp.connect((host, port))
        try:
            udp.send(bytes(1472))
            udp.recv(4096)
            continue
        except TimeoutError:
            pass
        except OSError:
            pass
        mtu = udp.getsockopt(socket.IPPROTO_IP, 14)  # IP_MTU
        if mtu < 1500:
            udp.settimeout(10)
            udp.send(bytes(mtu - 28))
            print(mtu, udp.recv(4096).split()[0].decode())
            break
"""
UPLOAD = """
import socket, sys
whole = b"x" * 199 + b"\\n"
with socket.create_connection((sys.argv[1], 80), 20) as tcp:
    tcp.settimeout(20)
    got = tcp.makefile("rb")
    for _ in range(20):
        tcp.sendall(whole * 100)
        for _ in range(100):
            words = got.readline().split()
            assert words[2] == whole.strip(), words
    print(words[0].decode())
"""


class Site:
    """Engines on all nodes; `spec` is the cluster's state."""

    def __init__(self, net: Net) -> None:
        self.net = net
        net.start_pods()
        self.engines: dict[int, Helper] = {}
        for n in (1, 2, 3):
            self.start(n)
        self.client = net.start("c", "agent_client.py")
        net.ecmp([1, 2, 3], POOL6)
        self.steering = "auto"
        self.nodes = 3
        self.families = [4, 6]

    def start(self, n: int) -> None:
        self.engines[n] = self.net.start(f"n{n}", "agent_node.py", f"n{n}")

    def apply(self, only: tuple[int, ...] = (1, 2, 3)) -> None:
        ports = [["", "TCP", 80], ["dns", "UDP", 53]]
        services = {
            f"web{version}": {
                "ports": ports,
                "endpoints": [
                    [self.net.pod_address(n, 1, version), 8080, "rs"]
                    for n in range(1, self.nodes + 1)
                ],
            }
            for version in self.families
        }
        spec = {
            "eips": {EIPS[version]: f"web{version}" for version in self.families},
            "services": services,
            "nodes": self.nodes,
            "racks": list(self.net.racks),
            "families": self.families,
            "steering": self.steering,
            "ranges": [
                ["198.51.100.0", "198.51.100.127"],
                ["2001:db8:100::", "2001:db8:100::ffff"],
            ],
        }
        for n in only:
            self.engines[n].tell(spec)
        for n in only:
            self.engines[n].hear(f"n{n} to confirm", lambda m: "digest" in m, limit_s=180)

    def ask(self, version: int, count: int = 60) -> list[dict[str, Any]]:
        self.client.tell({"ask": [EIPS[version], 80], "count": count})
        answers: list[dict[str, Any]] = self.client.hear("the client's answers")["result"]
        return answers

    def all_answer(self, version: int) -> bool:
        found = Counter(a.get("pod", a.get("error", "")) for a in self.ask(version))
        return set(found) == PODS

    def told(self, n: int) -> dict[str, Any]:
        self.engines[n].tell({"counters": True})
        found: dict[str, Any] = self.engines[n].hear("counters", lambda m: "counters" in m)
        return found

    def ip(self, n: int, *words: str) -> str:
        return sh("ip", "-n", self.net.ns(f"n{n}"), *words)

    def device(self, n: int) -> str:
        """The tunnel's device in one line, its index first; "" if there is none."""
        lines = self.ip(n, "-o", "-d", "link", "show").splitlines()
        return next((line for line in lines if f" {TUNNEL_DEVICE}:" in line), "")

    def received(self, n: int) -> int:
        path = f"/sys/class/net/{TUNNEL_DEVICE}/statistics/rx_packets"
        return int(self.net.run(f"n{n}", "cat", path))

    def forwards(self, n: int) -> str:
        return self.net.run(f"n{n}", "bridge", "fdb", "show", "dev", TUNNEL_DEVICE)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    net = Net(f"at{os.getpid()}", pods=1, racks=(2, 2, 3), ipv6=True)
    try:
        for n in (1, 2, 3):
            net.sysctl(f"n{n}", "net.ipv4.conf.all.rp_filter=1")
        made = Site(net)
        made.apply()
        yield made
    finally:
        net.close()


@pytest.mark.parametrize("version", [4, 6])
def test_both_ways_in_both_families(site: Site, version: int) -> None:
    """Every pod answers the client by its own address, whichever node the packets came in by."""
    wait_for("every pod to answer", lambda: site.all_answer(version))
    before = {n: (site.told(n)["counters"]["steered"], site.received(n)) for n in (1, 2, 3)}
    answers = site.ask(version, 120)
    assert {a.get("seen") for a in answers} == {CLIENTS[version]}
    assert {a["pod"] for a in answers} == PODS
    for n, (steered, received) in before.items():
        assert site.told(n)["counters"]["steered"] > steered
        assert site.received(n) > received
    # n1 reaches n2 over their link: nothing of n2's address is in its tunnel.
    assert "dst 192.0.3.23" in site.forwards(1) and "192.0.2.22" not in site.forwards(1)
    assert site.told(1)["unreachable"] == []


def test_senders_are_told_the_mtu(site: Site) -> None:
    assert "mtu 1450" in site.device(1)
    said = site.net.run("c", sys.executable, "-c", BIG, EIPS[4]).split()
    assert said == ["1450", "p31"] or (said[0] == "1450" and said[1] in ("p11", "p21")), said
    site.net.run("c", "ip", "route", "flush", "cache")
    seen = {site.net.run("c", sys.executable, "-c", UPLOAD, EIPS[4]).strip() for _ in range(20)}
    assert len(seen) > 1
    site.net.run("c", sys.executable, "-c", UPLOAD, EIPS[6])


def test_tunnel_packets_of_strangers_are_dropped(site: Site) -> None:
    """A packet for the EIP in VXLAN, from the client: it reaches no pod and is counted."""
    counters = site.told(3)["counters"]
    received = site.received(3)
    forge(site, 4)
    wait_for(
        "the forged packet to be counted",
        lambda: site.told(3)["counters"]["forged"] == counters["forged"] + 1,
    )
    assert site.received(3) == received


def forge(site: Site, version: int) -> None:
    """The client sends n3 a ping of the EIP in VXLAN, over this version of IP."""
    mac = site.device(3).split("link/ether ")[1].split()[0]
    inner = bytes.fromhex(mac.replace(":", "")) + b"\2\0\0\0\0\1" + b"\x08\x00" + ping(EIPS[4])
    packet = struct.pack(">II", 0x08000000, TUNNEL_VNI << 8) + inner
    code = (
        "import socket, sys; s = socket.socket(int(sys.argv[4]), socket.SOCK_DGRAM);"
        "s.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[1], int(sys.argv[3])))"
    )
    to, family = site.net.address(3, version), {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    words = (to, packet.hex(), str(TUNNEL_PORT), str(int(family)))
    site.net.run("c", sys.executable, "-c", code, *words)


def ping(target: str) -> bytes:
    source, destination = socket.inet_aton("203.0.113.99"), socket.inet_aton(target)
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28, 1, 0, 64, 1, 0, source, destination)
    return header[:10] + checksum(header) + header[12:] + b"\x08\x00\xf7\xff\0\0\0\0"


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)


def test_what_others_did_to_it_is_repaired(site: Site) -> None:
    first = site.device(1)
    site.ip(1, "link", "del", TUNNEL_DEVICE)
    wait_for("the device to be back", lambda: site.device(1) not in ("", first), 30)
    wait_for("every pod to answer", lambda: site.all_answer(4), 30)

    stranger = "02:11:22:33:44:55"
    net = site.net
    net.run("n1", "bridge", "fdb", "append", stranger, "dev", TUNNEL_DEVICE, "dst", "192.0.9.9")
    site.ip(1, "neigh", "add", "192.0.9.9", "lladdr", stranger, "dev", TUNNEL_DEVICE)
    own = next(line.split()[0] for line in site.forwards(1).splitlines() if "192.0.3.23" in line)
    net.run("n1", "bridge", "fdb", "del", own, "dev", TUNNEL_DEVICE, "dst", "192.0.3.23")
    site.ip(1, "link", "set", TUNNEL_DEVICE, "mtu", "1300")

    def mended() -> bool:
        neighbours = site.ip(1, "neigh", "show", "dev", TUNNEL_DEVICE)
        forwards = site.forwards(1)
        return (
            stranger not in forwards + neighbours
            and "192.0.3.23" in forwards
            and "mtu 1450" in site.device(1)
        )

    wait_for("the entries to be as they were", mended, 30)
    assert site.told(1)["repairs"]["routes"] > 0
    wait_for("every pod to answer", lambda: site.all_answer(6), 30)


def test_a_restart_touches_nothing(site: Site) -> None:
    before = site.device(2), site.forwards(2)
    site.engines.pop(2).stop(9)
    assert site.all_answer(4)
    site.start(2)
    site.apply((2,))
    assert (site.device(2), site.forwards(2)) == before
    assert site.told(2)["repairs"]["routes"] == 0


def test_steering_as_configured(site: Site) -> None:
    site.steering = "tunnel"
    site.apply()
    wait_for("n2 in the tunnel", lambda: "192.0.2.22" in site.forwards(1))
    for version in (4, 6):
        wait_for("every pod to answer", lambda v=version: site.all_answer(v), 30)
    site.steering = "direct"
    site.apply()
    for n in (1, 2, 3):
        wait_for(f"n{n}'s tunnel to be gone", lambda n=n: site.device(n) == "")
    assert site.told(1)["unreachable"] == ["n3"]
    site.steering = "auto"
    site.apply()
    wait_for("every pod to answer", lambda: site.all_answer(4), 30)


def test_nodes_without_ipv4(site: Site) -> None:
    """The tunnel's own packets travel in IPv6 then, and a stranger's are dropped there too."""
    site.families = [6]
    site.apply()
    wait_for("n1's tunnel by IPv6", lambda: "dst 2001:db8:3::23" in site.forwards(1))
    assert "local 2001:db8:2::21" in site.device(1) and "mtu 1430" in site.device(1)
    wait_for("every pod to answer", lambda: site.all_answer(6), 30)
    received = site.received(3)
    answers = site.ask(6, 60)
    assert {a.get("seen") for a in answers} == {CLIENTS[6]} and site.received(3) > received
    site.net.run("c", sys.executable, "-c", UPLOAD, EIPS[6])

    counters = site.told(3)["counters"]
    forge(site, 6)
    wait_for(
        "the forged packet to be counted",
        lambda: site.told(3)["counters"]["forged"] > counters["forged"],
    )
    site.families = [4, 6]
    site.apply()
    wait_for("every pod to answer", lambda: site.all_answer(4), 30)


def test_nothing_stays(site: Site) -> None:
    """Without the node in the other subnet there is no tunnel; uninstalled, there is nothing."""
    site.nodes = 2
    site.apply((1, 2))
    wait_for("n1's tunnel to be gone", lambda: site.device(1) == "")
    site.nodes = 3
    site.apply((1, 2))
    wait_for("n1's tunnel to be back", lambda: site.device(1) != "")
    site.engines.pop(1).stop()
    for _ in range(2):
        arguments = ("--uninstall", "--snapshot-dir", "/nonexistent")
        site.net.run("n1", sys.executable, "-m", "agent.main", *arguments)
    left = site.ip(1, "rule") + site.ip(1, "-6", "rule")
    assert f"\n{RULE_PRIORITY}:" not in left
    routes = site.ip(1, "route", "show", "table", "all", "proto", "76")
    routes += site.ip(1, "-6", "route", "show", "table", "all", "proto", "76")
    assert routes == "" and site.device(1) == ""
    assert NFT_TABLE not in site.net.run("n1", "nft", "list", "tables")
