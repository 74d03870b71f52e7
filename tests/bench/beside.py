"""This agent beside real kube-proxy alone: the same faults, at the same time, in the same lab.

Two equal Deployments. `ours` has a Service whose EIP is ours; `theirs` has a Service of another
class whose address, as under MetalLB, every node leads to and kube-proxy alone forwards. The
switches resolve that address through our EIP's own route, so both have the same next hops at every
instant; detection is the same, and what differs is what the nodes do with a packet. Each
connection carries numbered data both ways, through the fault and 10 s after it; lost, moved, reset
all count as broken. kube-proxy runs in one mode, then in the other, in the same lab.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from lbctl.kube import client as kube
from lbctl.lab import entries, workload
from lbctl.lab.api import Api, wait
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.kubeproxy import Mode, write_mode
from lbctl.lab.lab import Lab, take_down
from lbctl.lab.load import Load, Report
from lbctl.lab.machine import Machine
from tests.lab.system.support import SWITCHES, TOPOLOGY, System

from . import beside_scale, beside_speed

FLOWS = 500
INTERVAL_S = 0.25  # 500 flows twice, on the same two cores as the whole lab
AFTER_S = 10.0
PORTS_EACH = 2000
_PORTS = iter(range(2000, 64000, PORTS_EACH))
FLAP_S = 2.0
RETURN_S = 600.0  # a node that went several times is held back longer each time
VIPS = {"Cluster": "198.18.0.1", "Local": "198.18.0.2"}
NODES = ("node-1", "node-2", "node-3")
HOSTS = ("node-1", "node-2")  # where the pods are under Cluster; node-3 only forwards
PODS = {"Cluster": 4, "Local": 6}  # two on a node
PORTS = (("TCP", 80, 8080), ("UDP", 9, 9))  # no pod listens on the second
SIDES = ("ours", "theirs")
LABEL = "bench.lbctl.io/pods"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault. Of each side: flows that count, those of them that broke, flows by the node."""

    policy: str
    fault: str
    counted: dict[str, int]
    broken: dict[str, int]
    entered: dict[str, int]  # at the node that the fault is about


class Rig:
    """A lab with both Services of one policy, and the faults."""

    def __init__(self, system: System, policy: str) -> None:
        self.system = system
        self.policy = policy
        self.pods = PODS[policy]
        self.targets: dict[str, str] = {}

    def deploy(self) -> None:
        """Both Deployments on HOSTS and their Services, routed."""
        for side in SIDES:
            name, made = self.name(side), workload.deployment(self.name(side), self.pods)
            if self.policy == "Cluster":
                made["spec"]["template"]["spec"]["nodeSelector"] = {LABEL: "yes"}
            service = workload.service(name, ports=PORTS, policy=self.policy)
            if side == "theirs":
                service["spec"]["loadBalancerClass"] = "bench.lbctl.io/kube-proxy"
            self.system.api.apply(made, service)
        for side in SIDES:
            self.system.wait_pods(self.name(side), self.pods)
        eip = wait("an EIP", lambda: self.system.api.eip_of(self.name("ours")))
        self.targets = {"ours": eip, "theirs": VIPS[self.policy]}
        status = {"status": {"loadBalancer": {"ingress": [{"ip": self.targets["theirs"]}]}}}
        self.system.api.patch(kube.SERVICES, self.name("theirs"), status, sub="status")
        for switch in SWITCHES:
            line = f"ip route {self.targets['theirs']}/32 {eip}"
            self.system.lab.machine(switch).run("vtysh", "-c", "configure terminal", "-c", line)
        self.wait_whole()

    def name(self, side: str) -> str:
        """Of the side's Deployment and Service."""
        return f"{side}-{self.policy.lower()}"

    def wait_routed(self, to: tuple[str, ...] = NODES) -> None:
        """Both addresses lead to exactly these nodes on both switches."""
        for target in self.targets.values():
            self.system.wait_routed(target, to, RETURN_S)

    def wait_whole(self) -> None:
        """All nodes on, all pods ready, kube-proxy at work on each node, routes complete."""
        for machine in self.system.lab.machines:
            if not machine.alive:
                self.system.lab.power_on(machine.name)
        self.system.wait_system_ready()
        for side in SIDES:
            self.system.wait_pods(self.name(side), self.pods)
        self.wait_routed()
        self.wait_proxies(self.targets["theirs"])

    def wait_proxies(self, address: str) -> None:
        """Every node's own kube-proxy answers for the address."""
        for node in self.system.lab.of_role("node"):
            wait(f"kube-proxy on {node.name}", lambda node=node: _answers(node, address))  # type: ignore[misc]

    def try_fault(
        self, fault: str, node: str, act: Callable[[], None], dead: bool = False
    ) -> Outcome:
        """FLOWS connections to each side through `act`; dead: do not count the node's own pods."""
        system, client = self.system, self.system.lab.machine("client")
        first = next(_PORTS)  # no port twice: nodes remember flows of earlier faults for minutes
        client.run("sysctl", "-qw", f"net.ipv4.ip_local_port_range={first} {first + PORTS_EACH}")
        nodes = {side: system.api.pod_nodes(self.name(side)) for side in SIDES}
        entries.watch(system.lab, self.targets.values())
        with ExitStack() as stack:
            loads = {
                side: stack.enter_context(
                    Load.start(client, target, 80, flows=FLOWS, interval_s=INTERVAL_S, timeout_s=10)
                )
                for side, target in self.targets.items()
            }
            entered = entries.take(system.lab)
            act()
            end = time.monotonic() + AFTER_S
            wait("the traffic after the fault", lambda: time.monotonic() > end)
            reports = {side: load.stop() for side, load in loads.items()}
        return self._outcome(fault, node if dead else "", node, reports, nodes, entered)

    def _outcome(
        self,
        fault: str,
        dead: str,
        node: str,
        reports: dict[str, Report],
        nodes: dict[str, dict[str, str]],
        entered: dict[tuple[str, int], str],
    ) -> Outcome:
        counted = {
            side: [f for f in report.flows if nodes[side].get(f.pod) != dead or not dead]
            for side, report in reports.items()
        }
        return Outcome(
            self.policy,
            fault,
            {side: len(flows) for side, flows in counted.items()},
            {side: sum(1 for f in flows if f.broken) for side, flows in counted.items()},
            {
                side: sum(
                    1 for f in flows if entered.get((self.targets[side], f.local_port)) == node
                )
                for side, flows in counted.items()
            },
        )

    # the faults

    def cut(self, node: str) -> None:
        """Power cut, until the switches no longer lead there."""
        self.system.lab.power_cut(node)
        self.wait_routed(tuple(n for n in NODES if n != node))

    def join(self, node: str) -> None:
        """The node boots: a new one to the switches, the agents and kube-proxy."""
        self.system.lab.power_on(node)
        self.wait_routed()

    def grow(self) -> None:
        """One pod more behind each Service."""
        for side in SIDES:
            self.system.api.scale(self.name(side), self.pods + 1)
        for side in SIDES:
            self.system.wait_pods(self.name(side), self.pods + 1)

    def flap(self, node: str) -> None:
        """The cable of a node comes out, and goes in again FLAP_S later."""
        (link,) = self.system.lab.topology.links_of(node)
        port = link.far(node)
        rack = self.system.lab.machine(port.node)
        rack.run("ip", "link", "set", port.interface, "down")
        end = time.monotonic() + FLAP_S
        wait("the cable to be out for a while", lambda: time.monotonic() > end, every_s=0.01)
        rack.run("ip", "link", "set", port.interface, "up")

    def faults(self) -> Iterator[Outcome]:
        """All that this policy can show, the lab whole again after each."""
        if self.policy == "Cluster":
            yield self.try_fault(
                "a node that only forwards dies", "node-3", lambda: self.cut("node-3")
            )
            yield self.try_fault("a node is added", "node-3", lambda: self.join("node-3"))
        self.wait_whole()
        yield self.try_fault(
            "a node with pods dies (its own pods' not counted)",
            "node-1",
            lambda: self.cut("node-1"),
            dead=True,
        )
        if self.policy == "Local":
            yield self.try_fault("a node is added", "node-1", lambda: self.join("node-1"))
        self.wait_whole()
        yield self.try_fault("a pod is added", "", self.grow)
        for side in SIDES:
            self.system.api.scale(self.name(side), self.pods)
        self.wait_whole()
        yield self.try_fault(
            f"the uplink of a node with pods flaps, {FLAP_S:g} s",
            "node-1",
            lambda: self.flap("node-1"),
        )
        self.wait_whole()

    def remove(self) -> None:
        """Services and pods away."""
        for switch in SWITCHES:
            line = f"no ip route {self.targets['theirs']}/32 {self.targets['ours']}"
            self.system.lab.machine(switch).run("vtysh", "-c", "configure terminal", "-c", line)
        self.system.made += [self.name(side) for side in SIDES]
        for name in list(self.system.made):
            self.system.remove(name)


PARTS = ("faults", "speed", "many")


def measure(parts: Collection[str] = PARTS) -> Iterator[str]:
    """Lines of Markdown, as they are known. parts: those of PARTS that are wanted."""
    if set(parts) - {"many"}:
        yield from _in_a_lab(parts)
    if "many" in parts:
        yield from beside_scale.measure(_progress)


def _in_a_lab(parts: Collection[str]) -> Iterator[str]:
    name = f"beside-{os.getpid()}"
    try:
        lab = Lab.up(TOPOLOGY, name, _progress)
        bring_up(lab, "kubernetes", _progress)
        lab.machine("client").run("sysctl", "-qw", "net.ipv4.tcp_timestamps=2")
        with Api(lab.directory / KUBECONFIG) as api:
            system = System(lab, api)
            for node in HOSTS:
                api.patch(kube.NODES, node, {"metadata": {"labels": {LABEL: "yes"}}})
            if "faults" in parts:
                yield from connections(system)
            if "speed" in parts:
                yield from speed(system)
    finally:
        take_down(name)


def _answers(node: Machine, address: str) -> bool:
    argv = ("curl", "-s", "--connect-timeout", "2", f"http://{address}/")
    return node.run(*argv, check=False).returncode == 0


def connections(system: System) -> Iterator[str]:
    """Share of open connections that break."""
    yield f"Share of {FLOWS} open connections that broke; in brackets how many entered at the node."
    yield ""
    yield "| policy | fault | kube-proxy's mode | kube-proxy alone | this agent beside it |"
    yield "|---|---|---|---|---|"
    for mode in (Mode.NFTABLES, Mode.IPTABLES):
        write_mode(system.lab.directory, mode)
        for policy in VIPS:
            _progress(f"{policy}, kube-proxy in {mode} mode")
            rig = Rig(system, policy)
            rig.deploy()
            for found in rig.faults():
                shares = [_share(found, side) for side in reversed(SIDES)]
                yield f"| {policy} | {found.fault} | {mode} | {shares[0]} | {shares[1]} |"
            rig.remove()


def _share(found: Outcome, side: str) -> str:
    broken, counted = found.broken[side], found.counted[side]
    return f"{100 * broken / counted:.1f} % ({broken} of {counted}) [{found.entered[side]}]"


def speed(system: System) -> Iterator[str]:
    """Times, rates and CPU on the way, against reaching the pod directly."""
    ports = ("sysctl", "-qw", "net.ipv4.ip_local_port_range=10000 65000")
    system.lab.machine("client").run(*ports)
    for node in system.lab.of_role("node"):  # so that the client reaches pods directly too
        for switch in SWITCHES:
            pods = node.pod_cidr.split(",")[0]
            system.lab.machine(switch).run("ip", "route", "replace", pods, "via", node.address)
    for mode in (Mode.NFTABLES, Mode.IPTABLES):
        write_mode(system.lab.directory, mode)
        rig = Rig(system, "Cluster")
        rig.deploy()
        _progress(f"speed, kube-proxy in {mode} mode")
        names = {side: rig.name(side) for side in SIDES}
        yield from beside_speed.measure(system, rig.targets, names, mode)
        rig.remove()


def _progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
