"""Node readiness: by Lease and heartbeat, with the taints and the Pod conditions that follow.

Source: Kubernetes, "Nodes" and "Taint based Evictions". A node whose Lease and Ready heartbeat have
not changed for the grace period (by our own clock) is Unknown; its Pods become not ready, and are
deleted when their tolerations of the NoExecute taint have run out.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from lbctl.lab.apiserver.api import Api, now
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.store import Change, Key
from lbctl.lab.apiserver.tables import seconds
from lbctl.lab.controllers.base import Controller, Index, condition, deleting, node_of
from lbctl.lab.controllers.pods import tolerates

LEASES: Final = "leases.coordination.k8s.io"
_LEASE_NAMESPACE: Final = "kube-node-lease"
_TICK_S: Final = 0.5
_STALL_S: Final = 2.0
_QUARANTINE_S: Final = 40.0
_NOT_READY: Final = "node.kubernetes.io/not-ready"
_UNREACHABLE: Final = "node.kubernetes.io/unreachable"
_UNSCHEDULABLE: Final = "node.kubernetes.io/unschedulable"
_OURS: Final = frozenset({_NOT_READY, _UNREACHABLE, _UNSCHEDULABLE})


class Nodes(Controller):
    """The node lifecycle controller. `grace_s` is kube-controller-manager's grace period."""

    name = "node"

    def __init__(self, api: Api, grace_s: float) -> None:
        super().__init__(api)
        self._grace_s = grace_s
        self._beats: dict[str, tuple[Any, float]] = {}
        self._missing: dict[str, float] = {}
        self._pods = Index(self.store, "pods", node_of)
        self.store.subscribe("nodes", self.on_change)
        self.store.subscribe("pods", self._pod_changed)
        for item in self.store.items("nodes"):
            self.add(("", item.obj["metadata"]["name"]))

    def _pod_changed(self, change: Change) -> None:
        for node in node_of(change.item.obj):
            if change.type == "ADDED" or change.old is None:
                self.add(("", node))

    async def run(self) -> None:
        """Look at all nodes twice a second, and at one when it changes."""
        async with asyncio.TaskGroup() as group:
            group.create_task(super().run())
            before = time.monotonic()
            while True:
                before = self._forgive(before)
                for item in self.store.items("nodes"):
                    self.add(("", item.obj["metadata"]["name"]))
                for name in self._pods.values():
                    if self.store.get("nodes", "", name) is None:
                        self.add(("", name))
                await asyncio.sleep(_TICK_S)

    def _forgive(self, before: float) -> float:
        """Time in which this process did not run is no node's silence."""
        clock = time.monotonic()
        stall = clock - before - _TICK_S
        if stall > _STALL_S:
            self._beats = {
                name: (beat, since + stall) for name, (beat, since) in self._beats.items()
            }
        return clock

    def reconcile(self, key: Key) -> None:
        """Judge one node."""
        item = self.store.get("nodes", *key)
        if item is None:
            self._beats.pop(key[1], None)
            self._bury(key[1])
            return
        self._missing.pop(key[1], None)
        self._judge(key[1], item.obj)
        item = self.store.get("nodes", *key)
        if item is not None:
            self._taint(key[1], item.obj)
            self._pods_follow(key[1])

    def _bury(self, name: str) -> None:
        """Pods of a node that has been gone for a while are deleted, as Pod GC does."""
        since = self._missing.setdefault(name, time.monotonic())
        if time.monotonic() - since < _QUARANTINE_S:
            return
        for item in self._pods.get(name):
            meta = item.obj["metadata"]
            at_once = DeleteOptions(grace_s=0)
            self.api.delete(self.resource("pods"), meta["namespace"], meta["name"], at_once)
        self._missing.pop(name, None)

    def _silent(self, name: str, node: Obj) -> bool:
        lease = self.store.get(LEASES, _LEASE_NAMESPACE, name)
        renewed = (lease.obj.get("spec") or {}).get("renewTime") if lease else None
        beat = (renewed, (condition(node, "Ready") or {}).get("lastHeartbeatTime"))
        clock = time.monotonic()
        seen, since = self._beats.get(name, (None, clock))
        if name not in self._beats or seen != beat:
            self._beats[name] = (beat, clock)
            return False
        return clock - since > self._grace_s

    def _judge(self, name: str, node: Obj) -> None:
        ready = condition(node, "Ready")
        if not self._silent(name, node) or (ready or {}).get("status") == "Unknown":
            return
        changed = self.api.get(self.resource("nodes"), "", name).copy()
        conditions = changed.setdefault("status", {}).setdefault("conditions", [])
        if ready is None:
            conditions.append({"type": "Ready", "status": "", "lastHeartbeatTime": now()})
        for entry in conditions:
            if entry["status"] != "Unknown":
                entry.update(
                    status="Unknown",
                    reason="NodeStatusUnknown",
                    message="Kubelet stopped posting node status.",
                    lastTransitionTime=now(),
                )
        self.store.put("nodes", changed)
        self._beats[name] = (
            (self._beats[name][0][0], (condition(changed, "Ready") or {}).get("lastHeartbeatTime")),
            self._beats[name][1],
        )

    def _all_silent(self) -> bool:
        """Then the fault is rather ours, and nothing is evicted (full disruption mode)."""
        return not any(
            (condition(item.obj, "Ready") or {}).get("status") == "True"
            for item in self.store.items("nodes")
        )

    def _taint(self, name: str, node: Obj) -> None:
        wanted: set[tuple[str, str]] = set()
        state = (condition(node, "Ready") or {}).get("status")
        if state == "Unknown":
            wanted.add((_UNREACHABLE, "NoSchedule"))
            if not self._all_silent():
                wanted.add((_UNREACHABLE, "NoExecute"))
        elif state != "True":
            wanted.add((_NOT_READY, "NoSchedule"))
            if state == "False":
                wanted.add((_NOT_READY, "NoExecute"))
        if node.get("spec", {}).get("unschedulable"):
            wanted.add((_UNSCHEDULABLE, "NoSchedule"))
        taints = node.get("spec", {}).get("taints") or []
        kept = [t for t in taints if t["key"] not in _OURS or (t["key"], t["effect"]) in wanted]
        have = {(taint["key"], taint["effect"]) for taint in kept}
        for key, effect in sorted(wanted - have):
            taint = {"key": key, "effect": effect}
            if effect == "NoExecute":
                taint["timeAdded"] = now()
            kept.append(taint)
        if kept == taints:
            return
        changed = self.api.get(self.resource("nodes"), "", name).copy()
        changed.setdefault("spec", {})["taints"] = kept
        if not kept:
            del changed["spec"]["taints"]
        self.store.put("nodes", changed)

    def _pods_follow(self, name: str) -> None:
        node = self.store.get("nodes", "", name)
        if node is None:
            return
        state = (condition(node.obj, "Ready") or {}).get("status")
        taints = [
            taint
            for taint in node.obj.get("spec", {}).get("taints") or ()
            if taint["effect"] == "NoExecute"
        ]
        for item in self._pods.get(name):
            pod = item.obj
            if state == "Unknown":
                self._mark_not_ready(pod)
            if taints and not deleting(pod) and _evict(pod, taints):
                meta = pod["metadata"]
                self.api.delete(
                    self.resource("pods"), meta["namespace"], meta["name"], DeleteOptions()
                )

    def _mark_not_ready(self, pod: Obj) -> None:
        ready = condition(pod, "Ready")
        if ready is None or ready["status"] != "True":
            return
        meta = pod["metadata"]
        changed = self.api.get(self.resource("pods"), meta["namespace"], meta["name"]).copy()
        for entry in changed["status"]["conditions"]:
            if entry["type"] == "Ready":
                entry.update(status="False", lastTransitionTime=now())
        self.store.put("pods", changed)


def _evict(pod: Obj, taints: list[Obj]) -> bool:
    """Some NoExecute taint is not tolerated, or no longer."""
    for taint in taints:
        fits = [t for t in pod["spec"].get("tolerations") or () if tolerates(t, taint)]
        if not fits:
            return True
        limits = [t["tolerationSeconds"] for t in fits if t.get("tolerationSeconds") is not None]
        since = taint.get("timeAdded")
        if limits and since and time.time() - seconds(since) > min(limits):
            return True
    return False
