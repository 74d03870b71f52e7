"""Which endpoints of a Service port take traffic: one rule for announcing and forwarding alike.

Rule (KEP-1669): the ready ones; when none is ready, those that still serve while they terminate.
When there are none of these either, those on nodes that Kubernetes calls NotReady: their readiness
is not known. When the API server was away for long, all nodes are called so at its return, and with
them all their Pods, before the kubelets have been heard; whether a node lives, our probes say.
What Kubernetes said a moment ago counts a little longer (`Unready`, `still_ready`), for it says one
thing after the other: a port is not closed in between.
An endpoint on no node is left out first: nothing could deliver to it. And one rule for what is
there twice: it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import Final, Protocol, TypeVar

from lbctl.core.model import Endpoint, ServiceEndpoints

# A kubelet that is heard again says so of its node at once, of its Pods when it next looks at them
# all, every 10 s.
UNREADY_S: Final = 15.0
# A node's NotReady and that of its Pods come by different watches.
READY_S: Final = 2.0


class OnNode(Protocol):
    """An endpoint of a port, and the node that it is on."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def node(self) -> str: ...


P = TypeVar("P", bound=OnNode)


def taking(placed: Sequence[P], unready: frozenset[str]) -> list[P]:
    """Return those that take traffic, in their order. unready: as `Unready.names`."""
    return (
        [entry for entry in placed if entry.endpoint.ready]
        or [e for e in placed if e.endpoint.serving and e.endpoint.terminating]
        or [e for e in placed if e.node in unready and not e.endpoint.terminating]
    )


def distinct(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Endpoints sorted by address and port. One that is there twice counts once, ready first."""
    found: dict[tuple[int, int, int], Endpoint] = {}
    for end in endpoints:
        key = (end.address.version, int(end.address), end.port)
        if key not in found or (end.ready and not found[key].ready):
            found[key] = end
    return tuple([found[key] for key in sorted(found)])


class Unready:
    """The nodes whose Pods' readiness is not known: NotReady ones, and those that were lately."""

    def __init__(self) -> None:
        self._until_s: dict[str, float] = {}

    def note(self, node: str, ready: bool | None, now_s: float) -> bool:
        """Take in how a node is, None if it is no more; True if it is known again in UNREADY_S."""
        if ready is None:
            self._until_s.pop(node, None)
        elif not ready:
            self._until_s[node] = inf
        elif self._until_s.get(node) == inf:
            self._until_s[node] = now_s + UNREADY_S
            return True
        return False

    def names(self, now_s: float) -> frozenset[str]:
        """Their names."""
        return frozenset(name for name, until_s in self._until_s.items() if until_s > now_s)


def serves(known: ServiceEndpoints) -> bool:
    """Whether Kubernetes has an endpoint of a Service take traffic."""
    every = (endpoint for port in known.ports for endpoint in port.endpoints)
    return any(e.ready or (e.serving and e.terminating) for e in every)


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
