"""From a network to a cluster at work: API server, kubelets, our own Deployment and DaemonSet.

`bring_up` ends when managers and agents are Ready, or says what is not. `take_down` ends what
`bring_up` started; the machines stay. Both may be called again.
"""

from __future__ import annotations

import asyncio
import base64
import compileall
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from ruamel.yaml import YAML

from lbctl.core import names
from lbctl.errors import Conflict, KubeError, LabError
from lbctl.lab import kubeproxy, processes, workload
from lbctl.lab.cluster import binaries, pki
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.daemon import CLUSTER, ROLES, SOCKET, ClusterAccess
from lbctl.lab.forward import start_forwarder
from lbctl.lab.kubelet import api as kube
from lbctl.lab.lab import Lab
from lbctl.lab.machine import Machine

Object: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[str], None]
KUBECONFIG: Final = "kubeconfig"
_ROOT: Final = Path(__file__).resolve().parents[2]
BASE: Final = _ROOT / "deploy" / "kustomize" / "base"
_OURS: Final = ("lbctl", "manager", "agent")
_PROCESSES: Final = ("kubelet", "forward", "cluster")
_LIMIT_S: Final = 240.0
_POLL_S: Final = 0.05
_APPLY: Final = "application/apply-patch+yaml"
_CLUSTER_SCOPED: Final = frozenset(
    {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "PriorityClass"}
)


def bring_up(
    lab: Lab,
    kind: ClusterKind,
    progress: Progress,
    kube_proxy: kubeproxy.Mode = kubeproxy.Mode.NFTABLES,
) -> None:
    """Start the cluster in the lab and everything of ours on it.

    kube_proxy: its mode, on the kind `kubernetes`; the embedded cluster has none.
    Raises MissingFeature where the cluster's programs cannot be had, LabError if something does not
    come up; what was started then stays for a look at its logs, until `take_down`.
    """
    kubeproxy.write_mode(lab.directory, kube_proxy)
    access = start(lab, kind, progress)
    for package in _OURS:  # containers cannot: their root is read-only
        compileall.compile_dir(_ROOT / package, quiet=2)
    install(lab, access, progress)


def start(lab: Lab, kind: ClusterKind, progress: Progress) -> ClusterAccess:
    """Cluster and kubelets, every node Ready, nothing of ours on it yet. Raises as `bring_up`."""
    _stop(lab)
    if kind == "kubernetes":
        binaries.find(progress)  # in this process, so that a build shows its progress
    progress(f"starting the {kind} cluster")
    access = _start_cluster(lab, kind)
    kubeconfig(lab, access)
    progress("starting the kubelets")
    start_kubelets(lab)
    wanted = {machine.name for role in ROLES for machine in lab.of_role(role) if machine.alive}
    progress(f"waiting for {len(wanted)} nodes")
    asyncio.run(_wait_nodes(lab, access, wanted))
    return access


def start_kubelets(lab: Lab) -> None:
    """Start the daemon that is scheduler and kubelets; one that runs is stopped first."""
    lab.spawn("kubelet", [sys.executable, "-m", "lbctl.lab.daemon", lab.name], env=_environment())


def add_node(lab: Lab, progress: Progress) -> Machine:
    """One more node, Ready with its agent if the lab has a cluster.

    Raises LabError. A machine that could not be made is gone again; one that does not join the
    cluster stays, and the error says what it waits for and where its logs are.
    """
    progress(f"adding a node like {lab.of_role('node')[-1].name}")
    machine = lab.add_node()
    progress(f"{machine.name} is on at {machine.address}")
    if (lab.directory / CLUSTER).exists():
        asyncio.run(_join(lab, ClusterAccess.read(lab.directory), machine.name, progress))
    return machine


async def _join(lab: Lab, access: ClusterAccess, name: str, progress: Progress) -> None:
    async with _api(lab, access) as api:
        progress(f"waiting for {name} to be Ready")
        await _until(lambda: _unready_nodes(api, {name}), f"{name} to be Ready", lab, name)
        progress(f"waiting for the agent on {name}")
        await _until(lambda: _unready_agent(api, lab, name), f"{name}'s agent", lab, name)


def take_down(lab: Lab) -> None:
    """Stop kubelets (their pods with them), forwarder and cluster."""
    _stop(lab)
    for name in (CLUSTER, SOCKET, KUBECONFIG):
        (lab.directory / name).unlink(missing_ok=True)


def kubeconfig(lab: Lab, access: ClusterAccess) -> Path:
    """Start the forwarder and write the host's admin kubeconfig; its path."""
    machine = lab.machine(access.machine)
    target = access.url.removeprefix("https://")
    port = start_forwarder(lab, machine.netns, target)
    path = lab.directory / KUBECONFIG
    return pki.write_kubeconfig(path, f"https://127.0.0.1:{port}", access.ca_file, access.token)


def _stop(lab: Lab) -> None:
    running = [pid for name in _PROCESSES if (pid := lab.process(name))]
    processes.stop(running, grace_s=15.0)


def _environment() -> dict[str, str]:
    """Ours, with the checkout importable whether or not the package is installed."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{_ROOT}:{path}" if path else str(_ROOT)}


def _start_cluster(lab: Lab, kind: ClusterKind) -> ClusterAccess:
    (lab.directory / CLUSTER).unlink(missing_ok=True)
    argv = [sys.executable, "-m", "lbctl.lab.clusterd", lab.name, kind]
    holder = lab.spawn("cluster", argv, env=_environment())
    deadline = time.monotonic() + _LIMIT_S
    while not (lab.directory / CLUSTER).exists():
        if not holder.alive() or time.monotonic() > deadline:
            log = lab.directory / "logs" / "cluster.log"
            said = log.read_text("utf-8", "replace").strip().splitlines()
            raise LabError(f"the {kind} cluster did not start: {' '.join(said[-3:])} (see {log})")
        time.sleep(_POLL_S)
    return ClusterAccess.read(lab.directory)


def _api(lab: Lab, access: ClusterAccess) -> kube.Api:
    netns = lab.machine(access.machine).netns
    return kube.Api(access.url, access.ca_file, access.token, netns)


async def _wait_nodes(lab: Lab, access: ClusterAccess, wanted: set[str]) -> None:
    async with _api(lab, access) as api:
        await _until(lambda: _unready_nodes(api, wanted), "nodes to be Ready", lab)


def install(lab: Lab, access: ClusterAccess, progress: Progress) -> None:
    """Apply everything of ours, as an installation does, and wait until it is Ready."""
    asyncio.run(_install(lab, access, progress))


async def _install(lab: Lab, access: ClusterAccess, progress: Progress) -> None:
    progress("waiting for managers and agents")
    async with _api(lab, access) as api:
        await _apply_all(api, manifests(), "apply deploy/kustomize/base")
        await _apply_all(api, [_config_map(lab)], "apply the lab's configuration")
        await _make_keys(api)
        await _until(lambda: _unready_ours(api, lab), "managers and agents to be Ready", lab)


def manifests(base: Path = BASE) -> list[Object]:
    """The objects of a kustomize base that lists plain files, in its order."""
    yaml = YAML(typ="safe")
    listing = yaml.load(base / "kustomization.yaml")
    found: list[Object] = []
    for name in listing["resources"]:
        found += [item for item in yaml.load_all(base / name) if item]
    return found


def url_of(item: Mapping[str, Any], namespace: str = names.NAMESPACE) -> str:
    """Where an object is in the API; plural by English spelling, as all kinds used here have it."""
    kind = str(item["kind"])
    plural = kind.lower() + ("es" if kind.endswith(("s", "x")) else "s")
    plural = plural[:-2] + "ies" if plural.endswith("ys") else plural
    scope = "" if kind in _CLUSTER_SCOPED else item["metadata"].get("namespace", namespace)
    return kube.path(plural, scope, item["metadata"]["name"], item["apiVersion"])


async def apply(api: kube.Api, item: Object) -> None:
    """Server-side apply. Raises KubeError."""
    query = "?fieldManager=lbctl-lab&force=true"
    await api.patch(url_of(item) + query, item, _APPLY)


async def _apply_all(api: kube.Api, items: list[Object], what: str) -> None:
    """Apply all; again for a while, because a fresh API server may not have its namespaces yet."""
    deadline = time.monotonic() + 60.0
    for item in items:
        while True:
            try:
                await apply(api, item)
                break
            except KubeError as error:
                if time.monotonic() > deadline:
                    name = f"{item['kind']} {item['metadata']['name']}"
                    raise LabError(f"cannot {what}: {name}: {error}") from error
                await asyncio.sleep(0.2)


def _config_map(lab: Lab) -> Object:
    """The configuration that lies beside the topology (NAME.lbctl.yaml), else the small rack's."""
    beside = lab.source.with_name(lab.source.name.split(".")[0] + ".lbctl.yaml")
    return workload.config_map(beside.read_text("utf-8") if beside.exists() else workload.CONFIG)


async def _make_keys(api: kube.Api) -> None:
    """The probe keys, as an installation makes them, unless they are there.

    The leading manager would make them too, but the agents would have to wait for it.
    """
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": names.PROBE_SECRET, "namespace": names.NAMESPACE},
        "data": {"current": base64.b64encode(base64.b64encode(secrets.token_bytes(32))).decode()},
    }
    try:
        await api.create(kube.path("secrets", names.NAMESPACE), secret)
    except Conflict:
        return


async def _until(look: Callable[[], Any], what: str, lab: Lab, node: str = "") -> None:
    """Wait until `look` finds nothing amiss. Raises LabError with what is.

    node: the machine that it is about; its kubelet's last words go into the error.
    """
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            amiss = await look()
        except KubeError as error:
            amiss = [str(error)]
        if not amiss:
            return
        if time.monotonic() > deadline:
            said = _kubelet_said(lab, node) if node else ""
            raise LabError(f"waited {_LIMIT_S:.0f} s for {what}: {'; '.join(amiss)}{said}")
        if lab.process("kubelet") is None:
            raise LabError(f"the lab's kubelet ended{_kubelet_said(lab)}")
        await asyncio.sleep(_POLL_S)


def _kubelet_said(lab: Lab, node: str = "") -> str:
    """The last lines of the kubelets' log, of one node or of all, and where it is."""
    log = lab.directory / "logs" / "kubelet.log"
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    said = [line for line in lines if not node or f'"{node}"' in line]
    return f": {' '.join(said[-3:]) or 'it said nothing'} (see {log})"


async def _unready_nodes(api: kube.Api, wanted: set[str]) -> list[str]:
    items = (await api.get(kube.path("nodes"))).get("items") or []
    ready = {item["metadata"]["name"] for item in items if _is_ready(item)}
    return [f"{name} is not Ready" for name in sorted(wanted - ready)]


async def _unready_ours(api: kube.Api, lab: Lab) -> list[str]:
    apps = {
        names.MANAGER_APP: len(lab.of_role("control")),
        names.AGENT_APP: len(lab.of_role("node")),
    }
    items = (await api.get(kube.path("pods", names.NAMESPACE))).get("items") or []
    amiss = []
    for app, count in apps.items():
        pods = [p for p in items if _app(p) == app and "deletionTimestamp" not in p["metadata"]]
        ready = sum(_is_ready(pod) for pod in pods)
        if ready < count:
            amiss.append(f"{ready} of {count} {app} pods are Ready")
            amiss += [_complaint(pod, lab) for pod in pods if not _is_ready(pod)]
    return amiss


async def _unready_agent(api: kube.Api, lab: Lab, node: str) -> list[str]:
    """What the agent of one node lacks; nothing on a cluster where no agents are installed."""
    sets = kube.path("daemonsets", names.NAMESPACE, group="apps/v1")
    if not (await api.get(sets)).get("items"):
        return []
    items = (await api.get(kube.path("pods", names.NAMESPACE))).get("items") or []
    here = [p for p in items if _app(p) == names.AGENT_APP and p["spec"].get("nodeName") == node]
    here = [pod for pod in here if "deletionTimestamp" not in pod["metadata"]]
    if any(_is_ready(pod) for pod in here):
        return []
    return [_complaint(pod, lab) for pod in here] or [f"no agent has been given to {node}"]


def _app(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get("app.kubernetes.io/name", ""))


def _is_ready(item: Object) -> bool:
    conditions = (item.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _complaint(pod: Object, lab: Lab) -> str:
    """One line on a pod that is not ready, and where its logs are."""
    status: Object = pod.get("status") or {}
    states = {
        item["name"]: item["state"]
        for item in status.get("containerStatuses") or []
        if not item["ready"]
    }
    conditions = status.get("conditions") or []
    why = [c["message"] for c in conditions if c["type"] == "PodScheduled" and c.get("message")]
    said = json.dumps(states) if states else " ".join(why)
    logs = lab.directory / "logs" / str(pod["spec"].get("nodeName")) / pod["metadata"]["name"]
    return f"{pod['metadata']['name']}: {status.get('phase')} {said} (logs: {logs})"
