"""What the lab and the contract tests need of a cluster, whichever it is.

A cluster is processes started with a command prefix (such as `nsenter --net=…`), so that the same
code runs it in the lab's `kube` namespace and, for contract tests, right on the host's loopback.
All processes carry PR_SET_PDEATHSIG or are stopped by pid; state lives in `directory` (RAM disk).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

ClusterKind = Literal["embedded", "kubernetes"]

# IPv4 is the default family, as on most dual-stack clusters
SERVICE_CIDRS = "10.96.0.0/16,fd00:10:96::/112"
POD_CIDRS = "10.244.0.0/16,fd00:10:244::/48"


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """How to start a cluster.

    directory: for state, keys and logs; must exist. prefix: put before every command line.
    address, port: where the API server listens (inside the prefix's namespace); port 0 = any free.
    extra_names: further certificate names. nodes: static pod CIDRs are not allocated here.
    """

    directory: Path
    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    port: int = 0
    service_cidrs: str = SERVICE_CIDRS
    extra_names: tuple[str, ...] = ("localhost", "127.0.0.1")


class Cluster(Protocol):
    """A running cluster. Blocking calls; each has a generous limit and says what it waited for."""

    kind: ClusterKind
    url: str  # https://ADDRESS:PORT
    ca_file: Path
    admin_token: str  # bearer token of a member of system:masters
    kubeconfig: Path  # admin, pointing at `url`

    def stop(self) -> None:
        """Stop every process, by pid, and wait for them."""

    def pids(self) -> dict[str, int]:
        """Process ids by name: apiserver, controllers, etcd …, for faults and memory figures."""
