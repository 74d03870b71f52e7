"""`lbctl trace` against where packets really go: a thousand random flows of both families, and what
is refused.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

from lbctl.cli.trace import fetch_scene
from lbctl.core.model import Protocol
from lbctl.core.reasons import Reason
from lbctl.core.trace import Packet, Scene, judge, trace
from lbctl.kube.client import Client
from lbctl.lab import workload
from lbctl.lab.api import wait
from lbctl.lab.bringup import KUBECONFIG

from .support import CLIENT, System
from .test_cli import lbctl
from .test_dual_stack import CLIENT6, pair

CASES = 1000
APP = "traced"
PORTS = (("TCP", 80, 8080), ("UDP", 80, 8080), ("TCP", 81, 8081))
CLIENTS = (CLIENT, *(f"203.0.113.{n}" for n in range(101, 121)))
ALLOWED = "203.0.113.96/28"  # up to .111
SECONDS = 4.0  # so long a client waits for an answer
# Asks from the addresses and ports given on stdin, and says which pod answered, or how it failed.
_ASK = f"""
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def ask(case):
    kind, host, port, client, source = case
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((client, source))
        one.settimeout({SECONDS})
        try:
            one.connect((host, port))
            one.send(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            said = b""
            while kind == "TCP" and (part := one.recv(9999)):
                said += part
            said = said.partition(b"\\r\\n\\r\\n")[2] or one.recv(9999)
            return said.split()[0].decode()
        except ConnectionError:
            return "refused"
        except TimeoutError:
            return "silence"

with ThreadPoolExecutor(32) as pool:
    print(json.dumps(list(pool.map(ask, json.load(sys.stdin)))))
"""


@dataclass(frozen=True, slots=True)
class Site:
    """The EIPs of three Services before the same pods, by the Service's name."""

    system: System
    eips: dict[str, str]

    def scene(self) -> Scene:
        """What a trace is computed from, once every agent has exactly that table."""

        def same() -> Scene | None:
            found = asyncio.run(self._fetch())
            probe = Packet(ip_address(self.eips["open"]), 80, ip_address(CLIENT), 1)
            ways = [one for one in trace(probe, found).ingress if one.digest]
            return found if ways and not any(one.differs for one in ways) else None

        return wait("agents whose digest is the computed one", same)

    async def _fetch(self) -> Scene:
        kubeconfig = self.system.lab.directory / KUBECONFIG
        async with await Client.from_environment(Path(kubeconfig), timeout_s=10.0) as client:
            return (await fetch_scene(client))[0]

    def ask(self, packets: list[Packet]) -> list[str]:
        """Which pod answers each packet's flow, or `refused`, or `silence`."""
        cases = [(p.protocol.value, str(p.eip), p.port, str(p.client), p.source) for p in packets]
        done = self.system.lab.machine("client").run(
            "python3", "-c", _ASK, input=json.dumps(cases), timeout_s=120
        )
        return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def site(running: System) -> Iterator[Site]:
    """Five pods; Services without conditions, with affinity, and with source ranges."""
    system = running
    system.wait_system_ready()
    system.deploy(APP, replicas=5, ports=PORTS)
    # These have all endpoints from the start: no bucket has a former owner that datagrams go to.
    eips = {}
    for name, more in (
        ("open", {"ipFamilyPolicy": "RequireDualStack"}),
        ("sticky", {"sessionAffinity": "ClientIP"}),
        ("closed", {"loadBalancerSourceRanges": [ALLOWED]}),
    ):
        system.wait_gone(name)
        made = workload.service(name, app=APP, ports=PORTS)
        made["spec"].update(more)
        system.api.apply(made)
        system.made.append(name)
        eips[name] = wait(f"an EIP for {name}", partial(system.api.eip_of, name))
        system.wait_routed(eips[name])
    eips["open"], eips["six"] = wait("both EIPs", lambda: pair(system.api.eips_of("open")))
    system.wait_routed(eips["six"])
    client = system.lab.machine("client")
    try:
        for address in CLIENTS[1:]:
            client.run("ip", "address", "add", f"{address}/24", "dev", "eth1")
        yield Site(system, eips)
    finally:
        for address in CLIENTS[1:]:
            client.run("ip", "address", "delete", f"{address}/24", "dev", "eth1", check=False)
        for name in list(system.made):
            system.remove(name)


def flows(site: Site, count: int) -> list[Packet]:
    """Random flows that shall be answered, each from a port of its own."""
    chance = random.Random(4711)
    ports = chance.sample(range(10000, 32000), count)  # below those that the kernel picks
    found = []
    for source in ports:
        name = chance.choice(("open", "six", "sticky", "closed"))
        protocol, port = chance.choice(((Protocol.TCP, 80), (Protocol.UDP, 80), (Protocol.TCP, 81)))
        client = chance.choice(CLIENTS if name != "closed" else CLIENTS[1:12])
        client = CLIENT6 if name == "six" else client
        eip = ip_address(site.eips[name])
        found.append(Packet(eip, port, ip_address(client), source, protocol))
    return found


def test_a_thousand_flows_go_where_it_says(site: Site) -> None:
    packets = flows(site, CASES)
    scene = site.scene()
    said = [judge(packet, scene.config, scene.table) for packet in packets]
    assert {verdict.reason for verdict in said} == {Reason.DELIVERED}
    answered = site.ask(packets)
    wrong = [
        (packet, verdict.pod, pod)
        for packet, verdict, pod in zip(packets, said, answered, strict=True)
        if verdict.pod != pod
    ]
    assert not wrong, f"{len(wrong)} of {CASES}: {wrong[:3]}"
    spread = Counter(answered)
    assert len(spread) == 5 and min(spread.values()) > CASES / 20, spread


def test_what_is_refused_is_refused_as_it_says(site: Site) -> None:
    eip, outside = ip_address(site.eips["open"]), ip_address(CLIENT)
    tcp, udp = Protocol.TCP, Protocol.UDP
    free = ip_address("198.51.100.126")
    expected = {
        Packet(eip, 82, outside, 61001, tcp): (Reason.NO_SUCH_PORT, "refused"),
        Packet(eip, 81, outside, 61002, udp): (Reason.NO_SUCH_PORT, "refused"),
        Packet(ip_address(site.eips["closed"]), 80, outside, 61003, tcp): (
            Reason.SOURCE_REFUSED,
            "silence",
        ),
    }
    scene = site.scene()
    for packet, (reason, _) in expected.items():
        assert judge(packet, scene.config, scene.table).reason is reason
    assert site.ask(list(expected)) == [how for _, how in expected.values()]
    nobody = judge(Packet(free, 80, outside, 61004, tcp), scene.config, scene.table)
    assert nobody.reason is Reason.NOT_AN_EIP


def test_the_command_says_who_gets_it_and_what_each_node_does(site: Site) -> None:
    eip = site.eips["six"]
    (pod,) = site.ask([Packet(ip_address(eip), 80, ip_address(CLIENT6), 61010, Protocol.UDP)])
    words = ("trace", f"[{eip}]:80", "--from", f"[{CLIENT6}]:61010", "--proto", "udp")
    done = lbctl(site.system, *words, "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(done.stdout)
    home = data["verdict"]["node"]
    assert data["arrives"] and data["verdict"]["pod"] == pod
    assert all(one["switches"] == ["tor-a", "tor-b"] for one in data["ingress"])
    does = {one["node"]: (one["action"], one["to"]) for one in data["ingress"]}
    assert sorted(does) == ["node-1", "node-2", "node-3"]
    for node in does:
        assert does[node] == (("delivers", "") if node == home else ("steers", home))
    unheard = lbctl(site.system, "trace", f"{site.eips['open']}:99", "--from", f"{CLIENT}:1")
    assert unheard.returncode == 1 and "[NoSuchPort]" in unheard.stdout
