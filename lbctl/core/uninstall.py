"""Taking lbctl off a cluster: what is to be done, in which order.

Rules: pure. A stage begins when the one before it is done, and `plan` is asked again after each; so
an uninstall that was interrupted goes on where it stopped, and it makes no difference whether the
managers are at work, gone, or never ran. No forwarding goes before its route is gone, and a Service
is let go even if a node cannot be cleaned.

| stage        | why it comes here                                                              |
|--------------|--------------------------------------------------------------------------------|
| StopManagers | their sessions end, and with them every route; nobody writes to Services after |
| AwaitRoutes  | a switch that did not hear the end drops them at last (keep_s); then drainTime |
| CleanNodes   | no packet for an EIP comes any more                                            |
| LetGo        | nothing forwards; whoever waits for a Service's deletion gets it               |
| Undrain      | the annotation of `lbctl node drain`                                           |
| Delete       | what knows about Services (EIPs, with their definition) goes last              |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lbctl.core import names
from lbctl.core.config import HOLD_TIME_S, Config, Services
from lbctl.core.model import Address, Eip, Node, ObjectRef, Service

DRAIN_TIME_S: Final = 2.0  # the default, where no configuration can be read
_AGENT: Final = "agent"  # the container
UNINSTALL: Final = ("--uninstall", "--stay")


@dataclass(frozen=True, slots=True)
class Thing:
    """An object of ours in the API: api ("v1" or GROUP/VERSION), plural, name."""

    api: str
    plural: str
    name: str
    namespaced: bool = True

    def __str__(self) -> str:
        return f"{self.plural}/{self.name}"


_RBAC: Final = "rbac.authorization.k8s.io/v1"
MANAGERS: Final = Thing("apps/v1", "deployments", names.MANAGER_APP)
AGENTS: Final = Thing("apps/v1", "daemonsets", names.AGENT_APP)
CONFIG: Final = Thing("v1", "configmaps", names.CONFIG_MAP)
SPACE: Final = Thing("v1", "namespaces", names.NAMESPACE, namespaced=False)
_MAPS: Final = (names.ACCEPTED_CONFIG_MAP, *names.HISTORY_CONFIG_MAPS)
_WORKERS: Final = (names.MANAGER_ACCOUNT, names.AGENT_ACCOUNT)
_ACCOUNTS: Final = (*_WORKERS, names.VIEWER_ACCOUNT)
THINGS: Final = (
    AGENTS,
    Thing("policy/v1", "poddisruptionbudgets", names.MANAGER_APP),
    Thing("coordination.k8s.io/v1", "leases", names.LEASE),
    *(Thing("v1", "configmaps", name) for name in _MAPS),
    Thing("v1", "secrets", names.PROBE_SECRET),
    *(Thing(_RBAC, "rolebindings", name) for name in _WORKERS),
    *(Thing(_RBAC, "roles", name) for name in _WORKERS),
    *(Thing("v1", "serviceaccounts", name) for name in _ACCOUNTS),
    *(Thing(_RBAC, "clusterrolebindings", name, False) for name in _ACCOUNTS),
    *(Thing(_RBAC, "clusterroles", name, False) for name in _ACCOUNTS),
    Thing(
        "apiextensions.k8s.io/v1",
        "customresourcedefinitions",
        f"{names.EIP_PLURAL}.{names.GROUP}",
        False,
    ),
    CONFIG,
    SPACE,
)
KEPT: Final = frozenset({CONFIG, SPACE})  # by --keep-config


@dataclass(frozen=True, slots=True)
class Found:
    """What of ours is on a cluster.

    managers: Pods of the Deployment. things: of MANAGERS and THINGS, those that exist. config: the
    accepted one, None if it cannot be read. quiet: no manager has been there for `silence_s`.
    cleaned: each agent that can be reached has removed what it made. dirty: nodes whose agent
    should have, and did not.
    """

    managers: tuple[str, ...] = ()
    services: tuple[Service, ...] = ()
    eips: tuple[Eip, ...] = ()
    nodes: tuple[Node, ...] = ()
    things: frozenset[Thing] = frozenset()
    config: Config | None = None
    quiet: bool = False
    cleaned: bool = False
    dirty: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StopManagers:
    """Delete the Deployment, and wait until its Pods are gone."""

    pods: tuple[str, ...]
    eips: int

    def __str__(self) -> str:
        return f"stop the managers: the routes of {self.eips} EIPs go with their sessions"


@dataclass(frozen=True, slots=True)
class AwaitRoutes:
    """Wait for the hold time and drainTime."""

    seconds: float

    def __str__(self) -> str:
        return f"wait {self.seconds:g} s: the hold time, then drainTime"


@dataclass(frozen=True, slots=True)
class CleanNodes:
    """Run every agent as `lbctl-agent --uninstall`, and wait until each has done it."""

    def __str__(self) -> str:
        return "clean the nodes: tables, rules, routes, tunnels and snapshots of the agents"


@dataclass(frozen=True, slots=True)
class LetGo:
    """Take `addresses` out of a Service's status, and our condition, annotation and (if so said)
    finalizer off it."""

    service: ObjectRef
    addresses: frozenset[Address]
    finalizer: bool

    def __str__(self) -> str:
        shown = " ".join(str(a) for a in sorted(self.addresses, key=lambda a: (a.version, int(a))))
        return f"let Service {self.service} go" + (f", which shows {shown}" if shown else "")


@dataclass(frozen=True, slots=True)
class Undrain:
    """Remove the annotation of `lbctl node drain`."""

    node: str

    def __str__(self) -> str:
        return f"end the drain of node {self.node}"


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete an object, and wait until it is gone."""

    thing: Thing

    def __str__(self) -> str:
        more = " with all that is in it" if self.thing == SPACE else ""
        return f"delete {self.thing}{more}"


Step: TypeAlias = StopManagers | AwaitRoutes | CleanNodes | LetGo | Undrain | Delete


def plan(found: Found, keep_config: bool = False) -> tuple[Step, ...]:
    """Everything that is left to do, in order; () when nothing of ours is left.

    keep_config: ConfigMap `lbctl` stays, and so does its namespace.
    """
    steps: list[Step] = []
    forwarding = AGENTS in found.things and not found.cleaned
    if MANAGERS in found.things or found.managers:
        steps.append(StopManagers(found.managers, len(found.eips)))
    if forwarding and not found.quiet:
        steps.append(AwaitRoutes(silence_s(found.config)))
    if forwarding:
        steps.append(CleanNodes())
    steps += _let_go(found)
    steps += [Undrain(node.name) for node in found.nodes if node.draining]
    if not found.dirty:  # the DaemonSet has work left
        wanted = [thing for thing in THINGS if thing in found.things]
        steps += [Delete(thing) for thing in wanted if not (keep_config and thing in KEPT)]
    return tuple(steps)


def silence_s(config: Config | None) -> float:
    """How long after the managers' end no switch has a route and no connection drains any more."""
    if config is None:
        return HOLD_TIME_S + DRAIN_TIME_S
    return config.bgp.keep_s + config.announce.drain_time_s


def _let_go(found: Found) -> Iterable[LetGo]:
    held: dict[ObjectRef, set[Address]] = {}
    for eip in found.eips:
        for ref in eip.members:
            held.setdefault(ref, set()).add(eip.address)
    rule = (found.config.services if found.config is not None else Services()).load_balancer_class
    for service in sorted(found.services, key=lambda s: s.ref):
        marked = any(key == names.ANNOTATION_POOL for key, _ in service.annotations)
        mine = held.get(service.ref, set())
        if marked and not mine:  # its EIP objects are lost
            mine = {a for a in service.ingress if found.config is None or found.config.pool_of(a)}
        shown = frozenset(mine & set(service.ingress))
        # Others use the same finalizer: of those that we never marked, ours are told by the class.
        ours = marked or service.ref in held or service.load_balancer_class == rule
        finalizer = ours and names.FINALIZER in service.finalizers
        if shown or marked or finalizer or service.condition is not None:
            yield LetGo(service.ref, shown, finalizer)


def let_go(step: LetGo, item: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON merge patches for a Service as the API has it: of its status, and of the Service.

    {} where nothing is to be changed.
    """
    meta, status = item["metadata"], item.get("status") or {}
    mine = {str(address) for address in step.addresses}
    shown = (status.get("loadBalancer") or {}).get("ingress") or []
    others = [entry for entry in shown if entry.get("ip") not in mine]
    conditions = status.get("conditions") or []
    rest = [entry for entry in conditions if entry.get("type") != names.CONDITION_ANNOUNCED]
    of_status: dict[str, Any] = {}
    if len(others) < len(shown):
        of_status["loadBalancer"] = {"ingress": others or None}
    if len(rest) < len(conditions):
        of_status["conditions"] = rest or None
    of_meta: dict[str, Any] = {}
    if names.ANNOTATION_POOL in (meta.get("annotations") or {}):
        of_meta["annotations"] = {names.ANNOTATION_POOL: None}
    if step.finalizer and names.FINALIZER in (meta.get("finalizers") or ()):
        of_meta["finalizers"] = [name for name in meta["finalizers"] if name != names.FINALIZER]
    return ({"status": of_status} if of_status else {}), ({"metadata": of_meta} if of_meta else {})


def cleaning(item: Mapping[str, Any]) -> dict[str, Any]:
    """JSON merge patch that makes the agents' DaemonSet clean its nodes; {} if it does already.

    Without the probe Secret: where no manager ever ran there is none, and no Pod would start.
    """
    spec = item["spec"]["template"]["spec"]
    if _cleans(spec):
        return {}
    volumes = [volume for volume in spec.get("volumes") or () if "secret" not in volume]
    there = {volume["name"] for volume in volumes}
    containers = []
    for container in spec["containers"]:
        mounts = [m for m in container.get("volumeMounts") or () if m["name"] in there]
        more = UNINSTALL if container["name"] == _AGENT else ()
        command = [*(container.get("command") or ()), *more]
        containers.append({**container, "command": command or None, "volumeMounts": mounts})
    return {
        "metadata": {"resourceVersion": item["metadata"]["resourceVersion"]},
        "spec": {
            "updateStrategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": "100%", "maxSurge": 0},
            },
            "template": {"spec": {"containers": containers, "volumes": volumes}},
        },
    }


def uncleaned(
    item: Mapping[str, Any], pods: Iterable[Mapping[str, Any]], ready: frozenset[str]
) -> tuple[str, ...] | None:
    """Nodes whose agent has not cleaned up yet; None while the DaemonSet itself is still at work.

    item: the DaemonSet. pods: its Pods. ready: the nodes that Kubernetes calls Ready; the others
    are not waited for, their kernels' tables go with the next boot.
    """
    left: set[str] = set()
    done = 0
    for pod in pods:
        node = str(pod["spec"].get("nodeName") or "")
        if _has_cleaned(pod):
            done += 1
        elif node in ready:
            left.add(node)
        else:
            done += 1
    state = item.get("status") or {}
    seen = state.get("observedGeneration", 0) >= item["metadata"]["generation"]
    if not left and (not seen or done < state.get("desiredNumberScheduled", 0)):
        return None
    return tuple(sorted(left))


def _cleans(spec: Mapping[str, Any]) -> bool:
    """Whether a Pod's agent is told to clean up."""
    return any(
        container["name"] == _AGENT and set(UNINSTALL) <= set(container.get("command") or ())
        for container in spec["containers"]
    )


def _has_cleaned(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and _cleans(pod["spec"])
