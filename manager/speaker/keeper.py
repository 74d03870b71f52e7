"""The speaker container's state: its manager, its ExaBGP, and what each knows of the other.

Rules: the newest manager connection is the manager. What ExaBGP holds is in the ledger, which lives
as long as that ExaBGP. ExaBGP runs while there are peers, unless it was silenced: its manager said
nothing for `SILENCE_S` while another manager was heard to announce. Then the sessions are closed,
for a frozen manager must not announce dead nodes for ever; its next word opens them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from lbctl.core import exabgp
from lbctl.core.announce import Held
from lbctl.core.exabgp import BarrierAnswer, SessionEvent
from lbctl.core.keys import KeyRing
from lbctl.core.model import Address, Peer
from lbctl.errors import MessageError, SpeakerError
from manager.speaker import messages, process
from manager.speaker.ledger import Ledger
from manager.speaker.link import Link
from manager.speaker.messages import Message, SessionState

log = structlog.get_logger()

SILENCE_S: Final = 2.0
PART: Final = 4000  # prefixes in one part of the ledger
MAX_UNREAD: Final = 64 << 20  # bytes that a manager may leave unread


class Keeper:
    """All of it, driven by `launch`. Single-threaded; no method blocks."""

    def __init__(
        self, directory: Path, local: Callable[[Peer], Address | None] = process.local_address
    ) -> None:
        self.config = directory / "exabgp.conf"
        self._find_local = local
        self._run = process.relay_command(directory)
        self.peers: tuple[Peer, ...] = ()
        self.ring: KeyRing | None = None
        self.manager = ""
        self.others = False
        self.silenced = False
        self.last_word_s = 0.0
        self.changed = asyncio.Event()  # peers or silence: look again what shall run
        self.synced = asyncio.Event()  # a link to ExaBGP works
        self.ended_one = asyncio.Event()  # a session ended
        self.link: Link | None = None
        self._ledger = Ledger()
        self._sessions: dict[str, SessionState] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._generation = 0
        self._local: dict[str, Address | None] = {}  # by peer name: where we speak from
        self._problems: dict[str, str] = {}

    # what shall run

    @property
    def wanted(self) -> bool:
        """Whether ExaBGP shall run."""
        return bool(self.peers) and not self.silenced

    def render(self) -> str | None:
        """ExaBGP's configuration as of now, None if no peer can be spoken to.

        Peers that cannot be spoken to are left out, and named to the manager. A session that is up
        keeps its address, wherever routes lead now. So does one that no route leads to any more:
        ExaBGP forgets the routes of a peer that is left out, and would refuse all new ones.
        """
        up = set(self.established())
        for peer in self.peers:
            if peer.name not in self._local or str(peer.address) not in up:
                found = peer.local_address or self._find_local(peer)
                self._local[peer.name] = found or self._local.get(peer.name)
        usable = tuple(peer for peer in self.peers if not self._lacks(peer))
        self._tell_problems({p.name: self._lacks(p) for p in self.peers if p not in usable})
        local = {name: address for name, address in self._local.items() if address is not None}
        return exabgp.render_config(usable, local, self._run) if usable else None

    def usable(self) -> set[str]:
        """Addresses of the peers that `render` found a way to."""
        return {str(peer.address) for peer in self.peers if not self._lacks(peer)}

    def _lacks(self, peer: Peer) -> str:
        """Why a peer cannot be spoken to; "": it can."""
        if peer.keep_password:
            return "its password is not known until the API server answers"
        return "no route leads to it" if self._local.get(peer.name) is None else ""

    def _tell_problems(self, problems: dict[str, str]) -> None:
        if problems != self._problems:
            self._problems = problems
            self.send(messages.Problems(problems))

    # the manager's side

    async def serve_manager(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One manager connection, until it ends or a newer one comes."""
        try:
            hello = messages.decode_from_manager(await reader.readline())
            if not isinstance(hello, messages.Hello) or hello.version != messages.VERSION:
                raise MessageError("the manager did not say hello in this version")
            self._adopt(hello, writer)
            while line := await reader.readline():
                if self._writer is not writer:
                    break
                self._word()
                self._obey(messages.decode_from_manager(line))
        except (MessageError, OSError, ValueError) as error:
            log.warning("manager_connection_failed", error=str(error))
        finally:
            if self._writer is writer:
                self._writer = None
                log.info("manager_gone", manager=self.manager)
            writer.close()

    def _adopt(self, hello: messages.Hello, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self.manager = writer, hello.manager
        log.info("manager_connected", manager=hello.manager)
        self._word()
        for _, session in sorted(self._sessions.items()):
            self.send(session)
        self.send(messages.Problems(self._problems))
        if (self.link is not None and self.link.synced) or not self.wanted:
            self.send_held()
        else:
            self.send(messages.Paused())

    def _word(self) -> None:
        self.last_word_s = asyncio.get_running_loop().time()
        if self.silenced:
            log.warning("speaker_resumes", manager=self.manager)
            self.silenced = False
            self.changed.set()

    def _obey(self, message: messages.FromManager) -> None:
        match message:
            case messages.Ping():
                self.others = message.others
            case messages.Run():
                self._command(message)
            case messages.Flush():
                self._flush(message)
            case messages.EndOfRib():
                self._end_of_rib(message)
            case messages.Peers():
                self._set_peers(message)
            case messages.Keys():
                self.ring = KeyRing.from_text(message.ring)
            case messages.Hello():
                raise MessageError("the manager said hello twice")

    def _set_peers(self, message: messages.Peers) -> None:
        peers = tuple(self._with_password(messages.to_peer(entry)) for entry in message.peers)
        if peers == self.peers:
            return
        started = bool(peers) and not self.wanted
        old = {peer.name: peer for peer in self.peers}
        same = {peer.name for peer in peers if old.get(peer.name) == peer}
        self._local = {name: local for name, local in self._local.items() if name in same}
        self.peers = peers
        log.info("peers_set", peers=[peer.name for peer in peers])
        self.changed.set()
        if started:
            self.send(messages.Paused())  # until ExaBGP is there

    def _with_password(self, peer: Peer) -> Peer:
        known = {old.name: old.password for old in self.peers if old.address == peer.address}
        if not peer.keep_password or known.get(peer.name) is None:
            return peer
        return replace(peer, password=known[peer.name], keep_password=False)

    def _command(self, run: messages.Run) -> None:
        if run.generation != self._generation or self.link is None or not self.link.synced:
            return  # planned upon what is no longer so; the manager is being told
        command = messages.to_command(run)
        known = {str(peer.address) for peer in self.peers}
        if not known.issuperset(command.peers):
            self.send(messages.Done(run.id, False))
            return

        def done(ok: bool) -> None:
            if ok:
                self._ledger.acknowledged(command)
            else:
                log.warning("exabgp_refused", attributes=command.attributes, verb=command.verb)
                self._ledger.lost(command)
            self.send(messages.Done(run.id, ok))

        self.link.run(command, done)

    def _flush(self, message: messages.Flush) -> None:
        if self.link is None or not self.link.synced:
            if not self.wanted:
                self.send(messages.Flushed(message.id, {}))
            return

        def answered(future: asyncio.Future[BarrierAnswer]) -> None:
            if not future.cancelled() and future.exception() is None:
                self.send(messages.Flushed(message.id, dict(future.result().flushed)))

        self.link.barrier().add_done_callback(answered)

    def _end_of_rib(self, message: messages.EndOfRib) -> None:
        if message.generation != self._generation or self.link is None or not self.link.synced:
            return  # as for a command; the manager says it again for what it is being told
        # To the others ExaBGP sends it by itself.
        if due := sorted(self._graceful() & set(message.peers)):
            self.link.end_of_rib(tuple(due))

    def _graceful(self) -> set[str]:
        """Addresses of the peers that keep our routes when ExaBGP dies."""
        return {str(peer.address) for peer in self.peers if peer.graceful_restart_s is not None}

    def send(self, message: Message) -> None:
        """To the manager, if there is one."""
        if self._writer is None or self._writer.is_closing():
            return
        self._writer.write(messages.encode(message))
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
            self._writer.transport.abort()

    def send_held(self) -> None:
        """Tell the manager, whole, what ExaBGP holds. What is in flight becomes unsure."""
        if self.link is not None:
            for command in self.link.in_flight():
                self._ledger.lost(command)
        self._generation += 1
        known = frozenset(str(peer.address) for peer in self.peers)
        part: list[messages.HeldEntry] = []
        size = 0
        for held in self._ledger.entries(known):
            part.append(_entry(held))
            size += len(held.prefixes)
            if size >= PART:
                self.send(messages.HeldPart(part, self._generation, False))
                part, size = [], 0
        self.send(messages.HeldPart(part, self._generation, True))

    # ExaBGP's side

    async def serve_relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One relay connection, until it ends."""
        if self.link is not None:
            self._drop_link(self.link)
        link = self.link = Link(writer, self._session)
        log.info("relay_connected")
        greeting = asyncio.create_task(self._greet(link))
        try:
            while (line := await reader.readline()) and self.link is link:
                link.received(line.decode("ascii", "replace"))
        except (OSError, ValueError) as error:
            log.warning("relay_failed", error=str(error))
        finally:
            self._drop_link(link)
            greeting.cancel()

    async def _greet(self, link: Link) -> None:
        try:
            await link.greet()
        except SpeakerError:
            return
        if self.link is link:
            self.synced.set()
            self.send_held()

    def _drop_link(self, link: Link) -> None:
        for command in link.close():
            self._ledger.lost(command)
        if self.link is link:
            self.link = None
            self.synced.clear()
            self.send(messages.Paused())
            log.info("relay_gone")

    def _session(self, event: SessionEvent) -> None:
        old = self._sessions.get(event.peer, SessionState(event.peer, False, None, ""))
        new = SessionState(
            event.peer,
            old.up if event.up is None else event.up,
            old.agreed if event.agreed is None else event.agreed,
            event.detail or ("" if event.up else old.detail),
        )
        if new == old and event.peer in self._sessions:
            return
        self._sessions[event.peer] = new
        self.send(new)
        if not new.up:
            self.ended_one.set()
        if new.up != old.up:
            log.info("session", peer=event.peer, up=event.up, detail=event.detail)

    def established(self) -> list[str]:
        """Addresses of peers whose session is up."""
        return sorted(peer for peer, session in self._sessions.items() if session.up)

    def leaving(self) -> list[str]:
        """Peers that hear Cease when the speaker is told to end: all if another manager announces,
        else those that would keep our routes."""
        graceful = self._graceful()
        return [peer for peer in self.established() if self.others or peer in graceful]

    def ended(self, why: str) -> None:
        """ExaBGP is gone, and all that it held with it."""
        if self.link is not None:
            self._drop_link(self.link)
        self._ledger.clear()
        for peer, session in sorted(self._sessions.items()):
            if session.up:
                self._session(SessionEvent(peer, up=False, detail=why))
            self._sessions[peer] = SessionState(peer, False, session.agreed, why)
        if not self.wanted:
            self.send_held()

    def reloaded(self, changed: set[str]) -> None:
        """ExaBGP runs a new configuration; `changed` are the addresses of peers that differ."""
        for peer in sorted(changed):
            self._ledger.doubt(peer)
        current = {str(peer.address) for peer in self.peers}
        for peer in sorted(set(self._sessions) - current):
            del self._sessions[peer]
        self.send_held()

    def silence(self) -> None:
        """The manager is silent and another one lives: close the sessions."""
        log.warning("speaker_silenced", manager=self.manager, silent_s=SILENCE_S)
        self.silenced = True
        self.changed.set()


def _entry(held: Held) -> messages.HeldEntry:
    return messages.HeldEntry(held.peer, held.attributes, held.sure, list(held.prefixes))
