"""Runs in the lab's client: connections of several classes, measured in turns.

One JSON request a line on stdin, one answer on stdout. Every round goes through all classes, so
that whatever else the machine does meets all of them alike. Standard library only.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

_RETRANSMITTED = 100  # offset of tcpi_total_retrans in struct tcp_info (include/uapi/linux/tcp.h)
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: end with RST, so that nothing stays in TIME_WAIT
Target = list[Any]  # host, port


class Connection:
    """One keep-alive connection to a pod server."""

    def __init__(self, host: str, port: int) -> None:
        self.sock = socket.create_connection((host, port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb", buffering=1 << 16)
        self.port = self.sock.getsockname()[1]
        self.pod = self.ask().split()[0].decode()

    def ask(self) -> bytes:
        """One small request."""
        self.sock.sendall(b"GET /n/1 HTTP/1.1\r\nHost: x\r\n\r\n")
        return self.answer()

    def answer(self) -> bytes:
        """The body of the next answer."""
        length = 0
        while (line := self.file.readline()) != b"\r\n":
            if not line:
                raise EOFError("closed")
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return bytes(self.file.read(length))

    def upload(self, size: int) -> None:
        """Send that many bytes; the pod answers the second request when it has read them all."""
        self.sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        piece = memoryview(bytes(1 << 18))
        while size:
            size -= self.sock.send(piece[: min(size, len(piece))])
        self.answer()
        self.ask()

    def download(self, size: int) -> None:
        """Fetch that many bytes."""
        self.sock.sendall(b"GET /bytes/%d HTTP/1.1\r\nHost: x\r\n\r\n" % size)
        self.answer()

    def retransmitted(self) -> int:
        """Segments that this end has sent again."""
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return int(struct.unpack_from("I", info, _RETRANSMITTED)[0])


class Client:
    """What can be asked for; each method is an `op`."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.classes: dict[str, list[Connection]] = {}

    def open(self, host: str, port: int, count: int) -> list[tuple[int, str]]:
        """Open connections; source port and pod of each."""
        new = [Connection(host, port) for _ in range(count)]
        self.opened += new
        return [(c.port, c.pod) for c in new]

    def keep(self, classes: dict[str, list[int]]) -> None:
        """Sort by source port into classes, close the others."""
        by_port = {c.port: c for c in self.opened}
        self.classes = {name: [by_port[p] for p in ports] for name, ports in classes.items()}
        kept = {p for ports in classes.values() for p in ports}
        for port, connection in by_port.items():
            if port not in kept:
                connection.sock.close()

    def latency(self, rounds: int) -> dict[str, list[float]]:
        """Microseconds of each request, one class after the other."""
        found: dict[str, list[float]] = {name: [] for name in self.classes}
        for number in range(rounds):
            for name, connections in self.classes.items():
                connection = connections[number % len(connections)]
                begin = time.perf_counter_ns()
                connection.ask()
                found[name].append((time.perf_counter_ns() - begin) / 1000)
        return found

    def transfer(self, kind: str, size: int, streams: int, rounds: int) -> dict[str, Any]:
        """MiB per second of each round, and segments sent again, `size` bytes on each stream."""
        rates: dict[str, list[float]] = {name: [] for name in self.classes}
        again = dict.fromkeys(self.classes, 0)
        for number in range(rounds):
            for name, connections in self.classes.items():
                used = [connections[(number + i) % len(connections)] for i in range(streams)]
                before = sum(c.retransmitted() for c in used)
                begin = time.perf_counter()
                _together([lambda c=c: getattr(c, kind)(size) for c in used])  # type: ignore[misc]
                took_s = time.perf_counter() - begin
                rates[name].append(streams * size / took_s / 2**20)
                again[name] += sum(c.retransmitted() for c in used) - before
        return {"rates": rates, "again": again}

    def connects(
        self, targets: dict[str, list[Target]], seconds: float, rounds: int
    ) -> dict[str, list[float]]:
        """New connections with one request per second, one at a time."""
        rates: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, places in targets.items():
                count, begin = 0, time.perf_counter()
                while (now := time.perf_counter()) < begin + seconds:
                    _visit(*places[count % len(places)])
                    count += 1
                rates[name].append(count / (now - begin))
        return rates

    def datagrams(
        self, targets: dict[str, list[Target]], flows: int, each: int, rounds: int
    ) -> dict[str, list[float]]:
        """CPU microseconds of one datagram on its whole way to the pod.

        The veths of the lab carry a packet on in the sender's own context, so all that switches and
        nodes do with it is in this process's CPU time.
        """
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(flows)]
        costs: dict[str, list[float]] = {name: [] for name in targets}
        for number in range(rounds + 1):
            for name, places in targets.items():
                begin = time.process_time()
                for index, sock in enumerate(sockets):
                    place = tuple(places[index % len(places)])
                    for _ in range(each):
                        sock.sendto(b"x" * 64, place)
                if number:  # the first round makes the conntrack entries
                    costs[name].append((time.process_time() - begin) * 1e6 / flows / each)
        return costs


def _visit(host: str, port: int) -> None:
    connection = Connection(host, port)
    connection.file.close()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    connection.sock.close()


def _together(work: list[Callable[[], None]]) -> None:
    threads = [Thread(target=each) for each in work[1:]]
    for thread in threads:
        thread.start()
    work[0]()
    for thread in threads:
        thread.join()


def main() -> None:
    """Serve requests until stdin ends."""
    client = Client()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(client, request.pop("op"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
