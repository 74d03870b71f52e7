"""The lab's scheduler: where pods go, and why one goes nowhere."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lbctl.lab.kubelet.scheduler import Decision, plan, selects, tolerates

CONTROL = "node-role.kubernetes.io/control-plane"


def node(name: str, control: bool = False, **spec: Any) -> dict[str, Any]:
    labels = {CONTROL: ""} if control else {"disk": "fast" if name.endswith("1") else "slow"}
    if control:
        spec["taints"] = [{"key": CONTROL, "effect": "NoSchedule"}]
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


def pod(name: str, owner: str = "", bound: str = "", **spec: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "namespace": "default", "uid": f"uid-{name}"}
    meta["labels"] = {"app": owner}
    if owner:
        meta["ownerReferences"] = [{"uid": owner}]
    if bound:
        spec["nodeName"] = bound
    return {"metadata": meta, "spec": {"containers": [], **spec}, "status": {}}


NODES = [node("node-1"), node("node-2"), node("node-3"), node("control-1", control=True)]


def spread(decisions: tuple[Decision, ...]) -> dict[str, int]:
    return dict(Counter(decision.node for decision in decisions))


def test_four_pods_on_three_nodes_are_spread_evenly() -> None:
    decisions = plan([pod(f"web-{i}", "web") for i in range(4)], NODES)
    assert sorted(spread(decisions).values()) == [1, 1, 2]
    assert "control-1" not in spread(decisions)


def test_siblings_count_before_strangers() -> None:
    bound = [pod("a", "web", "node-1"), pod("b", "other", "node-2"), pod("c", "other", "node-2")]
    decisions = plan([*bound, pod("new", "web"), pod("newer", "web")], NODES)
    assert {decision.node for decision in decisions} == {"node-2", "node-3"}


def test_the_order_of_arrival_does_not_matter() -> None:
    pods = [pod(f"web-{i}", "web") for i in range(5)]
    assert plan(pods, NODES) == plan(pods[::-1], NODES[::-1])


def test_managers_land_on_different_control_hosts_and_the_third_nowhere() -> None:
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": CONTROL, "operator": "Exists"}]}
                ]
            }
        },
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": {"matchLabels": {"app": "manager"}},
                }
            ]
        },
    }
    tolerations = [{"key": CONTROL, "operator": "Exists", "effect": "NoSchedule"}]
    pods = [pod(f"m-{i}", "manager", affinity=affinity, tolerations=tolerations) for i in range(3)]
    decisions = plan(pods, [*NODES, node("control-2", control=True)])
    assert [decision.node for decision in decisions] == ["control-1", "control-2", ""]
    assert "0/5 nodes are available" in decisions[2].why
    assert "2 node(s) didn't match pod anti-affinity rules" in decisions[2].why


def test_a_daemonset_pod_goes_to_the_node_it_is_made_for() -> None:
    fields = [{"key": "metadata.name", "operator": "In", "values": ["node-2"]}]
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchFields": fields}]
            }
        }
    }
    (decision,) = plan([pod("agent", "ds", affinity=affinity)], NODES)
    assert decision.node == "node-2"


def test_node_selector_and_cordon() -> None:
    (decision,) = plan([pod("x", nodeSelector={"disk": "fast"})], NODES)
    assert decision.node == "node-1"
    cordoned = [node("node-1", unschedulable=True), *NODES[1:]]
    (decision,) = plan([pod("x", nodeSelector={"disk": "fast"})], cordoned)
    assert decision.node == ""
    assert "node.kubernetes.io/unschedulable" in decision.why


def test_a_host_port_is_used_once_per_node() -> None:
    ports = [{"ports": [{"containerPort": 7481}]}]
    old = pod("old", "ds", "node-1", hostNetwork=True, containers=ports)
    new = pod("new", "ds", hostNetwork=True, containers=ports, nodeSelector={"disk": "fast"})
    (decision,) = plan([old, new], NODES)
    assert decision.node == ""
    assert "free ports" in decision.why


def test_bound_finished_and_deleted_pods_are_left_alone() -> None:
    finished = pod("done")
    finished["status"] = {"phase": "Succeeded"}
    deleted = pod("deleted")
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert plan([pod("bound", "", "node-1"), finished, deleted], NODES) == ()


@pytest.mark.parametrize(
    ("toleration", "covers"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "k", "operator": "Exists"}, True),
        ({"key": "k", "value": "v"}, True),
        ({"key": "k", "value": "other"}, False),
        ({"key": "k", "value": "v", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations(toleration: dict[str, Any], covers: bool) -> None:
    assert tolerates(toleration, {"key": "k", "value": "v", "effect": "NoSchedule"}) is covers


def test_selectors() -> None:
    labels = {"app": "web", "tier": "3"}
    assert selects({}, labels)
    assert not selects(None, labels)
    assert selects(
        {"matchExpressions": [{"key": "tier", "operator": "Gt", "values": ["2"]}]}, labels
    )
    assert not selects({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, labels)
    assert selects(
        {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["db"]}]}, labels
    )
