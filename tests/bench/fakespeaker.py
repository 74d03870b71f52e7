"""A speaker container's end of the manager's socket that only keeps count: no ExaBGP, no switch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lbctl.core.exabgp import Verb
from manager.speaker import messages
from manager.speaker.messages import (
    Done,
    Flush,
    Flushed,
    HeldEntry,
    HeldPart,
    Peers,
    Run,
    SessionState,
)


class FakeSpeaker:
    """Every peer has a session with ADD-PATH at once; every command is done at once, and a manager
    that connects is told what is held.

    `runs` are the commands so far; `on_run` is called with each, before it is acknowledged.
    """

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.on_run: Callable[[Run], None] = lambda _run: None
        self._held: dict[tuple[str, str], set[str]] = {}  # by peer and attributes

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for asyncio.start_unix_server."""
        peers: list[str] = []
        await reader.readline()
        held = [HeldEntry(*key, True, sorted(routes)) for key, routes in self._held.items()]
        writer.write(messages.encode(HeldPart(held, 1, True)))
        while line := await reader.readline():
            message = messages.decode_from_manager(line)
            if isinstance(message, Peers):
                peers = [entry.address for entry in message.peers]
                for peer in peers:
                    agreed = ((4, True), (6, True))
                    writer.write(messages.encode(SessionState(peer, True, agreed, "")))
            elif isinstance(message, Run):
                self.runs.append(message)
                self.on_run(message)
                self._hold(message)
                writer.write(messages.encode(Done(message.id, True)))
            elif isinstance(message, Flush):
                writer.write(messages.encode(Flushed(message.id, dict.fromkeys(peers, True))))
        writer.close()

    def _hold(self, run: Run) -> None:
        for peer in run.peers:
            known = self._held.setdefault((peer, run.attributes), set())
            if run.verb is Verb.ANNOUNCE:
                known.update(run.prefixes)
            else:
                known.difference_update(run.prefixes)
