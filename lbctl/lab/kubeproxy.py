"""kube-proxy on a lab node, for the cluster kind `kubernetes`: real in-cluster Services.

One process per node, started in its machine and started again when it ends while the machine has
power. Only on nodes: control hosts carry no pods. The mode is a file of the lab, so that `switch`
can change it while the lab runs: each node's kube-proxy is stopped, cleans up after itself, and
comes back in the new mode. Flags: FACTS.md; the conntrack ones because a lab may not write the
host's conntrack sysctls.
"""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

import structlog

from lbctl.errors import LabError
from lbctl.lab.kubelet.kubelet import Machine

_log = structlog.get_logger()
_AGAIN_S: Final = 2.0
_LOOK_S: Final = 0.2
_FILE: Final = "kube-proxy.mode"
CLUSTER_CIDR: Final = "10.244.0.0/16"


class Mode(StrEnum):
    """What programs a node's in-cluster Services, if anything does."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


def write_mode(directory: Path, mode: Mode) -> None:
    """Choose the mode of every kube-proxy of the lab in `directory`, those that run included."""
    new = directory / f"{_FILE}.new"
    new.write_text(mode, "utf-8")
    new.replace(directory / _FILE)


def read_mode(directory: Path) -> Mode:
    """The mode that was chosen; nftables where none was."""
    with suppress(FileNotFoundError):
        return Mode((directory / _FILE).read_text("utf-8"))
    return Mode.NFTABLES


def command(program: Path, kubeconfig: Path, node: str, mode: Mode) -> list[str]:
    """kube-proxy's command line on a node."""
    return [
        str(program),
        f"--kubeconfig={kubeconfig}",
        f"--hostname-override={node}",
        f"--cluster-cidr={CLUSTER_CIDR}",
        f"--proxy-mode={mode}",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--healthz-bind-address=127.0.0.1:10256",
        "--metrics-bind-address=127.0.0.1:10249",
    ]


async def keep(machine: Machine, program: Path, directory: Path, kubeconfig: Path) -> None:
    """Run kube-proxy on `machine` in the lab's mode, until cancelled or its power goes.

    directory: the lab's. kubeconfig: a path that the machine sees too.
    """
    log = directory / "logs" / machine.name / "kube-proxy.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with suppress(LabError):  # no power: the node's next life starts it again
        while True:
            mode = read_mode(directory)
            if mode is Mode.NONE:
                await asyncio.sleep(_LOOK_S)
                continue
            argv = command(program, kubeconfig, machine.name, mode)
            code = await _run(machine, argv, log, directory, mode)
            if code is None:
                await _run(machine, [str(program), "--cleanup"], log)
            else:
                _log.warning("kube_proxy_ended", node=machine.name, code=code, log=str(log))
                await asyncio.sleep(_AGAIN_S)


async def _run(
    machine: Machine,
    argv: list[str],
    log: Path,
    directory: Path | None = None,
    mode: Mode = Mode.NONE,
) -> int | None:
    """Run a program to its end, its exit code; None if the lab in `directory` left `mode`."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *machine.command(*argv), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        while directory is None or read_mode(directory) is mode:
            with suppress(TimeoutError):
                return await asyncio.wait_for(process.wait(), _LOOK_S)
        return None
    finally:
        # nsenter passes no signal on, but the program dies with it (setpriv --pdeathsig)
        if process.returncode is None:
            process.kill()
            await process.wait()
