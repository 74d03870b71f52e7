"""The tables without elements: sets, maps, chains and rules, one text for both address families.

Rules:
- Two tables of the same shape, `ip lbctl` and `ip6 lbctl`. What differs between them is a field of
  `Family`; nothing else here asks for the version.
- A handful of chains whatever the number of Services; everything that grows is an element of a flat
  map, keyed `address . protocol . port . bucket`.
- Hooks: raw prerouting steers (before conntrack), mangle - 5 gives the second chance, dstnat - 5
  delivers before kube-proxy, dstnat + 5 clears the bucket's mark. Nothing for a pool's address is
  ever routed on unsteered or given to a host socket.

Source: nft(8), libnftables of nftables 1.0.6; FACTS.md, "Forwarding, tried beside real kube-proxy".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lbctl.core import maglev
from lbctl.core.model import Address
from lbctl.core.names import MARK_BASE, MARK_MASK, NFT_TABLE

BUCKET_BASE: Final = MARK_BASE + 0x1000000  # marks that live for a few hooks only
# A hand-over follows a flow's own history (conntrack's mark), so it cannot circle unless a node has
# lost its entries; then this bounds it.
HANDOVER_TTL: Final = 8
COUNTERS: Final = ("steered", "delivered", "second_chance", "refused", "stray")

_NODE: Final = f"meta mark & {MARK_MASK:#x} == {MARK_BASE:#x}"
_NOT_NODE: Final = f"meta mark & {MARK_MASK:#x} != {MARK_BASE:#x}"
_BUCKET: Final = f"meta mark & {MARK_MASK:#x} == {BUCKET_BASE:#x}"


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the tables of IPv4 and IPv6, in nft's words.

    ip: the header's keyword. address: the type of an address. icmp: the protocol's keyword. hops:
    the header field that each router lowers. errors, redirect: ICMP types.
    """

    version: int
    ip: str
    address: str
    icmp: str
    hops: str
    errors: str
    redirect: str

    @property
    def table(self) -> str:
        """The table's family and name."""
        return f"{self.ip} {NFT_TABLE}"

    @property
    def key(self) -> str:
        """What of a packet says which EIP:protocol:port it is for."""
        return f"{self.ip} daddr . meta l4proto . th dport"


V4: Final = Family(
    version=4,
    ip="ip",
    address="ipv4_addr",
    icmp="icmp",
    hops="ttl",
    errors="destination-unreachable, time-exceeded, parameter-problem",
    redirect="redirect",
)
V6: Final = Family(
    version=6,
    ip="ip6",
    address="ipv6_addr",
    icmp="icmpv6",
    hops="hoplimit",
    errors="destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
    redirect="nd-redirect",
)
FAMILIES: Final = (V4, V6)


def family_of(address: Address) -> Family:
    """Return the family whose table holds an address."""
    return V4 if address.version == 4 else V6


def skeleton(family: Family) -> str:
    """Return the table without elements: sets, maps, chains and rules."""
    parts = (
        "".join(f"  counter {name} {{ }}\n" for name in COUNTERS),
        _sets(family),
        _hash_chains(family),
        _steering(family),
        _chance(family),
        _delivery(family),
        _guards(family),
    )
    return f"table {family.table} {{\n" + "".join(parts) + "}\n"


def refusals(family: Family) -> str:
    """Return the rules that answer instead of dropping; `refuse` ends in a drop from the start."""
    chain = f"insert rule {family.table} refuse"
    # Inserted one before the other: read them from the last to the first.
    return (
        f"{chain} meta l4proto udp reject with {family.icmp} type port-unreachable\n"
        f"{chain} meta l4proto tcp reject with tcp reset\n"
        f"{chain} limit rate over 500/second burst 500 packets drop\n"
        f"{chain} counter name refused\n"
    )


def hash_chain(size: int, by_client: bool) -> str:
    """Return the name of the chain that gives a packet its bucket of `size`."""
    return f"{'client' if by_client else 'flow'}{size}"


def _hash_chains(family: Family) -> str:
    lines = []
    for size in maglev.SIZES:
        for by_client in (False, True):
            what = f"{family.ip} saddr" + ("" if by_client else " . th sport")
            lines.append(
                f"  chain {hash_chain(size, by_client)} {{\n    meta mark set jhash {what}"
                f" mod {size} seed {maglev.SEED:#x} offset {BUCKET_BASE:#x}\n  }}\n"
            )
    return "".join(lines)


def _sets(family: Family) -> str:
    address = family.address
    key = f"{address} . inet_proto . inet_service"
    return f"""  set gen {{ type mark; }}
  set uplinks {{ type ifname; }}
  set peers {{ type ether_addr; }}
  set ranges {{ type {address}; flags interval; }}
  set restricted {{ type {address}; }}
  set sources {{ type {address} . {address}; flags interval; }}
  set closed {{ type {key}; }}
  map svc {{ type {key} : verdict; }}
  map past {{ type {key} : verdict; }}
  map steer {{ type {key} . mark : mark; }}
  map prev {{ type {key} . mark : mark; }}
  map deliver {{ type {key} . mark : {address} . inet_service; }}
  map late {{ type {key} . mark : {address} . inet_service; }}
"""


def _steering(family: Family) -> str:
    """From outside: refuse, or find the bucket, and mark and untrack what is another node's."""
    ip, key = family.ip, family.key
    return f"""  chain refuse {{
    drop
  }}
  chain outside {{
    {ip} daddr @restricted {ip} daddr . {ip} saddr != @sources counter name refused drop
    {family.icmp} type {{ {family.errors} }} accept
    tcp flags & (fin|syn|rst|ack) == syn {key} @closed goto refuse
    meta l4proto udp {key} @closed goto refuse
    {key} vmap @svc
    meta mark 0 goto refuse
    meta mark set {key} . meta mark map @steer counter name steered notrack accept
    meta mark set 0
  }}
  chain ingress {{
    type filter hook prerouting priority raw; policy accept;
    iifname != @uplinks accept
    {ip} daddr != @ranges accept
    meta mark set 0
    ether saddr @peers accept
    goto outside
  }}
"""


def _chance(family: Family) -> str:
    """Established flows that conntrack does not know here go to their last owner."""
    ip, key = family.ip, family.key
    return f"""  chain handover {{
    {ip} {family.hops} > {HANDOVER_TTL} {ip} {family.hops} set {HANDOVER_TTL}
    ct mark set meta mark
    counter name second_chance accept
  }}
  chain lookup {{
    ct mark & {MARK_MASK:#x} == {MARK_BASE:#x} meta mark set ct mark goto handover
    tcp flags & (syn|rst) != 0 accept
    {key} vmap @past
    meta mark set {key} . meta mark map @prev goto handover
    meta mark set 0
  }}
  chain chance {{
    type filter hook prerouting priority mangle - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges meta l4proto tcp ct state new goto lookup
  }}
"""


def _delivery(family: Family) -> str:
    """Buckets of ours: to the pod, before kube-proxy; then the bucket's mark goes."""
    ip, key = family.ip, family.key
    to_pod, to_late = (
        f"dnat {ip} to {key} . meta mark map @{name}" for name in ("deliver", "late")
    )
    return f"""  chain deliver_new {{
    {_NODE} dnat to {ip} daddr
    {key} vmap @svc
    meta l4proto {{ tcp, udp }} counter name delivered {to_pod}
    {key} vmap @past
    tcp flags & (fin|syn|rst|ack) == syn {to_late}
    meta l4proto udp {to_late}
    counter name stray drop
  }}
  chain delivery {{
    type nat hook prerouting priority dstnat - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges goto deliver_new
  }}
  chain cleanup {{
    type filter hook prerouting priority dstnat + 5; policy accept;
    {_BUCKET} meta mark set 0
  }}
"""


def _guards(family: Family) -> str:
    """Nothing for the pools is routed on or reaches the host; no ICMP redirects about our hops."""
    ip = family.ip
    return f"""  chain onward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges {_NOT_NODE} counter name stray drop
  }}
  chain host {{
    type filter hook input priority filter - 5; policy accept;
    iifname @uplinks {ip} daddr @ranges counter name stray drop
  }}
  chain redirects {{
    type filter hook output priority filter; policy accept;
    {family.icmp} type {family.redirect} drop
  }}
"""
