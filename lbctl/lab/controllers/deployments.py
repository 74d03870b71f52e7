"""Deployments: a ReplicaSet per template, rolled over within maxSurge and maxUnavailable."""

from __future__ import annotations

import copy
from typing import Any, Final

from lbctl.lab.apiserver.api import Api, now
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.store import Change, Item, Key
from lbctl.lab.controllers.base import (
    Controller,
    Index,
    controller_of,
    deleting,
    owner_reference,
    owner_uids,
)
from lbctl.lab.controllers.pods import HASH_LABEL, resolve, template_hash
from lbctl.lab.controllers.replicasets import SETS

DEPLOYMENTS: Final = "deployments.apps"
_REVISION: Final = "deployment.kubernetes.io/revision"


class Deployments(Controller):
    """The Deployment controller."""

    name = "deployment"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._sets = Index(self.store, SETS, owner_uids)
        self._pods = Index(self.store, "pods", owner_uids)
        self.store.subscribe(DEPLOYMENTS, self.on_change)
        self.store.subscribe(SETS, self._set_changed)
        self.add_all(DEPLOYMENTS)

    def _set_changed(self, change: Change) -> None:
        reference = controller_of(change.item.obj)
        if reference is not None and reference["kind"] == "Deployment":
            self.add((change.key[0], reference["name"]))

    def reconcile(self, key: Key) -> None:
        """One step of a rollout or of scaling; the ReplicaSets' changes bring the next."""
        item = self.store.get(DEPLOYMENTS, *key)
        if item is None or deleting(item.obj):
            return
        obj = item.obj
        current = self._current(obj)
        if current is None and not obj["spec"].get("paused"):
            current = self._create_set(obj)
        if current is not None:
            self._step(obj, current["metadata"]["name"])
            self._clean_up(obj, current["metadata"]["name"])
        self._write_status(key)

    def _all(self, obj: Obj) -> list[Obj]:
        return [item.obj for item in self._sets.get(obj["metadata"]["uid"])]

    def _current(self, obj: Obj) -> Obj | None:
        """The ReplicaSet whose template is the Deployment's, the hash label aside."""
        for found in self._all(obj):
            template = copy.deepcopy(found["spec"]["template"])
            template["metadata"].get("labels", {}).pop(HASH_LABEL, None)
            if template == obj["spec"]["template"]:
                return self._renumber(obj, found)
        return None

    def _last_revision(self, obj: Obj) -> int:
        return max((_revision(found) for found in self._all(obj)), default=0)

    def _renumber(self, obj: Obj, found: Obj) -> Obj:
        """A former template that is wanted again is the newest revision."""
        last = self._last_revision(obj)
        if _revision(found) < last:
            changed = self._copy(found)
            changed["metadata"].setdefault("annotations", {})[_REVISION] = str(last + 1)
            found = self.store.put(SETS, changed).obj
        self._note_revision(obj, _revision(found))
        return found

    def _note_revision(self, obj: Obj, revision: int) -> None:
        meta = obj["metadata"]
        if (meta.get("annotations") or {}).get(_REVISION) == str(revision):
            return
        item = self.store.get(DEPLOYMENTS, meta["namespace"], meta["name"])
        if item is not None:
            changed = item.copy()
            changed["metadata"].setdefault("annotations", {})[_REVISION] = str(revision)
            self.store.put(DEPLOYMENTS, changed)

    def _copy(self, found: Obj) -> Obj:
        meta = found["metadata"]
        return self.api.get(self.resource(SETS), meta["namespace"], meta["name"]).copy()

    def _create_set(self, obj: Obj) -> Obj:
        spec, meta = obj["spec"], obj["metadata"]
        digest = template_hash(spec["template"])
        template = copy.deepcopy(spec["template"])
        template.setdefault("metadata", {}).setdefault("labels", {})[HASH_LABEL] = digest
        selector = copy.deepcopy(spec["selector"])
        selector.setdefault("matchLabels", {})[HASH_LABEL] = digest
        revision = self._last_revision(obj) + 1
        new: Obj = {
            "metadata": {
                "name": f"{meta['name']}-{digest}",
                "labels": dict(template["metadata"]["labels"]),
                "annotations": {**_copied(meta), _REVISION: str(revision)},
                "ownerReferences": [owner_reference(obj)],
            },
            "spec": {"replicas": 0, "selector": selector, "template": template},
        }
        if spec.get("minReadySeconds"):
            new["spec"]["minReadySeconds"] = spec["minReadySeconds"]
        made = self.api.create(self.resource(SETS), meta["namespace"], new).obj
        self._note_revision(obj, revision)
        return made

    def _scale(self, found: Obj, replicas: int) -> None:
        if found["spec"]["replicas"] != replicas:
            meta = found["metadata"]
            changed = self._copy(found)
            changed["spec"]["replicas"] = max(0, replicas)
            self.api.update(self.resource(SETS), meta["namespace"], meta["name"], changed)

    def _step(self, obj: Obj, name: str) -> None:
        spec = obj["spec"]
        wanted = spec["replicas"]
        sets = self._all(obj)
        current = next(found for found in sets if found["metadata"]["name"] == name)
        old = [found for found in sets if found["metadata"]["name"] != name]
        if spec.get("paused"):
            active = [found for found in sets if found["spec"]["replicas"]] or [current]
            if len(active) == 1:
                self._scale(active[0], wanted)
            return
        if spec["strategy"]["type"] == "Recreate":
            for found in old:
                self._scale(found, 0)
            if not any(self._pods.get(found["metadata"]["uid"]) for found in old):
                self._scale(current, wanted)
            return
        surge, unavailable = limits(spec["strategy"].get("rollingUpdate") or {}, wanted)
        plan = roll(wanted, surge, unavailable, _counts(current), [_counts(found) for found in old])
        for found, replicas in zip([current, *old], plan, strict=True):
            self._scale(found, replicas)

    def _clean_up(self, obj: Obj, name: str) -> None:
        """Drop the oldest empty ReplicaSets beyond revisionHistoryLimit."""
        limit = obj["spec"].get("revisionHistoryLimit", 10)
        idle = [
            found
            for found in self._all(obj)
            if found["metadata"]["name"] != name
            and not found["spec"]["replicas"]
            and not found.get("status", {}).get("replicas")
            and not deleting(found)
        ]
        idle.sort(key=_revision)
        for found in idle[: max(0, len(idle) - limit)]:
            meta = found["metadata"]
            self.api.delete(self.resource(SETS), meta["namespace"], meta["name"], DeleteOptions())

    def _write_status(self, key: Key) -> None:
        item = self.store.get(DEPLOYMENTS, *key)
        if item is None:
            return
        obj = item.obj
        sets = self._all(obj)
        current = self._current(obj)
        item = self.store.get(DEPLOYMENTS, *key) or item
        totals = {
            field: sum(found.get("status", {}).get(field, 0) for found in sets)
            for field in ("replicas", "readyReplicas", "availableReplicas", "terminatingReplicas")
        }
        totals["updatedReplicas"] = (current or {}).get("status", {}).get("replicas", 0)
        wanted = sum(found["spec"]["replicas"] for found in sets)
        totals["unavailableReplicas"] = max(0, wanted - totals["availableReplicas"])
        state: Obj = {name: number for name, number in totals.items() if number}
        state["observedGeneration"] = item.obj["metadata"]["generation"]
        state["conditions"] = _conditions(item, totals, current)
        self.set_status(self.resource(DEPLOYMENTS), item, state)


def _copied(meta: Obj) -> Obj:
    skipped = {_REVISION, "kubectl.kubernetes.io/last-applied-configuration"}
    return {k: v for k, v in (meta.get("annotations") or {}).items() if k not in skipped}


def _revision(found: Obj) -> int:
    return int((found["metadata"].get("annotations") or {}).get(_REVISION, 0))


def _counts(found: Obj) -> tuple[int, int]:
    return found["spec"]["replicas"], found.get("status", {}).get("availableReplicas", 0)


def limits(strategy: Obj, replicas: int) -> tuple[int, int]:
    """(maxSurge, maxUnavailable) as numbers; both zero would never move, so one may be missing."""
    surge = resolve(strategy.get("maxSurge", "25%"), replicas, up=True)
    unavailable = resolve(strategy.get("maxUnavailable", "25%"), replicas, up=False)
    return surge, (1 if not surge and not unavailable else unavailable)


def roll(
    wanted: int,
    surge: int,
    unavailable: int,
    new: tuple[int, int],
    old: list[tuple[int, int]],
) -> list[int]:
    """The next replica counts of the new and the old ReplicaSets, each given as (asked, available).

    New ones grow while the total stays within wanted + surge; old ones shrink, unhealthy Pods
    first, while wanted - unavailable stay available.
    """
    total = new[0] + sum(asked for asked, _ in old)
    grown = min(new[0], wanted) if new[0] > wanted else new[0]
    if grown < wanted:
        grown += max(0, min(wanted + surge - total, wanted - grown))
    after = [asked for asked, _ in old]
    at_least = max(0, wanted - unavailable)
    spare = total - at_least - max(0, new[0] - new[1])
    for index, (asked, available) in enumerate(old):
        cut = max(0, min(spare, asked - available))
        after[index] -= cut
        spare -= cut
    can_go = new[1] + sum(available for _, available in old) - at_least
    can_go = min(can_go, spare)
    for index in range(len(after)):
        cut = max(0, min(can_go, after[index], old[index][1]))
        after[index] -= cut
        can_go -= cut
    return [grown, *after]


def _conditions(item: Item, totals: dict[str, int], current: Obj | None) -> list[Obj]:
    spec, meta = item.obj["spec"], item.obj["metadata"]
    wanted = spec["replicas"]
    _, unavailable = limits(spec["strategy"].get("rollingUpdate") or {}, wanted)
    enough = totals["availableReplicas"] >= wanted - unavailable
    done = (
        totals["updatedReplicas"] == wanted
        and totals["replicas"] == wanted
        and totals["availableReplicas"] == wanted
    )
    name = current["metadata"]["name"] if current else ""
    progress = "NewReplicaSetAvailable" if done else "ReplicaSetUpdated"
    verb = "has successfully progressed" if done else "is progressing"
    entries = (
        (
            "Available",
            "True" if enough else "False",
            "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
            f"Deployment {'has' if enough else 'does not have'} minimum availability.",
        ),
        ("Progressing", "True", progress, f'ReplicaSet "{name}" {verb}.'),
    )
    before = {c["type"]: c for c in item.obj.get("status", {}).get("conditions") or ()}
    return [_condition(before.get(entry[0]), *entry) for entry in entries if meta]


def _condition(old: Obj | None, kind: str, value: str, reason: str, message: str) -> Obj:
    fresh: dict[str, Any] = {"type": kind, "status": value, "reason": reason, "message": message}
    if old is not None and all(old.get(key) == entry for key, entry in fresh.items()):
        return old
    stamp = now()
    moved = old is None or old["status"] != value
    fresh["lastUpdateTime"] = stamp
    fresh["lastTransitionTime"] = stamp if moved or old is None else old["lastTransitionTime"]
    return fresh
