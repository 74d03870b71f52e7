"""Garbage collection: what a deleted owner leaves behind, in all three propagation modes.

Source: Kubernetes, "Garbage Collection". Keys are owner uids, as ("", uid).
"""

from __future__ import annotations

from typing import Final

from lbctl.lab.apiserver.api import INTERNAL, Api
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.store import Change, Item, Key
from lbctl.lab.controllers.base import Controller, deleting

_FOREGROUND: Final = "foregroundDeletion"
_ORPHAN: Final = "orphan"
_UNTRACKED: Final = frozenset({"events"})


class Garbage(Controller):
    """The garbage collector."""

    name = "garbage"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._where: dict[str, tuple[str, Key]] = {}  # uid -> resource, key
        self._dependents: dict[str, set[str]] = {}  # owner uid -> uids
        for resource, item in self.store.everything():
            self._note(resource, item.obj)
        self.store.subscribe_all(self._changed)

    def _note(self, resource: str, obj: Obj) -> None:
        meta = obj["metadata"]
        self._where[meta["uid"]] = (resource, (meta.get("namespace", ""), meta["name"]))
        for reference in meta.get("ownerReferences") or ():
            self._dependents.setdefault(reference["uid"], set()).add(meta["uid"])
            if reference["uid"] not in self._where:
                self.add(("", reference["uid"]))
        if deleting(obj):
            self.add(("", meta["uid"]))

    def _changed(self, resource: str, change: Change) -> None:
        if resource in _UNTRACKED:
            return
        for reference in (
            change.old.obj["metadata"].get("ownerReferences") or () if change.old else ()
        ):
            self._dependents.get(reference["uid"], set()).discard(
                change.item.obj["metadata"]["uid"]
            )
            self.add(("", reference["uid"]))
        if change.type == "DELETED":
            uid = change.item.obj["metadata"]["uid"]
            self._where.pop(uid, None)
            self.add(("", uid))
        else:
            self._note(resource, change.item.obj)

    def _item(self, uid: str) -> tuple[str, Item] | None:
        place = self._where.get(uid)
        item = self.store.get(place[0], *place[1]) if place else None
        return (place[0], item) if place and item else None

    def reconcile(self, key: Key) -> None:
        """Deal with the dependents of one owner."""
        uid = key[1]
        owner = self._item(uid)
        waiting = sorted(self._dependents.get(uid, ()))
        if owner is None:
            for dependent in waiting:
                self._owner_gone(uid, dependent)
            if not self._dependents.get(uid):
                self._dependents.pop(uid, None)
            return
        resource, item = owner
        finalizers = item.obj["metadata"].get("finalizers") or ()
        if not deleting(item.obj):
            return
        if _ORPHAN in finalizers:
            for dependent in waiting:
                self._release(uid, dependent)
            self._finish(resource, item, _ORPHAN)
        elif _FOREGROUND in finalizers:
            blocking = False
            for dependent in waiting:
                blocking |= self._delete_dependent(uid, dependent)
            if not blocking:
                self._finish(resource, item, _FOREGROUND)

    def _owner_gone(self, uid: str, dependent: str) -> None:
        """Delete an object when none of its owners is left, else drop the reference."""
        found = self._item(dependent)
        if found is None:
            self._dependents.get(uid, set()).discard(dependent)
            return
        resource, item = found
        references = item.obj["metadata"].get("ownerReferences") or ()
        if any(reference["uid"] in self._where for reference in references):
            self._release(uid, dependent)
        elif not deleting(item.obj):
            meta = item.obj["metadata"]
            self.api.delete(
                self.resource(resource), meta.get("namespace", ""), meta["name"], DeleteOptions()
            )

    def _release(self, uid: str, dependent: str) -> None:
        found = self._item(dependent)
        if found is None:
            return
        resource, item = found
        obj = item.copy()
        meta = obj["metadata"]
        kept = [r for r in meta.get("ownerReferences") or () if r["uid"] != uid]
        if kept:
            meta["ownerReferences"] = kept
        else:
            meta.pop("ownerReferences", None)
        self.store.put(resource, obj)

    def _delete_dependent(self, uid: str, dependent: str) -> bool:
        """Delete in the foreground; says whether the owner has to wait for it."""
        found = self._item(dependent)
        if found is None:
            return False
        resource, item = found
        meta = item.obj["metadata"]
        if not deleting(item.obj):
            options = DeleteOptions(
                propagation="Foreground" if self._dependents.get(dependent) else "Background"
            )
            self.api.delete(
                self.resource(resource), meta.get("namespace", ""), meta["name"], options
            )
        return self._item(dependent) is not None and any(
            reference["uid"] == uid and reference.get("blockOwnerDeletion")
            for reference in meta.get("ownerReferences") or ()
        )

    def _finish(self, resource: str, item: Item, finalizer: str) -> None:
        meta = item.obj["metadata"]
        current = self.store.get(resource, meta.get("namespace", ""), meta["name"])
        if current is None:
            return
        obj = current.copy()
        obj["metadata"]["finalizers"] = [
            name for name in obj["metadata"].get("finalizers") or () if name != finalizer
        ]
        self.api.write(self.resource(resource), current, obj, INTERNAL)
