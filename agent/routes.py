"""Policy routes and neighbours of this node in both address families, by rtnetlink.

Rules:
- Everything of ours bears protocol number PROTOCOL, and nothing else is touched; the tunnel's
  device is ours by its name (`agent.tunnel`).
- Unmarked packets pass one rule, however many nodes there are: it sends them past ours. A marked
  packet without a route is dropped, never sent to the default gateway.
- `ensure` before the nftables change that uses a route, `prune` after the one that stopped to.
- A family without a way has neither rules nor routes of ours.

Source: ip-rule(8), ip-route(8), include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent import settings, tunnel
from agent.notices import Notices
from lbctl.core import ways
from lbctl.core.clash import ForeignRule
from lbctl.core.model import Address, Network
from lbctl.core.names import ROUTE_TABLE_BASE, TUNNEL_DEVICE
from lbctl.core.ways import Hop, Rule, Survey, Tunnel, Ways
from lbctl.errors import DataplaneError

PROTOCOL: Final = 76  # of our routes and rules; /etc/iproute2/rt_protos gives it to nobody
_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_MAIN: Final = 254
_UNICAST: Final = 1
_INVERT: Final = 0x2  # FIB_RULE_INVERT
_EXIST, _MISSING = 17, {2, 3, 97}  # EEXIST; ENOENT, ESRCH, EAFNOSUPPORT
_NTF_USE: Final = 0x01
_NUD_KNOWN: Final = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80


class Routes:
    """Our routes and rules in this network namespace. Use as made by `opened()`."""

    def __init__(self, link: Any, notices: Notices) -> None:
        self.notices = notices
        self._link = link
        self._lock = asyncio.Lock()
        self._families = (4, 6) if settings.has_ipv6() else (4,)

    @asynccontextmanager
    async def _asking(self, what: str) -> AsyncIterator[None]:
        """One dump at a time: the kernel refuses a second one on the same socket."""
        async with self._lock:
            try:
                yield
            except (NetlinkError, OSError) as error:
                raise DataplaneError(f"{what}: {error}") from error

    # -- what is there ---------------------------------------------------------------------------
    async def survey(self, wanted: tuple[str, ...]) -> Survey:
        """Look at the interfaces named, or at those of the default routes if none is."""
        async with self._asking("interfaces"):
            main = [m for version in self._families async for m in self._main(version)]
            found = {}
            for name in wanted or _default_interfaces(main):
                with suppress(OSError):
                    found[name] = socket.if_nametoindex(name)
            prefixes = {p async for p in self._attached(set(found.values()))} | set(_onlink(main))
            kept = sorted(
                (p for p in prefixes if p[1] in found.values()),
                key=lambda p: (p[0].version, int(p[0].network_address), p[0].prefixlen, p[1]),
            )
            return Survey(tuple(sorted(found.items())), tuple(kept), await self._mtu(found))

    async def _main(self, version: int) -> AsyncIterator[Any]:
        """The unicast routes of the main table."""
        async for message in await self._link.route("dump", family=_FAMILY[version], table=_MAIN):
            if message["type"] == _UNICAST:
                yield message

    async def _attached(self, indices: set[int]) -> AsyncIterator[tuple[Network, int]]:
        for version in self._families:
            async for message in await self._link.addr("dump", family=_FAMILY[version]):
                if message["index"] in indices:
                    text = f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']}"
                    network = ip_interface(text).network
                    if not network.is_link_local:
                        yield network, message["index"]

    async def _mtu(self, found: Mapping[str, int]) -> int:
        sizes = []
        async for message in await self._link.link("dump"):
            if message["index"] in found.values():
                sizes.append(message.get_attr("IFLA_MTU") or 0)
        return min(sizes, default=0)

    # -- routes and rules ------------------------------------------------------------------------
    async def ensure(self, hops: Ways, device: int | None) -> int:
        """Add or correct what is missing; how many changes it took.

        device: the tunnel's interface; None leaves out what goes through it.
        """
        changes = 0
        async with self._asking("routes"):
            for version, numbered in _by_version(hops).items():
                present = await self._routes(version)
                for number, hop in sorted(numbered.items()):
                    through = _placed(hop, device)
                    if through and present.get(ROUTE_TABLE_BASE + number) != through:
                        await self._set_route(version, ROUTE_TABLE_BASE + number, through)
                        changes += 1
                known = await self._rules(version)
                for rule in ways.rules(tuple(numbered)):
                    if rule not in known:
                        await self._add_rule(version, rule)
                        changes += 1
        return changes

    async def prune(self, hops: Ways) -> int:
        """Remove what is ours and not for these ways; how many changes it took."""
        changes = 0
        wanted = _by_version(hops)
        async with self._asking("routes"):
            for version in self._families:
                numbers = tuple(wanted.get(version, ()))
                tables = {ROUTE_TABLE_BASE + number for number in numbers}
                changes += await self._remove(
                    version, tables, set(ways.rules(numbers)) if numbers else set()
                )
        return changes

    async def remove(self) -> int:
        """Remove everything of ours."""
        return await self.prune({}) + await self.prune_tunnel(None)

    async def _remove(self, version: int, tables: set[int], kept: set[Rule]) -> int:
        changes = 0
        for rule in sorted(await self._rules(version) - kept):
            with _tolerated(_MISSING):
                await self._link.rule("del", **_rule_fields(version, rule))
            changes += 1
        for table in sorted((await self._routes(version)).keys() - tables):
            with _tolerated(_MISSING):
                await self._link.flush_routes(family=_FAMILY[version], table=table, proto=PROTOCOL)
            changes += 1
        return changes

    async def _routes(self, version: int) -> dict[int, Hop | None]:
        """Our routes by table; None where one is not as we write them."""
        found: dict[int, Hop | None] = {}
        async for message in await self._link.route(
            "dump", family=_FAMILY[version], proto=PROTOCOL
        ):
            table = message.get_attr("RTA_TABLE") or message["table"]
            via = message.get_attr("RTA_VIA")
            gateway = message.get_attr("RTA_GATEWAY") or (via["addr"] if via else None)
            interface = message.get_attr("RTA_OIF")
            whole = message["dst_len"] == 0 and interface and table not in found
            found[table] = Hop(ip_address(gateway), interface) if whole and gateway else None
        return found

    async def _set_route(self, version: int, table: int, hop: Hop) -> None:
        gateway: dict[str, Any] = {"gateway": str(hop.gateway)}
        if hop.gateway.version != version:
            gateway = {"via": {"family": _FAMILY[hop.gateway.version], "addr": str(hop.gateway)}}
        await self._link.route(
            "replace",
            family=_FAMILY[version],
            dst="default",
            oif=hop.interface,
            table=table,
            proto=PROTOCOL,
            flags=["onlink"],
            **gateway,
        )

    async def _rules(self, version: int) -> set[Rule]:
        found = set()
        async for message in await self._link.rule("dump", family=_FAMILY[version]):
            if message.get_attr("FRA_PROTOCOL") == PROTOCOL:
                found.add(_observed(message))
        return found

    async def _add_rule(self, version: int, rule: Rule) -> None:
        with _tolerated({_EXIST}):
            await self._link.rule("add", **_rule_fields(version, rule))

    # -- neighbours ------------------------------------------------------------------------------
    async def neighbours(self, survey: Survey) -> dict[Address, str]:
        """The resolved neighbours on the uplinks: address → MAC."""
        found = {}
        async with self._asking("neighbours"):
            for _, index in survey.uplinks:
                for version in self._families:
                    async for message in await self._link.neigh(
                        "dump", family=_FAMILY[version], ifindex=index
                    ):
                        mac = message.get_attr("NDA_LLADDR")
                        if mac and message["state"] & _NUD_KNOWN:
                            found[ip_address(message.get_attr("NDA_DST"))] = mac
        return found

    async def resolve(self, hops: list[Hop]) -> None:
        """Let the kernel ask for these neighbours' MACs. Does not wait for the answers."""
        async with self._asking("neighbours"):
            for hop in hops:
                await self._link.neigh(
                    "replace", dst=str(hop.gateway), ifindex=hop.interface, state=0, flags=_NTF_USE
                )

    # -- of others -------------------------------------------------------------------------------
    async def foreign_rules(self) -> tuple[ForeignRule, ...]:
        """The policy rules that are not ours."""
        found = []
        async with self._asking("rules"):
            for version in self._families:
                async for message in await self._link.rule("dump", family=_FAMILY[version]):
                    if message.get_attr("FRA_PROTOCOL") != PROTOCOL:
                        seen = _observed(message)
                        found.append(
                            ForeignRule(version, seen.priority, seen.mark, seen.mask, seen.invert)
                        )
        return tuple(found)

    async def foreign_routes(self, numbers: tuple[int, ...]) -> tuple[tuple[int, int, str], ...]:
        """Routes in the tables of these nodes that are not ours: IP version, table, destination."""
        found = []
        async with self._asking("routes"):
            for version in self._families:
                for table in (ROUTE_TABLE_BASE + number for number in numbers):
                    async for message in await self._link.route(
                        "dump", family=_FAMILY[version], table=table
                    ):
                        if message["proto"] != PROTOCOL:
                            text = f"{message.get_attr('RTA_DST') or '::'}/{message['dst_len']}"
                            found.append(
                                (version, table, text if message["dst_len"] else "default")
                            )
        return tuple(found)

    async def foreign_tunnels(self) -> tuple[tuple[str, int, int], ...]:
        """The other VXLAN devices: name, UDP port, VNI."""
        async with self._asking("links"):
            return await tunnel.others(self._link)

    # -- the tunnel ------------------------------------------------------------------------------
    async def ensure_tunnel(self, wanted: Tunnel) -> tuple[int, int]:
        """Make the tunnel's device like this, with what is missing in it; its index, changes."""
        async with self._asking(f"tunnel {TUNNEL_DEVICE}"):
            return await tunnel.ensure(self._link, wanted)

    async def prune_tunnel(self, wanted: Tunnel | None) -> int:
        """Remove what the tunnel's device should not have; the device itself for None."""
        async with self._asking(f"tunnel {TUNNEL_DEVICE}"):
            return await tunnel.prune(self._link, wanted)


def _by_version(hops: Ways) -> dict[int, dict[int, Hop]]:
    found: dict[int, dict[int, Hop]] = {}
    for (version, number), hop in sorted(hops.items(), key=lambda item: item[0]):
        found.setdefault(version, {})[number] = hop
    return found


def _placed(hop: Hop, device: int | None) -> Hop | None:
    if hop.interface != ways.TUNNEL:
        return hop
    return None if device is None else replace(hop, interface=device)


def _default_interfaces(main: list[Any]) -> list[str]:
    indices = set()
    for message in main:
        if message["dst_len"] == 0:
            indices.add(message.get_attr("RTA_OIF"))
            for leg in message.get_attr("RTA_MULTIPATH") or ():
                indices.add(leg["oif"])
    names = []
    for index in sorted(i for i in indices if i):
        with suppress(OSError):
            names.append(socket.if_indextoname(index))
    return names


def _onlink(main: list[Any]) -> Iterator[tuple[Network, int]]:
    """The networks that routes call attached: a /128 address says nothing of its link."""
    for message in main:
        attached = not any(
            message.get_attr(name) for name in ("RTA_GATEWAY", "RTA_VIA", "RTA_MULTIPATH")
        )
        if attached and message["dst_len"]:
            text = f"{message.get_attr('RTA_DST')}/{message['dst_len']}"
            network = ip_interface(text).network
            if not network.is_link_local and not network.is_multicast:
                yield network, message.get_attr("RTA_OIF")


def _rule_fields(version: int, rule: Rule) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "family": _FAMILY[version],
        "priority": rule.priority,
        "action": rule.action,
        "FRA_PROTOCOL": PROTOCOL,
        "flags": _INVERT if rule.invert else 0,
    }
    if rule.mask:
        fields |= {"fwmark": rule.mark, "fwmask": rule.mask}
    if rule.own:
        fields["iifname"] = "lo"
    if rule.action == ways.TABLE:
        fields["table"] = rule.target
    if rule.action == ways.GOTO:
        fields["goto"] = rule.target
    return fields


def _observed(message: Any) -> Rule:
    action = message["action"]
    target = 0
    if action == ways.TABLE:
        target = message.get_attr("FRA_TABLE") or message["table"]
    elif action == ways.GOTO:
        target = message.get_attr("FRA_GOTO") or 0
    mark, mask = message.get_attr("FRA_FWMARK") or 0, message.get_attr("FRA_FWMASK") or 0
    invert = bool(message["flags"] & _INVERT)
    own = message.get_attr("FRA_IIFNAME") == "lo"
    return Rule(message.get_attr("FRA_PRIORITY") or 0, mark, mask, invert, action, target, own)


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
        with closing(Notices()) as notices:
            yield Routes(link, notices)
