"""A bed for tests of the speaker alone: real FRR in one namespace, the real speaker in another.

Everything carries a prefix of the bed's own, is stopped by pid, and is gone after `close`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

from lbctl.core.model import Agreed, Peer
from tests.routes import Route

CHECKOUT = FilePath(__file__).parents[2]
FRR = FilePath("/usr/lib/frr")
SWITCH, SWITCH6 = ipaddress.ip_address("10.99.0.1"), ipaddress.ip_address("fd99::1")
SPEAKER, SPEAKER6 = ipaddress.ip_address("10.99.0.2"), ipaddress.ip_address("fd99::2")
ASN, SWITCH_ASN = 64512, 64500

# What a path is to a test: prefix, path-id (0 without ADD-PATH), next hop, MED, communities.
Seen = tuple[str, int, str, int, tuple[str, ...]]


def frr_config(
    add_path: bool = True,
    ipv6_peer: bool = False,
    password6: str | None = None,
    agreed: Agreed | None = None,
    recursive: bool = False,
) -> str:
    """bgpd's configuration: accepts host routes, announces nothing.

    agreed: the families that it carries, with ADD-PATH or not; by default both as `add_path` says.
    recursive: what `nextHop: recursive` needs of a switch (docs/operations.md).
    """
    modes = dict(((4, add_path), (6, add_path)) if agreed is None else agreed)
    off = "  neighbor {} disable-addpath-rx\n"
    text = f"""frr defaults datacenter
bgp route-map delay-timer 0
route-map IN permit 10
route-map OUT deny 10
router bgp {SWITCH_ASN}
 bgp router-id {SWITCH}
 no bgp default ipv4-unicast
 bgp bestpath as-path multipath-relax
"""
    for address in [SPEAKER] + ([SPEAKER6] if ipv6_peer else []):
        text += f" neighbor {address} remote-as {ASN}\n neighbor {address} timers 3 9\n"
        text += f" neighbor {address} timers connect 1\n"
        if recursive:
            text += f" neighbor {address} disable-connected-check\n"
        if password6 and address == SPEAKER6:
            text += f" neighbor {address} password {password6}\n"
        for version, several in modes.items():
            text += f" address-family ipv{version} unicast\n  neighbor {address} activate\n"
            text += (
                f"  neighbor {address} route-map IN in\n  neighbor {address} route-map OUT out\n"
            )
            if not several:
                text += off.format(address)
            text += "  maximum-paths 64\n exit-address-family\n"
    return text


class Bed:
    """Two namespaces joined by a veth pair; FRR in `switch`, the speaker in `speaker`."""

    def __init__(self, directory: FilePath, frr_root: FilePath | None = None) -> None:
        """frr_root: a tree with another FRR to run, in place of this machine's."""
        self.frr_prefix: tuple[str, ...] = ()
        if frr_root is not None:
            script = f"""set -e
            mount --bind /run {frr_root}/run
            mount --bind /proc {frr_root}/proc
            exec chroot {frr_root} "$@"
            """
            self.frr_prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
        self.name = f"lbsp{os.getpid()}{secrets.token_hex(2)}"
        self.directory = directory
        self.switch, self.speaker = f"{self.name}-sw", f"{self.name}-sp"
        self.run_directory = FilePath("/run/frr") / self.name
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.add_path = True
        self.config = frr_config()
        self.speaker_directory = directory / "speaker"
        self.speaker_arguments: tuple[str, ...] = ()
        self.speaker_prefix: tuple[str, ...] = ()

    def open(self) -> None:
        """Make the namespaces and start zebra and bgpd."""
        for namespace in (self.switch, self.speaker):
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run(
            *("ip", "-n", self.switch, "link", "add", "eth0", "type", "veth"),
            *("peer", "name", "eth0", "netns", self.speaker),
        )
        for namespace, four, six in (
            (self.switch, SWITCH, SWITCH6),
            (self.speaker, SPEAKER, SPEAKER6),
        ):
            _run("ip", "-n", namespace, "address", "add", f"{four}/24", "dev", "eth0")
            _run("ip", "-n", namespace, "address", "add", f"{six}/64", "dev", "eth0", "nodad")
            _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        self.run_directory.mkdir(parents=True)
        shutil.chown(self.run_directory, "frr", "frr")
        self.start_frr()

    def close(self) -> None:
        """Stop everything and remove every trace."""
        for name in ("speaker", "bgpd", "zebra"):
            with contextlib.suppress(KeyError):
                self.stop(name)
        for namespace in (self.switch, self.speaker):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
        shutil.rmtree(self.run_directory, ignore_errors=True)

    def _spawn(self, name: str, namespace: str, *command: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
            )

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stop a process of ours and wait for its end."""
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(30)

    def start_frr(self, *daemons: str) -> None:
        """Start zebra and bgpd, or only those named."""
        file = self.run_directory / "bgpd.conf"  # where FRR's own user can read it
        file.write_text(self.config)
        for daemon in daemons or ("zebra", "bgpd"):
            config = file if daemon == "bgpd" else FilePath("/dev/null")
            self._spawn(
                daemon,
                self.switch,
                *self.frr_prefix,
                str(FRR / daemon),
                *(
                    "-N",
                    self.name,
                    "-f",
                    str(config),
                    "-i",
                    str(self.run_directory / f"{daemon}.pid"),
                ),
                *("-P", "0", "-u", "frr", "-g", "frr"),
            )
            wait_for(lambda: self.answers(daemon), f"{daemon} to answer")  # noqa: B023

    def answers(self, daemon: str) -> bool:
        """Whether a daemon takes commands."""
        done = self.vtysh("-d", daemon, "-c", "show version")
        return done.returncode == 0 and "FRRouting" in done.stdout

    def vtysh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run vtysh against this bed's FRR."""
        return subprocess.run(
            [*self.frr_prefix, "vtysh", "-N", self.name, *arguments],
            check=False,
            capture_output=True,
            text=True,
        )

    def start_speaker(self) -> None:
        """Start `lbctl-speaker`."""
        self.speaker_directory.mkdir(exist_ok=True)
        self._spawn(
            "speaker",
            self.speaker,
            *self.speaker_prefix,
            sys.executable,
            *("-m", "manager.speaker.launch", "--directory", str(self.speaker_directory)),
            *self.speaker_arguments,
        )

    def descendants(self, module: str) -> list[int]:
        """Pids below our speaker process that run a module (runner, relay)."""
        found, parents = [], {self.processes["speaker"].pid}
        children: dict[int, list[int]] = {}
        for entry in FilePath("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    children.setdefault(parent, []).append(int(entry.name))
        while parents:
            pid = parents.pop()
            parents.update(children.get(pid, ()))
            with contextlib.suppress(OSError):
                if f"manager.speaker.{module}\0" in FilePath(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def flap(self) -> None:
        """Take the switch's link down and up."""
        for state in ("down", "up"):
            _run("ip", "-n", self.switch, "link", "set", "eth0", state)
        address = f"{SWITCH6}/64"
        _run("ip", "-n", self.switch, "address", "replace", address, "dev", "eth0", "nodad")

    def kernel(self, version: int = 4) -> dict[str, set[str]]:
        """What the switch's kernel has from BGP: the next hops of each host route."""
        family = f"-{version}"
        done = subprocess.run(
            ["ip", "-n", self.switch, family, "-j", "route", "show", "proto", "bgp"],
            check=True,
            capture_output=True,
            text=True,
        )
        return {
            route["dst"]: {hop["gateway"] for hop in route.get("nexthops", [route])}
            for route in json.loads(done.stdout or "[]")
        }

    def routes(self, version: int = 4) -> set[Seen]:
        """What bgpd has; empty when it does not answer."""
        done = self.vtysh("-d", "bgpd", "-c", f"show bgp ipv{version} unicast json detail")
        if done.returncode != 0 or not done.stdout.strip():
            return set()
        data: dict[str, Any] = json.loads(done.stdout)
        seen = set()
        for prefix, entries in data.get("routes", {}).items():
            if isinstance(entries, dict):  # FRR 10
                entries = entries["paths"]
            for entry in entries:
                if "nexthops" not in entry:  # FRR 8.4 puts a header first
                    continue
                hop = next(h["ip"] for h in entry["nexthops"] if h.get("scope") != "link-local")
                words = tuple(sorted(entry.get("community", {}).get("string", "").split()))
                number = entry.get("addpathRxId", 0)
                seen.add((prefix, number, hop, entry.get("metric", 0), words))
        return seen


def expected(paths: frozenset[Route], add_path: bool = True, version: int = 4) -> set[Seen]:
    """What a switch shall have of these paths; without ADD-PATH the first of each prefix."""
    first: dict[str, Seen] = {}
    family = (p for p in paths if p.prefix.version == version)
    for p in sorted(family, key=lambda p: (str(p.prefix), int(p.next_hop), p.path_id)):
        number = p.path_id if add_path else 0
        seen = (str(p.prefix), number, str(p.next_hop), p.med or 0, tuple(sorted(p.communities)))
        first.setdefault(f"{p.prefix} {number if add_path else ''}", seen)
    return set(first.values())


def peer(name: str = "tor", **changes: Any) -> Peer:
    """The switch as a peer."""
    values: dict[str, Any] = {"address": SWITCH, "asn": SWITCH_ASN, "local_asn": ASN}
    return Peer(name=name, **(values | changes))


def path(eip: int, node: int, med: int | None = None, communities: tuple[str, ...] = ()) -> Route:
    """A path of EIP number `eip` over node number `node`, with a path-id of its attributes."""
    prefix = ipaddress.ip_network(int(ipaddress.ip_address("198.51.0.0")) + eip)
    hop = ipaddress.ip_address("10.99.0.20") + node
    tag = sum(ord(char) * 31**index for index, char in enumerate(",".join(communities)))
    number = 1 + (node + 256 * ((med or 0) + 16 * tag)) % (2**32 - 1)
    return Route(
        hop,
        number,
        f"node-{node}",
        communities,
        med,
        prefix=ipaddress.ip_network(f"{prefix.network_address}/32"),
    )


def path6(eip: int, node: int, med: int | None = None) -> Route:
    """As `path`, an IPv6 EIP over the node's IPv6 address."""
    prefix = ipaddress.ip_network((int(ipaddress.ip_address("2001:db8:100::")) + eip, 128))
    hop = ipaddress.ip_address(f"fd99::{20 + node}")
    return dataclasses.replace(path(eip, node, med), prefix=prefix, next_hop=hop)


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    """Poll until true; AssertionError that says what was waited for."""
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, f"waited {limit_s} s for {what}"
        time.sleep(0.05)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
