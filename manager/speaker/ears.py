"""The ears of the speaker container: does another manager announce, now?

Other managers send their heartbeats here too (UDP, `names.SPEAKER_PEER_PORT`), authenticated with
the managers' key, which this container has from its own manager. Replayed ones do not count.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Final

import structlog

from lbctl.core import probe
from lbctl.core.keys import KeyRing
from lbctl.errors import MessageError, SpeakerError

log = structlog.get_logger()

FRESH_S: Final = 1.0  # heartbeats come every 100 ms
# A manager that starts again after its clock was set back is heard after this (as by its peers).
FORGET_S: Final = 60.0


class Ears(asyncio.DatagramProtocol):
    """Remembers when each manager was last heard to announce."""

    def __init__(
        self,
        port: int,
        ring: Callable[[], KeyRing | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port, self._ring, self._clock = port, ring, clock
        # Of each manager's newest: when it came, its place in their order, whether it announces.
        self._newest: dict[str, tuple[float, tuple[int, int], bool]] = {}
        self._transport: asyncio.BaseTransport | None = None

    async def start(self) -> None:
        """Listen on all addresses; SpeakerError if the port is taken."""
        try:
            found = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            anywhere = "::"
        except OSError:  # a kernel without IPv6
            found, anywhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "0.0.0.0"
        try:
            found.bind((anywhere, self._port))
        except OSError as error:
            found.close()
            raise SpeakerError(f"UDP port {self._port} cannot be used: {error.strerror}") from error
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=found)

    def close(self) -> None:
        """Stop listening."""
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[object, ...]) -> None:
        """One datagram, from anybody."""
        ring = self._ring()
        if ring is None:
            return
        try:
            beat = probe.decode_heartbeat(data, ring)
        except MessageError as error:
            log.debug("heartbeat_refused", source=str(addr[0]), error=str(error))
            return
        now_s, at = self._clock(), (beat.boot, beat.sequence)
        heard_s, newest, _ = self._newest.get(beat.manager, (now_s, (-1, -1), False))
        if at <= newest and now_s - heard_s <= FORGET_S:
            return
        self._newest[beat.manager] = now_s, at, beat.announcing

    def other_announces(self, own: str, now: float) -> bool:
        """Whether a manager other than `own` was heard to announce in the last second."""
        return any(
            announces and now - heard_s <= FRESH_S
            for name, (heard_s, _, announces) in self._newest.items()
            if name != own
        )
