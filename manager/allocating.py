"""The leader's loop: what changed → allocator and releases → writes.

Rules: a reign starts by reading all EIPs and Services consistently from the API server, so that
what exists is restored before anything new is given. After that the loop eats changes only; a
full resync on a timer heals whatever was missed. An answer to our own write counts before the watch
shows it, and an older watch event never undoes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final

import structlog

from lbctl import errors
from lbctl.core.actions import Action, CreateEip, DeleteEip, RebindEip, Refused, ReleaseEip
from lbctl.core.allocator import Allocator
from lbctl.core.config import Config
from lbctl.core.forecast import cluster_addresses
from lbctl.core.holdings import Decision
from lbctl.core.model import Address, Eip, Node, ObjectRef, Service
from lbctl.core.release import Facts
from lbctl.core.supply import Forbidden
from lbctl.kube import objects
from lbctl.kube.client import Client
from lbctl.kube.objects import Kind, Namespace
from manager.configuration import Accepted
from manager.dispatch import Dispatcher
from manager.executor import Executor, Sink
from manager.gateways import gateways
from manager.inputs import Inputs
from manager.metrics import Metrics
from manager.rehearsal import Rehearsal
from manager.releasing import Releasing

RESYNC_S: Final = 60.0
_COUNTED: Final = (CreateEip, RebindEip, ReleaseEip, DeleteEip, Refused)
_log = structlog.get_logger()


class Allocating:
    """What a leader does to Services and EIPs. Listens always; works while `lead()` runs.

    facts: of releases (managers that live, nodes that confirm). on_written: an action was carried
    out (Refused: is to be told). on_decided: a Service was looked at.
    """

    def __init__(
        self,
        client: Client,
        inputs: Inputs,
        is_leader: Callable[[], bool],
        metrics: Metrics,
        facts: Callable[[], Facts],
        on_written: Callable[[Action], None] = lambda _action: None,
        on_decided: Callable[[ObjectRef], None] = lambda _ref: None,
    ) -> None:
        self._client = client
        self._inputs = inputs
        self._metrics = metrics
        self._facts = facts
        self._on_decided = on_decided
        self._accepted: Accepted | None = None
        self._reign: _Reign | None = None
        self._rehearsal = Rehearsal(inputs, on_written, on_decided)
        sink = Sink(
            self._service_written, self._service_gone, self._eip_written, self._eip_gone, on_written
        )
        watched = inputs.services.cache.get
        self._executor = Executor(client, is_leader, sink, metrics, watched)
        inputs.services.listen(self._service_changed)
        inputs.eips.listen(self._eip_changed)
        inputs.nodes.listen(self._node_changed)
        inputs.namespaces.listen(self._namespace_changed)

    def configure(self, accepted: Accepted) -> None:
        """The configuration that is in force now."""
        self._accepted = accepted
        if self._reign is not None:
            self._reign.configure(accepted, self._forbidden())

    def touch(self) -> None:
        """Something that releases depend on changed: managers or the nodes' confirmations."""
        if self._reign is not None:
            self._reign.releasing.touch_all()
            self._reign.wake.set()

    def decision(self, ref: ObjectRef) -> Decision | None:
        """What was last decided about a Service; None while not leading."""
        if self._reign is None:
            return None
        if self._observed is not None:
            return self._rehearsal.decision(ref)
        return self._reign.allocator.decision(ref)

    def free(self) -> dict[str, dict[int, int]]:
        """Addresses that each pool can still give, by family; nothing while not leading, or
        observing."""
        if self._reign is None or self._observed is not None:
            return {}
        return self._reign.allocator.free()

    @property
    def _observed(self) -> Config | None:
        """The configuration, if it says that nothing is to be written."""
        config = self._accepted.config if self._accepted is not None else None
        return config if config is not None and config.takeover == "observe" else None

    def release(self, address: Address) -> str | None:
        """What the release of an address waits for; None if it is not on its way or not leading."""
        step = self._reign.releasing.steps.get(address) if self._reign is not None else None
        return step.sentence if step is not None else None

    async def lead(self) -> None:
        """Allocate until cancelled. Returns by itself when leadership turns out to be lost."""
        try:
            reign = await self._begin()
            async with asyncio.TaskGroup() as group:
                dispatcher = Dispatcher(group, self._executor, reign.undone)
                while True:
                    if (observed := self._observed) is not None:
                        await self._rehearsal.look(observed, self._forbidden())
                    else:
                        reign.work(dispatcher)
                    self._metrics.queue.set(dispatcher.busy)
                    await self._pause(reign)
        except* errors.NotLeader as lost:
            _log.warning("leadership_lost_before_a_write", error=str(lost.exceptions[0]))
        finally:
            self._reign = None
            self._metrics.queue.set(0)

    async def _pause(self, reign: _Reign) -> None:
        until_resync = max(0.0, reign.resync_at_s - time.monotonic())
        due = reign.releasing.next_s()
        try:
            async with asyncio.timeout(until_resync if due is None else min(due, until_resync)):
                await reign.wake.wait()
        except TimeoutError:
            if time.monotonic() >= reign.resync_at_s:
                reign.resync(self._inputs)
        reign.wake.clear()

    async def _begin(self) -> _Reign:
        await self._inputs.synced()
        config = self._accepted.config if self._accepted else None
        allocator = Allocator(config, self._forbidden())
        reign = _Reign(allocator, self._facts, self._metrics, self._on_decided)
        self._reign = reign  # hears of changes from now on; nothing is planned before it is full
        for namespace in self._inputs.namespaces.cache.items.values():
            allocator.set_namespace(namespace.ref.name, dict(namespace.labels))
        eips = await _read_all(self._client, objects.EIP)
        services = await _read_all(self._client, objects.SERVICE)
        for eip in eips:
            reign.set_eip(eip)
        for service in services:
            reign.set_service(service)
        _log.info("restored", eips=len(eips), services=len(services))
        return reign

    def _forbidden(self) -> tuple[Forbidden, ...]:
        """Addresses of the cluster and its switches; the allocator knows ClusterIPs itself."""
        found: set[Forbidden] = set(gateways())
        if self._accepted is not None:
            nodes = self._inputs.nodes.cache.items.values()
            found |= cluster_addresses(nodes, self._accepted.config)
        return tuple(found)

    # What the watches and the writes say

    def _service_changed(self, key: ObjectRef, _old: Service | None, new: Service | None) -> None:
        if new is None:
            self._service_gone(key)
        else:
            self._service_written(new)

    def _eip_changed(self, _key: ObjectRef, old: Eip | None, new: Eip | None) -> None:
        if self._reign is not None and new is not None:
            self._reign.set_eip(new)
        elif self._reign is not None and old is not None:
            self._reign.drop_eip(old.address)

    def _node_changed(self, _key: ObjectRef, _old: Node | None, _new: Node | None) -> None:
        if self._reign is not None and self._accepted is not None:
            self._reign.configure(self._accepted, self._forbidden())

    def _namespace_changed(
        self, key: ObjectRef, _old: Namespace | None, new: Namespace | None
    ) -> None:
        if self._reign is not None:
            labels = dict(new.labels) if new is not None else None
            self._reign.allocator.set_namespace(key.name, labels)
            self._reign.wake.set()

    def _service_written(self, service: Service) -> None:
        if self._reign is not None:
            self._reign.set_service(service)

    def _service_gone(self, ref: ObjectRef) -> None:
        if self._reign is not None:
            self._reign.remove_service(ref)

    def _eip_written(self, eip: Eip) -> None:
        if self._reign is not None:
            self._reign.set_eip(eip)

    def _eip_gone(self, address: Address) -> None:
        if self._reign is not None:
            self._reign.remove_eip(address)


class _Reign:
    """Allocator and releases of one leadership, and what they were last told."""

    def __init__(
        self,
        allocator: Allocator,
        facts: Callable[[], Facts],
        metrics: Metrics,
        on_decided: Callable[[ObjectRef], None],
    ) -> None:
        self.allocator = allocator
        self.releasing = Releasing(facts, self._services_get, allocator.owned)
        self.wake = asyncio.Event()
        self._metrics = metrics
        self._on_decided = on_decided
        self._services: dict[ObjectRef, Service] = {}
        self._versions: dict[Address, str] = {}
        self._buried: dict[Address, str] = {}
        self.resync_at_s = time.monotonic() + RESYNC_S

    def _services_get(self, ref: ObjectRef) -> Service | None:
        return self._services.get(ref)

    def configure(self, accepted: Accepted, forbidden: Sequence[Forbidden]) -> None:
        self.allocator.configure(accepted.config, forbidden)
        self.releasing.touch_all()
        self.wake.set()

    def set_service(self, service: Service) -> None:
        known = self._services.get(service.ref)
        if known is not None and _older(service.version, known.version):
            return
        self._services[service.ref] = service
        self.allocator.set_service(service)
        self.releasing.touch_owner(service.ref)
        self._on_decided(service.ref)
        self.wake.set()

    def remove_service(self, ref: ObjectRef) -> None:
        self._services.pop(ref, None)
        self.allocator.remove_service(ref)
        self.releasing.touch_owner(ref)
        self.wake.set()

    def set_eip(self, eip: Eip) -> None:
        buried = self._buried.get(eip.address, "")
        if eip.version == buried or _older(eip.version, buried):
            return
        if _older(eip.version, self._versions.get(eip.address, "")):
            return
        self._versions[eip.address] = eip.version
        self.allocator.set_eip(eip)
        self.releasing.set_eip(eip)
        for ref in eip.members:
            self._on_decided(ref)
        self.wake.set()

    def remove_eip(self, address: Address) -> None:
        """Gone, says the API server; the watch may still show what was before."""
        self._buried[address] = self._versions.pop(address, "")
        self.allocator.remove_eip(address)
        self.releasing.remove_eip(address)
        self.wake.set()

    def drop_eip(self, address: Address) -> None:
        """Gone, says the watch."""
        self.remove_eip(address)
        self._buried.pop(address, None)

    def resync(self, inputs: Inputs) -> None:
        """Take the watched state as the truth, whatever was believed."""
        self.resync_at_s = time.monotonic() + RESYNC_S
        self._buried.clear()
        eips = {eip.address: eip for eip in inputs.eips.cache.items.values()}
        services = dict(inputs.services.cache.items)
        for address in sorted(self._versions.keys() - eips.keys(), key=str):
            self.drop_eip(address)
        for ref in sorted(self._services.keys() - services.keys()):
            self.remove_service(ref)
        for eip in eips.values():
            self._versions[eip.address] = eip.version
            self.allocator.set_eip(eip)
            self.releasing.set_eip(eip)
        for ref, service in services.items():
            self._services[ref] = service
            self.allocator.set_service(service)

    def work(self, dispatcher: Dispatcher) -> None:
        """Plan, and hand out what is to be done."""
        actions = self.allocator.plan() + self.releasing.plan()
        for _, group in groupby(actions, key=lambda action: action.service):
            found = tuple(group)
            for action in found:
                if isinstance(action, _COUNTED):
                    self._metrics.decisions.labels(str(action.reason)).inc()
            self._on_decided(found[0].service)
            dispatcher.submit(found)

    def undone(self, actions: Sequence[Action]) -> None:
        """What was not carried out is planned again."""
        for action in actions:
            self.allocator.failed(action)
        self.releasing.touch_owner(actions[0].service)
        self.wake.set()


async def _read_all(client: Client, kind: Kind[objects.T]) -> list[objects.T]:
    """Everything of a kind by a consistent read; retried until it succeeds."""
    while True:
        try:
            page = await client.list(kind.resource.path())
            break
        except errors.KubeError as error:
            _log.warning("restore_waits", kind=kind.name, error=str(error))
            await asyncio.sleep(1.0)
    found = []
    for raw in page.items or ():
        try:
            found.append(kind.decode(raw))
        except errors.KubeError as error:
            _log.warning("object_skipped", kind=kind.name, error=str(error))
    return found


def _older(version: str, than: str) -> bool:
    """Whether a resourceVersion is older; they are comparable numbers (KEP-5504)."""
    return version.isdigit() and than.isdigit() and int(version) < int(than)
