"""Many Services: the real agent's process and the real kube-proxy's, with the same API server.

Each in a namespace of its own, one after the other; the embedded API server, because the real one
takes minutes to be filled. What counts is the kernel: from the write of an EndpointSlice to the
last change of nftables that followed. CPU is the process's with its children's (nft,
iptables-restore).
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lbctl.lab import kubeproxy
from lbctl.lab.cluster import binaries, embedded
from lbctl.lab.cluster.handle import ClusterSpec
from tests.lab.agentnet import ROOT, Helper, Net, wait_for

SIZES = (10, 1000, 10000)
CHANGES = 7
ENDPOINTS = 10  # of each Service, on as many nodes
QUIET_S = 5.0
LIMIT_S = 240.0
EIPS = int(ip_address("198.18.0.0"))
CONFIG = """\
version: 1
pools: [{name: public, addresses: [198.18.0.0/15]}]
bgp: {asn: 64512, peers: [{name: tor-a, address: 192.0.2.1, asn: 64500}]}
"""
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one program at one size. Seconds, MiB; peak: with its children."""

    load_s: float
    load_cpu_s: float
    change_s: tuple[float, ...]
    change_cpu_s: tuple[float, ...]
    resident: float
    peak: float


def measure(progress: Callable[[str], None]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"One endpoint of one Service changed ({ENDPOINTS} endpoints each), to the kernel."
    yield ""
    yield "| Services | program | change, median (worst) | CPU | load | CPU | memory, peak |"
    yield "|---|---|---|---|---|---|---|"
    for size in SIZES:
        for name in ("this agent", *(f"kube-proxy, {m}" for m in ("nftables", "iptables"))):
            progress(f"{name} with {size:,} Services")
            found = _one(name, size)
            yield (
                f"| {size:,} | {name} | {statistics.median(found.change_s) * 1000:.0f} ms "
                f"({max(found.change_s) * 1000:.0f}) "
                f"| {statistics.median(found.change_cpu_s) * 1000:.0f} ms | {found.load_s:.1f} s "
                f"| {found.load_cpu_s:.1f} s | {found.resident:.0f}, {found.peak:.0f} MiB |"
            )


def _one(name: str, size: int) -> Figures:
    net = Net(f"beside{os.getpid() % 10000}", nodes=1, pods=0)
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        site = Site(net, Path(directory))
        try:
            site.fill(size)
            return Trial(site, name).figures()
        finally:
            site.close()
            net.close()


class Site:
    """An API server with so many Services, reached from node n1."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.net = net
        self.directory = directory
        self.cluster = self._start()
        self.api: Helper = self._connect()
        keys = directory / "keys"
        keys.mkdir()
        (keys / "current").write_bytes(base64.b64encode(secrets.token_bytes(32)))

    def _start(self) -> embedded.EmbeddedCluster:
        prefix = ("ip", "netns", "exec", self.net.ns("r"))
        return embedded.start(ClusterSpec(self.directory, prefix, "192.0.2.1", 6443))

    def _connect(self) -> Helper:
        return self.net.start("r", "agent_api.py", str(self.cluster.kubeconfig))

    def call(self, op: str, path: str, body: Any) -> Any:
        """One request. Raises RuntimeError."""
        self.api.tell({"op": op, "path": path, "body": body})
        result = self.api.hear(f"{op} {path}", lambda m: "result" in m)["result"]
        if isinstance(result, dict) and "error" in result:
            raise RuntimeError(f"{op} {path}: {result['error']}")
        return result

    def fill(self, size: int) -> None:
        """One Service by the API; the others are copies of it in the server's state file."""
        for number in range(1, ENDPOINTS + 1):
            self.call("create", "/api/v1/nodes", _node(number))
        self.call("create", "/api/v1/namespaces", {"metadata": {"name": "lbctl-system"}})
        data = {"config.yaml": CONFIG, "generation": "1"}
        maps = "/api/v1/namespaces/lbctl-system/configmaps"
        self.call("create", maps, {"metadata": {"name": "lbctl-accepted"}, "data": data})
        crd = YAML(typ="safe").load((ROOT / "deploy/kustomize/base/crd.yaml").read_text())
        self.call("create", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
        service = self.call("create", "/api/v1/namespaces/default/services", _service())
        slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
        self.call("create", slices, _slice())
        eip = _eip(service["metadata"]["uid"])
        wait_for("the EIPs to be served", lambda: self._made("/apis/lbctl.io/v1/eips", eip))
        self.api.stop()
        self.cluster.stop()
        state = self.directory / "state.jsonl"
        lines = [json.loads(line) for line in state.read_text().splitlines()]
        with state.open("a") as file:
            for line in _copies(lines, size):
                file.write(json.dumps(line) + "\n")
        self.cluster = self._start()
        self.api = self._connect()

    def _made(self, path: str, body: Any) -> bool:
        with suppress(RuntimeError):
            self.call("create", path, body)
            return True
        return False

    def command(self, name: str) -> list[str]:
        """The command line of a program on n1."""
        enter = ["ip", "netns", "exec", self.net.ns("n1")]
        if name == "this agent":
            own = ["--snapshot-dir", str(self.directory / "n1")]
            keys = ["--keys-dir", str(self.directory / "keys")]
            return [*enter, sys.executable, "-m", "agent.main", *own, *keys]
        mode = kubeproxy.Mode(name.rpartition(" ")[2])
        program = binaries.find(lambda _: None) / "kube-proxy"
        return [*enter, *kubeproxy.command(program, self.cluster.kubeconfig, "n1", mode)]

    def close(self) -> None:
        """End what runs."""
        self.cluster.stop()


def _node(number: int) -> dict[str, Any]:
    cidr = f"10.244.{number}.0/24"
    return {
        "metadata": {"name": f"n{number}"},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": f"192.0.2.{20 + number}"}]},
    }


def _service() -> dict[str, Any]:
    ports = [{"port": 80, "targetPort": 8080, "protocol": "TCP"}]
    spec = {
        "type": "LoadBalancer",
        "loadBalancerClass": "lbctl.io/bgp",
        "allocateLoadBalancerNodePorts": False,
        "ports": ports,
    }
    return {"metadata": {"name": "s00000"}, "spec": spec}


def _slice(ready: int = ENDPOINTS) -> dict[str, Any]:
    """Of the first Service; `ready` of its endpoints are."""
    return {
        "metadata": {"name": "s00000-1", "labels": {"kubernetes.io/service-name": "s00000"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": [f"10.244.{n}.10"],
                "nodeName": f"n{n}",
                "conditions": {"ready": n <= ready, "serving": n <= ready, "terminating": False},
            }
            for n in range(1, ENDPOINTS + 1)
        ],
    }


def _eip(uid: str) -> dict[str, Any]:
    owner = {"namespace": "default", "name": "s00000", "uid": uid}
    address = str(ip_address(EIPS))
    spec = {"address": address, "pool": "public", "owner": owner, "phase": "Bound"}
    return {
        "apiVersion": "lbctl.io/v1",
        "kind": "EIP",
        "metadata": {"name": address},
        "spec": {**spec, "forwarding": True},
    }


def _copies(lines: list[Any], size: int) -> Iterator[Any]:
    """The objects of Service s00000 as those of all others, after it."""
    version = max(line["v"] for line in lines)
    last = {line["r"]: line for line in lines if _text(line).find("s00000") >= 0}
    for number in range(size):
        address = str(ip_address(EIPS + number))
        for resource, line in last.items():
            text = _text(line).replace("s00000", f"s{number:05}")
            text = text.replace(str(ip_address(EIPS)), address)
            made = json.loads(text)
            version += 1
            made["v"] = version
            meta = made["o"]["metadata"]
            meta["resourceVersion"] = str(version)
            if number:
                meta["uid"] = f"{number:08x}{meta['uid'][8:]}"
            if resource == "services":
                place = str(ip_address("10.96.0.10") + number)
                made["o"]["spec"].update(clusterIP=place, clusterIPs=[place])
                made["o"]["status"] = {"loadBalancer": {"ingress": [{"ip": address}]}}
            yield made


def _text(line: Any) -> str:
    return json.dumps(line)


class Trial:
    """One program, from its start."""

    def __init__(self, site: Site, name: str) -> None:
        self._site = site
        self._name = name
        self._changes: list[float] = []
        self._peak = 0.0

    def figures(self) -> Figures:
        """Start it, let it load, change endpoints, end it."""
        watch = self._site.net.start("n1", "../bench/beside_watch.py")
        watch.hear("the watch", lambda _: True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NODE_NAME": "n1",
            "KUBECONFIG": str(self._site.cluster.kubeconfig),
        }
        with (self._site.directory / "program.log").open("wb") as log:
            began = time.monotonic()
            program = subprocess.Popen(
                self._site.command(self._name), env=environment, cwd=ROOT, stdout=log, stderr=log
            )
        try:
            load_s = self._settled(program, watch, began) - began
            load_cpu_s = _cpu_s(program.pid)
            changes = [self._change(program, watch, n) for n in range(CHANGES)]
            took, cost = zip(*changes, strict=True)
            resident = _resident(program.pid)
            return Figures(load_s, load_cpu_s, took, cost, resident, self._peak)
        finally:
            program.kill()
            program.wait()

    def _settled(self, program: subprocess.Popen[bytes], watch: Helper, since: float) -> float:
        """When the kernel changed last, once neither it nor the program has stirred for a while."""
        last, busy = since, time.monotonic()
        cpu = _cpu_s(program.pid)
        while (now := time.monotonic()) < since + LIMIT_S:
            while not watch.said.empty():
                last = max(last, float(watch.said.get_nowait() or 0))
            if program.poll() is not None:
                raise RuntimeError(f"{self._name} ended")
            self._peak = max(self._peak, _resident(program.pid))
            used, cpu = _cpu_s(program.pid) - cpu, _cpu_s(program.pid)
            busy = now if used > 0.05 else busy
            if last > since and now > max(last, busy) + QUIET_S:
                return last
            time.sleep(0.1)
        raise RuntimeError(f"{self._name} did not come to rest in {LIMIT_S:.0f} s")

    def _change(
        self, program: subprocess.Popen[bytes], watch: Helper, number: int
    ) -> tuple[float, float]:
        """One endpoint less, or one more; seconds to the kernel, and of CPU."""
        path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/s00000-1"
        body = _slice(ENDPOINTS - 1 + number % 2)
        idle_s, before = 2.0, _cpu_s(program.pid)
        time.sleep(idle_s)
        idle = (_cpu_s(program.pid) - before) / idle_s
        before, began = _cpu_s(program.pid), time.monotonic()
        self._site.call("patch", path, {"endpoints": body["endpoints"]})
        last = float(watch.hear("a change of nftables", lambda at: at > began, LIMIT_S))
        end = last + 2.0
        while time.monotonic() < end:
            while not watch.said.empty():
                last = float(watch.said.get_nowait() or 0)
            time.sleep(0.02)
        used = _cpu_s(program.pid) - before - idle * (time.monotonic() - began)
        return last - began, max(0.0, used)


def _cpu_s(pid: int) -> float:
    """User and system time of a process and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / _TICK


def _resident(pid: int) -> float:
    """MiB in memory of a process and its children now."""
    total = 0
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (str(pid), *children):
            with suppress(OSError):
                pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE")
    return total / 2**20
