"""The routers that this host uses: addresses that must never be given out as an EIP.

Rule: what the manager can know is its own host's (hostNetwork, /proc/net needs no privilege). The
gateway of another rack it cannot see; such an address has to be left out of the pool.
"""

from __future__ import annotations

import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from lbctl.core.model import Address

_GATEWAY: Final = 0x2  # RTF_GATEWAY, linux/route.h


def gateways(proc: Path = Path("/proc/net")) -> frozenset[Address]:
    """Next hops of the host's routes, IPv4 and IPv6; what cannot be read counts as none."""
    return frozenset(_ipv4(_lines(proc / "route")[1:]) | _ipv6(_lines(proc / "ipv6_route")))


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return []


def _ipv4(rows: list[list[str]]) -> set[Address]:
    """Interface, destination, gateway, flags …; addresses are hexadecimal in host byte order."""
    found: set[Address] = set()
    for row in rows:
        if len(row) >= 4 and int(row[3], 16) & _GATEWAY:
            found.add(IPv4Address(int(row[2], 16).to_bytes(4, sys.byteorder)))
    return found


def _ipv6(rows: list[list[str]]) -> set[Address]:
    """Destination, length, source, length, next hop, metric, use, count, flags, interface."""
    found: set[Address] = set()
    for row in rows:
        if len(row) >= 10 and int(row[8], 16) & _GATEWAY:
            found.add(IPv6Address(bytes.fromhex(row[4])))
    return found
