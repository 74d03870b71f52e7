"""Small clusters for the forwarding tests: nodes n1 …, one Service `web`, one EIP."""

from __future__ import annotations

from collections.abc import Mapping
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
from lbctl.core.nodeview import PortView

EIP = ip_address("198.51.100.1")
WEB = ObjectRef("default", "web")
INDEX = {"n1": 1, "n2": 2, "n3": 3}
RANGES = ((ip_address("198.51.100.0"), ip_address("198.51.100.127")),)


def nodes(count: int = 3, cidrs: bool = True) -> tuple[Node, ...]:
    return tuple(
        Node(
            f"n{n}",
            addresses=(ip_address(f"192.0.2.{20 + n}"),),
            pod_cidrs=(ip_network(f"10.244.{n}.0/24"),) if cidrs else (),
        )
        for n in range(1, count + 1)
    )


def pod(n: int, p: int, flags: str = "rs") -> Endpoint:
    return Endpoint(
        ip_address(f"10.244.{n}.{p}"),
        8080,
        f"n{n}",
        "pod",
        "r" in flags,
        "s" in flags,
        "t" in flags,
    )


def service(*, affinity: bool = False, protocol: Protocol = Protocol.TCP) -> Service:
    ports = (ServicePort("", protocol, 80),)
    return Service(WEB, "uid", 0.0, ports, True, affinity_s=10800 if affinity else None)


def table(
    *pods: Endpoint,
    down: frozenset[str] = frozenset(),
    previous: Table = EMPTY,
    locator: Locator | None = None,
    of: Service | None = None,
) -> Table:
    of = of or service()
    found = tuple(PortEndpoints(p.name, p.protocol, pods) for p in of.ports)
    return forwarding.build(
        [Eip(EIP, "public", WEB, "uid")],
        {WEB: of},
        {WEB: ServiceEndpoints(WEB, found)},
        locator or Locator(nodes()),
        down,
        previous,
    )


def ruleset(view: Mapping[Address, tuple[PortView, ...]], me: str, generation: int) -> Ruleset:
    index = {name: number for name, number in INDEX.items() if name != me}
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
    )
