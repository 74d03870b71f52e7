"""kube-proxy on a lab node, for the cluster kind `kubernetes`: real in-cluster Services.

One process per node, started in its machine and started again when it ends while the machine has
power. Only on nodes: control hosts carry no pods. iptables mode, the one that most clusters run,
where the machine has iptables; else nftables mode, which needs nothing that the lab has not.
Flags: FACTS.md; the conntrack ones because a lab may not write the host's conntrack sysctls.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path
from typing import Final

import structlog

from lbctl.errors import LabError
from lbctl.lab.kubelet.kubelet import Machine

_log = structlog.get_logger()
_AGAIN_S: Final = 2.0
CLUSTER_CIDR: Final = "10.244.0.0/16"


def command(program: Path, kubeconfig: Path, node: str) -> list[str]:
    """kube-proxy's command line on a node."""
    mode = "iptables" if shutil.which("iptables") else "nftables"
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


async def keep(machine: Machine, program: Path, kubeconfig: Path, log: Path) -> None:
    """Run kube-proxy on `machine` until cancelled. kubeconfig: a path that the machine sees too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = command(program, kubeconfig, machine.name)
    while True:
        try:
            line = machine.command(*argv)
        except LabError:
            return  # no power: the node's next life starts it again
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *line, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            # nsenter passes no signal on, but the program dies with it (setpriv --pdeathsig)
            process.kill()
            await process.wait()
            raise
        _log.warning("kube_proxy_ended", node=machine.name, code=code, log=str(log))
        await asyncio.sleep(_AGAIN_S)
