"""How this node reaches the others: over one of its links, or through its tunnel. Pure.

Rules:
- A way is chosen per address family. Direct is for a node whose address is on a link that one of
  our own node addresses is on too, so that both ends of a pair choose the same; everybody else is
  reached through the tunnel (`forwarding.steering` may ask for one of the two alone).
- The tunnel's own packets travel in one family: IPv4 if this node has such an InternalIP.
- All that the tunnel needs to know follows from the nodes' addresses: the MAC of a node's device is
  made of its tunnel address, and so is the link-local address by which IPv6 finds it.
- A family that this node has no address of is left alone.

Source: ip-rule(8), ip-route(8); RFC 7348 (VXLAN); RFC 4291, appendix A (link-local from a MAC).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv6Address
from typing import Final, TypeAlias

from lbctl.core.model import Address, Network, Node, Steering
from lbctl.core.names import MARK_BASE, MARK_MASK, NODE_BITS, ROUTE_TABLE_BASE, RULE_PRIORITY

TUNNEL: Final = 0  # the interface of a way through the tunnel
MOST_NODES: Final = 0x1FFF  # that NODE_BITS can number
_OVERHEAD: Final = {4: 50, 6: 70}  # of VXLAN in bytes: Ethernet 14, IP, UDP 8, VXLAN 8
_USUAL_MTU: Final = 1500
GOTO, NOP, TABLE, BLACKHOLE = 2, 3, 1, 6  # FR_ACT_* of linux/fib_rules.h


@dataclass(frozen=True, slots=True)
class Hop:
    """Where the packets of one mark go: a gateway behind an interface, or TUNNEL."""

    gateway: Address
    interface: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The interfaces that traffic from outside uses. prefixes: what is on their links.

    mtu: the smallest of theirs, 0 if unknown.
    """

    uplinks: tuple[tuple[str, int], ...] = ()
    prefixes: tuple[tuple[Network, int], ...] = ()
    mtu: int = 0

    def hop(self, address: Address, *with_one_of: Address) -> Hop | None:
        """How to reach a neighbour; None if it is on none of the links.

        with_one_of: addresses of which one has to be on the same link.
        """
        for prefix, interface in self.prefixes:
            if address in prefix and (not with_one_of or any(a in prefix for a in with_one_of)):
                return Hop(address, interface)
        return None


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What the tunnel's device has to be like. peers: the other ends, by their addresses.

    gateways: the next hops of our routes, each with the MAC of the peer that it stands for.
    """

    local: Address
    mtu: int
    peers: tuple[Address, ...]
    gateways: tuple[tuple[Address, str], ...]

    @property
    def mac(self) -> str:
        """The MAC of our own device."""
        return tunnel_mac(self.local)


Ways: TypeAlias = Mapping[tuple[int, int], Hop]  # (IP version, node number) → where


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """One of our policy rules. target: a table, or the priority to go on at.

    own: it is for packets that this host itself made.
    """

    priority: int
    mark: int
    mask: int
    invert: bool
    action: int
    target: int
    own: bool = False


def rules(numbers: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return one family's rules for these node numbers, in the order in which to add them.

    Unmarked packets pass one rule. Ours are marks of forwarded packets: the tunnel's packets keep
    the mark of what they carry, and have to go the host's own way.
    """
    base, end = RULE_PRIORITY, RULE_PRIORITY + 4
    nodes = (
        Rule(base + 2, MARK_BASE + n, MARK_MASK | NODE_BITS, False, TABLE, ROUTE_TABLE_BASE + n)
        for n in sorted(numbers)
    )
    return (
        Rule(end, 0, 0, False, NOP, 0),
        Rule(base + 3, MARK_BASE, MARK_MASK, False, BLACKHOLE, 0),
        Rule(base + 1, 0, 0, False, GOTO, end, own=True),
        *nodes,
        Rule(base, MARK_BASE, MARK_MASK, True, GOTO, end),
    )


# -- numbers of nodes ----------------------------------------------------------------------------
def assign(old: Mapping[str, int], me: str, nodes: tuple[Node, ...]) -> dict[str, int]:
    """Number the other nodes. One keeps its number; a new one gets one that was not just freed."""
    present = sorted(node.name for node in nodes if node.name != me)
    result = {name: old[name] for name in present if name in old and not old[name] & ~NODE_BITS}
    taken = {_count(number) for number in old.values()}
    highest = max(taken, default=0)
    for name in present:
        if name not in result:
            highest += 1
            free = highest if highest <= MOST_NODES else _free(taken)
            taken.add(free)
            result[name] = _number(free)
    return result


def _free(taken: set[int]) -> int:
    return next(count for count in range(1, MOST_NODES + 1) if count not in taken)


def _number(count: int) -> int:
    """The count-th number that has only bits of NODE_BITS."""
    return (count & 0xFF) | (count >> 8 & 3) << 12 | count >> 10 << 21


def _count(number: int) -> int:
    return (number & 0xFF) | (number >> 12 & 3) << 8 | (number >> 21) << 10


# -- ways ----------------------------------------------------------------------------------------
def node_addresses(node: Node, version: int = 0) -> tuple[Address, ...]:
    """All addresses by which other nodes may see this one, the next hops first.

    version: of which family, 0 for both.
    """
    found = [a for a in (*node.next_hops, *node.addresses) if version in (0, a.version)]
    return tuple(dict.fromkeys(found))


def versions(survey: Survey, mine: Node | None) -> tuple[int, ...]:
    """The IP versions in which this node forwards; always 4."""
    prefixes: list[Address | Network] = [prefix for prefix, _ in survey.prefixes]
    known = (*prefixes, *(node_addresses(mine) if mine else ()))
    return (4, 6) if any(a.version == 6 for a in known) else (4,)


def choose(
    survey: Survey, steering: Steering, me: str, index: Mapping[str, int], nodes: tuple[Node, ...]
) -> dict[tuple[int, int], Hop]:
    """Where each numbered node is reached. One that cannot be is left out."""
    mine = next((node for node in nodes if node.name == me), None)
    found: dict[tuple[int, int], Hop] = {}
    for version in versions(survey, mine):
        for node in nodes:
            hop = None
            if node.name in index and steering != "tunnel":
                hop = direct(survey, mine, node, version)
            if node.name in index and hop is None and steering != "direct":
                hop = _tunnelled(mine, node, version)
            if hop is not None:
                found[version, index[node.name]] = hop
    return found


def direct(survey: Survey, mine: Node | None, node: Node, version: int) -> Hop | None:
    """The way over a link; None if there is none."""
    own = node_addresses(mine, version) if mine else ()
    hops = (survey.hop(address, *own) for address in node_addresses(node, version))
    return next((hop for hop in hops if hop is not None), None)


def _tunnelled(mine: Node | None, node: Node, version: int) -> Hop | None:
    local = tunnel_address(mine) if mine else None
    remote = tunnel_address(node, local.version) if local else None
    if remote is None or not _speaks(node, version):
        return None
    return Hop(remote if remote.version == version == 4 else link_local(remote), TUNNEL)


def _speaks(node: Node, version: int) -> bool:
    return any(a.version == version for a in (*node.addresses, *node.pod_cidrs))


def tunnel_address(node: Node, version: int = 0) -> Address | None:
    """The address of the node's end of the tunnel: its first InternalIP, IPv4 before IPv6."""
    fitting = [a for a in node.addresses if version in (0, a.version)]
    return min(fitting, key=lambda a: a.version, default=None)


def tunnel_mac(address: Address) -> str:
    """The MAC of the tunnel device of the node with this address, locally administered."""
    return ":".join(f"{byte:02x}" for byte in b"\x02" + _digest(address))


def link_local(address: Address) -> Address:
    """The link-local address of that device, as the kernel makes it of its MAC."""
    tail = _digest(address)
    return IPv6Address(b"\xfe\x80" + bytes(6) + b"\0" + tail[:2] + b"\xff\xfe" + tail[2:])


def _digest(address: Address) -> bytes:
    return blake2b(str(address).encode(), digest_size=5).digest()


def tunnel(
    survey: Survey, found: Ways, me: str, index: Mapping[str, int], nodes: tuple[Node, ...]
) -> Tunnel | None:
    """The device that these ways need; None if they need none."""
    mine = next((node for node in nodes if node.name == me), None)
    local = tunnel_address(mine) if mine else None
    if local is None:
        return None
    gateways: dict[Address, str] = {}
    peers = set()
    for node in nodes:
        for version in (4, 6):
            hop = found.get((version, index.get(node.name, 0)))
            remote = tunnel_address(node, local.version)
            if hop is not None and hop.interface == TUNNEL and remote is not None:
                peers.add(remote)
                gateways[hop.gateway] = tunnel_mac(remote)
    if not peers:
        return None
    mtu = (survey.mtu or _USUAL_MTU) - _OVERHEAD[local.version]
    ordered = sorted(gateways.items(), key=lambda item: (item[0].version, int(item[0])))
    return Tunnel(local, mtu, tuple(sorted(peers, key=int)), tuple(ordered))


def unreached(
    survey: Survey, found: Ways, me: str, index: Mapping[str, int], nodes: tuple[Node, ...]
) -> Iterator[str]:
    """The nodes to which there is no way in a family that they and this node have."""
    mine = next((node for node in nodes if node.name == me), None)
    for node in sorted(nodes, key=lambda n: n.name):
        wanted = [v for v in versions(survey, mine) if _speaks(node, v)]
        if node.name in index and any((v, index[node.name]) not in found for v in wanted or [4]):
            yield node.name


def current_macs(
    known: Mapping[Address, str], me: str, nodes: tuple[Node, ...]
) -> dict[Address, str]:
    """The MACs of the nodes that are still there."""
    present = {a for node in nodes if node.name != me for a in node_addresses(node)}
    ordered = sorted(present, key=lambda a: (a.version, int(a)))
    return {address: known[address] for address in ordered if address in known}
