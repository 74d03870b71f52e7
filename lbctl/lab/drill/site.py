"""What a drill works on: a lab that is up with its cluster, and what faults have done to it so far.

Rules: every fault notes what it changed, and `restore` undoes all of it, in an order that lets the
cluster heal; a lab that cannot be restored is not used again.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from lbctl.core import names
from lbctl.core.model import NodeState
from lbctl.core.reasons import Reason
from lbctl.core.state import ManagerState, from_json
from lbctl.errors import DrillError, LabError, MessageError
from lbctl.kube import client as kube
from lbctl.lab import control, flooding, processes, workload
from lbctl.lab.api import DAEMON_SETS, DEPLOYMENTS, Api, is_ready, wait
from lbctl.lab.controllers.endpointslices import SERVICE_LABEL
from lbctl.lab.drill import links
from lbctl.lab.drill.delays import Delay
from lbctl.lab.drill.links import Command
from lbctl.lab.lab import Lab
from lbctl.lab.load import spawn
from lbctl.lab.machine import Machine
from lbctl.lab.processes import Pid

READY_S = 120.0
HELD_BACK_S = 5.0  # about what managers take to start
_STATE: Final = f"http://127.0.0.1:{names.MANAGER_HTTP_PORT}/v1/state"
_STAMP: Final = "lbctl.io/drilled-at"
PRE_STOP_S = 2  # a pod serves on until every node has heard that it goes
_CONTAINERS: Final = {
    "manager": ("manager", ""),
    "speaker": ("speaker", ""),
    "agent": ("agent", ""),
    "exabgp": ("speaker", "runner"),
    "relay": ("speaker", "relay"),
}
ROLES: Final = {"switches": "switch", "nodes": "node", "controls": "control"}
WORKLOADS: Final = {
    "managers": (DEPLOYMENTS, names.MANAGER_APP),
    "agents": (DAEMON_SETS, names.AGENT_APP),
}
_WALL = """
add table inet lbctl-drill
delete table inet lbctl-drill
table inet lbctl-drill {{
  chain heard {{
    type filter hook prerouting priority -500;
    {heard}
  }}
  chain said {{
    type filter hook output priority -500;
    {said}
  }}
}}
"""
_NO_WALL = "add table inet lbctl-drill\ndelete table inet lbctl-drill\n"


@dataclass(frozen=True, slots=True)
class Flood:
    """A flood that was begun: packets asked for, and its process, which says how many it sent."""

    service: str
    asked: int
    process: subprocess.Popen[bytes]

    def sent(self) -> int:
        """Wait for its end; 0 if it failed."""
        said, _ = self.process.communicate(timeout=2 * flooding.MOST_S)
        return int(said or 0)


@dataclass(frozen=True, slots=True)
class Roll:
    """Pods that are being replaced: where they are, and the annotation of the new ones."""

    namespace: str
    selector: str
    stamp: str


@dataclass(slots=True)
class Site:
    """A running lab. deaf, mute: per machine the addresses that it does not hear, or speak to."""

    lab: Lab
    api: Api
    services: dict[str, str] = field(default_factory=dict)  # name → EIP
    passing: set[str] = field(default_factory=set)  # more Services, which come and go
    dead: dict[str, float] = field(default_factory=dict)  # machines whose power was cut → when
    deaf: dict[str, set[str]] = field(default_factory=dict)
    mute: dict[str, set[str]] = field(default_factory=dict)
    losing: dict[str, int] = field(default_factory=dict)  # percent of the packets
    limited: set[tuple[str, str]] = field(default_factory=set)  # machine, interface: rate limits
    delays: list[Delay] = field(default_factory=list)
    # machine, interface → what brings back its addresses and routes
    down: dict[tuple[str, str], tuple[Command, ...]] = field(default_factory=dict)
    stopped: set[Pid] = field(default_factory=set)
    drained: set[str] = field(default_factory=set)
    cordoned: set[str] = field(default_factory=set)
    crashed: set[str] = field(default_factory=set)  # pods
    added: set[str] = field(default_factory=set)  # nodes
    floods: list[Flood] = field(default_factory=list)
    rolls: dict[str, Roll] = field(default_factory=dict)  # what → its last one
    faked: dict[str, list[Any]] = field(default_factory=dict)  # of whom → containers as they were
    config: str = workload.CONFIG

    # -- who ------------------------------------------------------------------------------------
    def machines(self, name: str) -> list[Machine]:
        """The machines of a name, of a role (`switches`, `nodes`, `controls`), or `*` for all."""
        if name in ROLES:
            return self.lab.of_role(ROLES[name])
        return self.lab.machines if name == "*" else [self.lab.machine(name)]

    def addresses(self, machines: Iterable[Machine]) -> set[str]:
        """All their addresses."""
        return {str(address) for machine in machines for address in machine.addresses}

    def processes(self, target: str) -> list[Pid]:
        """The processes of `WHAT@WHERE`; WHERE is a machine, a role, or `*`.

        WHAT: a container of ours (`manager`, `speaker`, `agent`), a program in one (`exabgp`,
        `relay`), a daemon of FRR (`bgpd`, `zebra`, `vrrpd`), or without WHERE `cluster`, all of the
        API server, or `kubelets`, which are one process. Raises DrillError if there is none.
        """
        what, _, where = target.partition("@")
        if what in _CONTAINERS:
            container, match = _CONTAINERS[what]
            found = self._in_containers(container, match, where or "*")
        elif what == "cluster":
            found = processes.members([self.lab.of_role("cluster")[0].netns])
        elif what == "kubelets":
            kubelet = self.lab.process("kubelet")
            found = [kubelet] if kubelet else []
        else:
            found = self._daemons(what, where or "*")
        if not found:
            raise DrillError(f"no process {target!r} runs now")
        return found

    def _in_containers(self, container: str, match: str, where: str) -> list[Pid]:
        found = []
        for row in self.containers(container, where):
            pids = control.container_pids(self.lab, row.pod, container, match)
            found += [known for pid in pids if (known := processes.identify(pid))]
        return found

    def containers(self, name: str, where: str) -> list[control.RunningContainer]:
        """Those of our own Pods that run under this name on these machines."""
        places = {machine.name for machine in self.machines(where)}
        return [
            row
            for row in control.containers(self.lab)
            if (row.namespace, row.container) == (names.NAMESPACE, name)
            and row.node in places
            and row.pidns
        ]

    def _daemons(self, program: str, where: str) -> list[Pid]:
        places = [machine.netns for machine in self.machines(where) if machine.alive]
        return [pid for pid in processes.members(places) if program_of(pid) == program]

    # -- walls ----------------------------------------------------------------------------------
    def wall(self, machine: Machine) -> None:
        """Make a machine's wall as `deaf`, `mute` and `losing` say."""
        heard = [_rule("saddr", address) for address in sorted(self.deaf.get(machine.name, ()))]
        said = [_rule("daddr", address) for address in sorted(self.mute.get(machine.name, ()))]
        if percent := self.losing.get(machine.name):
            chance = "" if percent >= 100 else f"numgen random mod 100 < {percent} "
            heard.append(f'iifname != "lo" {chance}drop')
        text = _WALL.format(heard="\n    ".join(heard), said="\n    ".join(said))
        machine.run("nft", "-f", "-", input=text if heard or said else _NO_WALL)

    def heal(self) -> None:
        """Take every wall, loss, delay and rate limit away."""
        for name in sorted({*self.deaf, *self.mute, *self.losing}):
            if (machine := self.lab.machine(name)).alive:
                machine.run("nft", "-f", "-", input=_NO_WALL)
            for walls in (self.deaf, self.mute, self.losing):
                walls.pop(name, None)  # not sooner: who is interrupted heals once more
        for name, interface in sorted(self.limited):
            if (machine := self.lab.machine(name)).alive:
                machine.run("tc", "qdisc", "del", "dev", interface, "root", check=False)
                machine.run("ip", "link", "set", interface, "txqueuelen", "1000", check=False)
            self.limited.discard((name, interface))
        while self.delays:
            self.delays[-1].end()
            self.delays.pop()

    def flood(self, service: str, kind: str, rate: int, seconds: float, core: int | None) -> None:
        """Begin a flood at a Service's port 80. Raises DrillError beyond what is allowed."""
        if not (0 < rate <= flooding.MOST_PER_S and 0 < seconds <= flooding.MOST_S):
            most = f"{flooding.MOST_PER_S} packets/s for {flooding.MOST_S:g} s"
            raise DrillError(f"a flood of {rate}/s for {seconds:g} s: at most {most}")
        words = (self.services[service], "80", "--kind", kind, "--rate", str(rate))
        client = self.lab.machine("client")
        process = spawn(client, "lbctl.lab.flooding", *words, "--seconds", str(seconds), core=core)
        self.floods.append(Flood(service, int(rate * seconds), process))

    # -- life -----------------------------------------------------------------------------------
    def configure(self) -> None:
        """Write the lab's configuration and wait until everybody runs."""
        self.api.apply(workload.config_map(self.config))
        self.wait_ready()

    def deploy(self, name: str, replicas: int, policy: str) -> str:
        """A Deployment and its Service on TCP and UDP 80; the EIP once all pods are ready."""
        ports = (("TCP", 80, 8080), ("UDP", 80, 8081))
        inner = (("TCP", 8080), ("UDP", 8081))
        self.api.apply(
            workload.deployment(name, replicas, inner, pre_stop_s=PRE_STOP_S),
            workload.service(name, ports=ports, policy=policy),
        )
        wait(f"{replicas} pods of {name}", lambda: len(self.api.ready_pods(name)) == replicas)
        self.services[name] = wait(f"an EIP for {name}", lambda: self.api.eip_of(name))
        return self.services[name]

    def hops(self, eip: str) -> dict[str, tuple[str, ...]]:
        """Names of the next hops of an EIP in the kernel of each living switch."""
        by_address = {
            str(address): machine.name
            for machine in self.lab.of_role("node")
            for address in machine.addresses
        }
        prefix = f"{eip}/{ip_address(eip).max_prefixlen}"
        return {
            switch.name: tuple(
                sorted(
                    by_address.get(hop, hop) for hop in self.lab.kernel_routes(switch.name, prefix)
                )
            )
            for switch in self.lab.of_role("switch")
            if switch.alive
        }

    def roll(self, what: str, kind: kube.Resource, selector: str, name: str, within: str) -> None:
        """Replace the pods of a workload of ours or of the drill; does not wait."""
        stamp = str(time.time_ns())
        template = {"metadata": {"annotations": {_STAMP: stamp}}}
        self.api.patch(kind, name, {"spec": {"template": template}}, within)
        self.rolls[what] = Roll(within, selector, stamp)

    def rolled(self, what: str) -> tuple[int, int]:
        """Of a workload's pods: how many are ready and new, and how many there are."""
        roll = self.rolls[what]
        pods = self.api.all(kube.PODS, roll.namespace, roll.selector)
        stamps = [(pod["metadata"].get("annotations") or {}).get(_STAMP) for pod in pods]
        new = [is_ready(p) and s == roll.stamp for p, s in zip(pods, stamps, strict=True)]
        return sum(new), len(pods)

    def wait_ready(self) -> None:
        """Managers and agents are ready on every living machine that should have them."""
        living = {m.name for m in self.lab.of_role("node") if m.alive}
        controls = {m.name for m in self.lab.of_role("control") if m.alive}

        def ready() -> bool:
            def on(app: str) -> set[str]:
                return {p["spec"]["nodeName"] for p in self.api.system_pods(app) if is_ready(p)}

            return living <= on(names.AGENT_APP) and controls <= on(names.MANAGER_APP)

        wait("managers and agents to be ready", ready, limit_s=READY_S)

    def restore(self) -> None:
        """`mend`, and remove the Services and what managers remember of nodes that fell.

        Raises LabError if the lab does not heal.
        """
        self._unblock()
        self.config = workload.CONFIG
        made = sorted({*self.services, *self.passing})
        for name in made:
            self.api.delete(kube.SERVICES, name)
            self.api.delete(DEPLOYMENTS, name)
        self.mend()
        for name in made:
            wait(
                f"Service {name} to be gone, with its Pods and endpoints",
                partial(self._gone, name),
                limit_s=READY_S,
            )
        self._forget_falls()
        self.services.clear()
        self.passing.clear()
        self.dead.clear()
        self.crashed.clear()
        self.rolls.clear()
        if self.added:
            raise LabError(f"{', '.join(sorted(self.added))} cannot be taken away again")

    def _gone(self, service: str) -> bool:
        """Else the next one of this name has these Pods behind it for a moment."""
        return not (
            self.api.find(kube.SERVICES, service)
            or self.api.all(kube.PODS, "default", f"app={service}")
            or self.api.all(kube.ENDPOINT_SLICES, "default", f"{SERVICE_LABEL}={service}")
        )

    def _forget_falls(self) -> None:
        """Wait until managers call every node Up; restart them if one still holds a node back.

        They hold one back for up to a minute, longer with each time that it fell: the next drill
        would wait for what the ones before it did.
        """
        living = {node.name for node in self.lab.of_role("node") if node.alive}

        def judged() -> set[Reason | None] | None:
            states = [self.manager_state(m) for m in self.lab.of_role("control") if m.alive]
            nodes = [node for state in states if state for node in state.nodes]
            up = [node.name for node in nodes if node.state is NodeState.UP]
            whole = sorted(up) == sorted([*living] * len(states))
            return {node.reason for node in nodes} if whole else None

        def trusted() -> bool:
            return Reason.NODE_FLAPPING not in (judged() or {Reason.NODE_FLAPPING})

        wait("every node to be Up again", judged, READY_S)
        try:
            wait("no node to be held back", trusted, HELD_BACK_S)
        except LabError:
            processes.send(self.processes("manager@controls"), signal.SIGKILL)
            wait("restarted managers to call every node Up", trusted, READY_S)

    def manager_state(self, machine: Machine) -> ManagerState | None:
        """What the manager on a machine says in `/v1/state`; None if it says nothing."""
        with suppress(LabError, MessageError):
            return from_json(machine.run("curl", "-sf", "--max-time", "5", _STATE).stdout)
        return None

    def take_over(self) -> None:
        """Undo what a run that was killed left behind in a lab that is up.

        That is walls, processes that are stopped, machines without power, drains and cordons; not
        rate limits, links, faked clocks. Raises LabError if the lab does not heal.
        """
        living = [machine for machine in self.lab.machines if machine.alive]
        processes.send(processes.members(m.netns for m in living), signal.SIGCONT)
        if kubelet := self.lab.process("kubelet"):
            processes.send([kubelet], signal.SIGCONT)
        for machine in living:
            machine.run("nft", "-f", "-", input=_NO_WALL)
        nodes = {node["metadata"]["name"] for node in self.api.all(kube.NODES, "")}
        self.drained |= nodes
        self.cordoned |= nodes
        self.mend()

    def mend(self) -> None:
        """Undo every fault. Raises LabError if the lab does not heal."""
        self._unblock()
        for machine in self.lab.machines:
            if not machine.alive:
                self.lab.power_on(machine.name)
        for node in sorted(self.drained):
            self.annotate(node, names.ANNOTATION_DRAIN, None)
        self.drained.clear()
        for node in sorted(self.cordoned):
            self.api.patch(kube.NODES, node, {"spec": {"unschedulable": None}}, "")
        self.cordoned.clear()
        for of, containers in sorted(self.faked.items()):
            self.set_containers(of, containers)
        self.faked.clear()
        self.configure()

    def _unblock(self) -> None:
        """Undo what holds packets and processes up, of the API server too."""
        self.heal()
        while self.floods:
            flood = self.floods.pop()
            flood.process.kill()
            flood.process.communicate()
        processes.send(self.stopped, signal.SIGCONT)
        self.stopped.clear()
        for (name, interface), lost in sorted(self.down.items()):
            machine = self.lab.machine(name)
            if machine.alive:
                links.up(machine, interface, lost)
        self.down.clear()

    def set_containers(self, of: str, containers: list[Any]) -> None:
        """Write the containers of our managers or agents; returns when all pods are of them."""
        kind, name = WORKLOADS[of]
        body = {"spec": {"template": {"spec": {"containers": containers}}}}
        self.api.patch(kind, name, body, names.NAMESPACE)
        wanted = [container.get("env") for container in containers]

        def rolled() -> bool:
            pods = self.api.system_pods(name)
            return all(
                is_ready(pod) and [c.get("env") for c in pod["spec"]["containers"]] == wanted
                for pod in pods
            )

        wait(f"{of} to be rolled", rolled, limit_s=READY_S)

    def annotate(self, node: str, key: str, value: str | None) -> None:
        """Set an annotation of a Node; None removes it."""
        self.api.patch(kube.NODES, node, {"metadata": {"annotations": {key: value}}}, "")


def _rule(field: str, address: str) -> str:
    family = "ip6" if ip_address(address).version == 6 else "ip"
    return f"{family} {field} {address} drop"


def words_of(pid: Pid) -> list[str]:
    """A process's command line, [""] if it is gone."""
    try:
        line = Path(f"/proc/{pid.pid}/cmdline").read_bytes()
    except OSError:
        return [""]
    return line.decode("utf-8", "replace").rstrip("\0").split("\0")


def program_of(pid: Pid) -> str:
    """The name of a process's program, "" if it is gone."""
    return Path(words_of(pid)[0]).name
