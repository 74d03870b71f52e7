"""Fixtures of the contract suite: every test here runs against both clusters of the lab.

`cluster` is one per test run and kind, shared by all xdist workers; `space` a namespace of the
test's own. Without the real cluster's programs its half is skipped with the reason, unless
LBCTL_REQUIRE_KUBERNETES=1, which builds them and turns a skip into a failure.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lbctl.lab.cluster.handle import ClusterKind
from tests.kube.kube_tools import HeartbeatNode, Kubectl, Raw, until
from tests.programs import REQUIRED, need_kubernetes, skip_or_fail

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
BUILD_S = 1800.0
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class SharedCluster:
    """A `lbctl.lab.cluster.handle.Cluster` that another process holds."""

    kind: ClusterKind
    url: str
    ca_file: Path
    admin_token: str
    kubeconfig: Path
    processes: dict[str, int]

    def stop(self) -> None:
        """Left to the process that holds it."""

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return dict(self.processes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test on the real cluster may have to build it."""
    for item in items:
        if REQUIRED and "kubernetes" in item.name:
            item.add_marker(pytest.mark.timeout(BUILD_S))


@pytest.fixture(scope="session", params=["embedded", "kubernetes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[SharedCluster]:
    """A running cluster of each kind."""
    kind: ClusterKind = request.param
    if kind == "kubernetes":
        need_kubernetes()
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    directory = base / f"lbctl-kube-{run[:12]}-{kind}"
    with _shared(kind, directory) as access:
        if "error" in access:
            skip_or_fail(str(access["error"]), missing=bool(access["missing"]))
        yield SharedCluster(
            kind,
            str(access["url"]),
            Path(str(access["ca_file"])),
            str(access["admin_token"]),
            Path(str(access["kubeconfig"])),
            dict(access["pids"]),  # type: ignore[call-overload]
        )


@pytest.fixture
def space(cluster: SharedCluster) -> Iterator[str]:
    """A namespace of the test's own, with its ServiceAccount `default`."""
    name = f"t-{secrets.token_hex(4)}"
    path = "/api/v1/namespaces"
    with Raw(cluster.url, cluster.ca_file, cluster.admin_token) as raw:
        raw("POST", path, {"metadata": {"name": name}}).ok()
        account = f"{path}/{name}/serviceaccounts/default"
        until("the ServiceAccount default", lambda: raw("GET", account).code == 200)
        yield name
        raw("DELETE", f"{path}/{name}").ok()


@pytest.fixture
def kubectl(cluster: SharedCluster, space: str) -> Kubectl:
    """kubectl in the test's namespace."""
    return Kubectl(cluster.kubeconfig, space)


@pytest.fixture
def raw(cluster: SharedCluster) -> Iterator[Raw]:
    """Plain HTTP as administrator."""
    with Raw(cluster.url, cluster.ca_file, cluster.admin_token) as client:
        yield client


@pytest.fixture(scope="session")
def node(cluster: SharedCluster) -> Iterator[str]:
    """A ready Node of this worker's own, for Pods to be bound to."""

    def client() -> Raw:
        return Raw(cluster.url, cluster.ca_file, cluster.admin_token)

    with HeartbeatNode(client, f"node-{secrets.token_hex(3)}") as found:
        yield found.name


@contextmanager
def _shared(kind: str, directory: Path) -> Iterator[dict[str, object]]:
    """Join the run's cluster, starting it if this is the first worker; the last one stops it."""
    users = directory / "users"
    users.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        (users / str(os.getpid())).touch()
        if not (directory / "holder.pid").exists():
            holder = [sys.executable, str(HERE / "cluster_holder.py"), kind, str(directory)]
            command = ["setsid", "--fork", *holder]  # no child of this worker: others outlive it
            environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
            with (directory / "holder.log").open("ab") as log:
                subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
            until("the holder to start", (directory / "holder.pid").exists)
    try:
        yield _access(directory)
    finally:
        with _lock(directory):
            (users / str(os.getpid())).unlink()
            last = not any(users.iterdir())
        if last:
            _stop(directory)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _access(directory: Path) -> dict[str, object]:
    path = directory / "access.json"
    pid = int((directory / "holder.pid").read_text())
    end = time.monotonic() + BUILD_S
    while not path.exists():
        if time.monotonic() > end or not _alive(pid):
            log = (directory / "holder.log").read_text()[-2000:]
            pytest.fail(f"waited for a cluster in {directory}: {log}")
        time.sleep(0.05)
    found: dict[str, object] = json.loads(path.read_text())
    return found


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _stop(directory: Path) -> None:
    pid = int((directory / "holder.pid").read_text())
    if _alive(pid):
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)
    directory.with_suffix(".lock").unlink(missing_ok=True)
