"""What a DELETE does to an object before it goes: marks, grace period, finalizers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lbctl.lab.apiserver.resources import Obj, Resource


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    """metav1.DeleteOptions. `propagation` is Background, Foreground or Orphan."""

    grace_s: int | None = None
    propagation: str = "Background"
    uid: str | None = None
    version: str | None = None
    dry_run: bool = False


def mark(resource: Resource, obj: Obj, options: DeleteOptions) -> None:
    """Write deletionTimestamp, grace period and the finalizers of the propagation into `obj`."""
    meta = obj["metadata"]
    _propagate(meta, options.propagation)
    grace = _grace(resource, obj, options.grace_s)
    first = "deletionTimestamp" not in meta
    if first or grace < meta.get("deletionGracePeriodSeconds", 0):
        at = time.gmtime(time.time() + grace)
        meta["deletionTimestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", at)
        meta["deletionGracePeriodSeconds"] = grace
    if first and "generation" in meta:
        meta["generation"] += 1
    if resource.key == "namespaces":
        obj["status"] = {**obj.get("status", {}), "phase": "Terminating"}


def is_complete(resource: Resource, obj: Obj) -> bool:
    """Nothing holds a marked object any more."""
    meta = obj["metadata"]
    if "deletionTimestamp" not in meta or meta.get("finalizers"):
        return False
    if resource.key == "namespaces":
        return not obj["spec"].get("finalizers")
    return not meta.get("deletionGracePeriodSeconds", 0)


def _propagate(meta: Obj, propagation: str) -> None:
    names = {"Foreground": "foregroundDeletion", "Orphan": "orphan"}
    wanted = names.get(propagation)
    kept = [name for name in meta.get("finalizers", ()) if name not in names.values()]
    if wanted:
        kept.append(wanted)
    if kept:
        meta["finalizers"] = kept
    else:
        meta.pop("finalizers", None)


def _grace(resource: Resource, obj: Obj, asked: int | None) -> int:
    """Seconds that a Pod gets; nothing else has a grace period."""
    if resource.key != "pods":
        return 0
    done = obj.get("status", {}).get("phase") in {"Succeeded", "Failed"}
    if not obj["spec"].get("nodeName") or done:
        return 0
    grace = obj["spec"].get("terminationGracePeriodSeconds", 30) if asked is None else asked
    return max(0, int(grace))
