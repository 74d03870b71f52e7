"""A manager's node watch or an agent's responder as a process of its own; it tells in JSON lines.

`python -m tests.lab.probe_process agent NODE NODES [--empty]` publishes one EIP (or none) and
prints each down set;
`… manager ID OTHER NODE=ADDRESS…` prints the views on every change. Used inside namespaces.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from ipaddress import ip_address

from agent.responder import Responder
from lbctl.core.keys import Keys
from lbctl.core.model import Behind, Node
from manager.nodes import NodeWatch

KEYS = Keys(bytes(range(50, 82)))
EIP = ip_address("198.51.100.1")


def say(**values: object) -> None:
    print(json.dumps({"at_s": time.monotonic(), **values}), flush=True)


async def agent(node: str, nodes: list[str], empty: bool) -> None:
    responder = Responder(
        node, KEYS, time.time_ns(), lambda: nodes, lambda down: say(down=sorted(down))
    )
    await responder.start()
    responder.publish({} if empty else {EIP: Behind.HERE}, digest=77, config_generation=1)
    say(started=node)
    await asyncio.Event().wait()


async def manager(name: str, other: str, nodes: dict[str, str]) -> None:
    def tell(_: frozenset[str]) -> None:
        views = watch.prober.views().values()
        say(
            views={
                view.name: [view.state, view.held, view.stable, len(view.confirmed)]
                for view in views
            }
        )

    watch = NodeWatch(KEYS, name, lambda: [ip_address(other)], lambda: True, tell)
    watch.prober.set_nodes(
        {n: Node(n, uid=n, addresses=(ip_address(a),)) for n, a in nodes.items()}
    )
    say(started=name)
    await watch.run()


if __name__ == "__main__":
    _, role, me, *rest = sys.argv
    if role == "agent":
        asyncio.run(agent(me, rest[0].split(","), "--empty" in rest))
    else:
        asyncio.run(manager(me, rest[0], dict(item.split("=") for item in rest[1:])))
