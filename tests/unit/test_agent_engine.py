"""The agent's loop on a kernel that refuses things."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.engine import Confirmed, Engine
from agent.inputs import Inputs
from agent.rendering import State
from lbctl.core.model import Eip, Endpoint, ForwardingOptions
from lbctl.core.nft import Ruleset
from lbctl.core.pmap import PMap
from lbctl.core.ways import Survey
from lbctl.errors import DataplaneError

from .forwarding_cases import EIP, RANGES, STRAY, TAKEN, WEB, blocks, nodes, pod, service, table

ON_LINK = Survey(prefixes=((IPv4Network("192.0.2.0/24"), 2), (IPv6Network("2001:db8:1::/64"), 2)))


class Kernel:
    """Takes what it is given, but for the next `refuses` times."""

    shape, lacking = "", ()

    def __init__(self) -> None:
        self.kernel: Ruleset | None = None
        self.marker: int | None = None
        self.refuses = 0
        self.empties = False  # what is refused had been begun
        self.meanwhile: Callable[[], None] = lambda: None  # what happens before the plan is made

    async def survey(self) -> None:
        pass

    def blank(self) -> bool:
        return self.marker is None

    def damaged(self) -> bool:
        return False

    async def set(self, stages: Iterable[Ruleset]) -> bool:
        self.meanwhile()
        *_, last = stages
        self.kernel = None
        if self.refuses:
            self.refuses -= 1
            self.marker = None if self.empties else self.marker
            raise DataplaneError("busy")
        self.kernel, self.marker = last, last.generation
        return True


class Links:
    """One link with all nodes on it; nothing is to be changed, nobody is in the way."""

    notices = SimpleNamespace(routes=lambda: 0, neighbours=lambda: 0)

    async def survey(self, _wanted: tuple[str, ...]) -> Survey:
        return ON_LINK

    async def nothing(self, *_: object) -> int:
        return 0

    async def nobody(self, *_: object) -> dict[object, object]:
        return {}

    ensure = prune = prune_tunnel = resolve = nothing
    neighbours = foreign_rules = foreign_routes = foreign_tunnels = nobody


def behind(*pods: Endpoint) -> Inputs:
    sources = table(*pods).sources
    return Inputs(
        eips=PMap({EIP: Eip(EIP, "public", WEB, "uid")}),
        services=PMap({WEB: service()}),
        endpoints=sources.endpoints,
        nodes=nodes(),
        ranges=RANGES,
    )


@asynccontextmanager
async def programming(engine: Engine) -> AsyncIterator[None]:
    """The engine runs for as long as the block lasts."""
    running = asyncio.ensure_future(engine.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})


@pytest.mark.parametrize("empties", [False, True])
async def test_a_node_whose_table_is_gone_confirms_nothing_until_it_is_back(empties: bool) -> None:
    """One that was not touched by what the kernel refused forwards as before."""
    said: asyncio.Queue[Confirmed] = asyncio.Queue()
    kernel = Kernel()
    engine = Engine("n1", cast(Any, kernel), cast(Any, Links()), said.put_nowait, lambda _: None)
    async with programming(engine):
        engine.feed(behind(pod(2, 2)))
        assert set((await asyncio.wait_for(said.get(), 30)).eips) == {EIP}
        kernel.refuses, kernel.empties = 2, empties
        engine.feed(behind(pod(2, 2), pod(3, 2)))
        if empties:
            nothing = await asyncio.wait_for(said.get(), 30)
            assert (nothing.eips, nothing.table.digest) == ({}, 0)
            assert nothing.generation  # not as an agent that has not begun yet
        last = await asyncio.wait_for(said.get(), 30)
    assert set(last.eips) == {EIP} and kernel.refuses == 0 and said.empty()


async def test_a_change_of_how_pods_are_located_moves_them() -> None:
    """At a running agent, whose nodes are the same; and back."""
    states: asyncio.Queue[State] = asyncio.Queue()
    kernel = Kernel()
    engine = Engine("n1", cast(Any, kernel), cast(Any, Links()), lambda _: None, states.put_nowait)
    by_cidr = replace(behind(STRAY, TAKEN), nodes=blocks())
    by_name = replace(by_cidr, forwarding=ForwardingOptions(located_by="nodeName"))
    found = []
    async with programming(engine):
        for inputs in (by_cidr, by_name, by_cidr):
            engine.feed(inputs)
            state = await asyncio.wait_for(states.get(), 30)
            assert engine.confirmed.table is state.table
            found.append([e.node for e in state.table.eips[EIP].ports[0].endpoints])
    assert found == [["n2"], ["n1", "n1"], ["n2"]]


async def test_what_came_between_is_lived_through_though_the_kernel_refused_it_at_first() -> None:
    """Other nodes may have had that table, and flows began by it."""
    states: asyncio.Queue[State] = asyncio.Queue()
    kernel = Kernel()
    engine = Engine("n1", cast(Any, kernel), cast(Any, Links()), lambda _: None, states.put_nowait)
    async with programming(engine):
        engine.feed(behind(pod(2, 2)))
        await asyncio.wait_for(states.get(), 30)
        kernel.refuses = 2
        for pods in ((pod(2, 2), pod(3, 2)), (pod(1, 2), pod(2, 2), pod(3, 2))):
            engine.feed(behind(*pods))
        last = await asyncio.wait_for(states.get(), 30)
    assert kernel.refuses == 0 and engine.failures == 2
    (view,) = last.view[EIP]
    assert {holder.node for line in view.former for holder in line} == {"n2", "n3"}


async def test_a_node_that_is_back_before_its_fall_is_planned_has_only_just_fallen() -> None:
    """Its established flows are still handed to it; they were reset by other nodes' pods."""
    states: asyncio.Queue[State] = asyncio.Queue()
    kernel = Kernel()
    engine = Engine("n1", cast(Any, kernel), cast(Any, Links()), lambda _: None, states.put_nowait)
    async with programming(engine):
        engine.feed(behind(pod(1, 2), pod(2, 2)))
        await asyncio.wait_for(states.get(), 30)
        kernel.meanwhile = lambda: engine.set_down(frozenset())
        engine.set_down(frozenset({"n2"}))
        fell = await asyncio.wait_for(states.get(), 30)
    (view,) = fell.view[EIP]
    assert fell.down == {"n2"} and {h.node for h in view.table.endpoints} == {"n1"}
    assert {holder.node for line in view.former for holder in line} == {"n2"}
