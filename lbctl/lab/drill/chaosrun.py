"""Carries out a plan of `chaos`: round after round, until one does not hold.

Rules: a fault that cannot be put in (its process is just starting, say) is said and not counted. A
round ends when everything holds, at the latest `HEAL_S` after healing began; then new connections
must succeed for a while. After a round that does not hold the lab is left as it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from lbctl.errors import KubeError, LabError, LbctlError
from lbctl.kube import client as kube
from lbctl.lab import workload
from lbctl.lab.api import DEPLOYMENTS
from lbctl.lab.drill import faults, invariants, snapshot
from lbctl.lab.drill.chaos import STEADY, Asked, Rack, Round
from lbctl.lab.drill.run import (
    Eyes,
    Now,
    Show,
    flows_seen,
    pass_time,
    requests_seen,
    start_load,
    wait_routed,
    watched,
)
from lbctl.lab.drill.site import PRE_STOP_S, Site
from lbctl.lab.drill.spec import DrillService, Traffic
from lbctl.lab.drill.verdict import Check, Evidence, FaultSeen, FlowSeen, RequestSeen
from lbctl.lab.load import Load

HEAL_S: Final = 90.0
_AFTER_S: Final = 2.0  # of new connections once everything holds
_TARGET: Final = 8080
_SERVICE: Final = DrillService(name=STEADY, replicas=6)
_TRAFFIC: Final = Traffic(service=STEADY, flows=20, requests=10, timeout=3.0)
# Addresses are free again soon, so that what is left over is seen within a quiet period.
CONFIG: Final = workload.CONFIG.replace("announce: {}", "announce: {reuseAfter: 3s}")


@dataclass(slots=True)
class Seen:
    """What all rounds so far have shown."""

    flows: list[FlowSeen] = field(default_factory=list)
    requests: list[RequestSeen] = field(default_factory=list)
    faults: list[FaultSeen] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: int = 0


def rack_of(site: Site) -> Rack:
    """Who is in a lab, as a plan wants it."""
    cables = {}
    for machine in site.lab.machines:
        if links := site.lab.topology.links_of(machine.name):
            end = links[0].far(machine.name)
            cables[machine.name] = (end.node, end.interface)
    nodes, controls, switches = (
        tuple(machine.name for machine in site.lab.of_role(role))
        for role in ("node", "control", "switch")
    )
    return Rack(nodes, controls, switches, cables)


def run(
    site: Site, plan: tuple[Round, ...], show: Show, told: Callable[[str], None]
) -> tuple[Evidence, tuple[Check, ...]]:
    """Run a plan. told: gets a line per round. Raises LabError if the lab does not heal."""
    show(Now(0.0, "looking at the lab as it is"))
    usual = snapshot.programs(site)
    site.config = CONFIG
    site.configure()
    site.deploy(STEADY, _SERVICE.replicas, _SERVICE.policy)
    wait_routed(site, _SERVICE)
    seen = Seen()
    begin_s = time.monotonic()
    with watched(site, begin_s) as eyes:
        for one in plan:
            held = _round(site, one, usual, begin_s, eyes, seen, show)
            told(_line(one, seen.checks[-1], held, time.monotonic() - begin_s))
            if not held:
                break
    evidence = Evidence(
        flows=tuple(seen.flows),
        requests=tuple(seen.requests),
        faults=tuple(seen.faults),
        hops=tuple(eyes.seen),
        dead={},
        gone=frozenset(),
        services=dict(site.services),
        began_s=0.0,
        ended_s=time.monotonic() - begin_s,
    )
    done = len(seen.faults) - seen.skipped
    return evidence, (
        *seen.checks,
        Check("faults put in", "1 or more", f"{done}, {seen.skipped} could not be", done > 0),
    )


def _line(one: Round, last: Check, held: bool, at_s: float) -> str:
    return f"{at_s:7.1f} s  {'held' if held else 'FAILED'}  {one}" + (
        f"  ({last.found})" if held else ""
    )


def _round(
    site: Site,
    one: Round,
    usual: dict[str, Counter[str]],
    begin_s: float,
    eyes: Eyes,
    seen: Seen,
    show: Show,
) -> bool:
    pods = {STEADY: site.api.pod_nodes(STEADY)}
    with ExitStack() as stack:
        try:
            load = stack.enter_context(start_load(site, _TRAFFIC))
        except LabError as error:
            name = f"round {one.number}: connections before it"
            seen.checks.append(Check(name, "all open", str(error), False))
            return False
        loads = [(_TRAFFIC, load)]
        for change in one.changes:
            show(Now(time.monotonic() - begin_s, str(change)))
            _change(site, change)
        _break(site, one, begin_s, loads, eyes, seen, show)
        healed_s = time.monotonic()
        show(Now(healed_s - begin_s, "all is healed; what must hold is looked at"))
        found = _healed(site, usual, begin_s, healed_s + HEAL_S, show)
        took_s = time.monotonic() - healed_s
        calm_s = time.monotonic()
        pass_time(calm_s + _AFTER_S, begin_s, "quiet", loads, eyes, show)
        report = load.stop()
    seen.flows += flows_seen(site, [(_TRAFFIC, report)], pods, {}, begin_s)
    requests = list(requests_seen([(_TRAFFIC, report)], begin_s))
    seen.requests += requests
    late = [r for r in requests if r.start_s >= calm_s - begin_s]
    seen.checks += _judged(one, found, late, took_s)
    return seen.checks[-1].held


def _judged(
    one: Round, found: tuple[Check, ...], late: list[RequestSeen], took_s: float
) -> list[Check]:
    """One line for a round that holds, else one for each thing that does not."""
    failed = [request for request in late if request.error]
    calm = Check(
        "new connections once all holds",
        "0 failed",
        f"{len(failed)} of {len(late)}" + (f" ({failed[0].error})" if failed else ""),
        bool(late) and not failed,
    )
    name = f"round {one.number}"
    wrong = [check for check in (*found, calm) if not check.held]
    if not wrong:
        return [Check(name, "all holds", f"{took_s:.1f} s after healing began", True)]
    return [Check(f"{name}: {check.name}", check.wanted, check.found, False) for check in wrong]


def _break(
    site: Site,
    one: Round,
    begin_s: float,
    loads: list[tuple[Traffic, Load]],
    eyes: Eyes,
    seen: Seen,
    show: Show,
) -> None:
    """Put in the faults of a round, and let them be for a while."""
    start_s = time.monotonic()
    for step in one.steps:
        pass_time(start_s + step.at_s, begin_s, f"until {step}", loads, eyes, show)
        at_s = time.monotonic() - begin_s
        show(Now(at_s, str(step)))
        text = f"{one.number}: {step}"
        try:
            faults.inject(site, step.fault, step.arguments)
        except LbctlError as error:
            seen.skipped += 1
            text += f" (not done: {error})"
            show(Now(at_s, text))
        seen.faults.append(FaultSeen(at_s, time.monotonic() - begin_s, text))
    end_s = time.monotonic() + one.hold_s
    pass_time(end_s, begin_s, "all faults are in", loads, eyes, show)


def _healed(
    site: Site, usual: dict[str, Counter[str]], begin_s: float, until_s: float, show: Show
) -> tuple[Check, ...]:
    """Undo the faults; the invariants as soon as all hold, or as they are when the time is over."""
    try:
        site.mend()
    except LbctlError as error:
        return (Check("all processes run again", "always", str(error), False),)
    site.dead.clear()
    site.crashed.clear()
    while True:
        try:
            found = invariants.check(snapshot.take(site, usual))
        except KubeError as error:
            found = (Check("the API server answers", "always", str(error), False),)
        wrong = [check for check in found if not check.held]
        if time.monotonic() > until_s:
            return found if wrong else (Check("healed", f"in {HEAL_S:g} s", "later", False),)
        if not wrong:
            return found
        show(Now(time.monotonic() - begin_s, f"not yet {wrong[0].name}: {wrong[0].found}"))
        time.sleep(0.5)


def _change(site: Site, asked: Asked) -> None:
    """Make a Service and its Deployment as asked for; does not wait."""
    if not asked.replicas:
        site.api.delete(kube.SERVICES, asked.name)
        site.api.delete(DEPLOYMENTS, asked.name)
        site.passing.discard(asked.name)
        return
    ports = (("TCP", asked.port, _TARGET),)
    service = workload.service(
        asked.name, ports=ports, policy=asked.policy, families=asked.families
    )
    if asked.sharing:
        service["metadata"]["annotations"] = {snapshot.SHARING: asked.sharing}
    site.passing.add(asked.name)
    site.api.apply(
        workload.deployment(asked.name, asked.replicas, pre_stop_s=PRE_STOP_S),
        service,
    )
