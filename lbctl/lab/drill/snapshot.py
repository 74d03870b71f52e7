"""Takes a `Snapshot` of a lab: asks the API server, the managers, the kernels and the EIPs.

Rules: it changes nothing; what cannot be asked shows as missing in the snapshot, never as an error.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Final

from lbctl.core import config, names
from lbctl.core.config import Config
from lbctl.kube import client as kube
from lbctl.lab import processes, switch
from lbctl.lab.drill.invariants import EipSeen, ServiceSeen, Snapshot
from lbctl.lab.drill.site import Site, words_of
from lbctl.lab.machine import Machine

SHARING: Final = "lbctl.io/allow-shared-ip"
_ASKED: Final = 3  # requests to each EIP
# Ranges are the pools themselves; the rate limiters' entries go by themselves after seconds.
_NOT_ENTRIES: Final = re.compile(r"\tset (ranges|rate|ping_rate) \{.*?\n\t\}", re.DOTALL)
_ADDRESS: Final = re.compile(r"[0-9a-f]+[.:][0-9a-f.:]+")
_PASSING: Final = frozenset({"ip", "nft", "nsenter", "setpriv", "sh", "sleep", "vtysh"})


def take(site: Site, usual: dict[str, Counter[str]]) -> Snapshot:
    """Look at everything once. usual: `programs` of the same lab before anything happened.

    Raises KubeError if the API server does not answer.
    """
    pools = config.parse(site.config)
    found = [s for s in site.api.all(kube.SERVICES) if s["spec"].get("type") == "LoadBalancer"]
    return Snapshot(
        nodes=frozenset(node.name for node in site.lab.of_role("node")),
        services=tuple(_service(item) for item in found),
        eips=tuple(_eip(item) for item in site.api.all(kube.EIPS)),
        managers={m.name: site.manager_state(m) for m in site.lab.of_role("control")},
        routes={
            m.name: {
                prefix: hops
                for prefix, hops in switch.bgp_routes(m).items()
                if pools.pool_of(ip_address(prefix)) is not None
            }
            for m in site.lab.of_role("switch")
            if m.alive
        },
        tables={m.name: _table(m, pools) for m in site.lab.of_role("node") if m.alive},
        answers={key: why for item in found for key, why in _answers(site, item).items()},
        programs=programs(site),
        usual=usual,
    )


def programs(site: Site) -> dict[str, Counter[str]]:
    """What runs in each machine's network, the client's left out (that is the traffic)."""
    return {
        machine.name: Counter(
            name
            for pid in processes.members([machine.netns])
            if (name := _program(pid)) and name not in _PASSING
        )
        for machine in site.lab.machines
        if machine.role != "client"
    }


def _program(pid: processes.Pid) -> str:
    """The program's name, a Python one's module or script; " stopped" if it is."""
    words = words_of(pid)
    name = words[0].rpartition("/")[2]
    if name.startswith("python") and len(words) > 2:
        name = words[2] if words[1] == "-m" else words[1].rpartition("/")[2]
    return f"{name} stopped" if processes.is_stopped(pid) else name


def _service(item: dict[str, Any]) -> ServiceSeen:
    ingress = item.get("status", {}).get("loadBalancer", {}).get("ingress") or []
    asked = item["metadata"].get("annotations") or {}
    name = str(item["metadata"]["name"])
    return ServiceSeen(name, tuple(str(i["ip"]) for i in ingress), str(asked.get(SHARING, "")))


def _eip(item: dict[str, Any]) -> EipSeen:
    spec = item["spec"]
    members = (spec["owner"], *(spec.get("sharers") or ()))
    return EipSeen(spec["address"], spec["phase"], tuple(str(m["name"]) for m in members))


def _table(machine: Machine, pools: Config) -> frozenset[str]:
    """The EIPs that a node's tables name anywhere."""
    found = set()
    for family in ("ip", "ip6"):
        text = machine.run("nft", "list", "table", family, names.NFT_TABLE, check=False).stdout
        for word in _ADDRESS.findall(_NOT_ENTRIES.sub("", text)):
            with suppress(ValueError):
                if pools.pool_of(ip_address(word)) is not None:
                    found.add(word)
    return frozenset(found)


def _answers(site: Site, item: dict[str, Any]) -> dict[str, str]:
    """Per address of a Service: "" if its own pods answer every time."""
    seen = _service(item)
    port = next(p["port"] for p in item["spec"]["ports"] if p["protocol"] == "TCP")
    found = {}
    for address in seen.addresses:
        host = f"[{address}]" if ":" in address else address
        done = site.lab.machine("client").run(
            *("curl", "-s", "--max-time", "3", "-H", "Connection: close"),
            f"http://{host}:{port}/n/[1-{_ASKED}]",
            check=False,
        )
        pods = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
        own = [pod for pod in pods if pod.startswith(f"{seen.name}-")]
        why = f"{len(own)} of {_ASKED} requests answered by its pods"
        found[f"{seen.name} {address}"] = "" if len(own) == _ASKED else why
    return found
