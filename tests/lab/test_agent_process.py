"""The agent's process with an API server: it programs, restarts, repairs, and goes without a trace.

It runs as in its pod: root with CAP_NET_ADMIN alone in its bounding set.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lbctl.core.names import NFT_TABLE, RULE_PRIORITY
from lbctl.lab.cluster import embedded
from lbctl.lab.cluster.handle import ClusterSpec

from .agentnet import ROOT, Net, sh, wait_for

EIP = "198.51.100.1"
CLIENT = "203.0.113.10"
CONFIG = """
version: 1
pools:
  - {name: public, addresses: [198.51.100.0/25]}
bgp:
  asn: 64512
  peers:
    - {name: tor-a, address: 192.0.2.1, asn: 64500}
"""
NODES = "/api/v1/nodes"
SERVICES = "/api/v1/namespaces/default/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
EIPS = "/apis/lbctl.io/v1/eips"
MAPS = "/api/v1/namespaces/lbctl-system/configmaps"


class Site:
    """Three nodes, an API server in the router's namespace, and agents."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.net = net
        self.directory = directory
        self.agents: dict[int, subprocess.Popen[bytes]] = {}
        self.cluster = embedded.start(
            ClusterSpec(
                directory,
                prefix=("ip", "netns", "exec", net.ns("r")),
                address="192.0.2.1",
                port=6443,
            )
        )
        net.start_pods()
        self.client = net.start("c", "agent_client.py")
        self.api = net.start("r", "agent_api.py", str(self.cluster.kubeconfig))
        keys = directory / "keys"
        keys.mkdir()
        (keys / "current").write_bytes(base64.b64encode(secrets.token_bytes(32)))

    def tried(self, op: str, path: str, body: Any = None) -> Any:
        request = {"op": op, "path": path} | ({} if body is None else {"body": body})
        self.api.tell(request)
        return self.api.hear(f"{op} {path}", lambda m: "result" in m)["result"]

    def call(self, op: str, path: str, body: Any = None) -> Any:
        result = self.tried(op, path, body)
        assert not (isinstance(result, dict) and "error" in result), result
        return result

    def start_agent(self, n: int) -> None:
        log = self.log(n).open("ab")
        self.agents[n] = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.net.ns(f"n{n}")),
                *("setpriv", "--bounding-set", "-all,+net_admin", "--inh-caps", "-all"),
                *(sys.executable, "-m", "agent.main", *self.arguments(n)),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=log,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "NODE_NAME": f"n{n}",
                "KUBECONFIG": str(self.cluster.kubeconfig),
            },
        )
        log.close()

    def arguments(self, n: int) -> tuple[str, ...]:
        return (
            *("--snapshot-dir", str(self.directory / f"n{n}")),
            *("--keys-dir", str(self.directory / "keys")),
        )

    def log(self, n: int) -> Path:
        return self.directory / f"n{n}.log"

    def events(self, n: int, name: str) -> list[dict[str, Any]]:
        lines = [
            json.loads(line) for line in self.log(n).read_text().splitlines() if line[0] == "{"
        ]
        return [line for line in lines if line["event"] == name]

    def kill(self, n: int, number: int = 9) -> None:
        agent = self.agents.pop(n)
        agent.send_signal(number)
        agent.wait(30)

    def ask(self, count: int) -> list[dict[str, Any]]:
        self.client.tell({"ask": [EIP, 80], "count": count})
        answers: list[dict[str, Any]] = self.client.hear("answers")["result"]
        return answers

    def pods(self, count: int = 60) -> set[str]:
        return {answer.get("pod", answer.get("error", "")) for answer in self.ask(count)}

    def metric(self, n: int, name: str) -> float:
        code = "import sys,urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
        text = self.net.run(f"n{n}", sys.executable, "-c", code, "http://127.0.0.1:7481/metrics")
        found = [line for line in text.splitlines() if line.startswith(name)]
        assert found, f"no metric {name}"
        return float(found[0].split()[-1])

    def close(self) -> None:
        for n in list(self.agents):
            self.kill(n)
        self.cluster.stop()
        self.net.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    net = Net(f"ap{os.getpid() % 100000}")
    made = None
    try:
        made = Site(net, tmp_path)
        yield made
    finally:
        if made is not None:
            made.close()
        net.close()


def fill(site: Site) -> None:
    """A cluster with three nodes, a Service with six endpoints, and its EIP."""
    for n in (1, 2, 3):
        site.call(
            "create",
            NODES,
            {
                "metadata": {"name": f"n{n}"},
                "spec": {"podCIDR": f"10.244.{n}.0/24", "podCIDRs": [f"10.244.{n}.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": f"192.0.2.{20 + n}"}]},
            },
        )
    site.call("create", "/api/v1/namespaces", {"metadata": {"name": "lbctl-system"}})
    data = {"config.yaml": CONFIG, "generation": "7"}
    site.call("create", MAPS, {"metadata": {"name": "lbctl-accepted"}, "data": data})
    spec = {
        "type": "LoadBalancer",
        "loadBalancerClass": "lbctl.io/bgp",
        "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}],
    }
    service = site.call("create", SERVICES, {"metadata": {"name": "web"}, "spec": spec})
    site.call("create", SLICES, slice_of(site.net, (1, 2, 3)))
    crd = YAML(typ="safe").load((ROOT / "deploy/kustomize/base/crd.yaml").read_text())
    site.call("create", CRDS, crd)
    owner = {"namespace": "default", "name": "web", "uid": service["metadata"]["uid"]}
    eip = {"address": EIP, "pool": "public", "owner": owner, "phase": "Bound", "forwarding": True}
    body = {"apiVersion": "lbctl.io/v1", "kind": "EIP", "metadata": {"name": EIP}, "spec": eip}
    wait_for("the resource to be served", lambda: "error" not in site.tried("get", EIPS))
    site.call("create", EIPS, body)


def slice_of(net: Net, nodes: tuple[int, ...]) -> dict[str, Any]:
    ready = {"ready": True, "serving": True, "terminating": False}
    return {
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": [net.pod_address(n, p)], "conditions": ready}
            for n in nodes
            for p in range(1, net.pods + 1)
        ],
    }


def tables(site: Site, n: int) -> str:
    return site.net.run(f"n{n}", "nft", "list", "tables")


def rules(site: Site, n: int) -> list[str]:
    lines = sh("ip", "-n", site.net.ns(f"n{n}"), "rule").splitlines()
    return [
        line for line in lines if line.startswith(tuple(f"{RULE_PRIORITY + i}:" for i in range(5)))
    ]


def test_life_of_an_agent(site: Site) -> None:
    fill(site)
    for n in (1, 2, 3):
        site.start_agent(n)
    for n in (1, 2, 3):
        wait_for(
            f"n{n} to forward to all nodes",
            lambda n=n: len(rules(site, n)) == 6 and site.events(n, "table_applied"),
        )
    wait_for("every pod to answer", lambda: len(site.pods(60)) == 6)
    assert {answer.get("seen") for answer in site.ask(20)} == {CLIENT}
    assert site.metric(1, "lbctl_agent_config_generation") == 7
    assert site.metric(1, "lbctl_agent_eips") == 1
    assert site.net.run("n1", "cat", "/proc/sys/net/ipv4/conf/eth0/rp_filter").strip() == "2"

    # A change of endpoints arrives.
    site.call("replace", f"{SLICES}/web-1", slice_of(site.net, (2, 3)))
    wait_for("n1's pods to be out", lambda: site.pods(40) == {"p21", "p22", "p31", "p32"})

    restarts_without_interruption(site)
    repairs(site)
    serves_without_an_api_server(site)
    uninstalls(site)


def restarts_without_interruption(site: Site) -> None:
    site.client.tell({"open": [EIP, 80], "count": 60})
    site.client.hear("60 connections")
    for n in (1, 2):
        written = site.directory / f"n{n}" / "agent.json"
        wait_for("a snapshot", written.exists)
        assert written.stat().st_mode & 0o777 == 0o600
        applied = len(site.events(n, "table_applied"))
        wait_for("the snapshot to be the last table's", lambda w=written, n=n: fresh(site, n, w))
        site.kill(n)
        site.start_agent(n)
        loaded = wait_for("the snapshot to be read", lambda n=n: site.events(n, "snapshot_loaded"))
        assert loaded[-1]["kernel_intact"] is True
        assert len(site.events(n, "table_applied")) == applied
    assert site.pods() == {"p21", "p22", "p31", "p32"}
    site.client.tell({"report": True})
    assert [f for f in site.client.hear("flows")["result"] if f["broken"]] == []


def fresh(site: Site, n: int, written: Path) -> bool:
    last = site.events(n, "table_applied")[-1]["generation"]
    return bool(json.loads(written.read_text())["generation"] >= last)


def repairs(site: Site) -> None:
    for n in (1, 2, 3):
        wait_for("metrics", lambda n=n: site.events(n, "cache_synced")[4:])
    site.net.run("n1", "nft", "delete", "table", "ip", NFT_TABLE)
    wait_for("the table to be back", lambda: NFT_TABLE in tables(site, 1), 30)
    before = rules(site, 2)
    sh("ip", "-n", site.net.ns("n2"), "rule", "del", "pref", str(RULE_PRIORITY))
    sh("ip", "-n", site.net.ns("n2"), "rule", "del", "pref", str(RULE_PRIORITY + 1))
    wait_for("the rules to be back", lambda: sorted(rules(site, 2)) == sorted(before), 30)
    table = next(w for line in before if "lookup" in line for w in line.split() if w.isdigit())
    sh("ip", "-n", site.net.ns("n2"), "route", "flush", "table", table)
    wait_for(
        "the route to be back",
        lambda: sh("ip", "-n", site.net.ns("n2"), "route", "show", "table", "all").count(table),
        30,
    )
    written = len(site.events(3, "table_applied"))
    site.net.run("n3", "nft", "flush", "chain", "ip", NFT_TABLE, "ingress")
    # A repair is several transactions: the next hand waits until the last one is in.
    wait_for("a chain to be repaired", lambda: len(site.events(3, "table_applied")) > written, 30)
    assert "goto outside" in site.net.run("n3", "nft", "list", "chain", "ip", NFT_TABLE, "ingress")
    written = len(site.events(3, "table_applied"))
    site.net.run("n3", "nft", "flush", "map", "ip", NFT_TABLE, "svc")
    wait_for("a map to be repaired", lambda: len(site.events(3, "table_applied")) > written, 30)
    assert EIP in site.net.run("n3", "nft", "list", "map", "ip", NFT_TABLE, "svc")
    assert site.metric(3, 'lbctl_agent_repairs_total{what="nftables"}') == 2
    # What a pass right after the restart puts back is not counted as a repair.
    assert site.metric(2, 'lbctl_agent_repairs_total{what="routes"}') >= 1
    assert site.pods() == {"p21", "p22", "p31", "p32"}


def serves_without_an_api_server(site: Site) -> None:
    site.cluster.stop()
    wait_for("the snapshot", lambda: fresh(site, 1, site.directory / "n1" / "agent.json"))
    site.kill(1)
    site.net.run("n1", "nft", "delete", "table", "ip", NFT_TABLE)
    site.start_agent(1)
    wait_for("the table from the snapshot", lambda: NFT_TABLE in tables(site, 1))
    wait_for("everyone to be served", lambda: site.pods() == {"p21", "p22", "p31", "p32"})
    site.net.run("n1", "nft", "delete", "table", "ip", NFT_TABLE)
    wait_for("the table to be repaired", lambda: NFT_TABLE in tables(site, 1))


def uninstalls(site: Site) -> None:
    site.kill(2, 15)
    assert NFT_TABLE in tables(site, 2)
    for _ in range(2):
        arguments = ("--uninstall", *site.arguments(2))
        site.net.run("n2", sys.executable, "-m", "agent.main", *arguments)
    assert NFT_TABLE not in tables(site, 2)
    assert rules(site, 2) == []
    routes = sh("ip", "-n", site.net.ns("n2"), "route", "show", "table", "all")
    assert "proto 76" not in routes
    assert not (site.directory / "n2" / "agent.json").exists()
