"""The rendered text in the real nftables, and the fake table held against it.

One namespace with an uplink; packets are written to the far end of its veth as whole frames, and
the answer is read from where they come out: by mark, by DNAT, or not at all.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from lbctl.core import nft, nftrules, nodeview
from lbctl.core.model import Protocol
from tests.unit.faketable import FakeTable
from tests.unit.forwarding_cases import EIP, pod, ruleset, service, table

from .agentnet import sh

GOLDEN = Path(__file__).parent.parent / "unit" / "golden"
PODS = [pod(n, p) for n in (1, 2, 3) for p in (2, 3)]
CLIENT = "203.0.113.10"
PEER = "02:00:00:00:00:02"
TRACE = """
table ip trace {
  set seen { type inet_proto . inet_service . mark . ipv4_addr; flags dynamic; size 65535; }
  chain out {
    type filter hook prerouting priority -90;
    iifname "eth0" meta l4proto { tcp, udp } \
      update @seen { meta l4proto . th sport . meta mark . ip daddr }
  }
}
"""


@pytest.fixture
def space() -> Iterator[str]:
    name = f"fk{os.getpid()}"
    sh("ip", "netns", "add", name)
    try:
        batch = (
            "link set lo up\nlink add eth0 type veth peer name far\n"
            "link set eth0 address 02:00:00:00:00:01\nlink set eth0 up\nlink set far up\n"
            "addr add 192.0.2.21/24 dev eth0\nroute add default via 192.0.2.1\n"
            "neigh add 192.0.2.1 lladdr 02:00:00:00:00:99 dev eth0\n"
        )
        sh("ip", "-n", name, "-batch", "-", text=batch)
        sh("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        yield name
    finally:
        sh("ip", "netns", "del", name)


def load(space: str, text: str) -> None:
    sh("ip", "netns", "exec", space, "nft", "-f", "-", text=text)


def cases() -> dict[str, list[str]]:
    """What the golden files hold: the pieces that a node gives to nft, by name."""
    first = nodeview.advance({}, table(*PODS[:3]))
    second = nodeview.advance(first, table(*PODS))
    empty = nodeview.advance(second, table())
    udp = nodeview.advance({}, table(*PODS, of=service(affinity=True, protocol=Protocol.UDP)))
    refusing = nodeview.advance(second, table(*(pod(n, p, "") for n in (1, 2) for p in (2, 3))))
    one, two = ruleset(first, "n1", 1), ruleset(second, "n1", 2)
    return {
        "empty": nft.full(nft.Ruleset(1, ("eth0",))),
        "three": nft.full(one),
        "grown": nft.difference(one, two),
        "affinity": nft.full(ruleset(udp, "n1", 1)),
        "closed": nft.full(ruleset(refusing, "n1", 3)),
        "gone": nft.difference(two, ruleset(empty, "n1", 4)),
        "removal": [nft.removal()],
        "six": [nftrules.skeleton(nftrules.V6), nftrules.refusals(nftrules.V6)],
    }


BASE = {"grown": ("three",), "gone": ("three", "grown")}


@pytest.mark.parametrize("name", sorted(cases()))
def test_golden_text_loads(space: str, name: str) -> None:
    """The text is the stored one, and the kernel takes it."""
    text = "".join(cases()[name])
    path = GOLDEN / f"{name}.nft"
    if os.environ.get("LBCTL_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
    for before in BASE.get(name, ()):
        load(space, (GOLDEN / f"{before}.nft").read_text())
    load(space, path.read_text())


SEND = """
import json, socket, sys
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(("far", 0))
for frame in json.load(sys.stdin):
    link.send(bytes.fromhex(frame))
"""


def frame(protocol: int, source: int, port: int, flags: int, peer: bool) -> str:
    """An Ethernet frame from the client to the EIP, with right checksums."""
    mac = bytes.fromhex((PEER if peer else "02:00:00:00:00:99").replace(":", ""))
    src, dst = ip_address(CLIENT).packed, EIP.packed
    if protocol == socket.IPPROTO_TCP:
        body = struct.pack("!HHIIBBHHH", source, port, 1000, 2000, 0x50, flags, 64000, 0, 0)
        place = 16
    else:
        body = struct.pack("!HHHH", source, port, 8, 0)
        place = 6
    pseudo = src + dst + struct.pack("!BBH", 0, protocol, len(body))
    body = body[:place] + struct.pack("!H", checksum(pseudo + body)) + body[place + 2 :]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0, src, dst)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return (bytes.fromhex("020000000001") + mac + bytes((8, 0)) + head + body).hex()


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


SYN, ACK = 0x02, 0x10


def test_the_fake_says_what_the_kernel_does(space: str) -> None:
    first = nodeview.advance({}, table(*PODS[:3]))
    second = nodeview.advance(first, table(*PODS))
    texts = [
        *nft.full(ruleset(first, "n1", 1)),
        *nft.difference(ruleset(first, "n1", 1), ruleset(second, "n1", 2)),
    ]
    fake = FakeTable()
    for text in texts:
        fake.apply(text)
        load(space, text)
    load(space, TRACE)
    ports = iter(range(20000, 60000))
    asked: dict[int, tuple[bool, bool, int]] = {}
    frames = []
    for peer in (False, True):
        for flags in (SYN, ACK):
            for port in (80, 81):
                for _ in range(60):
                    source = next(ports)
                    asked[source] = (peer, flags == SYN, port)
                    frames.append(frame(6, source, port, flags, peer))
    command = ["ip", "netns", "exec", space, sys.executable, "-c", SEND]
    subprocess.run(command, input=json.dumps(frames), text=True, check=True, timeout=60)
    found = seen(space)
    ways = set()
    for source, (peer, syn, port) in asked.items():
        said = fake.where(str(EIP), port, CLIENT, source, syn=syn, peer=peer)
        ways.add(said.split()[0])
        assert found.get(source, "nowhere") == expected(said), (source, peer, syn, port, said)
    assert ways == {"node", "chance", "pod", "refuse", "stray"}


def expected(said: str) -> str:
    kind, _, what = said.partition(" ")
    if kind in ("node", "chance"):
        return f"mark {int(what)}"
    return f"pod {what.partition(':')[0]}" if kind == "pod" else "nowhere"


def seen(space: str) -> dict[int, str]:
    """Source port → where the kernel sent it; one that was dropped is not in it."""
    text = sh("ip", "netns", "exec", space, "nft", "-j", "list", "set", "ip", "trace", "seen")
    result = {}
    for entry in json.loads(text)["nftables"]:
        for element in entry.get("set", {}).get("elem", ()):
            _, source, mark, address = element["concat"]
            result[source] = f"mark {mark & 0xFFFF}" if mark else f"pod {address}"
    return result
