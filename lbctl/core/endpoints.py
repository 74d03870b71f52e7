"""Which endpoints of a Service port take traffic: one rule for announcing and forwarding alike.

Rule (KEP-1669): the ready ones; when none is ready, those that still serve while they terminate.
An endpoint on no node is left out first: nothing could deliver to it. And one rule for what is
there twice: it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable

from lbctl.core.model import Endpoint


def eligible(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return the endpoints of one port that take traffic, sorted and without duplicates."""
    return taking(tuple(sorted({endpoint for endpoint in endpoints if endpoint.node})))


def taking(placed: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return those of endpoints on nodes that take traffic, in their order."""
    ready = tuple(endpoint for endpoint in placed if endpoint.ready)
    return ready or tuple(
        endpoint for endpoint in placed if endpoint.serving and endpoint.terminating
    )


def distinct(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Endpoints sorted by address and port. One that is there twice counts once, ready first."""
    found: dict[tuple[int, int, int], Endpoint] = {}
    for end in endpoints:
        key = (end.address.version, int(end.address), end.port)
        if key not in found or (end.ready and not found[key].ready):
            found[key] = end
    return tuple([found[key] for key in sorted(found)])
