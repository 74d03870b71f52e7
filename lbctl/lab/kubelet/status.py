"""A pod's status as the kubelet writes it, from the states of its containers: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

Object: TypeAlias = dict[str, Any]


@dataclass(slots=True)
class ContainerState:
    """One container now. `state` and `last` are Kubernetes' ContainerState objects."""

    name: str
    image: str
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last: Object = field(default_factory=dict)
    restarts: int = 0
    ready: bool = False
    started: bool = False
    container_id: str = ""
    over: bool = False  # ended, and its restartPolicy says to leave it


def timestamp(seconds: float) -> str:
    """RFC 3339, in whole seconds, as Kubernetes writes times."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def running(since_s: float) -> Object:
    """A running container's state."""
    return {"running": {"startedAt": timestamp(since_s)}}


def terminated(code: int, since_s: float, until_s: float, container_id: str) -> Object:
    """An ended container's state."""
    return {
        "terminated": {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "startedAt": timestamp(since_s),
            "finishedAt": timestamp(until_s),
            "containerID": container_id,
        }
    }


def waiting(reason: str, message: str = "") -> Object:
    """A container that does not run yet, and why."""
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def phase(states: Sequence[ContainerState]) -> str:
    """Pending, Running, Succeeded or Failed."""
    if states and all(state.over for state in states):
        codes = [state.state.get("terminated", {}).get("exitCode", 0) for state in states]
        return "Failed" if any(codes) else "Succeeded"
    born = all("waiting" not in state.state or state.restarts or state.last for state in states)
    return "Running" if born and states else "Pending"


def pod_status(
    pod: Object,
    states: Sequence[ContainerState],
    host_ips: Sequence[str],
    pod_ips: Sequence[str],
    started_s: float,
    now_s: float,
) -> Object:
    """The whole `status`. Transition times are kept where the condition did not change."""
    now_phase = phase(states)
    ready = bool(states) and all(state.ready for state in states) and now_phase == "Running"
    unready = sorted(state.name for state in states if not state.ready)
    why: Object = {}
    if not ready:
        why = {
            "reason": "ContainersNotReady",
            "message": f"containers with unready status: [{' '.join(unready)}]",
        }
    if now_phase == "Succeeded":
        why = {"reason": "PodCompleted"}
    conditions = [
        {"type": "PodReadyToStartContainers", "status": "True" if pod_ips else "False"},
        {"type": "Initialized", "status": "True"},
        {"type": "Ready", "status": "True" if ready else "False", **why},
        {"type": "ContainersReady", "status": "True" if ready else "False", **why},
        {"type": "PodScheduled", "status": "True"},
    ]
    status: Object = {
        "phase": now_phase,
        "hostIP": host_ips[0],
        "hostIPs": [{"ip": address} for address in host_ips],
        "startTime": timestamp(started_s),
        "conditions": _timed(conditions, pod.get("status", {}).get("conditions") or [], now_s),
        "containerStatuses": [_container(state) for state in states],
    }
    if pod_ips:
        status["podIP"] = pod_ips[0]
        status["podIPs"] = [{"ip": address} for address in pod_ips]
    return status


def _timed(fresh: Sequence[Object], old: Sequence[Mapping[str, Any]], now_s: float) -> list[Object]:
    known = {item["type"]: item for item in old}
    timed = []
    for condition in fresh:
        before = known.get(condition["type"], {})
        same = before.get("status") == condition["status"] and before.get("lastTransitionTime")
        moment = before["lastTransitionTime"] if same else timestamp(now_s)
        timed.append({**condition, "lastTransitionTime": moment})
    return timed


def _container(state: ContainerState) -> Object:
    shown: Object = {
        "name": state.name,
        "image": state.image,
        "imageID": state.image,
        "state": state.state,
        "lastState": state.last,
        "restartCount": state.restarts,
        "ready": state.ready,
        "started": state.started,
    }
    if state.container_id:
        shown["containerID"] = state.container_id
    return shown
