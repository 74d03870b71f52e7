"""`lbctl-relay`: ExaBGP's API process. It moves lines between ExaBGP and the launcher, no more.

ExaBGP blocks, keepalives included, when nobody reads its answers, so this process always reads: if
the launcher does not, answers wait in memory (the launcher keeps few commands in flight, so they
are few), and beyond `LIMIT` the connection is dropped for a new one. Knowledge of what ExaBGP holds
is kept in the launcher, which lives as long as ExaBGP does; so this process may die at any time.
Standard library only: it starts quickly, and ExaBGP starts it again by itself.

Usage: relay SOCKET. Ends when ExaBGP closes its standard input, or the launcher its socket.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from typing import Final

CHUNK: Final = 1 << 16
LIMIT: Final = 64 << 20


class Pump:
    """One direction: what was read and is not written yet."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.waiting = bytearray()

    def read(self) -> bool:
        """Take what there is; False at the end."""
        try:
            data = os.read(self.source, CHUNK)
        except BlockingIOError:
            return True
        self.waiting += data
        return bool(data) and len(self.waiting) <= LIMIT

    def write(self) -> None:
        """Give what the other side takes now."""
        if self.waiting:
            try:
                del self.waiting[: os.write(self.target, self.waiting)]
            except BlockingIOError:
                return


def pump(stdin: int, stdout: int, link: socket.socket) -> None:
    """Move bytes both ways until one side ends. OSError if one breaks."""
    pumps = (Pump(stdin, link.fileno()), Pump(link.fileno(), stdout))
    for descriptor in (stdin, stdout, link.fileno()):
        os.set_blocking(descriptor, False)
    with selectors.DefaultSelector() as selector:
        while True:
            selector.register(stdin, selectors.EVENT_READ)
            wanted = selectors.EVENT_READ
            if pumps[0].waiting:
                wanted |= selectors.EVENT_WRITE
            selector.register(link, wanted)
            if pumps[1].waiting:
                selector.register(stdout, selectors.EVENT_WRITE)
            ready = {key.fd: events for key, events in selector.select()}
            for one in pumps:
                if ready.get(one.target, 0) & selectors.EVENT_WRITE:
                    one.write()
                if ready.get(one.source, 0) & selectors.EVENT_READ and not one.read():
                    return
            for key in list(selector.get_map().values()):
                selector.unregister(key.fileobj)


def main() -> int:
    """Connect and pump. Exit code 0 when a side ended, 1 when the launcher is not there."""
    if len(sys.argv) != 2:
        print("usage: lbctl-relay SOCKET", file=sys.stderr)
        return 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(sys.argv[1])
            pump(0, 1, link)
        except OSError as error:
            print(f"lbctl-relay: {sys.argv[1]}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
