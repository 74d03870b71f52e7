"""`lbctl uninstall` while everything is at work: what it leaves, and in which order things go."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from lbctl.core import names
from lbctl.core.uninstall import MANAGERS, THINGS
from lbctl.kube import client as kube
from lbctl.kube.client import Resource
from lbctl.lab import bringup, workload
from lbctl.lab.daemon import ClusterAccess
from lbctl.lab.machine import Machine

from .support import SWITCHES, System
from .test_cli import LBCTL, lbctl


def left_on(node: Machine) -> list[str]:
    """What of ours is in a node's kernel and in its directory."""
    found = []
    for look in (
        ("nft", "list", "tables"),
        *(("ip", family, "rule") for family in ("-4", "-6")),
        *(
            ("ip", family, "route", "show", "table", "all", "proto", "76")
            for family in ("-4", "-6")
        ),
        ("ip", "-o", "link", "show", "type", "vxlan"),
        ("find", names.AGENT_SNAPSHOT_DIR, "-type", "f"),
    ):
        said = node.run(*look).stdout.splitlines()
        mine = names.NFT_TABLE if "route" not in look else ""
        found += [line for line in said if mine in line or "0x4c" in line or "proto 76" in line]
    return found


def in_order(system: System, eip: str, running: subprocess.Popen[str]) -> int:
    """While an uninstall runs: no node loses its table as long as a switch has the route.

    The table is looked at first: had it gone before the route, the route would still be seen.
    Returns how often a table was seen beside no route, so that the order was really visible.
    """
    node = system.lab.machine("node-1")
    between = 0
    while running.poll() is None:
        time.sleep(0.1)
        table = names.NFT_TABLE in node.run("nft", "list", "tables").stdout
        routed = any(system.hops(eip).values())
        assert table or not routed, "forwarding went before the route"
        between += table and not routed
    return between


def hurry(system: System) -> None:
    """Have the plan wait for 3.5 s instead of 11: it goes by the accepted configuration."""
    quick = workload.CONFIG.replace("asn: 64500}", "asn: 64500, holdTime: 3s}")
    quick = quick.replace("announce: {}", "announce: {drainTime: 500ms}")
    system.configure(quick)


@pytest.mark.timeout(400)
def test_uninstall_leaves_nothing_and_lets_services_go(system: System) -> None:
    system.wait_rest()
    eip = system.deploy("web", replicas=2)
    asked = lbctl(system, "uninstall")
    assert asked.returncode == 2 and "--yes" in asked.stderr, asked
    assert system.replies(eip, 1), "it did not ask"
    hurry(system)
    interrupted = lbctl(system, "uninstall", "--yes", "--timeout", "0")
    assert interrupted.returncode == 1, interrupted
    assert "`lbctl uninstall` again" in interrupted.stdout
    for words in ("1. stop the managers: the routes of ", "wait 3.5 s", "default/web"):
        assert words in interrupted.stdout, (words, interrupted.stdout)

    environment = {**os.environ, "KUBECONFIG": str(system.lab.directory / bringup.KUBECONFIG)}
    with subprocess.Popen(
        [LBCTL, "uninstall", "--yes"], stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert in_order(system, eip, running) > 0
        said = running.stdout.read() if running.stdout else ""
    assert running.returncode == 0, said

    assert not {n.name: left for n in system.lab.of_role("node") if (left := left_on(n))}
    for switch in SWITCHES:
        assert not system.lab.kernel_routes(switch, eip)
        summary = system.vtysh(switch, "show bgp summary json")
        peers = summary.get("ipv4Unicast", {}).get("peers", {})
        assert all(peer["state"] != "Established" for peer in peers.values()), peers
    there = [
        thing
        for thing in (MANAGERS, *THINGS)
        if system.api.find(
            Resource(thing.api, thing.plural, thing.namespaced), thing.name, names.NAMESPACE
        )
    ]
    assert not there
    web = system.api.get(kube.SERVICES, "web")
    assert "lbctl.io" not in str(web) and "ingress" not in str(web["status"]), web
    assert "finalizers" not in web["metadata"]
    system.remove("web")

    # A new installation meets nothing that is in its way; and the lab is whole again.
    bringup.install(system.lab, ClusterAccess.read(system.lab.directory), print)
