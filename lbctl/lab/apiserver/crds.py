"""CustomResourceDefinitions: the resource that one asks for, and how it comes into service.

Only the storage version is served, and nothing is converted.
"""

from __future__ import annotations

from typing import Final

from lbctl.lab.apiserver.resources import Obj, Registry, Resource
from lbctl.lab.apiserver.schema import Schemas

KEY: Final = "customresourcedefinitions.apiextensions.k8s.io"
FINALIZER: Final = "customresourcecleanup.apiextensions.k8s.io"
_AGE_ONLY: Final = [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]


def resource_of(crd: Obj) -> Resource | None:
    """The resource that a CustomResourceDefinition asks for; None if none is served."""
    spec = crd["spec"]
    names = spec["names"]
    for version in spec["versions"]:
        if version.get("storage") and version.get("served"):
            subresources = version.get("subresources", {})
            columns = version.get("additionalPrinterColumns") or _AGE_ONLY
            return Resource(
                group=spec["group"],
                version=version["name"],
                plural=names["plural"],
                kind=names["kind"],
                namespaced=spec["scope"] == "Namespaced",
                short=tuple(names.get("shortNames", ())),
                categories=tuple(names.get("categories", ())),
                status="status" in subresources,
                custom=True,
                singular=names.get("singular", ""),
                columns=tuple(tuple(sorted(column.items())) for column in columns),
            )
    return None


def serve(registry: Registry, schemas: Schemas, crd: Obj) -> None:
    """Serve a definition's objects from now on."""
    resource = resource_of(crd)
    if resource is None:
        return
    for version in crd["spec"]["versions"]:
        if version["name"] == resource.version:
            schemas.add(resource, version["schema"]["openAPIV3Schema"])
    registry.add(resource)


def establish(crd: Obj, now: str) -> None:
    """Write the status that says that the definition is accepted and served."""
    spec = crd["spec"]
    state = crd.setdefault("status", {})
    state["acceptedNames"] = spec["names"]
    state["storedVersions"] = [v["name"] for v in spec["versions"] if v.get("storage")]
    if state.get("conditions"):
        return
    reasons = (
        ("NamesAccepted", "NoConflicts", "no conflicts found"),
        ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    )
    state["conditions"] = [
        {
            "type": kind,
            "status": "True",
            "lastTransitionTime": now,
            "reason": reason,
            "message": message,
        }
        for kind, reason, message in reasons
    ]
