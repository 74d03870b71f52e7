"""Two FRR switches and a host on one bridge, each in a namespace, for the bench `announce`."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final, Self

from tests.lab.speaker_bed import FRR, SPEAKER, SWITCH, frr_config, wait_for

OTHER: Final = ipaddress.ip_address("10.99.0.3")
ROOT: Final = Path(__file__).parents[2]
LIMIT_S: Final = 300.0
NODES: Final = 8
FED: Final = "10.98.0.1"  # where a daemon listens that the nodes' sessions feed
FEEDERS: Final = [f"10.98.0.{10 + node}" for node in range(NODES)]


class Bed:
    """Switches `a` and `b`, and the namespace `host` of whatever announces."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = f"lban{os.getpid()}"
        self.switches = {f"{self.name}-a": SWITCH, f"{self.name}-b": OTHER}
        self.host = f"{self.name}-h"
        self.frr: dict[str, list[subprocess.Popen[str]]] = {}
        self.others: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self) -> None:
        for namespace in (*self.switches, self.host):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
        ip = ("ip", "-n", self.host)
        run(*ip, "link", "add", "rack", "type", "bridge")
        run(*ip, "address", "add", f"{SPEAKER}/24", "dev", "rack")
        run(*ip, "link", "set", "rack", "up")
        for fed in (FED, *FEEDERS):
            run(*ip, "address", "add", f"{fed}/24", "dev", "lo")
        for namespace, address in self.switches.items():
            port = f"port-{namespace[-1]}"
            end = ("type", "veth", "peer", "name", "eth0", "netns", namespace)
            run(*ip, "link", "add", "name", port, *end)
            run(*ip, "link", "set", port, "master", "rack", "up")
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", namespace, "link", "set", "eth0", "up")

    def __exit__(self, *_: object) -> None:
        self.stop()
        for namespace in (*self.switches, self.host):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)
            shutil.rmtree(f"/run/frr/{namespace}", ignore_errors=True)

    def spawn(
        self, namespace: str, *command: str, log: str, pipe: bool = False
    ) -> subprocess.Popen[str]:
        """Start a process; with `pipe` its standard input and output are pipes."""
        with (self.directory / f"{log}.log").open("a") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *command],
                stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else file,
                stderr=file,
                cwd=ROOT,
                text=True,
            )
        self.others.append(process)
        return process

    def python(self, namespace: str, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a module of the bench, with pipes."""
        command = (sys.executable, "-m", f"tests.bench.{module}", *arguments)
        return self.spawn(namespace, *command, log=module, pipe=True)

    def start(self, recursive: bool = False) -> None:
        """Start both switches anew, with empty tables; `recursive`: for virtual next hops."""
        text = frr_config(recursive=recursive)
        for namespace, address in self.switches.items():
            place = Path("/run/frr") / namespace
            place.mkdir(parents=True, exist_ok=True)
            shutil.chown(place, "frr", "frr")
            (place / "bgpd.conf").write_text(text.replace(str(SWITCH), str(address)))
            self.frr[namespace] = []
            for daemon, config in (("zebra", Path("/dev/null")), ("bgpd", place / "bgpd.conf")):
                options = ("-N", namespace, "-f", str(config), "-i", str(place / f"{daemon}.pid"))
                command = (str(FRR / daemon), *options, "-P", "0", "-u", "frr", "-g", "frr")
                self.frr[namespace].append(self.spawn(namespace, *command, log=daemon))
                wait_for(lambda: "FRR" in vtysh(namespace, daemon, "show version"), daemon)  # noqa: B023

    def stop(self) -> None:
        """End every process, the newest first."""
        for process in reversed(self.others):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self.others.clear()
        self.frr.clear()

    def established(self) -> bool:
        """Whether both switches have their session."""
        for namespace in self.switches:
            text = vtysh(namespace, "bgpd", "show bgp ipv4 unicast summary json") or "{}"
            peers = json.loads(text).get("peers", {})
            if [peer["state"] for peer in peers.values()] != ["Established"]:
                return False
        return True

    def pids(self) -> list[int]:
        """Of FRR."""
        return [process.pid for some in self.frr.values() for process in some]


def vtysh(namespace: str, daemon: str, command: str) -> str:
    """What a switch's daemon answers."""
    call = ["vtysh", "-N", namespace, "-d", daemon, "-c", command]
    return subprocess.run(call, check=False, capture_output=True, text=True).stdout


def run(*command: str) -> None:
    """Run to success."""
    subprocess.run(command, check=True, capture_output=True)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found, parents = [pid], [pid]
    while parents:
        parent = parents.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                below = [int(child) for child in (task / "children").read_text().split()]
                found += below
                parents += below
    return found


def processor_s(pids: list[int]) -> float:
    """The processor time that processes have taken, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    """The most memory that a process had resident."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024
