"""Small clusters for the forwarding tests: nodes n1 …, one Service `web`, one EIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network

from lbctl.core import forwarding, nft, nodeview
from lbctl.core.forwarding import EMPTY, Locator, Table
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    Node,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from lbctl.core.nft import Ruleset
from lbctl.core.nftsets import Policy
from lbctl.core.nodeview import PortView

EIP = ip_address("198.51.100.1")
WEB = ObjectRef("default", "web")
INDEX = {"n1": 1, "n2": 2, "n3": 3}
EIP6 = ip_address("2001:db8:100::1")
RANGES = (
    (ip_address("198.51.100.0"), ip_address("198.51.100.127")),
    (ip_address("2001:db8:100::"), ip_address("2001:db8:100::ffff")),
)


def nodes(count: int = 3, cidrs: bool = True) -> tuple[Node, ...]:
    return tuple(
        Node(
            f"n{n}",
            addresses=(ip_address(f"192.0.2.{20 + n}"), ip_address(f"2001:db8:1::2{n}")),
            pod_cidrs=(ip_network(f"10.244.{n}.0/24"), ip_network(f"fd00:10:244:{n}::/64"))
            if cidrs
            else (),
        )
        for n in range(1, count + 1)
    )


# As Calico's own IPAM gives addresses, beside the pod CIDRs 10.2.1.0/24 of n1 and 10.2.2.0/24 of
# n2: both pods are on n1. STRAY has an address of no node's, TAKEN one of n2's.
STRAY, TAKEN = (
    Endpoint(ip_address(address), 8080, "n1", f"pod-{address}")
    for address in ("10.2.56.1", "10.2.2.65")
)


def blocks() -> tuple[Node, ...]:
    """n1, n2 and n3 with pod CIDRs that nobody's pods are in."""
    return tuple(replace(n, pod_cidrs=(ip_network(f"10.2.{n.name[1:]}.0/24"),)) for n in nodes())


def pod(n: int, p: int, flags: str = "rs", version: int = 4) -> Endpoint:
    return Endpoint(
        ip_address(f"10.244.{n}.{p}" if version == 4 else f"fd00:10:244:{n}::{p}"),
        8080,
        f"n{n}",
        "pod",
        "r" in flags,
        "s" in flags,
        "t" in flags,
    )


def service(
    *,
    affinity: bool = False,
    protocols: tuple[Protocol, ...] = (Protocol.TCP,),
    sources: tuple[str, ...] = (),
) -> Service:
    ports = tuple(ServicePort("", protocol, 80) for protocol in protocols)
    return Service(
        WEB,
        "uid",
        0.0,
        ports,
        True,
        affinity_s=10800 if affinity else None,
        source_ranges=tuple(ip_network(text) for text in sources),
    )


def table(
    *pods: Endpoint,
    down: frozenset[str] = frozenset(),
    previous: Table = EMPTY,
    locator: Locator | None = None,
    of: Service | None = None,
    eips: tuple[Address, ...] = (EIP,),
    fallen: frozenset[str] = frozenset(),
    doubtful: frozenset[str] = frozenset(),
) -> Table:
    of = of or service()
    found = tuple(PortEndpoints(p.name, p.protocol, pods) for p in of.ports)
    return forwarding.build(
        [Eip(eip, "public", WEB, "uid") for eip in eips],
        {WEB: of},
        {WEB: ServiceEndpoints(WEB, found)},
        locator or Locator(nodes()),
        down,
        previous,
        fallen=fallen,
        doubtful=doubtful,
    )


def ruleset(
    view: Mapping[Address, tuple[PortView, ...]],
    me: str,
    generation: int,
    of: Table | None = None,
    policy: Policy | None = None,
) -> Ruleset:
    """of: the view's table, for the source ranges."""
    index = {name: number for name, number in INDEX.items() if name != me}
    sources = {a: entry.sources for a, entry in of.eips.items() if entry.sources} if of else {}
    return Ruleset(
        generation,
        ("eth0",),
        tuple(f"02:00:00:00:00:0{number}" for number in index.values()),
        nft.merged([*RANGES, *((a, a) for a in view)]),
        {
            (address, port.table.protocol.value, port.table.port): nodeview.elements(
                address, port, me, index
            )
            for address, ports in view.items()
            for port in ports
        },
        sources,
        policy or Policy(),
    )
