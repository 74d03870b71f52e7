"""What clients ask first: /api, /apis, /version, and the OpenAPI v2 and v3 documents.

kubectl takes two things from OpenAPI v3: that PATCH knows `fieldValidation` (so that it leaves
validation to the server), and the merge keys of lists.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from lbctl.lab.apiserver.resources import REVIEWS, Obj, Registry, Resource
from lbctl.lab.apiserver.schema import REF, Schemas

VERSION: Final = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.4-lbctl-embedded",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "linux/amd64",
}
_VERBS: Final = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
_WRITE: Final = ("get", "patch", "update")
_QUERY: Final = ("dryRun", "fieldManager", "fieldValidation", "force")
_SCALE: Final = "io.k8s.api.autoscaling.v1.Scale"
_SUB_KINDS: Final = {
    "binding": ("Binding", "", "v1"),
    "eviction": ("Eviction", "policy", "v1"),
    "token": ("TokenRequest", "authentication.k8s.io", "v1"),
}


def api_versions(address: str) -> Obj:
    """/api."""
    cidrs = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": cidrs}


def api_groups(registry: Registry) -> Obj:
    """/apis."""
    groups = [api_group(group, version) for group, version in registry.group_versions() if group]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def api_group(group: str, version: str) -> Obj:
    """/apis/GROUP."""
    preferred = {"groupVersion": f"{group}/{version}", "version": version}
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": group,
        "versions": [preferred],
        "preferredVersion": preferred,
    }


def api_resources(registry: Registry, group: str, version: str) -> Obj | None:
    """/api/v1 or /apis/GROUP/VERSION; None if there is no such version."""
    found = registry.group_versions().get((group, version))
    if found is None:
        return None
    entries = [entry for resource in found for entry in _entries(resource)]
    name = f"{group}/{version}" if group else version
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": name,
        "resources": entries,
    }


def _entries(resource: Resource) -> list[Obj]:
    base: Obj = {
        "name": resource.plural,
        "singularName": resource.singular or resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": ["create"] if resource in REVIEWS else list(_VERBS),
    }
    if resource.short:
        base["shortNames"] = list(resource.short)
    if resource.categories:
        base["categories"] = list(resource.categories)
    entries = [base]

    def sub(name: str, kind: str, verbs: tuple[str, ...], **more: str) -> None:
        entries.append(
            {
                "name": f"{resource.plural}/{name}",
                "singularName": "",
                "namespaced": resource.namespaced,
                **more,
                "kind": kind,
                "verbs": list(verbs),
            }
        )

    if resource.status:
        sub("status", resource.kind, _WRITE)
    if resource.scale:
        sub("scale", "Scale", _WRITE, group="autoscaling", version="v1")
    for name in resource.other:
        if name in _SUB_KINDS:
            kind, group, version = _SUB_KINDS[name]
            sub(name, kind, ("create",), group=group, version=version)
        else:
            verbs = ("get",) if name == "proxy" else ("update",)
            sub(name, resource.kind, verbs)
    return entries


def openapi_v3_index(registry: Registry, schemas: Schemas) -> Obj:
    """/openapi/v3: where the document of each group version is."""
    paths = {}
    for group, version in registry.group_versions():
        name = f"apis/{group}/{version}" if group else f"api/{version}"
        digest = hashlib.sha256(openapi_v3(registry, schemas, group, version) or b"").hexdigest()
        paths[name] = {"serverRelativeURL": f"/openapi/v3/{name}?hash={digest[:32].upper()}"}
    return {"paths": paths}


def openapi_v3(registry: Registry, schemas: Schemas, group: str, version: str) -> bytes | None:
    """/openapi/v3/…: the document of one group version, as JSON; None if there is none."""
    resources = registry.group_versions().get((group, version))
    if resources is None:
        return None
    names = [schemas.name_of(resource) for resource in resources]
    if any(resource.scale for resource in resources):
        names.append(_SCALE)
    document = {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]},
        "paths": {path: item for resource in resources for path, item in _path(resource, schemas)},
        "components": {"schemas": schemas.closure(iter(names))},
    }
    return msgspec.json.encode(document).replace(REF.encode(), b"#/components/schemas/")


def _path(resource: Resource, schemas: Schemas) -> list[tuple[str, Any]]:
    root = f"/apis/{resource.group}" if resource.group else "/api"
    space = "/namespaces/{namespace}" if resource.namespaced else ""
    path = f"{root}/{resource.version}{space}/{resource.plural}"
    gvk = {"group": resource.group, "version": resource.version, "kind": resource.kind}
    schema = {"$ref": REF + schemas.name_of(resource)}
    answer = {
        "200": {"description": "OK", "content": {"application/json": {"schema": schema}}},
    }
    query = [
        {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
        for name in _QUERY
    ]

    def operation(action: str, *, write: bool) -> Obj:
        return {
            "parameters": query if write else [],
            "responses": answer,
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk,
        }

    if resource in REVIEWS:
        return [(path, {"post": operation("post", write=True)})]
    one = {
        "get": operation("get", write=False),
        "put": operation("put", write=True),
        "patch": operation("patch", write=True),
    }
    return [(path, {"post": operation("post", write=True)}), (f"{path}/{{name}}", one)]


def openapi_v2(registry: Registry, schemas: Schemas) -> Obj:
    """/openapi/v2, as JSON."""
    names = [schemas.name_of(resource) for resource in registry.stored()]
    return {
        "swagger": "2.0",
        "info": {"title": "Kubernetes", "version": VERSION["gitVersion"]},
        "paths": {},
        "definitions": schemas.closure(iter(names)),
    }
