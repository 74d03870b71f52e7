"""The allocator at the sizes of the largest sites: pure, no process but this one."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

from lbctl.core import config, names
from lbctl.core.allocator import Allocator
from lbctl.core.model import Eip, ObjectRef, Protocol, Service, ServicePort

from .timing import Measured, timed

_MANY = 100_000
_RESTORED = 10_000


def _config(addresses: str) -> config.Config:
    return config.parse(
        f"version: 1\npools: [{{name: big, addresses: [{addresses}]}}]\n"
        "bgp: {asn: 64512, peers: []}\n"
    )


def _services(count: int) -> list[Service]:
    port = (ServicePort("", Protocol.TCP, 80),)
    return [
        Service(ObjectRef("default", f"s{n:06}"), f"uid-{n}", float(n), port, is_load_balancer=True)
        for n in range(count)
    ]


def _filled(parsed: config.Config, services: list[Service]) -> Allocator:
    allocator = Allocator(parsed)
    for service in services:
        allocator.set_service(service)
    allocator.plan()
    return allocator


def measure(runs: int) -> Iterator[Measured]:
    """100,000 Services from a /14, one from ten million addresses, 10,000 restored, memory."""
    gc.set_threshold(50_000, 50, 100)  # as manager/main.py has it
    wide, many = _config("10.0.0.0/14"), _services(_MANY)
    whole = timed(lambda: _filled(wide, many), runs)
    yield f"allocation of {_MANY:,} Services from a /14, pure", whole, "ms"
    tracemalloc.start()
    kept = _filled(wide, many)
    used = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    yield f"memory of {len(kept.decisions()):,} Services allocated", (used,), "MiB"

    huge = _filled(_config("10.0.0.0-10.152.150.127"), [])  # ten million
    fresh = iter(_services(runs * 20))

    def one() -> None:
        huge.set_service(next(fresh))
        huge.plan()

    yield "one allocation in a pool of 10 million free addresses", timed(one, runs * 20), "ms"

    base = int(ip_address("10.0.0.0"))
    eips = [
        Eip(ip_address(base + n), "big", service.ref, service.uid)
        for n, service in enumerate(many[:_RESTORED])
    ]
    settled = [
        replace(
            service,
            ingress=(eip.address,),
            finalizers=(names.FINALIZER,),
            annotations=((names.ANNOTATION_POOL, eip.pool),),
        )
        for service, eip in zip(many, eips, strict=False)
    ]

    def restore() -> None:
        allocator = Allocator(wide)
        for eip in eips:
            allocator.set_eip(eip)
        for service in settled:
            allocator.set_service(service)
        if allocator.plan():
            raise SystemExit("what was restored is not settled")

    yield f"restore of {_RESTORED:,} Services with their EIPs, pure", timed(restore, runs), "ms"
