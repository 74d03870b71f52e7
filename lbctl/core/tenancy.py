"""What a Service may have of a pool, whatever it asks for.

Rules: namespaces, selectors, reservations and quota bind explicit requests, claims in a status and
sharing alike; `requests` and `drain` bind what is new. A namespace is let in by `namespaces` or by
any of `namespaceSelectors`, a Service by any of `serviceSelectors`; an absent list lets all in.
Quota is counted by `lbctl.core.supply`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lbctl.core.config import Config
from lbctl.core.config_pools import Pool
from lbctl.core.model import Address, Service
from lbctl.core.reasons import Reason

Denial = tuple[Reason, str]


def serves_namespace(pool: Pool, namespace: str, labels: Mapping[str, str]) -> bool:
    """Whether a pool is for a namespace that has these labels."""
    if not pool.namespaces and not pool.namespace_selectors:
        return True
    return namespace in pool.namespaces or any(
        selector.matches(labels) for selector in pool.namespace_selectors
    )


def serves(pool: Pool, service: Service) -> bool:
    """Whether a pool's serviceSelectors let a Service in."""
    if not pool.service_selectors:
        return True
    labels = dict(service.labels)
    return any(selector.matches(labels) for selector in pool.service_selectors)


def admits(pool: Pool, service: Service, labels: Mapping[str, str]) -> Denial | None:
    """Why a pool is not for a Service at all. labels: of its namespace."""
    namespace = service.ref.namespace
    if not serves_namespace(pool, namespace, labels):
        said = f"pool {pool.name} does not serve namespace {namespace}"
        return Reason.POOL_NOT_FOR_NAMESPACE, said
    if not serves(pool, service):
        said = f"the serviceSelectors of pool {pool.name} do not match its labels"
        return Reason.POOL_NOT_FOR_SERVICE, said
    return None


def gives(pool: Pool, service: Service, labels: Mapping[str, str]) -> Denial | None:
    """Why a pool gives a Service nothing that it has not had."""
    if denial := admits(pool, service, labels):
        return denial
    return (Reason.POOL_DRAINING, f"pool {pool.name} is being drained") if pool.drain else None


def may_have(
    config: Config, pool: Pool, service: Service, labels: Mapping[str, str], address: Address
) -> Denial | None:
    """Why a Service may not have an address of a pool, given back or not."""
    denial = admits(pool, service, labels)
    if denial is not None:
        return denial
    reserved = config.reserved_at(address)
    if reserved is not None and reserved.owner not in (None, service.ref):
        return Reason.ADDRESS_RESERVED, f"{address} is reserved for another Service"
    return None


def may_ask(
    config: Config, pool: Pool, service: Service, labels: Mapping[str, str], address: Address
) -> Denial | None:
    """Why a Service may not choose an address of a pool."""
    if denial := gives(pool, service, labels) or may_have(config, pool, service, labels, address):
        return denial
    reserved = config.reserved_at(address)
    if reserved is not None and reserved.owner == service.ref:
        return None
    if pool.requests == "none" or (pool.requests == "listed" and reserved is None):
        which = "no address" if pool.requests == "none" else "reserved addresses only"
        said = f"{address} is asked for, but pool {pool.name} lets Services ask for {which}"
        return Reason.REQUEST_NOT_ALLOWED, said
    if pool.avoids(address) and reserved is None:
        said = f"{address} is asked for, but pool {pool.name} avoids .0 and .255"
        return Reason.REQUEST_NOT_ALLOWED, said
    return None
