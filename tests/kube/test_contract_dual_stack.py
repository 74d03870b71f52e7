"""Dual-stack Services: what the API server fills in, refuses and changes; slices per family."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from lbctl.kube.wanted import filled_in, read
from lbctl.lab.cluster.handle import Cluster
from tests.kube.kube_tools import Kubectl, Kubelet, Obj, Raw, service, until, workload
from tests.kube.manager_parts import connect

MERGE = "application/merge-patch+json"
RANGES = {"IPv4": ip_network("10.96.0.0/16"), "IPv6": ip_network("fd00:10:96::/112")}


def services(space: str) -> str:
    return f"/api/v1/namespaces/{space}/services"


def make(raw: Raw, space: str, **spec: object) -> Obj:
    found: Obj = raw("POST", services(space), service("web", **spec)).ok()["spec"]
    return found


def patch(raw: Raw, space: str, **spec: object) -> Obj:
    found: Obj = raw("PATCH", f"{services(space)}/web", {"spec": spec}, MERGE).ok()["spec"]
    return found


def families(spec: Obj) -> list[str]:
    """The ranges that its addresses come from, checked against `ipFamilies`."""
    found = [f"IPv{ip_address(address).version}" for address in spec["clusterIPs"]]
    for family, address in zip(found, spec["clusterIPs"], strict=True):
        assert ip_address(address) in RANGES[family]
    assert spec["clusterIP"] == spec["clusterIPs"][0]
    assert spec["ipFamilies"] == found
    return found


@pytest.mark.parametrize(
    ("spec", "expected", "policy"),
    [
        ({}, ["IPv4"], "SingleStack"),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"], "SingleStack"),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"], "PreferDualStack"),
        ({"ipFamilyPolicy": "RequireDualStack"}, ["IPv4", "IPv6"], "RequireDualStack"),
        (
            {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6"]},
            ["IPv6", "IPv4"],
            "PreferDualStack",
        ),
        (
            {"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6", "IPv4"]},
            ["IPv6", "IPv4"],
            "RequireDualStack",
        ),
    ],
)
def test_what_is_filled_in(
    raw: Raw, space: str, spec: Obj, expected: list[str], policy: str
) -> None:
    found = make(raw, space, **spec)
    assert families(found) == expected
    assert found["ipFamilyPolicy"] == policy


async def test_a_plan_asks_what_would_be_filled_in(cluster: Cluster, raw: Raw, space: str) -> None:
    """`lbctl eip plan`: nothing is stored, and what cannot be asked for stays open."""
    text = "---\n".join(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {where}}}\n"
        f"spec: {{type: LoadBalancer, ports: [{{port: 80}}]{spec}}}\n"
        for name, where, spec in (
            ("plain", space, ""),
            ("both", space, ", ipFamilyPolicy: PreferDualStack, ipFamilies: [IPv6]"),
            ("known", space, ""),
            ("lost", "no-such-namespace", ""),
        )
    )
    wanted, _ = read([("f.yaml", text)], "default")
    async with connect(cluster) as client:
        found, told = await filled_in(client, wanted, {wanted[2].service.ref})
    assert [one.families for one in found] == [(4,), (6, 4), (), ()]
    assert [one.policy for one in found] == ["SingleStack", "PreferDualStack", "", ""]
    assert len(told) == 1 and "no-such-namespace/lost: IP families by rule" in told[0]
    assert raw("GET", services(space)).ok()["items"] == []


def test_families_follow_the_addresses_that_are_asked_for(raw: Raw, space: str) -> None:
    six = make(raw, space, clusterIP="fd00:10:96::77")
    assert (six["clusterIP"], families(six)) == ("fd00:10:96::77", ["IPv6"])
    both = service("both", clusterIP="fd00:10:96::78", ipFamilyPolicy="PreferDualStack")
    found = raw("POST", services(space), both).ok()["spec"]
    assert families(found) == ["IPv6", "IPv4"]
    assert found["clusterIP"] == "fd00:10:96::78"


@pytest.mark.parametrize(
    ("selector", "expected", "policy"),
    [({"app": "web"}, ["IPv4"], "SingleStack"), (None, ["IPv4", "IPv6"], "RequireDualStack")],
)
def test_a_headless_service(
    raw: Raw, space: str, selector: Obj | None, expected: list[str], policy: str
) -> None:
    body = service("headless", type="ClusterIP", clusterIP="None", selector=selector)
    del body["spec"]["loadBalancerClass"]
    spec = raw("POST", services(space), body).ok()["spec"]
    assert spec["clusterIPs"] == ["None"]
    assert (spec["ipFamilies"], spec["ipFamilyPolicy"]) == (expected, policy)


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"ipFamilyPolicy": "Both"}, "spec.ipFamilyPolicy", "Unsupported value"),
        ({"ipFamilies": ["IPv5"]}, "spec.ipFamilies[0]", "Unsupported value"),
        (
            {"ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": "PreferDualStack"},
            "spec.ipFamilies[1]",
            "Duplicate value",
        ),
        ({"ipFamilies": ["IPv4", "IPv6"]}, "spec.ipFamilyPolicy", "must be 'RequireDualStack' or"),
        (
            {"clusterIP": "10.96.7.7", "clusterIPs": ["10.96.7.7", "fd00:10:96::7"]},
            "spec.ipFamilyPolicy",
            "must be 'RequireDualStack' or 'PreferDualStack' when multiple",
        ),
        (
            {"ipFamilies": ["IPv4"], "clusterIP": "fd00:10:96::7"},
            "spec.clusterIPs[0]",
            "expected an IPv4 value as indicated by `ipFamilies[0]`",
        ),
        ({"clusterIP": "fd00:10:97::7"}, "spec.clusterIPs", "does not match the current range"),
        ({"clusterIPs": ["10.96.7.7"]}, "spec.clusterIPs", "must be empty when `clusterIP` is not"),
    ],
)
def test_what_is_refused(raw: Raw, space: str, spec: Obj, field: str, words: str) -> None:
    answer = raw("POST", services(space), service("web", **spec))
    assert answer.code == 422, answer.body
    causes = {cause["field"]: cause["message"] for cause in answer.body["details"]["causes"]}
    assert words in causes.get(field, ""), causes


def test_the_second_address_comes_and_goes_with_the_policy(raw: Raw, space: str) -> None:
    single = make(raw, space)
    both = patch(raw, space, ipFamilyPolicy="PreferDualStack")
    assert families(both) == ["IPv4", "IPv6"]
    assert both["clusterIP"] == single["clusterIP"]
    required = patch(raw, space, ipFamilyPolicy="RequireDualStack")
    assert required["clusterIPs"] == both["clusterIPs"]
    again = patch(raw, space, ipFamilyPolicy="SingleStack")
    assert families(again) == ["IPv4"]
    assert again["clusterIPs"] == single["clusterIPs"]
    other = service("other", clusterIP=both["clusterIPs"][1])
    until("the second address to be free", lambda: raw("POST", services(space), other).code == 201)


def refused(raw: Raw, space: str, **spec: object) -> dict[str, str]:
    """A change of Service web that is refused: what is wrong, by field."""
    answer = raw("PATCH", f"{services(space)}/web", {"spec": spec}, MERGE)
    assert answer.code == 422, answer.body
    return {cause["field"]: cause["message"] for cause in answer.body["details"]["causes"]}


def test_the_first_address_and_family_stay(raw: Raw, space: str) -> None:
    four, six = make(raw, space, ipFamilyPolicy="RequireDualStack")["clusterIPs"]
    swapped = {"clusterIP": six, "clusterIPs": [six, four], "ipFamilies": ["IPv6", "IPv4"]}
    causes = refused(raw, space, **swapped)
    assert "may not change once set" in causes["spec.clusterIPs[0]"]
    assert "may not change once set" in causes["spec.ipFamilies[0]"]


def test_the_second_address_goes_with_the_policy_alone(raw: Raw, space: str) -> None:
    four, _ = make(raw, space, ipFamilyPolicy="RequireDualStack")["clusterIPs"]
    causes = refused(raw, space, clusterIPs=[four], ipFamilies=["IPv4"])
    assert "must be 'SingleStack' to release the secondary" in causes["spec.ipFamilyPolicy"]


def test_a_put_without_addresses_and_families_keeps_both(raw: Raw, space: str) -> None:
    made = raw("POST", services(space), service(ipFamilyPolicy="PreferDualStack")).ok()
    body = service()
    body["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"]
    kept = raw("PUT", f"{services(space)}/web", body).ok()
    assert kept["spec"] == made["spec"]


def slices(raw: Raw, space: str) -> dict[str, Obj]:
    """The slices of Service web by address type; one of each."""
    path = f"/apis/discovery.k8s.io/v1/namespaces/{space}/endpointslices"
    items = raw("GET", path, labelSelector="kubernetes.io/service-name=web").ok()["items"]
    found = {item["addressType"]: item for item in items}
    assert len(found) == len(items), items
    return found


def addresses(raw: Raw, space: str) -> dict[str, list[str]]:
    return {
        kind: [address for endpoint in item["endpoints"] or () for address in endpoint["addresses"]]
        for kind, item in slices(raw, space).items()
    }


def test_slices_of_each_family(raw: Raw, kubectl: Kubectl, space: str, node: str) -> None:
    kubectl("apply", "-f", "-", stdin=workload("Deployment", replicas=1))
    make(raw, space, ipFamilyPolicy="PreferDualStack")
    kubelet = Kubelet(raw, space)
    pod = until("a Pod", kubelet.pods)[0]["metadata"]["name"]
    kubelet.bind(pod, node)
    kubelet.ready(pod, address="10.244.1.1", second="fd00:10:244:1::1")
    both = {"IPv4": ["10.244.1.1"], "IPv6": ["fd00:10:244:1::1"]}
    until("an endpoint of each family", lambda: addresses(raw, space) == both)
    six = slices(raw, space)["IPv6"]
    assert six["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
    assert six["endpoints"][0]["targetRef"]["name"] == pod
    assert six["endpoints"][0]["nodeName"] == node
    patch(raw, space, ipFamilyPolicy="SingleStack")
    until("the IPv6 slice to go", lambda: addresses(raw, space) == {"IPv4": ["10.244.1.1"]})
