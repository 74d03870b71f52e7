"""Which endpoints of a Service port take traffic: one rule for announcing and forwarding alike.

Rule (KEP-1669): the ready ones; when none is ready, those that still serve while they terminate.
An endpoint on no node is left out first: nothing could deliver to it. One that is there twice
counts once. Two more, since Kubernetes calls all Pods of a NotReady node not ready, and all nodes
are NotReady when an API server is back that was away for long and has not heard the kubelets:
- When there are none of these either, those on nodes that are NotReady, or were lately (`Doubt`):
  whether they are ready is not known. Whether a node lives, our probes say.
- Nodes and Pods come by different watches. So the last endpoints of a Service that were ready stay
  so for `READY_S` more (`still_ready`); what makes them doubtful may be on its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import Final, Protocol, TypeVar

from lbctl.core.model import Endpoint, ServiceEndpoints

# In so long all kubelets that can be heard have been, of their nodes and of their Pods: they renew
# their leases, and look through their Pods, every 10 s.
KUBELETS_S: Final = 15.0
READY_S: Final = 2.0


class OnNode(Protocol):
    """An endpoint of a port, and the node that it is on."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def node(self) -> str: ...


P = TypeVar("P", bound=OnNode)


def taking(placed: Sequence[P], doubtful: frozenset[str]) -> list[P]:
    """Return those that take traffic, in their order. doubtful: as `Doubt.nodes`."""
    return (
        [entry for entry in placed if entry.endpoint.ready]
        or [entry for entry in placed if _serves_on(entry.endpoint)]
        or [e for e in placed if e.node in doubtful and not e.endpoint.terminating]
    )


def _serves_on(endpoint: Endpoint) -> bool:
    return endpoint.serving and endpoint.terminating


def distinct(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Endpoints sorted by address and port. One that is there twice counts once, ready first."""
    found: dict[tuple[int, int, int], Endpoint] = {}
    for end in endpoints:
        key = (end.address.version, int(end.address), end.port)
        if key not in found or (end.ready and not found[key].ready):
            found[key] = end
    return tuple([found[key] for key in sorted(found)])


class Doubt:
    """The nodes of whose Pods it is not known whether they are ready."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def note(self, node: str, ready: bool | None, now_s: float) -> bool:
        """Take in how a node is, None if it is no more; True if it is known again in KUBELETS_S."""
        if ready is None:
            self._until_s.pop(node, None)
        elif not ready:
            self._until_s[node] = inf
        elif self._until_s.get(node) == inf:
            self._until_s[node] = now_s + KUBELETS_S
            return True
        return False

    def nodes(self, now_s: float) -> frozenset[str]:
        """Those that are NotReady, or were so until KUBELETS_S ago."""
        return frozenset(name for name, until_s in self._until_s.items() if until_s > now_s)


def serves(known: ServiceEndpoints) -> bool:
    """Whether Kubernetes has an endpoint of a Service take traffic."""
    every = (endpoint for port in known.ports for endpoint in port.endpoints)
    return any(e.ready or _serves_on(e) for e in every)


def still_ready(was: ServiceEndpoints, known: ServiceEndpoints) -> ServiceEndpoints:
    """`known`, with those endpoints ready that `was` has so and that have not begun to end."""
    ready = {
        (port.name, port.protocol, end.address, end.port)
        for port in was.ports
        for end in port.endpoints
        if end.ready
    }
    ports = []
    for port in known.ports:
        ends = (
            replace(e, ready=not e.terminating)
            if (port.name, port.protocol, e.address, e.port) in ready
            else e
            for e in port.endpoints
        )
        ports.append(replace(port, endpoints=tuple(ends)))
    return replace(known, ports=tuple(ports))
