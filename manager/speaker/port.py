"""The manager's port to the speaker container: whole desired state in, sessions out.

Usage (manager/main.py):

    speaker = ExabgpSpeaker(
        directory=Path(names.SPEAKER_SOCKET_DIR),  # where the speaker container listens
        manager_id="control-1",                    # this manager's id, as in its heartbeats
        ring=keys.managers(),                      # lbctl.core.keys, for its ears; or None
        on_change=callback,                        # called without arguments, in the loop, when
    )                                              # sessions or settledness change; must not block
    async with speaker:                            # or: tg.create_task(speaker.run())
        number = speaker.set(peers, paths)         # never blocks; coalesces; any number of times
        await speaker.settled(number)              # every established session has it on the wire
        speaker.is_settled(number)                 # the same, now
        speaker.sessions()                         # tuple[Session, ...], sorted by peer name
        speaker.problems()                         # dict: peer name -> why it cannot be spoken to
        speaker.connected                          # whether the speaker container is there
        speaker.ping(others=True)                  # at least every 0.5 s, from the loop that judges
        speaker.set_ring(ring)                     # after a rotation, or once the Secret is read

`ping(others=…)` is the proof that this manager *works*: call it from the manager's main loop, not
from a task of its own. `others` says whether another manager replica is known to announce; the
speaker then ends its sessions with Cease on SIGTERM. Without pings (or anything else from here) for
2 s, and with another manager heard to announce, the speaker closes its sessions; the next ping
opens them again, and everything is replayed.

Before the first `set` nothing is changed: call it once the desired state is really known (caches
synced), for what is not in it is withdrawn. `paths` is a `PMap` from prefix to its frozenset of
paths, made by `updated` from the one before: then a set costs what changed. `set` raises
`SpeakerError`, with nothing changed, if a value is not valid, two peers share a name or an address,
or two paths of a prefix share their path-id.
A peer gets the families that it agreed to (`Session.agreed`); of one without ADD-PATH the first
path of each prefix, by next hop.
Leaving the context closes the socket and nothing else: ExaBGP keeps announcing.

`settled(n)` also returns when a later set has replaced n and that one is settled. It waits for ever
while the speaker is away: wrap it in `asyncio.timeout`. With no established session it returns as
soon as the speaker has accepted everything. An empty `set((), PMap())` closes all sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath
from types import TracebackType
from typing import Final, Self

import structlog

from lbctl.core.announce import Announcer, Held, LinkState, Paths
from lbctl.core.keys import KeyRing
from lbctl.core.model import Peer, Session
from lbctl.errors import MessageError, SpeakerError
from manager.speaker import messages
from manager.speaker.messages import Message

log = structlog.get_logger()

RECONNECT_S: Final = 0.2
RETRY_S: Final = 1.0  # refused commands are sent again after this
FLUSH_AGAIN_S: Final = 0.02
MAX_UNREAD: Final = 16 << 20


class ExabgpSpeaker:
    """See the module. Use from one event loop only."""

    def __init__(
        self,
        directory: FilePath,
        manager_id: str,
        ring: KeyRing | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket = directory / messages.MANAGER_SOCKET
        self._manager_id = manager_id
        self._ring = ring
        self._on_change = on_change
        self._announcer = Announcer()
        self._peers: dict[str, Peer] | None = None  # by address; None before the first set
        self._sessions: dict[str, messages.SessionState] = {}  # by address
        self._problems: dict[str, str] = {}
        self._ledger: list[Held] = []
        self._generation = 0
        self._settled = 0
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._writer: asyncio.StreamWriter | None = None
        self._scheduled = False
        self._away = ""
        self._task: asyncio.Task[None] | None = None

    # the port

    def set(self, peers: Iterable[Peer], paths: Paths) -> int:
        """Set the whole desired state; returns its number. SpeakerError if it is not valid."""
        listed = tuple(peers)
        wanted = {str(messages.check_peer(peer).address): peer for peer in listed}
        if len({peer.name for peer in wanted.values()}) != len(listed):
            raise SpeakerError("two peers have the same name or address")
        number = self._announcer.want(wanted, paths)
        if wanted != self._peers:
            self._peers = wanted
            self._send_peers()
        self._schedule()
        return number

    async def settled(self, number: int) -> None:
        """Return once every established session has everything of this number or a later one."""
        if not self.is_settled(number):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((number, future))
            await future

    def is_settled(self, number: int) -> bool:
        """Whether `settled` would return at once."""
        return self._announcer.settled >= number

    def sessions(self) -> tuple[Session, ...]:
        """One per peer, by name. Down, with the reason, while the speaker is away."""
        found = []
        for address, peer in (self._peers or {}).items():
            state = self._sessions.get(address)
            if self._writer is None or state is None:
                away = "the speaker is away" if self._writer is None else "not established yet"
                found.append(Session(peer.name, False, (), self._problems.get(peer.name, away)))
                continue
            detail = self._problems.get(peer.name, state.detail)
            agreed = (state.agreed or ()) if state.up else ()
            found.append(Session(peer.name, state.up, agreed, detail))
        return tuple(sorted(found, key=lambda session: session.peer))

    def problems(self) -> dict[str, str]:
        """Why a peer cannot be spoken to at all, by peer name."""
        return dict(self._problems)

    @property
    def connected(self) -> bool:
        """Whether the speaker container is there."""
        return self._writer is not None

    def ping(self, others: bool) -> None:
        """This manager works; `others`: another replica announces."""
        self._send(messages.Ping(others))

    def set_ring(self, ring: KeyRing) -> None:
        """The managers' keys, for the speaker's ears."""
        self._ring = ring
        self._send(messages.Keys(ring.to_text()))

    # life

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.run(), name="speaker")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._retry(), name="speaker-retry")
            while True:
                try:
                    await self._converse()
                except (OSError, MessageError, ValueError) as error:
                    if str(error) != self._away:
                        self._away = str(error)
                        log.warning("speaker_away", error=self._away)
                finally:
                    self._disconnected()
                await asyncio.sleep(RECONNECT_S)

    async def _converse(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._socket, limit=messages.MAX_LINE)
        self._writer = writer
        self._announcer.connected()
        self._ledger.clear()
        self._away = ""
        log.info("speaker_connected")
        self._send(messages.Hello(self._manager_id))
        if self._ring is not None:
            self._send(messages.Keys(self._ring.to_text()))
        self._send_peers()
        while line := await reader.readline():
            self._receive(messages.decode_from_speaker(line))
            self._schedule()
        raise MessageError("the speaker closed the connection")

    def _disconnected(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._announcer.closed()
        self._sessions.clear()
        log.warning("speaker_lost")
        self._on_change()

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            self._announcer.retry()
            self._schedule()

    # messages

    def _receive(self, message: messages.FromSpeaker) -> None:
        match message:
            case messages.Done():
                self._announcer.acknowledged(message.id, message.ok)
            case messages.Flushed():
                if not self._announcer.barrier(message.id, message.peers):
                    asyncio.get_running_loop().call_later(FLUSH_AGAIN_S, self._schedule)
                if complete := self._announcer.completed():
                    self._send(messages.EndOfRib(self._generation, list(complete)))
            case messages.HeldPart():
                self._held(message)
            case messages.Paused():
                self._announcer.paused()
            case messages.SessionState():
                self._session(message)
            case messages.Problems():
                self._problems = message.problems
                self._on_change()

    def _held(self, part: messages.HeldPart) -> None:
        self._ledger += (messages.to_held(entry) for entry in part.entries)
        if part.last:
            ledger, self._ledger = self._ledger, []
            self._generation = part.generation
            self._announcer.held(ledger)

    def _session(self, state: messages.SessionState) -> None:
        self._sessions[state.peer] = state
        if state.agreed is not None:
            self._announcer.negotiated(state.peer, state.agreed)
        self._announcer.established(state.peer, state.up)
        self._on_change()

    def _send_peers(self) -> None:
        if self._peers is None:
            return
        peers = sorted(self._peers.values(), key=lambda peer: peer.name)
        self._send(messages.Peers([messages.from_peer(peer) for peer in peers]))

    def _send(self, message: Message) -> None:
        writer = self._writer
        if writer is None or writer.is_closing():
            return
        writer.write(messages.encode(message))
        if writer.transport.get_write_buffer_size() > MAX_UNREAD:
            writer.transport.abort()

    # sending

    def _schedule(self) -> None:
        """Look what to send, once, soon: many calls in one turn cost one look."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._scheduled = False
        if self._writer is not None and self._announcer.state is LinkState.READY:
            if self._announcer.plan():
                self._schedule()  # the rest in the next turn, after what else waits
            for send in self._announcer.take():
                if send.command is None:
                    self._send(messages.Flush(send.id))
                else:
                    self._send(messages.from_command(send.id, self._generation, send.command))
        self._wake()

    def _wake(self) -> None:
        settled = self._announcer.settled
        if settled == self._settled:
            return
        self._settled = settled
        ready = [future for number, future in self._waiters if number <= settled]
        self._waiters = [entry for entry in self._waiters if entry[0] > settled]
        for future in ready:
            if not future.done():
                future.set_result(None)
        self._on_change()
