"""The launcher's end of the relay: commands in order to ExaBGP, answers matched to them.

ExaBGP answers in the order of the commands and names none, and a relay that died leaves answers to
its successor. So a link begins with a barrier whose nonce comes back; all acknowledgements before
that are somebody else's.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from lbctl.core import exabgp
from lbctl.core.exabgp import Acknowledged, BarrierAnswer, Command, SessionEvent
from lbctl.errors import MessageError, SpeakerError

log = structlog.get_logger()


@dataclass(slots=True)
class Waiting:
    """One line that was sent and has no acknowledgement yet."""

    since: float
    command: Command | None = None
    done: Callable[[bool], None] | None = None
    nonce: str = ""
    answer: asyncio.Future[BarrierAnswer] | None = None


class Link:
    """One relay connection, from accept to end. Use from one event loop only."""

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        on_session: Callable[[SessionEvent], None],
    ) -> None:
        self._writer = writer
        self._on_session = on_session
        self._queue: deque[Waiting] = deque()
        self._first = secrets.token_hex(8)
        self.synced = False
        self.broken = False  # an answer is missing: only a new link can tell which

    def greet(self) -> asyncio.Future[BarrierAnswer]:
        """Send the first barrier; the future has its answer."""
        return self._barrier(self._first)

    def oldest_s(self) -> float:
        """How long the oldest line has been waiting for its answer, in seconds."""
        return asyncio.get_running_loop().time() - self._queue[0].since if self._queue else 0.0

    def run(self, command: Command, done: Callable[[bool], None]) -> None:
        """Send a command; `done` is called with whether ExaBGP took it, or never."""
        self._send(exabgp.render(command), Waiting(_now(), command, done))

    def barrier(self) -> asyncio.Future[BarrierAnswer]:
        """Send a barrier; SpeakerError in the future when the link ends before the answer."""
        return self._barrier(secrets.token_hex(8))

    def end_of_rib(self, peers: tuple[str, ...]) -> None:
        """Send End-of-RIB to these."""
        self._send(exabgp.render_end_of_rib(peers), Waiting(_now()))

    def teardown(self, peer: str) -> None:
        """Close one session with Cease."""
        self._send(exabgp.render_teardown(peer), Waiting(_now()))

    def in_flight(self) -> list[Command]:
        """Commands without an answer yet, in order."""
        return [waiting.command for waiting in self._queue if waiting.command is not None]

    def close(self) -> list[Command]:
        """End it; returns the commands whose outcome will never be known."""
        lost = self.in_flight()
        for waiting in self._queue:
            if waiting.answer is not None and not waiting.answer.done():
                waiting.answer.set_exception(SpeakerError("ExaBGP's relay went away"))
                waiting.answer.exception()  # nobody may be waiting any more
        self._queue.clear()
        self._writer.close()
        return lost

    def abort(self) -> None:
        """Break the connection: the relay ends, ExaBGP starts another, and that one is in step."""
        self._writer.transport.abort()

    def received(self, line: str) -> None:
        """One line that ExaBGP wrote."""
        try:
            answer = exabgp.parse_line(line)
        except MessageError as error:
            log.warning("exabgp_garbled", error=str(error), line=line[:200])
            return
        match answer:
            case SessionEvent():
                self._on_session(answer)
            case BarrierAnswer():
                self._barrier_answer(answer)
            case Acknowledged() if self.synced and self._queue:
                waiting = self._queue.popleft()
                if waiting.done is not None:
                    waiting.done(answer.ok)
                if waiting.answer is not None and not waiting.answer.done():
                    waiting.answer.set_exception(SpeakerError("ExaBGP did not answer a barrier"))
                    waiting.answer.exception()
                    self.broken = True  # whoever asked must not wait for ever

    def _barrier(self, nonce: str) -> asyncio.Future[BarrierAnswer]:
        future: asyncio.Future[BarrierAnswer] = asyncio.get_running_loop().create_future()
        self._send(exabgp.render_barrier(nonce), Waiting(_now(), nonce=nonce, answer=future))
        return future

    def _barrier_answer(self, answer: BarrierAnswer) -> None:
        if answer.nonce == self._first:
            self.synced = True
        for session in answer.sessions:
            self._on_session(session)
        head = self._queue[0] if self._queue else None
        if head is None or head.nonce != answer.nonce:
            self.broken = True
        elif head.answer is not None and not head.answer.done():
            head.answer.set_result(answer)  # its own `done` follows and takes it off the queue

    def _send(self, line: str, waiting: Waiting) -> None:
        self._queue.append(waiting)
        self._writer.write(line.encode("ascii") + b"\n")


def _now() -> float:
    return asyncio.get_running_loop().time()
