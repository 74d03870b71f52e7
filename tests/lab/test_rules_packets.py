"""What a switch may send a node besides a connection's own packets: ICMP errors, echo requests,
fragments, options. Real sockets through two nodes, both families.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from ipaddress import ip_address

import pytest

from agent import conntrack
from lbctl.core import nft, nodeview
from lbctl.core.model import ForwardingOptions, Protocol, TrafficPolicy
from lbctl.core.names import PROBE_PORT
from lbctl.core.nftrules import PINGS_PER_SECOND
from lbctl.core.nftsets import Policy

from . import frames
from .agentnet import wait_for
from .rulesnet import (
    CLIENT,
    EIP,
    GATE_MAC,
    LIMIT_S,
    NODE,
    POD,
    POD_PORT,
    PORT,
    ROUTER_MAC,
    Flow,
    RulesNet,
    both,
    made,
    mss,
    rules,
    service,
    table,
)


@pytest.fixture(scope="module")
def net() -> Iterator[RulesNet]:
    net = made("rp")
    try:
        both(net, table())
        yield net
    finally:
        net.close()


def flows(net: RulesNet, version: int, count: int = 3) -> list[Flow]:
    """Connections, so many to each pod at least."""
    found: list[Flow] = []
    while any(sum(f.pod == pod for f in found) < count for pod in (1, 2)):
        found.append(net.connect(version))
        assert len(found) < 60, "the hash gives one pod everything"
    return found


_FIRST = """table {family} first {{
  chain leaving {{
    type filter hook postrouting priority 300;
    tcp sport {port} tcp flags & (syn|ack) == (syn|ack) meta priority 0:6 counter
    tcp sport {port} tcp flags & (syn|ack) == ack meta priority 0:6 drop
    tcp sport {probes} tcp flags & rst == rst meta priority != 0:6 drop
  }}
}}
"""


@pytest.mark.parametrize("version", [4, 6])
def test_answers_to_syns_go_first_and_data_does_not(net: RulesNet, version: int) -> None:
    """In the node's own queue, the kernel's to a manager's too: full uplinks would lose them."""
    family = "ip" if version == 4 else "ip6"
    for node in (1, 2):
        net.load(node, _FIRST.format(family=family, port=PORT, probes=PROBE_PORT))
    try:
        made = flows(net, version)
        assert all(flow.carries(100) for flow in made)
        for node in (1, 2):
            with net.opened("r", version, socket.SOCK_STREAM) as asking:
                asking.settimeout(LIMIT_S)
                with pytest.raises(ConnectionRefusedError):
                    asking.connect((NODE[version].format(node), PROBE_PORT))
        seen = [net.run(f"n{n}", "nft", "-j", "list", "table", family, "first") for n in (1, 2)]
        counts = [
            expression["counter"]["packets"]
            for text in seen
            for entry in json.loads(text)["nftables"]
            for expression in entry.get("rule", {}).get("expr", ())
            if "counter" in expression
        ]
        assert len(counts) == 2 and all(count >= 3 for count in counts)
    finally:
        for node in (1, 2):
            net.load(node, f"delete table {family} first\n")


@pytest.mark.parametrize("version", [4, 6])
def test_path_mtu_reaches_the_pod(net: RulesNet, version: int) -> None:
    """The path narrows: the router's words about it come in by node 1, whoever has the flow."""
    before = net.counters(1)["errors"]
    open_flows = flows(net, version)
    assert all(mss(flow.server) > 1400 for flow in open_flows)
    net.ip("r", "link set c0 mtu 1300\n")
    try:
        for flow in open_flows:
            # Else the pod knows the path from its last connection.
            net.run(f"p{flow.pod}", "ip", f"-{version}", "route", "flush", "cache")
            assert flow.carries(100_000)
            assert mss(flow.server) <= 1300 - (40 if version == 4 else 60), flow.pod
        assert net.counters(1)["errors"] - before >= sum(f.pod == 2 for f in open_flows)
    finally:
        net.ip("r", "link set c0 mtu 1500\n")
        for flow in open_flows:
            flow.close()


@pytest.mark.parametrize("version", [4, 6])
def test_unreachable_reaches_the_pod(net: RulesNet, version: int) -> None:
    """A client that has gone says so to the pod that goes on sending to it."""
    level, option = (0, 11) if version == 4 else (41, 25)  # IP_RECVERR, IPV6_RECVERR
    pods = set()
    for source in range(30000, 30010):
        client = net.opened("c", version, socket.SOCK_DGRAM)
        client.bind((CLIENT[version], source))
        pod = net.asked(client, b"hello", (EIP[version], 53))
        client.close()
        server = next(s for s, n in net.receivers.items() if n == pod and s.family == client.family)
        server.setsockopt(level, option, 1)
        server.sendto(b"answer", (CLIENT[version], source))
        with pytest.raises(ConnectionRefusedError):
            server.recv(1)
        server.setsockopt(level, option, 0)
        pods.add(pod)
    assert pods == {1, 2}


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_are_put_together(net: RulesNet, version: int) -> None:
    """A datagram of three fragments comes whole, also by way of the other node."""
    text = bytes(range(250)) * 16
    pods = set()
    for _ in range(20):
        client = net.opened("c", version, socket.SOCK_DGRAM)
        pods.add(net.asked(client, text, (EIP[version], 53)))
        client.close()
    assert pods == {1, 2}


@pytest.mark.parametrize("version", [4, 6])
def test_options_are_refused(net: RulesNet, version: int) -> None:
    before = net.counters(1)["odd"]
    wire = net.link("c", "eth0")
    tracked = net.tracked(1) + net.tracked(2)
    for source in range(40000, 40020):
        packet = frames.odd(frames.tcp(CLIENT[version], source, EIP[version], PORT))
        wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
    wait_for("the odd packets to be counted", lambda: net.counters(1)["odd"] == before + 20)
    assert net.tracked(1) + net.tracked(2) <= tracked


def echo(net: RulesNet, version: int, address: str, count: int = 1) -> int:
    """How many of so many echo requests are answered."""
    wire = net.opened("c", version, socket.SOCK_RAW, 1 if version == 4 else 58)
    wire.settimeout(1.0)
    for number in range(count):
        packet = frames.icmp(CLIENT[version], address, frames.ECHO, 77 << 16 | number, b"ping")
        wire.sendto(packet[20 if version == 4 else 40 :], (address, 0))
    answers = 0
    with contextlib.suppress(TimeoutError):
        while answers < count:
            data, (source, *_) = wire.recvfrom(2048)
            kind = data[20] if version == 4 else data[0]
            answers += source == address and kind == (0 if version == 4 else 129)
    wire.close()
    return answers


@pytest.mark.parametrize("version", [4, 6])
def test_an_eip_answers_ping(net: RulesNet, version: int) -> None:
    """By the node that got it, each of them, at a limited rate; other addresses do not."""
    for node in (1, 2):
        net.enter(node)
        assert echo(net, version, EIP[version]) == 1
    assert echo(net, version, "198.51.100.99" if version == 4 else "2001:db8:100::99") == 0
    before = net.counters(2)["flood"]
    assert PINGS_PER_SECOND <= echo(net, version, EIP[version], 400) < 400
    assert net.counters(2)["flood"] > before
    net.enter(1)


def test_ping_can_be_off_and_sources_hold(net: RulesNet) -> None:
    both(net, table(), Policy())
    assert [echo(net, v, EIP[v]) for v in (4, 6)] == [0, 0]
    away = service(Protocol.TCP, ("192.0.2.0/24", "2001:db8:1::/64"))
    both(net, table(of=away))
    assert [echo(net, v, EIP[v]) for v in (4, 6)] == [0, 0]
    both(net, table())
    assert [echo(net, v, EIP[v]) for v in (4, 6)] == [1, 1]


@pytest.mark.parametrize("version", [4, 6])
def test_an_endpoint_on_no_node_sees_the_node(net: RulesNet, version: int) -> None:
    """Masqueraded by the node that the packet came to, so that the answer comes back to it."""
    host = "192.0.2.1" if version == 4 else "2001:db8:1::1"
    server = net.opened("r", version, socket.SOCK_STREAM)
    server.bind((host, POD_PORT))
    server.listen()
    policy = Policy(external=(ip_address(host),))
    for node in (1, 2):
        for text in nft.full(rules(table((node,)), node, policy)):
            net.load(node, text.replace(f": {POD[version].format(node)} .", f": {host} ."))
    try:
        for node in (1, 2):
            net.enter(node)
            client = net.opened("c", version, socket.SOCK_STREAM)
            client.connect((EIP[version], PORT))
            accepted, seen = server.accept()
            assert seen[0] == NODE[version].format(node)
            assert Flow(client, accepted, 0).echoes()
            accepted.close()
            client.close()
    finally:
        server.close()
        net.enter(1)
        both(net, table())


def test_no_flow_moves_when_a_pod_comes_and_the_switch_hashes_anew(net: RulesNet) -> None:
    """TCP and UDP, one size class up; and when the pod goes, its datagrams find another at once."""
    old, new = table((1,)), table()
    views = {n: nodeview.advance({}, old, f"n{n}") for n in (1, 2)}
    grown = {n: nodeview.advance(view, new, f"n{n}") for n, view in views.items()}
    for n in (1, 2):
        net.load(n, *nft.full(rules(old, n)))
    open_flows = [net.connect(v) for v in (4, 6) for _ in range(30)]
    senders = [net.opened("c", v, socket.SOCK_DGRAM) for v in (4, 6) for _ in range(30)]

    def pods(which: list[socket.socket]) -> list[int]:
        return [
            net.asked(s, b"x", (EIP[4 if s.family == socket.AF_INET else 6], 53)) for s in which
        ]

    assert pods(senders) == [1] * 60 and {flow.pod for flow in open_flows} == {1}
    for n in (1, 2):
        net.load(n, *nft.difference(rules(old, n), rules(new, n, view=grown[n])))
    net.enter(2)
    before = net.counters(2)["second_chance"]
    assert all(flow.echoes() for flow in open_flows)
    assert pods(senders) == [1] * 60
    # About half of the flows, and none of them circles.
    assert 30 <= net.counters(2)["second_chance"] - before <= 300

    settled = {n: nodeview.settle(view, list(view)) for n, view in grown.items()}
    for n in (1, 2):
        net.load(n, *nft.difference(rules(new, n, view=grown[n]), rules(new, n, view=settled[n])))
    assert pods(senders) == [1] * 60
    later = [net.opened("c", v, socket.SOCK_DGRAM) for v in (4, 6) for _ in range(15)]
    found = pods(later)
    assert set(found) == {1, 2}
    # A flow of one direction is no new one, whatever its bucket remembers.
    net.load(2, *nft.difference(rules(new, 2, view=settled[2]), rules(new, 2, view=grown[2])))
    assert pods(later) == found

    last = table((2,))
    for n in (1, 2):
        view = nodeview.advance(grown[n], last, f"n{n}")
        net.load(n, *nft.full(rules(last, n, view=view)))
        targets = conntrack.left(new, last, f"n{n}", {f"n{3 - n}": 3 - n})
        assert net.inside(f"n{n}", partial(conntrack.forget, targets)) > 0
    assert pods(senders) == [2] * 60
    for flow in open_flows:
        flow.close()
    net.enter(1)
    both(net, table())


def test_zero_endpoints_and_back(net: RulesNet) -> None:
    """A client is refused by its first packet, and not by a timeout; then it is answered again."""
    for gone in (table(()), table((), unready=(1, 2))):
        both(net, gone)
        for version in (4, 6):
            before = net.counters(1)["refused"]
            for kind, port in ((socket.SOCK_STREAM, PORT), (socket.SOCK_DGRAM, 53)):
                client = net.opened("c", version, kind)
                with pytest.raises(ConnectionRefusedError):
                    client.connect((EIP[version], port))
                    client.send(b"x")
                    client.recv(1)
            assert net.counters(1)["refused"] == before + 2  # nothing was sent twice
        both(net, table())
        for version in (4, 6):
            client = net.opened("c", version, socket.SOCK_DGRAM)
            assert net.asked(client, b"x", (EIP[version], 53))
            assert net.connect(version).echoes()


@pytest.mark.parametrize("version", [4, 6])
def test_strict_local_delivery(net: RulesNet, version: int) -> None:
    """Each node delivers to its own pod, and one without a pod drops: nothing is steered."""
    local = replace(service(), policy=TrafficPolicy.LOCAL)
    strict = ForwardingOptions(local_delivery="strict")
    both(net, table(of=local, options=strict))
    before = net.counters(1)["steered"] + net.counters(2)["steered"]
    for node in (1, 2):
        net.enter(node)
        assert {net.connect(version).pod for _ in range(10)} == {node}
    both(net, table((1,), of=local, options=strict))
    client = net.opened("c", version, socket.SOCK_DGRAM)
    stray = net.counters(2)["stray"]
    client.sendto(b"x", (EIP[version], 53))
    wait_for("the datagram to be dropped", lambda: net.counters(2)["stray"] == stray + 1)
    assert net.counters(1)["steered"] + net.counters(2)["steered"] == before
    net.enter(1)
    assert net.connect(version).pod == 1
    both(net, table())


@pytest.mark.parametrize("version", [4, 6])
def test_sctp_reaches_a_pod(net: RulesNet, version: int) -> None:
    try:
        server = net.opened("p1", version, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    except OSError as error:
        pytest.skip(f"this kernel has no SCTP sockets (CONFIG_IP_SCTP): {error}")
    server.bind((POD[version].format(1), POD_PORT))
    server.listen()
    both(net, table((1,), of=service(Protocol.SCTP)))
    for node in (1, 2):
        net.enter(node)
        client = net.opened("c", version, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
        client.connect((EIP[version], PORT))
        accepted, _ = server.accept()
        assert Flow(client, accepted, 1).echoes()
        accepted.close()
    net.enter(1)
    both(net, table())


def clients(version: int, part: int) -> list[str]:
    """Addresses of clients; each part has others."""
    base = "203.0.113.{}" if version == 4 else "2001:db8:3::{}"
    return [base.format(100 + 20 * part + n) for n in range(12)]


@pytest.fixture(scope="module")
def many(net: RulesNet) -> RulesNet:
    """The network with clients of many addresses."""
    text = "".join(
        f"addr add {address}/{32 if version == 4 else 128} dev eth0{' nodad' * (version == 6)}\n"
        for version in (4, 6)
        for part in range(2)
        for address in clients(version, part)
    )
    net.ip("c", text)
    return net


def pins(net: RulesNet, node: int) -> int:
    """How many clients a node has pinned, of both families."""
    found = (net.run(f"n{node}", "nft", "-j", "list", "map", ip, "lbctl", "pins") for ip in IPS)
    return sum(len(json.loads(text)["nftables"][1]["map"].get("elem", ())) for text in found)


IPS = ("ip", "ip6")


class Affine:
    """A Service with session affinity on both nodes, kept as agents keep it."""

    def __init__(self, net: RulesNet, seconds: int, pods: tuple[int, ...] = (1,)) -> None:
        self.net, self.of = net, replace(service(), affinity_s=seconds)
        self.pods = pods
        self.views = {n: nodeview.advance({}, table(pods, self.of), f"n{n}") for n in (1, 2)}
        for n in (1, 2):
            net.load(n, *nft.full(rules(table(pods, self.of), n)))

    def change(self, pods: tuple[int, ...]) -> None:
        """Other pods take new flows from now on."""
        old, new = table(self.pods, self.of), table(pods, self.of)
        for n, view in self.views.items():
            was = rules(old, n, view=view)
            self.views[n] = nodeview.advance(view, new, f"n{n}")
            self.net.load(n, *nft.difference(was, rules(new, n, view=self.views[n])))
        self.pods = pods


def pods_of(net: RulesNet, addresses: list[str]) -> list[int]:
    """Which pod each client gets by a new connection."""
    found = []
    for address in addresses:
        flow = net.connect(6 if ":" in address else 4, by=address)
        assert flow.echoes()
        flow.close()
        found.append(flow.pod)
    return found


@pytest.fixture
def affine(net: RulesNet) -> Iterator[Callable[..., Affine]]:
    try:
        yield partial(Affine, net)
    finally:
        net.enter(1)
        both(net, table())


def test_a_client_keeps_its_pod_for_its_timeout(
    many: RulesNet, affine: Callable[..., Affine]
) -> None:
    """A pod is added on another node, by which all packets enter: only new clients go there."""
    net = many
    known, fresh = ([a for v in (4, 6) for a in clients(v, part)] for part in (0, 1))
    site = affine(600)
    assert set(pods_of(net, known)) == {1} and pins(net, 1) == len(known)
    site.change((1, 2))
    net.enter(2)
    before = {n: net.counters(n) for n in (1, 2)}
    assert set(pods_of(net, known)) == {1}
    assert net.counters(2)["asked"] > before[2]["asked"]
    assert net.counters(1)["pinned"] - before[1]["pinned"] == len(known)
    assert net.counters(1)["answered"] == before[1]["answered"]
    landed = pods_of(net, fresh)
    assert set(landed) == {1, 2}
    assert net.counters(1)["answered"] - before[1]["answered"] == landed.count(2)
    net.enter(1)
    assert pods_of(net, fresh) == landed
    assert net.counters(2)["pinned"] - before[2]["pinned"] == landed.count(2)
    site.change((2,))  # the pod of the others goes
    assert set(pods_of(net, known)) == {2}


def test_a_pin_ends_and_a_pod_that_goes_has_none(
    many: RulesNet, affine: Callable[..., Affine]
) -> None:
    net, known = many, [a for v in (4, 6) for a in clients(v, 0)]
    site = affine(1)
    assert set(pods_of(net, known)) == {1}
    site.change((1, 2))
    wait_for("the pins to end", lambda: pins(net, 1) == 0)
    assert set(pods_of(net, known)) == {1, 2}
    # Two pods on one node: its own pins decide, and one to a pod that left is made anew.
    site = affine(600)
    assert set(pods_of(net, known)) == {1}
    site.change((1, 3))
    assert set(pods_of(net, known)) == {1}
    site.change((3,))
    assert set(pods_of(net, known)) == {3}
    site.change((1, 3))
    assert set(pods_of(net, known)) == {3}


def talk(net: RulesNet, address: str, rounds: int = 2, answers: bool = True) -> int:
    """Datagrams of one flow; which pod got them."""
    version = 6 if ":" in address else 4
    client = net.opened("c", version, socket.SOCK_DGRAM)
    client.bind((address, 0))
    found = set()
    for _ in range(rounds):
        client.sendto(b"?", (EIP[version], 53))
        ready, _, _ = select.select(list(net.receivers), [], [], LIMIT_S)
        _, peer = ready[0].recvfrom(16)
        if answers:
            ready[0].sendto(b"!", peer)
            assert client.recv(16) == b"!"
        found.add(net.receivers[ready[0]])
    client.close()
    (pod,) = found
    return pod


def test_datagrams_keep_the_client_s_pod_too(many: RulesNet, affine: Callable[..., Affine]) -> None:
    net = many
    known, fresh = ([a for v in (4, 6) for a in clients(v, part)] for part in (0, 1))
    site = affine(600)
    assert {talk(net, address) for address in known} == {1}
    flow = net.opened("c", 4, socket.SOCK_DGRAM)  # of one direction: conntrack alone knows it
    assert net.asked(flow, b"x", (EIP[4], 53)) == 1
    site.change((1, 2))
    net.enter(2)
    assert {talk(net, address) for address in known} == {1}
    assert {talk(net, address) for address in fresh} == {1, 2}
    assert net.asked(flow, b"x", (EIP[4], 53)) == 1
    assert {talk(net, a, answers=False) for a in fresh} == {1, 2}


def test_a_flood_makes_no_pins(net: RulesNet, affine: Callable[..., Affine]) -> None:
    """Neither SYNs without an end, nor packets of no connection, nor datagrams unanswered."""
    affine(600)
    wire = net.link("c", "eth0")
    before = net.counters(1)["delivered"]
    for version in (4, 6):
        base = "203.0.113.{}" if version == 4 else "2001:db8:3::{}"
        for n in range(200, 220):
            for flags in (frames.SYN, frames.ACK):
                packet = frames.tcp(base.format(n), 999 + flags, EIP[version], PORT, flags)
                wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
                wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
            packet = frames.udp(base.format(n), 999, EIP[version], 53)
            wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
            wire.send(frames.frame(packet, GATE_MAC, ROUTER_MAC))
    wait_for("the flood to arrive", lambda: net.counters(1)["delivered"] - before >= 120)
    for receiver in net.receivers:
        receiver.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while receiver.recv(2048):
                pass
        receiver.settimeout(LIMIT_S)
    assert pins(net, 1) == 0
