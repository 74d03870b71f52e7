"""What the runtime is told for a manifest: security context, environment, mounts, addresses."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from lbctl.errors import LabError
from lbctl.lab.kubelet import podspec, status
from lbctl.lab.kubelet.addresses import Pool

SECRET = {"kind": "Secret", "data": {"key": base64.b64encode(b"hush").decode()}}


def context(**known: Any) -> podspec.Context:
    return podspec.Context(
        node="node-1",
        host_ips=("192.0.2.21",),
        pod_ips=("192.0.2.21",),
        api_host="192.0.2.5",
        api_port=6443,
        search="/venv/bin",
        keep=("/checkout",),
        look_up=lambda kind, namespace, name: known.get(name),
    )


def pod(container: dict[str, Any], **spec: Any) -> dict[str, Any]:
    meta = {"name": "p", "namespace": "default", "uid": "u", "labels": {"a": "b"}}
    return {"metadata": meta, "spec": {"hostNetwork": True, "containers": [container], **spec}}


def launch(container: dict[str, Any], **spec: Any) -> Any:
    whole = {"name": "c", "command": ["true"], **container}
    return podspec.launch(pod(whole, **spec), whole, context(s=SECRET), {"v": "/run/v"}, "p/c.log")


def test_drop_all_add_one() -> None:
    made = launch({"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}})
    assert made["capabilities"] == ["NET_ADMIN"]


def test_without_a_security_context_the_runtimes_default_set() -> None:
    made = launch({})
    assert "CHOWN" in made["capabilities"]
    assert "NET_ADMIN" not in made["capabilities"]
    assert made["uid"] == 0
    assert not made["readonly"]
    assert not made["no_new_privileges"]


def test_the_containers_context_overrides_the_pods() -> None:
    outer = {"runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 7}
    inner = {"runAsUser": 1, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    made = launch({"securityContext": inner}, securityContext=outer)
    assert (made["uid"], made["gid"], made["groups"]) == (1, 65532, [7])
    assert made["readonly"]
    assert made["no_new_privileges"]


def test_run_as_non_root_refuses_root() -> None:
    with pytest.raises(podspec.ConfigProblem, match="runAsNonRoot"):
        launch({"securityContext": {"runAsNonRoot": True}})


def test_an_unknown_capability_is_an_error() -> None:
    with pytest.raises(podspec.ConfigProblem, match="NET_ADMN"):
        launch({"securityContext": {"capabilities": {"add": ["NET_ADMN"]}}})


def test_environment() -> None:
    env = [
        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
        {"name": "BOTH", "value": "$(NODE_NAME)/$$(LABEL)/$(NOBODY)"},
        {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        {"name": "O", "valueFrom": {"secretKeyRef": {"name": "x", "key": "k", "optional": True}}},
    ]
    made = launch({"env": env, "args": ["--node=$(NODE_NAME)"]})
    assert made["env"]["LABEL"] == "b"
    assert made["env"]["BOTH"] == "node-1/$(LABEL)/$(NOBODY)"
    assert made["env"]["S"] == "hush"
    assert "O" not in made["env"]
    assert made["env"]["PATH"].startswith("/venv/bin:")
    assert made["env"]["KUBERNETES_SERVICE_HOST"] == "192.0.2.5"
    assert made["argv"] == ["true", "--node=node-1"]


def test_a_missing_secret_is_named() -> None:
    env = [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "key"}}}]
    with pytest.raises(podspec.Missing, match="gone"):
        launch({"env": env})


def test_mounts() -> None:
    mounts = [{"name": "v", "mountPath": "/data", "readOnly": True, "subPath": "a"}]
    assert launch({"volumeMounts": mounts})["mounts"] == [
        {"source": "/run/v/a", "target": "/data", "readonly": True}
    ]
    with pytest.raises(podspec.ConfigProblem, match="subPath"):
        launch({"volumeMounts": [{**mounts[0], "subPath": "../etc"}]})
    with pytest.raises(podspec.ConfigProblem, match="nowhere"):
        launch({"volumeMounts": [{"name": "nowhere", "mountPath": "/x"}]})


def test_the_pod_server_stands_in_for_a_container_that_names_no_program() -> None:
    container: dict[str, Any] = {"name": "c", "ports": [{"containerPort": 80}]}
    made = podspec.launch(pod(container, hostNetwork=False), container, context(), {}, "log")
    assert made["serve"] == [{"port": 80, "protocol": "TCP"}]
    assert made["sandbox"] == "u"
    container |= {"command": ["true"]}
    made = podspec.launch(pod(container, hostNetwork=False), container, context(), {}, "log")
    assert (made["serve"], made["argv"], made["sandbox"]) == (None, ["true"], "u")


def test_a_token_unless_someone_says_no() -> None:
    assert podspec.api_access({}, {}) is not None
    assert podspec.api_access({}, {"automountServiceAccountToken": False}) is None
    assert podspec.api_access({"automountServiceAccountToken": False}, {}) is None
    both = {"automountServiceAccountToken": True}, {"automountServiceAccountToken": False}
    assert podspec.api_access(*both) is not None


def test_addresses_go_round_and_come_back_to_whom_they_belonged() -> None:
    pool = Pool(["10.244.1.0/24", "fd00:1::/64"])
    first = [entry["address"] for entry in pool.take("a")]
    assert first == ["10.244.1.2", "fd00:1::2"]
    assert pool.take("a") == pool.take("a")
    pool.release("a")
    assert pool.take("b")[0]["address"] == "10.244.1.3"
    assert pool.take("c", ["10.244.1.2"])[0]["address"] == "10.244.1.2"
    assert pool.take("d", ["10.244.1.2"])[0]["address"] == "10.244.1.4"


def test_addresses_run_out_with_a_sentence() -> None:
    pool = Pool(["10.244.1.0/29"])
    taken = {pool.take(str(number))[0]["address"] for number in range(5)}
    assert len(taken) == 5
    with pytest.raises(LabError, match="no free address"):
        pool.take("one too many")


def test_status_of_a_pod_through_its_life() -> None:
    state = status.ContainerState("c", "image")
    before: dict[str, Any] = {"metadata": {}, "spec": {}}

    def written() -> dict[str, Any]:
        return status.pod_status(
            before, [state], ["192.0.2.21", "2001:db8:1::21"], ["10.244.1.2"], 1.0, 2.0
        )

    assert written()["phase"] == "Pending"
    state.state, state.ready = status.running(1.0), True
    conditions = {c["type"]: c["status"] for c in written()["conditions"]}
    assert (written()["phase"], conditions["Ready"]) == ("Running", "True")
    state.state, state.ready = status.terminated(137, 1.0, 2.0, "id"), False
    assert written()["phase"] == "Running"
    state.last, state.state = state.state, status.waiting("CrashLoopBackOff")
    assert written()["phase"] == "Running"
    state.state, state.over = status.terminated(1, 1.0, 2.0, "id"), True
    assert written()["phase"] == "Failed"
    state.state = status.terminated(0, 1.0, 2.0, "id")
    assert written()["phase"] == "Succeeded"


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    state = status.ContainerState("c", "image")
    made = status.pod_status({}, [state], ["h"], [], 0.0, 100.0)
    again = status.pod_status({"status": made}, [state], ["h"], [], 0.0, 200.0)
    assert again["conditions"] == made["conditions"]
    state.state, state.ready = status.running(1.0), True
    later = status.pod_status({"status": made}, [state], ["h"], [], 0.0, 300.0)
    times = {c["type"]: c["lastTransitionTime"] for c in later["conditions"]}
    assert times["Ready"] == status.timestamp(300.0)
    assert times["Initialized"] == status.timestamp(100.0)
