"""The rack does what a real one does: VRRP, ECMP by layer 4, BGP policy, power cuts, growth."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lbctl.errors import LabError
from lbctl.lab import switch
from lbctl.lab.lab import Lab
from lbctl.lab.load import Load

from .rack import EIP, VRRP, end, pings, poll, settled, start_server, traces, vrrp

HOPS = ["192.0.2.21", "192.0.2.22", "192.0.2.23"]


def routed(lab: Lab, name: str) -> bool:
    """Whether a switch's kernel routes the EIP to every node."""
    return lab.kernel_routes(name, f"{EIP}/32") == HOPS


@pytest.fixture
def eip(rack: Lab) -> Iterator[str]:
    """An address on every node with a server behind it, routed to all nodes by hand."""
    routes = [f"ip route {EIP}/32 {hop}" for hop in HOPS]
    servers = []
    for name in ("tor-a", "tor-b"):
        args = [word for line in ("configure terminal", *routes) for word in ("-c", line)]
        rack.machine(name).run("vtysh", *args)
    for machine in rack.of_role("node"):
        machine.run("ip", "address", "add", f"{EIP}/32", "dev", "lo")
        servers.append(start_server(machine))
    for name in ("tor-a", "tor-b"):
        poll(
            f"{name}'s kernel route",
            partial(routed, rack, name),
        )
    yield EIP
    for server in servers:
        end(server)
    for machine in rack.of_role("node"):
        if machine.alive:
            machine.run("ip", "address", "del", f"{EIP}/32", "dev", "lo", check=False)
    for name in ("tor-a", "tor-b"):
        lines = ["configure terminal", *(f"no {route}" for route in routes)]
        rack.machine(name).run("vtysh", *(word for line in lines for word in ("-c", line)))


def test_client_reaches_nodes_through_the_vrrp_gateway(rack: Lab) -> None:
    client = rack.machine("client")
    assert pings(client, "192.0.2.22")
    neighbours = json.loads(client.run("ip", "-j", "neigh", "show", "203.0.113.254").stdout)
    assert neighbours[0]["lladdr"] == "00:00:5e:00:01:14"
    node = rack.machine("node-2")
    neighbours = json.loads(node.run("ip", "-j", "neigh", "show", "192.0.2.254").stdout)
    assert neighbours[0]["lladdr"] == "00:00:5e:00:01:0a"


def test_the_ipv6_gateway_is_the_vrrp_pair_too(rack: Lab) -> None:
    client, node = rack.machine("client"), rack.machine("node-2")
    assert pings(client, "2001:db8:1::22")
    for machine, gateway, mac in (
        (client, "2001:db8:3::fe", "00:00:5e:00:02:14"),
        (node, "2001:db8:1::fe", "00:00:5e:00:02:0a"),
    ):
        (neighbour,) = json.loads(machine.run("ip", "-j", "neigh", "show", gateway).stdout)
        assert neighbour["lladdr"] == mac


def test_new_connections_spread_by_layer_4(rack: Lab, eip: str) -> None:
    with Load.start(rack.machine("client"), eip, 80, probes_per_s=150, timeout_s=30) as load:
        first = load.mark("start")
        poll("150 probes to be due", lambda: time.monotonic() - first > 2)
        report = load.stop()
    assert report.failed_probes() == ()
    count = Counter(probe.pod for probe in report.probes)
    total = sum(count.values())
    assert total >= 150
    assert sorted(count) == ["node-1", "node-2", "node-3"]
    # 150 draws of 1/3: below a fifth has a chance of about 1 in 10,000
    assert min(count.values()) > total / 5, count


def test_the_load_driver_keeps_flows_on_their_node_and_sees_the_client_address(
    rack: Lab, eip: str
) -> None:
    with Load.start(rack.machine("client"), eip, 80, flows=60) as load:
        begin = load.mark("begin")
        poll("two seconds of traffic", lambda: time.monotonic() - begin > 2)
        report = load.stop()
    assert report.broken() == ()
    assert sorted(report.pods()) == ["node-1", "node-2", "node-3"]
    assert {flow.peer.rpartition(":")[0] or flow.peer for flow in report.flows} == {"203.0.113.10"}
    assert all(flow.answered == flow.sent >= 10 for flow in report.flows)


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_the_load_driver_counts_datagrams(rack: Lab, eip: str, family: int) -> None:
    # of the node's own: a server on an EIP of lo would answer from elsewhere
    target = rack.machine("node-2").addresses[family]
    with Load.start(rack.machine("client"), target, 53, datagrams=5) as load:
        begin = load.mark("begin")
        poll("a second of traffic", lambda: time.monotonic() - begin > 1)
        report = load.stop()
    assert [flow.pod for flow in report.datagrams] == ["node-2"] * 5
    assert all(flow.answered >= 5 and not flow.broken for flow in report.datagrams)


def test_the_load_driver_tells_what_broke(rack: Lab, eip: str) -> None:
    """Or a test with it could not fail: a server killed under its flows breaks exactly those."""
    machine = rack.machine("node-2")
    with Load.start(rack.machine("client"), eip, 80, flows=30) as load:
        load.mark("cut")
        pids = machine.run("sh", "-c", "grep -l Listening /proc/[0-9]*/cmdline").stdout.split()
        for pid in pids:
            machine.run("kill", "-9", pid.split("/")[2], check=False)
        at = time.monotonic()
        poll("a second after the kill", lambda: time.monotonic() - at > 1)
        report = load.stop()
    assert {flow.pod for flow in report.broken()} == {"node-2"}
    assert len(report.broken()) == report.pods()["node-2"] > 0


def test_frr_restart_brings_the_routes_back(rack: Lab) -> None:
    machine = rack.machine("tor-b")
    switch.restart(machine)
    poll("tor-b to be VRRP backup again", lambda: vrrp(rack) == VRRP)
    assert "bgp listen range 192.0.2.0/24" in machine.run("vtysh", "-c", "show running").stdout


EXABGP = """
neighbor 192.0.2.1 {
  router-id 192.0.2.11; local-address 192.0.2.11; local-as 64512; peer-as 64500; hold-time 9;
  family { ipv4 unicast; }
  capability { add-path send; }
  static {
    route 198.51.100.9/32 next-hop 192.0.2.21 path-information 0.0.0.1;
    route 198.51.100.9/32 next-hop 192.0.2.23 path-information 0.0.0.2;
    route 198.51.100.128/25 next-hop 192.0.2.21 path-information 0.0.0.1;
    route 203.0.113.99/32 next-hop 192.0.2.21 path-information 0.0.0.1;
    route 198.51.100.10/32 next-hop 192.0.2.22 path-information 0.0.0.1;
  }
}
"""


def test_switch_takes_paths_of_single_addresses_and_nothing_else(rack: Lab, tmp_path: Path) -> None:
    config = tmp_path / "exabgp.conf"
    config.write_text(EXABGP)
    environment = {"exabgp_daemon_user": "root", "exabgp_daemon_drop": "false"}
    speaker = rack.machine("control-1").popen(
        *("env", *(f"{k}={v}" for k, v in environment.items()), "exabgp_api_cli=false"),
        *(sys.executable, "-m", "exabgp", "server", str(config)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        poll(
            "both paths of the last route in tor-a's kernel",
            lambda: rack.kernel_routes("tor-a", "198.51.100.10/32") == ["192.0.2.22"],
        )
        assert rack.kernel_routes("tor-a", "198.51.100.9/32") == ["192.0.2.21", "192.0.2.23"]
        assert rack.kernel_routes("tor-a", "198.51.100.128/25") == []
        assert rack.kernel_routes("tor-a", "203.0.113.99/32") == []
        told = switch.vtysh_json(
            rack.machine("tor-a"),
            "show bgp ipv4 unicast neighbors 192.0.2.11 advertised-routes json",
        )
        assert told["totalPrefixCounter"] == 0
    finally:
        speaker.kill()
        speaker.wait()
    poll(
        "the routes to go with the session",
        lambda: rack.kernel_routes("tor-a", "198.51.100.10/32") == [],
    )


def test_power_cut_of_the_vrrp_master(rack: Lab) -> None:
    client = rack.machine("client")
    assert pings(client, "192.0.2.22")
    rack.power_cut("tor-a")
    try:
        poll("tor-b to take over", lambda: set(vrrp(rack)["tor-b"].values()) == {"Master"})
        for address in ("192.0.2.22", "2001:db8:1::22"):
            poll("the client to reach a node through tor-b", partial(pings, client, address))
    finally:
        rack.power_on("tor-a")
        settled(rack)
    for address in ("192.0.2.22", "2001:db8:1::22"):
        poll("the client to reach a node through tor-a", partial(pings, client, address))


def port_of(lab: Lab, node: str) -> str:
    """The rack's port that a node hangs on."""
    return lab.topology.links_of(node)[0].far(node).interface


def test_power_cut_lets_no_packet_out_and_keeps_carrier(rack: Lab, eip: str) -> None:
    bridge, port = rack.machine("rack"), port_of(rack, "node-3")
    capture = bridge.popen(
        *(
            "tcpdump",
            "-Z",
            "root",
            "-tt",
            "-l",
            "-n",
            "-q",
            "--immediate-mode",
            "-i",
            port,
            "-Q",
            "in",
        ),
        *("not", "arp"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert capture.stderr is not None and capture.stdout is not None
    assert any("listening on" in line for line in capture.stderr)
    with Load.start(rack.machine("client"), eip, 80, flows=30, drain_s=0.5) as load:
        load.mark("cut")
        rack.power_cut("node-3")
        after = time.time()
        received = bridge.run("cat", f"/sys/class/net/{port}/statistics/rx_packets").stdout
        for _ in range(3):
            assert not pings(rack.machine("node-1"), "192.0.2.23")
        report = load.stop()
    assert bridge.run("cat", f"/sys/class/net/{port}/carrier").stdout == "1\n"
    assert bridge.run("cat", f"/sys/class/net/{port}/statistics/rx_packets").stdout == received
    capture.terminate()
    lines = [line for line in capture.communicate()[0].splitlines() if line[:1].isdigit()]
    assert lines, "the capture saw the node's packets before the cut"
    assert [line for line in lines if float(line.split()[0]) > after] == []
    # silence, not a FIN or RST, is what its flows saw
    assert {flow.broken for flow in report.broken()} == {"no answer"}
    assert {flow.pod for flow in report.broken()} == {"node-3"}

    mac = ("ip", "-j", "link", "show", "eth1")
    before = subprocess.run(
        ["nsenter", f"--net={rack.machine('node-3').netns}", *mac], capture_output=True, check=True
    ).stdout
    rack.power_on("node-3")
    poll("node-3 to answer again", lambda: pings(rack.machine("node-1"), "192.0.2.23"))
    now = json.loads(rack.machine("node-3").run(*mac).stdout)
    assert now[0]["address"] == json.loads(before)[0]["address"]
    tables = rack.machine("node-3").run("nft", "list", "tables").stdout
    assert tables == ""


def test_power_cut_and_on_refuse_the_wrong_state(rack: Lab) -> None:
    with pytest.raises(LabError, match="node-1 is on"):
        rack.power_on("node-1")
    rack.power_cut("node-1")
    try:
        with pytest.raises(LabError, match="node-1 is off already"):
            rack.power_cut("node-1")
        with pytest.raises(LabError, match="node-1 is off"):
            rack.machine("node-1").run("true")
    finally:
        rack.power_on("node-1")


def test_add_node(new_lab: Callable[[], Lab]) -> None:
    lab = new_lab()
    three = lab.add_node()
    four = lab.add_node()
    assert [(m.name, m.address, m.pod_cidr) for m in (three, four)] == [
        ("node-3", "192.0.2.23", "10.244.3.0/24"),
        ("node-4", "192.0.2.24", "10.244.4.0/24"),
    ]
    for target in lab.of_role("node"):
        target.run("ip", "address", "add", target.pod_cidr.replace("0/24", "1/24"), "dev", "lo")
    for source in (*lab.of_role("control"), *lab.of_role("node")):
        for target in lab.of_role("node"):
            assert pings(source, target.pod_cidr.replace("0/24", "1")), (source.name, target.name)
    lab.power_cut("node-4")
    Lab.load(lab.name).power_on("node-4")
    poll("node-4 to be back", lambda: pings(lab.machine("control-1"), "192.0.2.24"))


def test_add_node_that_fails_leaves_the_lab_as_it_was(new_lab: Callable[[], Lab]) -> None:
    lab = new_lab()
    before = Lab.load(lab.name).topology
    control = lab.machine("control-1")
    # the last step fails: the route to the new node's pods has a gateway in no network of this host
    control.run("ip", "address", "del", "192.0.2.11/24", "dev", "eth1")
    with pytest.raises(LabError, match=r"control-1: ip route replace 10\.244\.3\.0/24"):
        lab.add_node()
    assert Lab.load(lab.name).topology == lab.topology == before
    assert not [line for line in traces(lab.name) if "node-3" in line and "logs" not in line]
    ports = json.loads(lab.machine("rack").run("ip", "-j", "link").stdout)
    assert sorted(p["ifname"] for p in ports) == ["br0", "eth1", "eth2", "eth3", "lo"]
    control.run("ip", "address", "add", "192.0.2.11/24", "dev", "eth1")
    again = lab.add_node()
    assert pings(control, again.address)


def test_add_node_beside_a_port_that_lost_its_bridge(new_lab: Callable[[], Lab]) -> None:
    """As an interrupted `power_on` leaves it: the new node would be up and reach nobody."""
    lab = new_lab()
    lab.machine("rack").run("ip", "link", "set", "eth3", "nomaster")
    with pytest.raises(LabError, match="rack:eth3, the port of node-2, is in no bridge"):
        lab.add_node()
    assert [m.name for m in Lab.load(lab.name).of_role("node")] == ["node-1", "node-2"]
