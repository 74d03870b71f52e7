"""Drills: files are checked whole when they are read; what was seen is judged as it should be."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from lbctl.errors import DrillError
from lbctl.lab import delaying, downloads, flooding
from lbctl.lab.drill import report, spec
from lbctl.lab.drill.spec import Drill
from lbctl.lab.drill.verdict import (
    Check,
    Evidence,
    FaultSeen,
    FloodSeen,
    FlowSeen,
    HopsSeen,
    ReceivedSeen,
    RequestSeen,
    RolledSeen,
    judge,
    unharmed,
)
from tests.bench.drills import Run, table

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
        assert one.sabotage_timeline or one.sabotage_prepare, one.name
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
        (
            "powerCut, machine: node-3",
            "delay, of: controls, away: nodes, ms: soon",
            "timeline[0]: delay: ms: input should be a valid integer",
        ),
        ("machine: node-3", "machine: 3", "timeline[0]: powerCut: machine: input should be a"),
        ("at: 2s", "at: soon", "timeline[0]: must be a duration"),
        ("- {service: web,", "- {service: wob,", "5:15: traffic[0].service: there is no service"),
        ("replicas: 6", "replicas: 0", "3:27: services[0].replicas: input should be greater"),
        ("outage: 1s", "outtage: 1s", "expect.outtage: unknown key"),
        ("about: a node dies\n", "", "about: field required"),
        ("machine: node-3", "machine: node-9", "timeline[0].machine: there is no machine 'node-9'"),
        ("manager@*", "manager@node-9", "timeline[0].what: there is no machine 'node-9'"),
        (
            "powerCut, machine: node-3",
            "scale, service: wob, replicas: 2",
            "7:34: timeline[0].service: there is no service 'wob' in this drill",
        ),
        (
            "powerCut, machine: node-3",
            "flood, service: web, rate: 999999, seconds: 9.0",
            "timeline[0]: flood: rate: input should be less than or equal to 20000",
        ),
        ("about: a node dies\n", "about: x\ntopology: smal\n", "there is no topology 'smal'; "),
        (
            "powerCut, machine: node-3",
            "drain, node: nodes",
            "timeline[0].node: there is no node 'nodes' in",
        ),
        ("steered: 0.2", "steered: 20", "expect.steered: input should be less than"),
        ("{node-3: 0.2}", "{node-9: 0.2}", "expect.entered.node-9: there is no machine"),
        ("steered: 0.2", "latency: {wob: 2.0}", "expect.latency.wob: there is no service"),
        (
            "steered: 0.2",
            "throughput: [{after: 3, mbit: 1.0}]",
            "throughput[0].after: the timeline has 2 steps",
        ),
        (
            "  - {name: web, replicas: 6}\n",
            "  - {name: web}\n  - {name: web}\n",
            "services[1].name: there are two services 'web'",
        ),
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
    dead={"node-3": 2.0},
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
        (replace(SEEN, dead={}), "connections to living pods broken"),
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
        (replace(SEEN, hops=(), off=frozenset({"tor-a"})), "next hops at the end"),
        (replace(SEEN, flows=()), "connections to living pods broken"),
        (replace(SEEN, flows=()), "longest silence"),
        (replace(SEEN, dead={"node-3": 3.5}), "connections to living pods broken"),
        (replace(SEEN, rolled=(RolledSeen("managers", 1, 2),)), "managers rolled at the end"),
        (replace(SEEN, rolled=(RolledSeen("web", 0, 0),)), "web rolled at the end"),
        (replace(SEEN, flows=SEEN.flows[1:2]), "flows that entered at node-3"),
        (replace(SEEN, flows=SEEN.flows[1:3]), "flows that were steered"),
    ],
)
def test_each_expectation_can_fail(seen: Evidence, name: str) -> None:
    assert name in failed(seen)


def test_a_switch_that_is_off_at_the_end_is_not_asked_and_one_that_is_back_is() -> None:
    seen = replace(SEEN, dead={**SEEN.dead, "tor-b": 1.0}, hops=SEEN.hops[:-1])
    assert failed(replace(seen, off=frozenset({"tor-b"}))) == []
    assert failed(seen) == ["next hops of web on tor-b at the end"]


def test_downloads_that_stall_until_the_end_are_judged_to_the_end() -> None:
    wanted = spec.Expect.model_validate({"throughput": [{"after": 2, "mbit": 8}]}, strict=False)
    stalled = replace(LOADED, received=tuple(r for r in LOADED.received if r.at_s < 15.0))
    [check] = judge(replace(drill(), expect=wanted), stalled)
    assert not check.held and check.value and check.value < 5


def test_what_waits_when_a_fault_begins_is_that_ones() -> None:
    faults = (FaultSeen(-1.0, -0.9, "addNode"), *SEEN.faults, FaultSeen(4.0, 4.1, "powerCut"))
    seen = replace(SEEN, faults=faults, requests=(RequestSeen("web", 3.9, 0.8, "timed out"),))
    assert seen.outage_s() == 0.0
    seen = replace(seen, requests=(RequestSeen("web", 3.1, 0.8, "timed out"),))
    assert seen.outage_s() == pytest.approx(1.1)


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


LOADED = replace(
    SEEN,
    faults=(FaultSeen(0.0, 0.1, "rate", 1), FaultSeen(10.0, 10.1, "addNode", 2)),
    received=tuple(
        ReceivedSeen(at_s / 2, "web", f"node-{1 + at_s % 3}", 1_000_000) for at_s in range(40)
    ),  # 16 Mbit/s
    requests=tuple(RequestSeen("web", at_s / 10, 0.01, "") for at_s in range(-20, 150)),
    floods=(FloodSeen("web", 1000, 900),),
    leaders=("m1", "m1"),
)
SHIFTED = replace(LOADED, received=tuple(replace(r, at_s=r.at_s + 0.3) for r in LOADED.received))


@pytest.mark.parametrize(
    ("expect", "seen", "held"),
    [
        ({"throughput": [{"after": 1, "mbit": 15}]}, LOADED, True),
        ({"throughput": [{"after": 1, "mbit": 17}]}, LOADED, False),
        ({"throughput": [{"after": 1, "mbit": 16}]}, SHIFTED, True),
        ({"throughput": [{"after": 1, "mbit": 16.1}]}, SHIFTED, False),
        ({"throughput": [{"after": 2, "mbit": 14}]}, LOADED, True),
        ({"throughput": [{"after": 2, "mbit": 15}]}, replace(LOADED, received=()), False),
        ({"throughput": [{"after": 2, "mbit": 1}]}, replace(LOADED, faults=()), False),
        ({"latency": {"web": 2.0}}, LOADED, True),
        (
            {"latency": {"web": 2.0}},
            replace(
                LOADED,
                requests=tuple(
                    replace(r, took_s=0.01 if r.start_s < 5 else 0.03) for r in LOADED.requests
                ),
            ),
            False,
        ),
        ({"latency": {"web": 2.0}}, replace(LOADED, requests=()), False),
        ({"flooded": 0.8}, LOADED, True),
        ({"flooded": 0.95}, LOADED, False),
        ({"flooded": 0.8}, replace(LOADED, floods=()), False),
        ({"leader": "kept"}, LOADED, True),
        ({"leader": "kept"}, replace(LOADED, leaders=("m1", "m2")), False),
        ({"leader": "kept"}, replace(LOADED, leaders=("", "")), False),
        ({"changes": 2}, LOADED, True),
        ({"changes": 1}, LOADED, False),
        ({"changes": 9}, replace(LOADED, hops=()), False),
    ],
)
def test_load_floods_and_clocks_are_judged(
    expect: dict[str, Any], seen: Evidence, held: bool
) -> None:
    wanted = spec.Expect.model_validate(expect, strict=False)
    checks = judge(replace(drill(), expect=wanted), seen)
    assert [check.held for check in checks] == [held]


def test_preparations_of_the_sabotage_come_first() -> None:
    prepared = GOOD.replace("timeline:", "prepare: [{do: heal}]\ntimeline:", 1).replace(
        "  fails:", "  prepare: [{do: fakeClocks, of: agents}]\n  fails:"
    )
    found = spec.parse(prepared, "good", "good.yml")
    assert [step.fault for step in found.preparations(sabotaged=True)] == ["fakeClocks", "heal"]
    assert [step.fault for step in found.preparations(sabotaged=False)] == ["heal"]


@pytest.mark.parametrize("kind", ["syn", "udp"])
def test_packets_of_a_flood_have_right_checksums(kind: flooding.Kind) -> None:
    target = bytes((198, 51, 100, 1))
    made = flooding.packet(kind, 123_456, target, 80)
    head, body = made[:20], made[20:]
    assert head[16:20] == target and body[2:4] == b"\0\x50"
    pseudo = head[12:20] + bytes((0, head[9], 0, len(body)))
    assert flooding.checksum(pseudo + body) == 0
    assert head[12:16] != flooding.packet(kind, 123_457, target, 80)[12:16]


def test_downloads_are_metered_by_pod_and_half_second() -> None:
    meter = downloads.Meter([], [])
    for pod in ("a", "b", "a"):
        meter.count(pod, 10)
    assert sum(size for _, pod, size in meter.received if pod == "a") == 20
    assert {at_s % downloads.BIN_S for at_s, _, _ in meter.received} == {0.0}


def test_a_queue_of_late_packets_is_read_as_the_kernel_writes_it() -> None:
    packets = b"".join(
        delaying.message(3 << 8, 0, 1, 1, struct.pack("!IHB", number, 0x800, 0))
        for number in (7, 0x01020304)
    )
    assert list(delaying.numbers(packets)) == [7, 0x01020304]
    refused = struct.pack("=IHHII", 36, 2, 0, 0, 0) + struct.pack("=i", -1) + b"\0" * 16
    with pytest.raises(OSError, match="refuses"):
        list(delaying.numbers(refused))


def test_the_bench_tells_how_runs_are_distributed() -> None:
    def one(outage_s: float, error: str = "") -> Run:
        held = outage_s <= 1.0
        check = Check("outage", "at most 1 s", f"{outage_s:.2f} s", held, outage_s, "s")
        return Run("good", "07:00:00", outage_s, 12.0, 8.0, () if error else (check,), error)

    lines = list(table([*(one(tenths / 10) for tenths in range(1, 13)), one(0.0, "no EIP")]))
    assert lines[0].strip() == (
        "good: 13 runs, 10 held, 2 did not, 1 could not be run; load 0.0 to 1.2"
    )
    assert lines[-1] == "| outage | 10 of 12 | 0.1 s | 0.65 s | 1.1 s | 1.2 s |"
