"""The load driver: runs inside the client, drives traffic at one target, and reports what broke.

Three kinds of load at once, against the lab's pod server (HTTP/1.1 keep-alive over TCP, echo over
UDP; both answer `POD PEER PAYLOAD`):
- flows: long-lived TCP connections; each asks for `/n/NUMBER` every interval and checks that the
  answer has that number and comes from the pod that answered first;
- probes: new connections, so many a second, one request each;
- datagrams: UDP sockets, each sending numbered datagrams every interval;
- downloads: so many at a time, one after the other (`lbctl.lab.downloads`).

Reset, closed, a wrong number, another pod, or no answer at the end: each counts as broken.

Control by lines on stdin: `mark NAME` notes an instant, `count` asks for totals so far, `stop` (or
the end of stdin, SIGINT, SIGTERM) ends it. Events go to stdout as JSON lines: `ready`, `mark`,
`count`, and at last `report`. Times are seconds of the monotonic clock, which all namespaces of a
machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, cast

from lbctl.lab import downloads
from lbctl.lab.asking import ask_once, parse_answer, request, take_response

_TICK_S: Final = 0.005
_CONNECT_AT_ONCE: Final = 50


@dataclass(slots=True)
class FlowRecord:
    """What happened to one flow. `broken` is "" or why it counts as broken. Times in seconds."""

    number: int
    local_port: int = 0
    pod: str = ""
    peer: str = ""
    sent: int = 0
    answered: int = 0
    duplicates: int = 0
    longest_gap_s: float = 0.0
    gap_at_s: float = 0.0  # when the longest gap ended
    broken: str = ""
    broken_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """What to drive. Rates per second; `timeout_s` is for one new connection with its answer."""

    host: str
    port: int
    udp_port: int
    flows: int
    interval_s: float
    probes_per_s: float
    datagrams: int
    timeout_s: float
    drain_s: float
    downloads: int = 0


@dataclass(slots=True)
class Results:
    """All that is reported."""

    flows: list[FlowRecord] = field(default_factory=list)
    datagrams: list[FlowRecord] = field(default_factory=list)
    probes: list[tuple[float, float, str, str]] = field(default_factory=list)
    received: list[tuple[float, str, int]] = field(default_factory=list)  # when, pod, bytes
    marks: list[tuple[str, float]] = field(default_factory=list)
    started_s: float = 0.0
    ended_s: float = 0.0

    def counts(self) -> dict[str, int]:
        """Totals so far."""
        flows = [*self.flows, *self.datagrams]
        return {
            "requests": len(self.probes),
            "failed": sum(1 for probe in self.probes if probe[3]),
            "answered": sum(flow.answered for flow in flows),
            "broken": sum(1 for flow in flows if flow.broken),
        }


class _Numbered:
    """Numbered questions and their answers; the part that TCP and UDP share."""

    def __init__(self, record: FlowRecord, interval_s: float) -> None:
        self.record = record
        self.interval_s = interval_s
        now = time.monotonic()
        self.last_s = now
        # spread the flows over the interval, or all would send in the same tick
        self.due_s = now + interval_s * ((record.number * 0.618) % 1.0)

    def fail(self, why: str) -> None:
        """The first reason stays."""
        if not self.record.broken:
            self.record.broken, self.record.broken_at_s = why, time.monotonic()

    def gap(self, now: float) -> None:
        """Count the time since the last answer."""
        if now - self.last_s > self.record.longest_gap_s:
            self.record.longest_gap_s, self.record.gap_at_s = now - self.last_s, now
        self.last_s = now

    def came_from(self, pod: str, peer: str) -> None:
        """The first answer says who serves this flow; no other may."""
        if not self.record.pod:
            self.record.pod, self.record.peer = pod, peer
        elif (pod, peer) != (self.record.pod, self.record.peer):
            self.fail(f"moved to {pod} (sees {peer})")


class Flow(_Numbered, asyncio.Protocol):
    """One long-lived connection: a question goes out when it is due and the last is answered."""

    def __init__(self, record: FlowRecord, interval_s: float, host: str) -> None:
        super().__init__(record, interval_s)
        self.host = host
        self.buffer = bytearray()
        self.transport: asyncio.Transport | None = None
        self.stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's call-back."""
        self.transport = cast(asyncio.Transport, transport)
        self.record.local_port = transport.get_extra_info("sockname")[1]
        self.last_s = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """asyncio's call-back."""
        self.buffer += data
        try:
            while (body := take_response(self.buffer)) is not None:
                self._answer(body)
        except ValueError as error:
            self.fail(str(error))

    def _answer(self, body: str) -> None:
        pod, peer, payload = parse_answer(body)
        record = self.record
        expected = f"/n/{record.answered + 1}"
        if record.answered >= record.sent:
            record.duplicates += 1
            self.fail(f"answer {payload} without a question")
        elif payload != expected:
            self.fail(f"answer {payload!r} instead of {expected}")
        else:
            record.answered += 1
            self.gap(time.monotonic())
            self.came_from(pod, peer)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's call-back."""
        if not self.stopping:
            self.fail(f"reset: {exc}" if exc else "closed by the other side")
        self.transport = None

    def tick(self, now: float) -> None:
        """Send the next question if it is time."""
        record = self.record
        if self.transport is None or now < self.due_s or record.sent > record.answered:
            return
        record.sent += 1
        self.due_s = max(self.due_s + self.interval_s, now)
        self.transport.write(request(self.host, record.sent))

    def end(self, asked_until_s: float) -> None:
        """Close; an open question counts as broken, silence after the last question does not."""
        self.stopping = True
        self.gap(max(asked_until_s, self.last_s))
        if self.record.sent > self.record.answered:
            self.fail("no answer")
        if self.transport:
            self.transport.abort() if self.record.broken else self.transport.close()

    @property
    def idle(self) -> bool:
        """No answer is outstanding, or none can come."""
        return self.transport is None or self.record.sent == self.record.answered


class Datagrams(_Numbered, asyncio.DatagramProtocol):
    """One UDP socket; questions go out when due, answered or not."""

    def __init__(self, record: FlowRecord, interval_s: float) -> None:
        super().__init__(record, interval_s)
        self.transport: asyncio.DatagramTransport | None = None
        self.open: set[str] = set()
        self.seen: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's call-back."""
        # asyncio's own transport is no subclass of this in Python 3.11
        self.transport = cast(asyncio.DatagramTransport, transport)
        self.record.local_port = transport.get_extra_info("sockname")[1]
        self.last_s = time.monotonic()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """asyncio's call-back."""
        pod, peer, payload = parse_answer(data.decode("utf-8", "replace"))
        if payload in self.open:
            self.open.discard(payload)
            self.seen.add(payload)
            self.record.answered += 1
            self.gap(time.monotonic())
            self.came_from(pod, peer)
        elif payload in self.seen:
            self.record.duplicates += 1

    def error_received(self, exc: Exception) -> None:
        """asyncio's call-back: an ICMP error came back."""
        self.fail(f"error: {exc}")

    def tick(self, now: float) -> None:
        """Send the next datagram if it is time."""
        if self.transport is None or now < self.due_s:
            return
        self.record.sent += 1
        self.due_s = max(self.due_s + self.interval_s, now)
        payload = f"/n/{self.record.sent}"
        self.open.add(payload)
        self.transport.sendto(payload.encode())

    def end(self, asked_until_s: float) -> None:
        """Close. Lost datagrams are `sent - answered`, not a broken flow: UDP may lose."""
        self.gap(max(asked_until_s, self.last_s))
        if self.transport:
            self.transport.close()

    @property
    def idle(self) -> bool:
        """Every datagram was answered."""
        return not self.open


class Driver:
    """Everything that runs; the records are in `results`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.results = Results()
        self.running: list[Flow | Datagrams] = []
        self.stop = asyncio.Event()

    async def run(self) -> None:
        """Open, announce that it is ready, drive until stopped, drain, report."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop.set)
        self.results.started_s = time.monotonic()
        await self._open()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._tick()), group.create_task(self._commands())]
            group.create_task(self._probe())  # ends by itself: what waits may still fail
            meter = downloads.Meter(self.results.received, self.results.probes)
            for _ in range(self.options.downloads):
                more = downloads.again_and_again(self.options.host, self.options.port, meter)
                tasks.append(group.create_task(more))
            await self.stop.wait()
            asked_until_s = time.monotonic()
            for task in tasks:
                task.cancel()
        await self._drain(asked_until_s)
        self.results.ended_s = time.monotonic()
        emit("report", **asdict(self.results))

    async def _open(self) -> None:
        gate = asyncio.Semaphore(_CONNECT_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(self.options.flows):
                group.create_task(self._open_flow(number, gate))
            for number in range(self.options.datagrams):
                group.create_task(self._open_datagrams(number))

    async def _open_flow(self, number: int, gate: asyncio.Semaphore) -> None:
        options, record = self.options, FlowRecord(number)
        self.results.flows.append(record)
        loop = asyncio.get_running_loop()
        async with gate:
            try:
                async with asyncio.timeout(options.timeout_s):
                    _, flow = await loop.create_connection(
                        lambda: Flow(record, options.interval_s, options.host),
                        options.host,
                        options.port,
                    )
            except OSError as error:  # TimeoutError is one
                record.broken = f"did not open: {error or 'timed out'}"
                return
        self.running.append(flow)

    async def _open_datagrams(self, number: int) -> None:
        options, record = self.options, FlowRecord(number)
        self.results.datagrams.append(record)
        _, sender = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: Datagrams(record, options.interval_s),
            remote_addr=(options.host, options.udp_port),
        )
        self.running.append(sender)

    async def _tick(self) -> None:
        announced = False
        while True:
            now = time.monotonic()
            for flow in self.running:
                flow.tick(now)
            announced = announced or self._announce()
            await asyncio.sleep(_TICK_S)

    def _announce(self) -> bool:
        """Say `ready` once all that opened has been answered, or cannot be any more."""
        if any(not f.record.answered and not f.record.broken for f in self.running):
            return False
        opened = sum(1 for record in self.results.flows if not record.broken)
        emit("ready", flows=opened, datagrams=len(self.results.datagrams))
        return True

    async def _commands(self) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode("utf-8", "replace").strip():
            verb, _, name = line.partition(" ")
            if verb == "mark":
                self.results.marks.append((name, time.monotonic()))
                emit("mark", name=name, at_s=self.results.marks[-1][1])
            elif verb == "count":
                emit("count", **self.results.counts())
            elif verb == "stop":
                break
        self.stop.set()

    async def _probe(self) -> None:
        if self.options.probes_per_s <= 0:
            return
        async with asyncio.TaskGroup() as group:
            due = time.monotonic()
            while not self.stop.is_set():
                group.create_task(self._probe_once())
                due += 1 / self.options.probes_per_s
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, due - time.monotonic())):
                        await self.stop.wait()

    async def _probe_once(self) -> None:
        start = time.monotonic()
        host, pod, error = self.options.host, "", ""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as asking:
            asking.setblocking(False)
            try:
                async with asyncio.timeout(self.options.timeout_s):
                    pod = await ask_once(asking, host, self.options.port)
            except TimeoutError:
                error = f"timed out from port {asking.getsockname()[1]}"
            except (OSError, ValueError, EOFError) as problem:
                error = str(problem) or type(problem).__name__
        self.results.probes.append((start, time.monotonic() - start, pod, error))

    async def _drain(self, asked_until_s: float) -> None:
        for _ in range(int(self.options.drain_s / _TICK_S)):
            if all(flow.idle for flow in self.running):
                break
            await asyncio.sleep(_TICK_S)
        for flow in self.running:
            flow.end(asked_until_s)


def emit(event: str, **values: Any) -> None:
    """One JSON line on stdout."""
    print(json.dumps({"event": event, **values}), flush=True)


def parse_arguments(argv: list[str]) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description="Drive traffic at an EIP and say what broke.")
    parser.add_argument("host", help="address of the EIP")
    parser.add_argument("port", type=int, help="TCP port")
    parser.add_argument("--udp-port", type=int, default=0, help="default: the TCP port")
    parser.add_argument("--flows", type=int, default=0, help="long-lived TCP connections")
    parser.add_argument("--interval", type=float, default=0.04, help="seconds between questions")
    parser.add_argument("--probes", type=float, default=0.0, help="new connections per second")
    parser.add_argument("--datagrams", type=int, default=0, help="UDP sockets")
    parser.add_argument("--downloads", type=int, default=0, help="at a time")
    parser.add_argument("--timeout", type=float, default=1.0, help="for a new connection, seconds")
    parser.add_argument("--drain", type=float, default=5.0, help="wait for last answers, seconds")
    a = parser.parse_args(argv)
    return Options(
        host=a.host,
        port=a.port,
        udp_port=a.udp_port or a.port,
        flows=a.flows,
        interval_s=a.interval,
        probes_per_s=a.probes,
        datagrams=a.datagrams,
        timeout_s=a.timeout,
        drain_s=a.drain,
        downloads=a.downloads,
    )


def main() -> None:
    """Command line of the module."""

    async def drive() -> None:
        await Driver(parse_arguments(sys.argv[1:])).run()

    with suppress(KeyboardInterrupt, BrokenPipeError):
        asyncio.run(drive())


if __name__ == "__main__":
    main()
