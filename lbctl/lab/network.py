"""Cables: veth pairs made right inside the machines' namespaces, through pyroute2.

Nothing is ever created in the host's own namespace, so labs cannot collide and a lab that is gone
has left no interface. A link end's MAC address is a function of node and interface: a machine
that comes back from a power cut has the network card that it had.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lbctl.errors import LabError
from lbctl.lab.topology import Link, LinkEnd

if TYPE_CHECKING:  # half a second to import: only when something is wired
    from pyroute2 import IPRoute

Netns = Callable[[str], Path]  # node name → its network namespace


def mac_of(end: LinkEnd) -> str:
    """A locally administered unicast address, the same on every machine and in every lab."""
    digest = hashlib.sha256(f"{end.node}:{end.interface}".encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x02, *digest[:5]))


def wire(links: Iterable[Link], netns: Netns) -> None:
    """Lay cables between machines that run, both ends up. Raises LabError."""
    by_node: dict[str, list[Link]] = {}
    for link in links:
        by_node.setdefault(link.a.node, []).append(link)
    far_ends: dict[str, list[str]] = {}
    for node, own in sorted(by_node.items()):
        with _netlink(node, netns) as ipr:
            for link in own:
                _add_veth(ipr, link, netns(link.b.node))
                far_ends.setdefault(link.b.node, []).append(link.b.interface)
            _set_up(ipr, [link.a.interface for link in own])
    for node, interfaces in sorted(far_ends.items()):
        with _netlink(node, netns) as ipr:
            _set_up(ipr, interfaces)


def _netlink(node: str, netns: Netns) -> IPRoute:
    from pyroute2 import IPRoute

    path = netns(node)
    if not path.exists():
        raise LabError(f"{node} has no network namespace ({path} is missing)")
    return IPRoute(netns=str(path))


def _add_veth(ipr: IPRoute, link: Link, far: Path) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    peer = {"ifname": link.b.interface, "address": mac_of(link.b), "net_ns_fd": str(far)}
    try:
        ipr.link("add", ifname=link.a.interface, kind="veth", address=mac_of(link.a), peer=peer)
    except NetlinkError as error:
        ends = " – ".join(f"{end.node}:{end.interface}" for end in link.ends())
        raise LabError(f"link {ends}: {error}") from error


def _set_up(ipr: IPRoute, interfaces: Iterable[str]) -> None:
    wanted = set(interfaces)
    for link in ipr.get_links():
        if link.get_attr("IFLA_IFNAME") in wanted:
            ipr.link("set", index=link["index"], state="up")


def bridge_of(end: LinkEnd, netns: Netns) -> int | None:
    """Index of the bridge that a port belongs to, None if to none or there is no such port."""
    with _netlink(end.node, netns) as ipr:
        for link in ipr.get_links():
            if link.get_attr("IFLA_IFNAME") == end.interface:
                master = link.get_attr("IFLA_MASTER")
                return int(master) if master is not None else None
    return None


def plug(end: LinkEnd, bridge: int, netns: Netns) -> None:
    """Make an interface a port of a bridge in its own namespace."""
    with _netlink(end.node, netns) as ipr:
        index = ipr.link_lookup(ifname=end.interface)
        if not index:
            raise LabError(f"{end.node} has no interface {end.interface}")
        ipr.link("set", index=index[0], master=bridge)


def unplug(end: LinkEnd, netns: Netns) -> None:
    """Remove an interface, and with it the other end of its cable. None there: nothing to do."""
    with _netlink(end.node, netns) as ipr:
        for index in ipr.link_lookup(ifname=end.interface):
            ipr.link("del", index=index)


def silence(interfaces: Iterable[str], netns: Path) -> None:
    """Drop every packet in and out of these interfaces, at once and without a carrier change.

    The hooks (netdev ingress and egress, nft(8)) lie below IP, ARP, macvlan and packet sockets, in
    one transaction: after it not even the FIN of a dying process gets out. Raises LabError.
    """
    chains = "".join(
        f'  chain {hook}-{number} {{ type filter hook {hook} device "{name}" priority -500; '
        "policy drop; }\n"
        for number, name in enumerate(sorted(interfaces))
        for hook in ("ingress", "egress")
    )
    result = subprocess.run(
        ["nsenter", f"--net={netns}", "--", "nft", "-f", "-"],
        input=f"table netdev lbctl-power {{\n{chains}}}\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if result.returncode != 0:
        raise LabError(f"cannot silence {netns.name}: {result.stderr.strip()}")
