"""Which resources there are: the built-in ones and those that CustomResourceDefinitions add.

A resource is named by `key` (`services`, `deployments.apps`): the store's table and the name in
error messages. Only the storage version of a custom resource is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

Obj: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object. `columns` are a CRD's additionalPrinterColumns."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    status: bool = False
    scale: bool = False
    other: tuple[str, ...] = ()  # further subresources
    custom: bool = False
    singular: str = ""
    columns: tuple[tuple[tuple[str, Any], ...], ...] = field(default=())

    @property
    def key(self) -> str:
        """`plural` or `plural.group`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def group_version(self) -> str:
        """apiVersion of its objects."""
        return f"{self.group}/{self.version}" if self.group else self.version


_APPS: Final = ("all",)
_RBAC: Final = "rbac.authorization.k8s.io"
BUILT_IN: Final = (
    Resource("", "v1", "namespaces", "Namespace", False, ("ns",), status=True, other=("finalize",)),
    Resource("", "v1", "nodes", "Node", False, ("no",), status=True, other=("proxy",)),
    Resource(
        "",
        "v1",
        "pods",
        "Pod",
        True,
        ("po",),
        ("all",),
        status=True,
        other=("binding", "eviction", "proxy"),
    ),
    Resource("", "v1", "services", "Service", True, ("svc",), ("all",), status=True),
    Resource("", "v1", "configmaps", "ConfigMap", True, ("cm",)),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", True, ("sa",), other=("token",)),
    Resource("", "v1", "events", "Event", True, ("ev",)),
    Resource("apps", "v1", "deployments", "Deployment", True, ("deploy",), _APPS, True, True),
    Resource("apps", "v1", "replicasets", "ReplicaSet", True, ("rs",), _APPS, True, True),
    Resource("apps", "v1", "daemonsets", "DaemonSet", True, ("ds",), _APPS, True),
    Resource("apps", "v1", "statefulsets", "StatefulSet", True, ("sts",), _APPS, True, True),
    Resource("apps", "v1", "controllerrevisions", "ControllerRevision"),
    Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    Resource("coordination.k8s.io", "v1", "leases", "Lease"),
    Resource(_RBAC, "v1", "roles", "Role"),
    Resource(_RBAC, "v1", "rolebindings", "RoleBinding"),
    Resource(_RBAC, "v1", "clusterroles", "ClusterRole", False),
    Resource(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", False),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, ("pdb",)),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", True, ("netpol",)),
    Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False, ("pc",)),
    Resource(
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        False,
        ("crd", "crds"),
        ("api-extensions",),
        status=True,
    ),
)

# Answered by computation, never stored.
REVIEWS: Final = (
    Resource("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", False),
    Resource("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", False),
    Resource("authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", False),
    Resource(
        "authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False
    ),
)


class Registry:
    """The resources by path and by key. Custom ones come and go."""

    def __init__(self) -> None:
        self._by_path: dict[tuple[str, str, str], Resource] = {}
        self._by_key: dict[str, Resource] = {}
        for resource in (*BUILT_IN, *REVIEWS):
            self.add(resource)

    def add(self, resource: Resource) -> None:
        """Serve a resource; one of the same key is replaced."""
        self.remove(resource.key)
        self._by_key[resource.key] = resource
        self._by_path[(resource.group, resource.version, resource.plural)] = resource

    def remove(self, key: str) -> None:
        """Stop serving it. None of that key: nothing happens."""
        old = self._by_key.pop(key, None)
        if old is not None:
            del self._by_path[(old.group, old.version, old.plural)]

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        """The resource of a request path."""
        return self._by_path.get((group, version, plural))

    def key(self, key: str) -> Resource:
        """The resource of a key. KeyError if there is none."""
        return self._by_key[key]

    def of_kind(self, api_version: str, kind: str) -> Resource | None:
        """The resource of an object or an owner reference."""
        for resource in self._by_key.values():
            if resource.kind == kind and resource.group_version == api_version:
                return resource
        return None

    def group_versions(self) -> dict[tuple[str, str], list[Resource]]:
        """Resources by (group, version), core first, then in order of name."""
        found: dict[tuple[str, str], list[Resource]] = {}
        for path in sorted(self._by_path):
            resource = self._by_path[path]
            found.setdefault((resource.group, resource.version), []).append(resource)
        return found

    def stored(self) -> Iterator[Resource]:
        """Those that have objects."""
        reviews = {review.key for review in REVIEWS}
        return (self._by_key[key] for key in sorted(self._by_key) if key not in reviews)
