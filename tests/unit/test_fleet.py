"""Which replicas a release waits for, and on which nodes an agent is expected."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from lbctl.core import names
from lbctl.core.model import Address, Node, ObjectRef
from lbctl.core.probe import node_hash
from lbctl.kube.objects import Pod
from manager.agents import AgentHosts
from manager.fleet import MARGIN_S, Fleet

HOLD_S = 9.0


def pod(name: str, node: str = "n", app: str = names.MANAGER_APP, phase: str = "Running") -> Pod:
    ref = ObjectRef(names.NAMESPACE, name)
    return Pod(ref, "u", node, ip_address("192.0.2.11"), app, phase)


class World:
    """Three replicas, "me", "a" and "b", and what is seen of them."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.hears = {"me", "a", "b"}
        self.agents: frozenset[int] | None = self.told("me", "a", "b")
        self.answering: set[str] = set()
        self.announce = True
        self.nodes = {ObjectRef("", n): Node(n) for n in ("n", "cut")}
        self.fleet = Fleet("me", self.nodes, self, lambda: self.now_s)
        for one in (pod("me"), pod("a"), pod("b", "cut")):
            assert self.fleet.change(one.ref, one)

    def told(self, *managers: str) -> frozenset[int]:
        return frozenset(node_hash(name) for name in managers)

    def heard(self) -> tuple[str, ...]:
        return tuple(sorted(self.hears))

    def heard_by_agents(self) -> frozenset[int] | None:
        return self.agents

    def host_answers(self, manager: str, address: Address) -> bool:
        return manager in self.answering

    def announces(self) -> bool:
        return self.announce

    def wait(self, seconds: float) -> None:
        for _ in range(round(seconds * 4)):
            self.now_s += 0.25
            self.fleet.look(HOLD_S)

    def not_ready(self, node: str) -> None:
        self.nodes[ObjectRef("", node)] = Node(node, ready=False)

    def lose(self, manager: str) -> None:
        """Nobody hears it any more, its host included."""
        self.hears.discard(manager)
        self.agents = self.told(*self.hears)


def test_dead_host_counts_as_gone_after_the_hold_time_and_not_before() -> None:
    world = World()
    world.wait(1)
    world.lose("b")
    world.not_ready("cut")
    died_s = world.now_s
    world.wait(HOLD_S + MARGIN_S - 0.5)
    assert world.fleet.living() == {"me", "a", "b"} and not world.fleet.gone()
    world.wait(1)
    assert world.fleet.living() == {"me", "a"}
    assert world.fleet.gone()["b"] - died_s <= 0.25, "counts from its last sign of life"


def test_replica_cut_off_from_us_and_from_kubernetes_lives_while_agents_hear_it() -> None:
    world = World()
    world.hears.discard("b")
    world.not_ready("cut")
    world.wait(10 * HOLD_S)
    assert "b" in world.fleet.living()
    world.agents = None  # nobody can tell
    world.wait(10 * HOLD_S)
    assert "b" in world.fleet.living()


def test_silent_replica_on_a_ready_node_lives_until_its_speaker_must_have_heard_us() -> None:
    world = World()
    world.lose("b")
    world.wait(10 * HOLD_S)
    assert "b" in world.fleet.living()  # its host is silent, but Kubernetes hears it
    world.answering.add("b")
    world.announce = False
    world.wait(2 * HOLD_S)
    assert "b" in world.fleet.living()  # a speaker closes only if another replica announces
    world.announce = True
    world.wait(MARGIN_S - 0.5)
    assert "b" in world.fleet.living()
    world.wait(1)
    assert "b" not in world.fleet.living()


def test_host_that_answers_us_is_not_dead_though_its_node_is_not_ready() -> None:
    world = World()
    world.lose("b")
    world.not_ready("cut")
    world.answering.add("b")
    world.announce = False
    world.wait(10 * HOLD_S)
    assert "b" in world.fleet.living()


def test_replica_that_comes_back_lives_again() -> None:
    world = World()
    world.lose("b")
    world.not_ready("cut")
    world.wait(HOLD_S + MARGIN_S + 1)
    assert "b" not in world.fleet.living()
    world.hears.add("b")
    assert world.fleet.look(HOLD_S)
    assert "b" in world.fleet.living() and not world.fleet.gone()


def test_deleted_pod_is_gone_from_then_on_or_since_it_was_last_heard() -> None:
    world = World()
    other = pod("agent-x", app=names.AGENT_APP)
    assert not world.fleet.change(other.ref, other)
    world.hears.discard("a")
    world.agents = world.told("me", "b")
    assert world.fleet.change(ObjectRef(names.NAMESPACE, "a"), None)
    assert world.fleet.living() == {"me", "b"} and world.fleet.gone() == {"a": world.now_s}
    assert not world.fleet.change(ObjectRef(names.NAMESPACE, "a"), None)
    # Deleted by force while it runs on, cut off: the agents hear it.
    world.agents = world.told("me", "a", "b")
    world.wait(20)
    assert world.fleet.gone() == {"a": world.now_s}


def test_agents_are_expected_where_their_pods_are_and_for_a_while_after() -> None:
    now = [0.0]
    hosts = AgentHosts(lambda: now[0])
    assert hosts.nodes(300) is None, "none known at all: every node is probed"
    one, two = pod("x", "n1", names.AGENT_APP, "Pending"), pod("y", "n2", names.AGENT_APP)
    assert hosts.change(one.ref, one) and hosts.change(two.ref, two)
    assert not hosts.change(two.ref, two)
    manager = pod("m", "control")
    assert not hosts.change(manager.ref, manager)
    assert hosts.nodes(300) == frozenset({"n1", "n2"})
    assert hosts.ready() == frozenset()
    assert hosts.change(two.ref, replace(two, ready=True))
    assert hosts.ready() == frozenset({"n2"})
    assert hosts.change(two.ref, None)
    assert hosts.ready() == frozenset()
    now[0] = 300.0
    assert hosts.nodes(300) == frozenset({"n1", "n2"}), "its forwarding is still there"
    now[0] = 301.0
    assert hosts.nodes(300) == frozenset({"n1"})
