"""A flood at one address: SYNs or datagrams from many made-up senders, bounded in rate and time.

Runs inside the client (`python -m lbctl.lab.flooding`), IPv4 only. The senders are of 198.18.0.0/15
(RFC 2544), which nobody in a lab has, so nothing answers what comes back. Prints how many it sent.
"""

from __future__ import annotations

import argparse
import socket
import struct
import sys
import time
from typing import Final, Literal

Kind = Literal["syn", "udp"]
MOST_PER_S: Final = 20_000
MOST_S: Final = 60.0
_SENDERS: Final = 0xC6120000  # 198.18.0.0
_TICK_S: Final = 0.005
_PROTOCOL: Final = {"syn": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


def packet(kind: Kind, number: int, target: bytes, port: int) -> bytes:
    """The packet of that number: its sender and port follow from it; checksums are right."""
    sender = struct.pack("!I", _SENDERS + number % 0x20000)
    own_port = 1024 + number % 60000
    if kind == "syn":
        body = struct.pack("!HHIIBBHHH", own_port, port, number, 0, 0x50, 0x02, 64000, 0, 0)
        at = 16
    else:
        body = struct.pack("!HHHH", own_port, port, 8, 0)
        at = 6
    pseudo = sender + target + struct.pack("!BBH", 0, _PROTOCOL[kind], len(body))
    body = body[:at] + struct.pack("!H", checksum(pseudo + body)) + body[at + 2 :]
    # the kernel fills in the header's checksum and identification (raw(7))
    length = 20 + len(body)
    head = struct.pack("!BBHHHBBH", 0x45, 0, length, 0, 0, 64, _PROTOCOL[kind], 0)
    return head + sender + target + body


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def send(kind: Kind, host: str, port: int, rate: int, seconds: float) -> int:
    """Send at this rate, spread evenly; how many. What cannot be sent in time is left out."""
    target = socket.inet_aton(host)
    sent = tried = 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as wire:
        begin_s = time.monotonic()
        while (passed_s := time.monotonic() - begin_s) < seconds:
            due = int(passed_s * rate)
            tried = max(tried, due - rate // 10)  # a stall is not made up for by a burst
            while tried < due:
                tried += 1
                try:
                    wire.sendto(packet(kind, tried, target, port), (host, 0))
                    sent += 1
                except OSError:  # no room in the queue
                    break
            time.sleep(_TICK_S)
    return sent


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Flood an address, bounded.")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--kind", choices=("syn", "udp"), default="syn")
    parser.add_argument("--rate", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    a = parser.parse_args(sys.argv[1:])
    rate, seconds = min(a.rate, MOST_PER_S), min(a.seconds, MOST_S)
    print(send(a.kind, a.host, a.port, rate, seconds), flush=True)


if __name__ == "__main__":
    main()
