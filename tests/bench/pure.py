"""The pure half: allocation and table build, no process but this one."""

from __future__ import annotations

from collections.abc import Iterator

from lbctl.core import config, maglev
from lbctl.core.allocator import Allocator
from lbctl.core.model import ObjectRef, Protocol, Service, ServicePort

from . import addresses, change
from .timing import Measured, timed

_SERVICES = 10_000
_CONFIG = """\
version: 1
pools: [{name: big, addresses: [198.18.0.0/16]}]
bgp: {asn: 64512, peers: [{name: tor-a, address: 192.0.2.1, asn: 64500}]}
"""


def services(count: int) -> list[Service]:
    """So many Services without an address."""
    port = (ServicePort("", Protocol.TCP, 80),)
    return [
        Service(ObjectRef("default", f"s{n:05}"), f"uid-{n}", float(n), port, is_load_balancer=True)
        for n in range(count)
    ]


def measure(runs: int) -> Iterator[Measured]:
    """Allocation of 10,000 Services, of one more beside them, and Maglev tables."""
    parsed, many = config.parse(_CONFIG), services(_SERVICES + 1)

    def whole() -> Allocator:
        allocator = Allocator(parsed)
        for service in many[:_SERVICES]:
            allocator.set_service(service)
        actions = allocator.plan()
        if len(actions) < _SERVICES:
            raise SystemExit(f"only {len(actions)} actions for {_SERVICES} Services")
        return allocator

    yield f"allocation of {_SERVICES:,} Services, pure", timed(whole, runs), "ms"
    full = [whole() for _ in range(runs)]
    unused = iter(full)  # `full` keeps them: the clock must not see one being freed

    def one_more() -> None:
        allocator = next(unused)
        allocator.set_service(many[-1])
        allocator.plan()

    yield "one Service more beside them, pure", timed(one_more, runs), "ms"
    for count in (4, 10, 100):
        names = [f"10.244.{n // 250}.{n % 250}|8080" for n in range(count)]
        what = f"Maglev table, {count} endpoints, {maglev.size_for(count)} buckets"
        yield what, timed(lambda names=names: maglev.table(names), runs * 5), "ms"  # type: ignore[misc]
    yield from addresses.measure(runs)
    yield from change.measure(runs)
