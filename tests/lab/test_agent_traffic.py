"""Real packets through the agent's engine on three nodes: who answers, and what survives.

A traffic test counts only if it could have failed: the counters prove that connections were
steered, entered by the node that fails, or took the second chance.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from .agentnet import Helper, Net, wait_for

EIP = "198.51.100.1"
CLIENT = "203.0.113.10"


class Site:
    """The network with an engine on each node and a client; `spec` is the cluster's state."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.numbers = range(1, net.nodes + 1)
        net.start_pods()
        self.engines: dict[int, Helper] = {
            n: net.start(f"n{n}", "agent_node.py", f"n{n}") for n in self.numbers
        }
        self.client = net.start("c", "agent_client.py")
        self.spec: dict[str, Any] = {}
        self.apply(all_pods(net))
        for n, engine in self.engines.items():
            engine.hear(f"the neighbours' MACs on n{n}", lambda m: m.get("macs") == net.nodes - 1)

    def apply(self, endpoints: list[list[Any]], **more: Any) -> float:
        """Give every node these endpoints; returns when all have confirmed the same table."""
        self.spec = {
            "eips": {EIP: "web"},
            "services": {
                "web": {
                    "ports": [["", "TCP", 80], ["dns", "UDP", 53]],
                    "endpoints": endpoints,
                    "affinity": more.pop("affinity", False),
                    "sources": more.pop("sources", []),
                }
            },
            "nodes": self.net.nodes,
            "ranges": [["198.51.100.0", "198.51.100.127"]],
            **more,
        }
        for engine in self.engines.values():
            engine.tell(self.spec)
        digests = {
            engine.hear(f"n{n} to confirm", lambda m: "digest" in m)["digest"]
            for n, engine in self.engines.items()
        }
        assert len(digests) == 1
        return 0.0

    def ask(self, count: int, host: str = EIP, port: int = 80, **more: Any) -> list[dict[str, Any]]:
        self.client.tell({"ask": [host, port], "count": count, **more})
        answers: list[dict[str, Any]] = self.client.hear("the client's answers")["result"]
        return answers

    def open(self, count: int) -> None:
        self.client.tell({"open": [EIP, 80], "count": count})
        self.client.hear(f"{count} connections")

    def report(self) -> list[dict[str, Any]]:
        self.client.tell({"report": True})
        flows: list[dict[str, Any]] = self.client.hear("the flows' report")["result"]
        return flows

    def carried(self, more: int = 20) -> list[dict[str, Any]]:
        """The flows, once each one has had `more` further answers or has broken."""
        begin = [flow["count"] for flow in self.report()]

        def moved() -> Any:
            flows = self.report()
            done = all(
                f["broken"] or f["count"] >= b + more for f, b in zip(flows, begin, strict=True)
            )
            return flows if done else None

        found: list[dict[str, Any]] = wait_for("every connection to go on or break", moved)
        return found

    def counters(self, n: int) -> dict[str, int]:
        self.engines[n].tell({"counters": True})
        found: dict[str, int] = self.engines[n].hear("counters", lambda m: "counters" in m)[
            "counters"
        ]
        return found

    def total(self, name: str) -> int:
        return sum(self.counters(n)[name] for n in self.engines)


def all_pods(net: Net, flags: str = "rs") -> list[list[Any]]:
    return [
        [net.pod_address(n, p), 8080, flags]
        for n in range(1, net.nodes + 1)
        for p in range(1, net.pods + 1)
    ]


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    net = Net(f"ag{os.getpid()}")
    try:
        yield Site(net)
    finally:
        net.close()


@pytest.fixture
def site(shared: Site) -> Site:
    """The shared site with all pods behind the EIP and a new client."""
    shared.client.stop()
    shared.client = shared.net.start("c", "agent_client.py")
    shared.apply(all_pods(shared.net))
    return shared


def pods_of(answers: list[dict[str, Any]]) -> Counter[str]:
    return Counter(a.get("pod", a.get("error", "")) for a in answers)


def test_the_main_job(site: Site) -> None:
    """Every pod answers, sees the client's own address, and takes its share."""
    answers = site.ask(600)
    assert {a.get("seen") for a in answers} == {CLIENT}
    shares = pods_of(answers)
    assert sorted(shares) == sorted(n for n in site.net.names if n.startswith("p"))
    # Binomial with p = 1/6 over 600: 100 ± 9.1; six sigma on either side.
    assert all(45 <= share <= 155 for share in shares.values()), shares
    assert all(site.counters(n)["steered"] > 0 for n in site.numbers)
    stray = site.total("stray")
    site.ask(20)
    assert site.total("stray") == stray

    answers = site.ask(60, port=53, udp=True)
    assert {a.get("seen") for a in answers} == {CLIENT}
    assert len(pods_of(answers)) > 3

    site.apply(all_pods(site.net), affinity=True)
    assert len(pods_of(site.ask(30))) == 1
    site.apply(all_pods(site.net), sources=["192.0.2.0/24", "203.0.113.8/31"])
    assert pods_of(site.ask(3, limit_s=0.5)) == {"timeout": 3}
    site.apply(all_pods(site.net), sources=["192.0.2.0/24", "203.0.113.10/31"])
    assert len(pods_of(site.ask(60))) > 3


def test_nothing_else_passes(site: Site) -> None:
    """Unknown ports, free addresses and empty Services are refused at once; no host answers."""
    listeners = [site.net.start(f"n{n}", "agent_pod.py", f"host{n}") for n in site.numbers]
    for listener in listeners:
        listener.hear("the host's own socket")
    assert pods_of(site.ask(5, host="192.0.2.21", port=8080)) == {"host1": 5}
    forwarded = Router(site.net)
    for host, port in ((EIP, 8080), (EIP, 81), ("198.51.100.77", 8080)):
        assert pods_of(site.ask(10, host=host, port=port)) == {"ConnectionRefusedError": 10}
        refused_udp(site, host, port)
    site.apply([])
    assert pods_of(site.ask(10)) == {"ConnectionRefusedError": 10}
    site.apply(all_pods(site.net, ""))
    assert pods_of(site.ask(10)) == {"ConnectionRefusedError": 10}
    refused_udp(site, EIP, 53)
    assert forwarded.came_back() == 0
    assert site.total("refused") >= 60


def refused_udp(site: Site, host: str, port: int) -> None:
    """Nobody answers, and senders are told so.

    The kernel itself sends a client no more than 6 ICMP errors at a time and one per second after
    (net.ipv4.icmp_ratelimit), so that not every sender can be told.
    """

    def told() -> int:
        answers = pods_of(site.ask(6, host=host, port=port, udp=True, limit_s=1.5))
        assert answers.keys() <= {"ConnectionRefusedError", "timeout"}, answers
        return answers["ConnectionRefusedError"]

    wait_for(f"a sender to {host}:{port} to be told", told)


class Router:
    """Counts the pool's packets that the nodes send back to the router: a loop."""

    def __init__(self, net: Net) -> None:
        self.net = net
        rules = """
        table ip loop {
          counter back { }
          chain in {
            type filter hook prerouting priority raw;
            iifname "br0" ip daddr 198.51.100.0/25 counter name back
          }
        }"""
        net.run("r", "nft", rules)

    def came_back(self) -> int:
        words = self.net.run("r", "nft", "list", "counter", "ip", "loop", "back").split()
        return int(words[words.index("packets") + 1])


def test_scaling_breaks_nothing(site: Site) -> None:
    """Endpoints come, a size class is outgrown, one terminates: established connections stay."""
    pods = all_pods(site.net)
    site.apply(pods[:2] + pods[2:3])
    site.open(150)
    site.apply(pods)
    flows = site.carried()
    assert broken(flows) == []
    assert site.total("second_chance") > 0
    # 6 endpoints leave the 64 buckets of 3; next, those of one node start to terminate.
    leaving = [[a, port, "st" if a.startswith("10.244.1.") else "rs"] for a, port, _ in pods]
    site.apply(leaving)
    flows = site.carried()
    assert broken(flows) == []
    assert set(pods_of(site.ask(60))) == {"p21", "p22", "p31", "p32"}
    # None serves any more: new connections are refused, established ones stay.
    site.apply([[a, port, ""] for a, port, _ in pods])
    flows = site.carried()
    assert broken(flows) == []
    assert pods_of(site.ask(5)) == {"ConnectionRefusedError": 5}


def test_power_cut(site: Site) -> None:
    """A node goes: connections to living pods go on, whatever node they entered by.

    The last test of this file: the node does not come back.
    """
    site.open(200)
    before = {n: site.counters(n)["steered"] for n in site.numbers}
    flows = site.carried()
    assert not [f for f in flows if f["broken"]]
    entered = {n: site.counters(n)["steered"] - before[n] for n in site.numbers}
    # Of the packets that the failing node took in, two thirds were steered on.
    assert entered[1] * 5 > sum(entered.values())

    site.net.cut(1)
    site.engines.pop(1).stop(9)
    site.net.ecmp([2, 3])
    site.apply(all_pods(site.net), down=["n1"])
    flows = site.carried()
    lost = [f for f in flows if f["broken"]]
    assert {f["pod"] for f in lost} <= {"p11", "p12"}, lost
    assert [f for f in flows if f["pod"] not in ("p11", "p12") and f["broken"]] == []
    assert set(pods_of(site.ask(60))) == {"p21", "p22", "p31", "p32"}


def broken(flows: list[dict[str, Any]]) -> list[tuple[str, str, int, float]]:
    return [(f["pod"], f["broken"], f["count"], f["gap_s"]) for f in flows if f["broken"]]
