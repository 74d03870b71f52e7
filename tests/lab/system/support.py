"""What the system tests share: a running lab with everything of ours in it, and eyes on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from lbctl.core import names
from lbctl.kube import client as kube
from lbctl.lab import workload
from lbctl.lab.api import DEPLOYMENTS, Api, is_ready, wait
from lbctl.lab.bringup import KUBECONFIG
from lbctl.lab.lab import Lab
from tests import command

SWITCHES = ("tor-a", "tor-b")
CLIENT = "203.0.113.10"
TOPOLOGY = Path(__file__).parents[3] / "bgp-lab" / "small.clab.yml"


def _in_url(eip: str) -> str:
    """As a URL wants an address."""
    return f"[{eip}]" if ":" in eip else eip


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a pod: its name, and the peer address that it saw."""

    pod: str
    peer: str


@dataclass(slots=True)
class System:
    """A lab that is up, its cluster's API, and the services that tests made."""

    lab: Lab
    api: Api
    made: list[str] = field(default_factory=list)
    switches: tuple[str, ...] = SWITCHES  # that the nodes' packets come from

    def deploy(
        self,
        name: str,
        replicas: int = 4,
        policy: str = "Cluster",
        ports: Iterable[tuple[str, int, int]] = (("TCP", 80, 8080),),
        announced: bool = True,
        families: str = "SingleStack",
    ) -> str:
        """A Deployment and its Service; returns the first EIP once both switches route to it."""
        ports = tuple(ports)
        self.wait_gone(name)
        self.made.append(name)
        targets = tuple((protocol, target) for protocol, _, target in ports)
        self.api.apply(
            workload.deployment(name, replicas, targets),
            workload.service(name, ports=ports, policy=policy, families=families),
        )
        self.wait_pods(name, replicas)
        eip = wait(f"an EIP for Service {name}", lambda: self.api.eip_of(name))
        if announced:
            self.wait_routed(eip)
        return eip

    def remove(self, name: str) -> None:
        """Delete the Service and the Deployment, and wait until both are gone."""
        self.delete(name)
        self.wait_gone(name)
        wait(f"the pods of {name} to be gone", lambda: not self.api.pod_nodes(name))

    def delete(self, name: str) -> None:
        """Ask for the deletion of the Service and the Deployment."""
        if name in self.made:
            self.made.remove(name)
        self.api.delete(kube.SERVICES, name)
        self.api.delete(DEPLOYMENTS, name)

    def wait_gone(self, name: str) -> None:
        """Wait until there is no Service of this name."""
        wait(f"Service {name} to be gone", lambda: self.api.find(kube.SERVICES, name) is None)

    def wait_nodes_up(self) -> None:
        """Wait until every manager that answers calls every node Up that has an agent."""
        kubeconfig = str(self.lab.directory / KUBECONFIG)

        def up() -> bool:
            done = command.lbctl("status", "--output", "json", "--kubeconfig", kubeconfig)
            states = json.loads(done.stdout or "{}").get("managers", {}).values()
            nodes = [node["state"] for state in states for node in state["nodes"]]
            return "Up" in nodes and set(nodes) <= {"Up", "Unknown"}

        wait("every manager to call every node Up", up, every_s=0.3)

    def wait_rest(self) -> None:
        """Wait until no Service is being deleted any more."""

        def going() -> bool:
            found = self.api.all(kube.SERVICES, "default")
            return any("deletionTimestamp" in service["metadata"] for service in found)

        wait("Services that are being deleted to be gone", lambda: not going())

    def configure(self, text: str) -> None:
        """Write the configuration, and wait until it is accepted."""
        self.api.apply(workload.config_map(text))
        name, key = names.ACCEPTED_CONFIG_MAP, names.CONFIG_KEY
        wait(
            "the configuration to be accepted",
            lambda: self.api.get(kube.CONFIG_MAPS, name, names.NAMESPACE)["data"].get(key) == text,
        )

    def wait_pods(self, name: str, count: int) -> None:
        """Wait for exactly `count` ready pods."""
        wait(
            f"{count} ready pods of {name}",
            lambda: (
                len(self.api.ready_pods(name)) == count and len(self.api.pod_nodes(name)) == count
            ),
        )

    def hops(self, eip: str) -> dict[str, list[str]]:
        """Next hops of an EIP in each living switch's kernel."""
        return {
            name: self.lab.kernel_routes(name, eip)
            for name in self.switches
            if self.lab.machine(name).alive
        }

    def wait_routed(
        self, eip: str, to: Iterable[str] = ("node-1", "node-2", "node-3"), limit_s: float = 60.0
    ) -> None:
        """Wait until every switch routes the EIP to exactly these nodes; none: no route."""
        version = ip_address(eip).version
        wanted = sorted(
            address
            for name in to
            for address in self.lab.machine(name).addresses
            if ip_address(address).version == version
        )
        wait(
            f"every switch to route {eip} to {wanted or 'nobody'}",
            lambda: all(found == wanted for found in self.hops(eip).values()),
            limit_s,
        )

    def replies(self, eip: str, count: int, port: int = 80, expect_all: bool = True) -> list[Reply]:
        """Answers to `count` requests from the client, each on a connection of its own."""
        done = self.lab.machine("client").run(
            *("curl", "-s", "--max-time", "60", "--connect-timeout", "5"),
            *("-H", "Connection: close", f"http://{_in_url(eip)}:{port}/n/[1-{count}]"),
            check=False,
            timeout_s=120,
        )
        words = [line.split() for line in done.stdout.splitlines() if line.strip()]
        found = [Reply(line[0], line[1]) for line in words]
        if expect_all:
            assert len(found) == count, f"{len(found)} of {count} answered: {done.stderr}"
        return found

    def spread(self, eip: str, count: int) -> Counter[str]:
        """How many of `count` requests each pod answered."""
        return Counter(reply.pod for reply in self.replies(eip, count))

    def eip_object(self, eip: str) -> dict[str, Any] | None:
        """The spec of the EIP object of an IPv4 address."""
        found = self.api.find(kube.EIPS, eip, "")
        return None if found is None else dict(found["spec"])

    def managers(self) -> dict[str, str]:
        """Pod name of the manager on each control node."""
        pods = self.api.system_pods(names.MANAGER_APP)
        return {p["spec"]["nodeName"]: p["metadata"]["name"] for p in pods}

    def wait_system_ready(self) -> None:
        """Both managers and an agent on every living node are ready."""

        def ready() -> bool:
            agents = {
                p["spec"]["nodeName"] for p in self.api.system_pods(names.AGENT_APP) if is_ready(p)
            }
            managers = [p for p in self.api.system_pods(names.MANAGER_APP) if is_ready(p)]
            alive = {m.name for m in self.lab.of_role("node") if m.alive}
            return alive <= agents and len(managers) == 2

        wait("managers and agents to be ready", ready, limit_s=120)

    def vtysh(self, switch: str, command: str) -> Any:
        """JSON of a vtysh command."""
        return json.loads(self.lab.machine(switch).run("vtysh", "-c", command).stdout)
