"""Namespaces and custom resources that are being deleted; what every namespace has.

A namespace goes when everything in it is gone; a CustomResourceDefinition when its objects are.
Every living namespace has the ServiceAccount `default` and the ConfigMap `kube-root-ca.crt`.
"""

from __future__ import annotations

from typing import Final

from lbctl.lab.apiserver import crds, subresources
from lbctl.lab.apiserver.api import INTERNAL, Api
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Resource
from lbctl.lab.apiserver.store import Change, Item, Key
from lbctl.lab.controllers.base import Controller, deleting

_ROOT_CA: Final = "kube-root-ca.crt"


class Namespaces(Controller):
    """Empties and ends namespaces. Keys are ("", namespace)."""

    name = "namespace"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self.store.subscribe_all(self._changed)
        for item in self.store.items("namespaces"):
            self.add(("", item.obj["metadata"]["name"]))

    def _changed(self, resource: str, change: Change) -> None:
        if resource == "namespaces":
            self.add(change.key)
        elif change.key[0]:
            space = self.store.get("namespaces", "", change.key[0])
            if space is not None and deleting(space.obj):
                self.add(("", change.key[0]))

    def reconcile(self, key: Key) -> None:
        """Delete what is left in a terminating namespace; end it when nothing is."""
        item = self.store.get("namespaces", *key)
        if item is None or not deleting(item.obj):
            return
        left = 0
        for resource in list(self.api.registry.stored()):
            if resource.namespaced:
                for found in self.store.items(resource.key, key[1]):
                    left += self._delete(resource, found)
        if not left and item.obj["spec"].get("finalizers"):
            subresources.finalize(self.api, key[1], {"spec": {"finalizers": []}})

    def _delete(self, resource: Resource, item: Item) -> int:
        meta = item.obj["metadata"]
        if not deleting(item.obj):
            self.api.delete(resource, meta["namespace"], meta["name"], DeleteOptions())
        return int(self.store.get(resource.key, meta["namespace"], meta["name"]) is not None)


class Accounts(Controller):
    """Keeps ServiceAccount `default` and the CA's ConfigMap in every living namespace."""

    name = "serviceaccount"

    def __init__(self, api: Api, ca: str) -> None:
        super().__init__(api)
        self._ca = ca
        for resource in ("namespaces", "serviceaccounts", "configmaps"):
            self.store.subscribe(resource, self._changed)
        for item in self.store.items("namespaces"):
            self.reconcile(("", item.obj["metadata"]["name"]))

    def _changed(self, change: Change) -> None:
        if change.item.obj["kind"] == "Namespace":
            self.add(("", change.key[1]))
        elif change.type == "DELETED" or change.key[1] == _ROOT_CA:
            self.add(("", change.key[0]))

    def reconcile(self, key: Key) -> None:
        """Create what is missing."""
        space = key[1]
        item = self.store.get("namespaces", "", space)
        if item is None or deleting(item.obj):
            return
        if self.store.get("serviceaccounts", space, "default") is None:
            account = {"metadata": {"name": "default"}}
            self.api.create(self.resource("serviceaccounts"), space, account)
        found = self.store.get("configmaps", space, _ROOT_CA)
        if found is None:
            content = {"metadata": {"name": _ROOT_CA}, "data": {"ca.crt": self._ca}}
            self.api.create(self.resource("configmaps"), space, content)
        elif found.obj.get("data") != {"ca.crt": self._ca}:
            self.store.put("configmaps", {**found.copy(), "data": {"ca.crt": self._ca}})


class CustomResources(Controller):
    """Ends CustomResourceDefinitions that are being deleted. Keys are ("", CRD name)."""

    name = "customresource"

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self.store.subscribe_all(self._changed)
        for item in self.store.items(crds.KEY):
            self.add(("", item.obj["metadata"]["name"]))

    def _changed(self, resource: str, change: Change) -> None:
        if resource == crds.KEY:
            self.add(change.key)
        elif change.type == "DELETED" and self.store.get(crds.KEY, "", resource) is not None:
            self.add(("", resource))

    def reconcile(self, key: Key) -> None:
        """Delete the objects of a definition that goes; end it when none is left."""
        item = self.store.get(crds.KEY, *key)
        if item is None or not deleting(item.obj):
            return
        resource = crds.resource_of(item.obj)
        left = self.store.items(resource.key) if resource else []
        for found in left:
            meta = found.obj["metadata"]
            if resource is not None and not deleting(found.obj):
                space = meta.get("namespace", "")
                self.api.delete(resource, space, meta["name"], DeleteOptions())
        if resource is None or not self.store.items(resource.key):
            current = self.store.get(crds.KEY, *key)
            if current is not None:
                obj = current.copy()
                names = obj["metadata"].get("finalizers") or ()
                obj["metadata"]["finalizers"] = [n for n in names if n != crds.FINALIZER]
                self.api.write(self.resource(crds.KEY), current, obj, INTERNAL)
