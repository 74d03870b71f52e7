"""Addresses and ports of Services: clusterIPs, nodePort, healthCheckNodePort, what a type needs.

The allocator holds what is in use, found again from the stored Services at start. `prepare` runs
before validation, `take` after it; only `take` raises.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

from lbctl.lab.apiserver import families, status
from lbctl.lab.apiserver.resources import Obj, Resource
from lbctl.lab.apiserver.status import Cause, invalid_value

NODE_PORTS: Final = range(10000, 40001)  # wide: 10,000 Services of type LoadBalancer fit
_EXPOSED: Final = frozenset({"NodePort", "LoadBalancer"})


class ServiceAddresses:
    """What the stored Services hold. `cidrs`: one network or two, by comma, the default first."""

    def __init__(self, cidrs: str, resource: Resource) -> None:
        networks = [ip_network(cidr.strip()) for cidr in cidrs.split(",")]
        self._networks = {f"IPv{network.version}": network for network in networks}
        self._resource = resource
        self._addresses: set[str] = {str(network[1]) for network in networks}
        self._ports: set[tuple[int, str]] = set()
        # the first ones are for those who ask for them (kubernetes, DNS)
        self._next = dict.fromkeys(self._networks, 10)

    @property
    def families(self) -> tuple[str, ...]:
        """The cluster's, its default first."""
        return tuple(self._networks)

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The default family's."""
        return self._networks[self.families[0]]

    def restore(self, services: Iterable[Obj]) -> None:
        """Hold what these Services have."""
        for service in services:
            self._hold(service["spec"])

    def _hold(self, spec: Obj) -> None:
        self._addresses.update(ip for ip in spec.get("clusterIPs") or () if ip != "None")
        self._ports.update(_ports(spec))

    def prepare(self, old: Obj | None, obj: Obj) -> None:
        """Carry over what an update leaves out, and drop what belongs to the former type."""
        spec = obj["spec"]
        before = old["spec"] if old else {}
        kind = spec.get("type", "ClusterIP")
        families.normalize(before, spec)
        if old is not None:
            _carry_over(before, spec, kind)
            _drop_former(before, spec, kind)
            if kind != "LoadBalancer":
                obj["status"] = {**obj.get("status", {}), "loadBalancer": {}}
        if kind != "ExternalName":
            families.fill(before, spec, self.families)

    def causes(self, obj: Obj) -> list[Cause]:
        """What is wrong with the addresses and families that `obj` asks for, after `prepare`."""
        spec = obj["spec"]
        return [] if spec["type"] == "ExternalName" else families.causes(spec, self.families)

    def take(self, old: Obj | None, obj: Obj, *, dry_run: bool) -> None:
        """Give out what `obj` lacks. Raises ApiRefusal 422 for what is taken or out of range."""
        spec = obj["spec"]
        mine: Obj = old["spec"] if old else {}
        if spec["type"] != "ExternalName":
            self._take_address(obj, spec, mine)
        if spec["type"] in _EXPOSED:
            self._take_ports(obj, spec, mine)
        if not dry_run:
            self.release(mine)
            self._hold(spec)

    def release(self, spec: Obj) -> None:
        """Give back what a Service's spec holds."""
        self._addresses.difference_update(spec.get("clusterIPs") or ())
        self._ports.difference_update(_ports(spec))

    def _refuse(self, obj: Obj, cause: Cause) -> Exception:
        return status.invalid(self._resource, obj["metadata"]["name"], [cause])

    def _take_address(self, obj: Obj, spec: Obj, mine: Obj) -> None:
        if spec.get("clusterIP") == "None":
            spec["clusterIPs"] = ["None"]
            return
        held = mine.get("clusterIPs") or ()
        given: list[str] = list(spec.get("clusterIPs") or ())
        for address in given:
            if address not in held:
                self._claim(obj, address)
        for family in spec["ipFamilies"][len(given) :]:
            given.append(self._free_address(family))
        spec["clusterIP"], spec["clusterIPs"] = given[0], given

    def _claim(self, obj: Obj, wanted: str) -> None:
        network = self._networks[families.family_of(wanted)]
        if ip_address(wanted) not in network:
            detail = (
                f"failed to allocate IP {wanted}: the provided network does not match the "
                "current range"
            )
            raise self._refuse(obj, invalid_value("spec.clusterIPs", [wanted], detail))
        reserved = wanted == str(network[1]) and obj["metadata"]["name"] == "kubernetes"
        if wanted in self._addresses and not reserved:
            detail = f"failed to allocate IP {wanted}: provided IP is already allocated"
            raise self._refuse(obj, invalid_value("spec.clusterIPs", [wanted], detail))

    def _free_address(self, family: str) -> str:
        network = self._networks[family]
        size = network.num_addresses
        for _ in range(size):
            number = self._next[family] + 1
            number = self._next[family] = number if number + 1 < size else 10
            found = str(network[number])
            if found not in self._addresses:
                return found
        raise status.fail(
            500,
            "InternalError",
            "Internal error occurred: failed to allocate a serviceIP: range is full",
        )

    def _take_ports(self, obj: Obj, spec: Obj, mine: Obj) -> None:
        held = _ports(mine)
        chosen: set[tuple[int, str]] = set()
        none = spec["type"] == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is False
        for index, port in enumerate(spec.get("ports") or ()):
            number, protocol = port.get("nodePort"), port["protocol"]
            path = f"spec.ports[{index}].nodePort"
            if number:
                taken = (number, protocol) in self._ports - held
                if number not in NODE_PORTS and (number, protocol) not in held:
                    last = NODE_PORTS.stop - 1
                    detail = (
                        f"provided port is not in the valid range. The range of valid ports is "
                        f"{NODE_PORTS.start}-{last}"
                    )
                    raise self._refuse(obj, invalid_value(path, number, detail))
                if taken:
                    detail = "provided port is already allocated"
                    raise self._refuse(obj, invalid_value(path, number, detail))
            elif not none:
                number = port["nodePort"] = self._free_port(protocol, chosen)
            if number:
                chosen.add((number, protocol))
        local = spec["type"] == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local"
        if local and not spec.get("healthCheckNodePort"):
            spec["healthCheckNodePort"] = self._free_port("TCP", chosen)

    def _free_port(self, protocol: str, chosen: set[tuple[int, str]]) -> int:
        for _ in range(200):
            number = random.choice(NODE_PORTS)
            if (number, protocol) not in self._ports and (number, protocol) not in chosen:
                return number
        for number in NODE_PORTS:
            if (number, protocol) not in self._ports and (number, protocol) not in chosen:
                return number
        raise status.fail(
            500,
            "InternalError",
            "Internal error occurred: failed to allocate a nodePort: range is full",
        )


def _ports(spec: Obj) -> set[tuple[int, str]]:
    held = {
        (port["nodePort"], port.get("protocol", "TCP"))
        for port in spec.get("ports") or ()
        if port.get("nodePort")
    }
    if spec.get("healthCheckNodePort"):
        held.add((spec["healthCheckNodePort"], "TCP"))
    return held


def _carry_over(before: Obj, spec: Obj, kind: str) -> None:
    """An update that leaves out what the server gave keeps it."""
    if kind == "ExternalName":
        return
    families.carry_over(before, spec)
    if kind in _EXPOSED and before.get("type") in _EXPOSED:
        given = {
            (port.get("port"), port.get("protocol", "TCP")): port["nodePort"]
            for port in before.get("ports") or ()
            if port.get("nodePort")
        }
        for port in spec.get("ports") or ():
            number = given.get((port.get("port"), port.get("protocol", "TCP")))
            if number and not port.get("nodePort"):
                port["nodePort"] = number
    if before.get("healthCheckNodePort") and spec.get("externalTrafficPolicy") == "Local":
        spec.setdefault("healthCheckNodePort", before["healthCheckNodePort"])


def _drop_former(before: Obj, spec: Obj, kind: str) -> None:
    """Fields of the type that a Service had, unless the user changed them in the same write."""

    def drop(field: str) -> None:
        if field in before and spec.get(field) == before[field]:
            spec.pop(field)

    if before.get("type") != kind:
        if kind == "ExternalName":
            for field in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                drop(field)
            spec.pop("internalTrafficPolicy", None)
        if kind not in _EXPOSED:
            drop("externalTrafficPolicy")
            numbers = {port.get("nodePort") for port in before.get("ports") or ()}
            for port in spec.get("ports") or ():
                if port.get("nodePort") in numbers:
                    port.pop("nodePort", None)
        if kind != "LoadBalancer":
            drop("allocateLoadBalancerNodePorts")
            drop("loadBalancerClass")
    if kind != "LoadBalancer" or spec.get("externalTrafficPolicy") != "Local":
        drop("healthCheckNodePort")
