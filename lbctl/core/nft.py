"""The nftables text of a node's forwarding. Pure: what goes in is data, what comes out is text.

Rules:
- One table, `ip lbctl`; a handful of chains whatever the number of Services; everything that grows
  is an element of a flat map, keyed `address . protocol . port . bucket`.
- Only numbers, addresses and checked interface names get into the text.
- Hooks: raw prerouting steers (before conntrack), mangle - 5 gives the second chance, dstnat - 5
  delivers before kube-proxy, dstnat + 5 clears the bucket's mark. Nothing for a pool's address is
  ever routed on unsteered or given to a host socket.
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
from lbctl.core.names import MARK_BASE, MARK_MASK, NFT_TABLE
from lbctl.core.nodeview import PortElements
from lbctl.core.pmap import changed
from lbctl.errors import DataplaneError

BUCKET_BASE: Final = MARK_BASE + 0x10000  # marks that live for a few hooks only
_BUCKETS: Final = tuple(f" . {BUCKET_BASE + bucket:#x}" for bucket in range(maglev.SIZES[-1]))
PIECE: Final = 20_000  # map elements of one transaction: nft takes about 2 KiB for each
# A hand-over follows a flow's own history (conntrack's mark), so it cannot circle unless a node has
# lost its entries; then this bounds it.
HANDOVER_TTL: Final = 8
COUNTERS: Final = ("steered", "delivered", "second_chance", "refused", "stray")
_TABLE: Final = f"ip {NFT_TABLE}"
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.@:-]{1,15}")
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_KEY: Final = "ip daddr . meta l4proto . th dport"
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
    first = f"add table {_TABLE}\ndelete table {_TABLE}\n{skeleton()}"
    first += "".join(_small_sets(Ruleset(), rules))
    pieces = list(_pieces(_added(rules.ports)))
    pieces = [first + (pieces[0] if pieces else ""), *pieces[1:]]
    pieces[-1] += _refusals() + _generation(rules.generation, flush=False)
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


# -- rules ---------------------------------------------------------------------------------------
def _chain_of(port: PortElements | None) -> str:
    return _hash_chain(port.size, port.by_client) if port else ""


def _past_chain_of(port: PortElements | None) -> str:
    return _hash_chain(port.past, port.by_client) if port else ""


def _hash_chain(size: int, by_client: bool) -> str:
    return f"{'client' if by_client else 'flow'}{size}"


def _hash_chains() -> str:
    lines = []
    for size in maglev.SIZES:
        for by_client in (False, True):
            what = "ip saddr" if by_client else "ip saddr . th sport"
            lines.append(
                f"  chain {_hash_chain(size, by_client)} {{\n    meta mark set jhash {what}"
                f" mod {size} seed {maglev.SEED:#x} offset {BUCKET_BASE:#x}\n  }}\n"
            )
    return "".join(lines)


def _refusals() -> str:
    """The rules that answer instead of dropping; `refuse` ends in a drop from the start."""
    chain = f"insert rule {_TABLE} refuse"
    # Inserted one before the other: read them from the last to the first.
    return (
        f"{chain} meta l4proto udp reject with icmp type port-unreachable\n"
        f"{chain} meta l4proto tcp reject with tcp reset\n"
        f"{chain} limit rate over 500/second burst 500 packets drop\n"
        f"{chain} counter name refused\n"
    )


_NODE: Final = f"meta mark & {MARK_MASK:#x} == {MARK_BASE:#x}"
_NOT_NODE: Final = f"meta mark & {MARK_MASK:#x} != {MARK_BASE:#x}"
_BUCKET: Final = f"meta mark & {MARK_MASK:#x} == {BUCKET_BASE:#x}"


def skeleton() -> str:
    """Return the table without elements: sets, maps, chains and rules."""
    counters = "".join(f"  counter {name} {{ }}\n" for name in COUNTERS)
    parts = (counters, _sets(), _hash_chains(), _steering(), _chance(), _delivery(), _guards())
    return f"table {_TABLE} {{\n" + "".join(parts) + "}\n"


def _sets() -> str:
    key = "ipv4_addr . inet_proto . inet_service"
    return f"""  set gen {{ type mark; }}
  set uplinks {{ type ifname; }}
  set peers {{ type ether_addr; }}
  set ranges {{ type ipv4_addr; flags interval; }}
  set restricted {{ type ipv4_addr; }}
  set sources {{ type ipv4_addr . ipv4_addr; flags interval; }}
  set closed {{ type {key}; }}
  map svc {{ type {key} : verdict; }}
  map past {{ type {key} : verdict; }}
  map steer {{ type {key} . mark : mark; }}
  map prev {{ type {key} . mark : mark; }}
  map deliver {{ type {key} . mark : ipv4_addr . inet_service; }}
  map late {{ type {key} . mark : ipv4_addr . inet_service; }}
"""


def _steering() -> str:
    """From outside: refuse, or find the bucket, and mark and untrack what is another node's."""
    return f"""  chain refuse {{
    drop
  }}
  chain outside {{
    ip daddr @restricted ip daddr . ip saddr != @sources counter name refused drop
    icmp type {{ destination-unreachable, time-exceeded, parameter-problem }} accept
    tcp flags & (fin|syn|rst|ack) == syn {_KEY} @closed goto refuse
    meta l4proto udp {_KEY} @closed goto refuse
    {_KEY} vmap @svc
    meta mark 0 goto refuse
    meta mark set {_KEY} . meta mark map @steer counter name steered notrack accept
    meta mark set 0
  }}
  chain ingress {{
    type filter hook prerouting priority raw; policy accept;
    iifname != @uplinks accept
    ip daddr != @ranges accept
    meta mark set 0
    ether saddr @peers accept
    goto outside
  }}
"""


def _chance() -> str:
    """Established flows that conntrack does not know here go to their last owner."""
    return f"""  chain handover {{
    ip ttl > {HANDOVER_TTL} ip ttl set {HANDOVER_TTL}
    ct mark set meta mark
    counter name second_chance accept
  }}
  chain lookup {{
    ct mark & {MARK_MASK:#x} == {MARK_BASE:#x} meta mark set ct mark goto handover
    tcp flags & (syn|rst) != 0 accept
    {_KEY} vmap @past
    meta mark set {_KEY} . meta mark map @prev goto handover
    meta mark set 0
  }}
  chain chance {{
    type filter hook prerouting priority mangle - 5; policy accept;
    iifname @uplinks ip daddr @ranges meta l4proto tcp ct state new goto lookup
  }}
"""


def _delivery() -> str:
    """Buckets of ours: to the pod, before kube-proxy; then the bucket's mark goes."""
    return f"""  chain deliver_new {{
    {_NODE} dnat to ip daddr
    {_KEY} vmap @svc
    meta l4proto {{ tcp, udp }} counter name delivered dnat ip to {_KEY} . meta mark map @deliver
    {_KEY} vmap @past
    tcp flags & (fin|syn|rst|ack) == syn dnat ip to {_KEY} . meta mark map @late
    meta l4proto udp dnat ip to {_KEY} . meta mark map @late
    counter name stray drop
  }}
  chain delivery {{
    type nat hook prerouting priority dstnat - 5; policy accept;
    iifname @uplinks ip daddr @ranges goto deliver_new
  }}
  chain cleanup {{
    type filter hook prerouting priority dstnat + 5; policy accept;
    {_BUCKET} meta mark set 0
  }}
"""


def _guards() -> str:
    """Nothing for the pools is routed on or reaches the host; no ICMP redirects about our hops."""
    return f"""  chain onward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname @uplinks ip daddr @ranges {_NOT_NODE} counter name stray drop
  }}
  chain host {{
    type filter hook input priority filter - 5; policy accept;
    iifname @uplinks ip daddr @ranges counter name stray drop
  }}
  chain redirects {{
    type filter hook output priority filter; policy accept;
    icmp type redirect drop
  }}
"""
