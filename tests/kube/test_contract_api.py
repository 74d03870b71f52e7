"""The API's semantics over plain HTTP: versions, conflicts, watches, pages, patches, refusals."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lbctl.lab.cluster.handle import Cluster
from tests.kube.kube_tools import Obj, Raw, config_map, service, until

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON = "application/json-patch+json"


def maps(space: str) -> str:
    return f"/api/v1/namespaces/{space}/configmaps"


def services(space: str) -> str:
    return f"/api/v1/namespaces/{space}/services"


def test_versions_and_conflicts(raw: Raw, space: str) -> None:
    made = raw("POST", maps(space), config_map("one", a="1")).ok()
    assert made["metadata"]["uid"] and made["metadata"]["creationTimestamp"].endswith("Z")
    again = raw("POST", maps(space), config_map("one"))
    assert (again.code, again.body["reason"]) == (409, "AlreadyExists")
    assert again.body["message"] == 'configmaps "one" already exists'
    changed = {**made, "data": {"a": "2"}}
    second = raw("PUT", f"{maps(space)}/one", changed).ok()
    assert int(second["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
    stale = raw("PUT", f"{maps(space)}/one", {**made, "data": {"a": "3"}})
    assert (stale.code, stale.body["reason"]) == (409, "Conflict")
    assert "the object has been modified" in stale.body["message"]
    same = raw("PUT", f"{maps(space)}/one", second).ok()
    assert same["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    foreign = {**second, "metadata": {**second["metadata"], "uid": "another"}}
    assert raw("PUT", f"{maps(space)}/one", foreign).code == 409


def test_not_found_is_worded_as_kubernetes_does(raw: Raw, space: str) -> None:
    missing = raw("GET", f"{maps(space)}/none")
    assert missing.code == 404
    assert missing.body["message"] == 'configmaps "none" not found'
    assert missing.body["details"] == {"name": "none", "kind": "configmaps"}
    assert raw("GET", f"/apis/apps/v1/namespaces/{space}/deployments/x").body["details"] == {
        "name": "x",
        "group": "apps",
        "kind": "deployments",
    }
    assert raw("GET", "/apis/no.such.group/v1/things").code == 404
    nowhere = raw("POST", maps("no-such-namespace"), config_map("a"))
    assert nowhere.code == 404 and 'namespaces "no-such-namespace" not found' in str(nowhere.body)


def test_generate_name_and_namespace_mismatch(raw: Raw, space: str) -> None:
    body = {"metadata": {"generateName": "some-"}, "apiVersion": "v1", "kind": "ConfigMap"}
    names = {raw("POST", maps(space), body).ok()["metadata"]["name"] for _ in range(2)}
    assert len(names) == 2 and all(len(name) == len("some-") + 5 for name in names)
    wrong = config_map("x")
    wrong["metadata"]["namespace"] = "default"
    assert raw("POST", maps(space), wrong).code == 400


def test_list_then_watch_misses_nothing(raw: Raw, space: str) -> None:
    raw("POST", maps(space), config_map("before")).ok()
    version = raw("GET", maps(space)).ok()["metadata"]["resourceVersion"]
    raw("POST", maps(space), config_map("one", a="1")).ok()
    raw("PATCH", f"{maps(space)}/one", {"data": {"a": "2"}}, MERGE).ok()
    raw("DELETE", f"{maps(space)}/one").ok()
    events = list(raw.watch(maps(space), resourceVersion=version, timeoutSeconds=2))
    seen = [(e["type"], e["object"]["metadata"]["name"]) for e in events]
    ours = [entry for entry in seen if entry[1] == "one"]
    assert ours == [("ADDED", "one"), ("MODIFIED", "one"), ("DELETED", "one")]
    assert ("ADDED", "before") not in seen
    versions = [int(e["object"]["metadata"]["resourceVersion"]) for e in events]
    assert versions == sorted(versions) and versions[0] > int(version)


def test_watch_without_a_version_begins_with_what_is_there(raw: Raw, space: str) -> None:
    raw("POST", maps(space), config_map("there")).ok()
    selected = {"fieldSelector": "metadata.name=there"}
    events = list(raw.watch(maps(space), timeoutSeconds=1, **selected))
    assert [e["type"] for e in events] == ["ADDED"]


def test_watch_ends_in_time_with_a_bookmark(raw: Raw, space: str) -> None:
    version = raw("GET", maps(space)).ok()["metadata"]["resourceVersion"]
    started = time.monotonic()
    query = {"resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": 4}
    events = list(raw.watch(maps(space), **query))
    took = time.monotonic() - started
    assert 3 <= took < 30
    marks = [e for e in events if e["type"] == "BOOKMARK"]
    assert marks and int(marks[-1]["object"]["metadata"]["resourceVersion"]) >= int(version)


def test_watch_list_ends_its_initial_events_with_a_bookmark(raw: Raw, space: str) -> None:
    raw("POST", maps(space), config_map("there")).ok()
    query = {
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": 20,
    }
    names = []
    for event in raw.watch(maps(space), **query):
        if event["type"] == "BOOKMARK":
            marks = event["object"]["metadata"].get("annotations", {})
            assert marks == {"k8s.io/initial-events-end": "true"}
            break
        names.append(event["object"]["metadata"]["name"])
    assert "there" in names


def test_a_watch_from_long_ago_is_gone(cluster: Cluster, raw: Raw, space: str) -> None:
    if cluster.kind == "kubernetes":
        pytest.skip("a real cluster that is minutes old still remembers its first version")
    event = next(raw.watch(maps(space), resourceVersion=1, timeoutSeconds=5))
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")
    assert event["object"]["message"].startswith("too old resource version: 1")


def test_history_is_bounded(cluster: Cluster, raw: Raw, space: str) -> None:
    """The shared embedded server keeps 500 events; a real one keeps what it likes."""
    raw("POST", maps(space), config_map("busy")).ok()
    version = raw("GET", maps(space)).ok()["metadata"]["resourceVersion"]
    if cluster.kind == "embedded":
        for number in range(520):
            raw("PATCH", f"{maps(space)}/busy", {"data": {"n": str(number)}}, MERGE).ok()
        first = next(raw.watch(maps(space), resourceVersion=version, timeoutSeconds=5))
        assert first["object"]["code"] == 410
    else:
        raw("PATCH", f"{maps(space)}/busy", {"data": {"n": "1"}}, MERGE).ok()
        query = {"fieldSelector": "metadata.name=busy", "resourceVersion": version}
        first = next(raw.watch(maps(space), timeoutSeconds=5, **query))
        assert first["type"] == "MODIFIED"


def test_objects_enter_and_leave_a_selection(raw: Raw, space: str) -> None:
    version = raw("GET", maps(space)).ok()["metadata"]["resourceVersion"]
    raw("POST", maps(space), config_map("one")).ok()
    for value in ("yes", "yes2", None):
        patch = {"metadata": {"labels": {"pick": value}}}
        raw("PATCH", f"{maps(space)}/one", patch, MERGE).ok()
    query = {"labelSelector": "pick", "resourceVersion": version, "timeoutSeconds": 2}
    events = [e["type"] for e in raw.watch(maps(space), **query)]
    assert events == ["ADDED", "MODIFIED", "DELETED"]


def test_selectors(raw: Raw, space: str) -> None:
    for name, tier in (("a", "front"), ("b", "back"), ("c", "")):
        body = config_map(name)
        body["metadata"]["labels"] = {"tier": tier, "all": "x"} if tier else {"all": "x"}
        raw("POST", maps(space), body).ok()

    def names(**query: Any) -> list[str]:
        items = raw("GET", maps(space), **query).ok()["items"]
        return [item["metadata"]["name"] for item in items]

    assert names(labelSelector="tier in (front,back),all=x") == ["a", "b"]
    assert names(labelSelector="tier notin (front),all") == ["b", "c"]
    assert names(labelSelector="!tier,all=x") == ["c"]
    assert names(labelSelector="tier!=back,all==x") == ["a", "c"]
    assert names(fieldSelector="metadata.name=b") == ["b"]
    assert "b" not in names(fieldSelector="metadata.name!=b")
    refused = raw("GET", maps(space), fieldSelector="spec.nothing=x")
    assert refused.code == 400 and "is not a known field selector" in refused.body["message"]
    refused = raw("GET", f"/api/v1/namespaces/{space}/pods", fieldSelector="spec.nothing=x")
    assert refused.code == 400 and "field label not supported" in refused.body["message"]
    assert raw("GET", maps(space), labelSelector="a in b").code == 400


def test_pages_show_one_moment(raw: Raw, space: str) -> None:
    for number in range(7):
        raw("POST", maps(space), config_map(f"p{number}")).ok()
    first = raw("GET", maps(space), limit=3).ok()
    assert len(first["items"]) == 3 and first["metadata"]["remainingItemCount"] >= 4
    raw("DELETE", f"{maps(space)}/p6").ok()
    names = [item["metadata"]["name"] for item in first["items"]]
    page = first
    while page["metadata"].get("continue"):
        page = raw("GET", maps(space), limit=3, **{"continue": page["metadata"]["continue"]}).ok()
        names += [item["metadata"]["name"] for item in page["items"]]
    assert "p6" in names and names == sorted(names)
    assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


def test_list_at_versions(raw: Raw, space: str) -> None:
    now = raw("GET", maps(space)).ok()["metadata"]["resourceVersion"]
    assert raw("GET", maps(space), resourceVersion="0").code == 200
    exact = raw("GET", maps(space), resourceVersion=now, resourceVersionMatch="Exact")
    assert exact.code in {200, 410}  # something else may have been written since
    future = raw("GET", maps(space), resourceVersion=int(now) + 10**9)
    assert future.code == 504 and "Too large resource version" in future.body["message"]


def test_patches(raw: Raw, space: str) -> None:
    body = service("web")
    body["spec"]["ports"] = [
        {"name": "a", "port": 80, "targetPort": 8080},
        {"name": "b", "port": 81, "targetPort": 8081},
    ]
    raw("POST", services(space), body).ok()
    path = f"{services(space)}/web"
    patch: Obj = {"spec": {"ports": [{"port": 81, "targetPort": 9090}]}}
    ports = raw("PATCH", path, patch, STRATEGIC).ok()["spec"]["ports"]
    assert {(p["name"], p["port"], p["targetPort"]) for p in ports} == {
        ("a", 80, 8080),
        ("b", 81, 9090),
    }
    patch = {"spec": {"ports": [{"$patch": "delete", "port": 81}]}}
    ports = raw("PATCH", path, patch, STRATEGIC).ok()["spec"]["ports"]
    assert [p["port"] for p in ports] == [80]
    operations = [
        {"op": "test", "path": "/spec/ports/0/port", "value": 80},
        {"op": "add", "path": "/metadata/labels", "value": {"a/b": "c"}},
        {"op": "replace", "path": "/metadata/labels/a~1b", "value": "d"},
    ]
    assert raw("PATCH", path, operations, JSON).ok()["metadata"]["labels"] == {"a/b": "d"}
    wrong = [{"op": "test", "path": "/spec/ports/0/port", "value": 1}]
    assert raw("PATCH", path, wrong, JSON).code == 422
    cleared = raw("PATCH", path, {"metadata": {"labels": None}}, MERGE).ok()
    assert "labels" not in cleared["metadata"]
    stale = {"metadata": {"resourceVersion": "1"}, "spec": {"publishNotReadyAddresses": True}}
    assert raw("PATCH", path, stale, MERGE).code == 409
    assert raw("PATCH", path, {}, "text/plain").code == 415


def test_status_is_apart(raw: Raw, space: str) -> None:
    raw("POST", services(space), {**service("web"), "status": {"loadBalancer": {}}}).ok()
    path = f"{services(space)}/web"
    ingress = {"loadBalancer": {"ingress": [{"ip": "198.51.100.7", "ipMode": "VIP"}]}}
    written = raw("PATCH", f"{path}/status", {"status": ingress, "spec": {"type": "X"}}, MERGE).ok()
    assert written["status"] == ingress and written["spec"]["type"] == "LoadBalancer"
    ignored = raw("PATCH", path, {"status": {"loadBalancer": {"ingress": []}}}, MERGE).ok()
    assert ignored["status"] == ingress
    changed = raw("PATCH", path, {"spec": {"type": "ClusterIP", "loadBalancerClass": None}}, MERGE)
    assert changed.ok()["status"] == {"loadBalancer": {}}


def test_finalizers_hold_an_object(raw: Raw, space: str) -> None:
    body = config_map("held")
    body["metadata"]["finalizers"] = ["lbctl.io/test"]
    made = raw("POST", maps(space), body).ok()
    path = f"{maps(space)}/held"
    marked = raw("DELETE", path).ok()
    assert marked["metadata"]["deletionTimestamp"] and marked["metadata"]["uid"]
    again = raw("POST", maps(space), config_map("held"))
    assert again.code == 409
    more = {"metadata": {"finalizers": ["lbctl.io/test", "lbctl.io/other"]}}
    refused = raw("PATCH", path, more, MERGE)
    assert refused.code == 422 and "no new finalizers can be added" in refused.body["message"]
    version = raw("GET", maps(space)).ok()["metadata"]["resourceVersion"]
    raw("PATCH", path, {"metadata": {"finalizers": []}}, MERGE).ok()
    assert raw("GET", path).code == 404
    events = list(raw.watch(maps(space), resourceVersion=version, timeoutSeconds=1))
    deleted = [e for e in events if e["type"] == "DELETED"]
    assert [e["object"]["metadata"]["uid"] for e in deleted] == [made["metadata"]["uid"]]


def test_delete_preconditions_and_collection(raw: Raw, space: str) -> None:
    for name in ("a", "b"):
        body = config_map(name)
        body["metadata"]["labels"] = {"gone": "soon"}
        raw("POST", maps(space), body).ok()
    wrong = raw("DELETE", f"{maps(space)}/a", {"preconditions": {"uid": "another"}})
    assert wrong.code == 409
    raw("DELETE", maps(space), labelSelector="gone=soon").ok()
    left = raw("GET", maps(space), labelSelector="gone=soon").ok()["items"]
    assert left == []


def test_dry_run_changes_nothing(raw: Raw, space: str) -> None:
    made = raw("POST", maps(space), config_map("dry"), dryRun="All").ok()
    assert made["metadata"]["name"] == "dry"
    assert raw("GET", f"{maps(space)}/dry").code == 404


def test_unknown_fields_and_wrong_types(raw: Raw, space: str) -> None:
    body = service("web")
    body["spec"]["nonsense"] = 1
    strict = raw("POST", services(space), body, fieldValidation="Strict")
    assert strict.code == 400
    assert 'unknown field "spec.nonsense"' in strict.body["message"]
    loose = raw("POST", services(space), body, fieldValidation="Ignore").ok()
    assert "nonsense" not in loose["spec"]
    wrong = service("other")
    wrong["spec"]["ports"] = [{"port": "eighty"}]
    refused = raw("POST", services(space), wrong)
    assert refused.code == 400 and "cannot unmarshal string" in refused.body["message"]


def test_owned_objects_go_with_their_owner(raw: Raw, space: str) -> None:
    owner = raw("POST", maps(space), config_map("owner")).ok()
    child = config_map("child")
    child["metadata"]["ownerReferences"] = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "name": "owner",
            "uid": owner["metadata"]["uid"],
        }
    ]
    raw("POST", maps(space), child).ok()
    raw("DELETE", f"{maps(space)}/owner", {"propagationPolicy": "Background"}).ok()
    until("the child to go", lambda: raw("GET", f"{maps(space)}/child").code == 404)


def test_orphans_stay(raw: Raw, space: str) -> None:
    owner = raw("POST", maps(space), config_map("owner")).ok()
    child = config_map("child")
    child["metadata"]["ownerReferences"] = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "name": "owner",
            "uid": owner["metadata"]["uid"],
        }
    ]
    raw("POST", maps(space), child).ok()
    raw("DELETE", f"{maps(space)}/owner", {"propagationPolicy": "Orphan"}).ok()
    until("the owner to go", lambda: raw("GET", f"{maps(space)}/owner").code == 404)
    left = raw("GET", f"{maps(space)}/child").ok()
    assert "ownerReferences" not in left["metadata"]


def test_namespace_takes_everything_along(raw: Raw, space: str) -> None:
    other = f"{space}-b"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}}
    made = raw("POST", "/api/v1/namespaces", body).ok()
    assert made["metadata"]["labels"]["kubernetes.io/metadata.name"] == other
    assert made["status"]["phase"] == "Active"
    held = config_map("held")
    held["metadata"]["finalizers"] = ["lbctl.io/test"]
    raw("POST", maps(other), held).ok()
    until(
        "the ServiceAccount default",
        lambda: raw("GET", f"/api/v1/namespaces/{other}/serviceaccounts/default").code == 200,
    )
    gone = raw("DELETE", f"/api/v1/namespaces/{other}").ok()
    assert gone["status"]["phase"] == "Terminating"
    refused = raw("POST", maps(other), config_map("late"))
    assert refused.code == 403 and "because it is being terminated" in refused.body["message"]
    until(
        "the held object to be marked",
        lambda: "deletionTimestamp" in raw("GET", f"{maps(other)}/held").ok()["metadata"],
    )
    raw("PATCH", f"{maps(other)}/held", {"metadata": {"finalizers": []}}, MERGE).ok()
    until("the namespace to go", lambda: raw("GET", f"/api/v1/namespaces/{other}").code == 404)
