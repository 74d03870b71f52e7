"""Plain kubectl, without flags: apply (also server-side), patch, label, watch, tokens, CRDs."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

from lbctl.lab.cluster.handle import Cluster
from tests import programs
from tests.kube.kube_tools import (
    Kubectl,
    Obj,
    Raw,
    config_map,
    crd,
    service,
    until,
    workload,
)

MERGE = "application/merge-patch+json"


def test_apply_three_ways(kubectl: Kubectl) -> None:
    body = service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 81}])
    assert kubectl("apply", "-f", "-", stdin=body).strip() == "service/web created"
    assert kubectl("apply", "-f", "-", stdin=body).strip() == "service/web unchanged"
    kubectl("label", "svc", "web", "by=hand")
    body["spec"]["ports"] = [{"name": "b", "port": 81}]
    assert kubectl("apply", "-f", "-", stdin=body).strip() == "service/web configured"
    found = kubectl.json("get", "svc", "web")
    assert [port["name"] for port in found["spec"]["ports"]] == ["b"]
    assert found["metadata"]["labels"] == {"by": "hand"}
    body["spec"]["nonsense"] = 1
    assert 'unknown field "spec.nonsense"' in kubectl.fails("apply", "-f", "-", stdin=body)


def test_apply_shows_a_difference(kubectl: Kubectl) -> None:
    body = config_map("one", a="1")
    kubectl("apply", "-f", "-", stdin=body)
    body["data"]["a"] = "2"
    done = kubectl.run("diff", "-f", "-", stdin=body)
    assert done.returncode == 1 and "+  a:" in done.stdout, done.stderr
    assert kubectl.json("get", "cm", "one")["data"] == {"a": "1"}


def server_side(kubectl: Kubectl, manager: str, body: Obj, *more: str) -> str:
    arguments = ("apply", "--server-side", f"--field-manager={manager}", *more, "-f", "-")
    return kubectl(*arguments, stdin=body)


def test_server_side_apply_owns_fields(kubectl: Kubectl) -> None:
    server_side(kubectl, "alice", config_map("one", a="1", b="2"))
    server_side(kubectl, "bob", config_map("one", c="3"))
    assert kubectl.json("get", "cm", "one")["data"] == {"a": "1", "b": "2", "c": "3"}
    server_side(kubectl, "alice", config_map("one", a="1"))
    assert kubectl.json("get", "cm", "one")["data"] == {"a": "1", "c": "3"}
    arguments = ("apply", "--server-side", "--field-manager=bob", "-f", "-")
    error = kubectl.fails(*arguments, stdin=config_map("one", a="x", c="3"))
    assert 'conflict with "alice"' in error and ".data.a" in error
    server_side(kubectl, "bob", config_map("one", a="x", c="3"), "--force-conflicts")
    assert kubectl.json("get", "cm", "one")["data"]["a"] == "x"
    server_side(kubectl, "alice", config_map("one"))
    assert kubectl.json("get", "cm", "one")["data"] == {"a": "x", "c": "3"}


def test_server_side_apply_merges_lists_by_key(kubectl: Kubectl) -> None:
    body = workload("Deployment", replicas=0)
    server_side(kubectl, "alice", body)
    other: Obj = workload("Deployment")
    container = {"name": "side", "image": "lbctl/side:1"}
    other["spec"] = {"template": {"spec": {"containers": [container]}}}
    server_side(kubectl, "bob", other)
    found = kubectl.json("get", "deploy", "web")["spec"]["template"]["spec"]["containers"]
    assert {entry["name"] for entry in found} == {"web", "side"}
    other["spec"]["template"]["spec"]["containers"] = []
    server_side(kubectl, "bob", other)
    found = kubectl.json("get", "deploy", "web")["spec"]["template"]["spec"]["containers"]
    assert [entry["name"] for entry in found] == ["web"]
    owners = kubectl.json("get", "deploy", "web", "--show-managed-fields")["metadata"]
    alice = next(e for e in owners["managedFields"] if e["manager"] == "alice")
    assert alice["operation"] == "Apply" and "f:replicas" in alice["fieldsV1"]["f:spec"]


def test_from_client_side_to_server_side(kubectl: Kubectl) -> None:
    body = service()
    kubectl("apply", "-f", "-", stdin=body)
    kubectl("apply", "--server-side", "-f", "-", stdin=body)
    managers = {
        (entry["manager"], entry["operation"])
        for entry in kubectl.json("get", "svc", "web", "--show-managed-fields")["metadata"][
            "managedFields"
        ]
    }
    assert ("kubectl", "Apply") in managers


def test_server_side_apply_of_what_client_side_apply_made(kubectl: Kubectl) -> None:
    """Taken over, but for a map that is owned as a whole and in which a default was written."""
    body = workload("Deployment", replicas=0)
    container = body["spec"]["template"]["spec"]["containers"][0]
    kubectl("apply", "-f", "-", stdin=body)
    container["image"] = "lbctl/pod:2"
    kubectl("apply", "--server-side", "-f", "-", stdin=body)
    assert '"lbctl/pod:2"' in kubectl("get", "deploy", "web", "-o", "json")
    other = workload("Deployment", "other", replicas=0)
    variable = {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    other["spec"]["template"]["spec"]["containers"][0]["env"] = [variable]
    kubectl("apply", "-f", "-", stdin=other)
    assert ".valueFrom.fieldRef" in kubectl.fails("apply", "--server-side", "-f", "-", stdin=other)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "bare"}}
    kubectl("apply", "-f", "-", stdin=account)
    kubectl("apply", "--server-side", "-f", "-", stdin=account)


def test_an_edit_by_another_conflicts_with_apply(kubectl: Kubectl) -> None:
    server_side(kubectl, "alice", workload("Deployment", replicas=1))
    kubectl("scale", "deploy", "web", "--replicas=2")
    arguments = ("apply", "--server-side", "--field-manager=alice", "-f", "-")
    error = kubectl.fails(*arguments, stdin=workload("Deployment", replicas=1))
    assert ".spec.replicas" in error


def test_label_annotate_patch_create_delete(kubectl: Kubectl) -> None:
    kubectl("create", "configmap", "one", "--from-literal=a=1")
    kubectl("label", "cm", "one", "color=red")
    assert "already has a value" in kubectl.fails("label", "cm", "one", "color=blue")
    kubectl("label", "cm", "one", "color=blue", "--overwrite")
    kubectl("annotate", "cm", "one", "note=hello")
    kubectl("patch", "cm", "one", "--type=merge", "-p", '{"data":{"b":"2"}}')
    kubectl("patch", "cm", "one", "-p", '{"data":{"c":"3"}}')
    found = kubectl.json("get", "cm", "one")
    assert found["data"] == {"a": "1", "b": "2", "c": "3"}
    assert found["metadata"]["labels"] == {"color": "blue"}
    assert found["metadata"]["annotations"] == {"note": "hello"}
    assert kubectl("delete", "cm", "one").startswith('configmap "one" deleted')
    assert 'configmaps "one" not found' in kubectl.fails("get", "cm", "one")


def test_typed_creates(kubectl: Kubectl) -> None:
    """These come as protobuf."""
    kubectl("create", "secret", "generic", "s", "--from-literal=key=value")
    assert kubectl.json("get", "secret", "s")["data"] == {"key": "dmFsdWU="}
    kubectl("create", "serviceaccount", "robot")
    kubectl("create", "deployment", "d", "--image=lbctl/pod:1", "--replicas=0", "--port=80")
    found = kubectl.json("get", "deploy", "d")["spec"]
    assert found["replicas"] == 0
    container = found["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"containerPort": 80, "protocol": "TCP"}]
    kubectl("create", "service", "loadbalancer", "lb", "--tcp=80:8080")
    ports = kubectl.json("get", "svc", "lb")["spec"]["ports"]
    assert [(p["port"], p["targetPort"]) for p in ports] == [(80, 8080)]
    kubectl("create", "role", "r", "--verb=get", "--resource=pods")
    assert kubectl.json("get", "role", "r")["rules"][0]["verbs"] == ["get"]
    kubectl("create", "rolebinding", "rb", "--role=r", "--serviceaccount=x:y")
    assert kubectl("auth", "can-i", "create", "pods").strip() == "yes"


def test_every_kind_can_be_listed(kubectl: Kubectl) -> None:
    kinds = (
        "namespaces,nodes,pods,deployments,replicasets,daemonsets,statefulsets,services,"
        "endpointslices,configmaps,secrets,serviceaccounts,leases,events,"
        "customresourcedefinitions,roles,clusterroles,rolebindings,clusterrolebindings"
    )
    for kind in kinds.split(","):
        kubectl("get", kind)
    kubectl("get", "all", "-A")


@pytest.mark.parametrize(
    ("kind", "headings"),
    [
        ("pods", "NAME READY STATUS RESTARTS AGE IP NODE NOMINATED NODE READINESS GATES"),
        ("deploy", "NAME READY UP-TO-DATE AVAILABLE AGE CONTAINERS IMAGES SELECTOR"),
        ("rs", "NAME DESIRED CURRENT READY AGE CONTAINERS IMAGES SELECTOR"),
        ("configmaps", "NAME DATA AGE"),
        ("serviceaccounts", "NAME AGE"),
    ],
)
def test_columns(kubectl: Kubectl, kind: str, headings: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    until("a row", lambda: kubectl("get", kind, "--no-headers"))
    first = kubectl("get", kind, "-o", "wide").splitlines()[0]
    shown = [word for word in first.split() if word != "SECRETS"]  # a column that 1.36 dropped
    assert shown == headings.split()


def test_describe(kubectl: Kubectl, space: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    until("a Pod", lambda: kubectl("get", "pods", "-o", "name"))
    assert "NewReplicaSet:" in kubectl("describe", "deploy", "web")
    pod = kubectl("get", "pods", "-o", "name").split()[0]
    shown = kubectl("describe", pod)
    assert re.search(r"Controlled By: +ReplicaSet/web-", shown), shown
    assert re.search(r"Status: +Pending", shown), shown
    for kind in ("rs", f"ns/{space}", "cm", "sa"):  # other tests' namespaces come and go
        kubectl("describe", kind)


def test_watching_with_kubectl(cluster: Cluster, kubectl: Kubectl, space: str) -> None:
    kubectl("create", "configmap", "one", "--from-literal=a=1")
    command = [programs.kubectl(), "--kubeconfig", str(cluster.kubeconfig), "-n", space]
    command += ["get", "cm", "-w", "--no-headers", "--field-selector=metadata.name=one"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().split()[:2] == ["one", "1"]
        kubectl("patch", "cm", "one", "-p", '{"data":{"b":"2"}}')
        assert process.stdout.readline().split()[:2] == ["one", "2"]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_waiting_with_kubectl(kubectl: Kubectl) -> None:
    kubectl("create", "configmap", "one")
    kubectl("patch", "cm", "one", "-p", '{"metadata":{"finalizers":["lbctl.io/x"]}}')
    kubectl("delete", "cm", "one", "--wait=false")
    error = kubectl.fails("wait", "--for=delete", "cm/one", "--timeout=1s")
    assert "timed out" in error
    kubectl("patch", "cm", "one", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    kubectl("wait", "--for=delete", "cm/one", "--timeout=30s")


def test_events_by_object(kubectl: Kubectl, raw: Raw, space: str) -> None:
    kubectl("apply", "-f", "-", stdin=service())
    uid = kubectl.json("get", "svc", "web")["metadata"]["uid"]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for name in ("web", "other"):
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{name}."},
            "involvedObject": {"kind": "Service", "name": name, "namespace": space, "uid": uid},
            "reason": "Allocated",
            "message": f"an address for {name}",
            "type": "Normal",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": "test"},
        }
        raw("POST", f"/api/v1/namespaces/{space}/events", event).ok()
    selector = "involvedObject.kind=Service,involvedObject.name=web,type=Normal"
    shown = kubectl("get", "events", f"--field-selector={selector}", "--no-headers")
    assert "service/web" in shown and "service/other" not in shown
    assert "an address for web" in kubectl("describe", "svc", "web")


# tokens


def test_service_account_tokens(cluster: Cluster, kubectl: Kubectl, raw: Raw, space: str) -> None:
    kubectl("create", "serviceaccount", "robot")
    token = kubectl("create", "token", "robot").strip()
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
    path = "/apis/authentication.k8s.io/v1/tokenreviews"
    found = raw("POST", path, {**review, "spec": {"token": token}}).ok()["status"]
    assert found["authenticated"] is True
    user = found["user"]
    assert user["username"] == f"system:serviceaccount:{space}:robot"
    assert {
        "system:serviceaccounts",
        f"system:serviceaccounts:{space}",
        "system:authenticated",
    } <= set(user["groups"])
    wrong = raw("POST", path, {**review, "spec": {"token": token + "x"}}).ok()["status"]
    assert not wrong.get("authenticated")
    other = {"token": token, "audiences": ["someone-else"]}
    assert not raw("POST", path, {**review, "spec": other}).ok()["status"].get("authenticated")
    with Raw(cluster.url, cluster.ca_file, token) as robot:
        assert robot("GET", "/version").code == 200
        assert robot("GET", "/api").code == 200
        who = robot(
            "POST",
            "/apis/authentication.k8s.io/v1/selfsubjectreviews",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"},
        ).ok()
        assert who["status"]["userInfo"]["username"].endswith(":robot")
    kubectl("delete", "serviceaccount", "robot")
    until(
        "the token to die with its account",
        lambda: (
            not raw("POST", path, {**review, "spec": {"token": token}})
            .ok()["status"]
            .get("authenticated")
        ),
    )


def test_who_may_ask(cluster: Cluster, raw: Raw) -> None:
    with Raw(cluster.url, cluster.ca_file, "no-such-token") as stranger:
        answer = stranger("GET", "/api/v1/namespaces")
        assert (answer.code, answer.body["reason"]) == (401, "Unauthorized")
    with Raw(cluster.url, cluster.ca_file, None) as nobody:
        answer = nobody("GET", "/api/v1/namespaces")
        assert answer.code in {401, 403}
        assert nobody("GET", "/readyz").code in {200, 401}
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    review: Obj = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
    asked = {"path": "/v1/state", "verb": "get"}
    masters = {"user": "x", "groups": ["system:masters"], "nonResourceAttributes": asked}
    assert raw("POST", path, {**review, "spec": masters}).ok()["status"]["allowed"] is True
    nobody_spec = {"user": "system:anonymous", "nonResourceAttributes": asked}
    assert raw("POST", path, {**review, "spec": nobody_spec}).ok()["status"]["allowed"] is False


# custom resources


def eip(name: str, **spec: object) -> Obj:
    owner = {"namespace": "default", "name": "web", "uid": "1"}
    content = {"address": name, "pool": "public", "owner": owner, "phase": "Bound", **spec}
    body = {"apiVersion": "lbctl.io/v1", "kind": "EIP", "metadata": {"name": name}}
    return {**body, "spec": content}


@pytest.fixture
def eips(kubectl: Kubectl, raw: Raw) -> str:
    kubectl("apply", "-f", str(crd()))
    kubectl("wait", "--for=condition=Established", "crd/eips.lbctl.io", "--timeout=60s")
    path = "/apis/lbctl.io/v1/eips"
    until("the resource to be served", lambda: raw("GET", path).code == 200)
    return path


def test_eips(kubectl: Kubectl, raw: Raw, eips: str, space: str) -> None:
    name = f"198.51.100.{int(space[-2:], 16)}"
    raw("DELETE", f"{eips}/{name}")
    made = raw("POST", eips, eip(name)).ok()
    assert made["spec"]["forwarding"] is True and made["metadata"]["generation"] == 1
    assert raw("POST", eips, eip(name)).code == 409
    lines = kubectl("get", "eips").splitlines()
    assert lines[0].split() == ["NAME", "ADDRESS", "POOL", "OWNER", "PHASE", "AGE"]
    row = next(line for line in lines if line.startswith(name + " "))
    assert row.split()[1:5] == [name, "public", "web", "Bound"]
    patch = {"spec": {"withdrawnBy": {"manager-0": "2026-01-01T00:00:00Z"}}}
    changed = raw("PATCH", f"{eips}/{name}", patch, MERGE).ok()
    assert changed["spec"]["withdrawnBy"] == patch["spec"]["withdrawnBy"]
    assert changed["metadata"]["generation"] == 2
    wrong = raw("PATCH", f"{eips}/{name}", {"spec": {"phase": "Lost"}}, MERGE)
    assert wrong.code == 422 and "Unsupported value" in wrong.body["message"]
    unversioned = raw("PUT", f"{eips}/{name}", eip(name))
    assert unversioned.code == 422 and "must be specified for an update" in str(unversioned.body)
    lacking = eip(name)
    del lacking["spec"]["pool"]
    lacking["metadata"]["name"] = "x" + space
    refused = raw("POST", eips, lacking)
    assert refused.code == 422 and "spec.pool" in str(refused.body["details"]["causes"])
    strategic = raw("PATCH", f"{eips}/{name}", patch, "application/strategic-merge-patch+json")
    assert strategic.code == 415
    kubectl("apply", "-f", "-", stdin=eip(name, pool="other"))
    assert kubectl.json("get", "eip", name)["spec"]["pool"] == "other"
    kubectl("delete", "eip", name)
    assert raw("GET", f"{eips}/{name}").code == 404


def test_any_custom_resource_comes_and_goes(kubectl: Kubectl, raw: Raw, space: str) -> None:
    group = f"{space}.example.com"
    names = {"kind": "Thing", "plural": "things", "singular": "thing", "shortNames": ["th"]}
    schema = {"type": "object", "properties": {"size": {"type": "integer", "minimum": 1}}}
    root = {"type": "object", "properties": {"spec": schema, "status": {"type": "object"}}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root},
        "subresources": {"status": {}},
    }
    body = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"things.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [version]},
    }
    kubectl("apply", "-f", "-", stdin=body)
    kubectl("wait", "--for=condition=Established", f"crd/things.{group}", "--timeout=60s")
    thing = {
        "apiVersion": f"{group}/v1",
        "kind": "Thing",
        "metadata": {"name": "one"},
        "spec": {"size": 2},
    }
    until("a thing", lambda: kubectl.run("apply", "-f", "-", stdin=thing).returncode == 0)
    assert kubectl.json("get", "th", "one")["spec"] == {"size": 2}
    path = f"/apis/{group}/v1/namespaces/{space}/things"
    assert raw("PATCH", f"{path}/one", {"spec": {"size": 0}}, MERGE).code == 422
    assert raw("PATCH", f"{path}/one", {"spec": {"size": "big"}}, MERGE).code == 422
    kubectl("delete", "crd", f"things.{group}")
    until("the resource to be gone", lambda: raw("GET", path).code == 404)


def test_kustomize_base_applies(kubectl: Kubectl, cluster: Cluster) -> None:
    base = Path(__file__).parents[2] / "deploy" / "kustomize" / "base"
    plain = Kubectl(cluster.kubeconfig)
    rendered = plain("kustomize", str(base))
    done = plain.run("apply", "--dry-run=server", "-k", str(base))
    # On a server-side dry run what needs the namespace or the CRD of the same apply is not found.
    errors = [line for line in done.stderr.splitlines() if "not found" not in line]
    assert not [line for line in errors if line.startswith("Error")], errors
    assert "kind: DaemonSet" in rendered and json.dumps(done.stdout)
