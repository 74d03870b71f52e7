"""Packets as bytes, for tests that send what no socket would: options, ICMP errors, forgeries.

Addresses are text; the family follows from them. Checksums are right.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
SYN, RST, ACK = 0x02, 0x04, 0x10
UNREACHABLE, EXCEEDED, PROBLEM, TOO_BIG, ECHO = (
    "unreachable",
    "exceeded",
    "problem",
    "too big",
    "echo",
)
# (type, code) by family
_KINDS = {
    UNREACHABLE: {4: (3, 3), 6: (1, 4)},
    EXCEEDED: {4: (11, 0), 6: (3, 0)},
    PROBLEM: {4: (12, 0), 6: (4, 0)},
    TOO_BIG: {4: (3, 4), 6: (2, 0)},
    ECHO: {4: (8, 0), 6: (128, 0)},
}


def version(address: str) -> int:
    return ip_address(address).version


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _summed(source: str, target: str, protocol: int, body: bytes, place: int) -> bytes:
    src, dst = ip_address(source).packed, ip_address(target).packed
    if len(src) == 4:
        pseudo = src + dst + struct.pack("!BBH", 0, protocol, len(body))
    else:
        pseudo = src + dst + struct.pack("!IxxxB", len(body), protocol)
    if protocol == ICMP:
        pseudo = b""
    return body[:place] + struct.pack("!H", checksum(pseudo + body)) + body[place + 2 :]


def tcp(source: str, port: int, target: str, to_port: int, flags: int = SYN) -> bytes:
    body = struct.pack("!HHIIBBHHH", port, to_port, 1000, 2000, 0x50, flags, 64000, 0, 0)
    return ip(source, target, TCP, _summed(source, target, TCP, body, 16))


def udp(source: str, port: int, target: str, to_port: int, data: bytes = b"") -> bytes:
    body = struct.pack("!HHHH", port, to_port, 8 + len(data), 0) + data
    return ip(source, target, UDP, _summed(source, target, UDP, body, 6))


def icmp(source: str, target: str, kind: str, word: int, data: bytes) -> bytes:
    """word: the second 32 bits of the header: MTU, or identifier and sequence."""
    family = version(target)
    number, code = _KINDS[kind][family]
    protocol = ICMP if family == 4 else ICMPV6
    body = struct.pack("!BBHI", number, code, 0, word) + data
    return ip(source, target, protocol, _summed(source, target, protocol, body, 2))


def ip(source: str, target: str, protocol: int, body: bytes, hops: int = 64) -> bytes:
    src, dst = ip_address(source).packed, ip_address(target).packed
    if len(src) == 16:
        return struct.pack("!IHBB16s16s", 6 << 28, len(body), protocol, hops, src, dst) + body
    return _header4(0x45, len(body), protocol, hops, src, dst) + body


def _header4(
    first: int, size: int, protocol: int, hops: int, src: bytes, dst: bytes, options: bytes = b""
) -> bytes:
    total = 20 + len(options) + size
    head = struct.pack("!BBHHHBBH4s4s", first, 0, total, 1, 0, hops, protocol, 0, src, dst)
    head += options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:]


def odd(packet: bytes) -> bytes:
    """The same packet with an IPv4 option, or an IPv6 destination options header."""
    if packet[0] >> 4 == 4:
        head = (0x46, len(packet) - 20, packet[9], packet[8], packet[12:16], packet[16:20])
        return _header4(*head, options=b"\x01\x01\x01\x00") + packet[20:]
    extension = bytes((packet[6], 0, 1, 4, 0, 0, 0, 0))
    size = struct.pack("!H", len(packet) - 40 + len(extension))
    return packet[:4] + size + b"\x3c" + packet[7:40] + extension + packet[40:]


def with_hops(packet: bytes, hops: int) -> bytes:
    """The same packet with another TTL or hop limit."""
    if packet[0] >> 4 == 6:
        return packet[:7] + bytes((hops,)) + packet[8:]
    head = packet[:8] + bytes((hops,)) + packet[9:10] + b"\0\0" + packet[12:20]
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + packet[20:]


def frame(packet: bytes, to_mac: str, from_mac: str) -> bytes:
    kind = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
    return bytes.fromhex((to_mac + from_mac).replace(":", "")) + kind + packet


def vxlan(inner: bytes, vni: int) -> bytes:
    """The payload of a VXLAN datagram around an Ethernet frame (RFC 7348)."""
    return struct.pack("!II", 0x08000000, vni << 8) + inner


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET if version(address) == 4 else socket.AF_INET6
