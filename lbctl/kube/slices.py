"""EndpointSlices merged per Service, kept up as slices change.

Rules: the cost of a change is that of its own Service's slices, whatever their total number. When
the last endpoint that takes traffic is ready no more but is there, it counts as ready for `READY_S`
more: its node may be called NotReady (`lbctl.core.endpoints`), and that may not be known yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain

from lbctl.core.endpoints import READY_S, distinct, serves, still_ready
from lbctl.core.model import (
    Endpoint,
    ObjectRef,
    PortEndpoints,
    Protocol,
    ServiceEndpoints,
)
from lbctl.kube.objects import Slice


def merge(service: ObjectRef, slices: list[Slice]) -> ServiceEndpoints:
    """All endpoints of a Service, sorted. One that two slices show counts once, ready first."""
    found: dict[tuple[str, Protocol], list[tuple[Endpoint, ...]]] = {}
    for part in sorted(slices, key=lambda entry: entry.ref):
        for port in part.ports:
            found.setdefault((port.name, port.protocol), []).append(port.endpoints)
    ports = (
        PortEndpoints(name, protocol, parts[0] if len(parts) == 1 else distinct(chain(*parts)))
        for (name, protocol), parts in sorted(found.items())
    )
    return ServiceEndpoints(service, tuple(ports), any(part.hosts for part in slices))


class SliceIndex:
    """Slices by Service. Feed it as the `on_change` of a slice cache.

    on_due(service) is called in the event loop when what `of` says changes with time alone: ready_s
    after the last endpoint was ready.
    """

    def __init__(
        self, on_due: Callable[[ObjectRef], None] = lambda _: None, ready_s: float = READY_S
    ) -> None:
        self._slices: dict[ObjectRef, dict[ObjectRef, Slice]] = {}
        self._merged: dict[ObjectRef, ServiceEndpoints] = {}
        self._was: dict[ObjectRef, ServiceEndpoints] = {}  # before the change that `of` has to see
        self._due: dict[ObjectRef, asyncio.TimerHandle] = {}
        self._on_due, self._ready_s = on_due, ready_s

    def change(self, old: Slice | None, new: Slice | None) -> tuple[ObjectRef, ...]:
        """Take one change in; the Services that it touches, sorted."""
        touched = set()
        if old is not None and old.service is not None:
            known = self._slices.get(old.service, {})
            known.pop(old.ref, None)
            if not known:
                self._slices.pop(old.service, None)
            touched.add(old.service)
        if new is not None and new.service is not None:
            self._slices.setdefault(new.service, {})[new.ref] = new
            touched.add(new.service)
        for service in touched:
            if merged := self._merged.pop(service, None):
                self._was[service] = merged
        return tuple(sorted(touched))

    def of(self, service: ObjectRef) -> ServiceEndpoints:
        """The merged endpoints of a Service; without slices it has no ports."""
        known = self._merged.get(service)
        if known is None:
            known = merge(service, list(self._slices.get(service, {}).values()))
            known = self._lasting(service, self._was.pop(service, None), known)
            if service in self._slices:
                self._merged[service] = known
        return known

    def _lasting(
        self, service: ObjectRef, was: ServiceEndpoints | None, known: ServiceEndpoints
    ) -> ServiceEndpoints:
        lasting = known if was is None or serves(known) else still_ready(was, known)
        if lasting is known or not serves(lasting):
            if due := self._due.pop(service, None):
                due.cancel()
            return known
        if service not in self._due:
            loop = asyncio.get_running_loop()
            self._due[service] = loop.call_later(self._ready_s, self._over, service)
        return lasting

    def _over(self, service: ObjectRef) -> None:
        del self._due[service]
        self._merged.pop(service, None)
        self._was.pop(service, None)
        self._on_due(service)

    def all(self) -> tuple[ServiceEndpoints, ...]:
        """Of every Service that has slices, sorted."""
        return tuple(self.of(service) for service in sorted(self._slices))
