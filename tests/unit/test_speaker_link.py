"""Ledger and link: what is known of ExaBGP after lost, stray and garbled answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path as FilePath

import pytest

from lbctl.core import exabgp
from lbctl.core.announce import Held
from lbctl.core.exabgp import BarrierAnswer, Command, SessionEvent, Verb
from lbctl.core.model import Peer
from lbctl.errors import SpeakerError
from manager.speaker import messages
from manager.speaker.keeper import Keeper
from manager.speaker.launch import Launcher
from manager.speaker.ledger import Ledger
from manager.speaker.link import Link

A = "192.0.2.1"
OLD, NEW = "next-hop 192.0.2.21 path-information 7", "next-hop 192.0.2.21 path-information 8"
SAME = "next-hop 192.0.2.22 path-information 7"
P, Q = "198.51.100.1/32", "198.51.100.2/32"


def command(verb: Verb = Verb.ANNOUNCE, attributes: str = OLD, *prefixes: str) -> Command:
    """A command for A."""
    return Command(verb, (A,), attributes, prefixes or (P,))


def test_ledger_follows_acknowledgements() -> None:
    """An announce replaces what is in its slot; a withdraw empties it."""
    ledger, peers = Ledger(), frozenset({A})
    ledger.acknowledged(command(Verb.ANNOUNCE, OLD, P, Q))
    ledger.acknowledged(command(Verb.ANNOUNCE, NEW))
    ledger.acknowledged(command(Verb.WITHDRAW, OLD))
    assert ledger.entries(peers) == [Held(A, OLD, (Q,), True), Held(A, NEW, (P,), True)]
    ledger.acknowledged(command(Verb.ANNOUNCE, SAME, Q))
    assert ledger.entries(peers) == [Held(A, NEW, (P,), True), Held(A, SAME, (Q,), True)]
    assert ledger.entries(frozenset()) == []
    ledger.clear()
    assert ledger.entries(peers) == []


def test_ledger_doubts_what_was_lost() -> None:
    """Old and new may be there; the next acknowledgement of the slot settles it."""
    ledger, peers = Ledger(), frozenset({A})
    ledger.acknowledged(command())
    ledger.lost(command(Verb.ANNOUNCE, SAME))
    assert ledger.entries(peers) == [Held(A, OLD, (P,), False), Held(A, SAME, (P,), False)]
    ledger.acknowledged(command(Verb.ANNOUNCE, SAME))
    assert ledger.entries(peers) == [Held(A, SAME, (P,), True)]
    ledger.lost(command(Verb.WITHDRAW, SAME))
    assert ledger.entries(peers) == [Held(A, SAME, (P,), False)]
    ledger.acknowledged(command(Verb.WITHDRAW, SAME))
    assert ledger.entries(peers) == []
    ledger.acknowledged(command())
    ledger.doubt(A)
    assert ledger.entries(peers) == [Held(A, OLD, (P,), False)]


class Far:
    """The relay's end: reads commands, writes what the test says."""

    def __init__(self, link: Link, reader: asyncio.StreamReader) -> None:
        self.link, self.reader = link, reader

    async def line(self) -> str:
        async with asyncio.timeout(30):
            return (await self.reader.readline()).decode().strip()

    async def barrier(self) -> None:
        """Answer the barrier that comes next."""
        name, nonce = (await self.line()).split()
        assert name == exabgp.BARRIER
        state = {"up": True, "agreed": {"ipv4 unicast": True}, "flushed": True}
        self.say(json.dumps({name: nonce, "peers": {A: state}, "reloads": 1, "failures": 0}))

    def say(self, *lines: str) -> None:
        for line in lines:
            self.link.received(line)


@pytest.fixture
async def far(tmp_path: FilePath) -> AsyncIterator[Far]:
    """A link over a real socket, and its other end."""
    events: list[SessionEvent] = []
    ready: asyncio.Future[Far] = asyncio.get_running_loop().create_future()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready.set_result(Far(Link(writer, events.append), reader))

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
    one = await ready
    yield one
    one.link.close()
    writer.close()
    server.close()


async def test_answers_for_a_dead_relay_are_not_taken(far: Far) -> None:
    """Everything before the first barrier's answer belongs to somebody else."""
    greeting = far.link.greet()
    far.say("done", "error", "done")
    assert not far.link.synced
    await far.barrier()
    far.say("done")
    assert (await greeting).reloads == 1
    answers: list[bool] = []
    far.link.run(command(), answers.append)
    far.link.run(command(Verb.WITHDRAW), answers.append)
    assert "announce attributes" in await far.line()
    far.say("error", "done")
    assert answers == [False, True]


async def test_a_lost_acknowledgement_is_noticed(far: Far) -> None:
    """The next barrier comes out of step: the link is broken, and says what was in flight."""
    far.link.greet()
    await far.barrier()
    far.say("done")
    answers: list[bool] = []
    far.link.run(command(), answers.append)
    await far.line()
    far.say("{garbled")
    pending = far.link.barrier()
    assert not far.link.broken
    await far.barrier()
    assert far.link.broken
    assert far.link.close() == [command()]
    assert answers == []
    with pytest.raises(SpeakerError):
        await pending


async def test_an_exabgp_without_the_barrier_is_an_error(far: Far) -> None:
    """The runner was not used."""
    greeting = far.link.greet()
    await far.barrier()
    far.say("done")
    await greeting
    pending = far.link.barrier()
    far.say("error")
    with pytest.raises(SpeakerError, match="barrier"):
        await pending
    assert far.link.broken, "the manager would wait for its flush for ever"


def tor(**more: object) -> Peer:
    """A peer at A."""
    return replace(Peer("tor", ip_address(A), 64500, 64512), **more)  # type: ignore[arg-type]


def test_a_peer_that_no_route_leads_to_any_more_stays_in_the_configuration(
    tmp_path: FilePath,
) -> None:
    """Left out, its routes would be refused for ever, and nothing settle."""
    found = [ip_address("192.0.2.9")]
    keeper = Keeper(tmp_path, lambda _peer: found[0] if found else None)
    keeper._obey(messages.Peers([messages.from_peer(tor())]))
    text = keeper.render()
    keeper._session(SessionEvent(A, up=True))
    keeper._session(SessionEvent(A, up=False))
    found.clear()
    assert keeper.render() == text and keeper.usable() == {A}
    found.append(ip_address("192.0.2.10"))
    assert "local-address 192.0.2.10;" in (keeper.render() or "")


class Reloading:
    """An ExaBGP whose session comes up before it has told that it loaded its file; and its link."""

    synced = True

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._reloads = 0

    def reload(self) -> None:
        self._reloads += 1
        self._keeper._session(SessionEvent(A, up=True))

    def in_flight(self) -> list[Command]:
        return []

    def barrier(self) -> asyncio.Future[BarrierAnswer]:
        answer: asyncio.Future[BarrierAnswer] = asyncio.get_running_loop().create_future()
        answer.set_result(BarrierAnswer("", {}, (), self._reloads, 0))
        return answer


async def test_a_session_that_comes_up_during_a_reload_is_upon_an_empty_rib(
    tmp_path: FilePath,
) -> None:
    """Its address has changed: what the old one had must be sent again."""
    launcher = Launcher(tmp_path)
    keeper, peer = launcher.keeper, tor(local_address=ip_address("192.0.2.9"))
    keeper._obey(messages.Peers([messages.from_peer(peer)]))
    keeper._ledger.acknowledged(command())
    exabgp = Reloading(keeper)
    keeper.link, launcher._process = exabgp, exabgp  # type: ignore[assignment]
    launcher._loaded = {A: peer}
    keeper.synced.set()
    await launcher._reload()
    assert keeper.established() == [A]
    assert keeper._ledger.entries(frozenset({A})) == [Held(A, OLD, (P,), False)]
