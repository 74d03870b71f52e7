"""The faults that a drill can name, each with what undoes it.

Rules: a fault is a function of the site and of named arguments; their annotations say what a YAML
file may give, and are checked when the file is read. It returns when the fault is in place. Names
of machines may be roles (`switches`, `nodes`, `controls`).
"""

from __future__ import annotations

import inspect
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NewType, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from lbctl.core import names
from lbctl.errors import DrillError
from lbctl.kube import client as kube
from lbctl.lab import bringup, control, flooding, processes, switch, workload
from lbctl.lab.api import DEPLOYMENTS, wait
from lbctl.lab.drill import clocks, delays, links
from lbctl.lab.drill.site import WORKLOADS, Site

# What an argument names: machines (one, a role, `*`), a node, processes (`WHAT@WHERE`), a Service.
Machines = NewType("Machines", str)
NodeName = NewType("NodeName", str)
Target = NewType("Target", str)
ServiceName = NewType("ServiceName", str)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to the lab: `at_s` after the beginning of the timeline."""

    at_s: float
    fault: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        words = (
            f"{key} {str(value).partition(chr(10))[0]}" for key, value in self.arguments.items()
        )
        return " ".join((self.fault, *words))


F = TypeVar("F", bound=Callable[..., None])
FAULTS: Final[dict[str, Callable[..., None]]] = {}


def fault(name: str) -> Callable[[F], F]:
    """Give a function its name in drills."""

    def register(function: F) -> F:
        FAULTS[name] = function
        return function

    return register


def checked(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a fault as its function takes them. Raises DrillError, in one sentence."""
    if name not in FAULTS:
        raise DrillError(f"there is no fault {name!r}; there are: {', '.join(sorted(FAULTS))}")
    parameters = dict(list(inspect.signature(FAULTS[name]).parameters.items())[1:])
    hints = kinds(name)
    if unknown := sorted(arguments.keys() - parameters.keys()):
        raise DrillError(f"{name} takes {', '.join(parameters) or 'nothing'}, not {unknown[0]!r}")
    found = {}
    for key, parameter in parameters.items():
        if key in arguments:
            try:
                adapter: TypeAdapter[Any] = TypeAdapter(hints[key])
                found[key] = adapter.validate_python(arguments[key], strict=True)
            except ValidationError as error:
                raise DrillError(f"{name}: {key}: {error.errors()[0]['msg'].lower()}") from error
        elif parameter.default is inspect.Parameter.empty:
            raise DrillError(f"{name} needs {key!r}")
    return found


def kinds(name: str) -> dict[str, Any]:
    """What each argument of a fault may be, by its name."""
    return get_type_hints(FAULTS[name], include_extras=True)


def inject(site: Site, name: str, arguments: Mapping[str, Any]) -> None:
    """Do it. Raises LabError if it could not be done."""
    FAULTS[name](site, **arguments)


# -- power and cables ------------------------------------------------------------------------------


@fault("powerCut")
def power_cut(site: Site, machine: Machines) -> None:
    """DESIGN.md's power cut: silence in one instant, carrier kept, then its processes die."""
    for found in site.machines(machine):
        if found.alive:
            site.dead.setdefault(found.name, time.monotonic())
            site.lab.power_cut(found.name)


@fault("powerOn")
def power_on(site: Site, machine: Machines) -> None:
    """Boot what was cut."""
    for found in site.machines(machine):
        if not found.alive:
            site.lab.power_on(found.name)


@fault("linkDown")
def link_down(site: Site, machine: Machines, interface: str = "eth1") -> None:
    """Take an interface down; the far end loses carrier."""
    for found in site.machines(machine):
        lost = links.down(found, interface)
        site.down.setdefault((found.name, interface), lost)


@fault("linkUp")
def link_up(site: Site, machine: Machines, interface: str = "eth1") -> None:
    """Bring it back, with the addresses and routes that went with it."""
    for found in site.machines(machine):
        links.up(found, interface, site.down.pop((found.name, interface), ()))


# -- the network between ---------------------------------------------------------------------------


@fault("partition")
def partition(site: Site, of: Machines, away: Machines, oneWay: bool = False) -> None:
    """`of` and `away` no longer reach each other; oneWay: `of` alone hears nothing of `away`."""
    away_from = site.addresses(site.machines(away))
    for found in site.machines(of):
        others = away_from - site.addresses([found])
        site.deaf.setdefault(found.name, set()).update(others)
        if not oneWay:
            site.mute.setdefault(found.name, set()).update(others)
        site.wall(found)


@fault("loss")
def loss(site: Site, machine: Machines, percent: int) -> None:
    """Lose so many percent of what a machine receives."""
    for found in site.machines(machine):
        site.losing[found.name] = percent
        site.wall(found)


@fault("delay")
def delay(site: Site, of: Machines, away: Machines, ms: int) -> None:
    """`of` hears `away` so many ms late. Of two such delays the first counts."""
    away_from = site.addresses(site.machines(away))
    for found in site.machines(of):
        others = away_from - site.addresses([found])
        site.delays.append(delays.begin(found, others, ms, queue=len(site.delays) + 1))


@fault("rate")
def rate(site: Site, machine: Machines, mbit: int, interface: str = "eth1") -> None:
    """Limit what a machine sends: tbf, and in it what network cards have, pfifo_fast.

    The queue holds a few packets of each connection (200 ms of full ones): with less, TCP waits for
    its timers and the limit is not reached.
    """
    shape = ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "200ms")
    packets = max(32, int(0.2 * mbit * 1e6 / 8 / 1514))
    for found in site.machines(machine):
        site.limited.add((found.name, interface))
        tc = ("tc", "qdisc", "replace", "dev", interface)
        found.run("ip", "link", "set", interface, "txqueuelen", str(packets))
        found.run(*tc, "root", "handle", "1:", *shape)
        found.run(*tc, "parent", "1:1", "handle", "10:", "pfifo_fast")


@fault("flood")
def flood(
    site: Site,
    service: ServiceName,
    rate: Annotated[int, Field(ge=1, le=flooding.MOST_PER_S)],
    seconds: Annotated[float, Field(ge=1, le=flooding.MOST_S)],
    kind: Literal["syn", "udp"] = "syn",
    core: int | None = None,
) -> None:
    """From the client: so many packets per second from made-up senders; does not wait.

    core: the processor that sends, and with it the kernel's work for each packet on its way.
    """
    site.flood(service, kind, rate, seconds, core)


@fault("flap")
def flap(site: Site, machine: Machines, times: int, every: float) -> None:
    """Machines fall silent and come back, so many times, half of `every` seconds each."""
    for _ in range(times):
        for percent in (100, 0):
            for found in site.machines(machine):
                site.losing[found.name] = percent
                site.wall(found)
            time.sleep(every / 2)


@fault("heal")
def heal(site: Site) -> None:
    """End every partition, loss, delay and rate limit."""
    site.heal()


# -- processes -------------------------------------------------------------------------------------


@fault("signal")
def send_signal(site: Site, to: Target, number: Literal["KILL", "TERM", "HUP"] = "KILL") -> None:
    """Hit the processes of `WHAT@WHERE` (`Site.processes`)."""
    processes.send(site.processes(to), signal.Signals[f"SIG{number}"])


@fault("freeze")
def freeze(site: Site, what: Target) -> None:
    """SIGSTOP; again until no new process has appeared."""
    frozen: set[processes.Pid] = set()
    while new := set(site.processes(what)) - frozen:
        processes.send(new, signal.SIGSTOP)
        frozen |= new
    site.stopped |= frozen


@fault("thaw")
def thaw(site: Site, what: Target) -> None:
    """SIGCONT."""
    found = set(site.processes(what))
    processes.send(found, signal.SIGCONT)
    site.stopped -= found


@fault("fakeClocks")
def fake_clocks(site: Site, of: Literal["managers", "agents"], monotonic: bool = False) -> None:
    """Roll our pods so that `stepClock` can set their clocks; returns when all run so.

    monotonic: the clock that durations are taken with as well. What is faked already stays so.
    """
    clocks.fake(site, of, monotonic)


@fault("stepClock")
def step_clock(site: Site, what: Target, by: int) -> None:
    """Set the clock of `manager@WHERE`, `speaker@WHERE` or `agent@WHERE` to so many s from now."""
    clocks.step(site, what, by)


@fault("forgetSnapshot")
def forget_snapshot(site: Site, of: Target) -> None:
    """Delete what managers (`manager@…`) keep for their next start."""
    for pid in site.processes(of):
        for file in Path(f"/proc/{pid.pid}/root{names.MANAGER_SNAPSHOT_DIR}").glob("*.json"):
            file.unlink(missing_ok=True)


@fault("killContainer")
def kill_container(
    site: Site,
    container: Literal["manager", "speaker", "agent"],
    where: Machines = Machines("*"),
    grace: float = 30.0,
) -> None:
    """End containers of ours as a kubelet does, one after the other; they are restarted."""
    found = site.containers(container, where)
    if not found:
        raise DrillError(f"no container {container!r} runs on {where!r} now")
    for row in found:
        control.kill_container(site.lab, f"{row.namespace}/{row.pod}", container, grace)


@fault("restartRouting")
def restart_routing(site: Site, machine: Machines) -> None:
    """Restart FRR on switches, as an operator does."""
    for found in site.machines(machine):
        switch.restart(found)


@fault("resetSessions")
def reset_sessions(site: Site, machine: Machines) -> None:
    """Reset every BGP session of switches at once."""
    for found in site.machines(machine):
        found.run("vtysh", "-c", "clear bgp *")


# -- the cluster -----------------------------------------------------------------------------------


@fault("scale")
def scale(site: Site, service: ServiceName, replicas: int) -> None:
    """Set a Deployment's replicas; does not wait."""
    site.api.scale(service, replicas)


@fault("rollout")
def rollout(site: Site, service: ServiceName) -> None:
    """Replace the pods of a Deployment, as `kubectl rollout restart` does; does not wait."""
    site.roll(service, DEPLOYMENTS, f"app={service}", service, "default")


@fault("upgrade")
def upgrade(site: Site, what: Literal["managers", "agents"]) -> None:
    """Roll our own pods; does not wait."""
    kind, name = WORKLOADS[what]
    site.roll(what, kind, f"app.kubernetes.io/name={name}", name, names.NAMESPACE)


@fault("crashPod")
def crash_pod(site: Site, service: ServiceName) -> None:
    """SIGKILL one pod's processes; its kubelet restarts it."""
    pod = site.api.ready_pods(service)[0]
    site.crashed.add(pod)
    control.crash_container(site.lab, f"default/{pod}", "web")


@fault("drain")
def drain(site: Site, node: NodeName) -> None:
    """Ask for a node to be no next hop any more, as `lbctl node drain` does."""
    site.drained.add(node)
    site.annotate(node, names.ANNOTATION_DRAIN, "true")


@fault("undrain")
def undrain(site: Site, node: NodeName) -> None:
    """The opposite."""
    site.annotate(node, names.ANNOTATION_DRAIN, None)
    site.drained.discard(node)


@fault("evict")
def evict(site: Site, node: NodeName) -> None:
    """Move the drill's pods off a node, as `kubectl drain` does; returns when none is left."""
    site.cordoned.add(node)
    site.api.patch(kube.NODES, node, {"spec": {"unschedulable": True}}, "")
    for service in sorted(site.services):
        for pod, on in sorted(site.api.pod_nodes(service).items()):
            if on == node:
                site.api.delete(kube.PODS, pod)
        wait(
            f"no pod of {service} on {node}",
            lambda service=service: node not in site.api.pod_nodes(service).values(),  # type: ignore[misc]
        )


@fault("wipeTables")
def wipe_tables(site: Site, machine: Machines) -> None:
    """Delete our nftables tables on nodes, as a careless hand does."""
    for found in site.machines(machine):
        for family in ("ip", "ip6"):
            found.run("nft", "delete", "table", family, names.NFT_TABLE, check=False)


@fault("wipeChain")
def wipe_chain(site: Site, machine: Machines, chain: str) -> None:
    """Empty one chain of ours on nodes: a rule is missing."""
    if not chain.isidentifier():
        raise DrillError(f"not a chain's name: {chain!r}")
    for found in site.machines(machine):
        for family in ("ip", "ip6"):
            found.run("nft", "flush", "chain", family, names.NFT_TABLE, chain)


@fault("configMap")
def config_map(site: Site, text: str) -> None:
    """Write ConfigMap `lbctl`."""
    site.api.apply(workload.config_map(text))


@fault("addNode")
def add_node(site: Site) -> None:
    """One more node with its agent; returns when it is Ready. It stays: the lab is made anew."""
    site.added.add(bringup.add_node(site.lab, lambda _text: None).name)
