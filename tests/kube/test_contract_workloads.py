"""Workloads, Pods and nodes: the controllers, with scheduler and kubelet played by hand."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lbctl.lab.cluster.handle import Cluster
from tests.kube.kube_tools import (
    HeartbeatNode,
    Kubectl,
    Kubelet,
    Obj,
    Raw,
    node_body,
    until,
    workload,
)

STRATEGIC = "application/strategic-merge-patch+json"
LIVING = 6


@pytest.fixture
def kubelet(raw: Raw, space: str) -> Kubelet:
    return Kubelet(raw, space)


def active(kubelet: Kubelet) -> list[Obj]:
    return [pod for pod in kubelet.pods() if "deletionTimestamp" not in pod["metadata"]]


def status(kubectl: Kubectl, kind: str) -> Obj:
    found: Obj = kubectl.json("get", kind, "web").get("status", {})
    return found


def test_deployment_defaults_and_status(kubectl: Kubectl, kubelet: Kubelet, node: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=2))
    spec = kubectl.json("get", "deploy", "web")["spec"]
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"},
    }
    assert (spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"]) == (10, 600)
    template = spec["template"]["spec"]
    assert template["restartPolicy"] == "Always" and template["dnsPolicy"] == "ClusterFirst"
    assert template["terminationGracePeriodSeconds"] == 30
    container = template["containers"][0]
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert container["ports"] == [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]
    until("two Pods", lambda: len(kubelet.pods()) == 2)
    kubelet.run_all(node)
    kubectl("rollout", "status", "deploy/web", "--timeout=60s")
    state = status(kubectl, "deploy")
    assert (state["replicas"], state["readyReplicas"], state["availableReplicas"]) == (2, 2, 2)
    row = kubectl("get", "deploy", "web", "--no-headers").split()
    assert row[:4] == ["web", "2/2", "2", "2"]
    sets = kubectl.json("get", "rs")["items"]
    assert len(sets) == 1
    labels = sets[0]["metadata"]["labels"]
    digest = labels["pod-template-hash"]
    assert sets[0]["metadata"]["name"] == f"web-{digest}"
    assert all(pod["metadata"]["labels"]["pod-template-hash"] == digest for pod in kubelet.pods())


def test_what_a_new_pod_gets(kubectl: Kubectl, kubelet: Kubelet) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    pod = until("a Pod", kubelet.pods)[0]
    spec = pod["spec"]
    assert spec["serviceAccountName"] == "default" and spec["enableServiceLinks"] is True
    assert {t["key"] for t in spec["tolerations"]} == {
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
    }
    mounts = spec["containers"][0]["volumeMounts"]
    assert mounts[0]["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    sources = spec["volumes"][0]["projected"]["sources"]
    assert [next(iter(source)) for source in sources] == [
        "serviceAccountToken",
        "configMap",
        "downwardAPI",
    ]
    assert pod["status"]["phase"] == "Pending" and pod["status"]["qosClass"] == "BestEffort"
    root = kubectl.json("get", "cm", "kube-root-ca.crt")
    assert "BEGIN CERTIFICATE" in root["data"]["ca.crt"]


def test_scaling_down_prefers_pods_that_do_not_serve(
    kubectl: Kubectl, kubelet: Kubelet, node: str
) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=4))
    until("four Pods", lambda: len(kubelet.pods()) == 4)
    names = [pod["metadata"]["name"] for pod in kubelet.pods()]
    for name in names:
        kubelet.bind(name, node)
    ready = set(names[:2])
    for name in ready:
        kubelet.ready(name)
    for name in names[2:]:
        kubelet.ready(name, ready=False)
    until("two to be ready", lambda: status(kubectl, "deploy").get("readyReplicas") == 2)
    kubectl("scale", "deploy", "web", "--replicas=2")
    until("two Pods", lambda: len(active(kubelet)) == 2)
    assert {pod["metadata"]["name"] for pod in active(kubelet)} == ready
    kubectl("scale", "deploy", "web", "--replicas=0")
    until("no Pod", lambda: not active(kubelet))


def test_deleted_pods_have_their_grace_and_are_replaced(
    kubectl: Kubectl, kubelet: Kubelet, raw: Raw, space: str, node: str
) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    pod = until("a Pod", kubelet.pods)[0]["metadata"]["name"]
    kubelet.bind(pod, node)
    kubelet.ready(pod)
    path = f"/api/v1/namespaces/{space}/pods/{pod}"
    marked = raw("DELETE", path).ok()["metadata"]
    assert marked["deletionGracePeriodSeconds"] == 30 and marked["deletionTimestamp"]
    until("a replacement", lambda: len(active(kubelet)) == 1)
    assert raw("GET", path).code == 200
    kubelet.finish(pod)
    assert raw("GET", path).code == 404
    waiting = active(kubelet)[0]["metadata"]["name"]
    raw("DELETE", f"/api/v1/namespaces/{space}/pods/{waiting}").ok()  # on no node: gone at once
    assert raw("GET", f"/api/v1/namespaces/{space}/pods/{waiting}").code == 404


def test_binding(kubectl: Kubectl, kubelet: Kubelet, raw: Raw, space: str, node: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    pod = until("a Pod", kubelet.pods)[0]["metadata"]["name"]
    path = f"/api/v1/namespaces/{space}/pods/{pod}"
    patched = raw("PATCH", path, {"spec": {"nodeName": node}}, STRATEGIC)
    assert patched.code == 422 and "pod updates may not change fields" in patched.body["message"]
    kubelet.bind(pod, node)
    body: Obj = {"metadata": {"name": pod}, "target": {"kind": "Node", "name": "node-b"}}
    body |= {"apiVersion": "v1", "kind": "Binding"}
    again = raw("POST", f"{path}/binding", body)
    assert again.code == 409 and "is already assigned to node" in again.body["message"]
    found = raw("GET", path).ok()
    assert found["spec"]["nodeName"] == node
    kinds = {entry["type"]: entry["status"] for entry in found["status"]["conditions"]}
    assert kinds["PodScheduled"] == "True"
    on_node = raw("GET", "/api/v1/pods", fieldSelector=f"spec.nodeName={node}").ok()["items"]
    assert pod in [item["metadata"]["name"] for item in on_node]


def test_rolling_update_keeps_within_its_limits(
    kubectl: Kubectl, kubelet: Kubelet, node: str
) -> None:
    body = workload("Deployment", replicas=4)
    limits = {"maxSurge": 1, "maxUnavailable": 0}
    body["spec"]["strategy"] = {"type": "RollingUpdate", "rollingUpdate": limits}
    kubectl("apply", "-f", "-", stdin=body)

    def settled() -> bool:
        kubelet.run_all(node)
        state = status(kubectl, "deploy")
        pods = active(kubelet)
        return state.get("availableReplicas") == 4 == len(pods) == len(kubelet.pods())

    until("four ready Pods", settled)
    before = {pod["metadata"]["name"] for pod in kubelet.pods()}
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "lbctl/pod:2"
    kubectl("apply", "-f", "-", stdin=body)
    most, least = 0, 99

    def rolled() -> bool:
        nonlocal most, least
        pods = active(kubelet)
        ready = [p for p in pods if any(c["type"] == "Ready" for c in _conditions(p))]
        most, least = max(most, len(pods)), min(least, len(ready))
        kubelet.run_all(node)
        new = {pod["metadata"]["name"] for pod in active(kubelet)}
        return not new & before and settled()

    until("all Pods to be new", rolled)
    assert most <= 5 and least >= 4, (most, least)
    assert len(kubectl.json("get", "rs")["items"]) == 2
    revision = kubectl.json("get", "deploy", "web")["metadata"]["annotations"]
    assert revision["deployment.kubernetes.io/revision"] == "2"
    kubectl("rollout", "undo", "deploy/web")
    until(
        "the former template to be back",
        lambda: (
            settled()
            and all(p["spec"]["containers"][0]["image"] == "lbctl/pod:1" for p in active(kubelet))
        ),
    )
    assert len(kubectl.json("get", "rs")["items"]) == 2


def _conditions(pod: Obj) -> list[Obj]:
    found: list[Obj] = [c for c in pod["status"].get("conditions", []) if c["status"] == "True"]
    return found


def test_recreate(kubectl: Kubectl, kubelet: Kubelet, node: str) -> None:
    body = workload("Deployment", replicas=2)
    body["spec"]["strategy"] = {"type": "Recreate"}
    kubectl("apply", "-f", "-", stdin=body)
    until("two Pods", lambda: len(kubelet.pods()) == 2)
    kubelet.run_all(node)
    old = {pod["metadata"]["name"] for pod in kubelet.pods()}
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "lbctl/pod:2"
    kubectl("apply", "-f", "-", stdin=body)
    until("the old ones to end", lambda: not active(kubelet))
    assert {pod["metadata"]["name"] for pod in kubelet.pods()} == old
    kubelet.run_all(node)
    until("new ones", lambda: len(active(kubelet)) == 2)


def test_selectors_are_checked_and_fixed(kubectl: Kubectl, raw: Raw, space: str) -> None:
    path = f"/apis/apps/v1/namespaces/{space}/deployments"
    body = workload("Deployment")
    body["spec"]["selector"] = {"matchLabels": {"app": "other"}}
    refused = raw("POST", path, body)
    assert refused.code == 422
    assert "`selector` does not match template `labels`" in refused.body["message"]
    assert refused.body["message"].startswith('Deployment.apps "web" is invalid')
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=0))
    patch: Obj = {"spec": {"selector": {"matchLabels": {"more": "x"}}}}
    patch["spec"]["template"] = {"metadata": {"labels": {"more": "x"}}}
    changed = raw("PATCH", f"{path}/web", patch, STRATEGIC)
    assert changed.code == 422 and "field is immutable" in changed.body["message"]


def test_scale_subresource(kubectl: Kubectl, raw: Raw, space: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=0))
    path = f"/apis/apps/v1/namespaces/{space}/deployments/web/scale"
    scale = raw("GET", path).ok()
    assert scale["kind"] == "Scale" and scale["spec"] in ({"replicas": 0}, {})

    def scaled() -> bool:  # the controller may write in between
        fresh = {**raw("GET", path).ok(), "spec": {"replicas": 2}}
        return raw("PUT", path, fresh).code == 200

    until("the scale to be written", scaled)
    scale["metadata"]["resourceVersion"] = "1"
    scale["spec"] = {"replicas": 3}
    found = kubectl.json("get", "deploy", "web")
    assert found["spec"]["replicas"] == 2 and found["metadata"]["generation"] == 2
    assert raw("PUT", path, scale).code == 409


def test_stateful_set_in_order(kubectl: Kubectl, kubelet: Kubelet, node: str) -> None:
    body = workload("StatefulSet", replicas=3, serviceName="web")
    kubectl("apply", "-f", "-", stdin=body)
    seen: list[int] = []

    def names() -> list[str]:
        return [pod["metadata"]["name"] for pod in kubelet.pods()]

    until("web-0", lambda: names() == ["web-0"])

    def grown() -> bool:
        seen.append(len(names()))
        kubelet.run_all(node)
        return names() == ["web-0", "web-1", "web-2"]

    until("all three", grown)
    assert seen == sorted(seen)
    kubelet.run_all(node)
    until("them to be ready", lambda: status(kubectl, "sts").get("readyReplicas") == 3)
    pod = kubelet.pods()[0]
    assert pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"] == "web-0"
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("web-0", "web")
    kubectl("scale", "sts", "web", "--replicas=1")
    marked = until(
        "the last one to go first",
        lambda: [p["metadata"]["name"] for p in kubelet.pods() if p not in active(kubelet)],
    )
    assert marked == ["web-2"]

    def shrunk() -> bool:
        kubelet.run_all(node)
        return names() == ["web-0"]

    until("one to be left", shrunk)


def test_stateful_set_in_parallel(kubectl: Kubectl, kubelet: Kubelet) -> None:
    body = workload("StatefulSet", replicas=3, podManagementPolicy="Parallel", serviceName="web")
    kubectl("apply", "-f", "-", stdin=body)
    until("all at once", lambda: len(kubelet.pods()) == 3)


# nodes


@pytest.fixture
def nodes(cluster: Cluster, space: str) -> Iterator[list[str]]:
    """Two nodes of this test's own, told apart from others by the label `of`."""

    def client() -> Raw:
        return Raw(cluster.url, cluster.ca_file, cluster.admin_token)

    names = [f"n{number}-{secrets.token_hex(3)}" for number in range(2)]
    with HeartbeatNode(client, names[0], of=space), HeartbeatNode(client, names[1], of=space):
        yield names


def test_node_columns(kubectl: Kubectl, nodes: list[str]) -> None:
    shown = kubectl("get", "node", nodes[0], "-o", "wide").splitlines()
    assert shown[0].split()[:6] == ["NAME", "STATUS", "ROLES", "AGE", "VERSION", "INTERNAL-IP"]
    row = shown[1].split()
    assert (row[0], row[1], row[2], row[4], row[5]) == (
        nodes[0],
        "Ready",
        "<none>",
        "v1.36.4",
        "192.0.2.77",
    )
    kubectl("cordon", nodes[0])
    assert "SchedulingDisabled" in kubectl("get", "node", nodes[0], "--no-headers")
    until(
        "the taint of a cordoned node",
        lambda: any(
            taint["key"] == "node.kubernetes.io/unschedulable"
            for taint in kubectl.json("get", "node", nodes[0])["spec"].get("taints", [])
        ),
    )
    kubectl("uncordon", nodes[0])
    assert "InternalIP:  192.0.2.77" in kubectl("describe", "node", nodes[0])


def pinned(pod: Obj) -> str:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    found: str = terms[0]["matchFields"][0]["values"][0]
    return found


def test_daemon_set(kubectl: Kubectl, kubelet: Kubelet, nodes: list[str], space: str) -> None:
    body = workload("DaemonSet")
    body["spec"]["template"]["spec"]["nodeSelector"] = {"of": space}
    kubectl("apply", "-f", "-", stdin=body)
    until("a Pod per node", lambda: sorted(map(pinned, kubelet.pods())) == sorted(nodes))
    for pod in kubelet.pods():
        kubelet.bind(pod["metadata"]["name"], pinned(pod))
        kubelet.ready(pod["metadata"]["name"])
    until("both to be ready", lambda: status(kubectl, "ds").get("numberReady") == 2)
    state = status(kubectl, "ds")
    assert (state["desiredNumberScheduled"], state["currentNumberScheduled"]) == (2, 2)
    kubectl("label", "node", nodes[1], "of-")
    gone = until(
        "the Pod to leave",
        lambda: [p["metadata"]["name"] for p in kubelet.pods() if p not in active(kubelet)],
    )
    kubelet.finish(gone[0])
    kubectl("taint", "node", nodes[0], "x=y:NoExecute")
    until("the other one to leave the tainted node", lambda: not active(kubelet))


def test_daemon_set_rolls(kubectl: Kubectl, kubelet: Kubelet, nodes: list[str], space: str) -> None:
    body = workload("DaemonSet")
    body["spec"]["template"]["spec"]["nodeSelector"] = {"of": space}
    kubectl("apply", "-f", "-", stdin=body)

    def turn() -> list[str]:
        for pod in kubelet.pods():
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                kubelet.finish(name)
            elif not pod["spec"].get("nodeName"):
                kubelet.bind(name, pinned(pod))
                kubelet.ready(name)
        return [pod["spec"]["containers"][0]["image"] for pod in active(kubelet)]

    until("both to run", lambda: turn() == ["lbctl/pod:1"] * 2)
    until(
        "both to be available",
        lambda: turn() and status(kubectl, "ds").get("numberAvailable") == 2,
    )
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "lbctl/pod:2"
    kubectl("apply", "-f", "-", stdin=body)
    marked = until(
        "the first to be replaced",
        lambda: [p for p in kubelet.pods() if "deletionTimestamp" in p["metadata"]],
    )
    assert len(marked) == 1  # maxUnavailable is 1
    until("both to be new", lambda: turn() == ["lbctl/pod:2"] * 2)


def taints(raw: Raw, path: str) -> set[tuple[str, str]]:
    found = raw("GET", path).ok().get("spec", {}).get("taints", [])
    return {(taint["key"].removeprefix("node.kubernetes.io/"), taint["effect"]) for taint in found}


def test_a_node_that_says_not_ready_is_tainted(raw: Raw, nodes: list[str]) -> None:
    path = f"/api/v1/nodes/{nodes[0]}"

    def report(value: str) -> None:
        condition = {"type": "Ready", "status": value, "reason": "Test"}
        raw("PATCH", f"{path}/status", {"status": {"conditions": [condition]}}, STRATEGIC).ok()

    report("False")
    expected = {("not-ready", "NoSchedule"), ("not-ready", "NoExecute")}
    until("the taints", lambda: taints(raw, path) == expected)
    report("True")
    until("the taints to go", lambda: not taints(raw, path))


def test_a_silent_node_takes_its_pods_along(
    cluster: Cluster, kubectl: Kubectl, kubelet: Kubelet, raw: Raw, space: str
) -> None:
    """A real controller waits 50 s for a heartbeat, the shared embedded one 20 s.

    Where more than 55 % of the nodes are silent the controller blames itself and evicts nothing; so
    this test brings living ones, whatever other tests have left silent.
    """

    def client() -> Raw:
        return Raw(cluster.url, cluster.ca_file, cluster.admin_token)

    name = f"silent-{secrets.token_hex(3)}"
    with ExitStack() as living:
        for number in range(LIVING):
            living.enter_context(HeartbeatNode(client, f"living-{number}-{name}"))
        with HeartbeatNode(client, name):
            kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
            pod = until("a Pod", kubelet.pods)[0]["metadata"]["name"]
            kubelet.bind(pod, name)
            kubelet.ready(pod)
        raw("POST", "/api/v1/nodes", node_body(name)).ok()  # nobody beats for this one
        assert_tainted_and_unready(raw, name, space, pod)
        raw("DELETE", f"/api/v1/nodes/{name}")


def assert_tainted_and_unready(raw: Raw, node: str, space: str, pod: str) -> None:
    """The node becomes unknown and is tainted, and its Pod is no longer ready."""
    path = f"/api/v1/nodes/{node}"
    condition = until(
        "the node to be unknown",
        lambda: [
            c
            for c in raw("GET", path).ok()["status"]["conditions"]
            if c["type"] == "Ready" and c["status"] == "Unknown"
        ],
        limit_s=200,
    )
    assert condition[0]["reason"] == "NodeStatusUnknown"
    expected = {("unreachable", "NoSchedule"), ("unreachable", "NoExecute")}
    until("the taints", lambda: taints(raw, path) == expected)
    pod_path = f"/api/v1/namespaces/{space}/pods/{pod}"
    until(
        "the Pod to be not ready",
        lambda: (
            {c["type"]: c["status"] for c in raw("GET", pod_path).ok()["status"]["conditions"]}[
                "Ready"
            ]
            == "False"
        ),
    )


def test_leases(cluster: Cluster, raw: Raw, space: str) -> None:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{space}/leases"
    spec = {"holderIdentity": "me", "leaseDurationSeconds": 15}
    spec |= {
        "renewTime": "2026-01-01T00:00:00.000001Z",
        "acquireTime": "2026-01-01T00:00:00.000000Z",
    }
    body: Obj = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
    body |= {"metadata": {"name": "l"}, "spec": spec}
    made = raw("POST", path, body).ok()
    assert made["spec"]["renewTime"] == "2026-01-01T00:00:00.000001Z"
    changed = {**made, "spec": {**made["spec"], "holderIdentity": "you"}}
    raw("PUT", f"{path}/l", changed).ok()
    assert raw("PUT", f"{path}/l", changed).code == 409
