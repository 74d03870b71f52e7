"""The configuration: what the user writes in ConfigMap `lbctl`, checked as a whole.

Rules: `parse` either returns a `Config` in which everything is valid, or raises ConfigError with
every problem at its line and column, in the order of the file; those between parts come from
`config_checks`. Messages are for people; no library's wording comes through.
"""

from __future__ import annotations

import difflib
import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError

from lbctl.core import config_values as values
from lbctl.core import names
from lbctl.core.config_checks import cross_checks
from lbctl.core.config_model import Asn, Label, Model, Seconds, Unicast, given
from lbctl.core.config_pools import Pool, Requirement, Reserved, Selector
from lbctl.core.config_values import AddressRange, show
from lbctl.core.model import (
    Address,
    Eip,
    External,
    ForwardingOptions,
    LocalDelivery,
    LocatedBy,
    ObjectRef,
    Phase,
    Steering,
)
from lbctl.core.positions import Document, Loc, Mark, Problem, load
from lbctl.errors import ConfigError

VERSION: Final = 1
MAX_PROBLEMS: Final = 200
HOLD_TIME_S: Final = 9  # a peer's default


class PeerConfig(Model):
    """A switch. `password_secret` names a Secret of our namespace, key `password`."""

    name: Label
    address: Unicast
    asn: Asn
    port: int = Field(default=179, ge=1, le=65535)
    hold_time_s: Annotated[int, BeforeValidator(values.parse_hold_time)] = Field(
        default=HOLD_TIME_S, validation_alias="holdTime"
    )
    local_address: Unicast | None = Field(default=None, validation_alias="localAddress")
    router_id: Annotated[IPv4Address, BeforeValidator(values.parse_router_id)] | None = Field(
        default=None, validation_alias="routerId"
    )
    password_secret: Annotated[str, BeforeValidator(values.parse_secret_name)] | None = Field(
        default=None, validation_alias="passwordSecret"
    )
    multihop: int | None = Field(default=None, ge=1, le=255)
    graceful_restart_s: Annotated[int, BeforeValidator(values.parse_restart_time)] | None = Field(
        default=None, validation_alias="gracefulRestart"
    )


class Bgp(Model):
    """Our AS and the switches."""

    asn: Asn
    peers: tuple[PeerConfig, ...]

    @property
    def keep_s(self) -> int:
        """How long a switch may keep the routes of a manager that vanished, at most, in seconds.

        A session that goes silent ends at the hold time, and its routes with it; one whose process
        died is restarting for the restart time.
        """
        asked = (max(peer.hold_time_s, peer.graceful_restart_s or 0) for peer in self.peers)
        return max(asked, default=HOLD_TIME_S)


class Announce(Model):
    """How routes are announced and addresses given back."""

    max_paths: int = Field(default=64, ge=1, le=1024, validation_alias="maxPaths")
    paths: Literal["addPath", "perManager"] = "addPath"
    next_hop: Literal["direct", "recursive"] = Field(default="direct", validation_alias="nextHop")
    virtual_next_hops: tuple[Annotated[AddressRange, BeforeValidator(values.parse_range)], ...] = (
        Field(default=(), validation_alias="virtualNextHops")
    )
    drain_time_s: Seconds = Field(default=2.0, le=3600, validation_alias="drainTime")
    reuse_after_s: Seconds = Field(default=30.0, le=604800, validation_alias="reuseAfter")


class Probe(Model):
    """How nodes are judged."""

    interval_s: Seconds = Field(default=0.05, ge=0.01, le=10, validation_alias="interval")
    misses: int = Field(default=3, ge=1, le=100)
    agent_grace_s: Seconds = Field(default=300.0, le=86400, validation_alias="agentGrace")


class Forwarding(Model):
    """How nodes carry traffic; `lbctl.core.model.ForwardingOptions` says what each means."""

    interfaces: tuple[Annotated[str, BeforeValidator(values.parse_interface)], ...] = ()
    steering: Steering = "auto"
    ping: bool = True
    local_delivery: LocalDelivery = Field(default="shared", validation_alias="localDelivery")
    new_flows_per_second: int = Field(
        default=5000, ge=0, le=1_000_000, validation_alias="newFlowsPerSecond"
    )


class Endpoints(Model):
    """Which endpoints take traffic. `external`: what becomes of those that are on no node.

    `nodes`: what a Pod's node is found by.
    """

    external: External = "refuse"
    nodes: LocatedBy = "podCIDR"


class Services(Model):
    """Which Services are ours. `without_class`: those without a loadBalancerClass too."""

    load_balancer_class: Annotated[str, BeforeValidator(values.parse_label_key)] = Field(
        default=names.LOAD_BALANCER_CLASS, validation_alias="loadBalancerClass"
    )
    without_class: bool = Field(default=True, validation_alias="withoutClass")


class Config(Model):
    """A whole, valid configuration. Frozen and comparable.

    `takeover`: while another controller's Services become ours; docs/migrating.md. "observe": say
    what would be done, write nothing to Services and EIPs. "adopt": what a Service has, it keeps.
    """

    version: Annotated[int, BeforeValidator(values.parse_version)]
    pools: tuple[Pool, ...]
    bgp: Bgp
    announce: Annotated[Announce, BeforeValidator(given)] = Announce()
    probe: Annotated[Probe, BeforeValidator(given)] = Probe()
    forwarding: Annotated[Forwarding, BeforeValidator(given)] = Forwarding()
    endpoints: Annotated[Endpoints, BeforeValidator(given)] = Endpoints()
    services: Annotated[Services, BeforeValidator(given)] = Services()
    takeover: Literal["none", "observe", "adopt"] = "none"

    @property
    def forwarding_options(self) -> ForwardingOptions:
        """What every agent follows, of the sections `forwarding` and `endpoints`."""
        given = self.forwarding
        return ForwardingOptions(
            given.interfaces,
            given.steering,
            given.ping,
            given.local_delivery,
            given.new_flows_per_second,
            self.endpoints.external,
            self.endpoints.nodes,
        )

    @cached_property
    def _index(self) -> tuple[list[tuple[int, int]], list[tuple[int, Pool]]]:
        """Starts of all ranges, sorted, and what each holds: its last address and its pool."""
        runs = sorted(
            ((part.version, int(part.first)), (int(part.last), number))
            for number, pool in enumerate(self.pools)
            for part in pool.addresses
        )
        return [start for start, _ in runs], [(last, self.pools[n]) for _, (last, n) in runs]

    def pool_of(self, address: Address) -> Pool | None:
        """The pool that holds `address`, None if it is in none. O(log ranges)."""
        starts, ends = self._index
        at = bisect_right(starts, (address.version, int(address))) - 1
        if at < 0 or starts[at][0] != address.version or int(address) > ends[at][0]:
            return None
        return ends[at][1]

    @cached_property
    def by_name(self) -> dict[str, Pool]:
        """The pools by name."""
        return {pool.name: pool for pool in self.pools}

    def lets_go(self, pool: str) -> bool:
        """Whether a pool takes back addresses that it no longer holds."""
        return pool in self.by_name and self.by_name[pool].release

    @cached_property
    def ranked(self) -> tuple[Pool, ...]:
        """The pools in the order in which they are tried."""
        return tuple(sorted(self.pools, key=lambda pool: pool.rank))

    @cached_property
    def _reserved(self) -> tuple[list[tuple[int, int]], list[Reserved]]:
        every = [entry for pool in self.pools for entry in pool.reserved]
        every.sort(key=lambda entry: (entry.addresses.version, int(entry.addresses.first)))
        starts = [(entry.addresses.version, int(entry.addresses.first)) for entry in every]
        return starts, every

    def reserved_at(self, address: Address) -> Reserved | None:
        """The reservation that holds `address`. O(log reservations)."""
        starts, every = self._reserved
        at = bisect_right(starts, (address.version, int(address))) - 1
        return every[at] if at >= 0 and address in every[at].addresses else None

    @cached_property
    def owned(self) -> Mapping[ObjectRef, Mapping[int, Address]]:
        """The addresses that are reserved for a Service, by family."""
        found: dict[ObjectRef, dict[int, Address]] = {}
        for pool in self.pools:
            for entry in pool.reserved:
                if entry.owner is not None:
                    part = entry.addresses
                    found.setdefault(entry.owner, {})[part.version] = part.first
        return found

    def reserved_for(self, service: ObjectRef, version: int) -> Address | None:
        """The address of a family that is reserved for a Service."""
        return self.owned.get(service, {}).get(version)


@dataclass(frozen=True, slots=True)
class ShrinkConflict:
    """A Service that would lose its address. `str()` is a sentence."""

    service: ObjectRef
    address: Address
    pool: str

    def __str__(self) -> str:
        return f"Service {self.service} uses {self.address} of pool {self.pool}"


def config_hash(text: str) -> str:
    """What identifies a configuration text: 64 bits of its SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def shrink_conflicts(eips: Iterable[Eip], new: Config) -> tuple[ShrinkConflict, ...]:
    """The Bound EIPs that no pool of `new` holds, sorted. Not empty: refuse the configuration.

    Those of a pool that says `release: true` are let go.
    """
    found = [
        ShrinkConflict(eip.owner, eip.address, eip.pool)
        for eip in eips
        if eip.phase is Phase.BOUND
        and new.pool_of(eip.address) is None
        and not new.lets_go(eip.pool)
    ]
    return tuple(sorted(found, key=lambda c: (c.service, c.address.version, int(c.address))))


def parse(text: str, source: str = "config.yaml") -> Config:
    """Read and check a configuration.

    Raises ConfigError with all problems, each `SOURCE:LINE:COLUMN: path: what is wrong`, in the
    order of the file (at most MAX_PROBLEMS, then how many more).
    """
    document = load(text)
    problems = list(document.problems)
    config: Config | None = None
    if document.complete:
        version = _version_problem(document)
        if version is not None:
            raise ConfigError((f"{source}:{version}",))
        try:
            config = Config.model_validate(document.value, by_alias=True, by_name=False)
        except ValidationError as error:
            # A list whose items are all bad is "too short" as well: not worth saying.
            found = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
            problems += [_problem(document, dict(item)) for item in found]
        problems += cross_checks(document)
    if config is None or problems:
        raise ConfigError(_render(problems, source))
    return config


def _render(problems: list[Problem], source: str) -> tuple[str, ...]:
    ordered = [f"{source}:{p}" for p in sorted(problems, key=lambda p: (p.mark, str(p)))]
    ordered = list(dict.fromkeys(ordered))
    if len(ordered) > MAX_PROBLEMS:
        more = len(ordered) - MAX_PROBLEMS
        ordered = [*ordered[:MAX_PROBLEMS], f"{source}: and {more} more problems"]
    return tuple(ordered)


def _version_problem(document: Document) -> Problem | None:
    """A file for another version: nothing else in it can be judged."""
    if not isinstance(document.value, dict):
        text = (
            "is empty" if document.value is None else "must be a mapping that starts `version: 1`"
        )
        return Problem(document.mark(()), (), f"the configuration {text}")
    found = document.value.get("version")
    if type(found) is int and found > VERSION:
        text = f"{found} is newer than this lbctl understands (up to {VERSION}); update lbctl first"
        return Problem(document.mark(("version",)), ("version",), text)
    return None


# What may stand where, for "did you mean". Indexes are left out of the path.
_SECTIONS: Final[dict[tuple[str, ...], type[Model]]] = {
    (): Config,
    ("pools",): Pool,
    ("pools", "reserved"): Reserved,
    ("pools", "namespaceSelectors"): Selector,
    ("pools", "namespaceSelectors", "matchExpressions"): Requirement,
    ("pools", "serviceSelectors"): Selector,
    ("pools", "serviceSelectors", "matchExpressions"): Requirement,
    ("bgp",): Bgp,
    ("bgp", "peers"): PeerConfig,
    ("announce",): Announce,
    ("probe",): Probe,
    ("forwarding",): Forwarding,
    ("endpoints",): Endpoints,
    ("services",): Services,
}
_EXPECTED: Final = {
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping (`key: value`)",
    "model_attributes_type": "must be a mapping (`key: value`)",
    "dict_type": "must be a mapping (`key: value`)",
}
_LIMIT: Final = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}


def _problem(document: Document, error: dict[str, Any]) -> Problem:
    """One of pydantic's errors, in plain words and with its place."""
    loc: Loc = tuple(part for part in error["loc"] if _is_place(document, error["loc"], part))
    kind, context, given = error["type"], error.get("ctx") or {}, error.get("input")
    if kind == "extra_forbidden":
        return Problem(document.key_mark(loc), loc, _unknown_key(loc))
    if kind == "missing":
        at = document.key_mark(loc[:-1])
        hint = "; write `version: 1`" if loc == ("version",) else ""
        return Problem(at, loc, f"is missing{hint}")
    at = document.mark(loc)
    if kind in _EXPECTED:
        return Problem(at, loc, f"{_EXPECTED[kind]}, not {show(given)}")
    if kind in _LIMIT:
        name, words = _LIMIT[kind]
        limit, seconds = context[name], _is_duration(loc)
        return Problem(at, loc, f"must be {words} {limit:.9g}{'s' if seconds else ''}")
    if kind == "literal_error":
        return Problem(at, loc, f"must be {context['expected']}, not {show(given)}")
    if kind == "too_short":
        return Problem(at, loc, "must not be empty")
    if kind == "value_error":
        return Problem(at, loc, str(context["error"]))
    return Problem(at, loc, f"{show(given)} cannot be used here")


def _is_place(document: Document, loc: Loc, part: str | int) -> bool:
    """Whether a part of pydantic's path is one of the file's, not the name of a validator."""
    return isinstance(part, int) or not part.startswith(("function-", "is-instance["))


def _is_duration(loc: Loc) -> bool:
    times = ("drainTime", "reuseAfter", "interval", "agentGrace", "holdTime", "gracefulRestart")
    return loc[-1] in times


def _unknown_key(loc: Loc) -> str:
    section = _SECTIONS.get(tuple(part for part in loc[:-1] if isinstance(part, str)))
    known = (
        [str(f.validation_alias or name) for name, f in section.model_fields.items()]
        if section
        else []
    )
    folded = {key.lower(): key for key in known}
    wanted = str(loc[-1]).lower().replace("_", "").replace("-", "")
    close = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    if close:
        return f"unknown key; did you mean {folded[close[0]]}?"
    return f"unknown key; known here are {', '.join(known)}"


__all__ = [
    "AddressRange",
    "Announce",
    "Bgp",
    "Config",
    "Endpoints",
    "Forwarding",
    "Mark",
    "PeerConfig",
    "Pool",
    "Probe",
    "Requirement",
    "Reserved",
    "Selector",
    "Services",
    "ShrinkConflict",
    "config_hash",
    "parse",
    "shrink_conflicts",
]
