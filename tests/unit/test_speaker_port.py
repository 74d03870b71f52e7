"""The manager's port to the speaker, with a speaker that only keeps count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path as FilePath

import pytest

from lbctl.core.announce import WINDOW
from lbctl.core.exabgp import MAX_PREFIXES, Verb
from lbctl.core.model import Peer
from manager.speaker import messages
from manager.speaker.messages import Run
from manager.speaker.port import ExabgpSpeaker
from tests.bench.fakespeaker import FakeSpeaker
from tests.routes import by_prefix

from .test_announce import path

LIMIT_S = 60.0
PEER = Peer("tor-a", path(1).next_hop, 64500, 64512)


@pytest.fixture
async def far(tmp_path: FilePath) -> AsyncIterator[FakeSpeaker]:
    """A speaker that listens."""
    speaker = FakeSpeaker()
    server = await asyncio.start_unix_server(speaker.serve, tmp_path / messages.MANAGER_SOCKET)
    yield speaker
    server.close()


async def test_a_withdraw_overtakes_a_load_in_progress(
    far: FakeSpeaker, tmp_path: FilePath
) -> None:
    """A node goes when the load's first command arrives: after what is in flight at the most, it
    is out of all that is announced, and then the load goes on without it."""
    nodes = (1, 2, 3)
    first = by_prefix(path(eip, node) for eip in range(1000) for node in nodes)
    more = frozenset(path(eip, node) for eip in range(1000, 6000) for node in nodes)
    load = first.updated(by_prefix(more))
    less = load.updated(
        {prefix: frozenset(p for p in some if p.node != "node-2") for prefix, some in load.items()}
    )
    async with asyncio.timeout(LIMIT_S), ExabgpSpeaker(tmp_path, "control-1") as port:
        await port.settled(port.set([PEER], first))
        far.runs.clear()
        number: asyncio.Future[int] = asyncio.get_running_loop().create_future()

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
