"""The host's handle on the load driver (`lbctl.lab.traffic`) that runs inside a machine.

`Load.start` returns when every flow is open and has been answered once; `stop` returns the
report. The driver dies with whoever started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lbctl.errors import LabError
from lbctl.lab.machine import Machine
from lbctl.lab.processes import readable
from lbctl.lab.traffic import FlowRecord

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Probe:
    """One new connection with one request: when it began, how long it took, who answered."""

    start_s: float
    took_s: float
    pod: str
    error: str


@dataclass(frozen=True, slots=True)
class Count:
    """Totals so far: new connections and those that failed, answers on flows, broken flows."""

    requests: int = 0
    failed: int = 0
    answered: int = 0
    broken: int = 0

    def values(self) -> tuple[int, int, int, int]:
        """In the order of the fields."""
        return self.requests, self.failed, self.answered, self.broken


@dataclass(frozen=True, slots=True)
class Report:
    """What the driver saw. Instants are on the monotonic clock (`time.monotonic()` here too)."""

    flows: tuple[FlowRecord, ...]
    datagrams: tuple[FlowRecord, ...]
    probes: tuple[Probe, ...]
    marks: dict[str, float]
    started_s: float
    ended_s: float
    received: tuple[tuple[float, str, int], ...] = ()  # when, pod, bytes

    def broken(self) -> tuple[FlowRecord, ...]:
        """The flows that count as broken."""
        return tuple(flow for flow in self.flows if flow.broken)

    def pods(self) -> dict[str, int]:
        """How many flows each pod serves, by name."""
        return dict(sorted(Counter(flow.pod for flow in self.flows if flow.pod).items()))

    def longest_gap_s(self) -> float:
        """The longest silence that any unbroken flow saw."""
        return max((flow.longest_gap_s for flow in self.flows if not flow.broken), default=0.0)

    def failed_probes(self) -> tuple[Probe, ...]:
        """New connections that got no answer in time."""
        return tuple(probe for probe in self.probes if probe.error)

    def outage_s(self, mark: str) -> float:
        """From a mark to the start of the last new connection that failed after it; 0 if none."""
        at = self.marks[mark]
        return max((p.start_s - at for p in self.failed_probes() if p.start_s >= at), default=0.0)


def parse_report(data: dict[str, Any]) -> Report:
    """The driver's `report` event."""
    return Report(
        flows=tuple(sorted((FlowRecord(**f) for f in data["flows"]), key=lambda f: f.number)),
        datagrams=tuple(FlowRecord(**f) for f in data["datagrams"]),
        probes=tuple(sorted((Probe(*p) for p in data["probes"]), key=lambda p: p.start_s)),
        marks=dict(data["marks"]),
        started_s=data["started_s"],
        ended_s=data["ended_s"],
        received=tuple((at_s, pod, size) for at_s, pod, size in data["received"]),
    )


def spawn(
    machine: Machine, module: str, *arguments: str, core: int | None = None
) -> subprocess.Popen[bytes]:
    """A module of ours inside a machine, its standard input and output in our hands.

    core: the processor that it runs on, and with it the kernel's work for what it sends.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    pinned = () if core is None else ("taskset", "--cpu-list", str(core))
    return machine.popen(
        *(*pinned, sys.executable, "-m", module, *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


class Load:
    """A running driver. A context manager: leaving it ends the driver if `stop` has not."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(
        cls,
        client: Machine,
        host: str,
        port: int,
        *,
        flows: int = 0,
        probes_per_s: float = 0.0,
        datagrams: int = 0,
        udp_port: int = 0,
        interval_s: float = 0.04,
        timeout_s: float = 1.0,
        drain_s: float = 5.0,
        ready_s: float = 60.0,
        downloads: int = 0,
        core: int | None = None,
    ) -> Load:
        """Start driving from a machine. Raises LabError if not everything opens within ready_s."""
        options = {
            "--flows": flows,
            "--probes": probes_per_s,
            "--datagrams": datagrams,
            "--udp-port": udp_port,
            "--interval": interval_s,
            "--timeout": timeout_s,
            "--drain": drain_s,
            "--downloads": downloads,
        }
        flat = [str(word) for pair in options.items() for word in pair]
        load = cls(spawn(client, "lbctl.lab.traffic", host, str(port), *flat, core=core))
        try:
            ready = load._expect("ready", ready_s)
            if ready["flows"] != flows:
                raise LabError(f"only {ready['flows']} of {flows} connections to {host} opened")
        except BaseException:
            load.close()
            raise
        return load

    def mark(self, name: str) -> float:
        """Note this instant under a name; returns it."""
        self._say(f"mark {name}")
        return float(self._expect("mark", 30.0)["at_s"])

    def count(self) -> Count:
        """What the driver has seen so far."""
        self._say("count")
        found = self._expect("count", 30.0)
        return Count(found["requests"], found["failed"], found["answered"], found["broken"])

    def stop(self, limit_s: float = 120.0) -> Report:
        """End the load and return what it saw. Raises LabError if the driver died."""
        self._say("stop")
        try:
            return parse_report(self._expect("report", limit_s))
        finally:
            self.close()

    def close(self) -> None:
        """End the driver, without a report. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except OSError as error:
            raise LabError(f"the load driver is gone: {error}") from error

    def _expect(self, event: str, limit_s: float) -> dict[str, Any]:
        """The next event of that kind; the driver says each at most once per question."""
        stdout: IO[bytes] | None = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + limit_s
        # the report is one long line: readline waits for its end, which the driver writes at once
        while readable(stdout.fileno(), max(0.0, deadline - time.monotonic())):
            line = stdout.readline()
            if not line:
                raise LabError(f"the load driver ended before it said {event!r}")
            data: dict[str, Any] = json.loads(line)
            if data["event"] == event:
                return data
        raise LabError(f"the load driver did not say {event!r} within {limit_s:g} s")
