"""The common tables, a node's part of them, and where packets go by the rendered text."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import forwarding, nft, nodeview
from lbctl.core.forwarding import Locator, Table
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    External,
    ForwardingOptions,
    Node,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    TrafficPolicy,
)
from lbctl.core.sticky import rounded, sticky
from lbctl.errors import DataplaneError

from .faketable import FakeTable
from .forwarding_cases import (
    EIP,
    INDEX,
    STRAY,
    TAKEN,
    WEB,
    blocks,
    nodes,
    pod,
    ruleset,
    service,
    table,
)

PODS = [pod(n, p) for n in (1, 2, 3) for p in (2, 3)]
CLIENTS = [("203.0.113.10", 20000 + 7 * k) for k in range(200)]

MANY = [(f"203.0.113.{10 + k % 200}", 20000 + 7 * k) for k in range(600)]


class Cluster:
    """A fake table on each node, kept as agents keep the real ones."""

    def __init__(self) -> None:
        self.fakes = {name: FakeTable() for name in INDEX}
        self.views: dict[str, nodeview.View] = {n: {} for n in INDEX}
        self.rules = {name: nft.Ruleset() for name in INDEX}
        self.generation = 0
        self.pins: dict[tuple[str, str], str] = {}  # node and client → pod
        self.notes: dict[tuple[str, tuple[str, int]], str] = {}  # conntrack's marks: node
        self.dead = ""  # a node that answers nothing

    def apply(self, new: Table, only: tuple[str, ...] = tuple(INDEX)) -> None:
        self.generation += 1
        for name in only:
            self.views[name] = nodeview.advance(self.views[name], new, name)
            silent = tuple(sorted(INDEX[node] for node in new.sources.down))
            rules = replace(ruleset(self.views[name], name, self.generation), silent=silent)
            old = self.rules[name]
            for piece in nft.difference(old, rules) if old.generation else nft.full(rules):
                self.fakes[name].apply(piece)
            self.rules[name] = rules

    def lands(
        self,
        entry: str,
        client: tuple[str, int],
        *,
        syn: bool = True,
        home: str = "",
        protocol: str = "tcp",
    ) -> str:
        """Follow a packet from the node where it enters: two nodes, two hand-overs or a question.

        home: the node whose conntrack knows the flow.
        """
        where, kind, before = entry, "", ""
        for _ in range(5):
            out = self.fakes[where].where(
                str(EIP),
                80,
                *client,
                peer=bool(kind),
                syn=syn,
                known=where == home,
                protocol=protocol,
                handed=kind in ("chance", "ask"),
                answered=kind in ("answer", "on", "owner") or before == kind == "chance",
                pinned=self.pins.get((where, client[0]), ""),
            )
            before = kind
            kind, what = out.split(" ") if " " in out else (out, "")
            if kind not in ("node", "on", "chance", "owner", "ask", "answer"):
                return f"{out} @{where}"
            where = f"n{what}"
        return "circle"

    def steers(self, entry: str, client: tuple[str, int], protocol: str = "tcp") -> str:
        """The node that a new flow is sent to where it enters; "" for none."""
        out = self.fakes[entry].where(str(EIP), 80, *client, protocol=protocol)
        return f"n{out[5:]}" if out.startswith("node ") else ""

    def finds(self, entry: str, client: tuple[str, int], home: str) -> bool:
        """Whether an established flow comes to its node, with what is noted of it on the way."""
        out = self.fakes[entry].where(str(EIP), 80, *client, syn=False)
        steered = out.startswith("node ")
        where, hops = (f"n{out[5:]}", 62) if steered else (entry, 63)
        while where != home and hops > 1 and where != self.dead:
            fake, peer = self.fakes[where], steered or hops < 9
            handed, fewer = hops in (7, 8), hops < 7
            said = fake.where(
                str(EIP), 80, *client, syn=False, peer=peer, handed=handed, answered=fewer
            )
            note = self.notes.get((where, client), "")
            to = f"n{said[7:]}" if said.startswith("chance ") else ""
            to = (to or note) if handed or fake.silent(EIP.version, note) else (note or to)
            to = to or (f"n{said[6:]}" if said.startswith("owner ") else "")
            if not to:
                return False
            if hops > 8:
                self.notes[where, client] = to
            where, hops = to, min(hops, 8) - 1
        return where == home

    def pin(self, client: tuple[str, int], home: str) -> None:
        """The client's connection was answered by the pod that it landed at."""
        pod_, where = home.removeprefix("pod ").split(" @")
        self.pins[where, client[0]] = pod_

    def settle(self) -> None:
        """Let the time pass after which datagrams follow their buckets."""
        self.generation += 1
        for name, view in self.views.items():
            self.views[name] = nodeview.settle(view, list(view))
            rules = ruleset(self.views[name], name, self.generation)
            for piece in nft.difference(self.rules[name], rules):
                self.fakes[name].apply(piece)
            self.rules[name] = rules


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("count", "then"), [(3, 4), (6, 7), (12, 13), (20, 21), (7, 6), (13, 12)])
def test_no_flow_moves(protocol: str, count: int, then: int) -> None:
    """An endpoint comes or goes, and every flow enters by another node: docs/forwarding.md."""
    pods = [pod(n, p) for p in range(2, 9) for n in (1, 2, 3)]
    of = service(protocols=(Protocol(protocol.upper()),))
    cluster = Cluster()
    cluster.apply(table(*pods[:count], of=of))
    outs = {c: cluster.lands("n1", c, protocol=protocol) for c in MANY}
    cluster.apply(table(*pods[:then], of=of))
    gone = {f"pod {p.address}:8080" for p in pods[then:count]}
    homes = {c: out.split("@")[1] for c, out in outs.items() if out.split(" @")[0] not in gone}
    moved = 0
    for number, (client, home) in enumerate(homes.items()):
        entry = f"n{number % 2 + 2}"
        out = cluster.lands(entry, client, syn=False, home=home, protocol=protocol)
        assert out == f"established @{home}"
        moved += not cluster.lands(entry, client, protocol="tcp").endswith(home)
    if protocol == "tcp":  # buckets did move: new flows follow them
        assert 0 < moved < len(MANY) * (0.12 if then < count else 0.3)


def test_datagrams_of_new_flows_follow_their_bucket_after_a_time() -> None:
    """Until then to its former owner, which takes them; one that takes none is not asked."""
    of = service(protocols=(Protocol.UDP,))
    cluster = Cluster()
    three = PODS[0], PODS[2], PODS[4]
    cluster.apply(table(*three, of=of))
    before = {c: cluster.lands("n1", c, protocol="udp") for c in MANY}
    assert all(out.startswith("pod ") for out in before.values())
    cluster.apply(table(*three, PODS[3], of=of))
    new = f"pod {PODS[3].address}:8080 @{PODS[3].node}"
    at_once = [cluster.lands("n1", c, protocol="udp") for c in MANY]
    # Only what was on the new pod's own node before goes to it.
    assert {b.split("@")[1] for b in before.values()} == set(INDEX)
    for was, now in zip(before.values(), at_once, strict=True):
        assert now.endswith(was.split("@")[1])
    cluster.settle()
    assert [cluster.lands("n1", c, protocol="udp") for c in MANY].count(new) > len(MANY) / 6
    unready = pod(1, 2, ""), PODS[2], PODS[4], PODS[3]
    cluster.apply(table(*unready, of=of))
    for client in MANY:
        assert cluster.lands("n2", client, protocol="udp") != f"pod {PODS[0].address}:8080 @n1"


def test_every_node_agrees_and_only_the_owner_delivers() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS))
    seen = set()
    for client in CLIENTS:
        outs = {cluster.lands(entry, client) for entry in INDEX}
        assert len(outs) == 1
        seen |= outs
    assert seen == {f"pod {p.address}:8080 @{p.node}" for p in PODS}


def test_established_flows_reach_their_old_pod() -> None:
    """Wherever a packet enters, it comes to the node that has its flow, over a size class too."""
    cluster = Cluster()
    cluster.apply(table(*PODS[:3]))
    homes = {client: cluster.lands("n1", client).split("@")[1] for client in CLIENTS}
    cluster.apply(table(*PODS))
    moved = 0
    for client, home in homes.items():
        for entry in INDEX:
            out = cluster.lands(entry, client, syn=False, home=home)
            moved += not cluster.lands(entry, client).endswith(home)
            assert out == f"established @{home}", (client, entry, out)
    assert moved > 0


def test_a_bucket_that_moves_on_between_pods_of_one_node_is_still_handed_to_who_had_it() -> None:
    """Two pods come to a node, one after the other, before a flow has sent anything."""
    cluster = Cluster()
    pods = [pod(n, p) for p in (2, 3) for n in (1, 2)]
    steps = []
    for come in ((), (pod(3, 2),), (pod(3, 2), pod(3, 3))):
        cluster.apply(table(*pods, *come))
        steps.append({client: cluster.lands("n1", client) for client in MANY})
    twice = [c for c in MANY if steps[1][c].endswith("@n3") and steps[1][c] != steps[2][c]]
    twice = [client for client in twice if steps[2][client].endswith("@n3")]
    assert len(twice) > 3
    for client in twice:
        home = steps[0][client].split("@")[1]
        for entry in INDEX:
            out = cluster.lands(entry, client, syn=False, home=home)
            assert out == f"established @{home}"


def _as(flags: str, *endpoints: Endpoint) -> list[Endpoint]:
    return [
        replace(e, ready="r" in flags, serving="s" in flags, terminating="t" in flags)
        for e in endpoints
    ]


_MORE = [pod(n, p) for p in range(2, 9) for n in (1, 2, 3)]
_SIX = [pod(n, p) for n in (1, 2, 3) for p in (6, 7)]
_NEXT = [pod(n, 9) for n in (3, 1, 2)]
_MOMENTS = {
    "pods come": [_MORE[:3], _MORE[:4], _MORE[:5]],
    "many come": [_MORE[:count] for count in range(6, 11)],
    "pods roll": [
        _SIX,
        [*_SIX[:5], *_as("st", _SIX[5]), _NEXT[0]],
        [*_SIX[:4], *_as("st", *_SIX[4:]), *_NEXT[:2]],
        [*_SIX[:3], *_as("st", *_SIX[3:]), *_NEXT],
    ],
    # Kubernetes says of one after the other that it is not ready, and leaves them listed.
    "a node with two dies": [
        _SIX,
        [*_SIX[:5], *_as("", _SIX[5])],
        [*_SIX[:4], *_as("", *_SIX[4:])],
    ],
    "one comes and goes again": [_MORE[:3], _MORE[:5], [*_MORE[:3], _MORE[4]]],
}


@pytest.mark.parametrize("steps", _MOMENTS.values(), ids=_MOMENTS)
def test_silent_flows_live_through_changes_within_moments(steps: list[list[Endpoint]]) -> None:
    """Their buckets move twice and more before they say anything: docs/forwarding.md."""
    cluster = Cluster()
    cluster.apply(table(*steps[0]))
    homes = {client: cluster.lands("n1", client) for client in MANY}
    for step in steps[1:]:
        cluster.apply(table(*step))
    living = {f"pod {e.address}:8080 @{e.node}" for e in steps[-1] if e.ready or e.serving}
    kept = {client: out.split("@")[1] for client, out in homes.items() if out in living}
    assert len(kept) > len(MANY) / 2
    for number, (client, home) in enumerate(kept.items()):
        out = cluster.lands(f"n{number % 3 + 1}", client, syn=False, home=home)
        assert out == f"established @{home}", client


@pytest.mark.parametrize("seed", range(4))
def test_connections_of_a_rolling_update_stay_while_nodes_lag(seed: int) -> None:
    """Each node takes the tables in by several at a time, later than others; flows begin and go on.

    With one former owner, or notes before it, some are lost for good: two nodes send to each other.
    """
    random = Random(seed)
    old = [pod(n, p) for n in (1, 2, 3) for p in random.sample(range(2, 60), 2)]
    new = [pod(n, p) for n in (1, 2, 3) for p in random.sample(range(60, 99), 2)]
    live, tables = {e.address: e for e in old}, [table(*old)]
    for come, go in zip(random.sample(new, 6), random.sample(old, 6), strict=True):
        for each in (come, *_as("st", go)):
            live[each.address] = each
            tables.append(table(*live.values()))
    cluster, homes, at, newest = Cluster(), dict[tuple[str, int], str](), dict.fromkeys(INDEX, 0), 0
    cluster.apply(tables[0])
    clients = {client: f"n{number % 3 + 1}" for number, client in enumerate(MANY[:200])}
    while min(at.values()) < len(tables) - 1:
        newest = min(newest + random.randint(0, 1), len(tables) - 1)
        name = random.choice(list(INDEX))
        to = random.randint(at[name], newest)
        steps = [made.sources for made in tables[at[name] + 1 : to + 1]]
        _, view = nodeview.live_through(cluster.views[name], tables[at[name]], steps, name)
        cluster.views[name], at[name] = view, to
        cluster.apply(tables[to], only=(name,))
        for client, entry in clients.items():
            if client in homes:
                random.random() < 0.3 and cluster.finds(entry, client, homes[client])
            elif random.random() < 0.1 and (out := cluster.lands(entry, client)).startswith("pod"):
                homes[client] = out.split("@")[1]
    assert len(homes) > len(clients) / 2
    lost = [c for c, home in homes.items() if not cluster.finds(clients[c], c, home)]
    assert not lost


def _changed(random: Random, live: dict[Address, Endpoint]) -> None:
    """A few pods come or go, or one becomes ready, unready or ends."""
    kind, count = random.choice(["come", "go", "flags"]), random.choice([1, 1, 2, 6])
    if kind == "come":
        live |= {e.address: e for e in random.sample(_MORE, count) if e.address not in live}
    elif kind == "go":
        for address in random.sample(sorted(live), min(len(live) - 1, count)):
            del live[address]
    else:
        address = random.choice(sorted(live))
        (live[address],) = _as(random.choice(["rs", "st", ""]), live[address])


@pytest.mark.parametrize("seed", [28, 38, 58])
def test_connections_that_go_on_stay_whatever_changes(seed: int) -> None:
    """As long as their pod is there, ready or not. Their owners in between come and go too."""
    random, cluster = Random(seed), Cluster()
    live = {e.address: e for e in random.sample(_MORE, random.choice([1, 3, 6, 13]))}
    homes = dict[tuple[str, int], tuple[str, str]]()
    for _ in range(16):
        cluster.apply(table(*live.values()))
        for client in MANY[:80]:
            entry = random.choice(list(INDEX))
            if client not in homes:
                if (out := cluster.lands(entry, client)).startswith("pod "):
                    homes[client] = (out.split(":")[0][4:], out[-2:])
            else:
                assert cluster.finds(entry, client, homes[client][1]), client
        _changed(random, live)
        there = {str(address) for address in live}
        homes = {client: home for client, home in homes.items() if home[0] in there}
        cluster.notes = {key: to for key, to in cluster.notes.items() if key[1] in homes}


@pytest.mark.parametrize("slow", ["n1", "n2", "n3"])
def test_a_node_that_skips_a_table_knows_who_had_it(slow: str) -> None:
    """It writes the last of two alone; others had the one between, and flows began by that."""
    cluster = Cluster()
    tables = [table(*_MORE[:count]) for count in (6, 7, 8)]
    cluster.apply(tables[0])
    quick = tuple(name for name in INDEX if name != slow)
    cluster.apply(tables[1], only=quick)
    homes = {client: cluster.lands(quick[0], client).split("@")[1] for client in MANY}
    cluster.apply(tables[2], only=quick)
    steps = [made.sources for made in tables[1:]]
    _, view = nodeview.live_through(cluster.views[slow], tables[0], steps, slow)
    cluster.views[slow] = view
    cluster.apply(tables[2], only=(slow,))
    for number, (client, home) in enumerate(homes.items()):
        out = cluster.lands(f"n{number % 3 + 1}", client, syn=False, home=home)
        assert out == f"established @{home}", client


@pytest.mark.parametrize("grown_first", [False, True])
def test_shrinking_below_a_size_class_forgets_no_flow(grown_first: bool) -> None:
    """14 pods have 640 buckets and 10 have 160: the past stays as fine as it was."""
    cluster = Cluster()
    every = [pod(n, p) for p in range(2, 7) for n in (2, 3)] + [pod(1, p) for p in range(2, 6)]
    if grown_first:
        cluster.apply(table(*every[:3]))
    cluster.apply(table(*every))
    homes = {client: cluster.lands("n1", client).split("@")[1] for client in CLIENTS}
    cluster.apply(table(*every, down=frozenset({"n1"})), only=("n2", "n3"))
    living = {client: home for client, home in homes.items() if home != "n1"}
    moved = 0
    for client, home in living.items():
        for entry in ("n2", "n3"):
            moved += not cluster.lands(entry, client).endswith(f"@{home}")
            out = cluster.lands(entry, client, syn=False, home=home)
            assert out == f"established @{home}", (client, entry)
    assert moved > 4


def test_a_node_that_lags_neither_circles_nor_resets() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS[:3]))
    cluster.apply(table(*PODS), only=("n1", "n2"))
    for client in CLIENTS:
        for entry in INDEX:
            for syn in (True, False):
                assert cluster.lands(entry, client, syn=syn) != "circle"


def test_flows_that_were_handed_over_by_way_of_a_node_that_dies_find_their_own() -> None:
    """Notes lead to n3, which had the bucket for a while, and passed on what n1 has."""
    cluster, n3 = Cluster(), frozenset({"n3"})
    first, between, last = PODS[::2]  # of n1, n2, n3
    for pods in ([first], [first, last], [first, between, last]):
        cluster.apply(table(*pods))
    assert all(cluster.finds("n1", client, "n1") for client in CLIENTS)
    theirs = [client for (at, client), to in cluster.notes.items() if (at, to) == ("n2", "n3")]
    assert theirs
    cluster.dead = "n3"
    assert not any(cluster.finds("n1", client, "n1") for client in theirs)
    cluster.apply(table(first, between, last, down=n3, fallen=n3), only=("n1", "n2"))
    assert all(cluster.finds("n1", client, "n1") for client in theirs)
    cluster.dead = ""  # and those that are with n3, should it come back
    assert all(cluster.finds("n1", client, "n3") for client in theirs)


def test_down_nodes_take_no_new_flows_and_no_hand_over() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS))
    new = table(*PODS, down=frozenset({"n1"}))
    cluster.apply(new, only=("n2", "n3"))
    for client in CLIENTS:
        for entry in ("n2", "n3"):
            for syn in (True, False):
                assert "@n1" not in cluster.lands(entry, client, syn=syn)
    assert table(*PODS, down=frozenset({"n1"})).digest == new.digest != table(*PODS).digest


def test_a_node_that_fell_and_is_back_finds_its_flows() -> None:
    """While it is away they are handed to it and not reset; new ones go elsewhere; then it ends."""
    cluster = Cluster()
    cluster.apply(table(*PODS))
    homes = {client: cluster.lands("n1", client).split("@")[1] for client in CLIENTS}
    theirs = [client for client, home in homes.items() if home == "n1"]
    assert theirs
    n1 = frozenset({"n1"})
    cluster.apply(table(*PODS, down=n1, fallen=n1), only=("n2", "n3"))
    for client in theirs:
        assert cluster.lands("n2", client, syn=False, home="n1") == "established @n1"
        assert not cluster.lands("n2", client).endswith("@n1")
    cluster.apply(table(*PODS))  # it is back
    for client, home in homes.items():
        assert cluster.lands("n3", client, syn=False, home=home) == f"established @{home}"
    cluster.apply(table(*PODS, down=n1, fallen=n1), only=("n2", "n3"))
    cluster.apply(table(*PODS, down=n1), only=("n2", "n3"))  # it did not come back in time
    for client in theirs:
        assert not cluster.lands("n2", client, syn=False, home="n1").endswith("@n1")
    assert table(*PODS, down=n1, fallen=n1).digest == table(*PODS, down=n1).digest


@pytest.mark.parametrize("flags", ["st", "t", ""])
def test_what_comes_astray_goes_to_pods_that_left_where_there_are_no_others(flags: str) -> None:
    """A node is drained or loses its pods' readiness, and another has not heard of it.

    One that ends and does not serve takes none: they go on to the owner.
    """
    cluster = Cluster()
    cluster.apply(table(*PODS))
    leaving = [e for e in PODS if e.node == "n1"]
    rest = [e for e in PODS if e.node != "n1"]
    homes = {client: cluster.lands("n2", client) for client in CLIENTS}
    cluster.apply(table(*_as(flags, *leaving), *rest), only=("n1", "n3"))
    theirs = [client for client, home in homes.items() if home.endswith("@n1")]
    assert theirs
    for client in theirs:
        assert not cluster.lands("n1", client).endswith("@n1")
        out = cluster.lands("n2", client)
        assert out.startswith("pod ") and out.endswith("@n1") == (flags != "t")


def test_established_flows_stay_where_an_agent_is_away() -> None:
    """Pods come to its node meanwhile: only the others know of them."""
    cluster = Cluster()
    cluster.apply(table(*PODS[:4]))
    homes = {client: cluster.lands("n1", client).split("@")[1] for client in CLIENTS}
    assert set(homes.values()) == {"n1", "n2"}
    cluster.apply(table(*PODS), only=("n1", "n2"))
    moved = 0
    for client, home in homes.items():
        for entry in INDEX:
            moved += cluster.steers(entry, client) == "n3"
            out = cluster.lands(entry, client, syn=False, home=home)
            assert out == f"established @{home}", (client, entry, out)
    assert moved


def test_flows_whose_bucket_goes_on_from_a_node_whose_agent_is_away_stay() -> None:
    """It was that node's for a moment, of which it knows nothing."""
    cluster = Cluster()
    cluster.apply(table(*PODS[:4]))
    homes = {client: cluster.lands("n1", client).split("@")[1] for client in MANY}
    come = [*PODS[4:], *(pod(n, p) for p in range(4, 9) for n in (1, 2))]
    for count in (2, len(come)):
        cluster.apply(table(*PODS[:4], *come[:count]), only=("n1", "n2"))
    moved = 0
    for client, home in homes.items():
        for entry in INDEX:
            moved += entry != "n3" and cluster.steers(entry, client) not in ("", home)
            assert cluster.finds(entry, client, home), (client, entry)
            cluster.notes.clear()
    assert moved


@pytest.mark.parametrize(("protocol", "affinity"), [("tcp", False), ("udp", False), ("tcp", True)])
@pytest.mark.parametrize("leaves", [False, True])
def test_new_flows_reach_a_pod_where_an_agent_is_away(
    protocol: str, affinity: bool, leaves: bool
) -> None:
    """Pods come to its node while it is away, or leave another node."""
    of = service(affinity=affinity, protocols=(Protocol(protocol.upper()),))
    old, new = (table(*pods, of=of) for pods in (PODS[:4], PODS))
    old, new = (new, old) if leaves else (old, new)
    away = "n1" if leaves else "n3"
    cluster = Cluster()
    cluster.apply(old)
    cluster.settle()
    cluster.apply(new, only=tuple(name for name in INDEX if name != away))
    cluster.settle()
    steered = 0
    for client in MANY:
        for entry in INDEX:
            steered += cluster.steers(entry, client, protocol) == "n3"
            out = cluster.lands(entry, client, protocol=protocol)
            assert out.startswith("pod "), (client, entry, out)
            assert not out.endswith("@n3"), (client, entry, out)
    assert steered > len(MANY) / 6


def test_closed_ports_keep_established_flows() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS))
    homes = {client: cluster.lands("n1", client).split("@")[1] for client in CLIENTS}
    cluster.apply(table(*(pod(n, p, "") for n in (1, 2, 3) for p in (2, 3))))
    for client, home in homes.items():
        assert cluster.lands("n2", client) == "refused @n2"
        assert cluster.lands("n2", client, syn=False).endswith(home)
    cluster.apply(table())
    assert cluster.lands("n2", CLIENTS[0], syn=False) == "refused @n2"


def test_terminating_ones_serve_when_nothing_else_does() -> None:
    leaving = [pod(1, 2, "st"), pod(2, 2, "st")]
    assert table(*leaving, pod(3, 2)).digest == table(pod(3, 2)).digest
    entry = table(*leaving, pod(3, 2, "")).eips[EIP].ports[0]
    assert not entry.closed
    assert {e.node for e in entry.endpoints} == {"n1", "n2"}


def test_pods_serve_whose_readiness_is_not_known() -> None:
    """As at the return of an API server: nodes and pods are NotReady, and our probes answered."""
    silent, unknown = frozenset({"n1", "n2"}), _as("", *PODS)
    found = table(*unknown, doubtful=silent)
    entry = found.eips[EIP].ports[0]
    assert not entry.closed and {e.node for e in entry.endpoints} == {"n1", "n2"}
    down = table(*unknown, doubtful=silent, down=frozenset({"n1"})).eips[EIP].ports[0]
    assert not down.closed and {e.node for e in down.endpoints} == {"n2"}
    assert table(*unknown).eips[EIP].ports[0].closed
    ready = table(*PODS[:1], *unknown[1:], doubtful=silent, previous=found)
    assert [e.node for e in ready.eips[EIP].ports[0].endpoints] == ["n1"]
    ending = table(*_as("t", *PODS), doubtful=silent, previous=found)
    assert ending.eips[EIP].ports[0].closed
    back = table(*unknown, previous=found)
    assert back.eips[EIP].ports[0].closed


def test_affinity_takes_the_clients_address_alone() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS, of=service(affinity=True)))
    assert len({cluster.lands("n1", client) for client in CLIENTS}) == 1


PORT = f"{EIP} . tcp . 80"
SPREAD = [pod(n, p) for p in range(2, 7) for n in (1, 2, 3)]
FAR = [(f"203.0.{112 + k // 250}.{k % 250}", 20000 + 7 * k) for k in range(400)]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("count", "most"), [(3, 0.32), (6, 0.22), (12, 0.2)])
def test_known_clients_stay_and_new_ones_spread(protocol: str, count: int, most: float) -> None:
    """With session affinity, by every node; new ones at once, as docs/forwarding.md has it."""
    of = service(affinity=True, protocols=(Protocol(protocol.upper()),))
    cluster = Cluster()
    cluster.apply(table(*SPREAD[:count], of=of))
    homes = {c: cluster.lands("n1", c, protocol=protocol) for c in FAR}
    known = FAR[::2]
    for client in known:
        cluster.pin(client, homes[client])
    cluster.apply(table(*SPREAD[: count + 1], of=of))
    cluster.settle()
    moved = 0
    for address, port in FAR:
        # The switch hashes anew, and the client takes another port.
        outs = {cluster.lands(entry, (address, port + 1), protocol=protocol) for entry in INDEX}
        assert len(outs) == 1
        if (address, port) in known:
            assert outs == {homes[address, port]}
        moved += outs != {homes[address, port]}
    assert 0.5 / count < 2 * moved / len(FAR) <= most


def pinned(of: Service) -> tuple[Cluster, dict[tuple[str, int], str]]:
    """Three pods with a pin for each client, and where each client is."""
    cluster = Cluster()
    cluster.apply(table(*SPREAD[:3], of=of))
    homes = {client: cluster.lands("n1", client) for client in FAR}
    for client, home in homes.items():
        cluster.pin(client, home)
    return cluster, homes


def test_a_client_whose_pod_takes_no_new_flows_gets_another_one() -> None:
    of = service(affinity=True)
    cluster, homes = pinned(of)
    cluster.apply(table(*SPREAD[:4], of=of))
    cluster.apply(table(pod(1, 2, ""), *SPREAD[1:4], of=of))
    n2 = frozenset({"n2"})
    elsewhere = 0  # those whose bucket moved twice while they said nothing
    for (address, _), home in homes.items():
        out = cluster.lands("n3", (address, 7))
        assert out.startswith("pod ")
        elsewhere += out != home and not home.endswith("@n1")
        assert not out.startswith(f"pod {SPREAD[0].address}:")
    assert elsewhere < len(homes) * 0.02
    cluster.apply(table(pod(1, 2, ""), *SPREAD[1:4], of=of, down=n2, fallen=n2), ("n1", "n3"))
    assert not any(cluster.lands("n3", (a, 7)).endswith("@n2") for a, _ in FAR)


def test_a_bucket_that_moves_twice_loses_the_first_clients_alone() -> None:
    """A bucket remembers one former owner: the share is in docs/forwarding.md."""
    of = service(affinity=True)
    cluster, homes = pinned(of)
    lost = []
    for count in range(4, 7):
        cluster.apply(table(*SPREAD[:count], of=of))
        lost.append(sum(cluster.lands("n2", c) != homes[c] for c in FAR) / len(FAR))
    assert lost[0] == 0.0 < lost[-1] < 0.15


def test_affinity_is_switched_on_off_and_to_another_time() -> None:
    """Each state is reached from each, and the fake refuses to delete what is not there."""
    cluster = Cluster()
    for seconds in (None, 10, 3600, None, 60, 60):
        of = replace(service(), affinity_s=seconds)
        cluster.apply(table(*PODS[:3], of=of))
        assert len({cluster.lands("n1", client) for client in CLIENTS}) == (1 if seconds else 3)
        (times,) = {fake.maps.get("ip pin", {}).get(PORT) for fake in cluster.fakes.values()}
        assert times == (f"jump pin{seconds}" if seconds else None)
        cluster.apply(table(*PODS, of=of))


def test_switching_the_hash_or_the_table_loses_what_comes_to_another_node() -> None:
    """Two thirds on three nodes: docs/forwarding.md."""
    local = replace(service(), policy=TrafficPolicy.LOCAL)
    strict = replace(
        table(*_MORE[:6], of=local).sources, options=ForwardingOptions(local_delivery="strict")
    )
    plain, sticky_ = table(*_MORE[:6]), table(*_MORE[:6], of=service(affinity=True))
    shared, own = table(*_MORE[:6], of=local), forwarding.revise(forwarding.EMPTY, strict)
    for was, now in ((plain, sticky_), (sticky_, plain), (shared, own), (own, shared)):
        cluster, lost = Cluster(), 0
        cluster.apply(was)
        homes = {c: cluster.lands(f"n{k % 3 + 1}", c)[-2:] for k, c in enumerate(FAR[::3])}
        cluster.apply(now)
        for number, (client, home) in enumerate(homes.items()):
            lost += not cluster.finds(f"n{number % 3 + 1}", client, home)
        assert 0.5 < lost / len(homes) < 0.8


def test_nodes_with_other_tables_ask_once() -> None:
    of = service(affinity=True)
    cluster = Cluster()
    cluster.apply(table(*PODS[:3], of=of))
    cluster.apply(table(*PODS, of=of), only=("n1", "n2"))
    cluster.apply(table(*PODS[2:], of=of), only=("n2", "n3"))
    for client in FAR:
        for entry in INDEX:
            assert cluster.lands(entry, client).startswith("pod ")


def test_numbers_of_pods() -> None:
    """Stable, each its own; and timeouts round up."""
    pods = [(ip_address(f"10.244.{n // 200}.{n % 200}"), 8080) for n in range(400)]
    every = sticky(10, pods, ())
    assert len(set(every.numbers.values())) == 400
    few = sticky(10, pods[7:9], (5, 1, 5))
    assert few.numbers.items() <= every.numbers.items() and few.nodes == (1, 5)
    assert [rounded(s) for s in (1, 3, 10800, 10801, 86400)] == [1, 5, 10800, 14400, 86400]


def test_sctp_is_carried() -> None:
    (port,) = table(*PODS, of=service(protocols=(Protocol.SCTP,))).eips[EIP].ports
    assert port.protocol is Protocol.SCTP and len(port.endpoints) == len(PODS)


def test_the_other_family_is_left_out() -> None:
    six = Endpoint(ip_address("2001:db8::1"), 8080, "n1")
    assert table(six).eips[EIP].ports == ()


@given(st.permutations(PODS))
@settings(max_examples=20, deadline=None)
def test_the_order_of_endpoints_changes_nothing(pods: list[Endpoint]) -> None:
    assert table(*pods) == table(*PODS)
    assert table(*pods).digest == table(*PODS).digest


def test_unchanged_eips_are_taken_over() -> None:
    locator = Locator(nodes())
    first = table(*PODS, locator=locator)
    assert table(*PODS, locator=locator, previous=first).eips[EIP] is first.eips[EIP]
    # A node without endpoints goes down: nothing of this EIP changes.
    down = frozenset({"n9"})
    assert table(*PODS, locator=locator, previous=first, down=down).eips[EIP] is first.eips[EIP]
    changed = table(*PODS[1:], locator=locator, previous=first)
    assert changed.digest != first.digest


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "198.51.100.9", "8.8.8.8", "224.0.0.1", "0.0.0.0"]
)
def test_endpoints_on_no_node_are_refused(address: str) -> None:
    """An EndpointSlice may be written by anyone; its nodeName is no proof."""
    odd = Endpoint(ip_address(address), 8080, "n1", "pod")
    entry = table(odd, pod(2, 2)).eips[EIP]
    assert [refusal.endpoint for refusal in entry.refused] == [odd]
    assert {e.node for e in entry.ports[0].endpoints} == {"n2"}


def test_where_endpoints_are() -> None:
    locator = Locator(nodes())
    assert locator.locate(Endpoint(ip_address("10.244.2.9"), 1, "n1")) == "n2"
    assert locator.locate(Endpoint(ip_address("192.0.2.23"), 1)) == "n3"
    bare = Locator(nodes(cidrs=False))
    here = ip_address("172.16.0.1")
    assert bare.locate(Endpoint(here, 1, "n2", "pod")) == "n2"
    assert bare.locate(Endpoint(here, 1, "n2")) is None
    assert bare.locate(Endpoint(here, 1, "n7", "pod")) is None
    nested = Locator(
        (
            Node("a", pod_cidrs=(ip_network("10.0.0.0/8"),)),
            Node("b", pod_cidrs=(ip_network("10.1.0.0/16"),)),
        )
    )
    assert nested.locate(Endpoint(ip_address("10.1.2.3"), 1)) == "b"
    assert nested.locate(Endpoint(ip_address("10.2.2.3"), 1)) == "a"


def test_pods_are_where_the_endpoint_says_if_the_configuration_says_so() -> None:
    """With Calico's own IPAM a node's pod CIDR tells nothing of where its pods are."""
    by_cidr, by_name = Locator(blocks()), Locator(blocks(), "nodeName")
    assert [by_cidr.locate(e) for e in (STRAY, TAKEN)] == [None, "n2"]
    assert [by_name.locate(e) for e in (STRAY, TAKEN)] == ["n1", "n1"]
    # A host's own; one that somebody wrote, and one of a node that is not there.
    host = ip_address("192.0.2.23")
    assert by_name.locate(Endpoint(host, 1, "n3", "pod")) == "n3"
    assert by_name.locate(Endpoint(host, 1, "n1")) == by_name.locate(Endpoint(host, 1)) == "n3"
    for odd in (replace(TAKEN, pod=""), replace(TAKEN, node="n9"), replace(STRAY, node="")):
        assert by_name.locate(odd) is None
    assert by_name.locate(Endpoint(host, 1, "n9", "pod")) == "n3"
    for address in ("127.0.0.1", "224.0.0.1", "0.0.0.0"):
        assert by_name.locate(Endpoint(ip_address(address), 1, "n1", "pod")) is None


def test_a_table_follows_the_way_in_which_pods_are_located() -> None:
    """And not the one before, from which what did not change is taken over."""
    first = table(STRAY, TAKEN, locator=Locator(blocks()))
    assert {e.node for e in first.eips[EIP].ports[0].endpoints} == {"n2"}
    assert [refusal.endpoint for refusal in first.eips[EIP].refused] == [STRAY]
    by_name = Locator(blocks(), "nodeName")
    second = table(STRAY, TAKEN, locator=by_name, previous=first)
    assert second == table(STRAY, TAKEN, locator=by_name) and second.digest != first.digest
    assert {e.node for e in second.eips[EIP].ports[0].endpoints} == {"n1"}
    assert len(second.eips[EIP].ports[0].endpoints) == 2 and not second.eips[EIP].refused
    third = table(STRAY, TAKEN, locator=Locator(blocks()), previous=second)
    assert third == first and third.digest == first.digest


@pytest.mark.parametrize("external", ["refuse", "masquerade"])
def test_who_has_no_pod_is_on_no_node_by_its_nodename(external: External) -> None:
    """A pod CIDR means nothing then; a Pod of a node that we do not know is never masqueraded."""
    by_hand, unknown = replace(TAKEN, pod=""), replace(STRAY, node="n9")
    made = forwarding.build(
        [Eip(EIP, "public", WEB, "uid")],
        {WEB: service()},
        {WEB: ServiceEndpoints(WEB, (PortEndpoints("", Protocol.TCP, (by_hand, unknown)),))},
        Locator(blocks(), "nodeName"),
        options=ForwardingOptions(external=external, located_by="nodeName"),
    ).eips[EIP]
    masqueraded = [(by_hand.address, "*")] if external == "masquerade" else []
    assert [(e.address, e.node) for port in made.ports for e in port.endpoints] == masqueraded
    refused = [unknown] if masqueraded else [by_hand, unknown]
    assert [refusal.endpoint for refusal in made.refused] == refused


def test_ranges_merge_and_have_holes_at_the_nodes() -> None:
    span = [
        tuple(map(ip_address, pair))
        for pair in (("10.0.0.0", "10.0.0.9"), ("10.0.0.10", "10.0.0.20"))
    ]
    holes = [ip_address(a) for a in ("10.0.0.0", "10.0.0.15", "10.0.0.20", "192.0.2.1")]
    found = [(str(a), str(b)) for a, b in nft.merged(span, holes)]  # type: ignore[arg-type]
    assert found == [("10.0.0.1", "10.0.0.14"), ("10.0.0.16", "10.0.0.19")]


@pytest.mark.parametrize("name", ['eth0" }; drop', "", "a" * 16, "eth 0"])
def test_nothing_unchecked_gets_into_the_text(name: str) -> None:
    with pytest.raises(DataplaneError):
        nft.full(nft.Ruleset(uplinks=(name,)))
    with pytest.raises(DataplaneError):
        nft.full(nft.Ruleset(peers=(name,)))


def test_source_ranges_are_there_as_long_as_what_they_protect() -> None:
    """A Service with ranges goes, and comes: never is it there for everyone, not for a moment."""
    made = table(*PODS, of=service(sources=("203.0.113.0/24",)))
    there = ruleset(nodeview.advance({}, made, "n1"), "n1", 1, of=made)
    away = replace(there, ports={}, sources={})
    for old, new, verb, order in ((there, away, "delete", -1), (away, there, "add", 1)):
        fake = FakeTable()
        for piece in nft.full(old):
            fake.apply(piece)
        text, batch = list(nft.steps(old, [new]))[::order]
        assert isinstance(text, str) and not isinstance(batch, str)
        assert f"{verb} element ip lbctl restricted" in text
        fake.apply(text)
        assert fake.maps["ip gen"] == ({"0x00000001": ""} if order < 0 else {})  # the last one's


def test_a_difference_is_the_changed_buckets_only() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS))
    before = cluster.rules["n1"]
    view = nodeview.advance(cluster.views["n1"], table(*PODS[1:]), "n1")
    after = ruleset(view, "n1", 2)
    (text,) = nft.difference(before, after)
    changed = text.count("198.51.100.1 . tcp")
    whole = sum(before.ports[EIP, "TCP", 80].counts().values())
    assert 0 < changed < whole
    assert nft.difference(after, after) == []
    assert "svc" not in text


def test_many_eips_come_in_pieces() -> None:
    cluster = Cluster()
    cluster.apply(table(*PODS))
    port = cluster.rules["n1"].ports[EIP, "TCP", 80]
    ports = {(EIP + k, "TCP", 80): port for k in range(300)}
    rules = nft.Ruleset(5, ("eth0",), (), (), ports)
    pieces = nft.full(rules)
    assert len(pieces) == 3
    assert [("add element ip lbctl gen { 0x00000005 }" in piece) for piece in pieces] == [
        False,
        False,
        True,
    ]
    fake = FakeTable()
    for piece in pieces:
        fake.apply(piece)
    assert len(fake.maps["ip svc"]) == 300
    assert len(fake.maps["ip steer"]) == nft.totals(rules)[4, "steer"]
