"""A dual-stack Service: both EIPs on both switches, and the same promises over both families."""

from __future__ import annotations

import time

import pytest

from lbctl.kube import client as kube
from lbctl.lab import entries
from lbctl.lab.api import wait
from lbctl.lab.load import Load

from .support import System

CLIENT6 = "2001:db8:3::10"
NODES = ("node-1", "node-2", "node-3")


def deploy(
    system: System, name: str, replicas: int, ports: tuple[tuple[str, int, int], ...] = ()
) -> tuple[str, str]:
    """A Service that asks for both families; its IPv4 and IPv6 EIP once both are routed to."""
    more = (("TCP", 80, 8080), *ports)
    system.deploy(name, replicas, ports=more, families="RequireDualStack")
    four, six = wait(f"both EIPs of {name}", lambda: pair(system.api.eips_of(name)))
    system.wait_routed(six)
    return four, six


def pair(eips: list[str]) -> tuple[str, str] | None:
    """IPv4 and IPv6, None while one is missing."""
    four, six = ([eip for eip in eips if (":" in eip) == is_six] for is_six in (False, True))
    return (four[0], six[0]) if four and six else None


@pytest.mark.both
def test_both_eips_answer_and_the_clients_address_arrives(system: System) -> None:
    four, six = deploy(system, "both", 3, (("UDP", 53, 8053),))
    for eip, peer in ((four, "203.0.113.10"), (six, CLIENT6)):
        assert {reply.peer for reply in system.replies(eip, 60)} == {peer}
        wait("all pods to be reached", lambda eip=eip: len(system.spread(eip, 60)) == 3)  # type: ignore[misc]
        with Load.start(system.lab.machine("client"), eip, 53, datagrams=12) as load:
            begin = time.monotonic()
            wait("a second of datagrams", lambda begin=begin: time.monotonic() > begin + 1)  # type: ignore[misc]
            report = load.stop()
        assert not [flow for flow in report.datagrams if flow.broken], report.datagrams
        assert all(flow.answered == flow.sent > 5 for flow in report.datagrams), report.datagrams


def test_the_second_family_comes_and_goes(system: System) -> None:
    four = system.deploy("grows", 2)
    assert system.api.eips_of("grows") == [four]
    change(system, "grows", "PreferDualStack")
    both = wait("an EIP of each family", lambda: pair(system.api.eips_of("grows")))
    assert both[0] == four
    system.wait_routed(both[1])
    assert len(system.replies(both[1], 10)) == 10
    change(system, "grows", "SingleStack")
    wait("the IPv6 EIP to leave the status", lambda: system.api.eips_of("grows") == [four])
    system.wait_routed(both[1], to=())
    assert len(system.replies(four, 10)) == 10


def change(system: System, name: str, policy: str) -> None:
    """Set a Service's `ipFamilyPolicy`."""
    system.api.patch(kube.SERVICES, name, {"spec": {"ipFamilyPolicy": policy}})


@pytest.mark.both
def test_node_power_cut_breaks_no_connection_to_a_living_pod_in_either_family(
    system: System,
) -> None:
    """DESIGN.md's traffic rule, 100 flows in each family at once."""
    four, six = deploy(system, "twice", 6)
    on = system.api.pod_nodes("twice")
    client = system.lab.machine("client")
    entries.watch(system.lab, [four, six])
    with (
        Load.start(client, four, 80, flows=100) as old,
        Load.start(client, six, 80, flows=100, probes_per_s=20, timeout_s=0.8) as new,
    ):
        entered = entries.take(system.lab)
        old.mark("cut")
        at = new.mark("cut")
        system.lab.power_cut("node-1")
        wait("10 s of traffic after the cut", lambda: time.monotonic() > at + 10)
        reports = {four: old.stop(), six: new.stop()}
    for eip, report in reports.items():
        assert len(report.flows) == 100
        through = [f for f in report.flows if entered[eip, f.local_port] == "node-1"]
        steered = [f for f in report.flows if entered[eip, f.local_port] != on[f.pod]]
        assert len(through) >= 20, "a fifth entered by the node that died"
        assert len(steered) >= 20, "a fifth was steered"
        broken = [flow for flow in report.flows if on[flow.pod] != "node-1" and flow.broken]
        assert not broken, f"{eip}: {len(broken)}: {broken[:3]}"
        assert any(flow.broken for flow in report.flows), "those of the dead pods must end"
    print(f"outage of new IPv6 connections {reports[six].outage_s('cut'):.2f} s")
    assert reports[six].outage_s("cut") < 1.0, reports[six].failed_probes()
    for eip in (four, six):
        system.wait_routed(eip, to=NODES[1:])
