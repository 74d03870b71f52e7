"""Has routes announced, as told on its standard input. `… announce_driver KIND COUNT TARGET`.

KIND `port`: through our speaker's port, TARGET is the speaker's directory; `recursive`: the
same, all EIPs with one virtual next hop. KIND `feed`: by a BGP
session for each node to the daemon at TARGET. KIND `direct`: prepared UPDATEs of all nodes, with
ADD-PATH, to each switch of TARGET (`ADDRESS,ADDRESS`). Prints `up` when it takes commands.
Commands: `load`, `out` (node 3 out of all), `back`, `urgent` (as many EIPs more, and 50 ms later
node 3 out of the first); each answered by the monotonic time at which it began.
"""

from __future__ import annotations

import asyncio
import gc
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any, Final

import structlog

from lbctl.core.announce import Paths
from lbctl.core.model import host_route
from lbctl.core.pmap import PMap
from lbctl.core.virtual import Levels, VirtualHop
from manager.speaker.outbox import MARKER, Group, Outbox
from manager.speaker.port import ExabgpSpeaker
from tests.lab.speaker_bed import ASN, path, peer
from tests.routes import by_prefix

from .announce_bed import FEEDERS, NODES, OTHER

LOST: Final = 3
AFTER_S: Final = 0.05
FAMILY: Final = (1, 1)
OPEN, KEEPALIVE = 1, 4
HOLD_S: Final = 90

Wanted = dict[str, Paths]
Do = Callable[[str], Awaitable[None]]


async def follow(do: Do) -> None:
    """Obey standard input until it ends."""
    loop = asyncio.get_running_loop()
    print("up", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(time.monotonic(), flush=True)
        await do(line.strip())


# through the port


def without(paths: Paths) -> Paths:
    """The same, node LOST out of all."""
    name = f"node-{LOST}"
    left = {some: frozenset(p for p in some if p.node != name) for some in set(paths.values())}
    return paths.updated({prefix: left[some] for prefix, some in paths.items()})


def direct(count: int) -> Wanted:
    """What is wanted, each EIP with a path for each node."""
    full = by_prefix(path(eip, node) for eip in range(count) for node in range(NODES))
    second = (path(eip + count, node) for eip in range(count) for node in range(NODES))
    more = full.updated(by_prefix(second))
    less = without(full)
    wanted = {"load": full, "out": less, "back": full, "more": more}
    return wanted | {"urgent": more.updated(less)}


def levels(count: int) -> Wanted:
    """What is wanted with one virtual next hop."""
    at, group = ip_address("100.64.0.1"), frozenset(f"node-{node}" for node in range(NODES))
    paths = by_prefix(path(0, node) for node in range(NODES))[path(0, 0).prefix]
    hop = VirtualHop(at, group, paths)
    eips = [path(eip, 0).prefix.network_address for eip in range(count)]
    full = PMap(Levels().routes((eip, paths, hop) for eip in eips))
    less = full.updated(without(PMap({host_route(at): paths})))
    return {"load": full, "out": less, "back": full}


async def port(wanted: Wanted, directory: str) -> None:
    """Drive our speaker."""
    peers = [peer("a"), peer("b", address=OTHER)]
    gc.collect()
    gc.set_threshold(50_000, 50, 100)  # as manager/main.py has it

    async def do(what: str) -> None:
        if what == "urgent":
            speaker.set(peers, wanted["more"])
            await asyncio.sleep(AFTER_S)
        speaker.set(peers, wanted[what])

    async with ExabgpSpeaker(FilePath(directory), "bench") as speaker:
        speaker.set(peers, PMap())
        await follow(do)


# as a neighbour


class Feeder:
    """One BGP session that announces some nodes' routes."""

    def __init__(self, nodes: range, count: int, internal: bool) -> None:
        self.nodes, self.internal = nodes, internal
        self.prefixes = [str(path(eip, 0).prefix) for eip in range(count)]
        self.groups = {node: self._group(node) for node in nodes}
        self.up = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None

    def _group(self, node: int) -> Group:
        hop = path(0, node).next_hop.packed
        shared = bytes.fromhex("40010100 400200" if self.internal else "40010100 4002060201")
        shared += b"" if self.internal else struct.pack("!I", ASN)
        shared += b"\x40\x03\x04" + hop
        shared += bytes.fromhex("40050400000064") if self.internal else b""
        number = b"" if self.internal else struct.pack("!I", node + 1)
        return Group(FAMILY, number, hop, SimpleNamespace(pack=lambda _: shared))

    async def run(self, target: str, source: str, identifier: int) -> None:
        """Dial, and speak BGP until the end."""
        address = None if not source else (source, 0)
        reader, self.writer = await asyncio.open_connection(target, 179, local_addr=address)
        add_path = b"" if self.internal else bytes.fromhex("450400010102")
        agreed = bytes.fromhex("010400010001 4104") + struct.pack("!I", ASN) + add_path
        body = struct.pack("!BHHI", 4, ASN, HOLD_S, identifier)
        options = struct.pack("!BB", 2, len(agreed)) + agreed
        self._send(OPEN, body + bytes((len(options),)) + options)
        alive = asyncio.create_task(self._alive())
        while header := await reader.readexactly(19):
            length, kind = struct.unpack("!HB", header[16:])
            await reader.readexactly(length - 19)
            if kind == OPEN:
                self._send(KEEPALIVE, b"")
            elif kind == KEEPALIVE:
                self.up.set()
        await alive

    async def _alive(self) -> None:
        while True:
            await asyncio.sleep(HOLD_S / 3)
            self._send(KEEPALIVE, b"")

    def _send(self, kind: int, body: bytes) -> None:
        assert self.writer is not None
        self.writer.write(MARKER + struct.pack("!HB", 19 + len(body), kind) + body)

    def messages(self, nodes: range, announce: bool) -> bytes:
        """The UPDATEs that announce or withdraw all prefixes over those of the nodes it has."""
        box = Outbox(True, [FAMILY])
        for node in sorted(set(nodes) & set(self.nodes)):
            group = self.groups[node]
            change = box.announce if announce else box.withdraw
            change(group, [group.route(prefix) for prefix in self.prefixes])
        add_path = SimpleNamespace(send=lambda *_: not self.internal)
        session = SimpleNamespace(families=[FAMILY], addpath=add_path, msg_size=4096)
        return b"".join(m for section in box.updates(True) for m in section.messages(session))


async def feed(feeders: list[Feeder], runs: list[Any]) -> None:
    """Drive the feeders."""
    lost = range(LOST, LOST + 1)
    ready = {
        "load": [one.messages(range(NODES), True) for one in feeders],
        "out": [one.messages(lost, False) for one in feeders],
        "back": [one.messages(lost, True) for one in feeders],
    }

    async def do(what: str) -> None:
        for one, data in zip(feeders, ready[what], strict=True):
            assert one.writer is not None
            one.writer.write(data)

    async with asyncio.TaskGroup() as tasks:
        for run in runs:
            tasks.create_task(run)
        await asyncio.gather(*(one.up.wait() for one in feeders))
        await follow(do)
        raise SystemExit


async def main() -> None:
    """As the module says."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    kind, count, target = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if kind in ("port", "recursive"):
        await port(direct(count) if kind == "port" else levels(count), target)
    elif kind == "feed":
        feeders = [Feeder(range(node, node + 1), count, True) for node in range(NODES)]
        runs = [one.run(target, FEEDERS[n], 10 + n) for n, one in enumerate(feeders)]
        await feed(feeders, runs)
    else:
        targets = target.split(",")
        feeders = [Feeder(range(NODES), count, False) for _ in targets]
        await feed(feeders, [one.run(t, "", 9) for one, t in zip(feeders, targets, strict=True)])


if __name__ == "__main__":
    asyncio.run(main())
