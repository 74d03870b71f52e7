"""EndpointSlices merged per Service, kept up as slices change.

Rule: the cost of a change is that of its own Service's slices, whatever their total number.
"""

from __future__ import annotations

from itertools import chain

from lbctl.core.endpoints import distinct
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
    """Slices by Service. Feed it as the `on_change` of a slice cache."""

    def __init__(self) -> None:
        self._slices: dict[ObjectRef, dict[ObjectRef, Slice]] = {}
        self._merged: dict[ObjectRef, ServiceEndpoints] = {}

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
            self._merged.pop(service, None)
        return tuple(sorted(touched))

    def of(self, service: ObjectRef) -> ServiceEndpoints:
        """The merged endpoints of a Service; without slices it has no ports."""
        known = self._merged.get(service)
        if known is None:
            known = merge(service, list(self._slices.get(service, {}).values()))
            if service in self._slices:
                self._merged[service] = known
        return known

    def all(self) -> tuple[ServiceEndpoints, ...]:
        """Of every Service that has slices, sorted."""
        return tuple(self.of(service) for service in sorted(self._slices))
