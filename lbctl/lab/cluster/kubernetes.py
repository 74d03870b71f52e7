"""A real control plane: etcd, kube-apiserver, kube-controller-manager; no scheduler, no kubelet.

The lab schedules and runs pods itself. RBAC is on. etcd does not sync to disk: its directory is on
a RAM disk and dies with the lab. Flags are those that FACTS.md measured.
"""

from __future__ import annotations

import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lbctl.errors import LabError
from lbctl.lab.cluster import binaries, pki, processes
from lbctl.lab.cluster.handle import POD_CIDRS, ClusterKind, ClusterSpec

READY_S = 180.0
ISSUER = "https://kubernetes.default.svc"


@dataclass(slots=True)
class KubernetesCluster:
    """A running real cluster; `binaries` holds kube-proxy and kubectl too."""

    url: str
    pki: pki.Pki
    directory: Path
    kubeconfig: Path
    binaries: Path
    kind: ClusterKind = "kubernetes"
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def ca_file(self) -> Path:
        """What clients trust."""
        return self.pki.ca_cert

    @property
    def admin_token(self) -> str:
        """Bearer token of a member of system:masters."""
        return self.pki.token()

    def pids(self) -> dict[str, int]:
        """Process ids: etcd, apiserver, controllers."""
        return {name: child.pid for name, child in self.children.items()}

    def stop(self) -> None:
        """Stop controllers, apiserver, etcd, in this order."""
        processes.stop(list(self.children.values()))
        self.children.clear()


def start(
    spec: ClusterSpec, progress: Callable[[str], None] = lambda _: None, *, linked: bool = True
) -> KubernetesCluster:
    """Start a cluster and wait until it serves and its controllers run.

    `linked`: its processes die with this one. Raises MissingFeature where the programs can be
    neither found nor built, LabError if something does not come up within READY_S.
    """
    folder = binaries.find(progress)
    etcd_port, peer_port, controller_port, any_port = processes.free_ports(4)
    port = spec.port or any_port
    keys = pki.create(spec.directory / "pki", (*spec.extra_names, spec.address, "kubernetes"))
    url = f"https://{spec.address}:{port}"
    kubeconfig = pki.write_kubeconfig(
        spec.directory / "admin.kubeconfig", url, keys.ca_cert, keys.token()
    )
    cluster = KubernetesCluster(url, keys, spec.directory, kubeconfig, folder)
    commands = {
        "etcd": _etcd(folder, spec, etcd_port, peer_port),
        "apiserver": _apiserver(folder, spec, keys, port, etcd_port),
        "controllers": _controllers(folder, keys, kubeconfig, controller_port),
    }
    try:
        for name in ("etcd", "apiserver"):
            _launch(cluster, name, [*spec.prefix, *commands[name]], linked=linked)
        _wait_ready(cluster, spec, progress)
        _launch(cluster, "controllers", [*spec.prefix, *commands["controllers"]], linked=linked)
        _wait_controllers(cluster, spec, progress)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _launch(cluster: KubernetesCluster, name: str, command: list[str], *, linked: bool) -> None:
    log = cluster.directory / f"{name}.log"
    cluster.children[name] = processes.start(command, log, linked=linked)


def _etcd(folder: Path, spec: ClusterSpec, port: int, peer_port: int) -> list[str]:
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        str(folder / "etcd"),
        f"--data-dir={spec.directory / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def _apiserver(
    folder: Path, spec: ClusterSpec, keys: pki.Pki, port: int, etcd_port: int
) -> list[str]:
    # A loopback address may not be advertised; nothing of the lab uses the `kubernetes` Service.
    advertise = "192.0.2.5" if spec.address.startswith("127.") else spec.address
    return [
        str(folder / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--bind-address={spec.address}",
        f"--advertise-address={advertise}",
        f"--secure-port={port}",
        f"--tls-cert-file={keys.server_cert}",
        f"--tls-private-key-file={keys.server_key}",
        f"--client-ca-file={keys.ca_cert}",
        f"--token-auth-file={keys.token_file}",
        f"--service-account-key-file={keys.sa_pub}",
        f"--service-account-signing-key-file={keys.sa_key}",
        f"--service-account-issuer={ISSUER}",
        "--authorization-mode=RBAC",
        f"--service-cluster-ip-range={spec.service_cidrs}",
        "--service-node-port-range=10000-40000",
        "--endpoint-reconciler-type=none",
        "--enable-priority-and-fairness=false",
        "--profiling=false",
        "--v=1",
    ]


def _controllers(folder: Path, keys: pki.Pki, kubeconfig: Path, port: int) -> list[str]:
    return [
        str(folder / "kube-controller-manager"),
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        "--authentication-skip-lookup=true",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--root-ca-file={keys.ca_cert}",
        f"--service-account-private-key-file={keys.sa_key}",
        "--use-service-account-credentials=false",
        "--leader-elect=false",
        f"--cluster-cidr={POD_CIDRS}",
        "--allocate-node-cidrs=false",
        "--profiling=false",
        "--concurrent-endpoint-syncs=2",
        "--endpointslice-updates-batch-period=0s",
        "--v=1",
    ]


def _wait_ready(
    cluster: KubernetesCluster, spec: ClusterSpec, progress: Callable[[str], None]
) -> None:
    """Poll /readyz as admin, from inside the prefix's namespace if there is one."""
    _wait(cluster, progress, "kube-apiserver to be ready", lambda: _get(cluster, spec, "/readyz"))


def _wait_controllers(
    cluster: KubernetesCluster, spec: ClusterSpec, progress: Callable[[str], None]
) -> None:
    """The ServiceAccount controller's first work is the sign that the controllers run."""
    path = "/api/v1/namespaces/default/serviceaccounts/default"
    _wait(cluster, progress, "kube-controller-manager to work", lambda: _get(cluster, spec, path))


def _wait(
    cluster: KubernetesCluster,
    progress: Callable[[str], None],
    what: str,
    done: Callable[[], bool],
) -> None:
    """Poll `done` until READY_S; a child that has exited ends the wait at once."""
    begin = said = time.monotonic()
    while not done():
        for name, child in cluster.children.items():
            if child.poll() is not None:
                words = processes.tail(cluster.directory / f"{name}.log")
                raise LabError(f"{name} exited with code {child.returncode}: {words}")
        now = time.monotonic()
        if now - begin > READY_S:
            words = processes.tail(cluster.directory / "apiserver.log")
            raise LabError(f"waited {READY_S:.0f} s for {what}: {words}")
        if now - said > 2:
            said = now
            progress(f"waiting for {what} ({now - begin:.0f} s)")
        time.sleep(0.1)


def _get(cluster: KubernetesCluster, spec: ClusterSpec, path: str) -> bool:
    """True if GET answers 200. Behind a prefix the request is made by curl in that namespace."""
    if spec.prefix:
        command = [
            *spec.prefix,
            *("curl", "-sf", "-m", "5", "-o", "/dev/null", "--cacert", str(cluster.ca_file)),
            *("-H", "@-", cluster.url + path),
        ]
        header = f"Authorization: Bearer {cluster.admin_token}\n"
        return subprocess.run(command, input=header, text=True, timeout=30).returncode == 0
    request = urllib.request.Request(
        cluster.url + path, headers={"Authorization": f"Bearer {cluster.admin_token}"}
    )
    context = ssl.create_default_context(cafile=str(cluster.ca_file))
    try:
        with urllib.request.urlopen(request, timeout=5, context=context) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
