"""Manager ↔ manager: heartbeats out, heartbeats in, who is alive and what they call gone.

Rules: a heartbeat every BEAT_S to both ports of every other manager, and at once when our judgement
changes (`poke`), so that a dead node is confirmed without waiting. A manager is alive while heard
within ALIVE_S. (boot, sequence) must rise, so a replayed heartbeat is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import structlog

from lbctl.core import names
from lbctl.core.health import PeerView
from lbctl.core.keys import Keys
from lbctl.core.model import Address
from lbctl.core.probe import Heartbeat, decode_heartbeat, encode_heartbeat
from lbctl.errors import LbctlError, MessageError
from lbctl.udp import UdpSocket

BEAT_S: Final = 0.1
ALIVE_S: Final = 1.0
FORGET_S: Final = 60.0  # as the agents do (core/downset)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What this manager tells the others. `gone`: hashes of the nodes it calls Suspect or Down."""

    judging: bool = False
    announcing: bool = False
    seen: int = 0
    gone: frozenset[int] = frozenset()


class Peers:
    """The other managers.

    manager_id, boot: this one's name and start (time_ns: it rises). addresses: returns where the
    other managers are; our own address may be among them. outlook: returns what to tell.
    on_change: called when somebody appears, goes or says something new.
    """

    def __init__(
        self,
        keys: Keys,
        manager_id: str,
        boot: int,
        addresses: Callable[[], Iterable[Address]],
        outlook: Callable[[], Outlook],
        on_change: Callable[[], None],
        ports: tuple[int, ...] = (names.MANAGER_PEER_PORT, names.SPEAKER_PEER_PORT),
    ) -> None:
        self.sent = 0
        self.refused = 0
        self._ring = keys.managers()
        self._id = manager_id
        self._boot = boot
        self._sequence = 0
        self._addresses = addresses
        self._outlook = outlook
        self._on_change = on_change
        self._ports = ports
        self._heard: dict[str, tuple[float, Heartbeat]] = {}
        self._views: tuple[PeerView, ...] = ()
        self._socket: UdpSocket | None = None

    @property
    def port(self) -> int:
        """The UDP port that others send to, 0 before `run` has opened it."""
        return self._socket.port if self._socket else 0

    def set_keys(self, keys: Keys) -> None:
        """Use these keys from now on."""
        self._ring = keys.managers()

    def alive(self) -> tuple[PeerView, ...]:
        """Return the other managers heard within the last second, by id."""
        self._refresh()
        return self._views

    def announcing(self) -> bool:
        """Return whether another living manager is announcing: then this one may say goodbye."""
        return any(view.announcing for view in self.alive())

    def managers(self) -> tuple[str, ...]:
        """Return the ids of all living managers, this one's included, sorted."""
        return tuple(sorted({self._id, *(view.manager for view in self.alive())}))

    def poke(self) -> None:
        """Tell the others now: our judgement has changed."""
        if self._socket is None:
            return
        outlook = self._outlook()
        self._sequence += 1
        beat = Heartbeat(
            self._id,
            self._boot,
            self._sequence,
            outlook.judging,
            outlook.announcing,
            outlook.seen,
            len(outlook.gone),
            outlook.gone,
        )
        data = encode_heartbeat(beat, self._ring.signing)
        for address in self._addresses():
            for port in self._ports:
                self.sent += self._socket.send(data, self._socket.target(address, port))

    async def run(self, host: str = "", port: int = names.MANAGER_PEER_PORT) -> None:
        """Send and receive until cancelled; raises LbctlError if the port cannot be had."""
        try:
            udp = UdpSocket(host, port)
        except OSError as error:
            raise LbctlError(f"UDP port {port} cannot be had: {error}") from error
        loop = asyncio.get_running_loop()
        self._socket = udp
        loop.add_reader(udp.socket, self._receive)
        try:
            while True:
                self.poke()
                self._refresh()
                await asyncio.sleep(BEAT_S)
        finally:
            loop.remove_reader(udp.socket)
            self._socket = None
            udp.close()

    def _receive(self) -> None:
        if self._socket is None:
            return
        for data, _ in self._socket.receive():
            try:
                beat = decode_heartbeat(data, self._ring)
            except MessageError:
                self.refused += 1
                continue
            known = self._heard.get(beat.manager)
            rises = known is None or (beat.boot, beat.sequence) > (known[1].boot, known[1].sequence)
            if beat.manager != self._id and rises:
                self._heard[beat.manager] = (time.monotonic(), beat)
        self._refresh()

    def _refresh(self) -> None:
        """Work out who is alive now; tell if that or what they say has changed."""
        now_s = time.monotonic()
        for manager in [m for m, (at_s, _) in self._heard.items() if now_s - at_s > FORGET_S]:
            del self._heard[manager]
        views = tuple(
            _view(manager, beat)
            for manager, (at_s, beat) in sorted(self._heard.items())
            if now_s - at_s <= ALIVE_S
        )
        if views == self._views:
            return
        old, self._views = {view.manager for view in self._views}, views
        new = {view.manager for view in views}
        if old != new:
            _log.info("managers_changed", appeared=sorted(new - old), gone=sorted(old - new))
        self._on_change()


def _view(manager: str, beat: Heartbeat) -> PeerView:
    whole = beat.gone_count <= len(beat.gone)
    return PeerView(manager, beat.judging, beat.announcing, beat.seen, beat.gone, whole)
