"""The nftables text of a node's forwarding. Pure: what goes in is data, what comes out is text.

Rules:
- The chains and rules are `nftrules`'s; here are the elements, and what changes between two states.
- Only numbers, addresses and checked interface names get into the text.
- Second chance: a packet of an established flow that conntrack does not know here goes to the
  bucket's last owner, and the flow's conntrack entry remembers that: later changes of the table
  lead it through the same nodes. `late` is for new flows that a node with an older table sent here.
- ICMP errors go where the connection goes that they speak of, and there conntrack takes them to the
  pod.
- A change is a list of pieces, each one transaction; an EIP's elements never span two pieces. The
  last piece writes the generation into the set `gen`: a kernel that shows it has all of it.

Source: nft(8), libnftables of nftables 1.0.6; FACTS.md, "Forwarding, tried beside real kube-proxy".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, TypeAlias

from lbctl.core import maglev, nftsets
from lbctl.core.model import Address, Network
from lbctl.core.names import MARK_BASE
from lbctl.core.nftrules import (
    BUCKET_BASE,
    FAMILIES,
    Family,
    family_of,
    hash_chain,
    refusals,
    skeleton,
)
from lbctl.core.nftsets import Policy, interface, replaced
from lbctl.core.nodeview import PortElements
from lbctl.core.pmap import changed
from lbctl.errors import DataplaneError

_BUCKETS: Final = tuple(f" . {BUCKET_BASE + bucket:#x}" for bucket in range(maglev.SIZES[-1]))
PIECE: Final = 20_000  # map elements of one transaction: nft takes about 2 KiB for each
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
PortKey: TypeAlias = tuple[Address, str, int]
SetKey: TypeAlias = tuple[int, str]  # IP version, which is the table, and name of a set or map


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything that the kernel's tables hold, of both families.

    ranges: first and last address, both inclusive. sources: EIPs that not everyone may reach.
    policy: what else the rules follow.
    """

    generation: int = 0
    uplinks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    ranges: tuple[tuple[Address, Address], ...] = ()
    ports: Mapping[PortKey, PortElements] = field(default_factory=dict)
    sources: Mapping[Address, tuple[Network, ...]] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)


def merged(
    spans: Iterable[tuple[Address, Address]], without: Iterable[Address] = ()
) -> tuple[tuple[Address, Address], ...]:
    """Return spans sorted, joined where they touch, with holes at the addresses `without`."""
    given, holes = list(spans), list(without)
    return tuple(
        (_address(family, first), _address(family, last))
        for family in FAMILIES
        for first, last in _joined(
            [(int(a), int(b)) for a, b in given if a.version == family.version],
            {int(a) for a in holes if a.version == family.version},
        )
    )


def _joined(spans: list[tuple[int, int]], holes: set[int]) -> list[list[int]]:
    joined: list[list[int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            joined[-1][1] = max(joined[-1][1], last)
        else:
            joined.append([first, last])
    for hole in sorted(holes):
        joined = [part for first, last in joined for part in _cut(first, last, hole)]
    return joined


def _cut(first: int, last: int, hole: int) -> list[list[int]]:
    if not first <= hole <= last:
        return [[first, last]]
    return [[a, b] for a, b in ((first, hole - 1), (hole + 1, last)) if a <= b]


def _address(family: Family, value: int) -> Address:
    return IPv4Address(value) if family.version == 4 else IPv6Address(value)


def full(rules: Ruleset) -> list[str]:
    """Return the pieces that make the table anew, whatever was there.

    Until the last piece is in, what has no entry yet is dropped and not reset: a sender repeats.
    """
    first = removal() + "".join(map(skeleton, FAMILIES)) + "".join(_small_sets(Ruleset(), rules))
    pieces = list(_pieces(_added(rules.ports)))
    pieces = [first + (pieces[0] if pieces else ""), *pieces[1:]]
    pieces[-1] += "".join(map(refusals, FAMILIES)) + _generation(rules.generation, flush=False)
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


def reshapes(old: Ruleset, new: Ruleset) -> bool:
    """Whether the change writes rules, so that the kernel numbers them anew."""
    return old.policy.new_flows != new.policy.new_flows


def totals(rules: Ruleset) -> dict[SetKey, int]:
    """Return how many elements each set and map has, but for the intervals of `ranges`."""
    return recounted({}, Ruleset(), rules)


def recounted(counts: Mapping[SetKey, int], old: Ruleset, new: Ruleset) -> dict[SetKey, int]:
    """Return the totals of `new`, given those of `old`: the cost is that of their difference."""
    made = {(f.version, name): 0 for f in FAMILIES for name in _COUNTED} | dict(counts)
    keys = changed(old.ports, new.ports)
    for rules, sign in ((old, -1), (new, 1)):
        for key in keys:
            port = rules.ports.get(key)
            if port is not None:
                for name, number in _counts(port).items():
                    made[key[0].version, name] += sign * number
    for address in changed(old.sources, new.sources):
        made[address.version, "restricted"] += (address in new.sources) - (address in old.sources)
    was, now = old.policy.pingable, new.policy.pingable
    for address in changed(was, now):
        made[address.version, "pingable"] += (address in now) - (address in was)
    for family in FAMILIES:
        whole = {"gen": 1, "uplinks": len(new.uplinks), "peers": len(new.peers)}
        made |= {(family.version, name): number for name, number in whole.items()}
    return made


def _counts(port: PortElements) -> dict[str, int]:
    return {
        "closed": int(port.closed),
        "svc": 1,
        "past": 1,
        **{name: len(getattr(port, name)) for name, _ in _MAPS},
    }


def removal() -> str:
    """Return the text that removes every trace, also if there is none."""
    return "".join(f"add table {f.table}\ndelete table {f.table}\n" for f in FAMILIES)


def _generation(number: int, flush: bool) -> str:
    text = ""
    for family in FAMILIES:
        text += f"flush set {family.table} gen\n" if flush else ""
        text += f"add element {family.table} gen {{ {number & 0xFFFFFFFF:#010x} }}\n"
    return text


def _small_sets(old: Ruleset, new: Ruleset) -> Iterator[str]:
    for family in FAMILIES:
        if old.uplinks != new.uplinks:
            yield replaced(family, "uplinks", (f'"{interface(name)}"' for name in new.uplinks))
        if old.peers != new.peers:
            yield replaced(family, "peers", (_mac(text) for text in new.peers))
        was, now = (
            [(a, b) for a, b in rules.ranges if a.version == family.version] for rules in (old, new)
        )
        if was != now:
            spans = (f"{a}-{b}" if a != b else str(a) for a, b in now)
            yield replaced(family, "ranges", spans)
    yield from _restrictions(old.sources, new.sources)
    yield from nftsets.changes(old.policy, new.policy)


def _restrictions(
    old: Mapping[Address, tuple[Network, ...]], new: Mapping[Address, tuple[Network, ...]]
) -> Iterator[str]:
    """The elements of the EIPs whose source ranges differ; what was goes first."""
    differ = [a for a in changed(old, new) if old.get(a) != new.get(a)]
    for family in FAMILIES:
        touched = sorted((a for a in differ if a.version == family.version), key=int)
        for verb, held, other in (("delete", old, new), ("add", new, old)):
            entries = [f"{a} . {network}" for a in touched for network in held.get(a, ())]
            if entries:
                yield f"{verb} element {family.table} sources {{ {', '.join(entries)} }}\n"
            listed = [str(a) for a in touched if a in held and a not in other]
            if listed:
                yield f"{verb} element {family.table} restricted {{ {', '.join(listed)} }}\n"


def _mac(text: str) -> str:
    if not _MAC.fullmatch(text):
        raise DataplaneError(f"not a MAC address: {text!r}")
    return text


# -- elements ------------------------------------------------------------------------------------
_Change = tuple[Address, str, list[str], list[str]]  # EIP, map, keys to delete, entries to add
_Entries = dict[str, list[str]]  # by table and map


def _pieces(changes: Iterable[_Change]) -> Iterator[str]:
    """Join changes into texts of about PIECE elements, never splitting an EIP."""
    deleted: _Entries = {}
    added: _Entries = {}
    count, last = 0, None
    for address, name, gone, new in changes:
        if count >= PIECE and address != last:
            yield _text(deleted, added)
            deleted, added, count = {}, {}, 0
        place = f"{family_of(address).table} {name}"
        deleted.setdefault(place, []).extend(gone)
        added.setdefault(place, []).extend(new)
        count += len(gone) + len(new)
        last = address
    if count:
        yield _text(deleted, added)


def _text(deleted: _Entries, added: _Entries) -> str:
    parts = []
    for verb, lists in (("delete", deleted), ("add", added)):
        for place, entries in lists.items():
            if entries:
                parts.append(f"{verb} element {place} {{ {', '.join(entries)} }}\n")
    return "".join(parts)


def _added(ports: Mapping[PortKey, PortElements]) -> Iterator[_Change]:
    return _changes({}, ports)


def _changes(
    old: Mapping[PortKey, PortElements],
    new: Mapping[PortKey, PortElements],
) -> Iterator[_Change]:
    for key in sorted(changed(old, new), key=lambda k: (k[0].version, int(k[0]), k[1], k[2])):
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

_COUNTED: Final = ("closed", "past", "pingable", "restricted", "svc", *(name for name, _ in _MAPS))


def _chain_of(port: PortElements | None) -> str:
    return hash_chain(port.size, port.by_client) if port else ""


def _past_chain_of(port: PortElements | None) -> str:
    return hash_chain(port.past, port.by_client) if port else ""
