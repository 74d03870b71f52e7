"""Probes every node's agent over one UDP socket and keeps the judgement on each (core/health).

Rules: a tick probes one group of nodes, and those few that did not answer: everything that has
arrived is read first, then misses are counted, then the next probes go out. No task per node. Views
change only through `judge`; whoever is interested hears of it once per change, with the names of
the nodes. A node's list of confirmed EIPs is replaced only when a newer one is complete.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from lbctl.core import health as judging
from lbctl.core import lag, names, probe
from lbctl.core.changelog import PageReader
from lbctl.core.health import Health, Limits, PeerView
from lbctl.core.keys import KeyRing, Keys
from lbctl.core.model import Address, Node, NodeState, NodeView
from lbctl.errors import LbctlError, MessageError
from lbctl.udp import UdpSocket
from manager.kernelcheck import KernelCheck
from manager.peers import Outlook

_GROUP: Final = 100  # nodes probed in one tick
_OPEN_NONCES: Final = 4  # an answer to one of the last probes is a sign of life
_PAGE_RETRY_S: Final = 0.25
_GATHER_S: Final = 0.005  # answers that come one by one are judged together
_READS: Final = 32  # lists that are fetched at the same time
_LAG_EVERY_S: Final = 0.25
_log = structlog.get_logger()


@dataclass(slots=True)
class Counters:
    """What happened since the start, for metrics."""

    sent: int = 0
    answered: int = 0
    missed: int = 0
    refused: int = 0
    pages: int = 0
    stalls: int = 0
    kernel_checks: int = 0


@dataclass(slots=True)
class _Target:
    """One node as it is probed."""

    node: Node
    address: Address
    ring: KeyRing
    health: Health
    nonces: list[int] = field(default_factory=list)  # open ones, oldest first
    waiting: bool = False  # the last probe is not answered
    asked_s: float = 0.0  # when it was sent
    cookie: int = 0
    digest: int = 0
    config_generation: int = 0
    heard: frozenset[int] = frozenset()
    answered_s: float | None = None
    reader: PageReader = field(default_factory=PageReader)
    page_nonce: int = 0


class Prober:
    """The prober of one manager.

    manager_id, boot: this one's name and start (time_ns: it rises). peers: returns the managers
    heard within the last second (Peers.alive). on_change: takes the names of nodes whose view
    changed. port: of the agents. Over TCP nobody listens there, so that the kernel's answer to the
    kernel check is a RST, which fills no queue of a frozen agent.
    """

    def __init__(
        self,
        keys: Keys,
        manager_id: str,
        boot: int,
        peers: Callable[[], tuple[PeerView, ...]],
        on_change: Callable[[frozenset[str]], None],
        port: int = names.PROBE_PORT,
    ) -> None:
        self.counters = Counters()
        self._keys = keys
        self._id = manager_id
        self._boot = boot
        self._peers = peers
        self._on_change = on_change
        self._port = port
        self._base = Limits()
        self._limits = Limits()
        self._targets: dict[str, _Target] = {}
        self._order: list[str] = []
        self._next = 0
        self._nonces: dict[int, str] = {}
        self._views: dict[str, NodeView] = {}
        self._sequence = 0
        self._pardons = 0
        self._judging = False
        self._touched: set[str] = set()  # whose evidence or list changed since the last refresh
        self._reading: dict[str, float] = {}  # whose list is being fetched, since when
        self._later: asyncio.TimerHandle | None = None
        self._lag_due_s = 0.0
        self._differs_s: dict[str, float] = {}
        self._lags: frozenset[str] = frozenset()
        self._back: set[str] = set()  # came back since laggards were last looked for
        self._kernel = KernelCheck(port)
        self._socket: UdpSocket | None = None

    def views(self) -> Mapping[str, NodeView]:
        """Return what is known of each node, by name. The mapping is not changed afterwards."""
        return dict(self._views)

    def status(self) -> tuple[tuple[Health, NodeView, float | None], ...]:
        """Return per node, by name: evidence, view, age of the last answer in seconds."""
        now_s = time.monotonic()
        return tuple(
            (t.health, self._views[name], None if t.answered_s is None else now_s - t.answered_s)
            for name, t in sorted(self._targets.items())
        )

    def outlook(self, announcing: bool = False) -> Outlook:
        """Return what heartbeats tell the other managers."""
        healths = [target.health for target in self._targets.values()]
        return Outlook(self._judging, announcing, judging.seen(healths), judging.gone(healths))

    @property
    def judges(self) -> bool:
        """Whether every node that was known at the start has answered or been missed."""
        return self._judging

    @property
    def unheard(self) -> bool:
        """Whether no node has ever answered, though agents are ready: something is between."""
        targets = self._targets.values()
        expected = any(t.health.agent and t.health.ready for t in targets)
        return expected and all(t.answered_s is None for t in targets)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to probe."""
        return not self._targets

    def heard_by_agents(self) -> frozenset[int] | None:
        """Hashes of the managers that agents hear, by their last answers; None if none can tell.

        An agent that does not name us cannot: it answers us, so it should (an older version's).
        """
        us = probe.node_hash(self._id)
        up = [t.heard for t in self._targets.values() if t.health.state is NodeState.UP]
        telling = [heard for heard in up if us in heard]
        return frozenset[int]().union(*telling) if telling else None

    def set_keys(self, keys: Keys) -> None:
        """Use these keys from now on."""
        self._keys = keys
        for name, target in self._targets.items():
            target.ring = keys.node(name)

    def set_limits(self, limits: Limits) -> None:
        """Take the configuration's `probe` section; the interval still grows with the nodes."""
        self._base = limits
        self._grow()

    def set_nodes(
        self,
        nodes: Mapping[str, Node],
        agents: frozenset[str] | None = None,
        working: frozenset[str] = frozenset(),
    ) -> None:
        """Take all nodes of the cluster. agents: names of those to probe, None for all. working:
        of those whose agent Kubernetes calls ready.

        A node that is not probed has no view; nor has one without an address.
        """
        probed = {
            name: node
            for name, node in nodes.items()
            if node.addresses and (agents is None or name in agents)
        }
        changed = set(self._targets) - set(probed)
        for name in changed:
            self._remove(name)
        for name in sorted(probed):
            node, target = probed[name], self._targets.get(name)
            if target is None or target.node.uid != node.uid:
                self._remove(name)
                self._add(node, name in working)
                changed.add(name)
                continue
            target.node, target.address = node, node.addresses[0]
            known = judging.told(target.health, node.ready, name in working, time.monotonic())
            if known is not target.health:
                target.health = known
                self._touched.add(name)
        self._order = sorted(self._targets)
        self._grow()
        if changed:
            self._on_change(frozenset(changed))

    def _add(self, node: Node, agent: bool) -> None:
        now_s = time.monotonic()
        health = Health(node.name, ready=node.ready, agent=agent, since_s=now_s)
        target = _Target(node, node.addresses[0], self._keys.node(node.name), health)
        self._targets[node.name] = target
        self._views[node.name] = _view(target, False, now_s)

    def _remove(self, name: str) -> None:
        self._views.pop(name, None)
        self._reading.pop(name, None)
        target = self._targets.pop(name, None)
        if target is not None:
            for nonce in (*target.nonces, target.page_nonce):
                self._nonces.pop(nonce, None)

    async def run(self) -> None:
        """Probe until cancelled; raises LbctlError if no socket can be had."""
        try:
            udp = UdpSocket()
        except OSError as error:
            raise LbctlError(f"no UDP socket for probes: {error}") from error
        loop = asyncio.get_running_loop()
        self._socket = udp
        loop.add_reader(udp.socket, self._read)
        due_s = time.monotonic()
        try:
            while True:
                now_s = time.monotonic()
                self._tick(udp, now_s, max(0.0, now_s - due_s))
                # Never sooner after a late tick: what was just sent needs its time to be answered.
                due_s = now_s + self._period()
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        finally:
            loop.remove_reader(udp.socket)
            if self._later is not None:
                self._later.cancel()
            self._socket = None
            udp.close()
            self._kernel.close()

    def judge(self) -> None:
        """Judge now: a peer has said something new."""
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._judge(time.monotonic())

    def _grow(self) -> None:
        interval_s = judging.interval(self._base.interval_s, len(self._targets))
        self._limits = replace(self._base, interval_s=interval_s)

    def _groups(self) -> int:
        return max(1, -(-len(self._order) // _GROUP))

    def _period(self) -> float:
        return self._limits.interval_s / self._groups()

    def _tick(self, udp: UdpSocket, now_s: float, lag_s: float) -> None:
        self._drain(udp)
        pardon = judging.pardon(lag_s, self._limits.interval_s, self._pardons)
        self._pardons = self._pardons + 1 if pardon else 0
        if pardon:
            self._stalled(lag_s, now_s)
        for name in self._kernel.poll(now_s):
            target = self._targets.get(name)
            if target is not None and target.health.misses:
                target.health = judging.kernel_answered(target.health, now_s)
        groups = self._groups()
        self._next = (self._next + 1) % groups
        turn = dict.fromkeys(self._order[self._next :: groups])
        if groups > 1 and lag_s <= self._base.interval_s:
            turn.update(dict.fromkeys(self._early(now_s)))
        group = [self._targets[name] for name in turn]
        if not pardon:
            for target in group:
                self._count_miss(target, now_s)
        self._judge(now_s)
        self._send(udp, group, now_s)

    def _early(self, now_s: float) -> list[str]:
        silent_s = {
            name: target.asked_s
            for name, target in self._targets.items()
            if target.waiting and target.health.state is NodeState.UP
        }
        return judging.early(silent_s, now_s, self._base.interval_s)

    def _stalled(self, lag_s: float, now_s: float) -> None:
        self.counters.stalls += 1
        _log.info("stalled", lag_s=round(lag_s, 3))
        for target in self._targets.values():
            if target.health.misses:
                target.health = judging.stalled(target.health, lag_s, now_s)

    def _count_miss(self, target: _Target, now_s: float) -> None:
        if not target.waiting:
            return
        self.counters.missed += 1
        target.health = judging.probe_missed(target.health, now_s)
        self._touched.add(target.node.name)
        if target.health.state in (NodeState.SUSPECT, NodeState.DOWN):
            # A kernel that is back without its agent decides nothing (core/health, REBOOT_S).
            alive_s = target.health.alive_s
            if alive_s is not None and now_s - alive_s > judging.REBOOT_S:
                return
        self.counters.kernel_checks += 1
        if self._kernel.ask(target.node.name, target.address, now_s):
            target.health = judging.kernel_answered(target.health, now_s)

    def _send(self, udp: UdpSocket, group: list[_Target], now_s: float) -> None:
        healths = [target.health for target in self._targets.values()]
        down = judging.down_set(healths)
        managers = 1 + len(self._peers())
        for target in group:
            self._sequence += 1
            nonce = secrets.randbits(64)
            request = probe.Request(
                self._id,
                self._boot,
                self._sequence,
                nonce,
                target.cookie,
                self._judging,
                managers,
                down,
            )
            data = probe.encode_request(request, target.ring.signing)
            self._open_nonce(target, nonce)
            target.waiting, target.asked_s = True, now_s
            udp.send(data, udp.target(target.address, self._port))
            self.counters.sent += 1

    def _open_nonce(self, target: _Target, nonce: int) -> None:
        self._nonces[nonce] = target.node.name
        target.nonces.append(nonce)
        if len(target.nonces) > _OPEN_NONCES:
            self._nonces.pop(target.nonces.pop(0), None)

    def _read(self) -> None:
        """asyncio's callback: something has arrived."""
        if self._socket is not None:
            self._drain(self._socket)
            if self._touched and self._later is None:
                self._later = asyncio.get_running_loop().call_later(_GATHER_S, self.judge)

    def _drain(self, udp: UdpSocket) -> None:
        now_s = time.monotonic()
        for data, _ in udp.receive():
            try:
                kind, nonce = probe.peek(data)
                target = self._targets.get(self._nonces.get(nonce, ""))
                if target is None:
                    self.counters.refused += 1
                elif kind == probe.Kind.ANSWER:
                    self._answered(udp, target, data, now_s)
                else:
                    self._paged(udp, target, data, now_s)
            except MessageError:
                self.counters.refused += 1

    def _answered(self, udp: UdpSocket, target: _Target, data: bytes, now_s: float) -> None:
        answer = probe.decode_answer(data, target.ring)
        if answer.node != target.node.name or answer.nonce not in target.nonces:
            raise MessageError("an answer belongs to another node")
        self.counters.answered += 1
        place = target.nonces.index(answer.nonce)
        for nonce in target.nonces[: place + 1]:
            self._nonces.pop(nonce, None)
        del target.nonces[: place + 1]
        target.waiting = bool(target.nonces)
        target.answered_s, target.cookie = now_s, answer.cookie
        target.config_generation, target.heard = answer.config_generation, answer.heard
        old = target.health
        if old.misses or old.answers < judging.RETURN_ANSWERS or old.reason is not None:
            self._touched.add(answer.node)
        target.health = judging.probe_answered(old, now_s)
        if target.digest != answer.digest:
            target.digest = answer.digest
            self._touched.add(answer.node)
        if old.state in judging.GONE and answer.boot != target.reader.boot:
            # It may have rebooted: what the agent had confirmed before is not there any more.
            target.reader = PageReader()
            self._touched.add(answer.node)
        if not target.reader.current(answer.boot, answer.generation):
            self._ask_page(udp, target, now_s)

    def _ask_page(self, udp: UdpSocket, target: _Target, now_s: float) -> None:
        name = target.node.name
        asked_s = self._reading.get(name)
        if asked_s is None and len(self._reading) >= _READS:
            self._reading = {n: s for n, s in self._reading.items() if now_s - s < _PAGE_RETRY_S}
            if len(self._reading) >= _READS:
                return  # it is asked after its next answer
        if asked_s is not None and now_s - asked_s < _PAGE_RETRY_S and target.page_nonce:
            return  # a page is on its way
        self._reading[name] = now_s
        self._nonces.pop(target.page_nonce, None)
        target.page_nonce = secrets.randbits(64)
        self._nonces[target.page_nonce] = name
        request = target.reader.request(target.page_nonce)
        data = probe.encode_page_request(request, target.ring.signing)
        udp.send(data, udp.target(target.address, self._port))

    def _paged(self, udp: UdpSocket, target: _Target, data: bytes, now_s: float) -> None:
        page = probe.decode_page(data, target.ring)
        if page.nonce != target.page_nonce:
            raise MessageError("a page belongs to another request")
        self.counters.pages += 1
        self._nonces.pop(page.nonce, None)
        target.page_nonce = 0
        if target.reader.take(page):
            self._touched.add(target.node.name)
            self._reading.pop(target.node.name, None)
        else:
            self._ask_page(udp, target, now_s)

    def _judge(self, now_s: float) -> None:
        """Bring judgements and views up to date; tell of those that changed."""
        healths = {name: target.health for name, target in self._targets.items()}
        changed = judging.judge(healths, self._peers(), now_s, self._limits)
        for name, new in changed.items():
            self._targets[name].health = new
            if new.state is NodeState.UP and healths[name].state in judging.GONE:
                self._back.add(name)
            if new.state is not healths[name].state or new.held != healths[name].held:
                _log.info("node_judged", node=name, state=new.state, held=new.held)
        if not self._judging:
            self._judging = bool(self._targets) and all(
                t.health.answers or t.health.misses >= self._limits.misses
                for t in self._targets.values()
            )
        self._find_laggards(now_s)
        self._refresh(self._touched.union(changed), now_s)

    def _find_laggards(self, now_s: float) -> None:
        if now_s < self._lag_due_s and not self._back:
            return
        self._lag_due_s = now_s + _LAG_EVERY_S
        digests = {n: t.digest for n, t in self._targets.items() if t.health.state is NodeState.UP}
        self._differs_s = lag.differing(digests, self._differs_s, now_s, self._back)
        self._back = set()
        lags = lag.lagging(self._differs_s, now_s)
        self._touched |= lags ^ self._lags
        self._lags = lags

    def _refresh(self, touched: set[str], now_s: float) -> None:
        self._touched = set()
        changed = []
        for name in sorted(touched & self._targets.keys()):
            view = _view(self._targets[name], name in self._lags, now_s)
            if view != self._views[name]:
                self._views[name] = view
                changed.append(name)
        if changed:
            self._on_change(frozenset(changed))


def _view(target: _Target, lags: bool, now_s: float) -> NodeView:
    health = target.health
    return NodeView(
        health.name,
        health.state,
        health.held,
        health.stable(now_s),
        lags,
        target.digest,
        target.reader.confirmed,
        target.reader.empty,
        target.reader.local_ready,
        health.since_s,
    )
