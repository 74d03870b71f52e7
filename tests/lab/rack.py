"""What the tests of the bare rack share: waiting, traces of a lab, a small server on a node."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lbctl.lab import switch
from lbctl.lab.lab import STATE_ROOT, Lab
from lbctl.lab.machine import NETNS_DIR, Machine

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "bgp-lab" / "small.clab.yml"
BARE = ROOT / "tests" / "lab" / "bare.clab.yml"  # no switches: comes up in a second
VRRP = {"tor-a": {10: "Master", 20: "Master"}, "tor-b": {10: "Backup", 20: "Backup"}}
EIP = "198.51.100.7"


def poll(
    what: str, look: Callable[[], bool], limit_s: float = 90.0, seen: Callable[[], object] = str
) -> None:
    """Wait until `look` is true; fails with what was waited for, and what `seen` says then."""
    deadline = time.monotonic() + limit_s
    while not look():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what} {seen()}"
        time.sleep(0.02)


def vrrp(lab: Lab) -> dict[str, dict[int, str]]:
    """VRRP states of the switches that have power."""
    return {m.name: switch.vrrp_states(m) for m in pair(lab)}


def pair(lab: Lab) -> list[Machine]:
    """The switches that have power."""
    return [m for m in lab.of_role("switch") if m.alive]


def settled(lab: Lab) -> Lab:
    """Wait until the VRRP pair has chosen: tor-a masters both groups."""
    poll(
        "tor-a to be VRRP master and tor-b backup:",
        lambda: vrrp(lab) == VRRP,
        seen=lambda: (vrrp(lab), [m.run("vtysh", "-c", "show vrrp").stdout for m in pair(lab)]),
    )
    return lab


def pings(source: Machine, target: str) -> bool:
    """Whether one ping is answered within a second."""
    done = source.run("ping", "-n", "-c1", "-W1", target, check=False)
    return done.returncode == 0


def traces(name: str) -> list[str]:
    """Everything on this machine that still belongs to a lab of that name."""
    found = [str(path) for path in NETNS_DIR.glob(f"{name}-*")] if NETNS_DIR.exists() else []
    if (STATE_ROOT / name).exists():
        found.append(str(STATE_ROOT / name))
    mounts = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    found += [line for line in mounts if f"/{name}-" in line or f"/{name}/" in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"/{name}/" in line or f"/{name}-" in line:
                found.append(f"process {entry.name}: {line}")
    return found


def lbctl(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The real command, as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lbctl.cli.main", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=env,
    )


SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from lbctl.lab.kubelet.podserver import Listening, serve
listening = Listening([{"port": 80, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}])
print("ready", flush=True)
serve(sys.argv[2], listening)
"""


def start_server(machine: Machine) -> subprocess.Popen[str]:
    """The lab's pod server on the machine itself, under the machine's name; TCP 80 and UDP 53."""
    process = machine.popen(
        *(sys.executable, "-c", SERVER, str(ROOT), machine.name),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Stop a process that `start_server` started."""
    process.kill()
    process.communicate()
