"""API objects reduced to the fields used, and turned into `lbctl.core.model`.

Rules: only fields that somebody decides upon are decoded; whatever the API server may omit or set
to null has a default; a value that makes no sense raises `errors.KubeError` for that one object,
and the cache skips it with a log line. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec

from lbctl import errors
from lbctl.core import names
from lbctl.core.endpoints import distinct
from lbctl.core.model import (
    Address,
    Eip,
    Endpoint,
    Node,
    ObjectRef,
    Phase,
    PortEndpoints,
    Service,
    ServicePort,
    Sharer,
    TrafficPolicy,
    eip_object_name,
    snapshot,
)
from lbctl.kube import client, values
from lbctl.kube.values import seconds

T = TypeVar("T")
_FAMILY: Final = {"IPv4": 4, "IPv6": 6}


class Meta(msgspec.Struct):
    """metadata, as far as it is used."""

    name: str
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""
    creationTimestamp: str | None = None
    deletionTimestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    finalizers: list[str] | None = None

    @property
    def ref(self) -> ObjectRef:
        """Namespace (empty for cluster-scoped objects) and name."""
        return ObjectRef(self.namespace, self.name)


class _Port(msgspec.Struct):
    port: int
    name: str | None = None
    protocol: str = "TCP"


class _ClientIp(msgspec.Struct):
    timeoutSeconds: int | None = None


class _AffinityConfig(msgspec.Struct):
    clientIP: _ClientIp | None = None


class _ServiceSpec(msgspec.Struct):
    type: str = "ClusterIP"
    ports: list[_Port] | None = None
    loadBalancerClass: str | None = None
    loadBalancerIP: str | None = None
    clusterIP: str | None = None
    clusterIPs: list[str] | None = None
    loadBalancerSourceRanges: list[str] | None = None
    externalTrafficPolicy: str | None = None
    ipFamilies: list[str] | None = None
    ipFamilyPolicy: str | None = None
    selector: dict[str, str] | None = None
    sessionAffinity: str | None = None
    sessionAffinityConfig: _AffinityConfig | None = None


class _Ingress(msgspec.Struct):
    ip: str | None = None
    hostname: str | None = None


class _LoadBalancer(msgspec.Struct):
    ingress: list[_Ingress] | None = None


class _ServiceStatus(msgspec.Struct):
    loadBalancer: _LoadBalancer | None = None
    conditions: list[values.Condition] | None = None


class _Service(msgspec.Struct):
    metadata: Meta
    spec: _ServiceSpec
    status: _ServiceStatus | None = None


class _Target(msgspec.Struct):
    kind: str = ""
    name: str = ""


class _Conditions(msgspec.Struct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str] | None = None
    conditions: _Conditions | None = None
    nodeName: str | None = None
    targetRef: _Target | None = None


class _SlicePort(msgspec.Struct):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class _Slice(msgspec.Struct):
    metadata: Meta
    addressType: str = "IPv4"
    endpoints: list[_Endpoint] | None = None
    ports: list[_SlicePort] | None = None


class _Taint(msgspec.Struct):
    key: str


class _NodeSpec(msgspec.Struct):
    podCIDR: str | None = None
    podCIDRs: list[str] | None = None
    taints: list[_Taint] | None = None


class _NodeAddress(msgspec.Struct):
    type: str
    address: str


class _NodeStatus(msgspec.Struct):
    addresses: list[_NodeAddress] | None = None
    conditions: list[values.Condition] | None = None


class _Node(msgspec.Struct):
    metadata: Meta
    spec: _NodeSpec = msgspec.field(default_factory=_NodeSpec)
    status: _NodeStatus = msgspec.field(default_factory=_NodeStatus)


class _Owner(msgspec.Struct):
    name: str
    namespace: str = ""
    uid: str = ""


class _EipSpec(msgspec.Struct):
    address: str
    owner: _Owner
    pool: str = ""
    phase: str = "Bound"
    forwarding: bool = True
    withdrawnBy: dict[str, str] | None = None
    releasedAt: str | None = None
    unforwardedAt: str | None = None
    sharingKey: str = ""
    sharers: list[_Owner] | None = None


class _Eip(msgspec.Struct):
    metadata: Meta
    spec: _EipSpec


class _Data(msgspec.Struct):
    metadata: Meta
    data: dict[str, str] | None = None


class _Named(msgspec.Struct):
    metadata: Meta


class _PodSpec(msgspec.Struct):
    nodeName: str | None = None


class _PodStatus(msgspec.Struct):
    podIP: str | None = None
    phase: str = ""
    conditions: list[values.Condition] | None = None


class _Pod(msgspec.Struct):
    metadata: Meta
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


@snapshot
class Slice:
    """One EndpointSlice. `service` is None if it belongs to none. `ports` are sorted, and their
    endpoints `distinct`.

    hosts: its addressType is FQDN, so it has no ports here.
    """

    ref: ObjectRef
    service: ObjectRef | None
    ports: tuple[PortEndpoints, ...]
    hosts: bool = False


@dataclass(frozen=True, slots=True)
class DataObject:
    """A ConfigMap or a Secret; a Secret's values are base64. `version` is resourceVersion."""

    ref: ObjectRef
    uid: str
    data: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    annotations: tuple[tuple[str, str], ...] = ()
    version: str = field(default="", compare=False)

    def get(self, key: str) -> str | None:
        """The value of a key, None without it."""
        return dict(self.data).get(key)


@dataclass(frozen=True, slots=True)
class Pod:
    """A Pod as far as managers find each other. `address` is None until it has one."""

    ref: ObjectRef
    uid: str
    node: str = ""
    address: Address | None = None
    app: str = ""  # label app.kubernetes.io/name
    phase: str = ""
    deleting: bool = False
    ready: bool = False


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace and its labels."""

    ref: ObjectRef
    labels: tuple[tuple[str, str], ...] = ()
    version: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What a cache needs to know of a kind: where it is, and how one object is decoded."""

    name: str
    resource: client.Resource
    decode: Callable[[bytes | msgspec.Raw], T]


def to_service(raw: bytes | msgspec.Raw) -> Service:
    """A Service. Raises `errors.KubeError` if a used field makes no sense."""
    found = _decoded(raw, _Service)
    meta, spec = found.metadata, found.spec
    ports = [
        ServicePort(p.name or "", values.protocol(p.protocol), p.port) for p in spec.ports or ()
    ]
    balancer = found.status.loadBalancer if found.status else None
    shown = (balancer.ingress if balancer else None) or ()
    affinity = None
    if spec.sessionAffinity == "ClientIP":
        config = spec.sessionAffinityConfig
        given = config.clientIP.timeoutSeconds if config and config.clientIP else None
        affinity = given or 10800
    local = spec.externalTrafficPolicy == TrafficPolicy.LOCAL
    return Service(
        ref=meta.ref,
        uid=meta.uid,
        created_s=seconds(meta.creationTimestamp) or 0.0,
        ports=tuple(sorted(ports)),
        is_load_balancer=spec.type == "LoadBalancer",
        load_balancer_class=spec.loadBalancerClass or None,
        policy=TrafficPolicy.LOCAL if local else TrafficPolicy.CLUSTER,
        families=tuple(_FAMILY[f] for f in spec.ipFamilies or ("IPv4",) if f in _FAMILY) or (4,),
        affinity_s=affinity,
        source_ranges=tuple(values.network(text) for text in spec.loadBalancerSourceRanges or ()),
        deleting=meta.deletionTimestamp is not None,
        finalizers=tuple(meta.finalizers or ()),
        ingress=tuple(values.address(one.ip) for one in shown if one.ip),
        host_names=tuple(one.hostname for one in shown if one.hostname),
        annotations=values.pairs(meta.annotations),
        requested=spec.loadBalancerIP or None,
        cluster_ips=_cluster_ips(spec),
        labels=values.pairs(meta.labels),
        selector=values.pairs(spec.selector),
        needs_both=spec.ipFamilyPolicy == "RequireDualStack",
        version=meta.resourceVersion,
        condition=_announced(found.status),
    )


def _cluster_ips(spec: _ServiceSpec) -> tuple[Address, ...]:
    """Headless Services have the word "None" there; ExternalName ones have nothing."""
    given = spec.clusterIPs or ([spec.clusterIP] if spec.clusterIP else [])
    return tuple(values.address(text) for text in given if text not in ("", "None"))


def to_endpoints(raw: bytes | msgspec.Raw) -> Slice:
    """An EndpointSlice. `Endpoint.node` is its nodeName, to be checked by whoever uses it."""
    found = _decoded(raw, _Slice)
    owner = (found.metadata.labels or {}).get("kubernetes.io/service-name")
    service = ObjectRef(found.metadata.namespace, owner) if owner else None
    ports = []
    hosts = found.addressType == "FQDN"
    for port in found.ports or ():
        if port.port is None or hosts:
            continue
        made = distinct(_endpoint(e, port.port) for e in found.endpoints or () if e.addresses)
        protocol = values.protocol(port.protocol or "TCP")
        ports.append(PortEndpoints(port.name or "", protocol, made))
    ports.sort(key=lambda entry: (entry.name, entry.protocol))
    return Slice(found.metadata.ref, service, tuple(ports), hosts)


def to_node(raw: bytes | msgspec.Raw) -> Node:
    """A Node."""
    found = _decoded(raw, _Node)
    meta = found.metadata
    labels, annotations = meta.labels or {}, meta.annotations or {}
    cidrs = found.spec.podCIDRs or ([found.spec.podCIDR] if found.spec.podCIDR else [])
    internal = [a.address for a in found.status.addresses or () if a.type == "InternalIP"]
    hops, odd = values.addresses(annotations.get(names.ANNOTATION_NEXT_HOP, ""))
    return Node(
        name=meta.name,
        uid=meta.uid,
        addresses=tuple(values.address(text) for text in internal),
        pod_cidrs=tuple(values.network(text) for text in cidrs),
        ready=values.is_ready(found.status.conditions),
        excluded=names.LABEL_EXCLUDE in labels,
        out_of_service=any(t.key == names.TAINT_OUT_OF_SERVICE for t in found.spec.taints or ()),
        draining=annotations.get(names.ANNOTATION_DRAIN, "false") != "false",
        deleting=meta.deletionTimestamp is not None,
        next_hops=hops,
        odd_hops=odd,
    )


def to_eip(raw: bytes | msgspec.Raw) -> Eip:
    """An EIP object. Refused if it is not named after its address: the name is the lock."""
    found = _decoded(raw, _Eip)
    spec = found.spec
    address = values.key(spec.address)
    if found.metadata.name != eip_object_name(address):
        raise errors.KubeError(f"EIP {found.metadata.name} holds another address: {address}")
    try:
        phase = Phase(spec.phase)
    except ValueError as error:
        raise errors.KubeError(f"EIP {found.metadata.name}: phase {spec.phase!r}") from error
    return Eip(
        address=address,
        pool=spec.pool,
        owner=ObjectRef(spec.owner.namespace, spec.owner.name),
        owner_uid=spec.owner.uid,
        phase=phase,
        forwarding=spec.forwarding,
        withdrawn_by=tuple(sorted(spec.withdrawnBy or {})),
        released_s=seconds(spec.releasedAt),
        unforwarded_s=seconds(spec.unforwardedAt),
        sharing_key=spec.sharingKey,
        sharers=tuple(Sharer(ObjectRef(s.namespace, s.name), s.uid) for s in spec.sharers or ()),
        version=found.metadata.resourceVersion,
    )


def eip_body(eip: Eip) -> dict[str, Any]:
    """The EIP object of a new allocation, for `Client.create`."""
    shared: dict[str, Any] = {}
    if eip.sharing_key:
        shared["sharingKey"] = eip.sharing_key
    if eip.sharers:
        shared["sharers"] = [
            {"namespace": s.ref.namespace, "name": s.ref.name, "uid": s.uid} for s in eip.sharers
        ]
    return {
        "apiVersion": f"{names.GROUP}/{names.EIP_VERSION}",
        "kind": names.EIP_KIND,
        "metadata": {"name": eip_object_name(eip.address)},
        "spec": {
            "address": str(eip.address),
            "pool": eip.pool,
            "owner": {
                "namespace": eip.owner.namespace,
                "name": eip.owner.name,
                "uid": eip.owner_uid,
            },
            "phase": str(eip.phase),
            "forwarding": eip.forwarding,
            **shared,
        },
    }


def to_data(raw: bytes | msgspec.Raw) -> DataObject:
    """A ConfigMap or Secret."""
    found = _decoded(raw, _Data)
    meta = found.metadata
    annotations = values.pairs(meta.annotations)
    return DataObject(
        meta.ref, meta.uid, values.pairs(found.data), annotations, meta.resourceVersion
    )


def to_pod(raw: bytes | msgspec.Raw) -> Pod:
    """A Pod."""
    found = _decoded(raw, _Pod)
    meta, status = found.metadata, found.status
    return Pod(
        ref=meta.ref,
        uid=meta.uid,
        node=found.spec.nodeName or "",
        address=values.address(status.podIP) if status.podIP else None,
        app=(meta.labels or {}).get("app.kubernetes.io/name", ""),
        phase=status.phase,
        deleting=meta.deletionTimestamp is not None,
        ready=values.is_ready(status.conditions),
    )


def to_namespace(raw: bytes | msgspec.Raw) -> Namespace:
    """A Namespace."""
    meta = _decoded(raw, _Named).metadata
    return Namespace(meta.ref, values.pairs(meta.labels), meta.resourceVersion)


SERVICE: Final = Kind("service", client.SERVICES, to_service)
SLICE: Final = Kind("endpointslice", client.ENDPOINT_SLICES, to_endpoints)
NODE: Final = Kind("node", client.NODES, to_node)
EIP: Final = Kind("eip", client.EIPS, to_eip)
CONFIG_MAP: Final = Kind("configmap", client.CONFIG_MAPS, to_data)
SECRET: Final = Kind("secret", client.SECRETS, to_data)
POD: Final = Kind("pod", client.PODS, to_pod)
NAMESPACE: Final = Kind("namespace", client.NAMESPACES, to_namespace)

S = TypeVar("S", bound=msgspec.Struct)


def _decoded(raw: bytes | msgspec.Raw, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.MsgspecError as error:
        raise errors.KubeError(f"{kind.__name__.strip('_')}: {error}") from error


def _announced(status: _ServiceStatus | None) -> tuple[str, str, str] | None:
    for entry in (status.conditions if status else None) or ():
        if entry.type == names.CONDITION_ANNOUNCED:
            return entry.status, entry.reason, entry.message
    return None


def _endpoint(entry: _Endpoint, port: int) -> Endpoint:
    # Only the first address counts: the API has said so since 1.21 (endpointslice v1, `addresses`).
    conditions = entry.conditions or _Conditions()
    ready = conditions.ready is not False
    serving = ready if conditions.serving is None else conditions.serving
    target = entry.targetRef
    return Endpoint(
        address=values.address((entry.addresses or [""])[0]),
        port=port,
        node=entry.nodeName or "",
        pod=target.name if target and target.kind == "Pod" else "",
        ready=ready,
        serving=serving,
        terminating=bool(conditions.terminating),
    )
