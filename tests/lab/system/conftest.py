"""The `system` fixture: one lab for the session; each test removes the Services that it made.

LBCTL_LAB_CLUSTER=kubernetes takes the real cluster. LBCTL_TEST_LAB=NAME uses a lab that is up, and
leaves it up. After a failure the logs of a lab of our own are kept, and their place is printed.
Tests with a topology of their own come first, so that two labs are not up at a time; a node that
was added stays, so that test is the last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbctl.lab.api import Api
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.lab import Lab, take_down
from tests.programs import need_kubernetes

from .support import TOPOLOGY, System

ORDER = {"test_racks": -1, "test_node_add": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep this folder's tests in the order of its files, but for those in ORDER."""
    items.sort(key=lambda item: ORDER.get(item.path.stem, 0))


@pytest.fixture(scope="session")
def running(worker_id: str, request: pytest.FixtureRequest) -> Iterator[System]:
    """A lab with the embedded cluster, or with the real one."""
    if existing := os.environ.get("LBCTL_TEST_LAB"):
        lab = Lab.load(existing)
        with Api(lab.directory / KUBECONFIG) as api:
            yield System(lab, api)
        return
    real = os.environ.get("LBCTL_LAB_CLUSTER") == "kubernetes"
    if real:
        need_kubernetes()
    name = f"t-{os.getpid()}-{worker_id}"
    lab = Lab.up(TOPOLOGY, name, print)
    try:
        bring_up(lab, "kubernetes" if real else "embedded", print)
        with Api(lab.directory / KUBECONFIG) as api:
            yield System(lab, api)
    finally:
        if request.session.testsfailed:
            kept = Path(tempfile.gettempdir()) / f"lbctl-{name}-logs"
            shutil.copytree(lab.directory / "logs", kept, dirs_exist_ok=True)
            print(f"logs: {kept}")
        take_down(name)


@pytest.fixture
def system(running: System) -> Iterator[System]:
    """The running system, whole: what a test cut is on again before the next one.

    Its Services are being deleted while the next one begins; `deploy` waits for a name to be free.
    """
    running.wait_system_ready()
    yield running
    cut = [machine.name for machine in running.lab.machines if not machine.alive]
    for name in cut:
        running.lab.power_on(name)
    if cut:
        running.wait_nodes_up()
    for name in list(running.made):
        running.delete(name)
