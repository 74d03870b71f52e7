"""The nftables text of a node's forwarding. Pure: what goes in is data, what comes out is text.

Rules:
- The chains and rules are `nftrules`'s; here are the elements, and what changes between two states.
- Only numbers, addresses and checked interface names get into the text.
- Second chance: a packet of an established flow that conntrack does not know here goes to the
  bucket's last owner, and the flow's conntrack entry remembers that: later changes of the table
  lead it through the same nodes. `late` is for new flows that a node with an older table sent here.
- ICMP errors go to conntrack: on the node that has the flow they reach the pod, elsewhere they end.
- A change is a list of pieces, each one transaction; an EIP's elements never span two pieces. The
  last piece writes the generation into the set `gen`: a kernel that shows it has all of it.

Source: nft(8), libnftables of nftables 1.0.6; FACTS.md, "Forwarding, tried beside real kube-proxy".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, Final, TypeAlias

from lbctl.core import maglev
from lbctl.core.model import Address, Network
from lbctl.core.names import MARK_BASE
from lbctl.core.nftrules import BUCKET_BASE, V4, hash_chain, refusals, skeleton
from lbctl.core.nodeview import PortElements
from lbctl.core.pmap import changed
from lbctl.errors import DataplaneError

_BUCKETS: Final = tuple(f" . {BUCKET_BASE + bucket:#x}" for bucket in range(maglev.SIZES[-1]))
PIECE: Final = 20_000  # map elements of one transaction: nft takes about 2 KiB for each
_TABLE: Final = V4.table
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.@:-]{1,15}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
PortKey: TypeAlias = tuple[Address, str, int]


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything that the kernel's table holds.

    ranges: first and last address, both inclusive. sources: EIPs that not everyone may reach.
    """

    generation: int = 0
    uplinks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    ranges: tuple[tuple[Address, Address], ...] = ()
    ports: Mapping[PortKey, PortElements] = field(default_factory=dict)
    sources: Mapping[Address, tuple[Network, ...]] = field(default_factory=dict)


def merged(
    spans: Iterable[tuple[Address, Address]], without: Iterable[Address] = ()
) -> tuple[tuple[Address, Address], ...]:
    """Return IPv4 spans sorted, joined where they touch, with holes at the addresses `without`."""
    joined: list[list[int]] = []
    for first, last in sorted((int(a), int(b)) for a, b in spans if a.version == 4):
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    for hole in sorted({int(a) for a in without if a.version == 4}):
        joined = [part for first, last in joined for part in _cut(first, last, hole)]
    return tuple((_v4(first), _v4(last)) for first, last in joined)


def _cut(first: int, last: int, hole: int) -> list[list[int]]:
    if not first <= hole <= last:
        return [[first, last]]
    return [[a, b] for a, b in ((first, hole - 1), (hole + 1, last)) if a <= b]


def _v4(value: int) -> Address:
    return IPv4Address(value)


def full(rules: Ruleset) -> list[str]:
    """Return the pieces that make the table anew, whatever was there.

    Until the last piece is in, what has no entry yet is dropped and not reset: a sender repeats.
    """
    first = f"add table {_TABLE}\ndelete table {_TABLE}\n{skeleton(V4)}"
    first += "".join(_small_sets(Ruleset(), rules))
    pieces = list(_pieces(_added(rules.ports)))
    pieces = [first + (pieces[0] if pieces else ""), *pieces[1:]]
    pieces[-1] += refusals(V4) + _generation(rules.generation, flush=False)
    return pieces


def difference(old: Ruleset, new: Ruleset) -> list[str]:
    """Return the pieces that turn the kernel's `old` into `new`; [] if only the number differs."""
    small = "".join(_small_sets(old, new))
    pieces = list(_pieces(_changes(old.ports, new.ports)))
    if small:
        pieces = [small + (pieces[0] if pieces else ""), *pieces[1:]]
    if pieces:
        pieces[-1] += _generation(new.generation, flush=True)
    return pieces


def totals(rules: Ruleset) -> dict[str, int]:
    """Return how many elements each set and map has, but for the intervals of `ranges`."""
    return recounted({}, Ruleset(), rules)


def recounted(counts: Mapping[str, int], old: Ruleset, new: Ruleset) -> dict[str, int]:
    """Return the totals of `new`, given those of `old`: the cost is that of their difference."""
    made = {name: counts.get(name, 0) for name in _COUNTED}
    for rules, keys, sign in (
        (old, changed(old.ports, new.ports), -1),
        (new, changed(old.ports, new.ports), 1),
    ):
        for key in keys:
            port = rules.ports.get(key)
            if port is not None and key[0].version == 4:
                for name, number in _counts(port).items():
                    made[name] += sign * number
    for address in changed(old.sources, new.sources):
        if address.version == 4:
            made["restricted"] += (address in new.sources) - (address in old.sources)
    return {**made, "gen": 1, "uplinks": len(new.uplinks), "peers": len(new.peers)}


def _counts(port: PortElements) -> dict[str, int]:
    return {
        "closed": int(port.closed),
        "svc": 1,
        "past": 1,
        **{name: len(getattr(port, name)) for name, _ in _MAPS},
    }


def removal() -> str:
    """Return the text that removes every trace, also if there is none."""
    return f"add table {_TABLE}\ndelete table {_TABLE}\n"


def _generation(number: int, flush: bool) -> str:
    text = f"flush set {_TABLE} gen\n" if flush else ""
    return f"{text}add element {_TABLE} gen {{ {number & 0xFFFFFFFF:#010x} }}\n"


def _small_sets(old: Ruleset, new: Ruleset) -> Iterator[str]:
    if old.uplinks != new.uplinks:
        yield _replaced("uplinks", (f'"{_interface(name)}"' for name in new.uplinks))
    if old.peers != new.peers:
        yield _replaced("peers", (_mac(text) for text in new.peers))
    if old.ranges != new.ranges:
        spans = (f"{a}-{b}" if a != b else str(a) for a, b in new.ranges)
        yield _replaced("ranges", spans)

    yield from _restrictions(old.sources, new.sources)


def _restrictions(
    old: Mapping[Address, tuple[Network, ...]], new: Mapping[Address, tuple[Network, ...]]
) -> Iterator[str]:
    """The elements of the EIPs whose source ranges differ; what was goes first."""
    touched = sorted(
        a for a in changed(old, new) if isinstance(a, IPv4Address) and old.get(a) != new.get(a)
    )
    for verb, held, other in (("delete", old, new), ("add", new, old)):
        entries = [f"{a} . {network}" for a in touched for network in held.get(a, ())]
        if entries:
            yield f"{verb} element {_TABLE} sources {{ {', '.join(entries)} }}\n"
        listed = [str(a) for a in touched if a in held and a not in other]
        if listed:
            yield f"{verb} element {_TABLE} restricted {{ {', '.join(listed)} }}\n"


def _replaced(name: str, entries: Iterable[str]) -> str:
    listed = ", ".join(entries)
    text = f"flush set {_TABLE} {name}\n"
    return text + (f"add element {_TABLE} {name} {{ {listed} }}\n" if listed else "")


def _interface(name: str) -> str:
    if not _INTERFACE.fullmatch(name):
        raise DataplaneError(f"not an interface name: {name!r}")
    return name


def _mac(text: str) -> str:
    if not _MAC.fullmatch(text):
        raise DataplaneError(f"not a MAC address: {text!r}")
    return text


# -- elements ------------------------------------------------------------------------------------
_Change = tuple[Address, str, list[str], list[str]]  # EIP, map, keys to delete, entries to add


def _pieces(changes: Iterable[_Change]) -> Iterator[str]:
    """Join changes into texts of about PIECE elements, never splitting an EIP."""
    deleted: dict[str, list[str]] = {}
    added: dict[str, list[str]] = {}
    count, last = 0, None
    for address, name, gone, new in changes:
        if count >= PIECE and address != last:
            yield _text(deleted, added)
            deleted, added, count = {}, {}, 0
        deleted.setdefault(name, []).extend(gone)
        added.setdefault(name, []).extend(new)
        count += len(gone) + len(new)
        last = address
    if count:
        yield _text(deleted, added)


def _text(deleted: dict[str, list[str]], added: dict[str, list[str]]) -> str:
    parts = []
    for verb, lists in (("delete", deleted), ("add", added)):
        for name, entries in lists.items():
            if entries:
                parts.append(f"{verb} element {_TABLE} {name} {{ {', '.join(entries)} }}\n")
    return "".join(parts)


def _added(ports: Mapping[PortKey, PortElements]) -> Iterator[_Change]:
    return _changes({}, ports)


def _changes(
    old: Mapping[PortKey, PortElements],
    new: Mapping[PortKey, PortElements],
) -> Iterator[_Change]:
    for key in sorted(changed(old, new), key=lambda k: (int(k[0]), k[1], k[2])):
        if key[0].version == 4:
            yield from _port_changes(key, old.get(key), new.get(key))


def _port_changes(
    key: PortKey, old: PortElements | None, new: PortElements | None
) -> Iterator[_Change]:
    address, protocol, number = key
    prefix = f"{address} . {protocol.lower()} . {number}"
    for name, write in _MAPS:
        was: Mapping[int, Any] = getattr(old, name) if old else {}
        now: Mapping[int, Any] = getattr(new, name) if new else {}
        if was is not now:
            gone = [prefix + _BUCKETS[b] for b, value in was.items() if now.get(b) != value]
            differ = [(b, value) for b, value in now.items() if was.get(b) != value]
            # Few targets have many buckets: each is written once.
            targets = {id(value): value for _, value in differ}
            texts = {number: f" : {write(value)}" for number, value in targets.items()}
            fresh = [prefix + _BUCKETS[b] + texts[id(value)] for b, value in differ]
            if gone or fresh:
                yield address, name, gone, fresh
    yield from _whole(address, prefix, old, new)


def _whole(
    address: Address, prefix: str, old: PortElements | None, new: PortElements | None
) -> Iterator[_Change]:
    """The changes of the maps that have one element for a port."""
    for name, chain_of in (("svc", _chain_of), ("past", _past_chain_of)):
        was, now = chain_of(old), chain_of(new)
        if was != now:
            yield address, name, [prefix] if was else [], [f"{prefix} : jump {now}"] if now else []
    closed, closes = old is not None and old.closed, new is not None and new.closed
    if closed != closes:
        yield address, "closed", [prefix] if closed else [], [prefix] if closes else []


def _node_mark(index: int) -> str:
    return f"{MARK_BASE + index:#x}"


def _pod(target: tuple[Address, int]) -> str:
    return f"{target[0]} . {target[1]}"


_MAPS: Final[tuple[tuple[str, Callable[[Any], str]], ...]] = (
    ("deliver", _pod),
    ("late", _pod),
    ("prev", _node_mark),
    ("steer", _node_mark),
)

_COUNTED: Final = ("closed", "past", "restricted", "svc", *(name for name, _ in _MAPS))


def _chain_of(port: PortElements | None) -> str:
    return hash_chain(port.size, port.by_client) if port else ""


def _past_chain_of(port: PortElements | None) -> str:
    return hash_chain(port.past, port.by_client) if port else ""
