"""What breaks, and what nobody may notice, under DESIGN.md's traffic rule."""

from __future__ import annotations

import json
import time

import pytest

from lbctl.lab import control, entries
from lbctl.lab.api import wait
from lbctl.lab.load import Load, Report

from .support import SWITCHES, System

QUIET_S = 10.0  # traffic goes on so long after the fault (the quick suite's)


def drive_on(load: Load, since_s: float, seconds: float = QUIET_S) -> Report:
    """Keep the load running until `seconds` after `since_s`, then stop it."""
    wait(
        f"{seconds:.0f} s of traffic after the fault",
        lambda: time.monotonic() > since_s + seconds,
        limit_s=seconds + 30,
    )
    return load.stop()


def assert_untouched(report: Report) -> None:
    """No flow broke, no new connection failed."""
    assert not report.broken(), report.broken()[:3]
    assert not report.failed_probes(), report.failed_probes()[:3]
    assert len(report.probes) > 50


def test_manager_host_dies_and_no_request_is_lost(system: System) -> None:
    eip = system.deploy("steady")
    with Load.start(
        system.lab.machine("client"), eip, 80, flows=40, probes_per_s=20, timeout_s=3
    ) as load:
        at = load.mark("cut")
        system.lab.power_cut("control-1")
        report = drive_on(load, at, seconds=14.0)  # beyond the hold time of 9 s
    assert_untouched(report)
    system.wait_routed(eip)


def test_killed_containers_and_a_frozen_exabgp_are_not_felt(system: System) -> None:
    eip = system.deploy("calm")
    pod = system.managers()["control-1"]
    with Load.start(
        system.lab.machine("client"), eip, 80, flows=40, probes_per_s=20, timeout_s=3
    ) as load:
        control.kill_container(system.lab, pod, "manager")
        system.wait_system_ready()
        control.kill_container(system.lab, pod, "speaker")
        wait_sessions(system, eip)
        control.freeze(system.lab, pod, "speaker", "exabgp")
        at = load.mark("frozen")
        wait_sessions(system, eip, limit_s=90)
        report = drive_on(load, at)
    assert_untouched(report)
    system.wait_routed(eip)


def wait_sessions(system: System, eip: str, limit_s: float = 60.0) -> None:
    """Both switches have both managers' full set of paths for the EIP again."""

    def full() -> bool:
        for switch in ("tor-a", "tor-b"):
            summary = system.vtysh(switch, "show bgp ipv4 unicast summary json")
            peers = summary.get("ipv4Unicast", summary).get("peers", {})
            if any(peer["state"] != "Established" for peer in peers.values()):
                return False
            routes = system.vtysh(switch, "show bgp ipv4 unicast json")["routes"]
            if len(routes.get(f"{eip}/32", ())) != 6:
                return False
        return True

    wait("six paths on both switches", full, limit_s=limit_s)


@pytest.mark.both
def test_node_power_cut_with_200_connections(system: System) -> None:
    eip = system.deploy("busy", replicas=6)
    on = system.api.pod_nodes("busy")
    assert sorted(on.values()) == ["node-1", "node-1", "node-2", "node-2", "node-3", "node-3"]
    entries.watch(system.lab, [eip])
    with Load.start(
        system.lab.machine("client"), eip, 80, flows=200, probes_per_s=30, timeout_s=0.8
    ) as load:
        entered = entries.take(system.lab)
        at = load.mark("cut")
        system.lab.power_cut("node-3")
        report = drive_on(load, at)
    assert len(report.flows) == 200
    through = [f for f in report.flows if entered[eip, f.local_port] == "node-3"]
    steered = [f for f in report.flows if entered[eip, f.local_port] != on[f.pod]]
    assert len(through) >= 40, "a fifth entered by the node that died"
    assert len(steered) >= 40, "a fifth was steered"
    living = [flow for flow in report.flows if on[flow.pod] != "node-3"]
    assert len(living) >= 80
    broken = [flow for flow in living if flow.broken]
    assert not broken, f"{len(broken)} of {len(living)}: {broken[:3]}"
    assert any(flow.broken for flow in report.flows), "those of the dead pods must end"
    print(f"outage of new connections {report.outage_s('cut'):.2f} s")
    assert report.outage_s("cut") < 1.0, report.failed_probes()
    system.wait_routed(eip, to=("node-1", "node-2"))


def test_a_rebooted_node_with_pods_takes_nobodys_connections(system: System) -> None:
    """Its agent has no past; the flows that were others' meanwhile go back to them."""
    eip = system.deploy("reboot", replicas=6)
    others = ("node-1", "node-2")
    system.lab.power_cut("node-3")
    system.wait_routed(eip, to=others)
    with Load.start(system.lab.machine("client"), eip, 80, flows=150, timeout_s=5) as load:
        system.lab.power_on("node-3")
        system.wait_system_ready()
        system.wait_routed(eip)
        at = load.mark("back")
        report = drive_on(load, at, seconds=5.0)
    assert not report.broken(), report.broken()[:3]
    on = system.api.pod_nodes("reboot")
    wait(  # it has buckets again, so flows were at stake
        "new connections to a pod on node-3",
        lambda: any(on[pod] == "node-3" for pod in system.spread(eip, 60)),
    )


def test_frr_restarted(system: System) -> None:
    eip = system.deploy("again")
    bgpd = system.lab.machine("tor-a").run("cat", "/run/frr/bgpd.pid").stdout.strip()
    system.lab.machine("tor-a").run("kill", "-9", bgpd)
    wait(
        "tor-a to be without a BGP process",
        lambda: system.lab.machine("tor-a").run("kill", "-0", bgpd, check=False).returncode != 0,
    )
    system.lab.machine("tor-a").run(
        "/usr/lib/frr/bgpd", "-d", "-A", "127.0.0.1", "-f", "/etc/frr/frr.conf", check=False
    )
    wait_sessions(system, eip, limit_s=90)
    system.wait_routed(eip)
    assert len(system.replies(eip, 20)) == 20


def test_foreign_hand_in_the_nodes_tables_is_repaired(system: System) -> None:
    eip = system.deploy("mended")
    node = system.lab.machine("node-2")
    table = [
        line
        for line in node.run("nft", "list", "tables").stdout.splitlines()
        if line.endswith(" lbctl")
    ]
    assert table
    for line in table:
        node.run("nft", "delete", *line.split())
    rules = node.run("ip", "rule", "show").stdout.splitlines()
    ours = [line.split(":")[0] for line in rules if "0x4c0" in line]
    assert ours, rules
    for priority in ours:
        node.run("ip", "rule", "del", "priority", priority)

    def mended() -> bool:
        tables = node.run("nft", "list", "tables").stdout
        rules_now = node.run("ip", "rule", "show").stdout.splitlines()
        # Rules of one priority stand in the order in which they came.
        return all(line in tables for line in table) and sorted(rules_now) == sorted(rules)

    wait("table and rules to be back", mended, limit_s=30)
    assert len(system.spread(eip, 120)) == 4


def test_unknown_port_reaches_no_host_socket_and_does_not_loop(system: System) -> None:
    eip = system.deploy("closed")
    client = system.lab.machine("client")
    listener = "import socket,time;s=socket.create_server(('0.0.0.0',2222));time.sleep(600)"
    servers = [node.popen("python3", "-c", listener) for node in system.lab.of_role("node")]
    try:
        for node in system.lab.of_role("node"):
            wait(
                f"a socket on {node.name}",
                lambda node=node: client_connects(system, node.address, 2222),  # type: ignore[misc]
            )
        for switch in SWITCHES:
            system.lab.machine(switch).run("nft", "-f", "-", input=_RETURNED.format(eip=eip))
        for port in (2222, 81, 7481):
            done = client.run(
                *("curl", "-sv", "--connect-timeout", "3", f"http://{eip}:{port}/"), check=False
            )
            assert done.returncode == 7, f"port {port}: {done.stderr}"  # refused, not timed out
        assert {switch: returned(system, switch) for switch in SWITCHES} == {"tor-a": 0, "tor-b": 0}
    finally:
        for server in servers:
            server.kill()
            server.wait()


def client_connects(system: System, address: str, port: int) -> bool:
    """Whether the client gets a TCP connection."""
    script = f"import socket;socket.create_connection(('{address}',{port}),2)"
    done = system.lab.machine("client").run("python3", "-c", script, check=False)
    return done.returncode == 0


_RETURNED = """
add table ip watch
delete table ip watch
table ip watch {{
  counter returned {{ }}
  chain see {{
    type filter hook prerouting priority -450;
    iifname "eth1" ip daddr {eip} counter name returned
  }}
}}
"""


def returned(system: System, switch: str) -> int:
    """Packets to the EIP that came back to a switch from the nodes' side."""
    said = system.lab.machine(switch).run("nft", "-j", "list", "counter", "ip", "watch", "returned")
    found = [item["counter"] for item in json.loads(said.stdout)["nftables"] if "counter" in item]
    return int(found[0]["packets"])
