"""What runs in the lab's pods: a small server that says who it is and whom it saw.

TCP: HTTP/1.1 with keep-alive and Content-Length, any method; the body is `POD PEER PATH`, or N
bytes for `/bytes/N`. UDP: an echo, `POD PEER PAYLOAD`. On SIGTERM it takes what waits in the
backlog, stops accepting, answers open connections with `Connection: close`, and ends when none is
left; the kubelet's SIGKILL ends the wait.

Rules: standard library only; one process, one thread; it is forked, not executed, so it must not
rely on anything that its parent has open.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypedDict, cast

_MAX_HEAD: Final = 64 * 1024
_MAX_BYTES: Final = 1 << 30
_CHUNK: Final = b"x" * 65536


class Port(TypedDict):
    """One port to serve. `protocol` is TCP or UDP."""

    port: int
    protocol: str


class Listening:
    """The sockets of a pod, bound before the pod counts as started."""

    def __init__(self, ports: Sequence[Port]) -> None:
        """Bind every port, both families where the kernel has IPv6. Raises OSError."""
        self.tcp: list[socket.socket] = []
        self.udp: list[socket.socket] = []
        for port in ports:
            for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                if port["protocol"] == "TCP":
                    kind, group = socket.SOCK_STREAM, self.tcp
                elif port["protocol"] == "UDP":
                    kind, group = socket.SOCK_DGRAM, self.udp
                else:
                    continue
                try:
                    group.append(_bind(family, kind, any_address, port["port"]))
                except OSError:
                    if family == socket.AF_INET:
                        raise


def _bind(family: int, kind: int, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(4096)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


class _Http(asyncio.Protocol):
    """One connection. Requests are answered in order; their bodies are read and dropped."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = b""
        self._skip = 0
        self._todo = 0  # bytes of a large answer that are still to be written
        self._paused = False
        self._last = False
        self._transport: asyncio.Transport | None = None
        self._peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if peer else "-"
        self._server.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.left()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._pump()

    def _pump(self) -> None:
        """Write what is owed, then answer the requests that are wholly there."""
        while self._transport is not None and not self._paused:
            if self._todo:
                piece = _CHUNK[: min(self._todo, len(_CHUNK))]
                self._todo -= len(piece)
                self._transport.write(piece)
            elif self._last:
                self._transport.close()
                return
            elif self._skip and self._buffer:
                dropped = min(self._skip, len(self._buffer))
                self._buffer = self._buffer[dropped:]
                self._skip -= dropped
            elif self._skip or not self._request():
                return

    def _request(self) -> bool:
        """Answer one request if its head is there. False: more bytes are needed, or it is over."""
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            if len(self._buffer) > _MAX_HEAD:
                self._answer(b"431 Request Header Fields Too Large", "GET", b"", close=True)
            return False
        self._buffer = rest
        lines = head.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            self._answer(b"400 Bad Request", "GET", b"", close=True)
            return True
        fields = {key.strip().lower(): value.strip() for key, _, value in map(_split, lines[1:])}
        length = fields.get("content-length", "0")
        wanted = fields.get("connection", "").lower()
        close = wanted == "close" or (words[2] == "HTTP/1.0" and wanted != "keep-alive")
        if "transfer-encoding" in fields or not length.isdecimal():
            length, close = "0", True
        self._skip = int(length)
        if fields.get("expect", "").lower() == "100-continue" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._serve(words[0], words[1], close)
        return True

    def _serve(self, method: str, path: str, close: bool) -> None:
        number = path.removeprefix("/bytes/")
        if number != path and number.isdecimal() and int(number) <= _MAX_BYTES:
            self._answer(b"200 OK", method, None, close, int(number))
        else:
            body = f"{self._server.name} {self._peer} {path}\n".encode("latin-1")
            self._answer(b"200 OK", method, body, close)

    def _answer(
        self, status: bytes, method: str, body: bytes | None, close: bool, size: int = 0
    ) -> None:
        if self._transport is None:
            return
        self._last = close or self._server.ending
        length = size if body is None else len(body)
        kind = b"application/octet-stream" if body is None else b"text/plain"
        head = (
            b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n"
            % (
                status,
                kind,
                length,
                b"close" if self._last else b"keep-alive",
            )
        )
        self._todo = size if body is None and method != "HEAD" else 0
        self._transport.write(head + (body or b"" if method != "HEAD" else b""))
        if self._last and not self._todo:
            self._transport.close()


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")


class _Echo(asyncio.DatagramProtocol):
    """UDP: POD PEER PAYLOAD."""

    def __init__(self, name: str) -> None:
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a cast: before Python 3.13 asyncio's own class is no DatagramTransport
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(f"{self._name} {addr[0]} ".encode() + data, addr)


class Server:
    """Serves `listening` as pod `name` until told to end.

    From SIGTERM on it refuses what nodes still send it; the manifest's preStop is for that.
    """

    def __init__(self, name: str, listening: Listening) -> None:
        self.name = name
        self.connections = 0
        self.ending = False
        self._listening = listening
        self._over = asyncio.Event()
        self._accepting: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Serve; returns after SIGTERM once the last connection is closed."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.end)
        for sock in self._listening.tcp:
            loop.add_reader(sock, self._accept, sock)
        for sock in self._listening.udp:
            await loop.create_datagram_endpoint(lambda: _Echo(self.name), sock=sock)
        await self._over.wait()

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # the backlog is empty, or a peer gave up while it waited there
                return
            sock.setblocking(False)
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made: Callable[[], _Http] = lambda: _Http(self)  # noqa: E731 - typed for mypy
            task = asyncio.ensure_future(loop.connect_accepted_socket(made, sock))
            self._accepting.add(task)
            task.add_done_callback(self._accepted)

    def _accepted(self, task: asyncio.Task[object]) -> None:
        self._accepting.discard(task)
        task.exception()
        self._end_if_idle()

    def left(self) -> None:
        """A connection is gone."""
        self.connections -= 1
        self._end_if_idle()

    def end(self) -> None:
        """Stop accepting; end when every open connection has had its answer."""
        if self.ending:
            return
        self.ending = True
        for sock in self._listening.tcp:
            self._accept(sock)
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self.ending and not self.connections and not self._accepting:
            self._over.set()


def serve(name: str, listening: Listening) -> None:
    """Run the server in this process. Returns at the graceful end."""

    async def run() -> None:
        await Server(name, listening).run()

    asyncio.run(run())
