"""Speed of the way to a pod: directly, through us, and through kube-proxy alone.

A class is what happens to a packet: `direct` to the pod's address; delivered by the node that the
switch chose; carried on by that node to another one. Ratios are to `direct` in the same round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lbctl.kube import client as kube
from lbctl.lab import entries
from lbctl.lab.api import wait
from lbctl.lab.kubeproxy import Mode
from tests.lab.system.support import System

CLIENT = Path(__file__).with_name("beside_client.py")
OPENED = 96  # to each address: enough of each class, whatever the hash says
KEPT = 16
DIRECT = "direct"
Classes = dict[str, list[int]]


class Client:
    """The client's end, in the lab's client machine."""

    def __init__(self, system: System) -> None:
        self._process = system.lab.machine("client").popen(
            *(sys.executable, "-S", str(CLIENT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, op: str, **arguments: Any) -> Any:
        """One request, its answer. Raises EOFError if the client ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the client ended at {op}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait(30)


def measure(
    system: System, targets: Mapping[str, str], apps: Mapping[str, str], mode: Mode
) -> Iterator[str]:
    """Lines of Markdown. targets, apps: address and pods' label of `ours` and `theirs`."""
    client = Client(system)
    try:
        found = system.api.all(kube.PODS, "default", f"app={apps['ours']}")
        pods = [pod["status"]["podIP"] for pod in found]
        client.ask("keep", classes=_classify(system, client, targets, apps, pods))
        yield f"Through kube-proxy in {mode} mode; ratio to `direct` in brackets."
        yield ""
        yield "| what | " + " | ".join(_names()) + " |"
        yield "|---|" + "---|" * len(_names())
        yield from _flows(client)
        yield from _new(client, targets, pods)
        yield ""
    finally:
        client.close()


def _names() -> list[str]:
    return [DIRECT, "ours, here", "ours, steered", "kube-proxy, here", "kube-proxy, elsewhere"]


def _classify(
    system: System,
    client: Client,
    targets: Mapping[str, str],
    apps: Mapping[str, str],
    pods: list[str],
) -> Classes:
    """Open connections, and find by which node each went in and on which node its pod is."""
    classes: Classes = {name: [] for name in _names()}
    for pod in pods:
        classes[DIRECT] += [port for port, _ in client.ask("open", host=pod, port=8080, count=4)]
    for side, word in (("ours", "ours"), ("theirs", "kube-proxy")):
        entries.watch(system.lab, [targets[side]])
        opened = client.ask("open", host=targets[side], port=80, count=OPENED)
        entered = entries.take(system.lab)
        on = system.api.pod_nodes(apps[side])
        for port, pod in opened:
            here = entered[targets[side], port] == on[pod]
            far = "steered" if side == "ours" else "elsewhere"
            classes[f"{word}, {'here' if here else far}"].append(port)
    wait("connections of each class", lambda: all(len(p) >= KEPT for p in classes.values()), 1)
    return {name: ports[:KEPT] for name, ports in classes.items()}


def _flows(client: Client) -> Iterator[str]:
    times = client.ask("latency", rounds=3000)
    for share, what in ((0.1, "p10"), (0.5, "p50"), (0.99, "p99")):
        row = {n: sorted(v)[int(share * len(v))] for n, v in times.items()}
        added = [f"{v:.0f} µs ({v - row[DIRECT]:+.0f})" for v in row.values()]
        yield f"| request on an open connection, {what} | " + " | ".join(added) + " |"
    for kind, streams, size in (
        ("upload", 1, 48 << 20),
        ("upload", 16, 4 << 20),
        ("download", 1, 48 << 20),
        ("download", 16, 4 << 20),
    ):
        found = client.ask("transfer", kind=kind, size=size, streams=streams, rounds=7)
        yield _row(f"{kind}, {streams} stream{'s' * (streams > 1)}, MiB/s", found["rates"])
        if kind == "upload":
            again = " | ".join(str(n) for n in found["again"].values())
            yield f"| segments sent again meanwhile | {again} |"


def _new(client: Client, targets: Mapping[str, str], pods: list[str]) -> Iterator[str]:
    def places(direct: int, port: int) -> dict[str, list[tuple[str, int]]]:
        to = {name: [(address, port)] for name, address in targets.items()}
        return {DIRECT: [(pod, direct) for pod in pods], **to}

    rates = client.ask("connects", targets=places(8080, 80), seconds=0.7, rounds=7)
    costs = client.ask("datagrams", targets=places(9, 9), flows=60, each=150, rounds=7)
    for what, found in (
        ("new connections per second, one after the other", rates),
        ("CPU per packet of 64 bytes, µs", costs),
    ):
        yield _row(what, {_names()[i]: v for i, v in zip((0, 2, 4), found.values(), strict=True)})


def _row(what: str, values: Mapping[str, list[float]]) -> str:
    """Medians, and the median of each round's ratio to the direct way."""
    cells = []
    for name in _names():
        if name not in values:
            cells.append("")
            continue
        pairs = zip(values[name], values[DIRECT], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        middle = statistics.median(values[name])
        cells.append(
            f"{middle:.0f} ({ratio:.2f})" if middle >= 100 else f"{middle:.2f} ({ratio:.2f})"
        )
    return f"| {what} | " + " | ".join(cells) + " |"
