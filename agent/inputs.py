"""What the agent knows of the cluster, from the API server by list and watch.

Rules: nothing is handed on before every cache has its first list; from then on an absent API server
changes nothing. Inputs are immutable: a change makes new ones and shares what did not change
(`lbctl.core.pmap`), so that whoever takes them finds the difference at its own cost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from lbctl.core import config
from lbctl.core.endpoints import KUBELETS_S, Doubt
from lbctl.core.model import (
    Address,
    Eip,
    ForwardingOptions,
    Node,
    ObjectRef,
    Service,
    ServiceEndpoints,
)
from lbctl.core.names import ACCEPTED_CONFIG_MAP, CONFIG_KEY, NAMESPACE
from lbctl.core.pmap import K, PMap, V, persistent
from lbctl.errors import ConfigError
from lbctl.kube import objects
from lbctl.kube.cache import Cache
from lbctl.kube.client import Client
from lbctl.kube.objects import DataObject, Slice
from lbctl.kube.slices import SliceIndex

STAGE: Final = 500  # EIPs of which tables are made at a time, where there is nothing yet
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that the forwarding of a node is made of.

    doubtful: the nodes whose Pods' readiness is not known (`Doubt`). ranges: the accepted pools,
    first and last address. config_generation: of the accepted configuration, 0 before there is one.
    """

    eips: Mapping[Address, Eip] = field(default_factory=PMap)
    services: Mapping[ObjectRef, Service] = field(default_factory=PMap)
    endpoints: Mapping[ObjectRef, ServiceEndpoints] = field(default_factory=PMap)
    nodes: tuple[Node, ...] = ()
    doubtful: frozenset[str] = frozenset()
    ranges: tuple[tuple[Address, Address], ...] = ()
    forwarding: ForwardingOptions = field(default_factory=ForwardingOptions)
    config_generation: int = 0


def growing(inputs: Inputs, stage: int = STAGE) -> Iterator[Inputs]:
    """The inputs with `stage` EIPs more each time; the last are the inputs themselves."""
    order = sorted(inputs.eips, key=lambda a: (a.version, int(a)))
    eips: PMap[Address, Eip] = PMap()
    for start in range(0, len(order) - stage, stage):
        eips = eips.updated({a: inputs.eips[a] for a in order[start : start + stage]})
        yield replace(inputs, eips=eips)
    yield inputs


class Watcher:
    """Follows the API server; `on_change(inputs)` is called in the event loop, coalesced.

    But of one Service's endpoints each change is told.
    """

    def __init__(self, client: Client, on_change: Callable[[Inputs], None]) -> None:
        self._report = on_change
        self._dirty = asyncio.Event()
        self._index = SliceIndex(self._endpoints_due)
        self._doubt = Doubt()
        self._last = Inputs()
        self._touched_services: set[ObjectRef] = set()
        self._touched_slices: set[ObjectRef] = set()  # by their Service
        self._touched_eips: dict[Address, Eip | None] = {}
        self._nodes_changed = True
        self._following = False
        self._accepted = config_of(None)
        self._services = Cache(client, objects.SERVICE, on_change=self._service)
        self._nodes = Cache(client, objects.NODE, on_change=self._node)
        self._eips = Cache(client, objects.EIP, on_change=self._eip)
        self._slices = Cache(client, objects.SLICE, on_change=self._slice)
        self._maps = Cache(
            client,
            objects.CONFIG_MAP,
            namespace=NAMESPACE,
            params={"fieldSelector": f"metadata.name={ACCEPTED_CONFIG_MAP}"},
            on_change=self._config,
        )

    @property
    def caches(self) -> tuple[Cache[Any], ...]:
        """All caches, for the metrics."""
        return self._services, self._nodes, self._eips, self._slices, self._maps

    async def run(self) -> None:
        """Follow for ever."""
        async with asyncio.TaskGroup() as group:
            for cache in self.caches:
                group.create_task(cache.run(), name=f"cache-{cache.name}")
            group.create_task(self._publish(), name="inputs")

    async def _publish(self) -> None:
        for cache in self.caches:
            await cache.synced.wait()
        self._following = True
        self._dirty.set()
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._report(self._snapshot())
            # What arrives in one burst of the watch becomes one table.
            await asyncio.sleep(0.005)

    def _snapshot(self) -> Inputs:
        last = self._last
        services = {ref: self._services.get(ref) for ref in self._touched_services}
        slices = {ref: self._index.of(ref) for ref in self._touched_slices}
        merged = {ref: behind if behind.ports else None for ref, behind in slices.items()}
        generation, ranges, options = self._accepted
        self._last = Inputs(
            eips=_followed(last.eips, self._touched_eips),
            services=_followed(last.services, services),
            endpoints=_followed(last.endpoints, merged),
            nodes=tuple(self._nodes.items.values()) if self._nodes_changed else last.nodes,
            doubtful=self._doubt.nodes(time.monotonic()) if self._nodes_changed else last.doubtful,
            ranges=ranges,
            forwarding=options,
            config_generation=generation,
        )
        self._touched_services, self._touched_slices, self._touched_eips = set(), set(), {}
        self._nodes_changed = False
        return self._last

    def _service(self, key: ObjectRef, _old: Service | None, _new: Service | None) -> None:
        self._touched_services.add(key)
        self._dirty.set()

    def _node(self, key: ObjectRef, _old: Node | None, new: Node | None) -> None:
        if self._doubt.note(key.name, new.ready if new else None, time.monotonic()):
            asyncio.get_running_loop().call_later(KUBELETS_S, self._nodes_due)
        self._nodes_due()

    def _nodes_due(self) -> None:
        self._nodes_changed = True
        self._dirty.set()

    def _eip(self, _key: ObjectRef, old: Eip | None, new: Eip | None) -> None:
        if old is not None:
            self._touched_eips[old.address] = None
        if new is not None:
            self._touched_eips[new.address] = new
        self._dirty.set()

    def _slice(self, _key: ObjectRef, old: Slice | None, new: Slice | None) -> None:
        touched = {each.service for each in (old, new) if each is not None}
        if self._following and not self._touched_slices.isdisjoint(touched):
            # Another node may have the table between two changes of one Service.
            self._report(self._snapshot())
        self._touched_slices.update(self._index.change(old, new))
        self._dirty.set()

    def _endpoints_due(self, service: ObjectRef) -> None:
        self._touched_slices.add(service)
        self._dirty.set()

    def _config(self, key: ObjectRef, _old: DataObject | None, new: DataObject | None) -> None:
        if key.name != ACCEPTED_CONFIG_MAP or new is None:
            return  # a deleted configuration changes nothing: fail static
        try:
            self._accepted = config_of(new)
        except ConfigError as error:
            _log.error("accepted_config_unreadable", problems=error.problems)
            return
        self._dirty.set()


def _followed(known: Mapping[K, V], changes: Mapping[K, V | None]) -> PMap[K, V]:
    """The map after these changes; None for what is gone."""
    put = {key: value for key, value in changes.items() if value is not None}
    return persistent(known).updated(put, changes.keys() - put.keys())


_Accepted = tuple[int, tuple[tuple[Address, Address], ...], ForwardingOptions]


def config_of(accepted: DataObject | None) -> _Accepted:
    """Generation, pool ranges and options of an accepted configuration; defaults for None.

    Raises ConfigError for a schema that this agent cannot read.
    """
    if accepted is None:
        return 0, (), ForwardingOptions()
    parsed = config.parse(accepted.get(CONFIG_KEY) or "", ACCEPTED_CONFIG_MAP)
    generation = accepted.get("generation") or "0"
    ranges = tuple((part.first, part.last) for pool in parsed.pools for part in pool.addresses)
    number = int(generation) if generation.isdigit() else 0
    return number, ranges, parsed.forwarding_options
