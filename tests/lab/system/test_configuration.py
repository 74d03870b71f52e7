"""A ConfigMap that is broken changes nothing, also over a restart."""

from __future__ import annotations

import pytest

from lbctl.core import names
from lbctl.kube import client as kube
from lbctl.lab import control, workload
from lbctl.lab.api import wait

from .support import System

BROKEN = workload.CONFIG.replace("198.51.100.0/25", "198.51.100.1/25").replace("asn: 64512", "")


@pytest.mark.both
def test_bad_config_changes_nothing_even_over_a_restart(system: System) -> None:
    eip = system.deploy("kept")
    accepted = system.api.get(kube.CONFIG_MAPS, names.ACCEPTED_CONFIG_MAP, names.NAMESPACE)
    system.api.apply(workload.config_map(BROKEN))
    try:

        def complaint() -> str:
            events = system.api.all(kube.EVENTS, names.NAMESPACE)
            texts = [e["message"] for e in events if e["reason"] == "ConfigRejected"]
            return next((text for text in texts if "config.yaml:4:" in text), "")

        said = wait("an Event with line and column", complaint)
        assert "bgp" in said, "both errors at once"
        for pod in system.managers().values():
            control.kill_container(system.lab, pod, "manager")
        system.wait_system_ready()
        now = system.api.get(kube.CONFIG_MAPS, names.ACCEPTED_CONFIG_MAP, names.NAMESPACE)
        assert now["data"] == accepted["data"]
        system.wait_routed(eip)
        assert system.api.eip_of("kept") == eip
        assert len(system.replies(eip, 20)) == 20
    finally:
        system.api.apply(workload.config_map())


def test_good_config_takes_effect_and_leaves_sessions_alone(system: System) -> None:
    eip = system.deploy("wider")
    summary = system.vtysh("tor-a", "show bgp ipv4 unicast summary json")
    peers = summary.get("ipv4Unicast", summary)["peers"]
    dropped = {name: peer["connectionsDropped"] for name, peer in peers.items()}
    more = workload.CONFIG.replace("198.51.100.210]", "198.51.100.210, 198.51.100.220/31]")
    assert "198.51.100.220" in more
    try:
        system.configure(more)
        system.wait_routed(eip)
        summary = system.vtysh("tor-a", "show bgp ipv4 unicast summary json")
        peers = summary.get("ipv4Unicast", summary)["peers"]
        assert {name: peer["connectionsDropped"] for name, peer in peers.items()} == dropped
    finally:
        system.api.apply(workload.config_map())
