"""Policy routes, neighbours and interfaces of this node, by rtnetlink.

Rules:
- Everything of ours bears protocol number PROTOCOL, and nothing else is touched.
- Unmarked packets pass one rule, however many nodes there are: it sends them past ours. A marked
  packet without a route is dropped, never sent to the default gateway.
- `ensure` before the nftables change that uses a route, `prune` after the one that stopped to.

Source: ip-rule(8), ip-route(8), include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from lbctl.core.names import MARK_BASE, MARK_MASK, ROUTE_TABLE_BASE, RULE_PRIORITY
from lbctl.errors import DataplaneError

PROTOCOL: Final = 76  # of our routes and rules; /etc/iproute2/rt_protos gives it to nobody
_EXACT: Final = 0xFFFFFFFF
_INVERT: Final = 0x2  # FIB_RULE_INVERT
_GOTO, _NOP, _TABLE, _BLACKHOLE = 2, 3, 1, 6  # FR_ACT_*
_EXIST, _MISSING = 17, {2, 3}  # EEXIST; ENOENT, ESRCH
_NTF_USE: Final = 0x01
_NUD_KNOWN: Final = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
_LOOSE: Final = 2


@dataclass(frozen=True, slots=True, order=True)
class Hop:
    """Where the packets of one mark go: a node's address behind an interface."""

    gateway: IPv4Address
    interface: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The interfaces that traffic from outside uses. prefixes: what is on their links."""

    uplinks: tuple[tuple[str, int], ...] = ()
    prefixes: tuple[tuple[IPv4Network, int], ...] = ()

    def hop(self, address: IPv4Address) -> Hop | None:
        """How to reach a neighbour; None if it is on none of the links."""
        for prefix, interface in self.prefixes:
            if address in prefix:
                return Hop(address, interface)
        return None


@dataclass(frozen=True, slots=True, order=True)
class Rule:
    """One of our policy rules. target: a table, or the priority to go on at."""

    priority: int
    mark: int
    mask: int
    invert: bool
    action: int
    target: int


def rules(indices: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return the rules for these node indices, in the order in which to add them."""
    base = RULE_PRIORITY
    nodes = (
        Rule(base + 1, MARK_BASE + i, _EXACT, False, _TABLE, ROUTE_TABLE_BASE + i)
        for i in sorted(indices)
    )
    return (
        Rule(base + 3, 0, 0, False, _NOP, 0),
        Rule(base + 2, MARK_BASE, MARK_MASK, False, _BLACKHOLE, 0),
        *nodes,
        Rule(base, MARK_BASE, MARK_MASK, True, _GOTO, base + 3),
    )


class Routes:
    """Our routes and rules in this network namespace. Use as made by `opened()`."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def _asking(self, what: str) -> AsyncIterator[None]:
        """One dump at a time: the kernel refuses a second one on the same socket."""
        async with self._lock:
            try:
                yield
            except (NetlinkError, OSError) as error:
                raise DataplaneError(f"{what}: {error}") from error

    async def survey(self, wanted: tuple[str, ...]) -> Survey:
        """Look at the interfaces named, or at those of the default routes if none is."""
        async with self._asking("interfaces"):
            found = {}
            for name in wanted or await self._default_interfaces():
                with suppress(OSError):
                    found[name] = socket.if_nametoindex(name)
            prefixes = []
            async for message in await self._link.addr("dump", family=socket.AF_INET):
                if message["index"] in found.values():
                    text = f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
                    prefixes.append((IPv4Interface(text).network, message["index"]))
        return Survey(tuple(sorted(found.items())), tuple(sorted(prefixes)))

    async def _default_interfaces(self) -> list[str]:
        indices = set()
        async for message in await self._link.route("dump", family=socket.AF_INET, table=254):
            if message["dst_len"] == 0 and message.get_attr("RTA_DST") is None:
                indices.add(message.get_attr("RTA_OIF"))
                for leg in message.get_attr("RTA_MULTIPATH") or ():
                    indices.add(leg["oif"])
        names = []
        for index in sorted(i for i in indices if i):
            with suppress(OSError):
                names.append(socket.if_indextoname(index))
        return names

    async def ensure(self, hops: Mapping[int, Hop]) -> int:
        """Add or correct what is missing for these node indices; how many changes it took."""
        changes = 0
        async with self._asking("routes"):
            present = await self._routes()
            for index, hop in sorted(hops.items()):
                if present.get(ROUTE_TABLE_BASE + index) != hop:
                    await self._set_route(ROUTE_TABLE_BASE + index, hop)
                    changes += 1
            known = await self._rules()
            for rule in rules(tuple(hops)):
                if rule not in known:
                    await self._add_rule(rule)
                    changes += 1
        return changes

    async def prune(self, hops: Mapping[int, Hop]) -> int:
        """Remove what is ours and not for these node indices; how many changes it took."""
        wanted = {ROUTE_TABLE_BASE + index for index in hops}
        return await self._remove(wanted, set(rules(tuple(hops))))

    async def remove(self) -> int:
        """Remove everything of ours."""
        return await self._remove(set(), set())

    async def _remove(self, tables: set[int], kept: set[Rule]) -> int:
        changes = 0
        async with self._asking("routes"):
            for rule in sorted(await self._rules() - kept):
                with _tolerated(_MISSING):
                    await self._link.rule("del", **_rule_fields(rule))
                changes += 1
            for table in sorted((await self._routes()).keys() - tables):
                with _tolerated(_MISSING):
                    await self._link.flush_routes(
                        family=socket.AF_INET, table=table, proto=PROTOCOL
                    )
                changes += 1
        return changes

    async def _routes(self) -> dict[int, Hop | None]:
        """Our routes by table; None where one is not as we write them."""
        found: dict[int, Hop | None] = {}
        async for message in await self._link.route("dump", family=socket.AF_INET, proto=PROTOCOL):
            table = message.get_attr("RTA_TABLE") or message["table"]
            gateway, interface = message.get_attr("RTA_GATEWAY"), message.get_attr("RTA_OIF")
            whole = message["dst_len"] == 0 and gateway and interface
            found[table] = Hop(IPv4Address(gateway), interface) if whole else None
        return found

    async def _set_route(self, table: int, hop: Hop) -> None:
        await self._link.route(
            "replace",
            dst="default",
            gateway=str(hop.gateway),
            oif=hop.interface,
            table=table,
            proto=PROTOCOL,
            flags=["onlink"],
        )

    async def _rules(self) -> set[Rule]:
        found = set()
        async for message in await self._link.rule("dump", family=socket.AF_INET):
            if message.get_attr("FRA_PROTOCOL") == PROTOCOL:
                found.add(_observed(message))
        return found

    async def _add_rule(self, rule: Rule) -> None:
        with _tolerated({_EXIST}):
            await self._link.rule("add", **_rule_fields(rule))

    async def neighbours(self, survey: Survey) -> dict[IPv4Address, str]:
        """The resolved neighbours on the uplinks: address → MAC."""
        found = {}
        async with self._asking("neighbours"):
            for _, index in survey.uplinks:
                async for message in await self._link.neigh(
                    "dump", family=socket.AF_INET, ifindex=index
                ):
                    mac = message.get_attr("NDA_LLADDR")
                    if mac and message["state"] & _NUD_KNOWN:
                        found[IPv4Address(message.get_attr("NDA_DST"))] = mac
        return found

    async def resolve(self, hops: list[Hop]) -> None:
        """Let the kernel ask for these neighbours' MACs. Does not wait for the answers."""
        async with self._asking("neighbours"):
            for hop in hops:
                await self._link.neigh(
                    "replace", dst=str(hop.gateway), ifindex=hop.interface, state=0, flags=_NTF_USE
                )


def _rule_fields(rule: Rule) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "family": socket.AF_INET,
        "priority": rule.priority,
        "action": rule.action,
        "FRA_PROTOCOL": PROTOCOL,
        "flags": _INVERT if rule.invert else 0,
    }
    if rule.mask:
        fields |= {"fwmark": rule.mark, "fwmask": rule.mask}
    if rule.action == _TABLE:
        fields["table"] = rule.target
    if rule.action == _GOTO:
        fields["goto"] = rule.target
    return fields


def _observed(message: Any) -> Rule:
    action = message["action"]
    target = 0
    if action == _TABLE:
        target = message.get_attr("FRA_TABLE") or message["table"]
    elif action == _GOTO:
        target = message.get_attr("FRA_GOTO") or 0
    mark, mask = message.get_attr("FRA_FWMARK") or 0, message.get_attr("FRA_FWMASK") or 0
    invert = bool(message["flags"] & _INVERT)
    return Rule(message.get_attr("FRA_PRIORITY") or 0, mark, mask, invert, action, target)


@contextmanager
def _tolerated(codes: set[int]) -> Iterator[None]:
    """Swallows netlink errors with these codes: someone else was faster."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in codes:
            raise


@asynccontextmanager
async def opened() -> AsyncIterator[Routes]:
    """A netlink connection for as long as the block lasts."""
    async with AsyncIPRoute(strict_check=True) as link:
        yield Routes(link)


# -- interface settings --------------------------------------------------------------------------
_SYSCTL: Final = Path("/proc/sys/net")
_NEEDED: Final = (
    ("ipv4/ip_forward", "1", "packets for pods and other nodes are not forwarded"),
    (
        "netfilter/nf_conntrack_tcp_loose",
        "1",
        "established connections do not survive a change of endpoints",
    ),
)


async def loosen(survey: Survey) -> int:
    """Set rp_filter=2 on the uplinks, by netlink; how many had to be changed.

    /proc/sys is read-only for the agent, IFLA_INET_CONF needs no more than CAP_NET_ADMIN.
    """
    changed = 0
    for name, index in survey.uplinks:
        try:
            now = int((_SYSCTL / "ipv4/conf" / name / "rp_filter").read_text())
            if now != _LOOSE:
                await asyncio.to_thread(_set_devconf, index, 8, _LOOSE)
                changed += 1
        except OSError as error:
            raise DataplaneError(f"rp_filter of {name}: {error}") from error
    return changed


def problems() -> tuple[str, ...]:
    """Return in words which kernel settings are wrong and what that breaks."""
    found = []
    for path, wanted, otherwise in _NEEDED:
        with suppress(OSError):
            now = (_SYSCTL / path).read_text().strip()
            if now != wanted:
                name = "net." + path.replace("/", ".")
                found.append(f"{name} is {now}, not {wanted}: {otherwise}")
    return tuple(found)


def _set_devconf(index: int, number: int, value: int) -> None:
    """RTM_SETLINK with one IPV4_DEVCONF value; pyroute2 does not encode them."""
    conf = _nla(1 | 0x8000, _nla(number, struct.pack("=I", value)))  # IFLA_INET_CONF
    spec = _nla(26 | 0x8000, _nla(socket.AF_INET | 0x8000, conf))  # IFLA_AF_SPEC
    body = struct.pack("=BBHiII", 0, 0, 0, index, 0, 0) + spec
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.settimeout(5.0)
        link.send(struct.pack("=IHHII", 16 + len(body), 19, 5, 1, 0) + body)
        (code,) = struct.unpack_from("=i", link.recv(4096), 16)
    if code:
        raise OSError(-code, "RTM_SETLINK refused")


def _nla(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
