"""The VXLAN device that carries steered packets to nodes on none of our links, by rtnetlink.

Rules:
- One device per node, with static entries alone: it learns nothing and asks nobody. A gateway of
  our routes has a neighbour entry (address → MAC), a MAC a forwarding entry (MAC → node address).
- What is right is not touched: a restarted agent interrupts nothing.
- A device that is not as wanted and cannot be changed in place is replaced.
- Multicast entries are the kernel's own.
- It has the IPv4 dummy address: with rp_filter on, loose too, the kernel drops every IPv4 packet
  that comes in by an interface without any (fib_validate_source, fib_frontend.c).

Source: ip-link(8), bridge(8), networking/vxlan.rst of the kernel; RFC 7348; RFC 7600 section 4.8.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Final

from pyroute2.netlink.exceptions import NetlinkError

from lbctl.core.model import Address
from lbctl.core.names import TUNNEL_DEVICE, TUNNEL_PORT, TUNNEL_VNI
from lbctl.core.ways import Tunnel, tunnel_mac

_PERMANENT: Final = 0x80
_NOARP: Final = 0x40
_UP: Final = 0x1
_AF_BRIDGE: Final = 7
_SELF: Final = 0x02  # NTF_SELF
_GONE: Final = {2, 19}  # ENOENT, ENODEV
_DUMMY: Final = "192.0.0.8"
_SCOPE_HOST: Final = 254  # no source of anything that leaves the host

_Neighbours = Mapping[Address, tuple[str, bool]]  # address → MAC, permanent


def index() -> int | None:
    """The index of the device; None if there is none of that name."""
    with suppress(OSError):
        return socket.if_nametoindex(TUNNEL_DEVICE)
    return None


async def ensure(link: Any, wanted: Tunnel) -> tuple[int, int]:
    """Make the device, add and correct its entries; its index and how many changes it took."""
    changes = 0
    found = await _device(link)
    if found is not None and _kind(found) != _kind_of(wanted):
        await link.link("del", index=found["index"])
        found = None
    if found is None:
        await _create(link, wanted)
        changes += 1
        found = await _device(link)
    if found is None:
        raise OSError(19, "the tunnel's device vanished as soon as it was made")
    number = int(found["index"])
    if found.get_attr("IFLA_MTU") != wanted.mtu or not found["flags"] & _UP:
        await link.link("set", index=number, mtu=wanted.mtu, state="up")
        changes += 1
    changes += await _address(link, number)
    known = await _neighbours(link, number)
    for address, mac in wanted.gateways:
        if known.get(address) != (mac, True):
            await link.neigh(
                "replace", dst=str(address), lladdr=mac, ifindex=number, state=_PERMANENT
            )
            changes += 1
    forwards = await _forwards(link, number)
    for mac, address in sorted(_wanted_forwards(wanted).items()):
        if forwards.get(mac) != address:
            await _replace_forward(link, number, mac, address)
            changes += 1
    return number, changes


async def prune(link: Any, wanted: Tunnel | None) -> int:
    """Remove the entries that are not wanted, or for None the device; how many changes it took."""
    number = index()
    if number is None:
        return 0
    if wanted is None:
        await _tolerant(link.link("del", index=number))
        return 1
    changes = 0
    gateways = dict(wanted.gateways)
    for address in await _neighbours(link, number):
        if address not in gateways and not address.is_multicast:
            await _tolerant(link.neigh("del", dst=str(address), ifindex=number))
            changes += 1
    kept = _wanted_forwards(wanted)
    for mac, remote in (await _forwards(link, number)).items():
        if mac not in kept:
            await _tolerant(_remove_forward(link, number, mac, remote))
            changes += 1
    return changes


async def others(link: Any) -> tuple[tuple[str, int, int], ...]:
    """The other VXLAN devices: name, UDP port, VNI."""
    found = []
    async for message in await link.link("dump"):
        info = message.get_attr("IFLA_LINKINFO")
        name = message.get_attr("IFLA_IFNAME")
        if (
            info is not None
            and info.get_attr("IFLA_INFO_KIND") == "vxlan"
            and name != TUNNEL_DEVICE
        ):
            data = info.get_attr("IFLA_INFO_DATA")
            port, vni = (data.get_attr(f"IFLA_VXLAN_{key}") or 0 for key in ("PORT", "ID"))
            found.append((name, port, vni))
    return tuple(found)


async def _tolerant(request: Any) -> None:
    """Await a removal; someone else may have been faster."""
    try:
        await request
    except NetlinkError as error:
        if error.code not in _GONE:
            raise


async def _device(link: Any) -> Any | None:
    number = index()
    if number is None:
        return None
    try:
        return next(iter(await link.link("get", index=number)), None)
    except NetlinkError as error:
        if error.code in _GONE:
            return None
        raise


async def _address(link: Any, number: int) -> int:
    """Give the device its IPv4 address unless it has one; how many changes it took."""
    dump = await link.addr("dump", family=socket.AF_INET)
    if number in {int(message["index"]) async for message in dump}:
        return 0
    await link.addr("add", index=number, address=_DUMMY, prefixlen=32, scope=_SCOPE_HOST)
    return 1


async def _create(link: Any, wanted: Tunnel) -> None:
    local = "vxlan_local" if wanted.local.version == 4 else "vxlan_local6"
    await link.link(
        "add",
        ifname=TUNNEL_DEVICE,
        kind="vxlan",
        address=wanted.mac,
        vxlan_id=TUNNEL_VNI,
        vxlan_port=TUNNEL_PORT,
        vxlan_learning=0,
        **{local: str(wanted.local)},
    )


def _kind_of(wanted: Tunnel) -> tuple[Any, ...]:
    return "vxlan", TUNNEL_VNI, TUNNEL_PORT, 0, wanted.local, wanted.mac


def _kind(device: Any) -> tuple[Any, ...] | None:
    """What cannot be changed while the device exists, or is easier made anew."""
    info = device.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "vxlan":
        return None
    data = info.get_attr("IFLA_INFO_DATA")
    local = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")
    return (
        "vxlan",
        data.get_attr("IFLA_VXLAN_ID"),
        data.get_attr("IFLA_VXLAN_PORT"),
        data.get_attr("IFLA_VXLAN_LEARNING"),
        ip_address(local) if local else None,
        device.get_attr("IFLA_ADDRESS"),
    )


async def _neighbours(link: Any, number: int) -> _Neighbours:
    found = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        async for message in await link.neigh("dump", family=family, ifindex=number):
            address = ip_address(message.get_attr("NDA_DST"))
            if message["state"] & _NOARP == 0:
                permanent = message["state"] == _PERMANENT
                found[address] = (message.get_attr("NDA_LLADDR") or "", permanent)
    return found


def _wanted_forwards(wanted: Tunnel) -> dict[str, Address]:
    return {tunnel_mac(address): address for address in wanted.peers}


async def _forwards(link: Any, number: int) -> dict[str, Address | None]:
    """The forwarding entries: MAC → node address; None where there are several."""
    found: dict[str, Address | None] = {}
    async for message in await link.neigh("dump", family=_AF_BRIDGE, ifindex=number):
        mac, remote = message.get_attr("NDA_LLADDR"), message.get_attr("NDA_DST")
        if message["ifindex"] == number and mac:
            usable = remote is not None and mac not in found
            found[mac] = ip_address(remote) if usable else None
    return found


async def _replace_forward(link: Any, number: int, mac: str, address: Address) -> None:
    await link.neigh(
        "replace",
        family=_AF_BRIDGE,
        ifindex=number,
        lladdr=mac,
        dst=str(address),
        state=_NOARP | _PERMANENT,
        flags=_SELF,
    )


async def _remove_forward(link: Any, number: int, mac: str, remote: Address | None) -> None:
    target = {"dst": str(remote)} if remote is not None else {}
    await link.neigh(
        "del",
        family=_AF_BRIDGE,
        ifindex=number,
        lladdr=mac,
        state=_NOARP | _PERMANENT,
        flags=_SELF,
        **target,
    )
