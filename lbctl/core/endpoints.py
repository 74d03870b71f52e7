"""Which endpoints of a Service port take traffic: one rule for announcing and forwarding alike.

Rule (KEP-1669): the ready ones; when none is ready, those that still serve while they terminate.
When there are none of these either, those on nodes that Kubernetes calls NotReady: their readiness
is not known. When the API server was away for long, all nodes are called so at its return, and with
them all their Pods, before the kubelets have been heard; whether a node lives, our probes say.
An endpoint on no node is left out first: nothing could deliver to it. And one rule for what is
there twice: it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from lbctl.core.model import Endpoint


class OnNode(Protocol):
    """An endpoint of a port, and the node that it is on."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def node(self) -> str: ...


P = TypeVar("P", bound=OnNode)


def taking(placed: Sequence[P], unready: frozenset[str]) -> list[P]:
    """Return those that take traffic, in their order. unready: the nodes that are NotReady."""
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
