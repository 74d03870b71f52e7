"""UDP sockets of both daemons: one socket for IPv4 and IPv6 where the kernel has IPv6.

Rule: addresses go in and out as `ipaddress` objects; the mapped form stays in here.
"""

from __future__ import annotations

import socket
from typing import Final

from lbctl.core.model import Address
from lbctl.precedence import prefer

_BUFFER: Final = 1 << 20  # a thousand answers at once must not be lost while we are not scheduled
_BATCH: Final = 4096


class UdpSocket:
    """A non-blocking UDP socket bound to a port. Raises OSError when the port cannot be had."""

    def __init__(self, host: str = "", port: int = 0) -> None:
        """host: an address to bind to, "" for all; port 0: any free one."""
        self._v6 = ":" in host or (not host and _has_ipv6())
        self.socket = socket.socket(
            socket.AF_INET6 if self._v6 else socket.AF_INET, socket.SOCK_DGRAM
        )
        try:
            self.socket.setblocking(False)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            if self._v6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            prefer(self.socket)
            self.socket.bind((host, port))
        except OSError:
            self.socket.close()
            raise

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self.socket.getsockname()[1])

    def target(self, address: Address, port: int) -> tuple[str, int]:
        """Return what `send` takes for a destination."""
        mapped = self._v6 and address.version == 4
        return (f"::ffff:{address}" if mapped else str(address), port)

    def send(self, data: bytes, target: tuple[str, int]) -> bool:
        """Send at once or not at all; returns whether the kernel took it."""
        try:
            self.socket.sendto(data, target)
        except OSError:  # full buffer, no route, ICMP error of an earlier one: like a lost packet
            return False
        return True

    def receive(self) -> list[tuple[bytes, tuple[str, int]]]:
        """Return what has arrived, with where to answer to."""
        batch: list[tuple[bytes, tuple[str, int]]] = []
        while len(batch) < _BATCH:
            try:
                data, source = self.socket.recvfrom(2048)
            except BlockingIOError:
                break
            except OSError:  # a pending ICMP error; reading it clears it
                continue
            batch.append((data, (source[0], source[1])))
        return batch

    def close(self) -> None:
        """Close it."""
        self.socket.close()


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True
