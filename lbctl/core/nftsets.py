"""The elements of the small sets: what the rules follow besides the ports of the Services.

Rules: a set of nodes or interfaces is replaced whole; what grows with the number of EIPs is changed
by what differs. `Policy` is empty by default: nothing answers, nothing is limited, no tunnel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from lbctl.core.model import Address
from lbctl.core.nftfamily import FAMILIES, Family
from lbctl.core.nftrules import TUNNEL_HEADERS, limiter
from lbctl.core.pmap import changed
from lbctl.errors import DataplaneError

_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.@:-]{1,15}")


@dataclass(frozen=True, slots=True)
class Policy:
    """What a node's tables follow besides the ports.

    pingable: EIPs that answer echo requests. new_flows: of one EIP in one second, 0 is no limit.
    external: endpoints on no node. tunnel_peers: whence tunnel packets may come. tunnel_mtus: for
    each uplink what fits into a tunnel over it; () if no node is reached by a tunnel.
    """

    pingable: Mapping[Address, None] = field(default_factory=dict)
    new_flows: int = 0
    external: tuple[Address, ...] = ()
    tunnel_peers: tuple[Address, ...] = ()
    tunnel_mtus: tuple[tuple[str, int], ...] = ()


def changes(old: Policy, new: Policy) -> Iterator[str]:
    """Return the commands that turn the sets of `old` into those of `new`."""
    for family in FAMILIES:
        if old.new_flows != new.new_flows:
            yield limiter(family, new.new_flows)
        for name, was, now in (
            ("external", old.external, new.external),
            ("tunnel_peers", old.tunnel_peers, new.tunnel_peers),
        ):
            before, after = _of(family, was), _of(family, now)
            if before != after:
                yield replaced(family, name, map(str, after))
        if old.tunnel_mtus != new.tunnel_mtus:
            room = TUNNEL_HEADERS[family.version]
            entries = (f'"{interface(n)}" : {mtu - room}' for n, mtu in new.tunnel_mtus)
            yield replaced(family, "clamp", entries, kind="map")
    yield from _pingable(old.pingable, new.pingable)


def _pingable(old: Mapping[Address, None], new: Mapping[Address, None]) -> Iterator[str]:
    differ = [a for a in changed(old, new) if (a in old) != (a in new)]
    for family in FAMILIES:
        touched = sorted(_of(family, differ), key=int)
        for verb, held in (("delete", old), ("add", new)):
            listed = [str(a) for a in touched if a in held]
            if listed:
                yield f"{verb} element {family.table} pingable {{ {', '.join(listed)} }}\n"


def _of(family: Family, addresses: Iterable[Address]) -> list[Address]:
    return [a for a in addresses if a.version == family.version]


def replaced(family: Family, name: str, entries: Iterable[str], kind: str = "set") -> str:
    """Return the commands that make a set, or a map, hold just these elements."""
    listed = ", ".join(entries)
    text = f"flush {kind} {family.table} {name}\n"
    return text + (f"add element {family.table} {name} {{ {listed} }}\n" if listed else "")


def interface(name: str) -> str:
    """Return an interface's name. Raises DataplaneError if it cannot be one."""
    if not _INTERFACE.fullmatch(name):
        raise DataplaneError(f"not an interface name: {name!r}")
    return name
