"""What every manager does with EIPs: inputs → `core.routes.select` → `speaker.set`.

Rules: a change recomputes the EIPs that it touches, and nothing on its way is proportional to the
number of EIPs; only what holds for a node as a whole recomputes all. Changes within a few
milliseconds go out together. Many EIPs are looked at in chunks, those with a route first; each
chunk is set at once, and what changes meanwhile comes before the rest, so that a node that goes
does not wait for a load. Nothing is set before everything needed is known, for what is not in the
first set is withdrawn. An EIP that is given back is first withdrawn, then the speaker confirms
it, and only then is our name put into its `withdrawnBy`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import structlog

from lbctl import errors
from lbctl.core.announce import Paths
from lbctl.core.confirmations import Confirmations
from lbctl.core.endpoints import KUBELETS_S, Doubt
from lbctl.core.forwarding import Locator
from lbctl.core.model import (
    Address,
    Eip,
    Network,
    Node,
    NodeState,
    NodeView,
    ObjectRef,
    Path,
    Peer,
    Phase,
    Service,
    Session,
    eip_object_name,
)
from lbctl.core.pmap import PMap
from lbctl.core.reasons import Reason
from lbctl.core.routes import EipSelection, PathIds, Rules, Verdicts, select
from lbctl.core.virtual import Levels
from lbctl.kube import client as api
from lbctl.kube.client import Client
from lbctl.kube.objects import Slice
from lbctl.kube.slices import SliceIndex
from lbctl.kube.values import timestamp
from manager.configuration import Accepted
from manager.inputs import Inputs
from manager.metrics import Metrics

COALESCE_S: Final = 0.01
_SETTLE_S: Final = 5.0
_RETRY_S: Final = 0.1
_AWAY_S: Final = 1.0  # before asking an API server again that is away
_AT_A_TIME: Final = 8
CHUNK: Final = 500  # EIPs looked at between two turns of the event loop
_PAIRS: Final = 20_000  # and pairs of an EIP and a node: fewer EIPs where nodes are many
SWEEP_S: Final = 5.0  # a virtual next hop stays so long at least after its last EIP
_NONE: Final[frozenset[Path]] = frozenset()
_log = structlog.get_logger()


class Speaker(Protocol):
    """The part of the speaker's port that is used here (manager/speaker/port.py)."""

    def set(self, peers: Iterable[Peer], paths: Paths) -> int:
        """The whole desired state; returns its number."""

    async def settled(self, number: int) -> None:
        """Until every established session has it."""

    def is_settled(self, number: int) -> bool:
        """Whether `settled` would return at once."""

    def sessions(self) -> tuple[Session, ...]:
        """One per peer."""


class Announcing:
    """The routes of one manager.

    peers: the BGP neighbours of a configuration, passwords included. can_start: whether the nodes
    are known well enough for a first set. on_selected: Services whose announcement changed.
    """

    def __init__(
        self,
        manager_id: str,
        address: Address | None,
        client: Client,
        inputs: Inputs,
        speaker: Speaker,
        metrics: Metrics,
        peers: Callable[[Accepted], tuple[Peer, ...]],
        can_start: Callable[[], bool],
        on_selected: Callable[[ObjectRef], None] = lambda _ref: None,
    ) -> None:
        self._me, self._address, self._client, self._inputs = manager_id, address, client, inputs
        self._speaker, self._metrics = speaker, metrics
        self._peers, self._can_start = peers, can_start
        self._on_selected, self._others = on_selected, False
        self._accepted: Accepted | None = None
        self._managers: tuple[str, ...] = (manager_id,)
        self._views: Mapping[str, NodeView] = {}
        self._confirmations = Confirmations()
        self._eips: dict[Address, Eip] = {}
        self._releasing: set[Address] = set()
        self._owned: dict[ObjectRef, set[Address]] = {}
        self._nodes: dict[str, Node] = {}
        self._locator: Locator | None = None  # of these, by the configuration
        self._doubt, self._index = Doubt(), SliceIndex(self._endpoints_due)
        self._verdicts: Verdicts | None = None  # on these
        self._ids, self._levels = PathIds(), Levels()
        self._paths: Paths = PMap()
        self._hops: Counter[str] = Counter()  # EIPs by node
        self._counts: tuple[Counter[int], Counter[int]] = Counter(), Counter()  # by family
        self._all, self._touched = True, set[Address]()
        self._moved: set[str] = set()  # nodes that are judged anew since the last round
        self._wake, self._leaving = asyncio.Event(), asyncio.Event()
        self.selections: dict[Address, EipSelection] = {}
        self.number: int | None = None  # of the last set; None before the first
        inputs.eips.listen(self._eip_changed)
        inputs.services.listen(self._service_changed)
        inputs.slices.listen(self._slice_changed)
        inputs.nodes.listen(self._node_changed)

    # What changes

    def configure(self, accepted: Accepted) -> None:
        """The configuration in force."""
        self._accepted = accepted
        self._touch_all()

    def set_managers(self, managers: tuple[str, ...], others: bool) -> None:
        """Ids of the living managers, this one's included, sorted. others: one announces."""
        several = self._accepted and self._accepted.config.announce.paths == "perManager"
        if others != self._others or (several and managers != self._managers):
            self._touch_all()
        self._managers, self._others = managers, others

    def set_views(self, views: Mapping[str, NodeView]) -> None:
        """How the nodes are judged now, all of them."""
        old, self._views = self._views, dict(views)
        for name in old.keys() | views.keys():
            before, after = old.get(name), views.get(name)
            if before is after:
                continue
            self._touch(self._confirmations.take(name, before, after))
            if before is None or after is None or _judgement(before) != _judgement(after):
                self._moved.add(name)
                self._touch_all()

    def poke(self) -> None:
        """Peers, passwords or readiness to start may have changed."""
        self._wake.set()

    def _touch(self, addresses: Iterable[Address]) -> None:
        self._touched.update(addresses)
        self._wake.set()

    def _touch_all(self) -> None:
        self._all, self._verdicts = True, None
        self._wake.set()

    def _eip_changed(self, _key: ObjectRef, old: Eip | None, new: Eip | None) -> None:
        if old is not None:
            self._eips.pop(old.address, None)
            self._releasing.discard(old.address)
            for ref in old.members:
                owned = self._owned[ref]
                owned.discard(old.address)
                if not owned:
                    del self._owned[ref]
            self._touch((old.address,))
        if new is not None:
            self._eips[new.address] = new
            for ref in new.members:
                self._owned.setdefault(ref, set()).add(new.address)
            if new.phase is Phase.RELEASING:
                self._releasing.add(new.address)
            self._touch((new.address,))

    def _service_changed(self, key: ObjectRef, _old: Service | None, _new: Service | None) -> None:
        self._touch(self._owned.get(key, ()))

    def _slice_changed(self, _key: ObjectRef, old: Slice | None, new: Slice | None) -> None:
        for ref in self._index.change(old, new):
            self._endpoints_due(ref)

    def _endpoints_due(self, service: ObjectRef) -> None:
        self._touch(self._owned.get(service, ()))

    def _node_changed(self, key: ObjectRef, old: Node | None, new: Node | None) -> None:
        if self._doubt.note(key.name, new.ready if new else None, time.monotonic()):
            asyncio.get_running_loop().call_later(KUBELETS_S, self._touch_all)
        if new is not None:
            self._nodes[new.name] = new
            self._moved.add(new.name)
        elif old is not None:
            self._nodes.pop(old.name, None)
            self._moved.add(old.name)
        self._locator = None
        self._touch_all()

    # What people ask

    def announced(self, ref: ObjectRef) -> Reason:
        """Why a Service is announced (`ANNOUNCED`), or why not: what it gives back counts last."""
        found = [self.selections[a].reason for a in self._addresses(ref) if a in self.selections]
        if not found:
            return Reason.NO_NEXT_HOP
        if Reason.ANNOUNCED in found:
            up = any(session.up for session in self._speaker.sessions())
            return Reason.ANNOUNCED if up else Reason.SESSION_DOWN
        return min(found, key=lambda reason: reason is Reason.RELEASING)

    def _addresses(self, ref: ObjectRef) -> list[Address]:
        return sorted(self._owned.get(ref, ()), key=lambda a: (a.version, int(a)))

    # What is done

    async def run(self) -> None:
        """Select and announce until cancelled."""
        await self._inputs.known.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._withdrawals(), name="withdrawals")
            group.create_task(self._sweeps(), name="sweeps")
            while True:
                await self._wake.wait()
                await asyncio.sleep(COALESCE_S)
                self._wake.clear()
                if self._accepted is None or not self._can_start():
                    continue
                await self._round(self._accepted)

    async def _round(self, accepted: Accepted) -> None:
        started = time.perf_counter()
        everything, self._all = self._all, False
        touched, self._touched = self._touched, set()
        if everything:
            touched = set(self._eips).union(self.selections)
        moved, self._moved = self._moved, set()
        ordered = sorted(touched, key=lambda a: (self._order(a, moved), a.version, int(a)))
        size = self._chunk()
        for start in range(0, len(ordered), size):
            first = self.number is None
            if start and not first:
                self._announce(accepted)
            # Probes and pings go on while ten thousand EIPs are looked at.
            await asyncio.sleep(0)
            chunk = ordered[start : start + size]
            if self._all and self._hopless(chunk[0]) and not first:
                break  # all are looked at again, those with routes first
            self._select(accepted, [*self._changed_meanwhile(), *chunk])
        self._announce(accepted)
        self._metrics.select_seconds.observe(time.perf_counter() - started)
        self._leaving.set()

    def _chunk(self) -> int:
        return max(1, min(CHUNK, _PAIRS // max(1, len(self._nodes))))

    def _order(self, address: Address, moved: set[str]) -> int:
        """First what goes through a node that moved, and may lose a path; what has none last."""
        found = self.selections.get(address)
        if found is None or not found.paths:
            return 2
        return int(moved.isdisjoint([path.node for path in found.ranked]))

    def _hopless(self, address: Address) -> bool:
        found = self.selections.get(address)
        return found is None or not found.paths

    def _changed_meanwhile(self) -> list[Address]:
        """What was touched since the round began, if it is little; else the next round's."""
        if not 0 < len(self._touched) <= self._chunk():
            return []
        touched, self._touched = self._touched, set()
        return sorted(touched, key=lambda a: (a.version, int(a)))

    def _judged(self, accepted: Accepted) -> Verdicts:
        if self._verdicts is None or self._verdicts.rules.config is not accepted.config:
            by = accepted.config.endpoints.nodes
            if self._locator is None or self._locator.by != by:
                self._locator = Locator(self._nodes.values(), by)
            rules = Rules(accepted.config, self._me, self._managers, self._left())
            known = (self._nodes, self._views, self._ids, self._locator)
            doubtful = self._doubt.nodes(time.monotonic())
            self._verdicts = Verdicts(rules, *known, doubtful)
        return self._verdicts

    def _left(self) -> str:
        """Our own host's node, if other managers announce it."""
        mine = (name for name, node in self._nodes.items() if self._address in node.addresses)
        return next(mine, "") if self._others else ""

    def _select(self, accepted: Accepted, touched: Sequence[Address]) -> None:
        eips = [eip for address in touched if (eip := self._eips.get(address)) is not None]
        behind = self._inputs.services.cache.get, self._index.of
        known = self._confirmations, self.selections
        found = select(self._judged(accepted), eips, *behind, *known)
        changed = []
        steps: Counter[tuple[frozenset[Path], frozenset[Path]]] = Counter()
        for address in touched:
            old, new = self.selections.pop(address, None), found.get(address)
            if new is not None:
                self.selections[address] = new
            before, after = old.paths if old else _NONE, new.paths if new else _NONE
            moved = before is not after and before != after
            hops = [selection.hop if selection else None for selection in (old, new)]
            if moved or hops[0] is not hops[1]:
                changed.append((address, after, hops[1]))
                steps[before, after] += moved
            if new is not None and (old is None or old.reason is not new.reason):
                for ref in self._eips[address].members:
                    self._on_selected(ref)
        for (before, after), count in steps.items():
            self._hops.subtract({path.node: count for path in before - after})
            self._hops.update({path.node: count for path in after - before})
        self._route(self._levels.routes(changed))

    def _route(self, routes: Mapping[Network, frozenset[Path]]) -> None:
        """Announce these prefixes like this from the next set on; without paths: not at all."""
        prefixes, paths = self._counts
        fresh: dict[Network, frozenset[Path]] = {}
        gone: set[Network] = set()
        for prefix, after in routes.items():
            before = self._paths.get(prefix, _NONE)
            if before != after:
                fresh.update({prefix: after} if after else {})
                gone.update(() if after else (prefix,))
                prefixes[prefix.version] += bool(after) - bool(before)
                paths[prefix.version] += len(after) - len(before)
        self._paths = self._paths.updated(fresh, gone)
        if self._levels.moved:
            self._levels.moved = False
            self._touch_all()

    async def _sweeps(self) -> None:
        """Withdraw the virtual next hops that no EIP leads to any more, in no switch either."""
        while True:
            await asyncio.sleep(SWEEP_S)
            if self.number is not None and self._speaker.is_settled(self.number):
                gone = self._levels.sweep()
                self._route(dict.fromkeys(gone, _NONE))
                self._wake.set()

    def _announce(self, accepted: Accepted) -> None:
        try:
            self.number = self._speaker.set(self._peers(accepted), self._paths)
        except errors.SpeakerError as error:
            # Values were checked when the configuration was accepted: this is a fault of ours.
            _log.error("announce_refused", error=str(error))

    # Giving back

    async def _withdrawals(self) -> None:
        """Put our name into `withdrawnBy` of what we have withdrawn for certain."""
        while True:
            await self._leaving.wait()
            self._leaving.clear()
            leaving = (self._eips[address] for address in sorted(self._releasing, key=str))
            due = [eip for eip in leaving if self._withdrawn(eip)]
            if not due or self.number is None:
                continue
            try:
                async with asyncio.timeout(_SETTLE_S):
                    await self._speaker.settled(self.number)
                left = await self._sign(due)
            except TimeoutError:
                _log.warning("withdrawal_waits_for_speaker", eips=len(due))
                left = True
            if left:
                await asyncio.sleep(_RETRY_S)
                self._leaving.set()

    def _withdrawn(self, eip: Eip) -> bool:
        """Whether it is given back, is in no set any more, and does not say so yet."""
        if self._me in eip.withdrawn_by:
            return False
        selection = self.selections.get(eip.address)
        return selection is not None and not selection.paths

    async def _sign(self, due: list[Eip]) -> bool:
        """Patch; whether something is left to do."""
        slots = asyncio.Semaphore(_AT_A_TIME)

        async def one(eip: Eip) -> bool:
            async with slots:
                # Guarded: the address may have been bound again since, with our route back.
                body = {
                    "metadata": {"resourceVersion": eip.version},
                    "spec": {"withdrawnBy": {self._me: timestamp(time.time())}},
                }
                path = api.EIPS.path(name=eip_object_name(eip.address))
                try:
                    await self._client.patch(path, body)
                except errors.NotFound:
                    return True
                except errors.Conflict:
                    return False  # mostly another manager that signed in the same moment
                except errors.KubeError as error:
                    _log.info("withdrawal_not_signed", address=str(eip.address), error=str(error))
                    await asyncio.sleep(_AWAY_S)
                    return False
                _log.info("withdrawn", address=str(eip.address), service=str(eip.owner))
                return True

        return not all(await asyncio.gather(*(one(eip) for eip in due)))

    def sent(self, session: Session) -> int | None:
        """How many paths a session has had, None while that is not certain."""
        if self.number is None or not session.up or not self._speaker.is_settled(self.number):
            return None
        prefixes, paths = self._counts
        return sum((paths if several else prefixes)[version] for version, several in session.agreed)

    def families(self) -> tuple[int, ...]:
        """The families that something is announced of, sorted."""
        return tuple(sorted(+self._counts[0]))

    def measure(self) -> None:
        """Fill in the metrics."""
        self._metrics.paths.set(self._hops.total())
        self._metrics.prefixes.set(sum(bool(s.paths) for s in self.selections.values()))
        self._metrics.next_hops.clear()
        for name in sorted(self._nodes.keys() | (+self._hops).keys()):
            self._metrics.next_hops.labels(name).set(self._hops[name])


def _judgement(view: NodeView) -> tuple[object, ...]:
    """What holds for a node whatever the EIP."""
    since_s = view.since_s if view.state is NodeState.SUSPECT else 0.0
    return view.state, view.held, view.stable, view.lags, since_s
