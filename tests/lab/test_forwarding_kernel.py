"""The rendered text in the real nftables, and the fake table held against it.

One namespace with an uplink; packets are written to the far end of its veth as whole frames, and
the answer is read from where they come out: by mark, by DNAT, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lbctl.core import nft, nodeview
from lbctl.core.model import Protocol
from lbctl.core.names import MARK_BASE
from lbctl.core.nftfamily import FAMILIES, HANDOVER_TTL
from lbctl.core.nftpins import ANSWER_TTL
from lbctl.core.nftsets import Policy
from tests.unit.faketable import FakeTable
from tests.unit.forwarding_cases import EIP, EIP6, pod, ruleset, service, table

from . import frames
from .agentnet import sh

GOLDEN = Path(__file__).parent.parent / "unit" / "golden"
PODS = [pod(n, p) for n in (1, 2, 3) for p in (2, 3)]
PEER, ROUTER = "02:00:00:00:00:02", "02:00:00:00:00:99"
HOSTS = ("192.0.2.21", "2001:db8:1::21")
# What leaves prerouting: the port or identifier that tells the packets apart, mark and address.
TRACE = """
table {ip} trace {{
  set flows {{ typeof {ip} daddr . meta mark . @th,0,16; flags dynamic; size 65535; }}
  set pings {{ typeof {ip} daddr . meta mark . @th,32,16; flags dynamic; size 65535; }}
  set errors {{ typeof {ip} daddr . meta mark . {port}; flags dynamic; size 65535; }}
  chain out {{
    type filter hook prerouting priority -90;
    iifname != "eth0" accept
    meta l4proto {{ tcp, udp }} update @flows {{ {ip} daddr . meta mark . @th,0,16 }}
    {icmp} type echo-request update @pings {{ {ip} daddr . meta mark . @th,32,16 }}
    {icmp} type time-exceeded update @errors {{ {ip} daddr . meta mark . {port} }}
  }}
}}
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
            "addr add 2001:db8:1::21/64 dev eth0 nodad\nroute add default via 2001:db8:1::1\n"
            "neigh add 2001:db8:1::1 lladdr 02:00:00:00:00:99 dev eth0\n"
        )
        sh("ip", "-n", name, "-batch", "-", text=batch)
        sh(
            "ip",
            "netns",
            "exec",
            name,
            "sysctl",
            "-qw",
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
        )
        yield name
    finally:
        sh("ip", "netns", "del", name)


def load(space: str, text: str) -> None:
    sh("ip", "netns", "exec", space, "nft", "-f", "-", text=text)


def cases() -> dict[str, list[str]]:
    """What the golden files hold: the pieces that a node gives to nft, by name."""
    first = nodeview.advance({}, table(*PODS[:3]), "n1")
    second = nodeview.advance(first, table(*PODS), "n1")
    empty = nodeview.advance(second, table(), "n1")
    udp = nodeview.advance(
        {}, table(*PODS, of=service(affinity=True, protocols=(Protocol.UDP,))), "n1"
    )
    unready = (pod(n, p, "") for n in (1, 2) for p in (2, 3))
    refusing = nodeview.advance(second, table(*unready), "n1")
    one, two = ruleset(first, "n1", 1), ruleset(second, "n1", 2)
    return {
        "empty": nft.full(nft.Ruleset(1, ("eth0",))),
        "three": nft.full(one),
        "grown": nft.difference(one, two),
        "affinity": nft.full(ruleset(udp, "n1", 1)),
        "closed": nft.full(ruleset(refusing, "n1", 3)),
        "gone": nft.difference(two, ruleset(empty, "n1", 4)),
        "removal": [nft.removal()],
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


@dataclass(frozen=True)
class Case:
    """A packet from the outside, and the words of the fake's `where` for it."""

    client: str
    port: int = 80
    peer: bool = False
    protocol: str = "tcp"
    syn: bool = True
    odd: bool = False
    about: bool = False
    handed: bool = False
    answered: bool = False

    def packet(self, eip: str, source: int) -> bytes:
        four = frames.version(eip) == 4
        if self.about:
            inner = frames.tcp(eip, self.port, self.client, source, frames.ACK)
            inner = frames.odd(inner) if self.odd else inner
            router = "192.0.2.1" if four else "2001:db8:1::1"
            return frames.icmp(router, eip, frames.EXCEEDED, 0, inner[:68])
        if self.protocol == "icmp":
            packet = frames.icmp(self.client, eip, frames.ECHO, source << 16, b"ping")
        elif self.protocol == "udp":
            packet = frames.udp(self.client, source, eip, self.port)
        else:
            flags = frames.SYN if self.syn else frames.ACK
            packet = frames.tcp(self.client, source, eip, self.port, flags)
        if self.handed or self.answered:
            packet = frames.with_hops(packet, HANDOVER_TTL if self.handed else ANSWER_TTL)
        return frames.odd(packet) if self.odd else packet


def kinds(version: int) -> list[Case]:
    allowed, denied = CLIENTS[version]
    return [
        *(
            Case(allowed, port, peer, syn=syn)
            for peer in (False, True)
            for syn in (True, False)
            for port in (80, 81)
        ),
        *(Case(denied, peer=peer) for peer in (False, True)),
        *(Case(allowed, peer=peer, odd=True) for peer in (False, True)),
        *(Case(allowed, port, about=True) for port in (80, 81)),
        Case(allowed, about=True, odd=True),
        *(Case(allowed, peer=peer, protocol="icmp") for peer in (False, True)),
        *(Case(allowed, peer=peer, protocol="udp") for peer in (False, True)),
        *(Case(allowed, peer=True, protocol=p, syn=False, handed=True) for p in ("tcp", "udp")),
        *(Case(allowed, peer=True, protocol=p, handed=True) for p in ("tcp", "udp")),
        *(Case(allowed, peer=True, protocol=p, answered=True) for p in ("tcp", "udp")),
    ]


CLIENTS = {4: ("203.0.113.10", "203.0.114.10"), 6: ("2001:db8:3::10", "2001:db8:4::10")}
ALLOWED = ("203.0.113.0/24", "2001:db8:3::/64")
WORDS = ("protocol", "syn", "peer", "odd", "about", "handed", "answered")


@pytest.mark.parametrize("here", [True, False], ids=["pods here", "no pod here"])
@pytest.mark.parametrize("affinity", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_the_fake_says_what_the_kernel_does(
    space: str, version: int, affinity: bool, here: bool
) -> None:
    eip = str(EIP if version == 4 else EIP6)
    pods = [pod(n, p, version=version) for n in (1, 2, 3) if here or n > 1 for p in (2, 3)]
    of = service(affinity=affinity, sources=ALLOWED, protocols=(Protocol.TCP, Protocol.UDP))
    tables = [table(*some, of=of, eips=(EIP, EIP6)) for some in (pods[1:4], pods)]
    first = nodeview.advance({}, tables[0], "n1")
    views = [first, nodeview.advance(first, tables[1], "n1")]
    policy = Policy(pingable={EIP: None, EIP6: None}, new_flows=5000)
    old, new = (ruleset(views[n], "n1", n, tables[n], policy) for n in (0, 1))
    fake = FakeTable()
    for text in [*nft.full(old), *nft.difference(old, new)]:
        fake.apply(text)
        load(space, text)
    family = FAMILIES[0 if version == 4 else 1]
    load(space, TRACE.format(ip=family.ip, icmp=family.icmp, port=family.client_port))
    asked = {
        20000 + i: replace(case, client=f"{case.client[:-2]}{10 + i % 199}")
        for i, case in enumerate(kinds(version) * 40)
    }
    sent = [
        frames.frame(
            case.packet(eip, source), "02:00:00:00:00:01", PEER if case.peer else ROUTER
        ).hex()
        for source, case in asked.items()
    ]
    command = ["ip", "netns", "exec", space, sys.executable, "-c", SEND]
    subprocess.run(command, input=json.dumps(sent), text=True, check=True, timeout=60)
    found = seen(space, family.ip, eip)
    ways = set()
    for source, case in asked.items():
        words = {name: getattr(case, name) for name in WORDS}
        said = fake.where(eip, case.port, case.client, source, **words)
        ways.add(said.split()[0])
        assert found.get(source, "nowhere") == expected(said), (source, case, said)
    every = {"node", "chance", "owner", "ping", "refused", "sources", "odd", "stray"}
    if here:
        every |= {"pod", "ask", "answer"} if affinity else {"pod"}
    else:
        every |= {"on", "answer"} if affinity else {"on"}
    assert ways == every


def expected(said: str) -> str:
    kind, _, what = said.partition(" ")
    if kind in ("node", "on", "chance", "owner", "ask", "answer"):
        return f"mark {int(what)}"
    if kind == "pod":
        return f"pod {what.rpartition(':')[0]}"
    return "host" if kind == "ping" else "nowhere"


def seen(space: str, ip: str, eip: str) -> dict[int, str]:
    """Port or identifier → where the kernel sent the packet; one that was dropped is not in it."""
    result = {}
    for name in ("flows", "pings", "errors"):
        text = sh("ip", "netns", "exec", space, "nft", "list", "set", ip, "trace", name)
        for address, mark, source in re.findall(r"(\S+) \. (0x\w+) \. (\w+)", text):
            number, way = int(mark, 16), f"pod {address}"
            if number:
                way = f"mark {number - MARK_BASE}"
            elif name == "pings":
                way = "host" if address in HOSTS else f"EIP {address}"
            elif address == eip:
                continue  # an error that no node takes: dropped when it would be routed
            result[int(source, 0)] = way
    return result


LACKING = """
import asyncio
from agent.dataplane import Dataplane
from lbctl.core.nft import Ruleset

async def main():
    plane = Dataplane()
    await plane.survey()
    print(*plane.lacking)
    print(await plane.set([Ruleset(1, ("eth0",))]))

asyncio.run(main())
"""


EMPTIED = """
import asyncio, os, subprocess
from agent.dataplane import Dataplane
from lbctl.core.nft import Ruleset
from lbctl.errors import DataplaneError

def refused(number):
    try:
        asyncio.run(Dataplane().set([Ruleset(number, ("eth0",))]))
    except DataplaneError:
        return Dataplane().blank()

asyncio.run(Dataplane().set([Ruleset(1, ("eth0",))]))
print(Dataplane().blank())
path, os.environ["PATH"] = os.environ["PATH"], "/nonexistent"
print(refused(2))
os.environ["PATH"] = path
subprocess.run(("nft", "delete", "table", "ip6", "lbctl"), check=True)
subprocess.run(("nft", "delete", "table", "ip", "lbctl"), check=True)
os.environ["PATH"] = "/nonexistent"
print(refused(3))
"""


def test_what_is_refused_before_it_begins_leaves_a_table(space: str) -> None:
    """A node whose table is gone is no next hop; one that could not be given another one is."""
    where = f"PYTHONPATH={GOLDEN.parent.parent.parent}"
    said = sh("ip", "netns", "exec", space, "env", where, sys.executable, "-c", EMPTIED)
    assert said.split() == ["False", "False", "True"]


def test_without_ct_timeouts_it_is_said_and_the_rest_works(space: str, tmp_path: Path) -> None:
    """An nft that refuses these objects stands for a kernel without them."""
    known = sh("which", "nft").strip()
    (tmp_path / "nft").write_text(
        '#!/bin/sh\ntext=$(cat)\ncase "$text" in *"ct timeout"*) echo "no such thing" >&2; exit 1;;'
        f' esac\necho "$text" | exec {known} "$@"\n'
    )
    (tmp_path / "nft").chmod(0o755)
    path = f"PATH={tmp_path}:{os.environ['PATH']}"
    where = f"PYTHONPATH={GOLDEN.parent.parent.parent}"
    command = ("ip", "netns", "exec", space, "env", path, where, sys.executable, "-c", LACKING)
    said, written = sh(*command).splitlines()
    assert said.startswith("ct timeout objects cannot be used (nft: no such thing): ")
    assert written == "True"
