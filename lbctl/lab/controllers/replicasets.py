"""ReplicaSets: keep the number of Pods; too many, and the least useful go first."""

from __future__ import annotations

from typing import Any, Final

from lbctl.lab.apiserver.api import Api
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.selectors import label_selector
from lbctl.lab.apiserver.store import Change, Item, Key
from lbctl.lab.controllers.base import (
    Controller,
    Index,
    controller_of,
    deleting,
    is_active,
    is_available,
    is_ready,
    owner_reference,
    owner_uids,
    ready_for_s,
)
from lbctl.lab.controllers.pods import from_template

SETS: Final = "replicasets.apps"
_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
_PHASES: Final = {"Pending": 0, "Unknown": 1, "Running": 2}


class ReplicaSets(Controller):
    """The ReplicaSet controller."""

    name = "replicaset"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._pods = Index(self.store, "pods", owner_uids)
        self.store.subscribe(SETS, self.on_change)
        self.store.subscribe("pods", self._pod_changed)
        self.add_all(SETS)

    def _pod_changed(self, change: Change) -> None:
        for item in (change.item, change.old):
            if item is None:
                continue
            reference = controller_of(item.obj)
            if reference is not None and reference["kind"] == "ReplicaSet":
                self.add((change.key[0], reference["name"]))
            elif reference is None and change.type != "DELETED":
                self._offer_orphan(item.obj)

    def _offer_orphan(self, pod: Obj) -> None:
        space = pod["metadata"].get("namespace")
        labels = pod["metadata"].get("labels") or {}
        for item in self.store.items(SETS, space) if labels else ():
            if label_selector(item.obj["spec"].get("selector"))(labels):
                self.add((item.obj["metadata"]["namespace"], item.obj["metadata"]["name"]))

    def reconcile(self, key: Key) -> None:
        """Create or delete Pods, and write the status."""
        item = self.store.get(SETS, *key)
        if item is None:
            return
        obj = item.obj
        if not deleting(obj):
            self._adopt(obj)
            self._scale(obj)
        self._write_status(item)

    def _adopt(self, obj: Obj) -> None:
        match = label_selector(obj["spec"].get("selector"))
        space = obj["metadata"]["namespace"]
        mine = obj["metadata"]["uid"]
        for item in self.store.items("pods", space):
            pod = item.obj
            reference = controller_of(pod)
            fits = match(pod["metadata"].get("labels") or {})
            if reference is None and fits and is_active(pod):
                changed = item.copy()
                owners = changed["metadata"].setdefault("ownerReferences", [])
                owners.append(owner_reference(obj))
                self.store.put("pods", changed)
            elif reference is not None and reference["uid"] == mine and not fits:
                changed = item.copy()
                kept = [r for r in changed["metadata"]["ownerReferences"] if r["uid"] != mine]
                changed["metadata"]["ownerReferences"] = kept
                self.store.put("pods", changed)

    def _scale(self, obj: Obj) -> None:
        space = obj["metadata"]["namespace"]
        active = [i.obj for i in self._pods.get(obj["metadata"]["uid"]) if is_active(i.obj)]
        missing = obj["spec"].get("replicas", 1) - len(active)
        pods = self.resource("pods")
        for _ in range(missing):
            self.api.create(pods, space, from_template(obj, obj["spec"]["template"]))
        if missing < 0:
            nodes: dict[str, int] = {}
            for pod in active:
                node = pod["spec"].get("nodeName", "")
                nodes[node] = nodes.get(node, 0) + 1
            ranked = sorted(active, key=lambda pod: deletion_rank(pod, nodes))
            for pod in ranked[:-missing]:
                self.api.delete(pods, space, pod["metadata"]["name"], DeleteOptions())

    def _write_status(self, item: Item) -> None:
        obj = self.store.get(SETS, item.obj["metadata"]["namespace"], item.obj["metadata"]["name"])
        if obj is None:
            return
        spec, meta = obj.obj["spec"], obj.obj["metadata"]
        pods = [i.obj for i in self._pods.get(meta["uid"])]
        active = [pod for pod in pods if is_active(pod)]
        wanted = (spec["template"].get("metadata", {}).get("labels") or {}).items()
        wait = spec.get("minReadySeconds", 0)
        counts = {
            "replicas": len(active),
            "fullyLabeledReplicas": sum(
                wanted <= (pod["metadata"].get("labels") or {}).items() for pod in active
            ),
            "readyReplicas": sum(map(is_ready, active)),
            "availableReplicas": sum(is_available(pod, wait) for pod in active),
            "terminatingReplicas": sum(map(deleting, pods)),
        }
        kept = {key: n for key, n in counts.items() if n or key in {"replicas"}}
        self.set_status(
            self.resource(SETS), obj, {**kept, "observedGeneration": meta.get("generation", 1)}
        )
        if wait and counts["availableReplicas"] < counts["readyReplicas"]:
            self.add_after((meta["namespace"], meta["name"]), 1.0)


def deletion_rank(pod: Obj, nodes: dict[str, int]) -> tuple[Any, ...]:
    """Lowest goes first: unscheduled, not running, not ready, cheap, crowded, young."""
    spec, meta, state = pod["spec"], pod["metadata"], pod.get("status", {})
    node = spec.get("nodeName", "")
    restarts = max(
        (s.get("restartCount", 0) for s in state.get("containerStatuses", ())), default=0
    )
    created = _newest_first(meta.get("creationTimestamp", ""))
    return (
        bool(node),
        _PHASES.get(state.get("phase", "Unknown"), 1),
        is_ready(pod),
        int((meta.get("annotations") or {}).get(_COST, 0)),
        -nodes.get(node, 0),
        ready_for_s(pod) // 1,
        -restarts,
        created,
        meta["name"],
    )


def _newest_first(stamp: str) -> tuple[int, ...]:
    return tuple(-ord(letter) for letter in stamp)
