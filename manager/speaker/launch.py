"""`lbctl-speaker`: main process of the speaker container.

It listens for the manager and for ExaBGP's relay on unix sockets in its directory, keeps ExaBGP
running with the manager's peers, reloads it when they change (SIGUSR1, other sessions stay), kills
it when it hangs, and starts it again. On SIGTERM it closes the sessions with Cease if its manager
said that another replica announces, and in any case those with graceful restart (whoever ends on
purpose takes the routes along: it may be for good, and nobody would withdraw a dead node), and
ends.

Usage: lbctl-speaker [--directory DIR] [--peer-port PORT]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Final

import structlog

from lbctl.core import names
from lbctl.core.exabgp import BarrierAnswer
from lbctl.core.model import Peer
from lbctl.errors import SpeakerError
from lbctl.log import setup as log_setup
from manager.speaker import alive, messages, process
from manager.speaker.ears import Ears
from manager.speaker.keeper import SILENCE_S, Keeper

log = structlog.get_logger()

TICK_S: Final = 0.2
STALL_S: Final = 1.0  # a tick that comes this late: this process itself did not run
BARRIER_EVERY_S: Final = 1.0
HANG_S: Final = 5.0  # an answer that takes longer: ExaBGP hangs
ATTACH_S: Final = 20.0  # so long ExaBGP may go without a working relay
RELOAD_RETRY_S: Final = 0.5
LOOK_AGAIN_S: Final = 5.0  # how often local addresses are looked up while a session is down
FAREWELL_S: Final = 1.0
BACKOFF_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
MISSING_LIMIT: Final = 3
STEADY_S: Final = 30.0  # a run of this length starts the back-off anew


class Launcher:
    """Keeps ExaBGP as the keeper wants it."""

    def __init__(self, directory: Path, peer_port: int = names.SPEAKER_PEER_PORT) -> None:
        self._directory = directory
        self.keeper = Keeper(directory)
        self._ears = Ears(peer_port, lambda: self.keeper.ring)
        self._process: process.Process | None = None
        self._loaded: dict[str, Peer] = {}
        self._text = ""
        self._attached_s = 0.0
        self._usable: set[str] = set()  # addresses in the configuration that ExaBGP has loaded
        self._missing = 0  # barriers in a row that lacked one of them

    async def run(self) -> None:
        """Until cancelled; then the sessions are closed and ExaBGP is gone."""
        servers = await self._listen()
        await self._ears.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._supervise(), name="supervise")
                tasks.create_task(self._follow(), name="follow")
                tasks.create_task(self._watch(), name="watch")
        finally:
            await self._farewell(self.keeper.leaving())
            if self._process is not None:
                await self._process.wait()
            for server in servers:
                server.close()
            self._ears.close()

    async def _listen(self) -> list[asyncio.Server]:
        servers = []
        for name, serve in (
            (messages.MANAGER_SOCKET, self.keeper.serve_manager),
            (messages.RELAY_SOCKET, self.keeper.serve_relay),
            (alive.HEALTH_SOCKET, _answer),
        ):
            path = self._directory / name
            try:
                path.unlink(missing_ok=True)
                server = await asyncio.start_unix_server(serve, path, limit=messages.MAX_LINE)
                path.chmod(0o660)
            except OSError as error:
                raise SpeakerError(f"cannot listen on {path}: {error.strerror}") from error
            servers.append(server)
        return servers

    # ExaBGP's life

    async def _supervise(self) -> None:
        failures = 0
        while True:
            while not self.keeper.wanted:
                self.keeper.changed.clear()
                await self.keeper.changed.wait()
            text = self.keeper.render()
            if text is None:
                await asyncio.sleep(BACKOFF_S[-2])
                continue
            self._text, self._usable = text, self.keeper.usable()
            self._loaded = {str(peer.address): peer for peer in self.keeper.peers}
            process.write_config(self.keeper.config, self._text)
            self._process = child = await process.Process.start(self.keeper.config)
            self._attached_s = child.started_s
            log.info("exabgp_started", pid=child.pid)
            code = await child.wait()
            self._process = None
            ran_s = asyncio.get_running_loop().time() - child.started_s
            log.warning("exabgp_ended", pid=child.pid, code=code, ran_s=round(ran_s, 1))
            self.keeper.ended("ExaBGP ended")
            failures = 0 if ran_s > STEADY_S or not self.keeper.wanted else failures + 1
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])

    async def _follow(self) -> None:
        """Bring a running ExaBGP to what is wanted, whenever that changes."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.keeper.changed.wait(), LOOK_AGAIN_S)
            if self._process is None:
                await asyncio.sleep(TICK_S)  # the supervisor starts it with what is newest
                continue
            self.keeper.changed.clear()
            if not self.keeper.wanted:
                await self._farewell(self.keeper.established())
            elif len(self.keeper.established()) < len(self.keeper.peers) or self._is_stale():
                await self._reload()

    def _is_stale(self) -> bool:
        return self._loaded != {str(peer.address): peer for peer in self.keeper.peers}

    async def _reload(self) -> None:
        text = self.keeper.render()
        peers = {str(peer.address): peer for peer in self.keeper.peers}
        if text is None or text == self._text:
            self._loaded = peers
            return
        # As it is before: a session may come up while the file is loaded, upon an empty RIB.
        changed = {a for a, peer in peers.items() if self._loaded.get(a) != peer}
        changed |= peers.keys() - self.keeper.established()
        process.write_config(self.keeper.config, text)
        try:
            if not await self._loads():
                log.error("exabgp_refused_configuration")
                self._kill("it refused its configuration")
                return
        except (SpeakerError, TimeoutError):
            self.keeper.changed.set()  # the link or ExaBGP went away: once more
            return
        self._text, self._loaded, self._usable = text, peers, self.keeper.usable()
        self.keeper.reloaded(changed)

    async def _loads(self) -> bool:
        """Signal until ExaBGP has loaded the file: it forgets the signal while updates wait."""
        await asyncio.wait_for(self.keeper.synced.wait(), ATTACH_S)
        link = self.keeper.link
        if link is None:
            raise SpeakerError("no link")
        before = await link.barrier()
        while self._process is not None:
            self._process.reload()
            until = asyncio.get_running_loop().time() + RELOAD_RETRY_S
            while asyncio.get_running_loop().time() < until:
                now = await link.barrier()
                if now.reloads > before.reloads or now.failures > before.failures:
                    return now.reloads > before.reloads
                await asyncio.sleep(TICK_S / 10)
        raise SpeakerError("ExaBGP is gone")

    async def _farewell(self, peers: list[str]) -> None:
        """End ExaBGP, with Cease on the sessions with these peers."""
        link = self.keeper.link
        if link is not None and link.synced:
            for peer in peers:
                link.teardown(peer)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    while not set(peers).isdisjoint(self.keeper.established()):
                        self.keeper.ended_one.clear()
                        await self.keeper.ended_one.wait()
        if self._process is not None:
            self._process.kill()

    # watching

    async def _watch(self) -> None:
        """Silence and hangs, by this process's own clock and only while it runs itself."""
        loop = asyncio.get_running_loop()
        last_s, barrier_s = loop.time(), 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = loop.time()
            stalled, last_s = now - last_s > STALL_S, now
            if stalled:
                self.keeper.last_word_s = max(self.keeper.last_word_s, now)
                self._attached_s = now
                continue
            self._check_silence(now)
            self._check_hang(now)
            link = self.keeper.link
            if link is not None and now - barrier_s >= BARRIER_EVERY_S:
                barrier_s = now
                if link.synced and link.oldest_s() < BARRIER_EVERY_S:
                    link.barrier().add_done_callback(self._check_peers)

    def _check_silence(self, now: float) -> None:
        keeper = self.keeper
        if not keeper.wanted or now - keeper.last_word_s <= SILENCE_S:
            return
        if self._ears.other_announces(keeper.manager, now):
            keeper.silence()

    def _check_hang(self, now: float) -> None:
        link = self.keeper.link
        if link is not None and link.synced:
            self._attached_s = now
            if link.broken:
                log.warning("exabgp_answer_lost")
                link.abort()
            elif link.oldest_s() > HANG_S:
                self._kill("it does not answer")
        elif self._process is not None and now - self._attached_s > ATTACH_S:
            self._kill("its relay does not connect")

    def _check_peers(self, future: asyncio.Future[BarrierAnswer]) -> None:
        """A peer that ExaBGP has dropped comes back only with another ExaBGP."""
        if future.cancelled() or future.exception() is not None or self._is_stale():
            self._missing = 0
            return
        self._missing = self._missing + 1 if self._usable - future.result().flushed.keys() else 0
        if self._missing >= MISSING_LIMIT:
            self._missing = 0
            self._kill("it dropped a peer")

    def _kill(self, why: str) -> None:
        if self._process is not None:
            log.error("exabgp_killed", pid=self._process.pid, why=why)
            self._process.kill()


async def _answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """To the liveness probe: this loop comes round."""
    writer.write(alive.ANSWER)
    writer.close()


async def serve(directory: Path, peer_port: int) -> None:
    """Run a launcher until SIGTERM or SIGINT."""
    launcher = asyncio.create_task(Launcher(directory, peer_port).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, launcher.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await launcher


def main() -> None:
    """The `lbctl-speaker` command."""
    parser = argparse.ArgumentParser(prog="lbctl-speaker", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path(names.SPEAKER_SOCKET_DIR))
    parser.add_argument("--peer-port", type=int, default=names.SPEAKER_PEER_PORT)
    options = parser.parse_args()
    log_setup()
    try:
        asyncio.run(serve(options.directory, options.peer_port))
    except SpeakerError as error:
        log.error("speaker_cannot_run", error=str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
