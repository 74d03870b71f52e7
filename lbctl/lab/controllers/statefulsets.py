"""StatefulSets: Pods with fixed names, one after the other or all at once.

Rolling updates go from the highest ordinal down and honour `partition`. Volume claims are not made:
the lab has no storage.
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
from lbctl.lab.controllers.pods import REVISION_LABEL, from_template, template_hash

STATEFUL: Final = "statefulsets.apps"


class StatefulSets(Controller):
    """The StatefulSet controller."""

    name = "statefulset"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._pods = Index(self.store, "pods", owner_uids)
        self.store.subscribe(STATEFUL, self.on_change)
        self.store.subscribe("pods", self._pod_changed)
        self.add_all(STATEFUL)

    def _pod_changed(self, change: Change) -> None:
        reference = controller_of(change.item.obj)
        if reference is not None and reference["kind"] == "StatefulSet":
            self.add((change.key[0], reference["name"]))

    def reconcile(self, key: Key) -> None:
        """Create, delete and roll Pods, and write the status."""
        item = self.store.get(STATEFUL, *key)
        if item is None:
            return
        if not deleting(item.obj):
            self._step(item.obj)
        self._write_status(key)

    def _mine(self, obj: Obj) -> dict[int, Obj]:
        found = {}
        for item in self._pods.get(obj["metadata"]["uid"]):
            ordinal = item.obj["metadata"]["name"].rpartition("-")[2]
            if ordinal.isdigit():
                found[int(ordinal)] = item.obj
        return found

    def _step(self, obj: Obj) -> None:
        spec, space = obj["spec"], obj["metadata"]["namespace"]
        first = spec.get("ordinals", {}).get("start", 0)
        wanted = range(first, first + spec["replicas"])
        ordered = spec["podManagementPolicy"] == "OrderedReady"
        mine = self._mine(obj)
        for _, pod in sorted(mine.items()):
            if pod.get("status", {}).get("phase") in {"Failed", "Succeeded"}:
                self._delete(space, pod)
        healthy = True
        for ordinal in wanted:
            found = mine.get(ordinal)
            if found is None:
                self._create(obj, ordinal)
            if found is None or not is_active(found) or not is_ready(found):
                healthy = False
                if ordered:
                    break
        extra = sorted((n for n in mine if n not in wanted), reverse=True)
        if ordered and (not healthy or any(deleting(pod) for pod in mine.values())):
            return
        for ordinal in extra[:1] if ordered else extra:
            self._delete(space, mine[ordinal])
        if healthy and not extra:
            self._roll(obj, mine, wanted)

    def _roll(self, obj: Obj, mine: dict[int, Obj], wanted: range) -> None:
        strategy = obj["spec"]["updateStrategy"]
        if strategy["type"] != "RollingUpdate":
            return
        partition = strategy.get("rollingUpdate", {}).get("partition", 0)
        digest = template_hash(obj["spec"]["template"])
        for ordinal in reversed(wanted):
            pod = mine.get(ordinal)
            if ordinal < partition or pod is None or not is_ready(pod):
                return
            if not (pod["metadata"]["labels"].get(REVISION_LABEL) or "").endswith(digest):
                self._delete(obj["metadata"]["namespace"], pod)
                return

    def _create(self, obj: Obj, ordinal: int) -> None:
        meta, spec = obj["metadata"], obj["spec"]
        name = f"{meta['name']}-{ordinal}"
        labels = {
            "statefulset.kubernetes.io/pod-name": name,
            "apps.kubernetes.io/pod-index": str(ordinal),
            REVISION_LABEL: f"{meta['name']}-{template_hash(spec['template'])}",
        }
        pod = from_template(obj, spec["template"], labels)
        pod["metadata"]["name"] = name
        pod["spec"]["hostname"] = name
        if spec.get("serviceName"):
            pod["spec"]["subdomain"] = spec["serviceName"]
        self.api.create(self.resource("pods"), meta["namespace"], pod)

    def _delete(self, space: str, pod: Obj) -> None:
        if not deleting(pod):
            name = pod["metadata"]["name"]
            self.api.delete(self.resource("pods"), space, name, DeleteOptions())

    def _write_status(self, key: Key) -> None:
        item = self.store.get(STATEFUL, *key)
        if item is None:
            return
        obj = item.obj
        revision = f"{obj['metadata']['name']}-{template_hash(obj['spec']['template'])}"
        wait = obj["spec"].get("minReadySeconds", 0)
        pods = [pod for pod in self._mine(obj).values() if is_active(pod)]
        updated = sum(pod["metadata"]["labels"].get(REVISION_LABEL) == revision for pod in pods)
        before = obj.get("status", {}).get("currentRevision", revision)
        done = updated == len(pods) == obj["spec"]["replicas"]
        state: Obj = {
            "observedGeneration": obj["metadata"]["generation"],
            "replicas": len(pods),
            "availableReplicas": sum(is_available(pod, wait) for pod in pods),
            "currentRevision": revision if done else before,
            "updateRevision": revision,
            "collisionCount": 0,
        }
        current = state["currentRevision"]
        for name, number in (
            ("readyReplicas", sum(map(is_ready, pods))),
            ("updatedReplicas", updated),
            (
                "currentReplicas",
                sum(pod["metadata"]["labels"].get(REVISION_LABEL) == current for pod in pods),
            ),
        ):
            if number:
                state[name] = number
        self.set_status(self.resource(STATEFUL), item, state)
