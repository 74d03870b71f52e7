"""A machine is like a container: own hostname, processes, /run, files; the CLI reaches into it."""

from __future__ import annotations

import http.client
import json
import subprocess

import pytest

from lbctl.errors import LabError
from lbctl.lab.drill import delays, links
from lbctl.lab.forward import start_forwarder
from lbctl.lab.lab import Lab

from .rack import end, lbctl, poll, start_server


def test_own_hostname_processes_run_and_files(rack: Lab) -> None:
    node = rack.machine("node-1")
    assert node.run("hostname").stdout == "node-1\n"
    assert int(node.run("sh", "-c", "ls -d /proc/[0-9]* | wc -l").stdout) < 10
    node.run("sh", "-c", "touch /run/mine /etc/mine /var/tmp/mine && mkdir -p /run/netns")
    other = rack.machine("node-2")
    for path in ("/run/mine", "/etc/mine", "/var/tmp/mine"):
        assert other.run("test", "-e", path, check=False).returncode == 1
        assert subprocess.run(["test", "-e", path], check=False).returncode == 1
    assert node.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward").returncode == 0
    links = json.loads(node.run("sh", "-c", "ip -j link").stdout)
    assert [link["ifname"] for link in links] == ["lo", "eth1"]


def test_orphans_are_reaped(rack: Lab) -> None:
    node = rack.machine("node-1")
    node.run("sh", "-c", "for i in 1 2 3 4 5; do (sleep 0.1 &) ; done")
    states = ("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null | awk '{print $2 $3}'")
    poll(
        "orphaned processes to be gone, not zombies",
        lambda: "(sleep)Z" not in (out := node.run(*states).stdout) and out.count("(sleep)") == 1,
    )


def test_a_timed_out_command_is_killed_inside_too(rack: Lab) -> None:
    node = rack.machine("node-1")
    with pytest.raises(LabError, match=r"no end after 0\.3 s"):
        node.run("sleep", "98765", timeout_s=0.3)
    poll(
        "the command inside the machine to be gone",
        lambda: "98765" not in node.run("sh", "-c", "cat /proc/[0-9]*/cmdline").stdout,
    )


def test_errors_say_machine_command_and_cause(rack: Lab) -> None:
    with pytest.raises(LabError, match=r"node-1: ls /nowhere: exit 2: ls: cannot access"):
        rack.machine("node-1").run("ls", "/nowhere")
    with pytest.raises(LabError, match="no node 'node-9'"):
        rack.machine("node-9")
    with pytest.raises(LabError, match="is not up"):
        Lab.load("never-was")


def test_an_interface_comes_back_with_its_addresses_and_routes(rack: Lab) -> None:
    node = rack.machine("node-1")

    def seen() -> str:
        routes = (node.run("ip", family, "route", "show", "dev", "eth1") for family in ("-4", "-6"))
        addresses = node.run("ip", "-br", "address", "show", "dev", "eth1").stdout
        return addresses + "".join(found.stdout for found in routes)

    before = seen()
    lost = links.down(node, "eth1")
    assert "2001:db8:1::21" in before and "2001:db8:1::21" not in seen()
    assert before.count("default via") == 2 and "default via" not in seen()
    links.up(node, "eth1", lost)
    poll("all of it to be back", lambda: sorted(seen().split()) == sorted(before.split()))


def test_a_machine_hears_another_one_late(rack: Lab) -> None:
    node = rack.machine("node-1")

    def round_trip_ms(target: str) -> float:
        # -U: until the program has it; the kernel's own stamp is from before the queue
        said = node.run("ping", "-n", "-U", "-c1", "-W5", target).stdout
        return float(said.partition("time=")[2].split()[0])

    delay = delays.begin(node, ["192.0.2.22", "2001:db8:1::22"], ms=300, queue=1)
    try:
        assert round_trip_ms("192.0.2.22") >= 300
        assert round_trip_ms("2001:db8:1::22") >= 300
        poll("another's answer to be at once", lambda: round_trip_ms("192.0.2.23") < 300)
    finally:
        delay.end()
    assert delay.holder.returncode == 0
    poll("its own to be at once again", lambda: round_trip_ms("192.0.2.22") < 300)
    assert "NFQUEUE" not in node.run("iptables", "-t", "mangle", "-S").stdout


def test_exec_of_the_command_line(rack: Lab) -> None:
    where = ("--lab", rack.name)
    bgp = lbctl("lab", "exec", *where, "tor-a", "--", "vtysh", "-c", "show bgp ipv4 unicast json")
    assert bgp.returncode == 0
    assert json.loads(bgp.stdout)["localAS"] == 64500
    assert lbctl("lab", "exec", *where, "client", "--", "sh", "-c", "exit 7").returncode == 7
    assert lbctl("lab", "exec", "node-1", *where, "ping", "-c1", "192.0.2.22").returncode == 0
    wrong = lbctl("lab", "exec", *where, "nobody", "--", "true")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith(
        "lbctl: no node 'nobody' in this lab; there are rack, edge, tor-a"
    )


def test_status_of_the_command_line(rack: Lab) -> None:
    done = lbctl("lab", "status", "--lab", rack.name, "--output", "json")
    data = json.loads(done.stdout)
    nodes = {m["name"]: m for m in data["machines"]}
    assert nodes["node-3"]["addresses"] == ["192.0.2.23", "2001:db8:1::23"]
    assert nodes["node-3"]["pods"] == "10.244.3.0/24,fd00:10:244:3::/64"
    assert nodes["tor-a"]["power"] == "on"
    assert {s["name"]: s["vrrp"]["10"] for s in data["switches"]} == {
        "tor-a": "Master",
        "tor-b": "Backup",
    }
    text = lbctl("lab", "status", "--lab", rack.name).stdout
    assert "\x1b[" not in text  # no colours into a pipe
    lines = [line for line in text.splitlines() if line.startswith(("MACHINE", "node-", "tor-a "))]
    assert (
        len({line.index(word) for line in lines for word in ("POWER", "on ") if word in line}) == 1
    )


def test_logs_of_the_command_line(rack: Lab) -> None:
    done = lbctl("lab", "logs", "tor-a", "--lab", rack.name)
    assert done.returncode == 0
    assert "frr/frr.log <==" in done.stdout
    assert "[VRID 10]" in done.stdout


def test_no_cluster_no_kubeconfig(rack: Lab) -> None:
    done = lbctl("lab", "kubeconfig", "--lab", rack.name)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no cluster" in done.stderr


def test_the_forwarder_reaches_into_the_cluster_namespace(rack: Lab) -> None:
    kube = rack.machine("kube")
    server = start_server(kube)
    try:
        port = start_forwarder(rack, kube.netns, f"{kube.address}:80")
        for number in (1, 2):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", f"/n/{number}")
            body = connection.getresponse().read().decode()
            connection.close()
            assert body.split()[0::2] == ["kube", f"/n/{number}"]
    finally:
        end(server)
    # the server is gone: the connection ends, the forwarder lives
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request("GET", "/")
        connection.getresponse()
    connection.close()
    assert rack.process("forward")
