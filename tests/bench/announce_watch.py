"""When do this namespace's kernel routes have what is expected? `… announce_watch COUNT HOPS`.

Prints `ready`, and once COUNT IPv4 host routes have HOPS next hops each, the monotonic time of
that. It follows the kernel's own notifications (rtnetlink(7)), every 5 ms.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Final

NETLINK_ROUTE, RTMGRP_IPV4_ROUTE, SO_RCVBUFFORCE = 0, 0x40, 33
RTM_NEWROUTE, RTM_DELROUTE, RTA_DST, RTA_MULTIPATH = 24, 25, 1, 9
LOOK_S: Final = 0.005
HOST: Final = 32


def attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each attribute."""
    while start + 4 <= end:
        length, number = struct.unpack_from("=HH", data, start)
        yield number, start + 4, start + length
        start += (length + 3) & ~3


def hops(data: bytes, start: int, end: int) -> int:
    """How many next hops an RTA_MULTIPATH has."""
    count = 0
    while start < end:
        start += (struct.unpack_from("=H", data, start)[0] + 3) & ~3
        count += 1
    return count


def main() -> None:
    """Watch."""
    count, wanted = map(int, sys.argv[1:])
    found: set[bytes] = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as watch:
        watch.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 256 << 20)
        watch.bind((0, RTMGRP_IPV4_ROUTE))
        watch.setblocking(False)
        print("ready", flush=True)
        while len(found) < count:
            time.sleep(LOOK_S)
            with contextlib.suppress(BlockingIOError):
                while True:
                    take(watch.recv(1 << 16), wanted, found)
        print(time.monotonic(), flush=True)


def take(data: bytes, wanted: int, found: set[bytes]) -> None:
    """One notification."""
    length, kind = struct.unpack_from("=IH", data)
    if kind not in (RTM_NEWROUTE, RTM_DELROUTE) or data[17] != HOST:
        return
    parts = {number: (start, end) for number, start, end in attributes(data, 28, length)}
    destination = data[slice(*parts[RTA_DST])]
    paths = hops(data, *parts[RTA_MULTIPATH]) if RTA_MULTIPATH in parts else 1
    if kind == RTM_NEWROUTE and paths == wanted:
        found.add(destination)
    else:
        found.discard(destination)


if __name__ == "__main__":
    main()
