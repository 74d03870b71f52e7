"""Counts what the kernel says of changes to links, addresses, routes, rules and neighbours.

Reading 100 nodes' routes and rules takes a tenth of a second; they are compared again only when
something was said since.
Rules: a notice is never interpreted, it only makes somebody look: what is looked at counts. Notices
that the kernel had to drop (ENOBUFS) count as one. Some come just before what they speak of: who
relies on them looks now and then all the same.

Source: netlink(7); include/uapi/linux/rtnetlink.h (RTNLGRP_*).
"""

from __future__ import annotations

import errno
import socket
from typing import Final

# By bit: links 1; IPv4 addresses 5, routes 7, rules 8; IPv6 addresses 9, routes 11, rules 19.
_ROUTES: Final = sum(1 << (group - 1) for group in (1, 5, 7, 8, 9, 11, 19))
_NEIGHBOURS: Final = 1 << (3 - 1)


class Notices:
    """How often the kernel has said something: while a count stays, all is as it was."""

    def __init__(self) -> None:
        self._routes = _Listener(_ROUTES)
        self._neighbours = _Listener(_NEIGHBOURS)

    def routes(self) -> int:
        """Of links, addresses, routes and rules."""
        return self._routes.count()

    def neighbours(self) -> int:
        """Of neighbours and forwarding entries."""
        return self._neighbours.count()

    def close(self) -> None:
        """Close the sockets."""
        self._routes.close()
        self._neighbours.close()


class _Listener:
    def __init__(self, groups: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, groups))
        self._socket.setblocking(False)
        self._count = 0

    def count(self) -> int:
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return self._count
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            self._count += 1

    def close(self) -> None:
        self._socket.close()
