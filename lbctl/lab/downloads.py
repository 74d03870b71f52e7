"""Downloads from the lab's pods, and how many bytes of them arrived when, and from whom.

Rules: a connection is used for a time, not for so many bytes: of N at a time over k nodes each node
has about N / k, whatever it carries. With one that ends with its bytes, those that are slow pile up
at one node while another one is idle (a closed queueing network).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from lbctl.lab.asking import MAX_BODY, parse_answer, request, take_response

SIZE: Final = 1 << 16  # bytes that are asked for at once
LASTS_S: Final = 2.0  # before the next connection, which may come to another node
BIN_S: Final = 0.5
_STALLED_S: Final = 20.0  # many at a narrow link: TCP backs off for 13 s after five losses


@dataclass(slots=True)
class Meter:
    """Counts. received: (beginning of a bin, pod, bytes), by time; failed: as probes are noted."""

    received: list[tuple[float, str, int]]
    failed: list[tuple[float, float, str, str]]

    def count(self, pod: str, size: int) -> None:
        """So many bytes came from a pod just now."""
        begin_s = time.monotonic() // BIN_S * BIN_S
        for at in range(len(self.received) - 1, -1, -1):
            other_s, other, so_far = self.received[at]
            if other_s < begin_s:
                break
            if other == pod:
                self.received[at] = (begin_s, pod, so_far + size)
                return
        self.received.append((begin_s, pod, size))


async def again_and_again(host: str, port: int, meter: Meter) -> None:
    """Download on one connection after the other, until cancelled."""
    while True:
        start_s = time.monotonic()
        try:
            await _download(host, port, meter)
        except (OSError, ValueError, EOFError) as error:  # TimeoutError is an OSError
            why = f"download: {str(error) or type(error).__name__}"
            meter.failed.append((start_s, time.monotonic() - start_s, "", why))
            await asyncio.sleep(BIN_S)


async def _download(host: str, port: int, meter: Meter) -> None:
    """On one connection: who answers is asked first. Raises OSError, ValueError, EOFError."""
    async with asyncio.timeout(_STALLED_S):
        reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request(host, 1))
        buffer = bytearray()
        while (body := take_response(buffer)) is None:
            buffer += await _read(reader, MAX_BODY)
        pod, _, _ = parse_answer(body)
        until_s, head = time.monotonic() + LASTS_S, b""
        while time.monotonic() < until_s and b"Connection: close" not in head:
            writer.write(f"GET /bytes/{SIZE} HTTP/1.1\r\n\r\n".encode())
            async with asyncio.timeout(_STALLED_S):
                head = await reader.readuntil(b"\r\n\r\n")
            left = SIZE
            while left > 0:
                data = await _read(reader, left)
                meter.count(pod, len(data))
                left -= len(data)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, most: int) -> bytes:
    async with asyncio.timeout(_STALLED_S):
        data = await reader.read(most)
    if not data:
        raise EOFError("closed before its end")
    return data
