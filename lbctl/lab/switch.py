"""A switch: FRR in a machine, started as FRR's own container image starts it.

`frrinit.sh` reads /etc/frr/daemons (a bind of the topology), starts watchfrr and the daemons, and
loads /etc/frr/frr.conf through vtysh. Everything here asks the switch, never a copy of its state:
the kernel's routes by iproute2, BGP and VRRP by vtysh in JSON.
"""

from __future__ import annotations

import json
from ipaddress import ip_network
from typing import Any, Final

from lbctl.errors import LabError
from lbctl.lab.machine import Machine

FRR_INIT: Final = "/usr/lib/frr/frrinit.sh"


def start(machine: Machine) -> None:
    """Start FRR and wait until it has read its configuration. Raises LabError."""
    machine.run("install", "-d", "-o", "frr", "-g", "frr", "-m", "0775", "/var/log/frr")
    machine.run("install", "-d", "-o", "frr", "-g", "frr", "-m", "0755", "/var/tmp/frr")
    machine.run(FRR_INIT, "start", timeout_s=120)


def restart(machine: Machine) -> None:
    """Restart every FRR daemon, as an operator would."""
    machine.run(FRR_INIT, "restart", timeout_s=120)


def vtysh_json(machine: Machine, command: str) -> Any:
    """A `show … json` command's answer. Raises LabError if it is not JSON."""
    out = machine.run("vtysh", "-c", command).stdout
    try:
        return json.loads(out)
    except ValueError as error:
        raise LabError(f"{machine.name}: {command}: {out.strip()[:200]!r}") from error


def kernel_routes(machine: Machine, prefix: str) -> list[str]:
    """Next hops (gateways, else device names) of exactly this prefix in the kernel, sorted.

    [] if there is no such route. An address without a length is a host route.
    """
    network = ip_network(prefix)
    family = "-6" if network.version == 6 else "-4"
    out = machine.run("ip", "-j", family, "route", "show", "exact", str(network)).stdout
    found: list[str] = []
    for route in json.loads(out or "[]"):
        for hop in route.get("nexthops") or [route]:
            found.append(str(hop.get("gateway") or hop.get("dev")))
    return sorted(found)


def bgp_routes(machine: Machine) -> dict[str, frozenset[str]]:
    """Every host route in the kernel that BGP made: its address and its gateways."""
    found = {}
    for family in ("-4", "-6"):
        out = machine.run("ip", "-j", family, "route", "show", "proto", "bgp").stdout
        for route in json.loads(out or "[]"):
            hops = route.get("nexthops") or [route]
            address = str(route["dst"]).partition("/")[0]
            found[address] = frozenset(str(hop.get("gateway") or hop.get("dev")) for hop in hops)
    return found


def bgp_peers(machine: Machine) -> dict[str, str]:
    """State of each BGP neighbour by address, such as `Established`."""
    data = vtysh_json(machine, "show bgp summary json")
    peers: dict[str, str] = {}
    for family in data.values() if isinstance(data, dict) else ():
        for address, peer in (family.get("peers") or {}).items():
            peers[address] = str(peer.get("state", "?"))
    return dict(sorted(peers.items()))


def vrrp_states(machine: Machine) -> dict[int, str]:
    """`Master`, `Backup` or `Initialize` by VRRP group; `v4 …, v6 …` where the families differ.

    {} on a switch that runs no vrrpd.
    """
    found: dict[int, str] = {}
    if "vrrpd" not in machine.run("vtysh", "-c", "show daemons").stdout.split():
        return found
    for item in vtysh_json(machine, "show vrrp json"):
        by_family = {f: str(item[f]["status"]) for f in ("v4", "v6") if item[f]["addresses"]}
        states = sorted(set(by_family.values()))
        differing = ", ".join(f"{family} {state}" for family, state in by_family.items())
        found[int(item["vrid"])] = states[0] if len(states) == 1 else differing
    return found
