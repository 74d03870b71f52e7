"""Asks a node's kernel whether it lives: a TCP connect to the agent's port.

SYN-ACK and RST both come from the kernel, so both mean alive, whatever the agent does. Rules: never
blocks; every attempt is closed within LIMIT_S; what came back is collected by `poll`, right before
nodes are judged, so that a late event loop does not make a node look dead.
"""

from __future__ import annotations

import errno
import math
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterable
from typing import Final

from lbctl.core.model import Address
from lbctl.precedence import prefer

LIMIT_S: Final = 1.0
REACH_S: Final = 1.0
_MAX_OPEN: Final = 400  # of all nodes; a process may have as few as 1,024 descriptors
_MAX_OPEN_NODE: Final = 3
# Linger 0: an accepted connection is reset at once, and leaves no TIME_WAIT here.
_LINGER: Final = struct.pack("ii", 1, 0)


class Reach:
    """Whether hosts answer now: each call asks once more, and tells of the last REACH_S.

    A host that answers hears what we send it, whatever runs there.
    """

    def __init__(self, port: int) -> None:
        self._check = KernelCheck(port)
        self._answered_s: dict[str, float] = {}

    def __call__(self, name: str, address: Address) -> bool:
        """Ask the host `address`, known as `name`."""
        now_s = time.monotonic()
        if self._check.ask(name, address, now_s):
            self._answered_s[name] = now_s
        self._answered_s.update(dict.fromkeys(self._check.poll(now_s), now_s))
        return now_s - self._answered_s.get(name, -math.inf) <= REACH_S


class KernelCheck:
    """The open attempts. `ask` starts one, `poll` returns the names of those that were answered."""

    def __init__(self, port: int) -> None:
        self.asked = 0
        self._port = port
        self._poll = select.poll()
        self._open: dict[int, tuple[socket.socket, str, float]] = {}
        self._count: Counter[str] = Counter()

    def ask(self, name: str, address: Address, now_s: float) -> bool:
        """Start an attempt. Returns True if it was answered at once (a node on this host)."""
        if len(self._open) >= _MAX_OPEN or self._count[name] >= _MAX_OPEN_NODE:
            return False
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            attempt = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no more descriptors, or no IPv6: not asked
            return False
        self.asked += 1
        attempt.setblocking(False)
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        prefer(attempt)
        try:
            error = attempt.connect_ex((str(address), self._port))
        except OSError as refused:
            error = refused.errno or 0
        if error == errno.EINPROGRESS:
            self._open[attempt.fileno()] = (attempt, name, now_s)
            self._count[name] += 1
            self._poll.register(attempt, select.POLLOUT)
            return False
        attempt.close()
        return error in (0, errno.ECONNREFUSED)

    def poll(self, now_s: float) -> tuple[str, ...]:
        """Collect answers, give up what is older than LIMIT_S."""
        if not self._open:
            return ()
        alive: list[str] = []
        for descriptor, _ in self._poll.poll(0):
            attempt, name, _ = self._open[descriptor]
            error = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error in (0, errno.ECONNREFUSED, errno.ECONNRESET):
                alive.append(name)
            self._close(descriptor)
        self._give_up(d for d, (_, _, at_s) in self._open.items() if now_s - at_s > LIMIT_S)
        return tuple(alive)

    def close(self) -> None:
        """Close every attempt."""
        self._give_up(self._open)

    def _give_up(self, descriptors: Iterable[int]) -> None:
        for descriptor in list(descriptors):
            self._close(descriptor)

    def _close(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        attempt, name, _ = self._open.pop(descriptor)
        attempt.close()
        self._count[name] -= 1
        if not self._count[name]:
            del self._count[name]
