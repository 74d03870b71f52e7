"""What one change costs beside many Services that do not change, and one node lost. All pure.

The rule behind it: nothing on a change's path is proportional to the number of Services. So the
rows come in two sizes, and those of one change should be alike.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address

from agent.engine import Confirmed, confirmed_eips
from agent.inputs import Inputs
from agent.rendering import State, render
from lbctl.core import forwarding, nft, nodeview
from lbctl.core.announce import Announcer, Paths
from lbctl.core.changelog import ChangeLog
from lbctl.core.confirmations import Confirmations
from lbctl.core.forwarding import Locator, Sources
from lbctl.core.model import Address, NodeState, host_route
from lbctl.core.nfbatch import Batch, framed
from lbctl.core.nft import Ruleset
from lbctl.core.pmap import PMap
from lbctl.core.routes import EipSelection, PathIds, Rules, Verdicts, select

from .cluster import CONFIG, NODES, PODS, Cluster
from .timing import Measured, timed

SIZES = (1_000, 10_000)
MANY_NODES = 1_000
_PEERS = ("192.0.2.1", "192.0.2.2")


class ManagerSide:
    """Selection and the speaker's difference, put together as manager/announcing.py does."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes = {node.name: node for node in cluster.nodes}
        self.views = dict(cluster.views)
        self.ids = PathIds()
        self.confirmations = Confirmations()
        for name, view in self.views.items():
            self.confirmations.take(name, None, view)
        self.selections: dict[Address, EipSelection] = {}
        self.locator = Locator(cluster.nodes)
        self.verdicts = self._verdicts()
        self.paths: Paths = PMap()
        self.announcer = Announcer()
        self.announcer.connected()
        self.announcer.held(())
        for peer in _PEERS:
            self.announcer.negotiated(peer, ((4, True), (6, True)))
            self.announcer.established(peer, True)

    def _verdicts(self) -> Verdicts:
        return Verdicts(Rules(CONFIG), self.nodes, self.views, self.ids, self.locator)

    def select(self, numbers: range) -> None:
        """Select these EIPs again."""
        c = self.cluster
        eips = [c.eips[c.addresses[n]] for n in numbers]
        known = (self.confirmations, self.selections)
        found = select(self.verdicts, eips, c.services.get, c.endpoints.get, *known)
        self.selections.update(found)
        put = {host_route(a): chosen.paths for a, chosen in found.items()}
        kept = {prefix: paths for prefix, paths in put.items() if paths}
        self.paths = self.paths.updated(kept, put.keys() - kept.keys())

    def announce(self) -> None:
        """Set it, and acknowledge every command."""
        self.announcer.want(_PEERS, self.paths)
        while self.announcer.plan():
            pass
        while sends := self.announcer.take():
            for send in sends:
                if send.command is None:
                    self.announcer.barrier(send.id, dict.fromkeys(_PEERS, True))
                else:
                    self.announcer.acknowledged(send.id, True)

    def one(self, number: int) -> None:
        """A Service loses its pods, or gets them back: select, difference, commands."""
        c = self.cluster
        ref = c.refs[number]
        c.endpoints[ref] = c.behind(number, 0 if c.endpoints[ref].ports[0].endpoints else 4)
        self.select(range(number, number + 1))
        self.announce()

    def lose(self, state: NodeState) -> None:
        """The last node's state changes: all EIPs are selected again."""
        name = f"n{self.cluster.size - 1}"
        self.views = {**self.views, name: replace(self.views[name], state=state)}
        self.verdicts = self._verdicts()
        self.select(range(len(self.cluster.refs)))


class AgentSide:
    """Table, view, ruleset, steps and what is confirmed, put together as agent/engine.py does."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.locator = Locator(cluster.nodes)
        self.endpoints = PMap(cluster.endpoints)
        self.eips, self.services = PMap(cluster.eips), PMap(cluster.services)
        self.index = {f"n{n}": n for n in range(1, cluster.size)}
        self.macs = {ip_address(f"192.0.2.{20 + n}"): f"02:00:00:00:00:{n:02x}" for n in range(8)}
        self.state = State()
        self.counts: dict[nft.SetKey, int] = {}
        self.confirmed = Confirmed()
        self.log = ChangeLog(1)
        self.before: Ruleset | None = None  # what the kernel has

    def run(self, down: frozenset[str] = frozenset()) -> None:
        """One pass without the kernel."""
        before = self.state
        sources = Sources(self.eips, self.services, self.endpoints, self.locator, down)
        table = forwarding.revise(before.table, sources)
        view = nodeview.advance(before.view, table, "n0", before.table)
        inputs = Inputs(
            self.eips,
            self.services,
            self.endpoints,
            self.cluster.nodes,
            ranges=tuple((r.first, r.last) for pool in CONFIG.pools for r in pool.addresses),
        )
        usable = tuple(self.index)
        state = State(inputs, down, table, view, self.index, self.macs, usable=usable)
        generation = before.rules.generation + 1
        self.state = render(state, "n0", generation, ("eth0",), before)
        self.counts = nft.recounted(self.counts, before.rules, self.state.rules)
        eips = confirmed_eips("n0", self.confirmed, table)
        self.confirmed = Confirmed(generation, 1, table, eips)
        self.log.replace(eips)

    def steps(self) -> Iterator[nft.Step]:
        """The transactions that are due."""
        before, self.before = self.before, self.state.rules
        return nft.steps(before, [self.state.rules])

    def encoded(self) -> int:
        """Their number of bytes, as sent."""
        return sum(
            len(framed(step, 1) if isinstance(step, Batch) else step) for step in self.steps()
        )

    def change(self, number: int) -> None:
        """A Service gets a pod less, or more."""
        ref = self.cluster.refs[number]
        pods = len(self.endpoints[ref].ports[0].endpoints)
        other = 2 * self.cluster.pods - 1 - pods
        self.endpoints = self.endpoints.updated({ref: self.cluster.behind(number, other)})

    def one(self, number: int) -> None:
        """The same, planned."""
        self.change(number)
        self.run()


def measure(runs: int) -> Iterator[Measured]:
    """One change at two sizes, and one node lost."""
    gc.set_threshold(50_000, 50, 100)  # as agent/main.py has it
    for size in SIZES:
        manager, agent = ManagerSide(Cluster(size)), AgentSide(Cluster(size))
        manager.select(range(size))
        manager.announce()
        agent.run()
        agent.encoded()
        gc.collect()  # what the set-up left behind is no part of a change
        beside = f"one Service changed among {size:,}"
        yield (
            f"{beside}: manager selection + speaker diff",
            timed(_each(manager.one), runs * 20),
            "ms",
        )

        def one(number: int, agent: AgentSide = agent) -> None:
            agent.one(number)
            agent.encoded()

        yield f"{beside}: agent plan + messages", timed(_each(one), runs * 20), "ms"
    yield from _lost(manager, agent, runs)
    yield from _lost_of_many(runs)


def _each(change: Callable[[int], None]) -> Callable[[], None]:
    numbers = iter(range(1, SIZES[0], 3))
    return lambda: change(next(numbers))


def _lost_of_many(runs: int) -> Iterator[Measured]:
    where = f"{SIZES[0]:,} EIPs × {MANY_NODES:,} nodes"
    c = Cluster(SIZES[0], MANY_NODES, first="192.168.0.1")
    manager = ManagerSide(c)
    ranked = timed(lambda: manager.select(range(SIZES[0])), 1)
    yield f"all ranked for the first time, {where}: selection", ranked, "ms"

    def one(number: int) -> None:
        c.endpoints[c.refs[number]] = c.behind(number, PODS - 1)
        manager.select(range(number, number + 1))

    yield f"one Service changed, {where}: selection", timed(_each(one), runs * 20), "ms"
    states = iter([NodeState.DOWN, NodeState.UP] * runs)
    moved = timed(lambda: manager.lose(next(states)), 2 * runs)
    yield f"one node lost, {where}: selection", moved[::2], "ms"
    yield f"one node back, {where}: selection", moved[1::2], "ms"


def _lost(manager: ManagerSide, agent: AgentSide, runs: int) -> Iterator[Measured]:
    where = f"{SIZES[-1]:,} EIPs × {NODES} nodes"
    states = iter([NodeState.DOWN, NodeState.UP] * runs)
    lost = timed(lambda: manager.lose(next(states)), 2 * runs)[::2]
    yield f"one node lost, {where}: selection", lost, "ms"

    def diff() -> None:
        manager.announcer.want(_PEERS, manager.paths)
        manager.announcer.plan()
        manager.announcer.take()

    found: list[float] = []
    for _ in range(runs):
        manager.lose(NodeState.DOWN)
        found += timed(diff, 1)
        manager.lose(NodeState.UP)
        manager.announce()
    yield f"one node lost, {where}: speaker diff, first commands", tuple(found), "ms"
    downs = iter([frozenset({f"n{NODES - 1}"}), frozenset[str]()] * runs)

    def judge() -> None:
        agent.run(next(downs))
        agent.encoded()

    slow = timed(judge, 2 * runs)[::2]
    yield f"one node lost, {where}: agent plan + messages", slow, "ms"
