"""The agent's loop: inputs and the down set in, the node's forwarding out, confirmed when it is in.

Rules:
- One pass at a time; a pass writes the newest of everything, so that no event needs a queue. What
  the API server said in between is lived through in memory alone: other nodes may have had it.
- Order of a pass: routes first, then nftables, then the removal of routes no longer used. Only then
  is the table confirmed, and the snapshot written.
- A failed pass is repeated with back-off; what the kernel has stays.
- Between passes the kernel is checked, and what someone else removed is put back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import structlog

from agent import conntrack, settings
from agent.clash import Lookout
from agent.dataplane import Dataplane
from agent.forgetting import Forgetting
from agent.inputs import Inputs, growing
from agent.reach import Reach
from agent.rendering import State, render
from agent.routes import Routes
from agent.settling import Settling
from lbctl.core import forwarding, nodeview
from lbctl.core.clash import Clash
from lbctl.core.forwarding import EVERYWHERE, EipTable, Locator, Sources, Table
from lbctl.core.model import Address, Behind, LocatedBy, Node, ObjectRef, ServiceEndpoints
from lbctl.core.nft import Ruleset
from lbctl.core.nftrules import UDP_MEMORY_S
from lbctl.core.nodeview import View
from lbctl.core.pmap import PMap, changed, persistent
from lbctl.core.ways import assign, current_macs
from lbctl.errors import DataplaneError

CHECK_S: Final = 1.0
RESOLVE_S: Final = 0.1  # between looks at the neighbour table while a node's MAC is unknown
RESOLVE_TRIES: Final = 20
FALL_BACK_S: Final = 5.0
# So long the connections to a fallen node's pods are kept for it: an uplink that flaps, a switch
# port that comes up again. Then they are reset, so that clients of a dead node need not time out.
FALLEN_S: Final = 5.0
LIVED_THROUGH: Final = 16  # changes of endpoints during one pass; more are a load
RETRY_S: Final = (0.1, 0.5, 2.0, 5.0)
_log = structlog.get_logger()
Endpoints: TypeAlias = Mapping[ObjectRef, ServiceEndpoints]
_LocatorOf: TypeAlias = tuple[tuple[Node, ...], LocatedBy]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What the kernel has taken.

    eips: those that it carries, with where their endpoints are that take new flows.
    """

    generation: int = 0
    config_generation: int = 0
    table: Table = forwarding.EMPTY
    eips: Mapping[Address, Behind] = field(default_factory=PMap)


@dataclass(frozen=True, slots=True)
class Gone:
    """The nodes that are called down, and since when (monotonic; known of those that fell here).

    One value, for a pass goes by what it began with: nodes may be back before it plans.
    """

    nodes: frozenset[str] = frozenset()
    fell_s: Mapping[str, float] = field(default_factory=dict)

    def fallen(self, now_s: float) -> frozenset[str]:
        """Those that fell so lately that they may be back in a moment."""
        return frozenset(n for n in self.nodes if now_s - self.fell_s.get(n, -math.inf) < FALLEN_S)


class Engine:
    """Programs one node. `on_confirmed` and `on_saved` are called in the event loop."""

    def __init__(
        self,
        node: str,
        dataplane: Dataplane,
        routes: Routes,
        on_confirmed: Callable[[Confirmed], None],
        on_state: Callable[[State], None],
    ) -> None:
        self._node = node
        self._dataplane = dataplane
        self._reach = Reach(node, routes)
        self._lookout = Lookout(routes, lambda: self._reach.numbers)
        self._forgetting = Forgetting(self._still_gone)
        self._programmed = asyncio.Event()
        self._on_confirmed = on_confirmed
        self._on_state = on_state
        self._inputs: Inputs | None = None
        self._between: deque[Endpoints] = deque(maxlen=LIVED_THROUGH)
        self._gone = Gone()
        self._state = State()
        self._planned: tuple[State, tuple[conntrack.Target, ...]] = self._state, ()
        self._settling = Settling()
        self._macs: Mapping[Address, str] = {}
        self._locator: tuple[_LocatorOf, Locator] = (((), "podCIDR"), Locator(()))
        self._wake = asyncio.Event()
        self._resolve = asyncio.Event()
        self._turn = asyncio.Lock()  # a pass or a repair
        self._known_problems: tuple[str, ...] = ()
        self.confirmed = Confirmed()
        self.repairs = {"nftables": 0, "routes": 0, "interfaces": 0}
        self._failures = 0
        self.turned_s = time.monotonic()

    # -- in ------------------------------------------------------------------------------------
    def feed(self, inputs: Inputs) -> None:
        """Take the cluster's state in."""
        self._inputs = inputs
        self._between.append(inputs.endpoints)
        self._wake.set()

    def set_down(self, nodes: frozenset[str]) -> None:
        """Take in which nodes' endpoints take no new flows."""
        old = self._gone
        if nodes != old.nodes:
            _log.info("down_set", nodes=sorted(nodes))
            now_s = time.monotonic()
            self._gone = Gone(nodes, {name: old.fell_s.get(name, now_s) for name in nodes})
            if nodes - old.nodes:
                asyncio.get_running_loop().call_later(FALLEN_S + 0.1, self._wake.set)
            self._wake.set()

    def restore(self, state: State) -> bool:
        """Start from a snapshot; True if the kernel still has exactly that (then it is confirmed).

        Otherwise the state is known, but nothing is written before `feed`.
        """
        self._state, self._gone, self._macs = state, Gone(state.down), state.macs
        if not self._dataplane.adopt(state.rules, state.shape):
            return False
        self._confirm(state)
        return True

    @property
    def state(self) -> State:
        """What was last written to the kernel."""
        return self._state

    @property
    def down(self) -> frozenset[str]:
        """The nodes now taken for down."""
        return self._gone.nodes

    @property
    def failures(self) -> int:
        """Attempts that failed."""
        return self._failures + self._forgetting.failures

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with this node's kernel settings and tunnel, in words."""
        return self._known_problems

    @property
    def clashes(self) -> tuple[Clash, ...]:
        """Who else on this node uses what is ours."""
        return self._lookout.clashes

    @property
    def unreachable(self) -> tuple[str, ...]:
        """The nodes to which there is no way."""
        return self._reach.unreachable

    # -- loops ---------------------------------------------------------------------------------
    async def run(self) -> None:
        """Program the node for ever; ends only by cancellation."""
        await self._dataplane.survey()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._program(), name="program")
            group.create_task(self._check(), name="check")
            group.create_task(self._neighbours(), name="neighbours")
            group.create_task(self._fall_back(), name="fall-back")
            group.create_task(self._forgetting.run(), name="forget")
            group.create_task(self._lookout.run(self._programmed), name="lookout")

    async def _fall_back(self) -> None:
        """Without a word from the API server, serve what the snapshot says."""
        await asyncio.sleep(FALL_BACK_S)
        if self._inputs is None and self._state.rules.generation:
            _log.warning("api_server_away", serving="snapshot")
            self.feed(self._state.inputs)

    async def _program(self) -> None:
        failed = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._inputs is None:
                continue
            between: list[Endpoints] = []
            try:
                async with self._turn:
                    between, self._between = list(self._between), deque(maxlen=LIVED_THROUGH)
                    await _finished(self._pass(self._inputs, between, self._gone))
                failed = 0
            except DataplaneError as error:
                self._failures += 1
                _log.error("apply_failed", error=str(error))
                self._between = deque([*between, *self._between], LIVED_THROUGH)
                self._take_back()
                await asyncio.sleep(RETRY_S[min(failed, len(RETRY_S) - 1)])
                failed += 1
                self._wake.set()

    async def _pass(self, inputs: Inputs, between: list[Endpoints], off: Gone) -> None:
        started = time.monotonic()
        before, reach = self._state, self._reach
        wanted = inputs.forwarding.interfaces
        if not reach.survey.uplinks or before.inputs.forwarding.interfaces != wanted:
            await reach.look(wanted)
        index = self._numbers(before, inputs.nodes)
        reach.plan(inputs, index)
        await reach.ensure()
        await reach.loosen()
        whole = self._dataplane.kernel is None
        boots = not before.rules.generation
        parts = growing(inputs) if boots and self._dataplane.blank() else (inputs,)
        written = await self._dataplane.set(self._stages(before, parts, between, off, index))
        planned, gone = self._planned
        await reach.prune()
        if not written:
            # Nothing of the kernel's differs, so neither does its generation.
            planned = replace(
                planned, rules=replace(planned.rules, generation=before.rules.generation)
            )
        self._take_over(replace(planned, shape=self._dataplane.shape))
        self._forgetting.add(gone)
        if written:
            _log.info(
                "table_applied",
                generation=planned.rules.generation,
                digest=f"{planned.table.digest:016x}",
                eips=len(planned.table.eips),
                whole=whole,
                took_s=round(time.monotonic() - started, 4),
            )

    def _still_gone(self, gone: Iterable[conntrack.Target]) -> tuple[conntrack.Target, ...]:
        return conntrack.without(gone, self._state.table, self._node, self._state.index)

    def _take_over(self, state: State) -> None:
        """The kernel has it."""
        self._state = state
        if self._settling.note(state.view, time.monotonic()):
            asyncio.get_running_loop().call_later(UDP_MEMORY_S + 0.1, self._wake.set)
        self._resolve.set()
        self._confirm(state)
        self._programmed.set()
        self._on_state(state)

    def _numbers(self, before: State, nodes: tuple[Node, ...]) -> Mapping[str, int]:
        """The nodes' numbers; their MACs are kept as long as they are there."""
        known = nodes is before.inputs.nodes
        if not known or self._macs is not before.macs:
            self._macs = current_macs(self._macs, self._node, nodes)
        return before.index if known else assign(before.index, self._node, nodes)

    def _stages(
        self,
        before: State,
        parts: Iterable[Inputs],
        between: list[Endpoints],
        off: Gone,
        index: Mapping[str, int],
    ) -> Iterator[Ruleset]:
        """What the kernel is to hold; where there is nothing yet, the way there in stages.

        Leaves the state in `_planned`, with the conntrack targets that are no more.
        """
        boots, numbers = not before.rules.generation, {**before.index, **index}
        for part in parts:
            made = self._plan(before, part, between, off, index, boots=boots)
            gone = conntrack.left(before.table, made.table, self._node, numbers)
            before, self._planned = made, (made, gone)
            yield made.rules

    def _plan(
        self,
        before: State,
        inputs: Inputs,
        between: list[Endpoints],
        off: Gone,
        index: Mapping[str, int],
        *,
        boots: bool,
    ) -> State:
        """Runs in a thread: pure, and at the cost of what differs from `before`."""
        sources = self._sources(inputs, off)
        if not boots:
            # What comes now is not settled with what was there before.
            settled = nodeview.settle(before.view, self._settling.due(time.monotonic()))
            steps = [*(replace(sources, endpoints=each) for each in between), sources]
            table, view = nodeview.live_through(settled, before.table, steps, self._node)
        else:
            table = forwarding.revise(before.table, sources)
            past = self._others(before, table, sources)
            view = nodeview.advance(past, table, self._node, before.table)
        state = State(
            inputs,
            off.nodes,
            table,
            view,
            index,
            self._macs,
            usable=self._reach.usable(4),
            usable6=self._reach.usable(6),
            tunnel_peers=self._reach.tunnel_peers,
            tunnel_mtu=self._reach.tunnel_mtu,
        )
        generation = before.rules.generation + 1
        return render(state, self._node, generation, self._reach.uplinks, before)

    def _sources(self, inputs: Inputs, off: Gone) -> Sources:
        options = inputs.forwarding
        locator = self._located((inputs.nodes, options.located_by))
        return Sources(
            inputs.eips,
            inputs.services,
            inputs.endpoints,
            locator,
            off.nodes,
            options,
            off.fallen(time.monotonic()),
            inputs.doubtful,
        )

    def _others(self, before: State, table: Table, sources: Sources) -> View:
        """What every other node has had until now, while this one was off or not there.

        A node that boots has no past of its own, but its pods' buckets had other owners.
        """
        fresh = changed(before.table.eips, table.eips)
        mine = [a for a in fresh if a in table.eips and self._node in table.eips[a].nodes]
        eips = PMap({address: sources.eips[address] for address in mine})
        away = replace(sources, eips=eips, down=sources.down | {self._node})
        others = forwarding.revise(forwarding.EMPTY, away)
        return persistent(before.view).updated(nodeview.advance({}, others, self._node))

    def _located(self, of: _LocatorOf) -> Locator:
        if self._locator[0] != of:
            self._locator = (of, Locator(*of))
        return self._locator[1]

    def _confirm(self, state: State) -> None:
        self.confirmed = Confirmed(
            state.rules.generation,
            state.inputs.config_generation,
            state.table,
            confirmed_eips(self._node, self.confirmed, state.table),
        )
        self._on_confirmed(self.confirmed)

    def _take_back(self) -> None:
        """Confirm nothing any more, if what failed left no complete table: no route may lead here.

        A table that is written anew is emptied first; and someone may have deleted ours. What the
        kernel refuses before that leaves the last table at work.
        """
        try:
            if not self.confirmed.eips or not self._dataplane.blank():
                return
        except DataplaneError as error:
            _log.error("check_failed", error=str(error))
            return
        _log.error("nothing_confirmed", why="the kernel has no complete table")
        last = self.confirmed
        self.confirmed = Confirmed(last.generation, last.config_generation)
        self._on_confirmed(self.confirmed)

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self.turned_s = time.monotonic()
            try:
                await self._look()
            except DataplaneError as error:
                self._failures += 1
                _log.error("check_failed", error=str(error))

    async def _look(self) -> None:
        """Put back what someone else took away."""
        if self._inputs is None and self._dataplane.kernel is None:
            return
        inputs = self._inputs or self._state.inputs
        trouble = self._reach.trouble
        fresh = await self._reach.look(inputs.forwarding.interfaces)
        if self._reach.hops and not self._turn.locked() and not self._wake.is_set():
            async with self._turn:
                await self._mend()
        if fresh or self._reach.trouble != trouble:
            self._inputs = inputs
            self._wake.set()
        self.repairs["interfaces"] += await self._reach.loosen()
        if self._dataplane.kernel is not None and self._dataplane.damaged():
            self.repairs["nftables"] += 1
            _log.warning("repaired", what="nftables")
            self._inputs = inputs
            self._wake.set()
        found = settings.problems(self._reach.ipv6) + self._dataplane.lacking
        found += (f"tunnel: {self._reach.trouble}",) if self._reach.trouble else ()
        if found != self._known_problems:
            self._known_problems = found
            _log.warning("kernel_settings", problems=found)

    async def _mend(self) -> None:
        repaired = await self._reach.ensure()
        if self._dataplane.kernel is not None:
            repaired += await self._reach.prune()
        if repaired:
            self.repairs["routes"] += repaired
            _log.warning("repaired", what="routes", count=repaired)

    async def _neighbours(self) -> None:
        """Keep the other nodes' MACs known; ask for those that are not."""
        while True:
            for _ in range(RESOLVE_TRIES):
                if await self._neighbours_known():
                    break
                await asyncio.sleep(RESOLVE_S)
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._resolve.wait()
            except TimeoutError:
                continue
            self._resolve.clear()

    async def _neighbours_known(self) -> bool:
        inputs = self._inputs
        if inputs is None:
            return True
        try:
            known, all_known = await self._reach.neighbours(inputs)
        except DataplaneError as error:
            _log.warning("neighbours_unknown", error=str(error))
            return True
        if any(self._macs.get(address) != mac for address, mac in known.items()):
            self._macs = {**self._macs, **known}
            self._wake.set()
        return all_known


async def _finished(work: Coroutine[Any, Any, None]) -> None:
    """Await to the end even when cancelled: half a pass would have to be written anew."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def confirmed_eips(me: str, last: Confirmed, table: Table) -> PMap[Address, Behind]:
    """`Confirmed.eips` of a table on node `me`, made from the last."""
    fresh: dict[Address, Behind] = {}
    gone: list[Address] = []
    for address in changed(last.table.eips, table.eips):
        entry = table.eips.get(address)
        if entry is None:
            gone.append(address)
        else:
            fresh[address] = _behind(me, entry)
    return persistent(last.eips).updated(fresh, gone)


def _behind(me: str, entry: EipTable) -> Behind:
    nodes = {e.node for port in entry.ports if not port.closed for e in port.endpoints}
    if nodes & {me, EVERYWHERE}:
        return Behind.HERE
    return Behind.AWAY if nodes else Behind.NOTHING
