"""The manager's port to the speaker, with a speaker that only keeps count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path as FilePath

import pytest

from lbctl.core.announce import WINDOW, by_prefix
from lbctl.core.exabgp import MAX_PREFIXES, Verb
from lbctl.core.model import Peer
from manager.speaker import messages
from manager.speaker.messages import Done, Flush, Flushed, HeldPart, Run, SessionState
from manager.speaker.port import ExabgpSpeaker

from .test_announce import path

LIMIT_S = 60.0
PEER = Peer("tor-a", path(1).next_hop, 64500, 64512)


class Speaker:
    """The other end of the socket: one session with ADD-PATH; every command is done at once."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.on_run: Callable[[Run], None] = lambda _run: None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        await reader.readline()
        agreed = ((4, True), (6, True))
        writer.write(messages.encode(SessionState(str(PEER.address), True, agreed, "")))
        writer.write(messages.encode(HeldPart([], 1, True)))
        while line := await reader.readline():
            message = messages.decode_from_manager(line)
            if isinstance(message, Run):
                self.runs.append(message)
                self.on_run(message)
                writer.write(messages.encode(Done(message.id, True)))
            elif isinstance(message, Flush):
                writer.write(messages.encode(Flushed(message.id, {str(PEER.address): True})))
        writer.close()


@pytest.fixture
async def far(tmp_path: FilePath) -> AsyncIterator[Speaker]:
    """A speaker that listens."""
    speaker = Speaker()
    server = await asyncio.start_unix_server(speaker.serve, tmp_path / messages.MANAGER_SOCKET)
    yield speaker
    server.close()


async def test_a_withdraw_overtakes_a_load_in_progress(far: Speaker, tmp_path: FilePath) -> None:
    """A node goes when the load's first command arrives: after what is in flight at the most, it
    is out of all that is announced, and then the load goes on without it."""
    nodes = (1, 2, 3)
    first = by_prefix(frozenset(path(eip, node) for eip in range(1000) for node in nodes))
    more = frozenset(path(eip, node) for eip in range(1000, 6000) for node in nodes)
    load = first.updated(by_prefix(more))
    less = load.updated(
        {prefix: frozenset(p for p in some if p.node != "node-2") for prefix, some in load.items()}
    )
    async with asyncio.timeout(LIMIT_S), ExabgpSpeaker(tmp_path, "control-1") as port:
        await port.settled(port.set([PEER], first))
        far.runs.clear()
        number = asyncio.get_running_loop().create_future()

        def lose(_run: Run) -> None:
            if not number.done():
                number.set_result(port.set([PEER], less))

        far.on_run = lose
        port.set([PEER], load)
        await port.settled(await number)
    out = [n for n, run in enumerate(far.runs) if run.verb is Verb.WITHDRAW]
    early = far.runs[: out[0]]
    assert len(early) <= WINDOW, "the withdraws waited for more than what was in flight"
    withdrawn = [prefix for n in out for prefix in far.runs[n].prefixes]
    assert len(withdrawn) >= len(first)
    assert out[-1] - out[0] + 1 == len(out), "something of the load went between the withdraws"
    later = sum(len(run.prefixes) for run in far.runs[out[-1] :] if run.verb is Verb.ANNOUNCE)
    assert later >= 2 * 5000 - MAX_PREFIXES * WINDOW, "the load was over already"
