"""What this machine needs for a lab, checked before anything is made.

Each missing thing is one line: what, and how to get it. Kernel features are tried out in a
network namespace that ends with the trial, never looked up in a version number.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from lbctl.errors import MissingFeature

_TOOLS: Final = (
    ("ip", "iproute2"),
    ("sysctl", "procps"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("mount", "mount"),
    ("nft", "nftables"),
    ("vtysh", "frr"),
)
_DAEMONS: Final = ("zebra", "bgpd", "staticd", "vrrpd", "frrinit.sh")
_FRR: Final = Path("/usr/lib/frr")

_TRIALS: Final = (
    ("veth", "CONFIG_VETH", "ip link add try0 type veth peer name try1"),
    ("bridge", "CONFIG_BRIDGE", "ip link add try2 type bridge"),
    ("macvlan", "CONFIG_MACVLAN", "ip link add try3 link try0 type macvlan mode bridge"),
    (
        "nftables netdev hooks",
        "CONFIG_NF_TABLES_NETDEV, CONFIG_NETFILTER_EGRESS",
        'nft "add table netdev t; add chain netdev t c'
        ' { type filter hook egress device try0 priority 0; }"',
    ),
    (
        "multipath routes",
        "CONFIG_IP_ROUTE_MULTIPATH",
        "sysctl -q net.ipv4.fib_multipath_hash_policy",
    ),
    ("txrehash", "Linux 5.19", "sysctl -q net.core.txrehash"),
)

_NOT_ROOT: Final = "the lab needs root (it makes network namespaces): run it with sudo"


def missing(environment_path: str | None = None) -> list[str]:
    """One line for each thing that is missing; [] when a lab can be built.

    environment_path: PATH to look for tools in, None for the process's own.
    """
    if os.geteuid() != 0:
        return [_NOT_ROOT]
    lines = []
    packages: dict[str, list[str]] = {}
    for tool, package in _TOOLS:
        if shutil.which(tool, path=environment_path) is None:
            packages.setdefault(package, []).append(tool)
    if "frr" not in packages:
        absent = [name for name in _DAEMONS if not (_FRR / name).exists()]
        if absent:
            packages["frr"] = absent
    for package, tools in packages.items():
        lines.append(f"{', '.join(tools)} is not installed: apt-get install {package}")
    return lines or _kernel()


def _kernel() -> list[str]:
    """Try all features in one throw-away namespace; each prints its number when it works."""
    script = "\n".join(
        f"({line}) >/dev/null 2>&1 && echo {i}" for i, (*_, line) in enumerate(_TRIALS)
    )
    result = subprocess.run(
        ["unshare", "--net", "sh", "-c", script + "\ntrue"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if result.returncode != 0:
        said = result.stderr.strip()
        return [f"this machine refuses network namespaces ({said}): a container needs --privileged"]
    works = {int(line) for line in result.stdout.split()}
    lines = [
        f"this kernel has no {feature}: it needs {option}"
        for number, (feature, option, _) in enumerate(_TRIALS)
        if number not in works
    ]
    overlay = "overlay" in Path("/proc/filesystems").read_text("utf-8")
    return lines if overlay else [*lines, "this kernel has no overlay: modprobe overlay"]


def check() -> None:
    """Raise MissingFeature with all that is missing, one line each."""
    lines = missing()
    if lines:
        raise MissingFeature("\n".join(lines))


def check_root() -> None:
    """Raise MissingFeature unless we are root."""
    if os.geteuid() != 0:
        raise MissingFeature(_NOT_ROOT)
