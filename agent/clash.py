"""Looks at what others on this node use: policy rules, routes, sockets, VXLAN devices, chains.

Rules: a look changes nothing and is cheap enough for once a minute; `lbctl.core.clash` judges. What
cannot be read is left out and logged: a look never disturbs the forwarding. Not seen are the chains
of iptables-legacy, which nftables does not show.

Source: proc_pid_net(5), include/uapi/linux/fib_rules.h.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import structlog

from agent import tunnel
from agent.nfnetlink import Nfnetlink
from agent.routes import Routes
from lbctl.core.clash import PORTS, Clash, Surroundings, clashes
from lbctl.core.names import TUNNEL_PORT
from lbctl.errors import DataplaneError

EVERY_S: Final = 60.0
_PROC: Final = Path("/proc/net")
_LISTENING: Final = "0A"
_log = structlog.get_logger()


class Lookout:
    """Keeps what clashes with us. numbers: gives those of the nodes that are steered to."""

    def __init__(self, routes: Routes, numbers: Callable[[], tuple[int, ...]]) -> None:
        self._routes = routes
        self._numbers = numbers
        self._clashes: tuple[Clash, ...] = ()
        # Reading every node's table takes half a second: again only when the kernel says so.
        self._read: tuple[object, tuple[tuple[int, int, str], ...]] = None, ()

    @property
    def clashes(self) -> tuple[Clash, ...]:
        """What was found last."""
        return self._clashes

    async def run(self, ready: asyncio.Event) -> None:
        """Look for ever, first when `ready` is set."""
        await ready.wait()
        while True:
            try:
                await self.look()
            except DataplaneError as error:
                _log.warning("surroundings_unknown", error=str(error))
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Look once."""
        numbers = self._numbers()
        seen = Surroundings(
            rules=await self._routes.foreign_rules(),
            routes=await self._foreign_routes(numbers),
            ports=await asyncio.to_thread(taken_ports),
            vxlans=await self._routes.foreign_tunnels(),
            closed=await asyncio.to_thread(_closed),
        )
        found = clashes(seen, numbers)
        if found != self._clashes:
            self._clashes = found
            _log.warning("clashes", found=[clash.text for clash in found])

    async def _foreign_routes(self, numbers: tuple[int, ...]) -> tuple[tuple[int, int, str], ...]:
        state = self._routes.notices.routes(), numbers
        if self._read[0] != state:
            self._read = state, await self._routes.foreign_routes(numbers)
        return self._read[1]


def _closed() -> tuple[str, ...]:
    with closing(Nfnetlink()) as link:
        return link.closed_forwards()


def taken_ports() -> tuple[tuple[str, int], ...]:
    """Which of PORTS sockets of other processes hold."""
    own = _own_sockets()
    found = set()
    for protocol, number, inode in _sockets():
        # Our device's socket is the kernel's, and shows up as anybody's.
        ours = inode in own or (number == TUNNEL_PORT and tunnel.index() is not None)
        if (protocol, number) in PORTS and not ours:
            found.add((protocol, number))
    return tuple(sorted(found))


def _own_sockets() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(str(entry.readlink()).removeprefix("socket:[").rstrip("]"))
    return found


def _sockets() -> Iterator[tuple[str, int, str]]:
    """Protocol, local port and inode of the sockets that wait for packets."""
    for name in ("udp", "udp6", "tcp", "tcp6"):
        with suppress(OSError):
            for line in (_PROC / name).read_text().splitlines()[1:]:
                words: list[Any] = line.split()
                if name.startswith("udp") or words[3] == _LISTENING:
                    yield name[:3], int(words[1].rsplit(":", 1)[1], 16), words[9]
