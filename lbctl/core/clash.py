"""Who else on this node uses what is ours: policy rules, tables, ports, tunnels, a closed FORWARD.

Rules: pure; what was seen comes in, words for people go out. Only what disturbs us, or is disturbed
by us, is a clash: a rule after ours that our packets never come to is none.

Source: ip-rule(8); tests/unit/test_clash.py holds our numbers against those that Calico, Cilium,
flannel and kube-proxy document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from lbctl.core.names import (
    AGENT_HTTP_PORT,
    MARK_BASE,
    MARK_MASK,
    PROBE_PORT,
    RULE_PRIORITY,
    TUNNEL_PORT,
)

LAST_PRIORITY = RULE_PRIORITY + 4
PORTS: dict[tuple[str, int], str] = {
    ("udp", PROBE_PORT): "probes are not answered, the node is no next hop",
    ("tcp", AGENT_HTTP_PORT): "the agent has no health check and no metrics",
    ("udp", TUNNEL_PORT): "nodes in other subnets are not reached",
}


class Kind(StrEnum):
    """What is used twice; the metric's label."""

    RULE = "rule"
    ROUTE = "route"
    PORT = "port"
    VXLAN = "vxlan"
    FORWARD = "forward"


@dataclass(frozen=True, slots=True, order=True)
class Clash:
    """One, in words: what it is, and what it breaks."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """A policy rule that is not ours. mask 0: it asks for no mark. invert: for all but that."""

    version: int
    priority: int
    mark: int = 0
    mask: int = 0
    invert: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What was seen of others. routes: IP version, table (one of ours) and destination.

    ports: protocol and number, as in PORTS, held by another process. vxlans: name, UDP port and VNI
    of other devices. closed: base chains at the forward hook that drop by policy, none of whose own
    rules speaks of our marks, as nft calls them ("ip filter FORWARD").
    """

    rules: tuple[ForeignRule, ...] = ()
    routes: tuple[tuple[int, int, str], ...] = ()
    ports: tuple[tuple[str, int], ...] = ()
    vxlans: tuple[tuple[str, int, int], ...] = ()
    closed: tuple[str, ...] = ()


def clashes(seen: Surroundings, numbers: Iterable[int]) -> tuple[Clash, ...]:
    """Return what clashes, sorted. numbers: of the nodes that packets are steered to."""
    marks = tuple(MARK_BASE + number for number in numbers)
    found = {
        *(clash for rule in seen.rules for clash in _of_rule(rule, marks)),
        *_of_the_rest(seen),
    }
    return tuple(sorted(found))


def _of_rule(rule: ForeignRule, marks: tuple[int, ...]) -> Iterator[Clash]:
    name = f"policy rule {rule.priority} of IPv{rule.version}"
    if RULE_PRIORITY <= rule.priority <= LAST_PRIORITY:
        yield Clash(
            Kind.RULE,
            f"{name} lies among ours ({RULE_PRIORITY} to {LAST_PRIORITY}): "
            "which of them comes first is left to chance",
        )
    if not rule.mask:
        return
    asked = f"{'not ' if rule.invert else ''}{rule.mark:#x}/{rule.mask:#x}"
    if rule.priority < RULE_PRIORITY and any(_takes(rule, mark) for mark in marks):
        yield Clash(
            Kind.RULE,
            f"{name} (mark {asked}) comes before ours and matches marks of steered packets: "
            "they may leave by its table",
        )
    elif (
        not rule.invert
        and rule.mask & MARK_MASK == MARK_MASK
        and rule.mark & MARK_MASK == MARK_BASE
    ):
        yield Clash(
            Kind.RULE,
            f"{name} (mark {asked}) is for marks that are ours ({MARK_BASE:#x}/{MARK_MASK:#x}): "
            "its packets are dropped or steered",
        )


def _takes(rule: ForeignRule, mark: int) -> bool:
    return (mark & rule.mask == rule.mark) != rule.invert


def _of_the_rest(seen: Surroundings) -> Iterator[Clash]:
    for version, table, destination in seen.routes:
        text = (
            f"route to {destination} in table {table} of IPv{version} is not ours: steered packets"
        )
        yield Clash(Kind.ROUTE, f"{text} may take it")
    for protocol, number in seen.ports:
        effect = PORTS[protocol, number]
        yield Clash(Kind.PORT, f"{protocol.upper()} port {number} is taken by another: {effect}")
    for name, number, vni in seen.vxlans:
        if number == TUNNEL_PORT:
            text = f"VXLAN device {name} (VNI {vni}) uses our UDP port {number}"
            yield Clash(Kind.VXLAN, f"{text}: its packets are dropped")
    for chain in seen.closed:
        yield Clash(
            Kind.FORWARD,
            f"chain {chain} drops what it does not know, steered packets too: let it accept mark "
            f"{MARK_BASE:#x}/{MARK_MASK:#x}",
        )
