"""Which nodes have something behind an EIP, and why none has.

Rules: where an endpoint is comes from `forwarding.Locator`, as for forwarding: from the nodes, and
from a nodeName that somebody wrote only if `endpoints.nodes` says so; only ports that the Service
has, and endpoints of the EIP's family, count. An endpoint on no node is refused, or with
`endpoints.external: masquerade` served by every node; a Pod's is never taken for one of those. With
externalTrafficPolicy Local it is local to no node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from lbctl.core.endpoints import taking
from lbctl.core.forwarding import Locator
from lbctl.core.model import Endpoint, External, Service, ServiceEndpoints
from lbctl.core.reasons import Reason

_NOWHERE: Final = "*"  # stands for the node of an endpoint that every node serves


@dataclass(frozen=True, slots=True)
class Serving:
    """nodes: those with an eligible endpoint. everywhere: any node serves one that is on none.

    reason: why nothing is served, None if something is.
    """

    nodes: frozenset[str] = frozenset()
    everywhere: bool = False
    reason: Reason | None = None


class _Placed(NamedTuple):
    node: str
    endpoint: Endpoint


def serving(
    service: Service | None,
    known: ServiceEndpoints | None,
    version: int,
    locator: Locator,
    external: External = "refuse",
    doubtful: frozenset[str] = frozenset(),
) -> Serving:
    """Who serves the EIP of one family (4 or 6).

    service: whose ports count; None: all ports of `known` do (Services that share an EIP).
    doubtful: the nodes whose Pods' readiness is not known.
    """
    wanted = {(port.name, port.protocol) for port in service.ports} if service else None
    nodes: set[str] = set()
    stray = False
    for port in known.ports if known else ():
        if wanted is not None and (port.name, port.protocol) not in wanted:
            continue
        placed = []
        for endpoint in port.endpoints:
            if endpoint.address.version == version:
                if node := _place(endpoint, locator, external):
                    placed.append(_Placed(node, endpoint))
                else:
                    stray = stray or endpoint.ready
        nodes.update(entry.node for entry in taking(placed, doubtful))
    if nodes:
        return Serving(frozenset(nodes - {_NOWHERE}), _NOWHERE in nodes)
    if stray:
        return Serving(reason=Reason.ENDPOINTS_ON_NO_NODE)
    hosts = known is not None and known.hosts
    return Serving(reason=Reason.HOST_ENDPOINTS if hosts else Reason.NO_ENDPOINTS)


def _place(endpoint: Endpoint, locator: Locator, external: External) -> str:
    node = locator.locate(endpoint)
    if node is None and external == "masquerade" and not endpoint.pod and _usable(endpoint):
        return _NOWHERE
    return node or ""


def _usable(endpoint: Endpoint) -> bool:
    address = endpoint.address
    return not (address.is_loopback or address.is_multicast or address.is_unspecified)
