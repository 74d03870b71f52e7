"""The domain's snapshots: what the cluster says, reduced to what is decided upon.

All are frozen and hashable. `lbctl.kube.objects` makes them from API objects; planners take them
and never see an API object. Addresses are `ipaddress` objects; durations are seconds (`_s`);
instants are seconds since the epoch where they come from the API server.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, TypeAlias, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def snapshot(cls: type[T]) -> type[T]:
    """A frozen dataclass for what is made by the hundred thousand: it is mypy alone that refuses
    an assignment, because refusing it at run time makes each object four times as dear."""
    return dataclass(slots=True, unsafe_hash=True)(cls)


@dataclass_transform(frozen_default=True, order_default=True, field_specifiers=(field,))
def ordered_snapshot(cls: type[T]) -> type[T]:
    """A `snapshot` that sorts by its fields."""
    return dataclass(slots=True, unsafe_hash=True, order=True)(cls)


Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Steering: TypeAlias = Literal["auto", "direct", "tunnel"]
LocalDelivery: TypeAlias = Literal["shared", "strict"]
External: TypeAlias = Literal["refuse", "masquerade"]
LocatedBy: TypeAlias = Literal["podCIDR", "nodeName"]
# The families that a BGP session carries, sorted, each with whether it takes several paths for a
# prefix (ADD-PATH): ((4, True), (6, False)).
Agreed: TypeAlias = tuple[tuple[int, bool], ...]


class Protocol(StrEnum):
    """Layer-4 protocol of a Service port, spelled as Kubernetes spells it."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class TrafficPolicy(StrEnum):
    """`spec.externalTrafficPolicy`."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class Phase(StrEnum):
    """Phase of an EIP object."""

    BOUND = "Bound"
    RELEASING = "Releasing"


@dataclass(frozen=True, slots=True, order=True)
class ObjectRef:
    """A namespaced name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class ServicePort:
    """One entry of `spec.ports`. `name` is "" when the Service has a single unnamed port."""

    name: str
    protocol: Protocol
    port: int


@snapshot
class Service:
    """A Service as far as load balancing goes.

    `created_s` is creationTimestamp. `ingress` are the addresses now in status.loadBalancer;
    `host_names` are in there too, but never of ours.
    `affinity_s` is the ClientIP timeout, None without affinity.
    """

    ref: ObjectRef
    uid: str
    created_s: float
    ports: tuple[ServicePort, ...]
    is_load_balancer: bool
    load_balancer_class: str | None = None
    policy: TrafficPolicy = TrafficPolicy.CLUSTER
    families: tuple[int, ...] = (4,)
    affinity_s: int | None = None
    source_ranges: tuple[Network, ...] = ()
    deleting: bool = False
    finalizers: tuple[str, ...] = ()
    ingress: tuple[Address, ...] = ()
    host_names: tuple[str, ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    requested: str | None = None  # spec.loadBalancerIP, unparsed: a user wrote it
    cluster_ips: tuple[Address, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    selector: tuple[tuple[str, str], ...] = ()
    needs_both: bool = False  # ipFamilyPolicy: RequireDualStack
    version: str = field(default="", compare=False)  # resourceVersion, for guarded writes
    # status, reason and message of our own condition; not compared, as we write it ourselves
    condition: tuple[str, str, str] | None = field(default=None, compare=False)


@ordered_snapshot
class Endpoint:
    """One address behind a Service port. `node` is "" if it is on no node; `pod` "" if no Pod."""

    address: Address
    port: int
    node: str = ""
    pod: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False


@snapshot
class PortEndpoints:
    """All endpoints of one named port of a Service, sorted, from all its slices."""

    name: str
    protocol: Protocol
    endpoints: tuple[Endpoint, ...]


@snapshot
class ServiceEndpoints:
    """The merged EndpointSlices of a Service, sorted by (name, protocol).

    hosts: some are of addressType FQDN; their endpoints are left out, for nobody resolves names.
    """

    service: ObjectRef
    ports: tuple[PortEndpoints, ...] = ()
    hosts: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A Kubernetes Node as far as forwarding goes.

    `addresses` are its InternalIPs; `next_hops` the parsed `lbctl.io/next-hop` annotation, and
    `odd_hops` what of it is no address.
    A cordoned node (`spec.unschedulable`) forwards like any other, so that is not kept.
    """

    name: str
    uid: str = ""
    addresses: tuple[Address, ...] = ()
    pod_cidrs: tuple[Network, ...] = ()
    ready: bool = True
    excluded: bool = False
    out_of_service: bool = False
    draining: bool = False
    deleting: bool = False
    next_hops: tuple[Address, ...] = ()
    odd_hops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardingOptions:
    """What the configuration says about forwarding, the same for every node.

    interfaces: where traffic from outside comes in, () is those of the default routes. steering:
    how packets reach another node; "auto" is direct within a subnet, else by tunnel. ping: whether
    EIPs answer it. local_delivery: under externalTrafficPolicy Local, "shared" steers by the common
    table, "strict" only ever delivers on the node that the switch chose. new_flows_per_second: for
    each EIP and node, 0 is no limit. external: endpoints on no node are refused, or masqueraded by
    the node that got the packet. located_by: how a Pod's node is found (`forwarding.Locator`).
    """

    interfaces: tuple[str, ...] = ()
    steering: Steering = "auto"
    ping: bool = True
    local_delivery: LocalDelivery = "shared"
    new_flows_per_second: int = 5000
    external: External = "refuse"
    located_by: LocatedBy = "podCIDR"


@dataclass(frozen=True, slots=True, order=True)
class Sharer:
    """A Service on an address that another one owns."""

    ref: ObjectRef
    uid: str


@snapshot
class Eip:
    """An `eips.lbctl.io` object: the allocation itself.

    `owner` is the first of the Services on it; `sharers` are the others in the order in which they
    joined, all with the same `sharing_key` ("": it is not shared).

    `forwarding` turns False only after every manager has withdrawn the route and drainTime has
    passed; agents then remove the EIP. `withdrawn_by` are the manager ids that have withdrawn.
    `released_s` is when it became Releasing, `unforwarded_s` when `forwarding` became False.
    """

    address: Address
    pool: str
    owner: ObjectRef
    owner_uid: str
    phase: Phase = Phase.BOUND
    forwarding: bool = True
    withdrawn_by: tuple[str, ...] = ()
    released_s: float | None = None
    unforwarded_s: float | None = None
    sharing_key: str = ""
    sharers: tuple[Sharer, ...] = ()
    version: str = field(default="", compare=False)  # resourceVersion, for guarded writes

    @property
    def members(self) -> tuple[ObjectRef, ...]:
        """All Services on it, the owner first."""
        if not self.sharers:
            return (self.owner,)
        return (self.owner, *(sharer.ref for sharer in self.sharers))

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The namespaces of its Services, sorted, once each."""
        if not self.sharers:
            return (self.owner.namespace,)
        return tuple(sorted({ref.namespace for ref in self.members}))

    def uid_of(self, ref: ObjectRef) -> str | None:
        """The uid under which a Service is on it, None if it is not."""
        if ref == self.owner:
            return self.owner_uid
        return next((sharer.uid for sharer in self.sharers if sharer.ref == ref), None)


def eip_object_name(address: Address) -> str:
    """Name of an address's EIP object: itself for IPv4, the exploded form with dashes for IPv6.

    An object name is a DNS subdomain, so it cannot hold a colon.
    """
    return address.exploded.replace(":", "-") if address.version == 6 else str(address)


@lru_cache(maxsize=65536)
def host_route(address: Address) -> Network:
    """The prefix that an address is announced as."""
    # Cached, and made from the number: parsing text took most of a whole selection's time.
    if address.version == 4:
        return IPv4Network((int(address), 32))
    return IPv6Network((int(address), 128))


@dataclass(frozen=True, slots=True)
class Peer:
    """One BGP neighbour, validated. `password` is the secret's value, kept out of repr.

    graceful_restart_s: how long it is asked to keep our routes while all of us restarts (RFC 4724);
    None: not at all. keep_password: it has one, which only the speaker may still know.
    """

    name: str
    address: Address
    asn: int
    local_asn: int
    port: int = 179
    hold_time_s: int = 9
    local_address: Address | None = None
    router_id: IPv4Address | None = None
    multihop: int | None = None
    password: str | None = field(default=None, repr=False)
    graceful_restart_s: int | None = None
    keep_password: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Path:
    """One next hop, as announced with ADD-PATH: the EIPs through the same nodes share it.

    `path_id` belongs for ever to (node, next hop, attributes): see `lbctl.core.routes.path_id`.
    """

    next_hop: Address
    path_id: int
    node: str
    communities: tuple[str, ...] = ()
    med: int | None = None

    def __hash__(self) -> int:
        """Hash what tells paths apart; all fields, as by default, would take five times as long."""
        return hash(self.path_id)


@dataclass(frozen=True, slots=True)
class Session:
    """One BGP session as the speaker sees it. `agreed` is what was negotiated, () while down."""

    peer: str
    up: bool
    agreed: Agreed = ()
    detail: str = ""

    @property
    def add_path(self) -> bool | None:
        """Whether every family that it carries takes several paths; None while it is down."""
        return all(several for _, several in self.agreed) if self.agreed else None


class NodeState(StrEnum):
    """Judgement on a node (DESIGN.md, "Judging nodes")."""

    UNKNOWN = "Unknown"
    UP = "Up"
    SUSPECT = "Suspect"
    AGENT_SILENT = "AgentSilent"
    DOWN = "Down"


class Behind(IntEnum):
    """What takes an EIP's new connections by a node's table: a route needs more than NOTHING."""

    NOTHING = 0
    AWAY = 1  # endpoints on other nodes only
    HERE = 2


@dataclass(frozen=True, slots=True)
class NodeView:
    """What one manager knows of one node, the input to route selection.

    `confirmed` are the EIPs that its agent forwards, `empty` those of them that its table has no
    endpoint for, `local_ready` those with a ready endpoint on the node itself. `since_s`
    (monotonic) is when the state began.
    """

    name: str
    state: NodeState = NodeState.UNKNOWN
    held: bool = False  # panic: keep what is announced
    stable: bool = True  # False while a flapping node has to prove itself
    lags: bool = False
    digest: int = 0
    confirmed: Set[Address] = frozenset()
    empty: Set[Address] = frozenset()
    local_ready: Set[Address] = frozenset()
    since_s: float = 0.0
