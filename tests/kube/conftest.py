"""Fixtures of the contract suite: every test here runs against both clusters of the lab.

`cluster` is one per test run and kind, shared by all xdist workers until the run ends. A manager
sees all Services, so files marked `alone` share another one, one after the other; each leaves it as
it found it.
`space` is a namespace of the test's own. Without the real cluster's programs its half is skipped
with the reason, unless LBCTL_REQUIRE_KUBERNETES=1, which builds them and turns a skip into a
failure.
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
KINDS: tuple[ClusterKind, ...] = ("embedded", "kubernetes")
STOP_S = 60.0
BASE = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The run's own process, not a worker, ends its clusters: nobody can be about to join them."""
    if not hasattr(session.config, "workerinput"):
        for directory in BASE.glob(f"lbctl-kube-{os.getpid()}-*/"):
            _stop(directory)


@pytest.fixture(scope="module", params=KINDS)
def cluster(request: pytest.FixtureRequest) -> Iterator[SharedCluster]:
    """A running cluster of each kind; it lives as long as the whole run."""
    kind: ClusterKind = request.param
    if kind == "kubernetes":
        need_kubernetes()
    if request.node.get_closest_marker("alone") is None:
        yield _shared(kind, _directory(kind, ""))
        return
    directory = _directory(kind, "alone")
    with _lock(directory, "users"):
        yield _shared(kind, directory)


def _shared(kind: ClusterKind, directory: Path) -> SharedCluster:
    access = _join(kind, directory)
    if "error" in access:
        skip_or_fail(str(access["error"]), missing=bool(access["missing"]))
    return SharedCluster(
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


@pytest.fixture(scope="module")
def node(cluster: SharedCluster) -> Iterator[str]:
    """A ready Node of this worker's own, for Pods to be bound to."""

    def client() -> Raw:
        return Raw(cluster.url, cluster.ca_file, cluster.admin_token)

    with HeartbeatNode(client, f"node-{secrets.token_hex(3)}") as found:
        yield found.name


def _directory(kind: str, group: str) -> Path:
    """Where a cluster of this run has its state; the run is the pytest that the user started."""
    run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    return BASE / f"lbctl-kube-{run}-{kind}{group}"


def _join(kind: str, directory: Path) -> dict[str, object]:
    """The run's cluster of this kind; the first worker to ask starts it."""
    with _lock(directory, "start"):
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "holder.pid").exists():
            run = directory.name.split("-")[2]
            holder = [sys.executable, str(HERE / "cluster_holder.py"), kind, str(directory), run]
            command = ["setsid", "--fork", *holder]  # no child of this worker: others outlive it
            environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
            with (directory / "holder.log").open("ab") as log:
                subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
            until("the holder to start", (directory / "holder.pid").exists)
    return _access(directory)


@contextmanager
def _lock(directory: Path, purpose: str) -> Iterator[None]:
    with directory.with_suffix(f".{purpose}").open("w") as lock:
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
    """End the holder, if there is one, and what it left."""
    pid_file = directory / "holder.pid"
    if pid_file.exists():
        pid = int(pid_file.read_text())
        if _alive(pid):
            os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + STOP_S
        while _alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)
    for purpose in ("start", "users"):
        directory.with_suffix(f".{purpose}").unlink(missing_ok=True)
