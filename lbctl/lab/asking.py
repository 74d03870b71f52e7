"""The client's side of the lab's pod server: questions over HTTP/1.1, and what the answers say."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

MAX_BODY: Final = 1 << 16


def parse_answer(text: str) -> tuple[str, str, str]:
    """`POD PEER PAYLOAD` → its three words; ("", "", "") for anything else."""
    words = text.split()
    return (words[0], words[1], words[2]) if len(words) == 3 else ("", "", "")


def take_response(buffer: bytearray) -> str | None:
    """Cut one HTTP response off the front of the buffer; its body, or None if it is incomplete.

    Raises ValueError for what is no 200 answer with a Content-Length.
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        if len(buffer) > MAX_BODY:
            raise ValueError("headers without an end")
        return None
    head = bytes(buffer[:end]).decode("latin-1").split("\r\n")
    if head[0].split(" ")[1:2] != ["200"]:
        raise ValueError(f"answer {head[0][:40]!r}")
    headers = {k.strip().lower(): v.strip() for k, _, v in (h.partition(":") for h in head[1:])}
    length = int(headers["content-length"]) if "content-length" in headers else -1
    if not 0 <= length <= MAX_BODY:
        raise ValueError("no usable Content-Length")
    if len(buffer) < end + 4 + length:
        return None
    body = bytes(buffer[end + 4 : end + 4 + length])
    del buffer[: end + 4 + length]
    return body.decode("utf-8", "replace")


def request(host: str, number: int) -> bytes:
    """The question with that number. `host`: an address, IPv6 too."""
    name = f"[{host}]" if ":" in host else host
    return f"GET /n/{number} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()


async def ask_once(socket_: socket.socket, host: str, port: int) -> str:
    """One request on a new connection of a socket that does not block; the pod's name.

    Raises OSError, ValueError, EOFError. The socket stays the caller's: he can tell its port.
    """
    loop = asyncio.get_running_loop()
    await loop.sock_connect(socket_, (host, port))
    await loop.sock_sendall(socket_, request(host, 1))
    buffer = bytearray()
    while (body := take_response(buffer)) is None:
        data = await loop.sock_recv(socket_, MAX_BODY)
        if not data:
            raise EOFError("closed without an answer")
        buffer += data
    pod, _, payload = parse_answer(body)
    if payload != "/n/1":
        raise ValueError(f"wrong answer {body[:60]!r}")
    return pod
