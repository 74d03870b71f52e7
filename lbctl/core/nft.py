"""The whole state of a node's two tables, and the steps from one to the next. Pure.

Rules:
- The chains and rules are `nftrules`'s. Text is for them and for small sets; the elements of the
  big maps go as netlink messages (`nfbatch`), and as text for tests and people only.
- Only numbers, addresses and checked interface names get into the text.
- Second chance: a packet of a flow that conntrack does not know here goes to the bucket's last
  owner (of TCP: of established flows alone), and the flow's conntrack entry remembers that: later
  changes of the table lead it through the same nodes. `spare` is for new flows that a node with
  another table sent here.
- ICMP errors go where the connection goes that they speak of, and there conntrack takes them to the
  pod.
- A change is a list of steps, each one transaction; a port's elements never span two. The last one
  writes the generation into the set `gen`: a kernel that shows it has all of it.

Source: nft(8), libnftables of nftables 1.0.6; FACTS.md, "Forwarding, tried beside real kube-proxy".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address
from typing import Final, TypeAlias

from lbctl.core import elements, maglev, nfbatch, nftsets
from lbctl.core.elements import WHOLE, Delta, PortKey, Value, deltas
from lbctl.core.model import Address, Network
from lbctl.core.names import MARK_BASE
from lbctl.core.nfbatch import PIECE, Batch
from lbctl.core.nftfamily import BUCKET_BASE, FAMILIES, Family, family_of
from lbctl.core.nftrules import limiter, refusals, skeleton
from lbctl.core.nftsets import Policy, interface, replaced
from lbctl.core.nodeview import PortElements
from lbctl.core.pmap import changed, persistent
from lbctl.errors import DataplaneError


class _Places(dict[int, str]):
    """How a key ends, by bucket; those of `sticky` are made when they are asked for."""

    def __missing__(self, place: int) -> str:
        return f" . {BUCKET_BASE + place:#x}"


_PLACES: Final = _Places({b: f" . {BUCKET_BASE + b:#x}" for b in range(maglev.SIZES[-1])})
_PLACES[WHOLE] = ""
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
COUNTED: Final = ("pingable", "restricted", *elements.PORT_MAPS, *elements.BUCKET_MAPS)
SetKey: TypeAlias = tuple[int, str]  # IP version, which is the table, and name of a set or map


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything that the kernel's tables hold, of both families.

    ranges: first and last address, both inclusive. sources: EIPs that not everyone may reach.
    policy: what else the rules follow. silent: the numbers of nodes that are called down.
    """

    generation: int = 0
    uplinks: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    ranges: tuple[tuple[Address, Address], ...] = ()
    ports: Mapping[PortKey, PortElements] = field(default_factory=dict)
    sources: Mapping[Address, tuple[Network, ...]] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    silent: tuple[int, ...] = ()


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


_CHAIN: Final = re.compile(r"^  chain (\w+) \{$", re.MULTILINE)
_TIMEOUT: Final = re.compile(r"^  ct timeout (\w+) \{$", re.MULTILINE)
Step: TypeAlias = str | Batch  # a transaction: text for nft, or messages


def steps(old: Ruleset | None, stages: Iterable[Ruleset], timeouts: bool = True) -> Iterator[Step]:
    """Yield the transactions that turn the kernel's `old` (None: whatever is there) into `stages`.

    stages: from None one or several, each with all that the one before has; else one. timeouts:
    whether the kernel takes `ct timeout` objects. Nothing if only the number differs. The
    generation is written by the last, and taken away by the first of several: tables that bear one
    are complete.
    """
    if old is None:
        # Until the last step, what has no entry yet is dropped and not reset: a sender repeats.
        before = Ruleset()
        text = removal() + "".join(skeleton(family, timeouts) for family in FAMILIES)
        for new in stages:
            text += "".join(_small_sets(before, new))
            if text:
                yield text
            yield from _batches(before, new)
            text, before = "", new
        yield "".join(map(refusals, FAMILIES))
        yield Batch([], nfbatch.mark(before.generation))
    else:
        for new in stages:
            yield from _guarded(old, new)


def _guarded(old: Ruleset, new: Ruleset) -> Iterator[Step]:
    """The change, in which source ranges are the last to go: they guard what goes with them."""
    gone = {a: old.sources[a] for a in changed(old.sources, new.sources) if a not in new.sources}
    if gone:
        # Nobody's generation: it is not complete yet.
        between = replace(new, generation=0, sources=persistent(new.sources).updated(gone))
        yield from _change(old, between)
        old = between
    yield from _change(old, new)


def _change(old: Ruleset, new: Ruleset) -> Iterator[Step]:
    small = "".join(_small_sets(old, new))
    batches = _batches(old, new)
    batch = next(batches, None)
    if small:
        yield small + _generation(new.generation, flush=True, add=batch is None)
    alone = not small
    while batch is not None:
        following = next(batches, None)
        if alone:
            batch.deleted[:0] = nfbatch.unmark()
        if following is None:
            batch.added += nfbatch.mark(new.generation)
        yield batch
        batch, alone = following, False


def _batches(old: Ruleset, new: Ruleset) -> Iterator[Batch]:
    yield from nfbatch.pieces(deltas(old.ports, new.ports))
    if old.silent != new.silent:
        yield nfbatch.silenced(old.silent, new.silent)


def full(rules: Ruleset) -> list[str]:
    """Return `steps` from nothing as text alone: for those who read it."""
    pieces = list(_pieces(deltas({}, rules.ports)))
    tables = "".join(map(skeleton, FAMILIES)) + _small_text(Ruleset(), rules)
    pieces = [removal() + tables + (pieces[0] if pieces else ""), *pieces[1:]]
    pieces[-1] += "".join(map(refusals, FAMILIES)) + _generation(rules.generation, flush=False)
    return pieces


def difference(old: Ruleset, new: Ruleset) -> list[str]:
    """Return `steps` as text alone."""
    small = _small_text(old, new)
    pieces = list(_pieces(deltas(old.ports, new.ports)))
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
    made = {(f.version, name): 0 for f in FAMILIES for name in COUNTED} | dict(counts)
    keys = changed(old.ports, new.ports)
    for rules, sign in ((old, -1), (new, 1)):
        for key in keys:
            port = rules.ports.get(key)
            if port is not None:
                version = key[0].version
                for name, number in elements.counts(port).items():
                    made[version, name] += sign * number
    for address in changed(old.sources, new.sources):
        made[address.version, "restricted"] += (address in new.sources) - (address in old.sources)
    was, now = old.policy.pingable, new.policy.pingable
    for address in changed(was, now):
        made[address.version, "pingable"] += (address in now) - (address in was)
    for family in FAMILIES:
        whole = {"uplinks": new.uplinks, "peers": new.peers, "silent": new.silent}
        made[family.version, "gen"] = 1
        made |= {(family.version, name): len(held) for name, held in whole.items()}
    return made


def renewed(rules: Ruleset) -> str:
    """Return the transaction that gives tables with these elements this version's chains.

    All is declared first, so that what is new has its place; then what an older version wrote is
    emptied and written anew. Elements and counters stay, and chains that are no more, unused; what
    an older version did not have (`homed`) is filled. nft refuses all of it if a set is not what it
    was.
    """
    text = ""
    for family in FAMILIES:
        declared = skeleton(family)
        text += declared
        for name in _CHAIN.findall(declared):
            text += f"flush chain {family.table} {name}\n"
        for name in _TIMEOUT.findall(declared):
            text += f"delete ct timeout {family.table} {name}\n"
        text += declared + limiter(family, rules.policy.new_flows) + refusals(family)
        mine = (key for key, port in rules.ports.items() if port.homed)
        text += replaced(
            family, "homed", (_prefix(k) for k in mine if k[0].version == family.version)
        )
    return text


@cache
def form() -> str:
    """Return what tells this version's tables, without elements, from another's."""
    return blake2b(renewed(Ruleset()).encode(), digest_size=8).hexdigest()


def removal() -> str:
    """Return the text that removes every trace, also if there is none."""
    return "".join(f"add table {f.table}\ndelete table {f.table}\n" for f in FAMILIES)


def _generation(number: int, *, flush: bool, add: bool = True) -> str:
    text = ""
    for family in FAMILIES:
        text += f"flush set {family.table} gen\n" if flush else ""
        text += f"add element {family.table} gen {{ {number & 0xFFFFFFFF:#010x} }}\n" if add else ""
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


def _small_text(old: Ruleset, new: Ruleset) -> str:
    text = "".join(_small_sets(old, new))
    if old.silent != new.silent:
        marks = [f"{MARK_BASE + number:#x}" for number in new.silent]
        text += "".join(replaced(family, "silent", marks) for family in FAMILIES)
    return text


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
_Entries = dict[str, list[str]]  # by table and map


def _pieces(changes: Iterable[Sequence[Delta]]) -> Iterator[str]:
    """Join changes into texts of about PIECE elements, never splitting a port."""
    deleted: _Entries = {}
    added: _Entries = {}
    count = 0
    for port in changes:
        if count >= PIECE:
            yield _text(deleted, added)
            deleted, added, count = {}, {}, 0
        for delta in port:
            _write(delta, deleted, added)
            count += delta.total
    if count:
        yield _text(deleted, added)


def _write(delta: Delta, deleted: _Entries, added: _Entries) -> None:
    place, prefix = f"{family_of(delta.key[0]).table} {delta.map}", _prefix(delta.key)
    gone = [prefix + _PLACES[bucket] for bucket in delta.gone]
    deleted.setdefault(place, []).extend(gone)
    fresh = [
        prefix + _PLACES[bucket] + _value(delta.values[place])
        for bucket, place in sorted(zip(delta.fresh, delta.places, strict=True))
    ]
    added.setdefault(place, []).extend(fresh)


def _prefix(key: PortKey) -> str:
    address, protocol, number = key
    return f"{address} . {protocol.lower()} . {number}"


def _text(deleted: _Entries, added: _Entries) -> str:
    parts = []
    for verb, lists in (("delete", deleted), ("add", added)):
        for place, entries in lists.items():
            if entries:
                parts.append(f"{verb} element {place} {{ {', '.join(entries)} }}\n")
    return "".join(parts)


def _value(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f" : jump {value}"
    if isinstance(value, int):
        return f" : {MARK_BASE + value:#x}"
    return f" : {value[0]} . {value[1]}"
