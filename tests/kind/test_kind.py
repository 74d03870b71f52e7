"""The image and the manifests on a kind cluster, with an FRR container as the switch.

Needs docker, kind and kubectl, and images from the network; skipped with the reason elsewhere. It
has not been run where it was written: there is no container engine there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kind, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SWITCH = "lbctl-kind-switch"
IMAGE = "quay.io/frrouting/frr:8.4.4"
LIMIT_S = 300.0
FRR = """\
frr defaults datacenter
ip prefix-list eips seq 5 permit 198.51.100.0/24 le 32
route-map in permit 10
 match ip address prefix-list eips
route-map out deny 10
router bgp 64500
 bgp bestpath as-path multipath-relax
 neighbor lbctl peer-group
 neighbor lbctl remote-as 64512
 neighbor lbctl passive
 bgp listen range {subnet} peer-group lbctl
 address-family ipv4 unicast
  maximum-paths 64
  neighbor lbctl route-map in in
  neighbor lbctl route-map out out
"""
CONFIG = """\
version: 1
pools:
  - {{name: public, addresses: [198.51.100.0/25]}}
bgp:
  asn: 64512
  peers:
    - {{name: switch, address: {switch}, asn: 64500}}
"""


def run(*argv: str, check: bool = True, given: str | None = None) -> str:
    """A command's output. Fails the test with what the command said."""
    done = subprocess.run(argv, capture_output=True, text=True, input=given, cwd=ROOT)
    if check and done.returncode:
        pytest.fail(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def kubectl(*argv: str, check: bool = True, given: str | None = None) -> str:
    return run("kubectl", "--context", "kind-lbctl", *argv, check=check, given=given)


def until(what: str, look: Callable[[], str]) -> str:
    """Poll until `look` gives something; says what it waited for."""
    deadline = time.monotonic() + LIMIT_S
    while not (seen := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {LIMIT_S:.0f} s for {what}")
        time.sleep(0.5)
    return seen


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A kind cluster with lbctl on it and a switch on its network; the switch's address."""
    for tool in ("docker", "kind", "kubectl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no container engine answers")
    folder = tmp_path_factory.mktemp("frr")
    run("deploy/kind/up")
    try:
        networks = json.loads(run("docker", "network", "inspect", "kind"))[0]["IPAM"]["Config"]
        subnet = next(n["Subnet"] for n in networks if ":" not in n["Subnet"])
        (folder / "frr.conf").write_text(FRR.format(subnet=subnet))
        (folder / "daemons").write_text("zebra=yes\nbgpd=yes\n")
        mount = f"{folder}:/etc/frr"
        run("docker", "rm", "-f", SWITCH, check=False)
        run(
            *("docker", "run", "-d", "--privileged", "--name", SWITCH, "--network", "kind"),
            *("-v", mount, IMAGE),
        )
        shape = "{{.NetworkSettings.Networks.kind.IPAddress}}"
        yield run("docker", "inspect", "-f", shape, SWITCH).strip()
    finally:
        run("docker", "rm", "-f", SWITCH, check=False)
        run("deploy/kind/up", "down", check=False)


def test_an_eip_is_routed_and_answers(switch: str) -> None:
    text = "".join(f"    {line}\n" for line in CONFIG.format(switch=switch).splitlines())
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: lbctl, namespace: lbctl-system}\n"
    kubectl("apply", "-f", "-", given=f"{head}data:\n  config.yaml: |\n{text}")
    kubectl(
        "create", "deployment", "web", "--image=registry.k8s.io/echoserver:1.10", "--replicas=2"
    )
    kubectl("expose", "deployment", "web", "--type=LoadBalancer", "--port=80", "--target-port=8080")
    path = "jsonpath={.status.loadBalancer.ingress[0].ip}"
    eip = until("an EIP", lambda: kubectl("get", "service", "web", "-o", path))
    kubectl("rollout", "status", "deployment/web", "--timeout=180s")
    until(
        "two next hops in the switch's kernel",
        lambda: (
            seen
            if (seen := run("docker", "exec", SWITCH, "ip", "route", "show", eip)).count("nexthop")
            >= 2
            else ""
        ),
    )
    answer = until(
        "an answer",
        lambda: run("docker", "exec", SWITCH, "wget", "-qO-", f"http://{eip}/", check=False),
    )
    assert "web" in answer
