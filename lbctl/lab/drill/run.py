"""Runs one drill on a site: Services, traffic, the timeline, and what was seen.

Rules: the faults are carried out by the thread that calls `run`; one more thread looks at the
switches. Nothing is judged here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from lbctl.core import names
from lbctl.errors import LabError
from lbctl.kube import client as kube
from lbctl.lab import entries
from lbctl.lab.api import wait
from lbctl.lab.drill import faults
from lbctl.lab.drill.site import Site
from lbctl.lab.drill.spec import Drill, DrillService, Traffic
from lbctl.lab.drill.verdict import (
    Evidence,
    FaultSeen,
    FloodSeen,
    FlowSeen,
    HopsSeen,
    ReceivedSeen,
    RequestSeen,
    RolledSeen,
)
from lbctl.lab.load import Count, Load, Report
from lbctl.lab.traffic import FlowRecord

LOOK_S: Final = 0.25  # between looks at the switches' kernels
SHOW_S: Final = 0.5
_PORT: Final = 80
_LEASE_S: Final = 20.0  # in which it is renewed several times, and another one takes over
_NOTHING: Final = Count()


@dataclass(frozen=True, slots=True)
class Now:
    """What happens at this moment, for a live view. counts: totals since traffic began."""

    at_s: float
    text: str
    counts: Count = _NOTHING
    hops: tuple[tuple[str, str, tuple[str, ...]], ...] = ()  # service, switch, next hops


Show = Callable[[Now], None]


@dataclass(slots=True)
class Eyes:
    """Watches the switches' kernels from a thread of its own."""

    site: Site
    begin_s: float
    seen: list[HopsSeen] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Note every change until `ended`."""
        last: dict[tuple[str, str], tuple[str, ...]] = {}
        while True:
            done = self.ended.is_set()
            for service, eip in sorted(self.site.services.items()):
                with suppress(LabError):  # a switch may lose its power while it is asked
                    for switch, hops in self.site.hops(eip).items():
                        if last.get((service, switch)) != hops:
                            last[service, switch] = hops
                            at_s = time.monotonic() - self.begin_s
                            self.seen.append(HopsSeen(at_s, service, switch, hops))
            if done:
                return
            self.ended.wait(LOOK_S)

    def now(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """The last that was seen."""
        last = {(seen.service, seen.switch): seen.hops for seen in list(self.seen)}
        return tuple((service, switch, hops) for (service, switch), hops in sorted(last.items()))


def run(site: Site, drill: Drill, sabotaged: bool, show: Show) -> Evidence:
    """Run it. Raises LabError for what could not be done; the site is then as it is."""
    for step in drill.preparations(sabotaged):
        show(Now(0.0, str(step)))
        faults.inject(site, step.fault, step.arguments)
    _deploy(site, drill, show)
    pods = {s.name: site.api.pod_nodes(s.name) for s in drill.services}
    entries.watch(site.lab, site.services.values())
    with ExitStack() as stack:
        show(Now(0.0, "starting the traffic"))
        loads = [(t, stack.enter_context(start_load(site, t))) for t in drill.traffic]
        begin_s = time.monotonic() + drill.before_s
        eyes = stack.enter_context(watched(site, begin_s))
        pass_time(begin_s, begin_s, "traffic runs", loads, eyes, show)
        entered = entries.take(site.lab)
        leader = _leader(site) if drill.expect.leader else ""
        done = _timeline(site, drill, sabotaged, begin_s, loads, eyes, show)
        reports = [(traffic, load.stop()) for traffic, load in loads]
        floods = tuple(FloodSeen(f.service, f.asked, f.sent()) for f in site.floods)
    after = {s.name: site.api.pod_nodes(s.name) for s in drill.services}
    gone = {pod for name, on in pods.items() for pod in on if pod not in after[name]}
    return Evidence(
        flows=tuple(flows_seen(site, reports, pods, entered, begin_s)),
        requests=tuple(requests_seen(reports, begin_s)),
        faults=done,
        hops=tuple(eyes.seen),
        dead={name: at_s - begin_s for name, at_s in site.dead.items()},
        gone=frozenset(gone | site.crashed),
        services=dict(site.services),
        began_s=min(report.started_s for _, report in reports) - begin_s,
        ended_s=max(report.ended_s for _, report in reports) - begin_s,
        received=tuple(_received(reports, pods, after, begin_s)),
        floods=floods,
        leaders=(leader, _leader(site) if drill.expect.leader else ""),
        off=frozenset(machine.name for machine in site.lab.machines if not machine.alive),
        rolled=tuple(RolledSeen(what, *site.rolled(what)) for what in sorted(site.rolls)),
    )


def _deploy(site: Site, drill: Drill, show: Show) -> None:
    for service in drill.services:
        show(Now(0.0, f"deploying {service.name}"))
        site.deploy(service.name, service.replicas, service.policy)
    for service in drill.services:
        wait_routed(site, service)


def _leader(site: Site) -> str:
    """Who holds the Lease and renews it; "" if nobody does. Clocks may be wrong here."""

    def spec() -> dict[str, Any]:
        lease = site.api.find(kube.LEASES, names.LEASE, names.NAMESPACE) or {}
        return dict(lease.get("spec") or {})

    first = spec()
    try:
        wait("the Lease to be renewed", lambda: spec() != first, limit_s=_LEASE_S)
    except LabError:
        return ""
    return str(spec().get("holderIdentity") or "")


def wait_routed(site: Site, service: DrillService) -> None:
    wanted = {node.name for node in site.lab.of_role("node") if node.alive}
    if service.policy == "Local":
        wanted = set(site.api.pod_nodes(service.name).values())
    eip = site.services[service.name]
    try:
        wait(
            f"every switch to route {service.name} to {', '.join(sorted(wanted))}",
            lambda: all(set(hops) == wanted for hops in site.hops(eip).values()),
        )
    except LabError as error:
        raise LabError(f"{error}; {'; '.join(_routed(site, eip))}") from error


def _routed(site: Site, eip: str) -> Iterator[str]:
    """What the switches have, and why each manager announces it so."""
    for switch, hops in site.hops(eip).items():
        yield f"{switch} has {', '.join(hops) or 'no route'}"
    for machine in site.lab.of_role("control"):
        state = site.manager_state(machine)
        mine = [one for one in state.eips if str(one.address) == eip] if state else []
        said = [f"{hop.node} {hop.reason}" for one in mine for hop in one.hops]
        yield f"{machine.name} says {', '.join(said) or 'nothing of it'}"


def start_load(site: Site, traffic: Traffic) -> Load:
    return Load.start(
        site.lab.machine("client"),
        site.services[traffic.service],
        _PORT,
        flows=traffic.flows,
        probes_per_s=float(traffic.requests),
        datagrams=traffic.datagrams,
        timeout_s=traffic.timeout,
        downloads=traffic.downloads,
        core=traffic.core,
    )


@contextmanager
def watched(site: Site, begin_s: float) -> Iterator[Eyes]:
    eyes = Eyes(site, begin_s)
    thread = threading.Thread(target=eyes.look, name="drill-eyes")
    thread.start()
    try:
        yield eyes
    finally:
        eyes.ended.set()
        thread.join()


def _timeline(
    site: Site,
    drill: Drill,
    sabotaged: bool,
    begin_s: float,
    loads: list[tuple[Traffic, Load]],
    eyes: Eyes,
    show: Show,
) -> tuple[FaultSeen, ...]:
    done = []
    own = drill.steps(sabotaged=False)
    for step in drill.steps(sabotaged):
        pass_time(begin_s + step.at_s, begin_s, f"until {step}", loads, eyes, show)
        started_s = time.monotonic()
        show(Now(started_s - begin_s, str(step), _NOTHING, eyes.now()))
        faults.inject(site, step.fault, step.arguments)
        number = own.index(step) + 1 if step in own else 0
        done_s = time.monotonic() - begin_s
        done.append(FaultSeen(started_s - begin_s, done_s, str(step), number))
    end_s = time.monotonic() + drill.after_s
    pass_time(end_s, begin_s, "all faults are in; traffic goes on", loads, eyes, show)
    return tuple(done)


def pass_time(
    until_s: float,
    begin_s: float,
    text: str,
    loads: list[tuple[Traffic, Load]],
    eyes: Eyes,
    show: Show,
) -> None:
    """Let the traffic run until then, and show how it does."""
    while (left := until_s - time.monotonic()) > 0:
        time.sleep(min(left, SHOW_S))
        counts = [load.count() for _, load in loads]
        total = Count(*(sum(values) for values in zip(*(c.values() for c in counts), strict=True)))
        show(Now(time.monotonic() - begin_s, text, total, eyes.now()))


def flows_seen(
    site: Site,
    reports: list[tuple[Traffic, Report]],
    pods: dict[str, dict[str, str]],
    entered: dict[tuple[str, int], str],
    begin_s: float,
) -> Iterator[FlowSeen]:
    for traffic, report in reports:
        eip, on = site.services[traffic.service], pods[traffic.service]
        for protocol, records in (("TCP", report.flows), ("UDP", report.datagrams)):
            for record in records:
                at = entered.get((eip, record.local_port), "")
                seen = _flow(traffic.service, protocol, record, on, begin_s)
                yield replace(seen, entered=at)


def _flow(
    service: str, protocol: str, record: FlowRecord, on: dict[str, str], begin_s: float
) -> FlowSeen:
    return FlowSeen(
        service,
        protocol,
        record.pod,
        on.get(record.pod, ""),
        "",
        record.broken,
        record.broken_at_s - begin_s if record.broken else 0.0,
        record.longest_gap_s,
        record.gap_at_s - begin_s,
    )


def requests_seen(reports: list[tuple[Traffic, Report]], begin_s: float) -> Iterator[RequestSeen]:
    for traffic, report in reports:
        for probe in report.probes:
            yield RequestSeen(traffic.service, probe.start_s - begin_s, probe.took_s, probe.error)


def _received(
    reports: list[tuple[Traffic, Report]],
    before: dict[str, dict[str, str]],
    after: dict[str, dict[str, str]],
    begin_s: float,
) -> Iterator[ReceivedSeen]:
    for traffic, report in reports:
        on = before[traffic.service] | after[traffic.service]
        for at_s, pod, size in report.received:
            yield ReceivedSeen(at_s - begin_s, traffic.service, on.get(pod, ""), size)
