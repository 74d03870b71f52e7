"""DaemonSets: one Pod on every node that selector, affinity and taints allow.

Pods are pinned by node affinity and bound by the scheduler, as the real controller does. Rolling
updates honour maxUnavailable; maxSurge is treated as 0. There are no ControllerRevision objects.
"""

from __future__ import annotations

from typing import Final

from lbctl.lab.apiserver.api import Api
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.store import Change, Key
from lbctl.lab.controllers.base import (
    Controller,
    Index,
    controller_of,
    deleting,
    is_active,
    is_available,
    is_ready,
    owner_uids,
)
from lbctl.lab.controllers.pods import (
    REVISION_LABEL,
    from_template,
    may_run,
    pin_to_node,
    pinned_node,
    resolve,
    template_hash,
)

DAEMONS: Final = "daemonsets.apps"
_GENERATION_LABEL: Final = "pod-template-generation"


class DaemonSets(Controller):
    """The DaemonSet controller."""

    name = "daemonset"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._pods = Index(self.store, "pods", owner_uids)
        self.store.subscribe(DAEMONS, self.on_change)
        self.store.subscribe("pods", self._pod_changed)
        self.store.subscribe("nodes", self._node_changed)
        self.add_all(DAEMONS)

    def _pod_changed(self, change: Change) -> None:
        reference = controller_of(change.item.obj)
        if reference is not None and reference["kind"] == "DaemonSet":
            self.add((change.key[0], reference["name"]))

    def _node_changed(self, change: Change) -> None:
        """Only labels, taints and existence matter; heartbeats do not."""
        old, new = change.old, change.item
        if change.type == "MODIFIED" and old is not None:
            same_labels = old.obj["metadata"].get("labels") == new.obj["metadata"].get("labels")
            if same_labels and old.obj.get("spec") == new.obj.get("spec"):
                return
        self.add_all(DAEMONS)

    def reconcile(self, key: Key) -> None:
        """Create, delete and roll Pods, and write the status."""
        item = self.store.get(DAEMONS, *key)
        if item is None:
            return
        obj = item.obj
        if not deleting(obj):
            self._place(obj)
            self._roll(obj)
        self._write_status(key)

    def _mine(self, obj: Obj) -> dict[str, list[Obj]]:
        """Pods by node, oldest first; ended and deleted ones too."""
        found: dict[str, list[Obj]] = {}
        for item in self._pods.get(obj["metadata"]["uid"]):
            found.setdefault(pinned_node(item.obj), []).append(item.obj)
        return found

    def _place(self, obj: Obj) -> None:
        space, spec = obj["metadata"]["namespace"], obj["spec"]["template"]["spec"]
        mine = self._mine(obj)
        nodes = {item.obj["metadata"]["name"]: item.obj for item in self.store.items("nodes")}
        for name, node in nodes.items():
            start, stay = may_run(spec, node)
            here = mine.get(name, [])
            for pod in here:
                ended = pod.get("status", {}).get("phase") in {"Failed", "Succeeded"}
                if (ended or not stay) and not deleting(pod):
                    self._delete(space, pod)
            active = [pod for pod in here if is_active(pod)]
            for extra in active[1:]:
                self._delete(space, extra)
            if start and not here:
                self._create(obj, name)
        for name, pods in mine.items():
            if name not in nodes:
                for pod in pods:
                    self._delete(space, pod)

    def _create(self, obj: Obj, node: str) -> None:
        template = obj["spec"]["template"]
        labels = {
            REVISION_LABEL: template_hash(template),
            _GENERATION_LABEL: str(obj["metadata"]["generation"]),
        }
        pod = from_template(obj, template, labels)
        pin_to_node(pod, node)
        self.api.create(self.resource("pods"), obj["metadata"]["namespace"], pod)

    def _delete(self, space: str, pod: Obj) -> None:
        if not deleting(pod):
            name = pod["metadata"]["name"]
            self.api.delete(self.resource("pods"), space, name, DeleteOptions())

    def _roll(self, obj: Obj) -> None:
        strategy = obj["spec"]["updateStrategy"]
        if strategy["type"] != "RollingUpdate":
            return
        digest = template_hash(obj["spec"]["template"])
        wait = obj["spec"].get("minReadySeconds", 0)
        desired = sum(
            may_run(obj["spec"]["template"]["spec"], i.obj)[0] for i in self.store.items("nodes")
        )
        most = resolve(strategy["rollingUpdate"].get("maxUnavailable", 1), desired, up=True)
        pods = [pod for found in self._mine(obj).values() for pod in found if is_active(pod)]
        room = max(1, most) - (desired - sum(is_available(pod, wait) for pod in pods))
        old = [pod for pod in pods if pod["metadata"]["labels"].get(REVISION_LABEL) != digest]
        for pod in sorted(old, key=lambda pod: (is_ready(pod), pod["metadata"]["name"])):
            if not is_available(pod, wait):
                self._delete(obj["metadata"]["namespace"], pod)
            elif room > 0:
                self._delete(obj["metadata"]["namespace"], pod)
                room -= 1

    def _write_status(self, key: Key) -> None:
        item = self.store.get(DAEMONS, *key)
        if item is None:
            return
        obj = item.obj
        spec = obj["spec"]["template"]["spec"]
        digest = template_hash(obj["spec"]["template"])
        wait = obj["spec"].get("minReadySeconds", 0)
        wanted = {
            node.obj["metadata"]["name"]
            for node in self.store.items("nodes")
            if may_run(spec, node.obj)[0]
        }
        mine = self._mine(obj)
        here = [found[0] for name, found in mine.items() if name in wanted]
        misplaced = sum(any(map(is_active, pods)) for n, pods in mine.items() if n not in wanted)
        available = sum(is_available(pod, wait) for pod in here)
        state = {
            "currentNumberScheduled": len(here),
            "numberMisscheduled": misplaced,
            "desiredNumberScheduled": len(wanted),
            "numberReady": sum(map(is_ready, here)),
            "observedGeneration": obj["metadata"]["generation"],
        }
        updated = sum(pod["metadata"]["labels"].get(REVISION_LABEL) == digest for pod in here)
        for name, number in (
            ("updatedNumberScheduled", updated),
            ("numberAvailable", available),
            ("numberUnavailable", len(wanted) - available),
        ):
            if number:
                state[name] = number
        self.set_status(self.resource(DAEMONS), item, state)
        if wait and available < state["numberReady"]:
            self.add_after(key, 1.0)
