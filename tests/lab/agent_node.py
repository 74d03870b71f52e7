"""Runs the agent's engine in a namespace, fed by JSON lines instead of an API server.

{"eips": {ADDRESS: NAME}, "services": {NAME: {"ports": [[NAME, PROTO, PORT]], "affinity": bool,
"endpoints": [[ADDRESS, PORT, FLAGS]]}}, "nodes": N, "ranges": [[FIRST, LAST]], "down": [NAME]};
"racks": each node's subnet, "families": IP versions and "steering" if not as usual.
FLAGS are letters: r ready, s serving, t terminating. Prints one line for each confirmed table, and
{"counters": …} for {"counters": true}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from ipaddress import ip_address, ip_network
from typing import Any

from agent import routes
from agent.dataplane import Dataplane
from agent.engine import Engine
from agent.inputs import Inputs
from lbctl import log
from lbctl.core.model import (
    Eip,
    Endpoint,
    ForwardingOptions,
    Node,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
)


def inputs_of(spec: dict[str, Any]) -> Inputs:
    services, endpoints = {}, {}
    for name, given in spec["services"].items():
        ref = ObjectRef("default", name)
        ports = tuple(ServicePort(n, Protocol(proto), port) for n, proto, port in given["ports"])
        services[ref] = Service(
            ref,
            name,
            0.0,
            ports,
            True,
            affinity_s=10800 if given.get("affinity") else None,
            source_ranges=tuple(ip_network(text) for text in given.get("sources", ())),
        )
        found = tuple(
            Endpoint(ip_address(a), port, "", "pod", "r" in flags, "s" in flags, "t" in flags)
            for a, port, flags in given["endpoints"]
        )
        endpoints[ref] = ServiceEndpoints(
            ref, tuple(PortEndpoints(p.name, p.protocol, found) for p in ports)
        )
    return Inputs(
        eips={
            (address := ip_address(a)): Eip(address, "public", ObjectRef("default", name), name)
            for a, name in spec["eips"].items()
        },
        services=services,
        endpoints=endpoints,
        nodes=tuple(node_of(n, spec) for n in range(1, spec["nodes"] + 1)),
        forwarding=ForwardingOptions(steering=spec.get("steering", "auto")),
        ranges=tuple((ip_address(a), ip_address(b)) for a, b in spec["ranges"]),
        config_generation=1,
    )


def node_of(n: int, spec: dict[str, Any]) -> Node:
    rack = spec["racks"][n - 1] if "racks" in spec else 2
    addresses, cidrs = [], []
    if 4 in spec.get("families", [4]):
        addresses.append(f"192.0.{rack}.{20 + n}")
        cidrs.append(f"10.244.{n}.0/24")
    if 6 in spec.get("families", [4]):
        addresses.append(f"2001:db8:{rack}::2{n}")
        cidrs.append(f"fd00:10:244:{n}::/64")
    return Node(
        f"n{n}",
        addresses=tuple(map(ip_address, addresses)),
        pod_cidrs=tuple(map(ip_network, cidrs)),
    )


def say(message: Any) -> None:
    print(json.dumps(message), flush=True)


async def main() -> None:
    log.setup("info")
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    dataplane = Dataplane()
    async with routes.opened() as links, asyncio.TaskGroup() as group:
        engine = Engine(
            sys.argv[1],
            dataplane,
            links,
            lambda done: say({"generation": done.generation, "digest": f"{done.table.digest:x}"}),
            lambda state: say({"macs": len(state.macs), "elements": len(state.rules.ports)}),
        )
        task = group.create_task(engine.run())
        while line := await reader.readline():
            spec = json.loads(line)
            if "counters" in spec:
                say(
                    {
                        "counters": dataplane.counters(),
                        "repairs": engine.repairs,
                        "unreachable": engine.unreachable,
                    }
                )
                continue
            engine.set_down(frozenset(spec.get("down", ())))
            engine.feed(inputs_of(spec))
        task.cancel()
    dataplane.close()


asyncio.run(main())
