"""Holds what comes to a queue of the kernel for so long, then lets it go on: delay without netem.

Runs inside a machine (`python -m lbctl.lab.delaying --queue N --ms M`), standard library only. A
rule sends packets to the queue (iptables' NFQUEUE; with `--queue-bypass` they pass when nobody is
there), and each is accepted M ms after it came, in order. Says "ready" when the queue is its own;
at the end of its standard input it lets go of all it holds, and ends. Each packet costs a few
dozen microseconds of processor time: for probes and sessions, not for downloads.
Source: linux/netfilter/nfnetlink_queue.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

_NETLINK_NETFILTER: Final = 12
_SUBSYSTEM: Final = 3 << 8  # NFNL_SUBSYS_QUEUE
_PACKET, _VERDICT, _CONFIG = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_ERROR: Final = 2  # NLMSG_ERROR
_REQUEST, _ACK = 0x1, 0x4
_CFG_COMMAND, _CFG_PARAMS, _CFG_MOST = 1, 2, 3  # NFQA_CFG_CMD, _PARAMS, _QUEUE_MAXLEN
_BIND: Final = 1
_COPY_NOTHING: Final = 1  # NFQNL_COPY_META: the packet itself stays in the kernel
_PACKET_HEADER, _VERDICT_HEADER = 1, 2  # NFQA_PACKET_HDR, NFQA_VERDICT_HDR
_ACCEPT: Final = 1
_MOST_HELD: Final = 20_000
_BUFFER: Final = 4 << 20


def message(kind: int, flags: int, queue: int, attribute: int, value: bytes) -> bytes:
    """One netlink message about a queue, with one attribute."""
    body = struct.pack("!BBH", socket.AF_UNSPEC, 0, queue)
    body += struct.pack("=HH", 4 + len(value), attribute) + value.ljust(
        -(-len(value) // 4) * 4, b"\0"
    )
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def numbers(data: bytes) -> Iterator[int]:
    """The numbers of the packets that the kernel announces. Raises OSError if it refused."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if kind == _ERROR:
            (code,) = struct.unpack_from("=i", data, at + 16)
            if code:
                raise OSError(-code, "the kernel refuses the queue")
        elif kind == _PACKET:
            yield from _number(data[at + 20 : at + length])
        at += -(-length // 4) * 4


def _number(attributes: bytes) -> Iterator[int]:
    at = 0
    while at + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if kind & 0x3FFF == _PACKET_HEADER:
            yield struct.unpack_from("!I", attributes, at + 4)[0]
            return
        at += max(4, -(-length // 4) * 4)


def opened(queue: int) -> socket.socket:
    """A socket that has the queue. Raises OSError if it cannot be had."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    sock.bind((0, 0))
    for attribute, value in (
        (_CFG_COMMAND, struct.pack("!BBH", _BIND, 0, 0)),
        (_CFG_PARAMS, struct.pack("!IB", 0, _COPY_NOTHING)),
        (_CFG_MOST, struct.pack("!I", _MOST_HELD)),
    ):
        sock.send(message(_CONFIG, _REQUEST | _ACK, queue, attribute, value))
        list(numbers(sock.recv(65536)))
    return sock


def hold(sock: socket.socket, queue: int, delay_s: float) -> None:
    """Delay until standard input ends."""
    held: deque[tuple[float, int]] = deque()  # when it is due, number
    with selectors.DefaultSelector() as events:
        events.register(sock, selectors.EVENT_READ)
        events.register(sys.stdin, selectors.EVENT_READ)
        ended = False
        while not ended or held:
            left_s = max(0.0, held[0][0] - time.monotonic()) if held else None
            ready = {key.fileobj for key, _ in events.select(left_s)}
            now_s = time.monotonic()
            if sock in ready:
                held += ((now_s + delay_s, number) for number in numbers(sock.recv(65536)))
            if sys.stdin in ready:
                ended = True
                events.unregister(sys.stdin)
            while held and (ended or held[0][0] <= now_s):
                verdict = struct.pack("!II", _ACCEPT, held.popleft()[1])
                sock.send(message(_VERDICT, _REQUEST, queue, _VERDICT_HEADER, verdict))


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue", type=int, required=True)
    parser.add_argument("--ms", type=float, required=True)
    asked = parser.parse_args()
    with opened(asked.queue) as sock:
        print("ready", flush=True)
        hold(sock, asked.queue, asked.ms / 1000)


if __name__ == "__main__":
    main()
