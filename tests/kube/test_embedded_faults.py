"""The embedded API server as a thing that fails: killed, frozen, behind a proxy; and its keys."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lbctl.lab.cluster import embedded, pki
from lbctl.lab.cluster.embedded import EmbeddedCluster
from lbctl.lab.cluster.handle import ClusterSpec
from tests.kube.kube_tools import Raw, config_map, node_body, service, until

MAPS = "/api/v1/namespaces/default/configmaps"
MERGE = "application/merge-patch+json"


@pytest.fixture
def spec() -> Iterator[ClusterSpec]:
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="lbctl-embedded-", dir=base))
    yield ClusterSpec(directory)
    shutil.rmtree(directory)


@pytest.fixture
def own(spec: ClusterSpec) -> Iterator[EmbeddedCluster]:
    """A cluster of the test's own."""
    cluster = embedded.start(spec)
    yield cluster
    cluster.stop()


def connect(cluster: EmbeddedCluster) -> Raw:
    return Raw(cluster.url, cluster.ca_file, cluster.admin_token)


def test_nothing_is_lost_when_it_is_killed(spec: ClusterSpec, own: EmbeddedCluster) -> None:
    with connect(own) as raw:
        made = raw("POST", MAPS, config_map("kept", a="1")).ok()
        raw("POST", MAPS, config_map("gone")).ok()
        raw("DELETE", f"{MAPS}/gone").ok()
        taken = raw("POST", "/api/v1/namespaces/default/services", service()).ok()["spec"]
    os.kill(own.process.pid, signal.SIGKILL)
    own.process.wait()
    port = urlsplit(own.url).port or 0
    again = embedded.start(replace(spec, port=port))
    try:
        assert (again.url, again.admin_token) == (own.url, own.admin_token)
        with connect(again) as raw:
            assert raw("GET", f"{MAPS}/kept").ok() == made
            assert raw("GET", f"{MAPS}/gone").code == 404
            version = made["metadata"]["resourceVersion"]
            event = next(raw.watch(MAPS, resourceVersion=version, timeoutSeconds=5))
            assert event["object"]["code"] == 410
            now = raw("GET", MAPS).ok()["metadata"]["resourceVersion"]
            assert int(now) > int(version)
            other = service("other", clusterIP=taken["clusterIP"])
            assert raw("POST", "/api/v1/namespaces/default/services", other).code == 422
    finally:
        again.stop()


def test_a_torn_last_line_is_dropped(spec: ClusterSpec) -> None:
    first = embedded.start(spec)
    with connect(first) as raw:
        raw("POST", MAPS, config_map("kept")).ok()
    first.stop()
    with (spec.directory / "state.jsonl").open("ab") as file:
        file.write(b'{"v":1,"r":"configmaps","k":["def')
    second = embedded.start(spec)
    try:
        with connect(second) as raw:
            assert raw("GET", f"{MAPS}/kept").code == 200
    finally:
        second.stop()


def test_frozen_time_is_no_nodes_silence(spec: ClusterSpec) -> None:
    """After SIGSTOP longer than the grace period nodes are still ready."""
    cluster = embedded.start(spec, node_grace_s=3.0)
    try:
        with connect(cluster) as raw:
            raw("POST", "/api/v1/nodes", node_body("n")).ok()
            os.kill(cluster.process.pid, signal.SIGSTOP)
            stopped = threading.Event()
            stopped.wait(5.0)  # the length of the fault itself
            thawed_s = time.monotonic()
            os.kill(cluster.process.pid, signal.SIGCONT)
            first = raw("GET", "/api/v1/nodes/n").ok()["status"]["conditions"][0]
            answered_s = time.monotonic() - thawed_s
            # A machine so busy that the answer took the grace period shows its silence since then.
            assert first["status"] == "True" or answered_s > 2.5, answered_s
            until(
                "its own silence to count",
                lambda: (
                    raw("GET", "/api/v1/nodes/n").ok()["status"]["conditions"][0]["status"]
                    == "Unknown"
                ),
            )
    finally:
        cluster.stop()


def test_stop_ends_a_frozen_server(spec: ClusterSpec) -> None:
    cluster = embedded.start(spec)
    os.kill(cluster.process.pid, signal.SIGSTOP)
    cluster.stop()
    assert cluster.process.poll() is not None


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers that it got."""

    def do_GET(self) -> None:
        body = f"{self.path}\n{self.headers}".encode()
        self.send_response(203)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Pod", "yes")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def pod_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_pod_proxy(own: EmbeddedCluster, pod_port: int) -> None:
    pods = "/api/v1/namespaces/default/pods"
    container = {"name": "c", "image": "i", "ports": [{"containerPort": pod_port, "name": "http"}]}
    body = {"metadata": {"name": "p"}, "spec": {"containers": [container], "nodeName": "n"}}
    with connect(own) as raw:
        until("the ServiceAccount", lambda: raw("POST", pods, body).code in {201, 409})
        assert raw("GET", f"{pods}/p:{pod_port}/proxy/").code == 400
        state = {"status": {"podIP": "127.0.0.1", "phase": "Running"}}
        raw("PATCH", f"{pods}/p/status", state, MERGE).ok()
        headers = {"Lbctl-Authorization": "Bearer x", "Connection": "close"}
        for name in (f"p:{pod_port}", "p:http", f"http:p:{pod_port}", "p"):
            found = raw("GET", f"{pods}/{name}/proxy/v1/state", headers=headers, a="b")
            assert found.code == 203, found.body
            assert found.body.startswith("/v1/state?a=b\n")
            assert "Lbctl-Authorization: Bearer x" in found.body
            assert "\nAuthorization" not in found.body
        raw("PATCH", f"{pods}/p/status", {"status": {"podIP": "127.0.0.1"}}, MERGE).ok()
        refused = raw("GET", f"{pods}/p:1/proxy/")
        assert refused.code == 503 and "error trying to reach service" in refused.body["message"]


def test_keys_are_made_once(tmp_path: Path) -> None:
    names = ["localhost", "127.0.0.1"]
    first = pki.create(tmp_path / "pki", names)
    before = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    pki.create(tmp_path / "pki", names)
    assert {path.name: path.read_bytes() for path in first.directory.iterdir()} == before
    assert all(path.stat().st_mode & 0o077 == 0 for path in first.directory.iterdir())
    robot = pki.Identity("robot", ("a", "b"))
    both = pki.create(tmp_path / "pki", [*names, "192.0.2.5"], [pki.ADMIN_IDENTITY, robot])
    assert both.token() == first.token() and both.token("robot") != both.token()
    rows = {row[1]: row[3] for row in pki.read_tokens(both.token_file)}
    assert rows == {"admin": ("system:masters",), "robot": ("a", "b")}
    assert both.server_cert.read_bytes() != before["server.crt"]
    assert both.ca_cert.read_bytes() == before["ca.crt"]
