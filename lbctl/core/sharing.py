"""Which Services may be on one address.

Rules: the same sharing key (the EIP object holds it); no port of one protocol twice; the same
externalTrafficPolicy, and with Local the same pods, as one route leads to all of them; the same
source ranges, as nodes enforce them for the address as a whole. One that came to differ later keeps
the address and loses its ports: whoever was there first is not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterable

from lbctl.core.model import Service, ServicePort, TrafficPolicy


def differs(first: Service, other: Service) -> str:
    """Why `other` cannot be on an address that `first` owns, whatever the ports; "" if it can."""
    if first.policy is not other.policy:
        return f"its externalTrafficPolicy is {other.policy}, that of {first.ref} {first.policy}"
    if first.policy is TrafficPolicy.LOCAL and first.selector != other.selector:
        return f"externalTrafficPolicy is Local, and its pods are not those of {first.ref}"
    if set(first.source_ranges) != set(other.source_ranges):
        return f"its loadBalancerSourceRanges are not those of {first.ref}"
    return ""


def clash(members: Iterable[Service], other: Service) -> str:
    """Why `other` cannot join Services in the order in which they came; "" if it can."""
    before = [member for member in members if member.ref != other.ref]
    if before and (said := differs(before[0], other)):
        return said
    for member in before:
        taken = {(port.protocol, port.port) for port in member.ports}
        for port in other.ports:
            if (port.protocol, port.port) in taken:
                return f"{member.ref} has port {port.protocol} {port.port} already"
    return ""


def served(members: Iterable[Service]) -> tuple[tuple[Service, tuple[ServicePort, ...]], ...]:
    """The ports of an address by Service, given its members in the order in which they came."""
    found: list[tuple[Service, tuple[ServicePort, ...]]] = []
    taken: set[tuple[str, int]] = set()
    for service in members:
        if found and differs(found[0][0], service):
            found.append((service, ()))
            continue
        ports = tuple(p for p in service.ports if (p.protocol, p.port) not in taken)
        taken.update((port.protocol, port.port) for port in ports)
        found.append((service, ports))
    return tuple(found)
