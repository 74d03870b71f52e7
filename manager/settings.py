"""What the manager is told at its start: arguments, else the environment, else defaults."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from lbctl.core import names
from lbctl.core.model import Address


@dataclass(frozen=True, slots=True)
class Settings:
    """manager_id: unique among the replicas (the Pod's name). address: the Pod's, None if unknown.

    http_host: "" for every address. kubeconfig: None for in-cluster or $KUBECONFIG.
    """

    manager_id: str
    address: Address | None = None
    namespace: str = names.NAMESPACE
    http_host: str = ""
    http_port: int = names.MANAGER_HTTP_PORT
    speaker_dir: Path = Path(names.SPEAKER_SOCKET_DIR)
    snapshot_dir: Path = Path(names.MANAGER_SNAPSHOT_DIR)
    keys_dir: Path = Path(names.KEYS_DIR)
    kubeconfig: str | None = None
    log_level: str = "info"


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """From the command line and the environment; ends the process on nonsense, as argparse does."""
    env = os.environ
    parser = argparse.ArgumentParser(prog="lbctl-manager", description="allocates and announces")
    parser.add_argument("--id", default=env.get("POD_NAME") or socket.gethostname())
    parser.add_argument("--address", default=env.get("POD_IP") or "")
    parser.add_argument("--namespace", default=env.get("POD_NAMESPACE") or names.NAMESPACE)
    parser.add_argument("--http-host", default="")
    parser.add_argument("--http-port", type=int, default=names.MANAGER_HTTP_PORT)
    parser.add_argument("--speaker-dir", type=Path, default=Path(names.SPEAKER_SOCKET_DIR))
    parser.add_argument("--snapshot-dir", type=Path, default=Path(names.MANAGER_SNAPSHOT_DIR))
    parser.add_argument("--keys-dir", type=Path, default=Path(names.KEYS_DIR))
    parser.add_argument("--kubeconfig", default=None)
    parser.add_argument("--log-level", default=env.get("LOG_LEVEL") or "info")
    given = parser.parse_args(arguments)
    try:
        address = ip_address(given.address) if given.address else None
    except ValueError:
        parser.error(f"--address (POD_IP) is not an address: {given.address!r}")
    return Settings(
        manager_id=given.id,
        address=address,
        namespace=given.namespace,
        http_host=given.http_host,
        http_port=given.http_port,
        speaker_dir=given.speaker_dir,
        snapshot_dir=given.snapshot_dir,
        keys_dir=given.keys_dir,
        kubeconfig=given.kubeconfig,
        log_level=given.log_level,
    )
