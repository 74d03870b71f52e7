"""Drills: files are checked whole when they are read; what was seen is judged as it should be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lbctl.errors import DrillError
from lbctl.lab.drill import report, spec
from lbctl.lab.drill.spec import Drill
from lbctl.lab.drill.verdict import (
    Evidence,
    FaultSeen,
    FlowSeen,
    HopsSeen,
    RequestSeen,
    judge,
    unharmed,
)

GOOD = """\
about: a node dies
services:
  - {name: web, replicas: 6}
traffic:
  - {service: web, flows: 10, requests: 5, timeout: 800ms}
timeline:
  - {at: 2s, do: powerCut, machine: node-3}
  - {at: 1s, do: heal}
expect:
  broken: 0
  failed: 1
  outage: 1s
  gap: 2s
  nextHops: [node-2, node-1]
  entered: {node-3: 0.2}
  steered: 0.2
sabotage:
  about: nobody notices
  fails: [outage, nextHops]
  timeline:
    - {at: 0s, do: freeze, what: "manager@*"}
"""


def drill() -> Drill:
    return spec.parse(GOOD, "good", "good.yml")


def test_every_drill_that_is_here_can_be_read() -> None:
    found = [spec.find(name) for name in spec.names()]
    assert len(found) >= 10
    for one in found:
        assert one.sabotage_timeline, one.name
        assert (spec.DRILLS.parent / f"{one.topology}.clab.yml").exists(), one.name


def test_steps_are_in_order_and_sabotage_comes_first() -> None:
    assert [str(step) for step in drill().steps(sabotaged=True)] == [
        "freeze what manager@*",
        "heal",
        "powerCut machine node-3",
    ]
    assert len(drill().steps(sabotaged=False)) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("do: powerCut", "do: powercut", "good.yml:7:5: timeline[0]: there is no fault 'powercut'"),
        ("machine: node-3", "node: node-3", "timeline[0]: powerCut takes machine, not 'node'"),
        (", machine: node-3", "", "timeline[0]: powerCut needs 'machine'"),
        ("machine: node-3", "machine: 3", "timeline[0]: powerCut: machine: input should be a"),
        ("at: 2s", "at: soon", "timeline[0]: must be a duration"),
        ("- {service: web,", "- {service: wob,", "5:15: traffic[0].service: there is no service"),
        ("replicas: 6", "replicas: 0", "3:27: services[0].replicas: input should be greater"),
        ("outage: 1s", "outtage: 1s", "expect.outtage: unknown key"),
        ("about: a node dies\n", "", "about: field required"),
        ("fails: [outage", "fails: [outag", "fails[0]: this drill does not expect 'outag'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(DrillError) as caught:
        spec.parse(GOOD.replace(old, new), "good", "good.yml")
    assert said in str(caught.value)


def test_an_unknown_drill_names_those_that_there_are() -> None:
    with pytest.raises(DrillError, match="node-dies"):
        spec.find("no-such-drill")


def flow(pod: str, node: str, entered: str, broken: str = "", gap_s: float = 0.1) -> FlowSeen:
    return FlowSeen("web", "TCP", pod, node, entered, broken, 3.0 if broken else 0.0, gap_s, 2.0)


SEEN = Evidence(
    flows=(
        flow("web-1", "node-1", "node-3"),
        flow("web-2", "node-2", "node-2", gap_s=1.5),
        flow("web-3", "node-3", "node-3", broken="reset"),
        flow("web-4", "node-1", "node-1", broken="reset"),
    ),
    requests=(
        RequestSeen("web", -0.5, 0.01, ""),
        RequestSeen("web", 2.4, 0.8, "timed out"),
        RequestSeen("web", 3.0, 0.01, ""),
    ),
    faults=(FaultSeen(2.0, 2.1, "powerCut machine node-3"),),
    hops=(
        HopsSeen(-1.0, "web", "tor-a", ("node-1", "node-2", "node-3")),
        HopsSeen(2.3, "web", "tor-a", ("node-1", "node-2")),
        HopsSeen(-1.0, "web", "tor-b", ("node-1", "node-2", "node-3")),
        HopsSeen(2.4, "web", "tor-b", ("node-1", "node-2")),
    ),
    dead=frozenset({"node-3"}),
    gone=frozenset({"web-4"}),
    services={"web": "198.51.100.0"},
    began_s=-2.0,
    ended_s=12.0,
)


def failed(seen: Evidence) -> list[str]:
    return [check.name for check in judge(drill(), seen) if not check.held]


def test_flows_to_dead_nodes_and_ended_pods_do_not_count() -> None:
    assert failed(SEEN) == []


@pytest.mark.parametrize(
    ("seen", "name"),
    [
        (replace(SEEN, gone=frozenset()), "connections to living pods broken"),
        (replace(SEEN, dead=frozenset()), "connections to living pods broken"),
        (
            replace(SEEN, flows=(*SEEN.flows, flow("web-1", "node-1", "node-3", gap_s=2.5))),
            "longest silence",
        ),
        (
            replace(SEEN, requests=(*SEEN.requests, RequestSeen("web", 3.1, 0.8, "timed out"))),
            "outage of new connections",
        ),
        (replace(SEEN, requests=()), "new connections failed"),
        (replace(SEEN, hops=SEEN.hops[:-1]), "next hops of web on tor-b at the end"),
        (replace(SEEN, flows=SEEN.flows[1:2]), "flows that entered at node-3"),
        (replace(SEEN, flows=SEEN.flows[1:3]), "flows that were steered"),
    ],
)
def test_each_expectation_can_fail(seen: Evidence, name: str) -> None:
    assert name in failed(seen)


def test_a_sabotage_is_seen_in_what_it_should_have_broken() -> None:
    assert unharmed(drill(), SEEN) == ("outage", "nextHops")
    late = (*SEEN.requests, RequestSeen("web", 3.1, 0.8, "timed out"))
    assert unharmed(drill(), replace(SEEN, requests=late)) == ("nextHops",)
    assert unharmed(drill(), replace(SEEN, requests=late, hops=SEEN.hops[:-1])) == ()


def test_the_report_is_one_file_and_escapes_what_it_shows() -> None:
    odd = replace(SEEN, faults=(FaultSeen(2.0, 2.1, "powerCut <script>"),))
    page = report.html(report.Title("good", "a node dies"), odd, judge(drill(), odd))
    assert "<script" not in page and "powerCut &lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    assert page.count("<svg") == 5
