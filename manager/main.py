"""`lbctl-manager`: wires the parts together and runs them as one group of tasks.

Rules: no decisions here. A part that fails for no reason of its own (a bug) ends the process, and
the kubelet starts it again: the speaker goes on announcing meanwhile. Only the leader's work is
contained: it is logged and counted, the lease is given back, and another replica may try.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import signal
import sys
import time
import uuid
from collections.abc import Sequence

import structlog

from lbctl import errors, log
from lbctl.core import names, state
from lbctl.core.config import HOLD_TIME_S
from lbctl.core.health import Limits
from lbctl.core.keys import Keys
from lbctl.core.model import Address, NodeState, ObjectRef
from lbctl.core.release import Facts
from lbctl.keyfiles import read_keys
from lbctl.kube.client import Client
from lbctl.kube.events import EventRecorder
from lbctl.kube.lease import LeaderElector
from manager import settings as options
from manager.access import Gate
from manager.agents import AgentHosts
from manager.allocating import Allocating
from manager.announcing import Announcing
from manager.conditions import Conditions
from manager.configuration import Accepted, Configuration
from manager.confirming import Confirming
from manager.fleet import Fleet
from manager.http import Pages, serving
from manager.inputs import Inputs
from manager.kernelcheck import Reach
from manager.keys import ProbeKeys
from manager.metrics import Metrics
from manager.neighbours import Neighbours
from manager.nodes import NodeWatch
from manager.readiness import Readiness
from manager.settings import Settings
from manager.snapshot import Snapshots
from manager.speaker.port import ExabgpSpeaker
from manager.state import Parts, build

PING_S = 0.25
JUDGE_S = 10.0  # after the start, until the nodes and keys are known
START_S = 5.0  # an agent that never answers must not keep the routes of all others back
_log = structlog.get_logger()


class Manager:
    """One replica. `run()` ends by cancellation only."""

    def __init__(self, client: Client, given: Settings) -> None:
        self._given = given
        self._boot_s = time.time()
        self._known_s: float | None = None
        self._was_up = False
        self._client = client
        self.metrics = Metrics()
        self.inputs = Inputs(client, given.namespace)
        self._snapshots = Snapshots(given.snapshot_dir, self.inputs)
        self._watch: NodeWatch | None = None
        self._keys_known = asyncio.Event()
        self.events = EventRecorder(client, names.MANAGER_APP, given.manager_id)
        self.elector = LeaderElector(
            client,
            f"{given.manager_id}_{uuid.uuid4()}",
            namespace=given.namespace,
            on_change=self._leading,
        )
        self.speaker = ExabgpSpeaker(
            given.speaker_dir, given.manager_id, on_change=self._sessions_changed
        )
        self.agents = AgentHosts()
        self._probed: frozenset[str] | None = None
        self._listing = False  # the nodes are looked at in the loop's next turn
        self._reach = Reach(names.MANAGER_PEER_PORT)
        self.fleet = Fleet(given.manager_id, self.inputs.nodes.cache.items, self)
        self.keys = ProbeKeys(client, self._new_keys, given.namespace)
        secrets = self.inputs.secrets.cache
        self.neighbours = Neighbours(
            secrets.items, secrets.synced.is_set, given.namespace, given.address
        )
        self._build(client, given)
        parts = (self.inputs, self.configuration, self.announcing, self.speaker)
        self.readiness = Readiness(*parts, lambda: self._watch is not None, self._unheard)
        self._listen()

    def _build(self, client: Client, given: Settings) -> None:
        self.announcing = Announcing(
            given.manager_id,
            given.address,
            client,
            self.inputs,
            self.speaker,
            self.metrics,
            self.neighbours.peers,
            self._can_start,
            self._selected,
        )
        self.allocating = Allocating(
            client,
            self.inputs,
            self.elector.is_leader,
            self.metrics,
            self._facts,
            lambda action: self.conditions.written(action),
            self._selected,
        )
        self.conditions = Conditions(
            client,
            self.inputs.services.cache,
            self.events,
            self.elector.is_leader,
            self.metrics,
            self.allocating.decision,
            self.announcing.announced,
        )
        self.configuration = Configuration(
            client,
            self.events,
            self.metrics,
            lambda: self.inputs.eips.cache.items.values(),
            self._accepted,
            given.namespace,
        )

    def _listen(self) -> None:
        inputs = self.inputs
        inputs.wanted.listen(lambda _key, _old, new: self.configuration.change_wanted(new))
        inputs.accepted.listen(lambda _key, _old, new: self.configuration.change_accepted(new))
        inputs.secrets.listen(lambda key, _old, _new: self._secret_changed(key))
        inputs.pods.listen(lambda key, _old, _new: self._pod_changed(key))
        inputs.nodes.listen(lambda _key, _old, _new: self._node_changed())

    # What happens

    def _accepted(self, accepted: Accepted) -> None:
        self.announcing.configure(accepted)
        self.allocating.configure(accepted)
        self._limit(accepted)

    def _limit(self, accepted: Accepted | None) -> None:
        if self._watch is not None and accepted is not None:
            probe = accepted.config.probe
            limits = Limits(probe.interval_s, probe.misses, probe.agent_grace_s)
            self._watch.prober.set_limits(limits)

    def _secret_changed(self, key: ObjectRef) -> None:
        if key.name == names.PROBE_SECRET:
            self.keys.change(self.inputs.secrets.cache.get(key))
        self.announcing.poke()

    def _pod_changed(self, key: ObjectRef) -> None:
        pod = self.inputs.pods.cache.get(key)
        if self.agents.change(key, pod):
            self._nodes_listed()
        if self.fleet.change(key, pod):
            self.allocating.touch()

    def _node_changed(self) -> None:
        """A list of a thousand is one change."""
        if not self._listing:
            self._listing = True
            asyncio.get_running_loop().call_soon(self._nodes_listed)

    def _nodes_listed(self) -> None:
        self._listing = False
        if self._watch is not None:
            nodes = {node.name: node for node in self.inputs.nodes.cache.items.values()}
            self._probed = self._expected()
            self._watch.prober.set_nodes(nodes, self._probed, self.agents.ready())

    def _expected(self) -> frozenset[str] | None:
        current = self.configuration.current
        return self.agents.nodes(current.config.probe.agent_grace_s if current else math.inf)

    def _new_keys(self, keys: Keys) -> None:
        if self._watch is None:
            self._watch = NodeWatch(
                keys,
                self._given.manager_id,
                self.fleet.addresses,
                self.announces,
                lambda _names: self._views_changed(),
                self._managers_changed,
            )
            self._limit(self.configuration.current)
            self._nodes_listed()
        else:
            self._watch.set_keys(keys)
        self.speaker.set_ring(keys.managers())
        self._keys_known.set()

    def _views_changed(self) -> None:
        if self._watch is not None:
            self.announcing.set_views(self._watch.prober.views())
            self.allocating.touch()

    def _managers_changed(self) -> None:
        if self._watch is not None:
            peers = self._watch.peers
            self.announcing.set_managers(peers.managers(), peers.announcing())
            self.allocating.touch()

    def _sessions_changed(self) -> None:
        self.readiness.look()
        for eip in self.inputs.eips.cache.items.values() if self._session_flip() else ():
            for ref in eip.members:
                self._selected(ref)

    def _session_flip(self) -> bool:
        up = any(session.up for session in self.speaker.sessions())
        flipped, self._was_up = up != self._was_up, up
        return flipped

    def _selected(self, ref: ObjectRef) -> None:
        self.conditions.mark(ref)

    def _leading(self, leading: bool) -> None:
        self.metrics.leader.set(leading)

    # What the parts ask

    def heard(self) -> tuple[str, ...]:
        """Ids of the managers that live, as far as we hear (`fleet.Witness`)."""
        return self._watch.peers.managers() if self._watch is not None else ()

    def heard_by_agents(self) -> frozenset[int] | None:
        """Hashes of the managers that agents hear (`fleet.Witness`)."""
        return self._watch.prober.heard_by_agents() if self._watch is not None else None

    def host_answers(self, manager: str, address: Address) -> bool:
        """Whether the host of another manager answers us (`fleet.Witness`)."""
        return self._reach(manager, address)

    def announces(self) -> bool:
        """Whether our own sessions are up and full (`fleet.Witness`)."""
        return self.readiness.full and any(s.up for s in self.speaker.sessions())

    def _can_start(self) -> bool:
        """Whether the nodes are known well enough: what is not in the first set is withdrawn."""
        if self.announcing.number is not None:
            return True
        if self._known_s is None or self._watch is None or self._unheard():
            return False
        if time.monotonic() - self._known_s > START_S:
            return True
        views = self._watch.prober.views().values()
        fetched = all(v.confirmed or not v.digest for v in views if v.state is NodeState.UP)
        return fetched and (self._watch.prober.judges or not views)

    def _unheard(self) -> bool:
        return self._watch is not None and self._watch.prober.unheard

    def _facts(self) -> Facts:
        current = self.configuration.current
        views = self._watch.prober.views() if self._watch is not None else {}
        if current is None:
            return Facts(living=())  # nobody has withdrawn anything
        announce = current.config.announce
        return Facts(
            living=self.fleet.living(),
            gone=self.fleet.gone(),
            confirming=Confirming(views),
            hold_time_s=self._hold_time_s(),
            drain_time_s=announce.drain_time_s,
            reuse_after_s=announce.reuse_after_s,
            rule=current.config.services,
        )

    def _hold_time_s(self) -> float:
        current = self.configuration.current
        return current.config.bgp.keep_s if current is not None else HOLD_TIME_S

    # What runs

    async def run(self) -> None:
        """Everything, until cancelled."""
        self._use_mounted_keys()
        gate = Gate(self._client)
        pages = Pages(
            gate, self.metrics.registry, self.readiness.missing, self._state, self._measure
        )
        given = self._given
        async with (
            serving(pages, given.http_host or None, given.http_port),
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self.inputs.run(), name="inputs")
            group.create_task(self._snapshots.run(), name="snapshots")
            group.create_task(self.events.run(), name="events")
            group.create_task(self.speaker.run(), name="speaker")
            group.create_task(self.announcing.run(), name="announcing")
            group.create_task(self._probe(), name="probe")
            group.create_task(self._ping(), name="ping")
            group.create_task(self.elector.run(self._lead), name="election")

    def _use_mounted_keys(self) -> None:
        """Until the API server shows the Secret; at the very first start there is none."""
        try:
            self.keys.use(read_keys(self._given.keys_dir))
        except errors.ConfigError as error:
            _log.info("probe_keys_not_mounted", error=str(error))

    async def _probe(self) -> None:
        await self.inputs.known.wait()
        self._known_s = time.monotonic()
        await self._keys_known.wait()
        assert self._watch is not None
        await self._watch.run()

    async def _ping(self) -> None:
        """Tell the speaker that this manager works: the loop turns and probes go out."""
        # A manager that cannot judge for long must not keep sessions open if another one can.
        sent, moved_s = -1, time.monotonic() + JUDGE_S
        while True:
            now_s = time.monotonic()
            prober = self._watch.prober if self._watch is not None else None
            now_sent = prober.counters.sent if prober is not None else sent
            current = self.configuration.current
            interval_s = current.config.probe.interval_s if current is not None else 1.0
            idle = prober is not None and prober.idle and self._known_s is not None
            if now_sent != sent or idle:
                sent, moved_s = now_sent, now_s
            if now_s - moved_s < max(1.0, 3 * interval_s):
                others = self._watch is not None and self._watch.peers.announcing()
                self.speaker.ping(others)
            self.readiness.look()
            self._look()
            if self.announcing.number is None:
                self.announcing.poke()
            await asyncio.sleep(PING_S)

    def _look(self) -> None:
        """What only time changes: managers that are silent for long, agents that are gone."""
        if self._watch is not None and self.fleet.look(self._hold_time_s()):
            self.allocating.touch()
        if self._expected() != self._probed:
            self._nodes_listed()

    async def _lead(self) -> None:
        """The leader's work, upon what the API server says now; ends when any part of it does."""
        await self.inputs.synced()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.configuration.lead(), name="configuration")
                group.create_task(self.conditions.lead(), name="conditions")
                group.create_task(self._ensure_keys(), name="keys")
                await self.allocating.lead()
                raise errors.NotLeader("allocation has ended")
        except* errors.NotLeader:
            pass
        except* Exception as group_error:  # noqa: BLE001 (task root: another replica may lead)
            self.metrics.task_errors.labels("lead").inc()
            _log.error("leader_failed", exc_info=group_error)
            await asyncio.sleep(1.0)

    async def _ensure_keys(self) -> None:
        await self.inputs.secrets.cache.synced.wait()
        if ObjectRef(self._given.namespace, names.PROBE_SECRET) not in (
            self.inputs.secrets.cache.items
        ):
            await self.keys.ensure()

    # What people ask

    async def _state(self) -> bytes:
        parts = Parts(
            self._given.manager_id,
            self._boot_s,
            self.inputs,
            self.configuration,
            self.allocating,
            self.announcing,
            self.neighbours,
        )
        nodes = self._watch.prober.status() if self._watch is not None else ()
        holder = self.elector.holder.partition("_")[0]
        leading = self.elector.is_leader()
        made = build(parts, leading, holder, self.speaker.sessions(), nodes)
        return await asyncio.to_thread(state.to_json, made)

    def _measure(self) -> None:
        self.inputs.measure(self.metrics)
        self.announcing.measure()
        if current := self.configuration.current:
            eips = self.inputs.eips.cache.items.values()
            self.metrics.measure_pools(current.config.pools, eips, self.allocating.free())
            self.metrics.measure_sessions(current.config.bgp.peers, self.speaker.sessions())
        if self._watch is not None:
            prober = self._watch.prober
            self.metrics.measure_nodes(prober.views().values(), prober.counters)


async def _main(given: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    client = await Client.from_environment(given.kubeconfig)
    async with client:
        running = asyncio.create_task(Manager(client, given).run(), name="manager")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        _log.info("manager_started", manager=given.manager_id)
        await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        _log.info("manager_stopped", manager=given.manager_id)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. 0 after SIGTERM or SIGINT, 1 with a log line if something failed."""
    given = options.parse(arguments)
    log.setup(given.log_level)
    # A batch of thousands of Services must not wait for collections of all that is cached.
    gc.set_threshold(50_000, 50, 100)
    try:
        asyncio.run(_main(given))
    except errors.LbctlError as error:
        _log.error("manager_failed", error=str(error))
        return 1
    except BaseExceptionGroup as group:
        _log.error("manager_failed", exc_info=group)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
