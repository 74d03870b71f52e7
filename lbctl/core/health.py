"""Judging nodes: from evidence (probes, kernel, Kubernetes, the other managers) to a state.

Pure. Two steps: the `probe_*`/`kernel_*` functions note evidence on one `Health`; `judge` derives
one `Signal` per node and looks the next state up in `TABLE`, the only place where states change.
DESIGN.md, "Judging nodes", is the specification. Times are monotonic seconds.

Rules beyond the table:
- A stall of our own does not count as misses, at most PARDONS times in a row.
- Where nodes are many and their turns far apart, one that does not answer is asked again before its
  turn (`early`); not if more than EARLY do, for then they may be most, and panic has to see them
  fall together.
- More than half of the nodes (and at least two) gone at once is *panic*: such nodes are Suspect but
  `held`. The other manager decides; without one, or if it cannot name all that it calls gone,
  NotReady or PANIC_S do.
- If no manager sees any node, nothing is won by believing it: what is between managers and nodes
  may have failed (a link, a firewall's rule). Then NotReady alone decides, and after it
  for as long as that lasted, AT_ONCE_S at most: nodes are not heard again in the same moment.
- A node that was held until it answered again has not fallen.
- A node that fell is back after RETURN_ANSWERS answers in a row. From its second fall on it is Up
  but not `stable` for a time that doubles to STABLE_MAX_S.
- A node of which no manager ever had an answer stays Unknown: it is in no down set and no panic.
  But one whose agent Kubernetes calls ready has had an agent, and is Suspect once agent and kernel
  have been silent for UNHEARD_S: it died while no manager ran. A manager that has just started
  takes over what another one calls it (Suspect there is CONFIRMED here).
- NotReady of a node that answers counts after KUBELETS_S: leases run out, and kubelets are heard
  again, one after the other. It does not count at all while it is most nodes, as when an API server
  is back that was away, nor for KUBELETS_S after that: a node that misses probes meanwhile is asked
  for its kernel as any other.
- An agent whose kernel answers is AgentSilent only after SILENT_S: nothing is decided differently
  before, and on a busy node answers come in bursts.
- A kernel that answers after a silence of more than REBOOT_S may have rebooted, and has lost its
  forwarding: only a probe answer counts then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from lbctl.core.endpoints import KUBELETS_S
from lbctl.core.model import NodeState
from lbctl.core.probe import node_hash
from lbctl.core.reasons import Reason

RETURN_ANSWERS = 3
PARDONS = 3
PANIC_S = 30.0
AT_ONCE_S = 1.0  # falls within this time are "at once", or four intervals where those are longer
REBOOT_S = 2.0
SILENT_S = 1.0
UNHEARD_S = 2.0
STABLE_FIRST_S = 1.0
STABLE_MAX_S = 60.0
FORGIVE_S = 300.0  # Up for so long: earlier falls are forgotten
MAX_PROBES_PER_S = 2000.0
EARLY = 25  # a quarter of those that are asked at the same time


@dataclass(frozen=True, slots=True)
class Limits:
    """What the configuration says about probing; `interval_s` as `interval` grew it."""

    interval_s: float = 0.05
    misses: int = 3
    agent_grace_s: float = 300.0

    @property
    def kernel_window_s(self) -> float:
        """How long one answer of a node's kernel stands; it is asked at every miss."""
        return 2.0 * (self.misses + 1) * self.interval_s

    @property
    def at_once_s(self) -> float:
        """Falls within this time belong together."""
        return max(AT_ONCE_S, 4.0 * self.interval_s)


def interval(base_s: float, nodes: int) -> float:
    """Return the probe interval: `base_s`, longer where that would pass MAX_PROBES_PER_S."""
    return max(base_s, nodes / MAX_PROBES_PER_S)


def early(silent_s: Mapping[str, float], now_s: float, base_s: float) -> list[str]:
    """Return the nodes to ask again though it is not their turn, sorted.

    silent_s: when those that were Up and have not answered were asked. base_s: how long an answer
    may take, the interval of few nodes.
    """
    due = sorted(name for name, asked_s in silent_s.items() if now_s - asked_s >= base_s)
    return due if len(due) <= EARLY else []


class Signal(Enum):
    """What the evidence on a node amounts to now."""

    NOT_READY = auto()  # Kubernetes calls it NotReady
    WAIT = auto()  # not enough evidence for anything new
    ANSWERS = auto()  # the last probe was answered
    STEADY = auto()  # and those before it
    KERNEL = auto()  # the agent is silent, the kernel answers
    LOST = auto()  # agent and kernel are silent, or the agent for too long
    CONFIRMED = auto()  # LOST, and another manager says so too


_S = NodeState
TABLE: Mapping[tuple[NodeState, Signal], NodeState] = {
    (_S.UNKNOWN, Signal.NOT_READY): _S.UNKNOWN,
    (_S.UNKNOWN, Signal.WAIT): _S.UNKNOWN,
    (_S.UNKNOWN, Signal.ANSWERS): _S.UP,
    (_S.UNKNOWN, Signal.STEADY): _S.UP,
    (_S.UNKNOWN, Signal.KERNEL): _S.UNKNOWN,
    (_S.UNKNOWN, Signal.LOST): _S.SUSPECT,
    (_S.UNKNOWN, Signal.CONFIRMED): _S.DOWN,
    (_S.UP, Signal.NOT_READY): _S.DOWN,
    (_S.UP, Signal.WAIT): _S.UP,
    (_S.UP, Signal.ANSWERS): _S.UP,
    (_S.UP, Signal.STEADY): _S.UP,
    (_S.UP, Signal.KERNEL): _S.AGENT_SILENT,
    (_S.UP, Signal.LOST): _S.SUSPECT,
    (_S.UP, Signal.CONFIRMED): _S.DOWN,
    (_S.AGENT_SILENT, Signal.NOT_READY): _S.DOWN,
    (_S.AGENT_SILENT, Signal.WAIT): _S.AGENT_SILENT,
    (_S.AGENT_SILENT, Signal.ANSWERS): _S.UP,
    (_S.AGENT_SILENT, Signal.STEADY): _S.UP,
    (_S.AGENT_SILENT, Signal.KERNEL): _S.AGENT_SILENT,
    (_S.AGENT_SILENT, Signal.LOST): _S.SUSPECT,
    (_S.AGENT_SILENT, Signal.CONFIRMED): _S.DOWN,
    (_S.SUSPECT, Signal.NOT_READY): _S.DOWN,
    (_S.SUSPECT, Signal.WAIT): _S.SUSPECT,
    (_S.SUSPECT, Signal.ANSWERS): _S.SUSPECT,
    (_S.SUSPECT, Signal.STEADY): _S.UP,
    (_S.SUSPECT, Signal.KERNEL): _S.AGENT_SILENT,
    (_S.SUSPECT, Signal.LOST): _S.SUSPECT,
    (_S.SUSPECT, Signal.CONFIRMED): _S.DOWN,
    (_S.DOWN, Signal.NOT_READY): _S.DOWN,
    (_S.DOWN, Signal.WAIT): _S.DOWN,
    (_S.DOWN, Signal.ANSWERS): _S.DOWN,
    (_S.DOWN, Signal.STEADY): _S.UP,
    (_S.DOWN, Signal.KERNEL): _S.DOWN,
    (_S.DOWN, Signal.LOST): _S.SUSPECT,
    (_S.DOWN, Signal.CONFIRMED): _S.DOWN,
}
GONE = frozenset({_S.SUSPECT, _S.DOWN})
_SERVING = frozenset({_S.UP, _S.AGENT_SILENT})


@dataclass(frozen=True, slots=True)
class Health:
    """Evidence on one node, and the judgement.

    ready, agent: what Kubernetes says of the node, and of its agent's Pod. unready_s: since when it
    counts that it is not, infinite while it does not.
    misses, answers: in a row. silent_s: when the misses began. alive_s: last sign of life in an
    unbroken chain; kernel_s: last answer of the kernel within it. since_s: when `state` began.
    settled: gone, and nothing holds it any more. blind_s: when no manager saw any node, the
    last time, and blind_for_s: how long. falls: times that it was gone, lately.
    """

    name: str
    state: NodeState = NodeState.UNKNOWN
    ready: bool = True
    agent: bool = False
    unready_s: float = -math.inf
    misses: int = 0
    answers: int = 0
    silent_s: float = 0.0
    alive_s: float | None = None
    kernel_s: float | None = None
    since_s: float = 0.0
    held: bool = False
    settled: bool = False
    blind_s: float = -math.inf
    blind_for_s: float = 0.0
    falls: int = 0
    stable_from_s: float = 0.0
    reason: Reason | None = Reason.NODE_UNKNOWN

    def stable(self, now_s: float) -> bool:
        """Return False while a node that keeps falling has to prove itself."""
        return now_s >= self.stable_from_s

    @property
    def expected(self) -> bool:
        """Return True for a node that has never answered us, and should."""
        return self.state is NodeState.UNKNOWN and self.agent and self.misses > 0

    @property
    def decided(self) -> bool:
        """Return False for a node of which nothing is known yet."""
        return self.state is not NodeState.UNKNOWN or self.misses > 0


@dataclass(frozen=True, slots=True)
class PeerView:
    """What another manager, heard within the last second, says. `gone`: node hashes. `whole`: it
    calls no more gone than it can name (probe.MAX_NODES)."""

    manager: str
    judging: bool
    announcing: bool
    seen: int
    gone: frozenset[int]
    whole: bool = True


def told(health: Health, ready: bool, agent: bool, now_s: float) -> Health:
    """Note what Kubernetes says of the node, and of its agent's Pod."""
    if (health.ready, health.agent) == (ready, agent):
        return health
    unready_s = health.unready_s if ready or not health.ready else now_s
    return replace(health, ready=ready, agent=agent, unready_s=unready_s)


def probe_answered(health: Health, now_s: float) -> Health:
    """Note an authenticated answer to an open probe."""
    answers = min(health.answers + 1, RETURN_ANSWERS)
    return replace(health, misses=0, answers=answers, alive_s=now_s, kernel_s=None)


def probe_missed(health: Health, now_s: float) -> Health:
    """Note that one interval passed without an answer.

    One miss alone does not end a row of answers: an answer may take longer than an interval.
    """
    silent_s = health.silent_s if health.misses else now_s
    answers = 0 if health.misses else health.answers
    return replace(health, misses=health.misses + 1, answers=answers, silent_s=silent_s)


def kernel_answered(health: Health, now_s: float) -> Health:
    """Note a SYN-ACK or RST from the node; it counts only in an unbroken chain (REBOOT_S)."""
    if health.alive_s is not None and now_s - health.alive_s > REBOOT_S:
        return health
    return replace(health, alive_s=now_s, kernel_s=now_s)


def stalled(health: Health, duration_s: float, now_s: float) -> Health:
    """Shift what is dated, after we did not run ourselves for `duration_s`."""

    def shifted(moment_s: float) -> float:
        return min(moment_s + duration_s, now_s)

    return replace(
        health,
        silent_s=shifted(health.silent_s),
        alive_s=None if health.alive_s is None else shifted(health.alive_s),
        kernel_s=None if health.kernel_s is None else shifted(health.kernel_s),
    )


def pardon(lag_s: float, interval_s: float, pardons: int) -> bool:
    """Return whether the misses of a tick that came `lag_s` late are forgiven.

    Not for ever: a manager that is always late still has to notice dead nodes.
    """
    return lag_s > max(interval_s, 0.05) and pardons < PARDONS


def judge(
    nodes: Mapping[str, Health], peers: Iterable[PeerView], now_s: float, limits: Limits
) -> dict[str, Health]:
    """Judge all nodes. Returns the new Health of those that changed.

    peers: the other managers heard within the last second.
    """
    uneasy = sorted(name for name, health in nodes.items() if not _calm(health, now_s))
    if not uneasy:
        return {}
    judging = tuple(peer for peer in peers if peer.judging)
    panic, none_left = _panic(nodes, now_s, limits)
    mass = _mass_not_ready(nodes, limits)
    seen_here = seen(nodes.values())
    blind = panic if none_left and not any(peer.seen for peer in judging) else frozenset()
    changed: dict[str, Health] = {}
    for name in uneasy:
        old = nodes[name]
        known = _counted(old, mass, now_s)
        known = _blinded(known, now_s, limits) if name in blind else known
        after_s = min(known.blind_for_s, limits.at_once_s)
        spared = name in blind or now_s - known.blind_s < after_s
        signal = _signal(known, () if spared else judging, now_s, limits)
        new = _enter(known, TABLE[old.state, signal], now_s)
        if spared and new.state is NodeState.SUSPECT:
            new = _held(new, True, False)
        else:
            new = _hold(new, panic, judging, seen_here, now_s, limits)
        if (reason := _reason(new, now_s)) is not new.reason:
            new = replace(new, reason=reason)
        if new is not old and new != old:
            changed[name] = new
    return changed


def gone(nodes: Iterable[Health]) -> frozenset[int]:
    """Return what a heartbeat tells the other managers: hashes of nodes Suspect or Down."""
    return frozenset(node_hash(health.name) for health in nodes if health.state in GONE)


def down_set(nodes: Iterable[Health]) -> frozenset[int]:
    """Return what requests tell the agents: as `gone`, without the nodes that panic holds."""
    return frozenset(
        node_hash(health.name) for health in nodes if health.state in GONE and not health.held
    )


def seen(nodes: Iterable[Health]) -> int:
    """Return how many nodes are seen alive."""
    return sum(health.state in _SERVING and health.misses < 2 for health in nodes)


def _calm(health: Health, now_s: float) -> bool:
    """A node that is Up and answers: nothing to judge, and most nodes are so most of the time."""
    return (
        health.state is NodeState.UP
        and health.ready
        and not health.misses
        and health.reason is None
        and (not health.falls or now_s - health.since_s < FORGIVE_S)
    )


def _kernel_alive(health: Health, now_s: float, limits: Limits) -> bool:
    return (
        health.misses > 0
        and health.kernel_s is not None
        and health.kernel_s >= health.silent_s
        and now_s - health.kernel_s <= limits.kernel_window_s
    )


def _signal(
    health: Health,
    peers: tuple[PeerView, ...],
    now_s: float,
    limits: Limits,
) -> Signal:
    lost = health.misses >= limits.misses
    unknown = health.state is NodeState.UNKNOWN
    counts = not health.ready and not unknown and health.unready_s < math.inf
    if counts and (lost or now_s - health.unready_s >= KUBELETS_S):
        return Signal.NOT_READY
    if not lost:
        if health.answers >= RETURN_ANSWERS:
            return Signal.STEADY
        return Signal.ANSWERS if health.answers else Signal.WAIT
    silence_s = now_s - health.silent_s
    if (unknown or silence_s <= limits.agent_grace_s) and _kernel_alive(health, now_s, limits):
        brief = health.state is NodeState.UP and silence_s < SILENT_S
        return Signal.WAIT if brief else Signal.KERNEL
    if any(node_hash(health.name) in peer.gone for peer in peers):
        return Signal.CONFIRMED
    if unknown and not (health.agent and silence_s >= UNHEARD_S):
        return Signal.WAIT
    # No manager left to ask: what was confirmed stays confirmed.
    confirmed = not peers and health.state is NodeState.DOWN and health.settled
    return Signal.CONFIRMED if confirmed else Signal.LOST


def _enter(health: Health, state: NodeState, now_s: float) -> Health:
    """Move to a state, with what that means for the memory of falls."""
    old = health.state
    if state is NodeState.UP and health.falls and now_s - health.since_s >= FORGIVE_S:
        health = replace(health, falls=0, since_s=now_s)
    if state is old:
        return health
    if old is NodeState.SUSPECT and health.held and state not in GONE:
        return replace(health, state=state, since_s=now_s, falls=max(0, health.falls - 1))
    if state in GONE:
        fell = old in _SERVING
        since_s = health.since_s if old in GONE else now_s
        return replace(health, state=state, since_s=since_s, falls=health.falls + fell)
    wait_s = 0.0
    if old in GONE and health.falls > 1:
        wait_s = min(STABLE_FIRST_S * 2.0 ** (health.falls - 2), STABLE_MAX_S)
    stable_from_s = now_s + wait_s if wait_s else health.stable_from_s
    return replace(health, state=state, since_s=now_s, stable_from_s=stable_from_s, settled=False)


def _hold(
    health: Health,
    panic: frozenset[str],
    peers: tuple[PeerView, ...],
    seen_here: int,
    now_s: float,
    limits: Limits,
) -> Health:
    """Decide `held` and `settled` of a node that may be gone."""
    if health.state is NodeState.DOWN:
        return _held(health, False, True)
    if health.state is not NodeState.SUSPECT:
        return _held(health, False, False)
    if health.settled or (health.held and not health.misses):  # it answers again
        return health
    since_s = now_s - health.since_s
    if health.name in panic:
        most = max((peer.seen for peer in peers), default=seen_here)
        told = bool(peers) and all(peer.whole for peer in peers)
        held = seen_here <= most and (told or since_s < PANIC_S)
        return _held(health, held, not held)
    return _held(health, False, since_s >= limits.at_once_s)


def _blinded(health: Health, now_s: float, limits: Limits) -> Health:
    """With the time in which no manager sees any node; noted now and then, for all are judged."""
    since_s = now_s - health.blind_s
    if since_s < limits.at_once_s / 4:
        return health
    lately = since_s < limits.at_once_s / 2
    return replace(health, blind_s=now_s, blind_for_s=health.blind_for_s + since_s if lately else 0)


def _held(health: Health, held: bool, settled: bool) -> Health:
    """With these; the same object if it is so already, for a thousand nodes are judged often."""
    if health.held == held and health.settled == settled:
        return health
    return replace(health, held=held, settled=settled)


def _panic(
    nodes: Mapping[str, Health], now_s: float, limits: Limits
) -> tuple[frozenset[str], bool]:
    """Return the nodes that are gone at once if they are too many to believe it, else none.

    And whether no other node is left.
    A node one miss short of Suspect counts as gone: when the first of many falls, the others are
    about to.
    """
    going: list[str] = []
    going_or_gone = 0
    staying = 0
    for name, health in nodes.items():
        if health.state is NodeState.SUSPECT and not health.settled:
            going.append(name)
        elif health.state is NodeState.DOWN:
            going_or_gone += health.ready and now_s - health.since_s < limits.at_once_s
        elif health.state in _SERVING or health.expected:
            about_to = health.misses >= max(limits.misses - 1, 1)
            if about_to and not _kernel_alive(health, now_s, limits):
                going.append(name)
            else:
                staying += 1
    going_or_gone += len(going)
    if going_or_gone < 2 or going_or_gone <= staying:
        return frozenset(), False
    return frozenset(going), not staying


def _mass_not_ready(nodes: Mapping[str, Health], limits: Limits) -> bool:
    """Return whether more than half of the nodes, two at least, are NotReady and not silent.

    Then it is Kubernetes that has a problem, not the nodes.
    """
    odd = sum(not health.ready and health.misses < limits.misses for health in nodes.values())
    return odd >= 2 and 2 * odd > len(nodes)


def _counted(health: Health, mass: bool, now_s: float) -> Health:
    """With the time from which NotReady counts, where most nodes are so (`mass`), or were."""
    if health.ready or mass == (health.unready_s == math.inf):
        return health
    return replace(health, unready_s=math.inf if mass else now_s)


def _reason(health: Health, now_s: float) -> Reason | None:
    """Why the node is no next hop whatever the EIP, or is one in spite of something; None: Up."""
    if health.state is NodeState.UP:
        return None if health.stable(now_s) else Reason.NODE_FLAPPING
    if health.state is NodeState.SUSPECT:
        return Reason.HELD_BY_PANIC if health.held else Reason.NODE_SUSPECT
    if health.state is NodeState.DOWN:
        return Reason.NODE_DOWN if health.ready else Reason.NODE_NOT_READY
    return Reason.AGENT_SILENT if health.state is NodeState.AGENT_SILENT else Reason.NODE_UNKNOWN
