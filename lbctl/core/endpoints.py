"""Which endpoints of a Service port take traffic: one rule for announcing and forwarding alike.

Rule (KEP-1669): the ready ones; when none is ready, those that still serve while they terminate.
An endpoint on no node is left out first: nothing could deliver to it.
"""

from __future__ import annotations

from lbctl.core.model import Endpoint, ServiceEndpoints


def eligible(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return the endpoints of one port that take traffic, sorted and without duplicates."""
    placed = sorted({endpoint for endpoint in endpoints if endpoint.node})
    ready = tuple(endpoint for endpoint in placed if endpoint.ready)
    return ready or tuple(
        endpoint for endpoint in placed if endpoint.serving and endpoint.terminating
    )


def serving_nodes(service: ServiceEndpoints) -> frozenset[str]:
    """Return the names of the nodes that have an eligible endpoint of any port."""
    nodes: set[str] = set()
    for port in service.ports:
        placed = [endpoint for endpoint in port.endpoints if endpoint.node]
        ready = {endpoint.node for endpoint in placed if endpoint.ready}
        nodes |= ready or {e.node for e in placed if e.serving and e.terminating}
    return frozenset(nodes)
