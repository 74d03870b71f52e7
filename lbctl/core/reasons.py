"""Why something was decided: one enum for log, Event, metric label, state page and `explain`.

Values are stable UpperCamelCase (Kubernetes' rule for Event and condition reasons). `SENTENCE`
says each for people; `lbctl explain` and Event messages are built from it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """A decision's reason."""

    # allocation
    ALLOCATED = "Allocated"
    RESTORED = "Restored"
    NOT_LOAD_BALANCER = "NotLoadBalancer"
    OTHER_CLASS = "OtherLoadBalancerClass"
    POOL_EXHAUSTED = "PoolExhausted"
    NO_POOL = "NoPool"
    ADDRESS_TAKEN = "AddressTaken"
    ADDRESS_OUTSIDE_POOLS = "AddressOutsidePools"
    RELEASING = "Releasing"
    RELEASED = "Released"
    REUSE_DELAY = "ReuseDelay"
    WAITING_FOR_CONFIG = "WaitingForConfig"
    RECREATED = "Recreated"
    SHARED = "Shared"
    SHARING_REFUSED = "SharingRefused"
    POOL_UNKNOWN = "PoolUnknown"
    POOL_DRAINING = "PoolDraining"
    POOL_NOT_FOR_NAMESPACE = "PoolNotForNamespace"
    POOL_NOT_FOR_SERVICE = "PoolNotForService"
    POOL_RELEASED = "PoolReleased"
    QUOTA_EXCEEDED = "QuotaExceeded"
    REQUEST_NOT_ALLOWED = "RequestNotAllowed"
    REQUEST_INVALID = "RequestInvalid"
    ADDRESS_RESERVED = "AddressReserved"
    ANNOTATIONS_CONFLICT = "AnnotationsConflict"
    CLAIM_LOST = "ClaimLost"
    STATUS_OVERWRITTEN = "StatusOverwritten"
    # takeover
    OBSERVING = "Observing"
    ADOPTED = "Adopted"
    NOT_ADOPTED = "NotAdopted"
    # configuration
    CONFIG_ACCEPTED = "ConfigAccepted"
    CONFIG_REJECTED = "ConfigRejected"
    POOL_SHRINK_REFUSED = "PoolShrinkRefused"
    # a node as next hop of an EIP
    ANNOUNCED = "Announced"
    NO_ENDPOINTS = "NoReadyEndpoints"
    HOST_ENDPOINTS = "HostNameEndpoints"
    ENDPOINTS_ON_NO_NODE = "EndpointsOnNoNode"
    NO_LOCAL_ENDPOINT = "NoLocalEndpoint"
    NODE_SUSPECT = "NodeSuspect"
    NODE_DOWN = "NodeDown"
    NODE_NOT_READY = "NodeNotReady"
    NODE_EXCLUDED = "NodeExcluded"
    NODE_OUT_OF_SERVICE = "NodeOutOfService"
    NODE_DRAINING = "NodeDraining"
    NODE_UNKNOWN = "NodeNeverAnswered"
    NODE_FLAPPING = "NodeFlapping"
    NODE_NO_ADDRESS = "NodeHasNoAddress"
    NODE_LAGS = "NodeTableLags"
    NOT_CONFIRMED = "NotConfirmedByAgent"
    AGENT_SILENT = "AgentSilent"
    OVER_MAX_PATHS = "OverMaxPaths"
    LEFT_TO_OTHERS = "LeftToOthers"
    HELD_BY_PANIC = "HeldByPanic"
    LAST_NEXT_HOP = "LastNextHop"
    NO_NEXT_HOP = "NoNextHop"
    # a packet
    DELIVERED = "Delivered"
    OWN_ENDPOINTS = "OwnEndpoints"
    NOT_AN_EIP = "NotAnEip"
    SOURCE_REFUSED = "SourceRangeRefused"
    NO_SUCH_PORT = "NoSuchPort"
    NO_NEW_FLOWS = "NoNewFlows"
    # an endpoint
    ENDPOINT_ON_NO_NODE = "EndpointOnNoNode"
    # a session
    SESSION_UP = "SessionUp"
    SESSION_DOWN = "SessionDown"
    ADD_PATH_MISSING = "AddPathMissing"
    FAMILY_MISSING = "AddressFamilyMissing"


SENTENCE: Final[dict[Reason, str]] = {
    Reason.ALLOCATED: "an address was given from a pool",
    Reason.RESTORED: "the address it already had was kept",
    Reason.NOT_LOAD_BALANCER: "the Service is not of type LoadBalancer",
    Reason.OTHER_CLASS: "by its loadBalancerClass, or for want of one, it is not ours",
    Reason.POOL_EXHAUSTED: "no address of the pools it may use is free",
    Reason.NO_POOL: "no pool gives out addresses to it on its own",
    Reason.ADDRESS_TAKEN: "another Service holds the address",
    Reason.ADDRESS_OUTSIDE_POOLS: "the address is in none of the accepted pools",
    Reason.RELEASING: "the address is being taken back: first the routes go, then the forwarding",
    Reason.RELEASED: "the address is free again",
    Reason.REUSE_DELAY: "the address rests until reuseAfter has passed",
    Reason.WAITING_FOR_CONFIG: "no configuration has been accepted yet",
    Reason.RECREATED: "a Service of this name had the address until a moment ago",
    Reason.SHARED: "it shares the address with Services of the same sharing key",
    Reason.SHARING_REFUSED: "it cannot share the address that it asks for",
    Reason.POOL_UNKNOWN: "no pool has the name that it asks for",
    Reason.POOL_DRAINING: "the pool is being drained and gives no more addresses",
    Reason.POOL_NOT_FOR_NAMESPACE: "the pool does not serve the Service's namespace",
    Reason.POOL_NOT_FOR_SERVICE: "the pool's serviceSelectors do not match the Service's labels",
    Reason.POOL_RELEASED: "the pool gave up the address that it had (`release: true`)",
    Reason.QUOTA_EXCEEDED: "its namespace has as many addresses of the pool as its quota allows",
    Reason.REQUEST_NOT_ALLOWED: "the pool does not let Services choose the address",
    Reason.REQUEST_INVALID: "what it asks for cannot be read",
    Reason.ADDRESS_RESERVED: "the address is reserved for another Service",
    Reason.ANNOTATIONS_CONFLICT: "its annotations ask for different things",
    Reason.CLAIM_LOST: "its status showed an address that another Service has",
    Reason.STATUS_OVERWRITTEN: "its status showed an address that it does not have",
    Reason.OBSERVING: "takeover: observe: nothing is written to Services and EIPs",
    Reason.ADOPTED: "the address that another controller gave it was kept",
    Reason.NOT_ADOPTED: "it has an address that cannot become ours, so it was left as it is",
    Reason.CONFIG_ACCEPTED: "the configuration is in force",
    Reason.CONFIG_REJECTED: "the configuration has errors; the last accepted one stays in force",
    Reason.POOL_SHRINK_REFUSED: "addresses that Services use would fall out of the pools",
    Reason.ANNOUNCED: "the node is a next hop",
    Reason.NO_ENDPOINTS: "no endpoint of the Service is ready",
    Reason.HOST_ENDPOINTS: "its EndpointSlices hold host names (addressType FQDN): not resolved",
    Reason.ENDPOINTS_ON_NO_NODE: "its endpoints are on no node, which endpoints.external refuses",
    Reason.NO_LOCAL_ENDPOINT: "externalTrafficPolicy is Local and the node has no ready endpoint",
    Reason.NODE_SUSPECT: "the node has stopped answering probes",
    Reason.NODE_DOWN: "the node is down: two witnesses agree",
    Reason.NODE_NOT_READY: "Kubernetes calls the node NotReady",
    Reason.NODE_EXCLUDED: "the node is labelled to be excluded from load balancers",
    Reason.NODE_OUT_OF_SERVICE: "the node is tainted as out of service",
    Reason.NODE_DRAINING: "the node is being drained",
    Reason.NODE_UNKNOWN: "the node has not answered a probe yet",
    Reason.NODE_FLAPPING: "the node is back but has to be stable for longer",
    Reason.NODE_NO_ADDRESS: "the node has no address of the EIP's family",
    Reason.NODE_LAGS: "the node's table differs from the majority's for too long",
    Reason.NOT_CONFIRMED: "the node's agent has not confirmed the EIP's forwarding",
    Reason.AGENT_SILENT: "the agent is silent but its kernel answers; what it confirmed is kept",
    Reason.OVER_MAX_PATHS: "maxPaths is reached; other nodes rank higher",
    Reason.LEFT_TO_OTHERS: "this manager runs there; the others announce it, and outlive it",
    Reason.HELD_BY_PANIC: "too many nodes went at once; held until another witness agrees",
    Reason.LAST_NEXT_HOP: "the node is doubtful but no other is left, so it stays a next hop",
    Reason.NO_NEXT_HOP: "no node can carry it",
    Reason.DELIVERED: "an endpoint gets it",
    Reason.OWN_ENDPOINTS: "each node delivers to its own endpoints alone (localDelivery: strict)",
    Reason.NOT_AN_EIP: "no Service has the address",
    Reason.SOURCE_REFUSED: "the Service's loadBalancerSourceRanges do not let the client in",
    Reason.NO_SUCH_PORT: "the Service has no such port",
    Reason.NO_NEW_FLOWS: "its endpoints take no new connections",
    Reason.ENDPOINT_ON_NO_NODE: "the endpoint's address is on no node, so nothing could deliver",
    Reason.SESSION_UP: "the BGP session is established",
    Reason.SESSION_DOWN: "the BGP session is not established",
    Reason.ADD_PATH_MISSING: "the switch did not agree to receive several paths (ADD-PATH)",
    Reason.FAMILY_MISSING: "the switch does not take routes of every family that EIPs have",
}
