"""`endpoints.nodes`: pods that are not in the podCIDR of their Node, as with Calico's IPAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lbctl.kube import client as kube
from lbctl.lab import workload
from lbctl.lab.api import wait

from .support import System

BY_NAME = f"{workload.CONFIG}\nendpoints: {{nodes: nodeName}}\n"


@contextmanager
def foreign_pod_cidrs(system: System) -> Iterator[None]:
    """Each Node has another one's podCIDRs; only an API server of ours lets them be changed."""
    nodes = [node.name for node in system.lab.of_role("node")]
    cidrs = [system.api.get(kube.NODES, name, "")["spec"]["podCIDRs"] for name in nodes]

    def give(theirs: list[list[str]]) -> None:
        for name, cidr in zip(nodes, theirs, strict=True):
            spec = {"podCIDR": cidr[0], "podCIDRs": cidr}
            system.api.patch(kube.NODES, name, {"spec": spec}, "")

    try:
        give([*cidrs[1:], cidrs[0]])
        yield
    finally:
        give(cidrs)


def answered(system: System, eip: str, tries: int) -> int:
    """How many of so many requests got an answer within a second."""
    words = ("curl", "-s", "--max-time", "1", f"http://{eip}/n/1")
    client = system.lab.machine("client")
    return sum(bool(client.run(*words, check=False).stdout) for _ in range(tries))


def test_pods_are_found_by_the_node_that_their_endpoint_names(system: System) -> None:
    eip = system.deploy("roaming", replicas=6)
    system.wait_routed(eip)
    pods = set(system.api.ready_pods("roaming"))
    try:
        with foreign_pod_cidrs(system):
            wait("no request to find its pod by podCIDR", lambda: answered(system, eip, 5) == 0)
            system.configure(BY_NAME)
            wait("a request to find its pod", lambda: answered(system, eip, 5) == 5)
            assert set(system.spread(eip, 120)) == pods
            system.configure(workload.CONFIG)
            wait("podCIDRs to count again", lambda: answered(system, eip, 5) == 0)
    finally:
        system.configure(workload.CONFIG)
    wait("everything to be as before", lambda: answered(system, eip, 5) == 5)
