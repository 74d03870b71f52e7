"""Checks between parts of the configuration: duplicates, overlaps, addresses in two roles.

Rule: they run on whatever is readable, also when something else is wrong, so that a person repairs
the file once; what cannot be read is skipped, `config` says it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Final

from lbctl.core import config_values as values
from lbctl.core.config_values import AddressRange, show
from lbctl.core.model import Address
from lbctl.core.positions import Document, Loc, Problem

_SESSION: Final = ("address", "localAddress")
_VIRTUAL: Final = {4: 1 << 16, 6: 1 << 64}  # addresses that a range of virtual next hops has


def cross_checks(document: Document) -> list[Problem]:
    """Problems between parts of the file, in no particular order."""
    pools = _items(document.value, "pools")
    peers = _items(document.value, "bgp", "peers")
    ranges = _ranges(pools)
    return [
        *_duplicates(document, pools, "name", "pool"),
        *_duplicates(document, peers, "name", "peer"),
        *_peer_addresses(document, peers),
        *_empty(document, pools),
        *_overlaps(document, ranges),
        *_reservations(document, pools),
        *_inside_pools(document, peers, ranges),
        *_virtual(document, peers, ranges),
        *_duplicate_interfaces(document),
    ]


def _items(value: object, *path: str) -> list[tuple[Loc, dict[str, object]]]:
    """The mappings in the list at `path`, with their places; [] for anything unexpected."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, tuple):
        return []
    return [((*path, n), item) for n, item in enumerate(value) if isinstance(item, dict)]


def _duplicates(
    document: Document, items: list[tuple[Loc, dict[str, object]]], key: str, what: str
) -> list[Problem]:
    seen: dict[str, Loc] = {}
    problems = []
    for loc, item in items:
        value = item.get(key)
        if not isinstance(value, str):
            continue
        here = (*loc, key)
        first = seen.setdefault(value, here)
        if first != here:
            text = f"another {what} is called {show(value)} (line {document.mark(first).line})"
            problems.append(Problem(document.mark(here), here, text))
    return problems


def _peer_addresses(
    document: Document, peers: list[tuple[Loc, dict[str, object]]]
) -> list[Problem]:
    """Two sessions cannot lead to one address, nor a session from one family to the other."""
    seen: dict[Address, Loc] = {}
    problems = []
    for loc, peer in peers:
        address, local = _readable(peer.get("address")), _readable(peer.get("localAddress"))
        if address is None:
            continue
        here = (*loc, "address")
        first = seen.setdefault(address, here)
        if first != here:
            text = f"another peer has the address {address} (line {document.mark(first).line})"
            problems.append(Problem(document.mark(here), here, text))
        if local is not None and local.version != address.version:
            here = (*loc, "localAddress")
            text = f"{local} and the peer's {address} are of different families"
            problems.append(Problem(document.mark(here), here, text))
    return problems


def _readable(value: object) -> Address | None:
    try:
        return values.parse_address(value)
    except ValueError:
        return None


def _duplicate_interfaces(document: Document) -> list[Problem]:
    section = document.value.get("forwarding") if isinstance(document.value, dict) else None
    names = section.get("interfaces") if isinstance(section, dict) else None
    if not isinstance(names, tuple):
        return []
    return [
        Problem(document.mark(loc), loc, f"the interface {show(name)} is there twice")
        for n, name in enumerate(names)
        if isinstance(name, str) and name in names[:n]
        for loc in [("forwarding", "interfaces", n)]
    ]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A range of a pool and where it is written."""

    part: AddressRange
    pool: str
    loc: Loc
    text: str

    def __str__(self) -> str:
        return f"{self.text} of pool {self.pool}"


def _ranges(pools: list[tuple[Loc, dict[str, object]]]) -> list[_Placed]:
    placed = []
    for loc, pool in pools:
        addresses = pool.get("addresses")
        for n, text in enumerate(addresses if isinstance(addresses, tuple) else ()):
            part = _readable_range(text)
            if part is None:
                continue
            name = str(pool.get("name"))
            shown = name if values.is_label(name) else show(name)
            placed.append(_Placed(part, shown, (*loc, "addresses", n), str(text).strip()))
    return sorted(placed, key=lambda p: (p.part.version, int(p.part.first), p.loc[1], p.loc[3]))


def _overlaps(document: Document, ranges: list[_Placed]) -> list[Problem]:
    """Each range that meets an earlier one (sorted by first address), said at the later place."""
    problems = []
    widest: _Placed | None = None
    for found in ranges:
        if widest is not None and widest.part.overlaps(found.part):
            one, two = sorted((widest, found), key=lambda p: document.mark(p.loc))
            text = f"{two} overlaps {one} (line {document.mark(one.loc).line})"
            problems.append(Problem(document.mark(two.loc), two.loc, text))
        if (
            widest is None
            or widest.part.version != found.part.version
            or int(found.part.last) > int(widest.part.last)
        ):
            widest = found
    return problems


def _empty(document: Document, pools: list[tuple[Loc, dict[str, object]]]) -> list[Problem]:
    text = "must not be empty"
    return [
        Problem(document.mark((*loc, "addresses")), (*loc, "addresses"), text)
        for loc, pool in pools
        if pool.get("addresses") == () and pool.get("release") is not True
    ]


def _reservations(document: Document, pools: list[tuple[Loc, dict[str, object]]]) -> list[Problem]:
    """Reserved addresses lie in their pool, once; an owner has at most one of each family."""
    found: list[Problem] = []
    placed: list[_Placed] = []
    owners: dict[tuple[object, int], Loc] = {}
    for loc, pool in pools:
        own = [_readable_range(text) for text in _list(pool.get("addresses"))]
        for n, entry in enumerate(_list(pool.get("reserved"))):
            here: Loc = (*loc, "reserved", n)
            given: Any = entry if isinstance(entry, dict) else {"address": entry}
            part = _readable_range(given.get("address"))
            if part is None:
                continue
            if not any(r is not None and part.first in r and part.last in r for r in own):
                text = f"{part} is not in the addresses of the pool"
                found.append(Problem(document.mark(here), here, text))
            placed.append(_Placed(part, str(pool.get("name")), here, str(part)))
            owner = given.get("owner")
            first = owners.setdefault((owner, part.version), here) if owner is not None else here
            if first != here:
                line = document.mark(first).line
                text = f"{owner} has a reserved IPv{part.version} address already (line {line})"
                found.append(Problem(document.mark(here), here, text))
    placed.sort(key=lambda p: (p.part.version, int(p.part.first), p.loc[1], p.loc[3]))
    return found + _overlaps(document, placed)


def _list(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _readable_range(text: object) -> AddressRange | None:
    try:
        return values.parse_range(text)
    except ValueError:
        return None


def _virtual(
    document: Document, peers: list[tuple[Loc, dict[str, object]]], pools: list[_Placed]
) -> list[Problem]:
    """Virtual next hops are nobody's addresses, and so many that two hashes hardly ever meet."""
    value = document.value.get("announce") if isinstance(document.value, dict) else None
    section: dict[str, object] = value if isinstance(value, dict) else {}
    ranges = [_readable_range(text) for text in _list(section.get("virtualNextHops"))]
    found: list[tuple[Loc, str]] = []
    if section.get("nextHop") == "recursive":
        if not ranges:
            found.append((("nextHop",), "recursive needs virtualNextHops, a range that is unused"))
        if section.get("paths") == "perManager":
            found.append((("nextHop",), "recursive needs paths: addPath"))
    addresses = [_readable(peer.get(key)) for _, peer in peers for key in _SESSION]
    for n, part in enumerate(ranges):
        if part is None:
            continue
        here: Loc = ("virtualNextHops", n)
        if any(other is not None and other.version == part.version for other in ranges[:n]):
            found.append((here, f"there is an IPv{part.version} range already"))
        if part.size < _VIRTUAL[part.version]:
            found.append((here, f"{part} is too small: IPv4 needs a /16, IPv6 a /64"))
        found += [(here, f"{part} overlaps {pool}") for pool in pools if pool.part.overlaps(part)]
        found += [(here, f"{part} holds the session's {a}") for a in addresses if a and a in part]
    places = [(("announce", *loc), text) for loc, text in found]
    return [Problem(document.mark(loc), loc, text) for loc, text in places]


def _inside_pools(
    document: Document, peers: list[tuple[Loc, dict[str, object]]], ranges: list[_Placed]
) -> list[Problem]:
    starts = [(found.part.version, int(found.part.first)) for found in ranges]
    problems: list[Problem] = []
    for loc, peer in peers:
        for key in _SESSION:
            address = _readable(peer.get(key))
            if address is None:
                continue
            at = bisect_right(starts, (address.version, int(address))) - 1
            if at >= 0 and address in ranges[at].part:
                here: Loc = (*loc, key)
                text = f"{address} lies in {ranges[at]}, which EIPs come from"
                problems.append(Problem(document.mark(here), here, text))
    return problems
