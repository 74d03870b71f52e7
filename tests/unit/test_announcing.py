"""What every manager does with EIPs: what is set, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

from lbctl.core.announce import Paths
from lbctl.core.config import Config, parse
from lbctl.core.model import (
    Endpoint,
    Network,
    NodeState,
    ObjectRef,
    Peer,
    Phase,
    PortEndpoints,
    Protocol,
    ServiceEndpoints,
    Session,
    TrafficPolicy,
    host_route,
)
from lbctl.core.reasons import Reason
from lbctl.core.routes import EipSelection
from lbctl.kube.client import Client
from lbctl.kube.objects import Slice
from manager.announcing import CHUNK, Announcing
from manager.configuration import Accepted
from manager.inputs import Inputs
from manager.metrics import Metrics
from tests.bench.cluster import CONFIG, CONFIG_TEXT, Cluster

LIMIT_S = 60.0
LOST = "n3"
BY_NAME = parse(CONFIG_TEXT + "endpoints: {nodes: nodeName}")
RECURSIVE = parse(CONFIG_TEXT + "announce: {nextHop: recursive, virtualNextHops: [100.64.0.0/10]}")


class Feed:
    """A watched kind: what is put is there, and the listeners hear of it."""

    def __init__(self) -> None:
        self.cache: dict[object, object] = {}
        self._listeners: list[Callable[[Any, Any, Any], None]] = []

    def listen(self, listener: Callable[[Any, Any, Any], None]) -> None:
        self._listeners.append(listener)

    def put(self, key: object, value: object) -> None:
        old, self.cache[key] = self.cache.get(key), value
        for listener in self._listeners:
            listener(key, old, value)


class Speaker:
    """Keeps every set."""

    def __init__(self) -> None:
        self.sets: list[Paths] = []
        self.on_set: Callable[[], None] = lambda: None
        self.changed = asyncio.Event()

    def set(self, peers: Iterable[Peer], paths: Paths) -> int:
        self.sets.append(paths)
        self.changed.set()
        self.on_set()
        return len(self.sets)

    async def settled(self, number: int) -> None:
        return

    def is_settled(self, number: int) -> bool:
        return True

    def sessions(self) -> tuple[Session, ...]:
        return ()


class World:
    """A cluster of four chunks of EIPs, and one manager's announcing of it."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.cluster = Cluster(4 * CHUNK)
        self.feeds = {name: Feed() for name in ("eips", "services", "slices", "nodes")}
        inputs = SimpleNamespace(**self.feeds, known=asyncio.Event())
        inputs.known.set()
        self.speaker = Speaker()
        self.announcing = Announcing(
            "control-1",
            self.cluster.nodes[0].addresses[0],
            cast(Client, None),
            cast(Inputs, inputs),
            self.speaker,
            Metrics(),
            peers=lambda _accepted: (),
            can_start=lambda: True,
        )
        self.announcing.configure(Accepted(config, "h", 1))
        self.announcing.set_views(self.cluster.views)
        for node in self.cluster.nodes:
            self.feeds["nodes"].put(ObjectRef("", node.name), node)

    def add(self, numbers: range) -> list[Network]:
        """These Services, with their EIPs; their routes."""
        for n in numbers:
            ref, address = self.cluster.refs[n], self.cluster.addresses[n]
            self.feeds["services"].cache[ref] = self.cluster.services[ref]
            self.feeds["slices"].put(ref, Slice(ref, ref, self.cluster.endpoints[ref].ports))
            self.feeds["eips"].put(address, self.cluster.eips[address])
        return [host_route(self.cluster.addresses[n]) for n in numbers]

    def lose(self) -> None:
        """A node goes."""
        views = dict(self.cluster.views)
        views[LOST] = replace(views[LOST], state=NodeState.DOWN)
        self.announcing.set_views(views)

    async def until(self, condition: Callable[[Paths], bool]) -> None:
        """Until the last set is such."""
        async with asyncio.timeout(LIMIT_S):
            while not self.speaker.sets or not condition(self.speaker.sets[-1]):
                await self.speaker.changed.wait()
                self.speaker.changed.clear()


def without(paths: Paths, prefixes: list[Network]) -> bool:
    """Whether all these are announced, and none by the node."""
    return all(
        prefix in paths and all(path.node != LOST for path in paths[prefix]) for prefix in prefixes
    )


def test_what_a_service_gives_back_is_not_what_its_condition_tells() -> None:
    world = World()
    old, new = (world.cluster.eips[address] for address in world.cluster.addresses[:2])
    releasing = replace(old, phase=Phase.RELEASING)
    for eip, reason in ((releasing, Reason.RELEASING), (new, Reason.NO_ENDPOINTS)):
        world.feeds["eips"].put(eip.address, replace(eip, owner=old.owner))
        world.announcing.selections[eip.address] = EipSelection(frozenset(), reason, {})
    assert world.announcing.announced(old.owner) is Reason.NO_ENDPOINTS


async def test_a_node_that_goes_does_not_wait_for_a_load() -> None:
    """It goes when the first chunk of a load is set: it is taken out of what has routes, chunk by
    chunk, before more of the load is looked at. The first set of all is whole."""
    world = World()
    task = asyncio.create_task(world.announcing.run())
    first = world.add(range(2 * CHUNK))
    await world.until(lambda paths: len(paths) == 2 * CHUNK)
    assert len(world.speaker.sets) == 1, "what is not in the first set is withdrawn"

    def lose() -> None:
        world.speaker.on_set = lambda: None
        world.lose()

    world.speaker.on_set = lose
    rest = world.add(range(2 * CHUNK, 4 * CHUNK))
    await world.until(lambda paths: without(paths, first + rest))
    sets = world.speaker.sets
    out = next(n for n, paths in enumerate(sets) if without(paths, first))
    assert len(sets[out]) <= 3 * CHUNK, "the load was looked at first"
    begun = next(n for n, paths in enumerate(sets) if without(paths, first[:CHUNK]))
    assert begun < out, "a chunk waited for the others"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_with_virtual_next_hops_a_node_that_goes_is_one_change() -> None:
    """In the first set after it; no EIP's route changes, and each still tells its nodes."""
    world = World(RECURSIVE)
    task = asyncio.create_task(world.announcing.run())
    prefixes = world.add(range(2 * CHUNK))
    await world.until(lambda paths: len(paths) == 2 * CHUNK + 1)
    before = world.speaker.sets[-1]
    (hop,) = before.keys() - set(prefixes)
    assert {path.next_hop for p in prefixes for path in before[p]} == {hop.network_address}
    count = len(world.speaker.sets)
    world.lose()
    await world.until(lambda paths: without(paths, [hop]))
    after = world.speaker.sets[count]
    assert without(after, [hop]), "it took more than one set"
    assert {path.node for path in before[hop]} - {path.node for path in after[hop]} == {LOST}
    nodes = sorted(path.node for path in after[hop])

    def told() -> bool:
        found = world.announcing.selections.values()
        return all(sorted(path.node for path in one.paths) == nodes for one in found)

    await world.until(lambda _: told())
    assert {p: paths for p, paths in world.speaker.sets[-1].items() if p != hop} == {
        p: paths for p, paths in before.items() if p != hop
    }
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_change_of_how_pods_are_located_moves_a_local_services_next_hops() -> None:
    """At a running manager, whose nodes are the same; and back."""
    world = World()
    ref = world.cluster.refs[0]
    # Of n1, by an address that lies in n2's pod CIDR.
    pods = (Endpoint(ip_address("10.2.2.65"), 80, "n1", "pod"),)
    world.cluster.endpoints[ref] = ServiceEndpoints(ref, (PortEndpoints("", Protocol.TCP, pods),))
    local = replace(world.cluster.services[ref], policy=TrafficPolicy.LOCAL)
    world.cluster.services[ref] = local
    (prefix,) = world.add(range(1))

    def leads_to(name: str) -> Callable[[Paths], bool]:
        return lambda paths: [path.node for path in paths.get(prefix, ())] == [name]

    async with asyncio.TaskGroup() as group:
        task = group.create_task(world.announcing.run())
        await world.until(leads_to("n2"))
        world.announcing.configure(Accepted(BY_NAME, "h2", 2))
        await world.until(leads_to("n1"))
        world.announcing.configure(Accepted(CONFIG, "h3", 3))
        await world.until(leads_to("n2"))
        task.cancel()


async def test_our_own_host_is_left_to_another_manager_while_one_announces() -> None:
    world = World()
    own = world.cluster.nodes[0].name
    prefixes = world.add(range(3))

    def through(paths: Paths) -> bool:
        return all(own in {path.node for path in paths[prefix]} for prefix in prefixes)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(world.announcing.run())
        await world.until(through)
        world.announcing.set_managers(("control-1", "control-2"), True)
        await world.until(lambda paths: not through(paths) and all(map(len, paths.values())))
        world.announcing.set_managers(("control-1",), False)
        await world.until(through)
        task.cancel()
