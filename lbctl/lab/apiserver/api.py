"""The verbs: create, update, patch, apply, delete, on objects, with everything that guards them.

HTTP handlers and controllers alike go through `Api`; nothing else writes to the store. Everything
is synchronous, so a write is atomic: no other request runs between its check and its effect.
Order of a write: decode and clean, carry over what the server owns, default, validate, store.
"""

from __future__ import annotations

import copy
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from lbctl.lab.apiserver import crds, defaults, deletion, managed, patch, status, validate
from lbctl.lab.apiserver.deletion import DeleteOptions
from lbctl.lab.apiserver.resources import Obj, Registry, Resource
from lbctl.lab.apiserver.schema import Findings, Schemas
from lbctl.lab.apiserver.services import ServiceAddresses
from lbctl.lab.apiserver.store import Item, Store

_GENERATED: Final = frozenset(
    {
        "deployments.apps",
        "replicasets.apps",
        "daemonsets.apps",
        "statefulsets.apps",
        "poddisruptionbudgets.policy",
        "networkpolicies.networking.k8s.io",
        "endpointslices.discovery.k8s.io",
        crds.KEY,
    }
)
_STRICT_VERSION: Final = frozenset({"leases.coordination.k8s.io", crds.KEY})
_OWNED_META: Final = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds")


@dataclass(slots=True)
class Options:
    """Of one request. `validation` is Strict, Warn or Ignore; `warnings` are filled in."""

    manager: str = ""
    dry_run: bool = False
    validation: str = "Ignore"
    force: bool = False
    warnings: list[str] = field(default_factory=list)


INTERNAL: Final = Options()  # controllers: trusted, no field management


def now() -> str:
    """RFC 3339, seconds, as metav1.Time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Api:
    """All objects of a cluster and what may be done to them."""

    def __init__(self, store: Store, service_cidrs: str) -> None:
        self.store = store
        self.registry = Registry()
        self.schemas = Schemas()
        self.services = ServiceAddresses(service_cidrs, self.registry.key("services"))

    def resume(self) -> None:
        """After objects of an earlier run were put into the store."""
        for item in self.store.items(crds.KEY):
            crds.serve(self.registry, self.schemas, item.obj)
        self.services.restore(item.obj for item in self.store.items("services"))

    def get(self, resource: Resource, namespace: str, name: str) -> Item:
        """The object. Raises ApiRefusal 404."""
        item = self.store.get(resource.key, namespace, name)
        if item is None:
            raise status.not_found(resource, name)
        return item

    # create

    def create(
        self, resource: Resource, namespace: str, obj: Obj, options: Options = INTERNAL
    ) -> Item:
        """Create `obj` (changed in place). Raises ApiRefusal 400, 403, 404, 409 or 422."""
        self._identify(resource, namespace, obj)
        obj = self._clean(resource, obj, options, "")
        meta = self._new_meta(resource, namespace, obj)
        self._check_namespace(resource, namespace, meta.get("name", ""))
        if meta.get("name") and self.store.get(resource.key, namespace, meta["name"]):
            raise status.already_exists(resource, meta["name"])
        self._prepare(resource, None, obj)
        if resource.key == "pods":
            self._admit_pod(resource, obj)
        elif resource.key == "nodes":
            defaults.admit_node(obj)
        if resource.key in _GENERATED or resource.custom:
            meta["generation"] = 1
        causes = self._causes(resource, obj)
        if causes:
            raise status.invalid(resource, meta.get("name", ""), causes)
        if resource.key == "services":
            self.services.take(None, obj, dry_run=options.dry_run)
        if options.manager:
            managed.updated(self.schemas, resource, None, obj, options.manager, "", now())
        return self._store(resource, obj, options)

    def _identify(self, resource: Resource, namespace: str, obj: Any) -> None:
        if not isinstance(obj, dict):
            raise status.bad_request("the body of the request is not an object")
        version = obj.setdefault("apiVersion", resource.group_version)
        kind = obj.setdefault("kind", resource.kind)
        if (version, kind) != (resource.group_version, resource.kind):
            raise status.bad_request(
                f'{kind} in version "{version}" cannot be handled as a {resource.kind}: the '
                f'path is for {resource.kind} in version "{resource.group_version}"'
            )
        meta = obj.setdefault("metadata", {})
        if not isinstance(meta, dict):
            raise status.bad_request("metadata is not an object")
        if meta.get("namespace") and meta["namespace"] != namespace:
            raise status.bad_request(
                "the namespace of the provided object does not match the namespace sent on the "
                "request"
            )

    def _clean(self, resource: Resource, obj: Obj, options: Options, patched: str) -> Obj:
        """Without unknown fields. Strict validation refuses them, Warn names them."""
        found = Findings()
        schema = self.schemas.of_resource(resource)
        cleaned: Obj = self.schemas.clean(schema, obj, "", found, custom=resource.custom)
        name = obj["metadata"].get("name", "")
        if options is not INTERNAL:
            if found.types:
                raise status.bad_request(f"{_handled(resource)}: {found.types[0]}")
            if found.unknown and options.validation == "Strict":
                unknown = ", ".join(f'unknown field "{path}"' for path in found.unknown)
                if patched:
                    cause = status.invalid_value(
                        "patch", patched, f"strict decoding error: {unknown}"
                    )
                    raise status.invalid(resource, name, [cause])
                raise status.bad_request(f"{_handled(resource)}: strict decoding error: {unknown}")
            if options.validation == "Warn":
                options.warnings += [f'unknown field "{path}"' for path in found.unknown]
        if found.causes:
            raise status.invalid(resource, name, found.causes)
        return cleaned

    def _new_meta(self, resource: Resource, namespace: str, obj: Obj) -> Obj:
        meta: Obj = obj["metadata"]
        for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields"):
            meta.pop(key, None)
        if meta.pop("resourceVersion", ""):
            raise status.bad_request("resourceVersion should not be set on objects to be created")
        if resource.namespaced:
            meta["namespace"] = namespace
        else:
            meta.pop("namespace", None)
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + defaults.suffix()
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = now()
        if (resource.status and resource.key != "nodes") or resource.key == crds.KEY:
            obj.pop("status", None)
        if resource.key == "namespaces":
            obj.setdefault("spec", {})["finalizers"] = ["kubernetes"]
        elif resource.key == crds.KEY:
            meta["finalizers"] = sorted({*meta.get("finalizers", ()), crds.FINALIZER})
        return meta

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        spaces = self.registry.key("namespaces")
        item = self.store.get("namespaces", "", namespace)
        if item is None:
            raise status.not_found(spaces, namespace)
        if "deletionTimestamp" in item.obj["metadata"]:
            why = (
                f"unable to create new content in namespace {namespace} because it is being "
                "terminated"
            )
            raise status.forbidden(resource, name, why)

    def _admit_pod(self, resource: Resource, pod: Obj) -> None:
        defaults.admit_pod(pod)
        spec, meta = pod["spec"], pod["metadata"]
        name = spec["serviceAccountName"]
        account = self.store.get("serviceaccounts", meta["namespace"], name)
        if account is None:
            raise status.forbidden(
                resource,
                meta.get("name", ""),
                f"error looking up service account {meta['namespace']}/{name}: "
                f'serviceaccount "{name}" not found',
            )
        automount = spec.get("automountServiceAccountToken")
        if automount is None:
            automount = account.obj.get("automountServiceAccountToken", True)
        if automount:
            defaults.mount_token(pod)

    def _prepare(self, resource: Resource, old: Obj | None, obj: Obj) -> None:
        """Defaults, and what a kind needs before validation."""
        if resource.key == "services":
            obj.setdefault("spec", {})
            self.services.prepare(old, obj)
        defaults.apply(resource, obj)

    def _causes(self, resource: Resource, obj: Obj) -> list[status.Cause]:
        """What is wrong with an object, whatever it was before."""
        causes = validate.new(resource, obj)
        return causes + self.services.causes(obj) if resource.key == "services" else causes

    def _store(self, resource: Resource, obj: Obj, options: Options) -> Item:
        if resource.key == crds.KEY and not options.dry_run:
            crds.establish(obj, now())
        if options.dry_run:
            obj["metadata"].setdefault("resourceVersion", "")
            return Item(obj, msgspec.json.encode(obj), 0)
        item = self.store.put(resource.key, obj)
        if resource.key == crds.KEY:
            crds.serve(self.registry, self.schemas, obj)
        return item

    # update

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        obj: Obj,
        options: Options = INTERNAL,
        sub: str = "",
    ) -> Item:
        """Replace an object or its status (`sub="status"`). Raises ApiRefusal."""
        self._identify(resource, namespace, obj)
        item = self.get(resource, namespace, name)
        meta = obj["metadata"]
        if meta.setdefault("name", name) != name:
            raise status.bad_request(
                f"the name of the object ({meta['name']}) does not match the name on the URL "
                f"({name})"
            )
        strict = resource.custom or resource.key in _STRICT_VERSION
        if strict and not meta.get("resourceVersion") and options is not INTERNAL:
            cause = status.invalid_value(
                "metadata.resourceVersion", 0, "must be specified for an update"
            )
            raise status.invalid(resource, name, [cause])
        return self.write(resource, item, self._clean(resource, obj, options, ""), options, sub)

    def write(
        self, resource: Resource, item: Item, obj: Obj, options: Options, sub: str = ""
    ) -> Item:
        """Put `obj` in the place of `item`, as PUT and PATCH do. No change, no new version."""
        old, name = item.obj, item.obj["metadata"]["name"]
        self._check_preconditions(resource, old, obj["metadata"])
        obj = self._carry_over(resource, old, obj, sub)
        if not sub or resource.key == "services":
            self._prepare(resource, old, obj)
        causes = self._causes(resource, obj)
        if not sub:
            causes += validate.change(resource, old, obj)
        if causes:
            raise status.invalid(resource, name, causes)
        self._check_finalizers(resource, old, obj)
        if resource.key == "services" and not sub:
            self.services.take(old, obj, dry_run=options.dry_run)
        self._raise_generation(resource, old, obj)
        obj["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if obj == old:
            return item
        if options.manager:
            managed.updated(self.schemas, resource, old, obj, options.manager, sub, now())
        if deletion.is_complete(resource, obj) and not options.dry_run:
            return self._remove(resource, obj)
        return self._store(resource, obj, options)

    def _check_preconditions(self, resource: Resource, old: Obj, meta: Obj) -> None:
        before, name = old["metadata"], old["metadata"]["name"]
        if meta.get("uid") and meta["uid"] != before["uid"]:
            why = (
                f"Precondition failed: UID in precondition: {meta['uid']}, "
                f"UID in object meta: {before['uid']}"
            )
            raise status.conflict(resource, name, why)
        if meta.get("resourceVersion") and meta["resourceVersion"] != before["resourceVersion"]:
            raise status.conflict(resource, name)

    def _carry_over(self, resource: Resource, old: Obj, obj: Obj, sub: str) -> Obj:
        """What the request may not change: the other subresource, and the server's metadata."""
        if sub:
            return _with_status(old, obj, labels=resource.key in {"nodes", "services", "pods"})
        if resource.status:
            obj.pop("status", None)
            if "status" in old:
                obj["status"] = copy.deepcopy(old["status"])
        before, meta = old["metadata"], obj["metadata"]
        for key in (*_OWNED_META, "generation", "generateName", "namespace"):
            meta.pop(key, None)
            if key in before:
                meta[key] = before[key]
        if "managedFields" in before and "managedFields" not in meta:
            meta["managedFields"] = copy.deepcopy(before["managedFields"])
        if resource.key == "namespaces":
            obj["spec"] = copy.deepcopy(old["spec"])
        for key in ("labels", "annotations", "finalizers", "ownerReferences"):
            if not meta.get(key, True):
                del meta[key]
        return obj

    def _check_finalizers(self, resource: Resource, old: Obj, obj: Obj) -> None:
        before, meta = old["metadata"], obj["metadata"]
        if "deletionTimestamp" not in before:
            return
        added = [
            name for name in meta.get("finalizers", ()) if name not in before.get("finalizers", ())
        ]
        if added:
            shown = ", ".join(f'"{name}"' for name in added)
            cause = status.forbidden_field(
                "metadata.finalizers",
                "no new finalizers can be added if the object is being deleted, found new "
                f"finalizers []string{{{shown}}}",
            )
            raise status.invalid(resource, before["name"], [cause])

    def _raise_generation(self, resource: Resource, old: Obj, obj: Obj) -> None:
        if resource.key not in _GENERATED and not resource.custom:
            return
        ignored = {"metadata", "status"} if resource.status else {"metadata"}

        def content(value: Obj) -> Obj:
            return {key: entry for key, entry in value.items() if key not in ignored}

        if content(old) != content(obj):
            obj["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1

    def _remove(self, resource: Resource, obj: Obj) -> Item:
        meta = obj["metadata"]
        item = self.store.remove(resource.key, meta.get("namespace", ""), meta["name"], obj)
        if resource.key == "services":
            self.services.release(obj["spec"])
        elif resource.key == crds.KEY:
            custom = crds.resource_of(obj)
            if custom is not None:
                self.registry.remove(custom.key)
                self.store.drop(custom.key)
        return item

    # patch

    def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        kind: str,
        body: Any,
        options: Options,
        sub: str = "",
    ) -> Item:
        """Patch with `kind` json, merge or strategic. Raises ApiRefusal."""
        item = self.get(resource, namespace, name)
        target = item.copy()
        if kind == "json":
            result = patch.json_patch(target, body)
        elif kind == "merge":
            result = patch.merge_patch(target, body)
        elif resource.custom:
            raise status.unsupported_media_type(
                "application/strategic-merge-patch+json",
                (
                    "application/json-patch+json",
                    "application/merge-patch+json",
                    "application/apply-patch+yaml",
                ),
            )
        else:
            schema = self.schemas.of_resource(resource)
            result = patch.strategic_patch(self.schemas, schema, target, body)
        self._identify(resource, namespace, result)
        if result["metadata"].get("name") != name:
            cause = status.invalid_value(
                "metadata.name", result["metadata"].get("name", ""), "field is immutable"
            )
            raise status.invalid(resource, name, [cause])
        shown = msgspec.json.encode(body).decode()
        return self.write(
            resource, item, self._clean(resource, result, options, shown), options, sub
        )

    def apply(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        body: Any,
        options: Options,
        sub: str = "",
    ) -> tuple[Item, bool]:
        """Server-side apply; the flag says that it was created. Raises ApiRefusal."""
        if not options.manager:
            cause = status.required("fieldManager", "is required for apply patch")
            raise status.invalid(_PATCH_OPTIONS, "", [cause])
        self._identify(resource, namespace, body)
        if body["metadata"].setdefault("name", name) != name:
            raise status.bad_request(
                f"the name of the object ({body['metadata']['name']}) does not match the name on "
                f"the URL ({name})"
            )
        body = self._clean(resource, body, options, "")
        item = self.store.get(resource.key, namespace, name)
        created = item is None
        base: Obj = item.copy() if item else {"metadata": {}}
        merged = managed.applied(
            self.schemas, resource, base, body, options.manager, options.force, sub, now()
        )
        if item is not None:
            quiet = Options(dry_run=options.dry_run)
            return self.write(resource, item, merged, quiet, sub), False
        fields = merged["metadata"].pop("managedFields", None)
        quiet = Options(dry_run=True)
        merged["metadata"].pop("resourceVersion", None)
        if not options.dry_run:
            quiet = Options()
        return self._create_applied(resource, namespace, merged, fields, quiet), created

    def _create_applied(
        self, resource: Resource, namespace: str, obj: Obj, fields: Any, options: Options
    ) -> Item:
        item = self.create(resource, namespace, obj, options)
        if options.dry_run or not fields:
            return item
        changed = item.copy()
        changed["metadata"]["managedFields"] = fields
        return self.store.put(resource.key, changed)

    # delete

    def delete(
        self, resource: Resource, namespace: str, name: str, options: DeleteOptions
    ) -> tuple[Item, bool]:
        """Delete, or mark for deletion; the flag says that it is gone. Raises ApiRefusal."""
        item = self.get(resource, namespace, name)
        old = item.obj
        wanted = {"uid": options.uid, "resourceVersion": options.version}
        self._check_preconditions(resource, old, {k: v for k, v in wanted.items() if v})
        obj = item.copy()
        deletion.mark(resource, obj, options)
        meta = obj["metadata"]
        if options.dry_run:
            return Item(obj, msgspec.json.encode(obj), 0), False
        if deletion.is_complete(resource, obj):
            if not old["metadata"].get("deletionTimestamp") and resource.key != "pods":
                for key in ("deletionTimestamp", "deletionGracePeriodSeconds"):
                    meta.pop(key)
            return self._remove(resource, obj), True
        if obj == old:
            return item, False
        return self.store.put(resource.key, obj), False


_PATCH_OPTIONS: Final = Resource("meta.k8s.io", "v1", "patchoptions", "PatchOptions")


def _with_status(old: Obj, obj: Obj, *, labels: bool) -> Obj:
    """The old object with the status of `obj`, and for some kinds its labels and annotations."""
    given = obj["metadata"]
    obj = {**copy.deepcopy(old), "status": obj.get("status", {})}
    for key in ("managedFields", *(("annotations", "labels") if labels else ())):
        if key in given:
            obj["metadata"][key] = given[key]
    return obj


def _handled(resource: Resource) -> str:
    kind, version = resource.kind, resource.version
    return f'{kind} in version "{version}" cannot be handled as a {kind}'
