"""The lab's kubelet and scheduler against a whole cluster: what `kubectl get pods` would show.

One lab for the module, with the embedded cluster or, by LBCTL_LAB_CLUSTER=kubernetes, the real one.
Its switches and everything of ours are left out: only nodes and API server are looked at.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from lbctl.errors import LabError
from lbctl.kube import client as kube
from lbctl.kube.client import Resource
from lbctl.lab import bringup, control, processes, workload
from lbctl.lab.api import DAEMON_SETS, DEPLOYMENTS, Api, is_ready, wait
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.kubelet.kubelet import CONTROL_LABEL
from lbctl.lab.lab import Lab, take_down

from .rack import SMALL, traces

ACCOUNTS = Resource("v1", "serviceaccounts")
KIND: ClusterKind = (
    "kubernetes" if os.environ.get("LBCTL_LAB_CLUSTER") == "kubernetes" else "embedded"
)
LIMIT_S = 120.0


class Running:
    """A lab with a cluster, and blocking hands on both."""

    def __init__(self, lab: Lab, api: Api) -> None:
        self.lab = lab
        self.api = api

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {item["metadata"]["name"]: item for item in self.api.all(kube.NODES)}

    def pods(self, app: str) -> list[dict[str, Any]]:
        found = self.api.all(kube.PODS, "default", f"app={app}")
        return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))

    def until(self, what: str, look: Callable[[], Any]) -> Any:
        return wait(what, look, LIMIT_S)

    def ready(self, app: str, count: int) -> list[dict[str, Any]]:
        def look() -> list[dict[str, Any]] | None:
            pods = [pod for pod in self.pods(app) if is_ready(pod)]
            return pods if len(pods) == count == len(self.pods(app)) else None

        return list(self.until(f"{count} pods of {app} to be Ready, and no more", look))

    def restarts(self, app: str) -> int:
        return sum(
            int(item["restartCount"])
            for pod in self.pods(app)
            for item in pod["status"].get("containerStatuses") or []
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Running]:
    name = f"k-{os.getpid()}"
    lab = Lab.up(SMALL, name, print)
    try:
        bringup.start(lab, KIND, print)
        with Api(lab.directory / bringup.KUBECONFIG) as api:
            yield Running(lab, api)
    finally:
        take_down(name)
    assert traces(name) == []


@pytest.fixture
def app(request: pytest.FixtureRequest, cluster: Running) -> Iterator[str]:
    """A name for the test's own workload, which is gone after it."""
    name = str(request.node.originalname)[5:].replace("_", "-")[:40].strip("-")
    yield name
    for resource in (DEPLOYMENTS, DAEMON_SETS, kube.CONFIG_MAPS, ACCOUNTS):
        cluster.api.delete(resource, name)
    cluster.until(f"the pods of {name} to be gone", lambda: not cluster.pods(name))


def host_pods(app: str, script: str, **container: Any) -> dict[str, Any]:
    """A DaemonSet on all nodes: a shell script as nobody, in the host network."""
    main: dict[str, Any] = {
        "name": "main",
        "image": "none",
        "command": ["sh", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        **container,
    }
    volumes: list[dict[str, Any]] = [{"name": "work", "emptyDir": {}}]
    mounts = [{"name": "work", "mountPath": "/work"}]
    if "configured" in container:
        main.pop("configured")
        volumes.append({"name": "conf", "configMap": {"name": app}})
        mounts.append({"name": "conf", "mountPath": "/etc/conf"})
    main["volumeMounts"] = mounts
    spec = {
        "hostNetwork": True,
        "terminationGracePeriodSeconds": 5,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532},
        "containers": [main],
        "volumes": volumes,
    }
    labels = {"app": app}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": app, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def fetch(running: Running, source: str, address: str) -> str:
    return (
        running.lab.machine(source).run("curl", "-s", "-m", "20", f"http://{address}:8080/x").stdout
    )


def test_nodes_register_as_their_machines_are(cluster: Running) -> None:
    nodes = cluster.nodes()
    assert sorted(nodes) == ["control-1", "control-2", "node-1", "node-2", "node-3"]
    for name, node in nodes.items():
        machine = cluster.lab.machine(name)
        addresses = {(a["type"], a["address"]) for a in node["status"]["addresses"]}
        internal = [(kind, address) for kind, address in addresses if kind == "InternalIP"]
        assert sorted(internal) == sorted(("InternalIP", ip) for ip in machine.addresses)
        assert [ip_address(address).version for address in machine.addresses] == [4, 6]
        assert ",".join(node["spec"].get("podCIDRs", [])) == machine.pod_cidr
        tainted = {"key": CONTROL_LABEL, "effect": "NoSchedule"} in node["spec"].get("taints", [])
        assert (
            tainted == (machine.role == "control") == (CONTROL_LABEL in node["metadata"]["labels"])
        )


def renewed(cluster: Running, node: str) -> str:
    lease = cluster.api.get(kube.LEASES, node, "kube-node-lease")
    return str(lease["spec"]["renewTime"])


def _renewed_since(cluster: Running, node: str, before: str) -> bool:
    return renewed(cluster, node) != before


def test_leases_are_renewed(cluster: Running) -> None:
    for name in cluster.nodes():
        before = renewed(cluster, name)
        cluster.until(f"{name} to renew", partial(_renewed_since, cluster, name, before))


def test_a_deployment_is_spread_and_answers_across_nodes(cluster: Running, app: str) -> None:
    cluster.api.apply(workload.deployment(app, 4))
    pods = cluster.ready(app, 4)
    counts = Counter(pod["spec"]["nodeName"] for pod in pods)
    assert sorted(counts.values()) == [1, 1, 2]
    for pod in pods:
        name, address = pod["metadata"]["name"], pod["status"]["podIP"]
        assert fetch(cluster, "kube", address) == f"{name} 192.0.2.5 /x\n"
        four, six = (entry["ip"] for entry in pod["status"]["podIPs"])
        assert four == address
        node = pod["spec"]["nodeName"].removeprefix("node-")
        assert ip_address(six) in ip_network(f"fd00:10:244:{node}::/64")
        assert fetch(cluster, "kube", f"[{six}]") == f"{name} 2001:db8:1::5 /x\n"
        other = "node-2" if node == "1" else "node-1"
        seen = f"{name} 2001:db8:1::2{other[-1]} /x\n"
        assert fetch(cluster, other, f"[{six}]") == seen
    cluster.api.scale(app, 1)
    (left,) = cluster.ready(app, 1)
    links = [
        line
        for node in ("node-1", "node-2", "node-3")
        for line in cluster.lab.machine(node).run("ip", "-br", "link").stdout.splitlines()
        if line.startswith("pod")
    ]
    assert len(links) == 1
    assert fetch(cluster, "kube", left["status"]["podIP"]).startswith(left["metadata"]["name"])


def test_readiness_follows_its_probe_both_ways(cluster: Running, app: str) -> None:
    probe = {
        "exec": {"command": ["test", "-e", "/work/ok"]},
        "periodSeconds": 1,
        "failureThreshold": 1,
    }
    cluster.api.apply(host_pods(app, "touch /work/ok; sleep 600", readinessProbe=probe))
    pods = cluster.ready(app, 3)
    name = pods[0]["metadata"]["name"]
    (pid, *_) = control.container_pids(cluster.lab, name, "main")
    Path(f"/proc/{pid}/root/work/ok").unlink()
    cluster.until("one pod to be unready", lambda: sum(map(is_ready, cluster.pods(app))) == 2)
    Path(f"/proc/{pid}/root/work/ok").touch()
    cluster.ready(app, 3)
    assert cluster.restarts(app) == 0


def test_a_failed_liveness_probe_restarts_the_container(cluster: Running, app: str) -> None:
    probe = {"exec": {"command": ["test", "!", "-e", "/work/bad"]}, "periodSeconds": 1}
    script = "rm -f /work/bad; trap 'exit 0' TERM; while :; do sleep 0.1; done"
    cluster.api.apply(host_pods(app, script, livenessProbe={**probe, "failureThreshold": 2}))
    pods = cluster.ready(app, 3)
    (pid, *_) = control.container_pids(cluster.lab, pods[0]["metadata"]["name"], "main")
    Path(f"/proc/{pid}/root/work/bad").touch()
    cluster.until("the container to be restarted", lambda: cluster.restarts(app) == 1)
    cluster.ready(app, 3)
    assert not Path(f"/proc/{pid}").exists()


def test_faults_hit_one_container_and_it_comes_back(cluster: Running, app: str) -> None:
    cluster.api.apply(host_pods(app, "trap 'exit 0' TERM; while :; do sleep 0.1; done"))
    name = cluster.ready(app, 3)[0]["metadata"]["name"]
    lab = cluster.lab
    control.kill_container(lab, name, "main", 20)
    cluster.until("a first restart", lambda: cluster.restarts(app) == 1)
    cluster.until("its process", lambda: control.container_pids(lab, name, "main"))
    control.crash_container(lab, name, "main")
    cluster.until("a second restart", lambda: cluster.restarts(app) == 2)
    last = next(pod for pod in cluster.pods(app) if pod["metadata"]["name"] == name)
    cluster.until("its process", lambda: control.container_pids(lab, name, "main"))
    assert last["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137
    pids = control.freeze(lab, name, "main")
    cluster.until("its processes to stand still", lambda: _states(pids) <= {"T", "Z", "X"})
    assert "T" in _states(pids)
    control.thaw(lab, name, "main")
    assert cluster.restarts(app) == 2


def _states(pids: list[int]) -> set[str]:
    """State letters (proc(5)); X for one that is gone."""
    found = set()
    for pid in pids:
        try:
            found.add(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        except OSError:
            found.add("X")
    return found


def test_a_config_map_reaches_a_running_container(cluster: Running, app: str) -> None:
    def config(text: str) -> dict[str, Any]:
        meta = {"name": app, "namespace": "default"}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"key": text}}

    cluster.api.apply(host_pods(app, "sleep 600", configured=True))
    waits = cluster.until(
        "the pods to say what they wait for",
        lambda: [json.dumps(pod["status"]) for pod in cluster.pods(app) if "not found" in str(pod)],
    )
    assert app in waits[0]
    cluster.api.apply(config("one"))
    name = cluster.ready(app, 3)[0]["metadata"]["name"]
    (pid, *_) = control.container_pids(cluster.lab, name, "main")
    seen = Path(f"/proc/{pid}/root/etc/conf/..data/key")
    assert seen.read_text() == "one"
    cluster.api.apply(config("two"))
    cluster.until("the new content", lambda: seen.read_text() == "two")
    assert cluster.restarts(app) == 0


def test_a_container_speaks_to_the_api_server_as_its_account(cluster: Running, app: str) -> None:
    script = (
        "d=/var/run/secrets/kubernetes.io/serviceaccount; while :; do "
        'curl -s --cacert $d/ca.crt -H "Authorization: Bearer $(cat $d/token)" -X POST '
        "-H 'Content-Type: application/json' "
        '-d \'{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}\' '
        "https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api; echo; "
        "curl -s --cacert $d/ca.crt https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api"
        " -o /dev/null -w 'anonymous %{http_code} '; "
        'curl -s --cacert $d/ca.crt -H "Authorization: Bearer $(cat $d/token)" '
        "https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api -o /dev/null "
        "-w 'as %{http_code}\\n'; cat $d/namespace; echo; sleep 0.5; done"
    )
    cluster.api.apply(host_pods(app, script))
    pod = cluster.ready(app, 3)[0]
    log = (
        cluster.lab.directory
        / "logs"
        / pod["spec"]["nodeName"]
        / pod["metadata"]["name"]
        / "main.log"
    )
    cluster.until("an answer with the token", lambda: "as 200" in log.read_text())
    cluster.until("its namespace", lambda: "default" in log.read_text().splitlines())


def test_pods_outlive_an_api_server_that_hangs(cluster: Running, app: str) -> None:
    cluster.api.apply(host_pods(app, "trap 'exit 0' TERM; while :; do sleep 0.1; done"))
    name = cluster.ready(app, 3)[0]["metadata"]["name"]
    servers = _api_server_pids(cluster)
    assert servers
    for pid in servers:
        os.kill(pid, signal.SIGSTOP)
    try:
        control.crash_container(cluster.lab, name, "main")
        cluster.until(
            "a restart without the API server",
            lambda: (row := control.find(cluster.lab, name, "main")).restarts == 1 and row.pidns,
        )
    finally:
        for pid in servers:
            os.kill(pid, signal.SIGCONT)
    cluster.until("the restart to be written down", lambda: cluster.restarts(app) == 1)


def _api_server_pids(cluster: Running) -> list[int]:
    """Processes that listen on the API server's port in its machine."""
    netns = cluster.lab.machine("kube").netns.stat().st_ino
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes()
                same = (entry / "ns/net").stat().st_ino == netns
            except OSError:
                continue
            if same and b"apiserver" in command:
                found.append(int(entry.name))
    return found


def test_a_power_cut_ends_pods_and_leases_and_power_brings_them_back(
    cluster: Running, app: str
) -> None:
    cluster.api.apply(workload.deployment(app, 3))
    pods = {pod["spec"]["nodeName"]: pod for pod in cluster.ready(app, 3)}
    lab, victim = cluster.lab, pods["node-2"]["metadata"]["name"]
    before = _rows(cluster, app)
    lab.power_cut("node-2")
    cluster.until("its container to be gone", lambda: victim not in _rows(cluster, app))
    last = renewed(cluster, "node-2")
    other = renewed(cluster, "node-1")
    cluster.until("another node to renew", lambda: renewed(cluster, "node-1") != other)
    assert renewed(cluster, "node-2") == last
    lab.power_on("node-2")
    cluster.until("its pod to run again", lambda: _rows(cluster, app).get(victim))
    cluster.until("its lease to be renewed", lambda: renewed(cluster, "node-2") != last)
    cluster.until("the restart to show", lambda: cluster.restarts(app) == 1)
    after = _rows(cluster, app)
    assert {pod: row for pod, row in after.items() if pod != victim} == {
        pod: row for pod, row in before.items() if pod != victim
    }
    assert fetch(cluster, "kube", cluster.ready(app, 3)[0]["status"]["podIP"])


def _rows(cluster: Running, app: str) -> dict[str, int]:
    """PID namespace of each running container by pod name."""
    rows = control.containers(cluster.lab)
    return {row.pod: row.pidns for row in rows if row.pod.startswith(app) and row.pidns}


def test_the_grace_period_is_granted_and_ends(cluster: Running, app: str) -> None:
    cluster.api.apply(workload.deployment(app, 1, grace_s=3))
    (pod,) = cluster.ready(app, 1)
    talk = (
        "import socket,time,sys\n"
        f"s=socket.create_connection(('{pod['status']['podIP']}',8080),30)\n"
        "s.sendall(b'GET /1 HTTP/1.1\\r\\n\\r\\n'); s.recv(999); print('open',flush=True)\n"
        "t=time.monotonic(); s.settimeout(60)\n"
        "try: s.recv(1)\n"
        "except OSError: pass\n"
        "print(time.monotonic()-t)"
    )
    with cluster.lab.machine("kube").popen("python3", "-c", talk, stdout=-1, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"
        began = time.monotonic()
        cluster.api.scale(app, 0)
        cluster.until("the pod to be gone", lambda: not cluster.pods(app))
        assert time.monotonic() - began > 2.5  # an open connection had its three seconds
        assert float(client.stdout.readline()) > 2.5


def test_a_node_that_is_added_is_served_at_once(cluster: Running, app: str) -> None:
    machine = bringup.add_node(cluster.lab, print)
    assert machine.name in cluster.nodes()
    cluster.api.apply(workload.deployment(app, 4))
    pods = cluster.ready(app, 4)
    assert sorted(Counter(pod["spec"]["nodeName"] for pod in pods).values()) == [1, 1, 1, 1]
    there = next(pod for pod in pods if pod["spec"]["nodeName"] == machine.name)
    assert fetch(cluster, "node-1", there["status"]["podIP"]).startswith(there["metadata"]["name"])


def test_a_crash_of_the_daemon_leaves_no_process_and_a_new_one_takes_over(
    cluster: Running, app: str
) -> None:
    cluster.api.apply(host_pods(app, "sleep 600"), workload.deployment(app, 2))
    count = len(cluster.lab.of_role("node")) + 2
    cluster.ready(app, count)
    rows = [row for row in control.containers(cluster.lab) if row.pod.startswith(app)]
    pids = [
        pid for row in rows for pid in control.container_pids(cluster.lab, row.pod, row.container)
    ]
    assert len(pids) >= count
    daemon = cluster.lab.process("kubelet")
    assert daemon is not None
    os.kill(daemon.pid, signal.SIGKILL)
    cluster.until("its containers to end", lambda: _states(pids) <= {"X", "Z"})
    bringup.start_kubelets(cluster.lab)
    cluster.until("every container to be started again", lambda: cluster.restarts(app) == count)
    cluster.ready(app, count)


def test_a_node_that_cannot_join_is_an_error_that_says_why(cluster: Running) -> None:
    daemon = cluster.lab.process("kubelet")
    assert daemon is not None
    processes.stop([daemon])
    with pytest.raises(LabError, match=r"the lab's kubelet ended: .*kubelet\.log\)"):
        bringup.add_node(cluster.lab, print)
    bringup.start_kubelets(cluster.lab)
    name = cluster.lab.of_role("node")[-1].name
    cluster.until(f"{name} to register after all", lambda: name in cluster.nodes())
