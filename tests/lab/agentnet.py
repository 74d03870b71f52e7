"""A small network of the agent's own tests: nodes on one segment or on several, a router with
layer-4 ECMP, a client, and pods behind each node. Namespaces bear the prefix that the caller gives.

Every process started here is stopped by pid in `close`, and every namespace is removed.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIMIT_S = 60.0
POOL = "198.51.100.0/25"
POOL6 = "2001:db8:100::/64"


def sh(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def wait_for(what: str, check: Any, limit_s: float = LIMIT_S) -> Any:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {limit_s:.0f} s in vain for {what}")


@dataclass
class Helper:
    """A child process in a namespace that speaks JSON lines both ways."""

    process: subprocess.Popen[str]
    said: queue.Queue[str | None] = field(default_factory=queue.Queue)
    thread: threading.Thread | None = None

    def tell(self, message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self, what: str, accept: Any = bool, limit_s: float = LIMIT_S) -> Any:
        """The next line that `accept` takes; those before it are passed over."""
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            try:
                line = self.said.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                raise AssertionError(f"{what}: the helper ended ({self.process.wait()})")
            message = json.loads(line)
            if accept(message):
                return message
        raise AssertionError(f"waited {limit_s:.0f} s in vain for {what}")

    def listen(self) -> None:
        """Runs in a thread: a pipe's buffer and `select` do not go together."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(line)
        self.said.put(None)

    def stop(self, signal: int = 15) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.thread is not None:
            self.thread.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Net:
    """Router `r` (192.0.2.1, 203.0.113.1), client `c` (203.0.113.10), nodes `n1` … (192.0.2.2N).

    racks: each node's subnet, 192.0.RACK.0/24 and, with ipv6, 2001:db8:RACK::/64.
    """

    def __init__(
        self,
        prefix: str,
        nodes: int = 3,
        pods: int = 2,
        racks: tuple[int, ...] = (),
        ipv6: bool = False,
    ) -> None:
        self.prefix = prefix
        self.nodes = nodes
        self.racks = racks or (2,) * nodes
        self.ipv6 = ipv6
        self.pods = pods
        self.helpers: list[Helper] = []
        self.names = ["r", "c"]
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def ns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def ip(self, name: str, text: str) -> None:
        sh("ip", "-n", self.ns(name), "-batch", "-", text=text)

    def run(self, name: str, *command: str) -> str:
        return sh("ip", "netns", "exec", self.ns(name), *command)

    def sysctl(self, name: str, *settings: str) -> None:
        self.run(name, "sysctl", "-qw", *settings)

    def start(self, name: str, script: str, *arguments: str) -> Helper:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.ns(name), sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        helper = Helper(process)
        helper.thread = threading.Thread(target=helper.listen)
        helper.thread.start()
        self.helpers.append(helper)
        return helper

    def pod_address(self, node: int, pod: int, version: int = 4) -> str:
        return f"10.244.{node}.{pod + 1}" if version == 4 else f"fd00:10:244:{node}::{pod + 1}"

    def address(self, node: int, version: int = 4) -> str:
        rack = self.racks[node - 1]
        return f"192.0.{rack}.{20 + node}" if version == 4 else f"2001:db8:{rack}::2{node}"

    def _build(self) -> None:
        pods = [(n, p) for n in range(1, self.nodes + 1) for p in range(1, self.pods + 1)]
        self.names += [f"n{n}" for n in range(1, self.nodes + 1)]
        self.names += [f"p{n}{p}" for n, p in pods]
        for name in self.names:
            sh("ip", "netns", "add", self.ns(name))
            if self.ipv6:
                self.sysctl(name, "net.ipv6.conf.default.accept_dad=0")
        self.ip("r", "link set lo up\n")
        for rack in sorted(set(self.racks)):
            self.ip(
                "r",
                f"link add br{rack} type bridge\nlink set br{rack} up\n"
                f"addr add 192.0.{rack}.1/24 dev br{rack}\n",
            )
        self._link("r", "c0", "c", "eth0")
        self.ip("r", "addr add 203.0.113.1/24 dev c0\n")
        self.ip("c", "addr add 203.0.113.10/24 dev eth0\nroute add default via 203.0.113.1\n")
        # Else a retransmission takes another path: the switch hashes by the client socket's hash.
        self.sysctl("c", "net.core.txrehash=0", "net.ipv4.tcp_timestamps=2")
        self.sysctl("r", "net.ipv4.ip_forward=1", "net.ipv4.fib_multipath_hash_policy=1")
        for n, rack in enumerate(self.racks, 1):
            self._link("r", f"n{n}", f"n{n}", "eth0")
            self.ip("r", f"link set n{n} master br{rack}\n")
            self.ip(
                f"n{n}",
                f"addr add {self.address(n)}/24 dev eth0\nroute add default via 192.0.{rack}.1\n",
            )
            self.sysctl(f"n{n}", "net.ipv4.ip_forward=1")
            routes = "".join(
                f"route add 10.244.{m}.0/24 via {self.address(m)}\n"
                for m, other in enumerate(self.racks, 1)
                if m != n and other == rack
            )
            self.ip(f"n{n}", routes)
        self._build_pods(pods)
        if self.ipv6:
            self._build_ipv6(pods)
        self.ecmp(list(range(1, self.nodes + 1)))

    def _build_pods(self, pods: list[tuple[int, int]]) -> None:
        for n, p in pods:
            address = self.pod_address(n, p)
            self._link(f"n{n}", f"pod{p}", f"p{n}{p}", "eth0")
            self.ip(
                f"n{n}", f"addr add 169.254.{n}.{p}/32 dev pod{p}\nroute add {address} dev pod{p}\n"
            )
            self.ip(
                f"p{n}{p}",
                f"addr add {address}/32 dev eth0\nroute add 169.254.{n}.{p} dev eth0\n"
                f"route add default via 169.254.{n}.{p} dev eth0\n",
            )

    def _build_ipv6(self, pods: list[tuple[int, int]]) -> None:
        """The same again in IPv6."""
        racks = sorted(set(self.racks))
        lines = "".join(f"addr add 2001:db8:{rack}::1/64 dev br{rack}\n" for rack in racks)
        self.ip("r", f"addr add 2001:db8:ff::1/64 dev c0\n{lines}")
        self.ip("c", "addr add 2001:db8:ff::10/64 dev eth0\nroute add default via 2001:db8:ff::1\n")
        self.sysctl("r", "net.ipv6.conf.all.forwarding=1", "net.ipv6.fib_multipath_hash_policy=1")
        for n, rack in enumerate(self.racks, 1):
            self.sysctl(f"n{n}", "net.ipv6.conf.all.forwarding=1")
            self.ip(
                f"n{n}",
                f"addr add {self.address(n, 6)}/64 dev eth0\n"
                f"route add default via 2001:db8:{rack}::1\n",
            )
        for n, p in pods:
            address = self.pod_address(n, p, 6)
            self.ip(f"n{n}", f"addr add fe80::1/64 dev pod{p}\nroute add {address} dev pod{p}\n")
            self.ip(
                f"p{n}{p}",
                f"addr add {address}/128 dev eth0\nroute add default via fe80::1 dev eth0\n",
            )

    def _link(self, a: str, in_a: str, b: str, in_b: str) -> None:
        self.ip(
            a,
            f"link add {in_a} type veth peer name {in_b} netns {self.ns(b)}\nlink set {in_a} up\n",
        )
        self.ip(b, f"link set lo up\nlink set {in_b} up\n")

    def ecmp(self, nodes: list[int], prefix: str = POOL) -> None:
        """Let the router spread the pool's packets over these nodes."""
        version = 6 if ":" in prefix else 4
        hops = "".join(f" nexthop via {self.address(n, version)}" for n in nodes)
        if nodes:
            self.ip("r", f"route replace {prefix}{hops}\n")
        else:
            self.run("r", "ip", "route", "flush", prefix)

    def start_pods(self, *names: str) -> None:
        for name in names or [n for n in self.names if n.startswith("p")]:
            helper = self.start(name, "agent_pod.py", name)
            helper.hear(f"pod {name} to listen")

    def cut(self, node: int) -> None:
        """Power cut: every packet is dropped silently, carrier stays."""
        chains = "".join(
            f"chain {hook} {{ type filter hook {hook} device eth0 priority -500; policy drop; }}\n"
            for hook in ("ingress", "egress")
        )
        text = f"table netdev cut {{\n{chains}}}\n"
        sh("ip", "netns", "exec", self.ns(f"n{node}"), "nft", "-f", "-", text=text)

    def close(self) -> None:
        for helper in self.helpers:
            helper.stop()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", self.ns(name)], capture_output=True)
