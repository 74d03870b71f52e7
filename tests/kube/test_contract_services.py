"""Services: what the API server fills in, refuses and clears; the EndpointSlices behind them."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from lbctl.lab.cluster.handle import Cluster
from tests.kube.kube_tools import Kubectl, Kubelet, Obj, Raw, service, until, workload

MERGE = "application/merge-patch+json"


def services(space: str) -> str:
    return f"/api/v1/namespaces/{space}/services"


def refused(raw: Raw, space: str, body: Obj) -> Obj:
    answer = raw("POST", services(space), body)
    assert answer.code == 422, f"{answer.code}: {answer.body}"
    assert answer.body["reason"] == "Invalid" and answer.body["details"]["causes"]
    found: Obj = answer.body
    return found


def test_defaults_of_a_load_balancer(raw: Raw, space: str) -> None:
    found = raw("POST", services(space), service()).ok()
    spec = found["spec"]
    assert ip_address(spec["clusterIP"]) in ip_network("10.96.0.0/16")
    assert spec["clusterIPs"] == [spec["clusterIP"]]
    port = spec["ports"][0]
    assert port["protocol"] == "TCP" and port["targetPort"] == "http" and port["nodePort"] > 0
    expected = {
        "type": "LoadBalancer",
        "loadBalancerClass": "lbctl.io/bgp",
        "sessionAffinity": "None",
        "externalTrafficPolicy": "Cluster",
        "internalTrafficPolicy": "Cluster",
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "allocateLoadBalancerNodePorts": True,
    }
    assert {key: spec.get(key) for key in expected} == expected
    assert found["status"] == {"loadBalancer": {}}
    known = {"ports", "selector", "clusterIP", "clusterIPs", *expected}
    assert set(spec) == known


def test_defaults_of_other_types(raw: Raw, space: str) -> None:
    plain = service("plain", type="ClusterIP", ports=[{"port": 53, "protocol": "UDP"}])
    del plain["spec"]["loadBalancerClass"]
    spec = raw("POST", services(space), plain).ok()["spec"]
    assert spec["ports"] == [{"port": 53, "protocol": "UDP", "targetPort": 53}]
    assert "externalTrafficPolicy" not in spec
    plain["metadata"]["name"] = "headless"
    plain["spec"]["clusterIP"] = "None"
    spec = raw("POST", services(space), plain).ok()["spec"]
    assert spec["clusterIP"] == "None" and spec["clusterIPs"] == ["None"]
    local = service("local", externalTrafficPolicy="Local", sessionAffinity="ClientIP")
    spec = raw("POST", services(space), local).ok()["spec"]
    assert spec["healthCheckNodePort"] > 0
    assert spec["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 10800}}
    without = service("without", allocateLoadBalancerNodePorts=False)
    spec = raw("POST", services(space), without).ok()["spec"]
    assert "nodePort" not in spec["ports"][0]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"ports": []}, "spec.ports", "Required value"),
        ({"ports": [{"port": 0}]}, "spec.ports[0].port", "must be between 1 and 65535"),
        ({"ports": [{"port": 1}, {"port": 2}]}, "spec.ports[0].name", "Required value"),
        (
            {"ports": [{"name": "a", "port": 1}, {"name": "a", "port": 2}]},
            "spec.ports[1].name",
            "Duplicate value",
        ),
        ({"ports": [{"port": 1, "protocol": "X"}]}, "spec.ports[0].protocol", "supported values"),
        ({"type": "Nothing"}, "spec.type", "Unsupported value"),
        ({"type": "ClusterIP"}, "spec.loadBalancerClass", "may only be used when `type`"),
        ({"externalTrafficPolicy": "Near"}, "spec.externalTrafficPolicy", "Unsupported value"),
        ({"clusterIP": "192.0.2.1"}, "spec.clusterIPs", "does not match the current range"),
    ],
)
def test_what_is_refused(raw: Raw, space: str, spec: Obj, field: str, words: str) -> None:
    body = refused(raw, space, service("web", **spec))
    causes = {cause["field"]: cause["message"] for cause in body["details"]["causes"]}
    assert field in causes, causes
    assert words in causes[field]
    assert body["message"].startswith('Service "web" is invalid: ')


def test_names_are_checked(raw: Raw, space: str) -> None:
    body = refused(raw, space, service("Not_A_Name"))
    assert body["details"]["causes"][0]["field"] == "metadata.name"
    path = f"/api/v1/namespaces/{space}/configmaps"
    nameless = raw("POST", path, {"metadata": {}})
    assert nameless.code == 422
    assert "name or generateName is required" in nameless.body["message"]


def test_ports_and_addresses_are_given_once(raw: Raw, space: str) -> None:
    first = raw("POST", services(space), service("first")).ok()["spec"]
    number = first["ports"][0]["nodePort"]
    wanted = service("second", ports=[{"port": 80, "nodePort": number}])
    assert "provided port is already allocated" in refused(raw, space, wanted)["message"]
    same = service("second", clusterIP=first["clusterIP"])
    assert "already allocated" in refused(raw, space, same)["message"]
    raw("DELETE", f"{services(space)}/first").ok()
    until(
        "the port to be free again",
        lambda: raw("POST", services(space), wanted).code == 201,
    )


def test_what_must_not_change(raw: Raw, space: str) -> None:
    raw("POST", services(space), service()).ok()
    path = f"{services(space)}/web"
    other = raw("PATCH", path, {"spec": {"loadBalancerClass": "example.com/other"}}, MERGE)
    assert other.code == 422 and "may not change once set" in other.body["message"]
    moved = raw("PATCH", path, {"spec": {"clusterIP": "10.96.9.9"}}, MERGE)
    assert moved.code == 422


def test_a_put_without_what_the_server_gave_keeps_it(raw: Raw, space: str) -> None:
    made = raw("POST", services(space), service()).ok()
    body = service()
    body["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"]
    kept = raw("PUT", f"{services(space)}/web", body).ok()
    assert kept["spec"] == made["spec"]


def test_leaving_load_balancer_clears_what_belongs_to_it(raw: Raw, space: str) -> None:
    raw("POST", services(space), service()).ok()
    path = f"{services(space)}/web"
    ingress = {"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.9"}]}}}
    state = raw("PATCH", f"{path}/status", ingress, MERGE).ok()["status"]
    assert state["loadBalancer"]["ingress"] == [{"ip": "198.51.100.9", "ipMode": "VIP"}]
    strategic = "application/strategic-merge-patch+json"
    changed = raw("PATCH", path, {"spec": {"type": "ClusterIP"}}, strategic).ok()
    assert changed["status"] == {"loadBalancer": {}}
    spec = changed["spec"]
    gone = ("loadBalancerClass", "allocateLoadBalancerNodePorts", "externalTrafficPolicy")
    assert not [field for field in gone if field in spec]
    assert "nodePort" not in spec["ports"][0]


# EndpointSlices


def slices(raw: Raw, space: str, name: str = "web") -> list[Obj]:
    selector = f"kubernetes.io/service-name={name}"
    path = f"/apis/discovery.k8s.io/v1/namespaces/{space}/endpointslices"
    items: list[Obj] = raw("GET", path, labelSelector=selector).ok()["items"]
    return items


def endpoints(raw: Raw, space: str, name: str = "web") -> dict[str, Obj]:
    return {
        endpoint["targetRef"]["name"]: endpoint
        for item in slices(raw, space, name)
        for endpoint in item["endpoints"] or ()
    }


def conditions(raw: Raw, space: str, pod: str) -> Any:
    return endpoints(raw, space).get(pod, {}).get("conditions")


def test_slices_follow_the_pods(raw: Raw, kubectl: Kubectl, space: str, node: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=2))
    raw("POST", services(space), service()).ok()
    kubelet = Kubelet(raw, space)
    until("two Pods", lambda: len(kubelet.pods()) == 2)
    one, two = (pod["metadata"]["name"] for pod in kubelet.pods())
    for pod in (one, two):
        kubelet.bind(pod, node)
    kubelet.ready(one, address="10.244.1.1")
    kubelet.ready(two, address="10.244.1.2", ready=False)
    until(
        "one ready and one not ready endpoint",
        lambda: (
            {n: e["conditions"]["ready"] for n, e in endpoints(raw, space).items()}
            == {one: True, two: False}
        ),
    )
    item = next(item for item in slices(raw, space) if item["endpoints"])
    assert item["addressType"] == "IPv4"
    assert item["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
    labels = item["metadata"]["labels"]
    assert labels["kubernetes.io/service-name"] == "web"
    manager = labels["endpointslice.kubernetes.io/managed-by"]
    assert manager == "endpointslice-controller.k8s.io"
    owner = item["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("Service", "web", True)
    found = endpoints(raw, space)[one]
    assert found["addresses"] == ["10.244.1.1"] and found["nodeName"] == node
    assert found["targetRef"]["kind"] == "Pod" and found["targetRef"]["namespace"] == space
    assert found["conditions"] == {"ready": True, "serving": True, "terminating": False}


def test_terminating_endpoints_serve_until_the_end(
    raw: Raw, kubectl: Kubectl, space: str, node: str
) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    raw("POST", services(space), service()).ok()
    kubelet = Kubelet(raw, space)
    pod = until("a Pod", kubelet.pods)[0]["metadata"]["name"]
    kubelet.bind(pod, node)
    kubelet.ready(pod)
    until("it to be ready", lambda: (conditions(raw, space, pod) or {}).get("ready"))
    raw("DELETE", f"/api/v1/namespaces/{space}/pods/{pod}").ok()
    expected = {"ready": False, "serving": True, "terminating": True}
    until("it to be terminating", lambda: conditions(raw, space, pod) == expected)
    kubelet.finish(pod)
    until("it to be gone", lambda: conditions(raw, space, pod) is None)


def test_a_service_without_pods_has_an_empty_slice(raw: Raw, space: str) -> None:
    raw("POST", services(space), service("lonely")).ok()
    found = until("a slice", lambda: slices(raw, space, "lonely"))
    assert found[0]["endpoints"] is None and found[0]["ports"] is None
    raw("DELETE", f"{services(space)}/lonely").ok()
    until("the slice to go with the Service", lambda: not slices(raw, space, "lonely"))


def test_at_most_a_hundred_endpoints_in_a_slice(
    raw: Raw, kubectl: Kubectl, space: str, node: str
) -> None:
    raw("POST", services(space), service()).ok()
    template = workload("Deployment")["spec"]["template"]
    until(
        "the ServiceAccount default",
        lambda: raw("GET", f"/api/v1/namespaces/{space}/serviceaccounts/default").code == 200,
    )
    kubelet = Kubelet(raw, space)
    for number in range(101):
        name = f"p{number}"
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template["metadata"]},
            "spec": {**template["spec"], "nodeName": node},
        }
        raw("POST", f"/api/v1/namespaces/{space}/pods", body).ok()
        kubelet.ready(name)
    until("101 endpoints", lambda: len(endpoints(raw, space)) == 101)
    sizes = sorted(len(item["endpoints"]) for item in slices(raw, space))
    assert sum(sizes) == 101 and max(sizes) <= 100 and len(sizes) == 2


def test_kubectl_shows_services(cluster: Cluster, kubectl: Kubectl, raw: Raw, space: str) -> None:
    kubectl("apply", "-f", "-", stdin=service())
    lines = [line.split() for line in kubectl("get", "svc").splitlines()]
    assert lines[0] == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"]
    assert lines[1][:2] == ["web", "LoadBalancer"] and lines[1][3] == "<pending>"
    ingress = {"status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.9"}]}}}
    raw("PATCH", f"{services(space)}/web/status", ingress, MERGE).ok()
    assert kubectl("get", "svc", "web", "--no-headers").split()[3] == "198.51.100.9"
    assert "SELECTOR" in kubectl("get", "svc", "-o", "wide")
    assert json.loads(kubectl("get", "svc", "web", "-o", "json"))["kind"] == "Service"
    assert "LoadBalancer Ingress:     198.51.100.9" in kubectl("describe", "svc", "web")
