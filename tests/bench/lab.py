"""The whole system: times as a client and a switch see them, and memory, in one lab."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from lbctl.core import names
from lbctl.kube import client as kube
from lbctl.lab import control, workload
from lbctl.lab.api import Api, wait
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.cluster.processes import rss_bytes
from lbctl.lab.lab import Lab, take_down
from tests.lab.system.support import SWITCHES, TOPOLOGY, System

from .timing import Measured

# One question each 5 ms until an answer comes; prints the monotonic instant of the answer, and who.
_FIRST_ANSWER = """
import socket, sys, time
while True:
    try:
        with socket.create_connection((sys.argv[1], 80), 0.25) as s:
            s.settimeout(0.5)
            s.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            body = s.recv(65536).split(b"\\r\\n\\r\\n")[-1].split()
            if body and (len(sys.argv) < 3 or body[0].decode() not in sys.argv[2:]):
                print(time.monotonic(), body[0].decode(), flush=True)
                break
    except OSError:
        pass
    time.sleep(0.005)
"""


# Enough addresses for many Services: RFC 2544's range, which the lab's switches take too.
_MANY = workload.CONFIG.replace("[198.51.100.0/25", "[198.18.0.0/16, 198.51.100.0/25")


def measure(runs: int, services: int, memory_only: bool = False) -> Iterator[Measured]:
    """Bring a lab up, measure, take it down."""
    name = f"bench-{os.getpid()}"
    try:
        lab = Lab.up(TOPOLOGY, name, _progress)
        bring_up(lab, "embedded", _progress)
        with Api(lab.directory / KUBECONFIG) as api:
            system = System(lab, api)
            yield from _memory(system, 1)
            if memory_only:
                yield from _memory(system, services)
                return
            yield "Service created to first answered request", _created(system, runs), "s"
            yield "pod ready to first hit", _pod_ready(system, runs), "s"
            routes, tables = _power_cuts(system, runs)
            yield "power cut to the last switch's route change", routes, "s"
            yield "power cut to the last agent's table change", tables, "s"
            yield from _memory(system, services)
    finally:
        take_down(name)


def _progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _ask(system: System, eip: str, *but: str) -> subprocess.Popen[str]:
    client = system.lab.machine("client")
    argv = ["python3", "-S", "-c", _FIRST_ANSWER, eip, *but]
    return client.popen(*argv, stdout=subprocess.PIPE, text=True)


def _answered(asking: subprocess.Popen[str]) -> float:
    said, _ = asking.communicate(timeout=60)
    return float(said.split()[0])


def _created(system: System, runs: int) -> tuple[float, ...]:
    """The pods run already; the clock starts when the Service is sent to the API server."""
    system.api.apply(workload.deployment("fast", 3))
    system.wait_pods("fast", 3)
    found = []
    for run in range(runs):
        begin = time.monotonic()
        system.api.apply(workload.service(f"fast-{run}", app="fast"))
        eip = wait("an EIP", lambda run=run: system.api.eip_of(f"fast-{run}"), every_s=0.01)  # type: ignore[misc]
        found.append(_answered(_ask(system, eip)) - begin)
    for run in range(runs):
        system.remove(f"fast-{run}")
    system.remove("fast")
    return tuple(found)


def _pod_ready(system: System, runs: int) -> tuple[float, ...]:
    """From a second pod's Ready condition in the API server to its first answer."""
    found = []
    eip = system.deploy("grow", replicas=1)
    for _ in range(runs):
        old = system.api.ready_pods("grow")
        asking = _ask(system, eip, *old)
        system.api.scale("grow", 2)
        wait("the second pod", lambda: len(system.api.ready_pods("grow")) == 2, every_s=0.005)
        ready = time.monotonic()
        found.append(max(0.0, _answered(asking) - ready))
        system.api.scale("grow", 1)
        system.wait_pods("grow", 1)
    system.remove("grow")
    return tuple(found)


def _power_cuts(system: System, runs: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cut node-3, which hosts a third of the pods; wait for switches and agents."""
    eip = system.deploy("cut", replicas=6)
    routes, tables = [], []
    for _ in range(runs):
        system.wait_system_ready()
        system.wait_pods("cut", 6)
        system.wait_routed(eip)
        begin, wall = time.monotonic(), dt.datetime.now(dt.UTC)
        system.lab.power_cut("node-3")
        left = set(SWITCHES)
        while left:
            left -= {
                n for n in left if "192.0.2.23" not in system.lab.kernel_routes(n, f"{eip}/32")
            }
        routes.append(time.monotonic() - begin)
        tables.append(max(_applied(system, name, wall) for name in ("node-1", "node-2")))
        system.lab.power_on("node-3")
    system.remove("cut")
    return tuple(routes), tuple(tables)


def _applied(system: System, node: str, since: dt.datetime) -> float:
    """Seconds from `since` to the agent's first word that a table is in the kernel."""
    logs = system.lab.directory / "logs" / node

    def look() -> float | None:
        for path in sorted(logs.glob("lbctl-agent-*/agent.log")):
            for line in path.read_text(errors="replace").splitlines():
                if '"table_applied"' in line:
                    at = dt.datetime.fromisoformat(json.loads(line)["timestamp"])
                    if at > since:
                        return (at - since).total_seconds()
        return None

    return wait(f"a new table on {node}", look)


def _memory(system: System, count: int) -> Iterator[Measured]:
    """Resident memory of each of our containers, all its processes, with `count` Services."""
    system.api.apply(workload.config_map(_MANY))
    system.api.apply(workload.deployment("many", 2))
    system.wait_pods("many", 2)
    for number in range(count):
        system.api.apply(workload.service(f"many-{number}", app="many"))
    wait(
        f"{count} routes on every switch",
        lambda: all(
            len(system.vtysh(name, "show ip route bgp json")) >= count for name in SWITCHES
        ),
        limit_s=300,
        every_s=1.0,
    )
    for app, container in (
        (names.MANAGER_APP, "manager"),
        (names.MANAGER_APP, "speaker"),
        (names.AGENT_APP, "agent"),
    ):
        pods = [pod["metadata"]["name"] for pod in system.api.system_pods(app)]
        sizes = tuple(
            sum(rss_bytes(pid) for pid in control.container_pids(system.lab, pod, container))
            / 2**20
            for pod in pods
        )
        yield f"memory of {container}, {count:,} Services", sizes, "MiB"
    for number in range(count):
        system.api.delete(kube.SERVICES, f"many-{number}")
    system.remove("many")
    wait("the Services to be gone", lambda: len(system.api.all(kube.SERVICES, "default")) <= 1, 600)
