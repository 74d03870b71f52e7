"""What a Service asks for: its annotations and `spec.loadBalancerIP`, ours and other controllers'.

Rules: one table. Other controllers' annotations of a kind are read only where ours is absent; all
that are read have to agree, each family of an address by itself, else nothing is changed and the
Event names two of them. What a user wrote is parsed here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from lbctl.core.config_values import parse_address
from lbctl.core.model import Address, Service
from lbctl.core.reasons import Reason


class Kind(Enum):
    """What an annotation asks for."""

    ADDRESSES = "addresses"
    POOL = "pool"
    SHARING = "sharing key"


OURS: Final = "lbctl.io/"
FIELD: Final = "spec.loadBalancerIP"
SHARING_KEY_LIMIT: Final = 1024  # characters, as deploy/kustomize/base/crd.yaml has it
TABLE: Final = {
    "lbctl.io/loadBalancerIPs": Kind.ADDRESSES,
    "metallb.io/loadBalancerIPs": Kind.ADDRESSES,
    "metallb.universe.tf/loadBalancerIPs": Kind.ADDRESSES,
    "kube-vip.io/loadbalancerIPs": Kind.ADDRESSES,
    "lbipam.cilium.io/ips": Kind.ADDRESSES,
    "io.cilium/lb-ipam-ips": Kind.ADDRESSES,
    "eip.openelb.kubesphere.io/v1alpha1": Kind.ADDRESSES,
    "eip.porter.kubesphere.io/v1alpha1": Kind.ADDRESSES,
    "purelb.io/addresses": Kind.ADDRESSES,
    "lbctl.io/address-pool": Kind.POOL,
    "metallb.io/address-pool": Kind.POOL,
    "metallb.universe.tf/address-pool": Kind.POOL,
    "eip.openelb.kubesphere.io/v1alpha2": Kind.POOL,
    "purelb.io/service-group": Kind.POOL,
    "lbctl.io/allow-shared-ip": Kind.SHARING,
    "metallb.io/allow-shared-ip": Kind.SHARING,
    "metallb.universe.tf/allow-shared-ip": Kind.SHARING,
    "lbipam.cilium.io/sharing-key": Kind.SHARING,
    "io.cilium/lb-ipam-sharing-key": Kind.SHARING,
    "purelb.io/allow-shared-ip": Kind.SHARING,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a Service asks for; "" and () where it asks for nothing.

    addresses: at most one of each family. problem: why none of it can be followed.
    """

    addresses: tuple[Address, ...] = ()
    pool: str = ""
    sharing: str = ""
    problem: tuple[Reason, str] | None = None

    def address(self, family: int) -> Address | None:
        """The address of a family (4 or 6) that is asked for."""
        return next((found for found in self.addresses if found.version == family), None)


NOTHING: Final = Asked()


def asked(service: Service) -> Asked:
    """What a Service asks for. Never raises."""
    if not service.requested and not service.annotations:
        return NOTHING
    found: dict[Kind, list[tuple[str, str]]] = {}
    for key, value in service.annotations:
        kind = TABLE.get(key)
        if kind is not None and value.strip():
            found.setdefault(kind, []).append((key, value.strip()))
    if not service.requested and not found:
        return NOTHING
    for kind, given in found.items():
        found[kind] = [pair for pair in given if pair[0].startswith(OURS)] or given
    wanted = found.get(Kind.ADDRESSES, [])
    if service.requested:
        wanted = [(FIELD, service.requested), *wanted]
    addresses, problem = _addresses(wanted)
    pool, sharing = found.get(Kind.POOL, []), found.get(Kind.SHARING, [])
    problem = problem or _differ(pool) or _differ(sharing) or _too_long(sharing)
    if problem is not None:
        return Asked(problem=problem)
    return Asked(addresses, pool[0][1] if pool else "", sharing[0][1] if sharing else "")


def _addresses(
    wanted: list[tuple[str, str]],
) -> tuple[tuple[Address, ...], tuple[Reason, str] | None]:
    """One address of each family, or what is wrong with what is written."""
    found: dict[int, tuple[Address, str]] = {}
    for key, text in wanted:
        families: set[int] = set()
        for word in text.replace(",", " ").split():
            try:
                address = parse_address(word)
            except ValueError:
                said = f"{key} holds {value_of(word)}, which is no IP address"
                return (), (Reason.REQUEST_INVALID, said)
            if address.version in families:
                said = f"{key} asks for two IPv{address.version} addresses; a Service has one"
                return (), (Reason.REQUEST_INVALID, said)
            families.add(address.version)
            first, by = found.setdefault(address.version, (address, key))
            if first != address:
                said = f"{by} asks for {first}, {key} for {address}"
                return (), (Reason.ANNOTATIONS_CONFLICT, said)
    return tuple(address for address, _ in found.values()), None


def _differ(given: list[tuple[str, str]]) -> tuple[Reason, str] | None:
    for key, value in given[1:]:
        if value != given[0][1]:
            said = f"{given[0][0]} says {value_of(given[0][1])}, {key} says {value_of(value)}"
            return Reason.ANNOTATIONS_CONFLICT, said
    return None


def _too_long(given: list[tuple[str, str]]) -> tuple[Reason, str] | None:
    if not given or len(given[0][1]) <= SHARING_KEY_LIMIT:
        return None
    said = f"{given[0][0]} is longer than {SHARING_KEY_LIMIT} characters"
    return Reason.REQUEST_INVALID, said


def value_of(text: str) -> str:
    """A user's text as an Event may show it: short, printable, in quotes."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:63])
    return f'"{shown}"'
