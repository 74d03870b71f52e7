"""Beside real kube-proxy, in nftables and in iptables mode: who carries what, none in the way.

Only on the real cluster. One lab and one set of pods for all: two pods on two of three nodes, one
Service per policy; kube-proxy is switched between the modes while the lab runs.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from lbctl.core import names
from lbctl.kube import client as kube
from lbctl.lab import control, entries, workload
from lbctl.lab.api import wait
from lbctl.lab.kubeproxy import Mode, write_mode
from lbctl.lab.load import Load
from lbctl.lab.machine import Machine

from .support import CLIENT, System
from .test_faults import assert_untouched, drive_on

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        os.environ.get("LBCTL_LAB_CLUSTER") != "kubernetes",
        reason="only on the real cluster: LBCTL_LAB_CLUSTER=kubernetes",
    ),
]
APP = "beside"
POLICIES = ("Cluster", "Local")
STEERED = f"{names.MARK_BASE:#x}/{names.MARK_MASK:#x}"  # docs/internals.md


@dataclass(frozen=True, slots=True)
class Beside:
    """The Services' addresses by policy, and kube-proxy's mode now."""

    system: System
    eips: dict[str, str]
    mode: Mode

    @property
    def pods(self) -> dict[str, str]:
        """The nodes of the pods that there are now: which ones stay is the ReplicaSet's choice."""
        return self.system.api.pod_nodes(APP)


def service_of(policy: str) -> str:
    return f"{APP}-{policy.lower()}"


@pytest.fixture(scope="module")
def deployed(running: System) -> Iterator[dict[str, str]]:
    """Both Services; EIPs by policy."""
    running.wait_system_ready()
    running.api.apply(workload.deployment(APP, 2))
    running.api.apply(
        *(workload.service(service_of(p), app=APP, policy=p) for p in POLICIES),
    )
    running.wait_pods(APP, 2)
    eips = {p: wait("an EIP", lambda p=p: running.api.eip_of(service_of(p))) for p in POLICIES}  # type: ignore[misc]
    yield eips
    running.made += [APP, *map(service_of, POLICIES)]
    for name in list(running.made):
        running.remove(name)


@pytest.fixture(scope="module", params=[Mode.NFTABLES, Mode.IPTABLES])
def beside(
    running: System,
    deployed: dict[str, str],
    request: pytest.FixtureRequest,
) -> Iterator[Beside]:
    """kube-proxy in one mode on every node, and serving."""
    mode: Mode = request.param
    write_mode(running.lab.directory, mode)
    found = Beside(running, deployed, mode)
    assert len(set(found.pods.values())) == 2
    running.wait_routed(deployed["Cluster"])
    running.wait_routed(deployed["Local"], to=set(found.pods.values()))
    for node in running.lab.of_role("node"):
        wait(f"kube-proxy on {node.name} in {mode} mode", lambda node=node: serves(node, mode))  # type: ignore[misc]
        for eip in deployed.values():
            wait(f"an answer of {eip} to {node.name}", lambda node=node, eip=eip: ask(node, eip, 1))  # type: ignore[misc]
    yield found
    write_mode(running.lab.directory, Mode.NFTABLES)


def serves(node: Machine, mode: Mode) -> bool:
    """Whether kube-proxy is in that mode there, and has synced once."""
    said = node.run("curl", "-s", "http://127.0.0.1:10249/proxyMode", check=False).stdout
    health = node.run("curl", "-sf", "http://127.0.0.1:10256/healthz", check=False)
    return said == mode and health.returncode == 0


def curl(eip: str, count: int) -> list[str]:
    return [
        *("curl", "-s", "--connect-timeout", "3", "-H", "Connection: close"),
        f"http://{eip}/n/[1-{count}]",
    ]


def ask(machine: Machine, eip: str, count: int) -> Counter[str]:
    """Which pods answered `count` new connections from a machine."""
    done = machine.run(*curl(eip, count), check=False, timeout_s=60)
    return Counter(line.split()[0] for line in done.stdout.splitlines())


def ask_from_pod(system: System, pod: str, eip: str, count: int) -> Counter[str]:
    """The same from inside a pod."""
    pid = control.container_pids(system.lab, pod, "web")[0]
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "--", *curl(eip, count)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Counter(line.split()[0] for line in done.stdout.splitlines())


@pytest.mark.parametrize("policy", POLICIES)
def test_client_pods_and_nodes_reach_the_eip(beside: Beside, policy: str) -> None:
    """From outside through us, with the client's address; from inside through kube-proxy."""
    system, eip, pods = beside.system, beside.eips[policy], set(beside.pods)
    replies = system.replies(eip, 40)
    assert {reply.pod for reply in replies} == pods
    assert {reply.peer for reply in replies} == {CLIENT}
    for pod in sorted(pods):
        found = ask_from_pod(system, pod, eip, 24)
        assert (set(found), found.total()) == (pods, 24), f"from {pod}: {found}"
    for node in system.lab.of_role("node"):
        found = ask(node, eip, 24)
        assert (set(found), found.total()) == (pods, 24), f"from {node.name}: {found}"


def test_open_connections_are_never_invalid_to_kube_proxy(beside: Beside) -> None:
    """Steered, delivered, and handed over when a pod comes: kube-proxy's INVALID drop stays at 0.

    Only its iptables mode has that rule; in the other mode no connection may break either.
    """
    system, eip = beside.system, beside.eips["Cluster"]
    before, on = invalid_drops(beside), beside.pods
    entries.watch(system.lab, [eip])
    with Load.start(
        system.lab.machine("client"), eip, 80, flows=80, probes_per_s=20, timeout_s=5
    ) as load:
        entered = entries.take(system.lab)
        at = load.mark("grow")
        system.api.scale(APP, 3)
        system.wait_pods(APP, 3)
        report = drive_on(load, at, seconds=5.0)
    system.api.scale(APP, 2)
    system.wait_pods(APP, 2)
    assert_untouched(report)
    steered = [f for f in report.flows if entered[eip, f.local_port] != on[f.pod]]
    assert len(steered) >= 16, "a fifth was steered"
    assert invalid_drops(beside) == before


def invalid_drops(beside: Beside) -> dict[str, int]:
    """Packets that kube-proxy dropped as INVALID, by node; its nftables mode has no such rule."""
    found = {}
    for node in beside.system.lab.of_role("node"):
        rules = node.run("iptables-save", "-c", "-t", "filter").stdout.splitlines()
        drops = [rule for rule in rules if "--ctstate INVALID" in rule and "-j DROP" in rule]
        assert len(drops) == (beside.mode is Mode.IPTABLES), rules
        found[node.name] = sum(int(rule[1:].split(":")[0]) for rule in drops)
    return found


def test_forward_policy_of_drop_needs_the_documented_rule(beside: Beside) -> None:
    """With what a CNI adds for its pods only, what is steered is lost; with our rule nothing is."""
    system, eip = beside.system, beside.eips["Cluster"]
    nodes = system.lab.of_role("node")
    cni = [("-s", "10.244.0.0/16"), ("-d", "10.244.0.0/16")]
    ours = ("-m", "mark", "--mark", STEERED)
    try:
        for node in nodes:
            for source in cni:
                node.run("iptables", "-A", "FORWARD", *source, "-j", "ACCEPT")
            node.run("iptables", "-P", "FORWARD", "DROP")
        assert connected(system, eip, 24, limit_s=2.0) < 24, "what is steered cannot pass"
        for node in nodes:
            node.run("iptables", "-A", "FORWARD", *ours, "-j", "ACCEPT")
        assert connected(system, eip, 24, limit_s=15.0) == 24
    finally:
        for node in nodes:
            node.run("iptables", "-P", "FORWARD", "ACCEPT")
            for rule in (*cni, ours):
                node.run("iptables", "-D", "FORWARD", *rule, "-j", "ACCEPT", check=False)


_CONNECT = """
import socket, sys, time
flows = {}
for _ in range(int(sys.argv[2])):
    s = socket.socket(); s.setblocking(False); s.connect_ex((sys.argv[1], 80)); flows[s] = 0
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end and not all(flows.values()):
    for s in flows:
        try: s.getpeername(); flows[s] = s.getsockname()[1]
        except OSError: pass
    time.sleep(0.02)
print(*[port for port in flows.values() if port])
"""


def connected(system: System, eip: str, count: int, limit_s: float) -> int:
    """How many of `count` connections open in that time; it does not wait for more than all."""
    client = system.lab.machine("client")
    arguments = ("python3", "-S", "-c", _CONNECT, eip, str(count), str(limit_s))
    return len(client.run(*arguments).stdout.split())


@pytest.mark.parametrize("beside", [Mode.NFTABLES], indirect=True)
def test_strict_rp_filter_is_loosened_when_the_agent_starts(beside: Beside) -> None:
    """/proc/sys is read-only to the agent: it does it by netlink. `all` strict decides nothing."""
    system, node = beside.system, beside.system.lab.machine("node-2")
    pods = system.api.system_pods(names.AGENT_APP)
    agent = next(p["metadata"]["name"] for p in pods if p["spec"]["nodeName"] == node.name)
    strict = ("net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.eth1.rp_filter=1")
    node.run("sysctl", "-qw", *strict)
    try:
        control.kill_container(system.lab, agent, "agent")

        def loose() -> bool:
            return node.run("sysctl", "-n", "net.ipv4.conf.eth1.rp_filter").stdout.strip() == "2"

        wait("rp_filter of node-2's uplink to be loose", loose)
        system.wait_system_ready()
        for eip in beside.eips.values():
            assert len(system.replies(eip, 30)) == 30
    finally:
        node.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")


def test_status_leaves_the_address_to_kube_proxy(beside: Beside) -> None:
    """No ipMode, or VIP: kube-proxy then carries what comes from inside."""
    for policy in POLICIES:
        found = beside.system.api.get(kube.SERVICES, service_of(policy))
        (ingress,) = found["status"]["loadBalancer"]["ingress"]
        assert ingress.get("ipMode", "VIP") == "VIP", json.dumps(ingress)
