"""Which addresses the Services of manifests would get, without applying them.

Rules: the allocator itself decides (`core.forecast`), on the cluster's state with these Services in
it as they would be after `kubectl apply`: what a manifest does not say stays as it is in the
cluster, but for what an earlier apply set, which goes; or it is what the API server fills in. New
ones come after all that exist, in the order of the files. Only what a Service has already and what
is reserved for it is sure; any other address may go to a Service that is created in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from lbctl.core.classes import not_ours
from lbctl.core.config import Config
from lbctl.core.forecast import Forecast, cluster_addresses, forecast
from lbctl.core.model import Address, Eip, Node, ObjectRef, Phase, Service
from lbctl.core.reasons import SENTENCE, Reason

POD_LABEL: Final = "statefulset.kubernetes.io/pod-name"
LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_KUBERNETES: Final = ObjectRef("default", "kubernetes")  # has the cluster's first family
SINGLE: Final = "SingleStack"  # ipFamilyPolicy
PREFER: Final = "PreferDualStack"
REQUIRE: Final = "RequireDualStack"


class Certainty(StrEnum):
    """How sure it is that a Service gets an address."""

    HAS = "has"
    RESERVED = "reserved"
    FORECAST = "forecast"


_WHY: Final = {
    Certainty.HAS: "it has it already",
    Certainty.RESERVED: "for it alone, whatever the order of creation",
    Certainty.FORECAST: "free now; a Service that is created first may take it",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A Service as a manifest has it. place: FILE:LINE.

    families, policy: () and "" where the manifest leaves `ipFamilies` and `ipFamilyPolicy` open.
    """

    service: Service
    place: str
    families: tuple[int, ...] = ()
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    """An address that a Service would have. why: a sentence on how sure it is."""

    address: Address
    pool: str
    certainty: Certainty
    why: str


@dataclass(frozen=True, slots=True)
class Prospect:
    """What would become of one Service.

    pod: the only one that it selects, by the label that a StatefulSet gives it; else "". refused:
    it does not get all that it asks for; the reason and the sentence say why.
    """

    service: ObjectRef
    place: str
    pod: str
    given: tuple[Given, ...]
    refused: bool
    reason: Reason
    sentence: str


def plan(
    config: Config,
    wanted: Sequence[Wanted],
    services: Iterable[Service],
    eips: Iterable[Eip],
    nodes: Iterable[Node],
    labels: Mapping[str, Mapping[str, str]],
) -> tuple[Prospect, ...]:
    """A prospect for each of `wanted`, in their order. labels: of the namespaces.

    `takeover: observe` gives nothing, so it is told what `adopt` would do, which comes next.
    """
    known = {service.ref: service for service in services}
    held, machines = tuple(eips), tuple(nodes)
    families = offered(known, machines)
    newest_s = max((service.created_s for service in known.values()), default=0.0)
    for number, one in enumerate(wanted, 1):
        ref = one.service.ref
        known[ref] = as_applied(one, known.get(ref), newest_s + number, families)
    if config.takeover == "observe":
        config = config.model_copy(update={"takeover": "adopt"})
    kept_off = cluster_addresses(machines, config)
    told = {one.service: one for one in forecast(config, known.values(), held, kept_off, labels)}
    has = {(ref, eip.address) for eip in held if eip.phase is Phase.BOUND for ref in eip.members}
    return tuple(
        _prospect(config, one, known[one.service.ref], told.get(one.service.ref), has)
        for one in wanted
    )


def _prospect(
    config: Config,
    wanted: Wanted,
    service: Service,
    told: Forecast | None,
    has: set[tuple[ObjectRef, Address]],
) -> Prospect:
    ref, pod = service.ref, dict(service.selector).get(POD_LABEL, "")
    if told is None:
        reason = not_ours(service, config.services) or Reason.NO_POOL
        said = f"Service {ref}: {SENTENCE[reason]}"
        return Prospect(ref, wanted.place, pod, (), True, reason, said)
    given = tuple(_given(config, ref, address, has) for address in told.after)
    refused = told.refused or not given
    return Prospect(ref, wanted.place, pod, given, refused, told.reason, told.sentence)


def _given(
    config: Config, ref: ObjectRef, address: Address, has: set[tuple[ObjectRef, Address]]
) -> Given:
    pool, reserved = config.pool_of(address), config.reserved_at(address)
    certainty = Certainty.FORECAST
    if (ref, address) in has:
        certainty = Certainty.HAS
    elif reserved is not None and reserved.owner == ref:
        certainty = Certainty.RESERVED
    why, own = _WHY[certainty], config.reserved_for(ref, address.version)
    if certainty is Certainty.HAS and own not in (None, address):
        why += f"; {own} is reserved for it, but what is given does not move by itself"
    return Given(address, pool.name if pool is not None else "", certainty, why)


def offered(services: Mapping[ObjectRef, Service], nodes: Iterable[Node]) -> tuple[int, ...]:
    """The families that the cluster gives to Services, the default first, as far as it shows."""
    own = services.get(_KUBERNETES)
    first = own.cluster_ips[0].version if own is not None and own.cluster_ips else 4
    seen = [{ip.version for ip in service.cluster_ips} for service in services.values()]
    seen += [{cidr.version for cidr in node.pod_cidrs} for node in nodes]
    return (first, 10 - first) if any(len(versions) == 2 for versions in seen) else (first,)


def as_applied(
    wanted: Wanted, live: Service | None, created_s: float, offers: tuple[int, ...]
) -> Service:
    """The Service after its manifest is applied. live: as it is in the cluster, None if it is new
    and created at `created_s`. offers: see `offered`."""
    made = wanted.service
    families = _families(wanted, live, offers)
    if live is None:
        both = wanted.policy == REQUIRE or (not wanted.policy and len(wanted.families) == 2)
        return replace(made, created_s=created_s, families=families, needs_both=both)
    meta, spec = _last_applied(live)
    requested = None if "loadBalancerIP" in spec else live.requested
    return replace(
        made,
        uid=live.uid,
        created_s=live.created_s,
        deleting=live.deleting,
        finalizers=live.finalizers,
        ingress=live.ingress,
        cluster_ips=live.cluster_ips,
        load_balancer_class=made.load_balancer_class or live.load_balancer_class,
        requested=made.requested or requested,
        annotations=_over(live.annotations, meta.get("annotations"), made.annotations),
        labels=_over(live.labels, meta.get("labels"), made.labels),
        families=families,
        needs_both=wanted.policy == REQUIRE if wanted.policy else live.needs_both,
    )


def _last_applied(live: Service) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """metadata and spec as the last client-side `kubectl apply` set them, empty without one."""
    try:
        found = json.loads(dict(live.annotations).get(LAST_APPLIED, "{}"))
    except (ValueError, RecursionError):
        return {}, {}
    meta, spec = (
        found.get(key) if isinstance(found, dict) else None for key in ("metadata", "spec")
    )
    return meta if isinstance(meta, dict) else {}, spec if isinstance(spec, dict) else {}


def _over(
    before: tuple[tuple[str, str], ...], applied: object, now: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """What is there, without what the last apply set, with what this one sets."""
    set_then = applied if isinstance(applied, dict) else {}
    stays = {key: value for key, value in before if key not in set_then}
    return tuple(sorted({**stays, **dict(now)}.items()))


def _families(wanted: Wanted, live: Service | None, offers: tuple[int, ...]) -> tuple[int, ...]:
    """As kube-apiserver fills `ipFamilies` in (Kubernetes, "IPv4/IPv6 dual-stack", Services)."""
    had = live.families if live is not None else offers[:1]
    found = wanted.families or had
    if wanted.policy == SINGLE:
        return found[:1]
    both = wanted.policy == REQUIRE or (wanted.policy == PREFER and len(offers) == 2)
    return (*found, 10 - found[0]) if both and len(found) == 1 else found
