"""deploy/examples/statefulset: its README's commands, then each replica at its own address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbctl.kube import client as kube
from lbctl.lab import workload
from lbctl.lab.api import STATEFUL_SETS, wait
from lbctl.lab.bringup import KUBECONFIG
from tests import programs

from .support import System

CHECKOUT = Path(__file__).parents[3]
EXAMPLE = CHECKOUT / "deploy" / "examples" / "statefulset"
ADDRESSES = {f"db-{n}": f"198.51.100.{120 + n}" for n in range(3)}
HOSTS = "".join(f"{address} {pod}\n" for pod, address in ADDRESSES.items())


@pytest.fixture
def site(system: System) -> Iterator[System]:
    """The example's objects are gone after it, and the lab's configuration is in force again."""
    yield system
    system.api.delete(STATEFUL_SETS, "db")
    system.api.delete(kube.SERVICES, "db")
    for service in (*ADDRESSES, "other"):
        system.api.delete(kube.SERVICES, service)
    for name in ("db-addresses", "db-program"):
        system.api.delete(kube.CONFIG_MAPS, name)
    wait("the replicas to be gone", lambda: not system.api.pod_nodes("db"))
    for service in (*ADDRESSES, "other"):
        wait(
            f"Service {service} to be gone",
            lambda service=service: system.api.find(kube.SERVICES, service) is None,  # type: ignore[misc]
        )
    system.api.apply(workload.config_map())


def shell(system: System, commands: list[str]) -> str:
    """Type commands, one after the other, in the checkout; what they print."""
    folders = (Path(sys.executable).parent, Path(programs.kubectl()).parent)
    environment = {
        **os.environ,
        "KUBECONFIG": str(system.lab.directory / KUBECONFIG),
        "PATH": ":".join((*map(str, folders), os.environ["PATH"])),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_replicas_know_all_addresses_before_they_start(site: System) -> None:
    readme = (EXAMPLE / "README.md").read_text()
    go, *steps = readme.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert "kubectl apply -f services" in steps[3]
    said = shell(site, [go, *steps[:3]])
    for pod, address in ADDRESSES.items():
        row = next(line.split() for line in said.splitlines() if f"default/{pod} " in line)
        assert row[:4] == [f"default/{pod}", address, "public", "reserved"]
    for name in ("db-2", "other", "db-1"):  # others first, and not in their order
        made = workload.service(name)
        made["spec"]["selector"] = {"statefulset.kubernetes.io/pod-name": name}
        site.api.apply(made)
    shell(site, [go, *steps[3:]])
    for pod, address in ADDRESSES.items():
        assert site.api.eips_of(pod) == [address]
        said = wait(f"{pod} to answer at {address}", lambda at=address: ask(site, at))  # type: ignore[misc]
        assert said == f"I am {pod}, at {address}; all:\n{HOSTS}"


def ask(system: System, address: str) -> str:
    """What the client gets, "" if nobody answers yet."""
    client = system.lab.machine("client")
    return client.run("curl", "-s", "--max-time", "5", f"http://{address}/", check=False).stdout
