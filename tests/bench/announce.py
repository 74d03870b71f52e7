"""Many EIPs × 8 next hops into two FRR switches' kernels: our speaker, GoBGP, BIRD, and FRR alone.

One run, one after another, each with switches started anew. Ours is driven by its port, so all of
the manager's planning counts; GoBGP and BIRD get the routes from eight BGP sessions, one a node, in
prepared messages, which is less than an API call for each route; `FRR alone` is fed such messages
by itself: the floor, what bgpd, zebra and the kernel take whoever announces.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.lab.speaker_bed import ASN, SPEAKER, SWITCH, SWITCH_ASN, wait_for

from .announce_bed import FED, FEEDERS, LIMIT_S, NODES, OTHER, Bed, peak_mib, processor_s, tree

ROUNDS: Final = 3
RECURSIVE: Final = "recursive"
HEAD: Final = (
    "| who | load | one node out, median of 3 (worst) | CPU, load | CPU, out | FRR's CPU, load "
    "| peak MiB |\n|---|---|---|---|---|---|---|"
)


@dataclass
class Result:
    """What was measured of one candidate."""

    load_s: float = 0.0
    out_s: list[float] = field(default_factory=list)
    urgent_s: float | None = None
    cpu_load_s: float = 0.0
    cpu_out_s: list[float] = field(default_factory=list)
    frr_load_s: float = 0.0
    memory: str = ""


class Candidate:
    """One way of announcing."""

    def __init__(self, name: str, needs: str = "") -> None:
        self.name, self.needs = name, needs
        self.daemons: list[int] = []  # whose processor time and memory count

    def start(self, bed: Bed, count: int) -> subprocess.Popen[str]:
        """Start it; returns its driver."""
        targets = ",".join(str(address) for address in bed.switches.values())
        return bed.python(bed.host, "announce_driver", "direct", str(count), targets)

    def memory(self) -> str:
        """Its peak, in MiB."""
        return ", ".join(f"{peak_mib(pid):.0f}" for pid in self.daemons)


class Ours(Candidate):
    """Port, launcher, relay and ExaBGP. kind: how the driver announces."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name)
        self.kind = kind

    def start(self, bed: Bed, count: int) -> subprocess.Popen[str]:
        directory = bed.directory / "speaker"
        directory.mkdir()
        module = ("-m", "manager.speaker.launch", "--directory", str(directory))
        speaker = bed.spawn(bed.host, sys.executable, *module, log="speaker")
        driver = bed.python(bed.host, "announce_driver", self.kind, str(count), str(directory))
        wait_for(bed.established, "the sessions", LIMIT_S)
        self.daemons = [driver.pid, *tree(speaker.pid)]
        return driver

    def memory(self) -> str:
        exabgp = [p for p in self.daemons if b"speaker.runner" in cmdline(p)]
        return f"{peak_mib(exabgp[0]):.0f} (ExaBGP)"


class Fed(Candidate):
    """A daemon that gets the nodes' routes by BGP."""

    config = ""

    def command(self, config: Path) -> tuple[str, ...]:
        """How it is started."""
        raise NotImplementedError

    def start(self, bed: Bed, count: int) -> subprocess.Popen[str]:
        config = bed.directory / f"{self.needs}.conf"
        config.write_text(self.config)
        daemon = bed.spawn(bed.host, *self.command(config), log=self.needs)
        self.daemons = [daemon.pid]
        wait_for(bed.established, f"{self.name}'s sessions", LIMIT_S)
        return bed.python(bed.host, "announce_driver", "feed", str(count), FED)


class Gobgp(Fed):
    """Debian's GoBGP."""

    config = f"""[global.config]
as = {ASN}
router-id = "{SPEAKER}"
[global.apply-policy.config]
export-policy-list = ["keep"]
default-export-policy = "accept-route"
[[policy-definitions]]
name = "keep"
[[policy-definitions.statements]]
name = "keep"
[policy-definitions.statements.actions]
route-disposition = "accept-route"
[policy-definitions.statements.actions.bgp-actions]
set-next-hop = "unchanged"
""" + "".join(
        f"""[[neighbors]]
[neighbors.config]
neighbor-address = "{address}"
peer-as = {SWITCH_ASN if address in (str(SWITCH), str(OTHER)) else ASN}
[neighbors.transport.config]
passive-mode = {str(address in FEEDERS).lower()}
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv4-unicast"
[neighbors.afi-safis.add-paths.config]
send-max = {0 if address in FEEDERS else NODES}
"""
        for address in (str(SWITCH), str(OTHER), *FEEDERS)
    )

    def command(self, config: Path) -> tuple[str, ...]:
        return ("gobgpd", "-f", str(config), "-t", "toml", "-l", "warn")


class Bird(Fed):
    """Debian's BIRD 2."""

    config = (
        f"router id {SPEAKER};\nprotocol device {{}}\nprotocol direct {{ ipv4; }}\n"
        + "".join(
            f"protocol bgp {{ local {FED} as {ASN}; neighbor {address} as {ASN}; passive;"
            " multihop; ipv4 { import all; export none; }; }\n"
            for address in FEEDERS
        )
        + "".join(
            f"protocol bgp {{ local {SPEAKER} as {ASN}; neighbor {address} as {SWITCH_ASN};"
            " ipv4 { import none; export where source = RTS_BGP; next hop keep; add paths tx; };"
            " }\n"
            for address in (SWITCH, OTHER)
        )
    )

    def command(self, config: Path) -> tuple[str, ...]:
        return ("bird", "-f", "-c", str(config), "-s", str(config.with_suffix(".ctl")))


def cmdline(pid: int) -> bytes:
    """A process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


class Trial:
    """One candidate on fresh switches."""

    def __init__(self, bed: Bed, candidate: Candidate, count: int) -> None:
        self.bed, self.candidate, self.count = bed, candidate, count
        self.result = Result()
        self.virtual = isinstance(candidate, Ours) and candidate.kind == RECURSIVE
        bed.start(self.virtual)
        self.driver = candidate.start(bed, count)
        assert self.answer(self.driver) == "up", f"{candidate.name}: no sessions"
        wait_for(bed.established, "the sessions", LIMIT_S)

    def answer(self, process: subprocess.Popen[str]) -> str:
        """Its next line."""
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def phase(self, what: str, hops: int) -> tuple[float, float, float]:
        """Do it; returns seconds until both kernels are right, its CPU seconds, and FRR's."""
        arguments = (str(self.count + self.virtual), str(hops))
        watches = [self.bed.python(n, "announce_watch", *arguments) for n in self.bed.switches]
        assert [self.answer(watch) for watch in watches] == ["ready"] * len(watches)
        before = processor_s(self.candidate.daemons), processor_s(self.bed.pids())
        assert self.driver.stdin is not None
        self.driver.stdin.write(f"{what}\n")
        self.driver.stdin.flush()
        begin = float(self.answer(self.driver))
        end = max(float(self.answer(watch)) for watch in watches)
        after = processor_s(self.candidate.daemons), processor_s(self.bed.pids())
        return end - begin, after[0] - before[0], after[1] - before[1]

    def run(self) -> Result:
        """Load, then one node out and back."""
        result = self.result
        result.load_s, result.cpu_load_s, result.frr_load_s = self.phase("load", NODES)
        for _ in range(ROUNDS):
            out_s, cpu_s, _ = self.phase("out", NODES - 1)
            result.out_s.append(out_s)
            result.cpu_out_s.append(cpu_s)
            self.phase("back", NODES)
        if isinstance(self.candidate, Ours) and not self.virtual:
            result.urgent_s = self.phase("urgent", NODES - 1)[0]
        result.memory = self.candidate.memory()
        return result


def measure(count: int) -> Iterator[str]:
    """The table, line by line."""
    yield f"{count:,} EIPs × {NODES} next hops into two FRR switches' kernels:\n"
    yield HEAD
    candidates = (
        Candidate("FRR alone"),
        Ours("our speaker", "port"),
        Ours("our speaker, `nextHop: recursive`", RECURSIVE),
        Gobgp("GoBGP", "gobgpd"),
        Bird("BIRD 2", "bird"),
    )
    for candidate in candidates:
        if candidate.needs and shutil.which(candidate.needs) is None:
            package = {"bird": "bird2"}.get(candidate.needs, candidate.needs)
            yield f"| {candidate.name} | not here: `apt-get install {package}` | | | | | |"
            continue
        with tempfile.TemporaryDirectory() as directory, Bed(Path(directory)) as bed:
            found = Trial(bed, candidate, count).run()
        out = f"{statistics.median(found.out_s):.2f} s ({max(found.out_s):.2f})"
        cpu = f"{found.cpu_load_s:.1f} s | {statistics.median(found.cpu_out_s):.2f} s"
        yield (
            f"| {candidate.name} | {found.load_s:.2f} s | {out} | {cpu} "
            f"| {found.frr_load_s:.1f} s | {found.memory} |"
        )
        if found.urgent_s is not None:
            yield f"| its node out while as many EIPs load | | {found.urgent_s:.2f} s | | | | |"
