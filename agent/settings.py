"""Kernel settings that forwarding depends on: one is set, the others are checked and said.

Rule: /proc/sys is read-only for the agent; IFLA_INET_CONF needs no more than CAP_NET_ADMIN.

Source: networking/ip-sysctl.rst of the kernel; include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from lbctl.errors import DataplaneError

_LOOSE: Final = 2
_SYSCTL: Final = Path("/proc/sys/net")
_NEEDED: Final = (
    ("ipv4/ip_forward", "1", "packets for pods and other nodes are not forwarded"),
    (
        "netfilter/nf_conntrack_tcp_loose",
        "1",
        "established connections do not survive a change of endpoints",
    ),
)
_NEEDED_FOR_IPV6: Final = (
    ("ipv6/conf/all/forwarding", "1", "IPv6 packets for pods and other nodes are not forwarded"),
)


def has_ipv6() -> bool:
    """Whether this kernel has IPv6 at all."""
    return (_SYSCTL / "ipv6").exists()


async def loosen(interfaces: Iterable[tuple[str, int]]) -> int:
    """Set rp_filter=2 on these interfaces (name, index); how many had to be changed."""
    changed = 0
    for name, index in interfaces:
        try:
            now = int((_SYSCTL / "ipv4/conf" / name / "rp_filter").read_text())
            if now != _LOOSE:
                await asyncio.to_thread(_set_devconf, index, 8, _LOOSE)
                changed += 1
        except OSError as error:
            raise DataplaneError(f"rp_filter of {name}: {error}") from error
    return changed


def problems(ipv6: bool) -> tuple[str, ...]:
    """Return in words which kernel settings are wrong and what that breaks."""
    found = []
    for path, wanted, otherwise in (*_NEEDED, *(_NEEDED_FOR_IPV6 if ipv6 else ())):
        with suppress(OSError):
            now = (_SYSCTL / path).read_text().strip()
            if now != wanted:
                name = "net." + path.replace("/", ".")
                found.append(f"{name} is {now}, not {wanted}: {otherwise}")
    return tuple(found)


def _set_devconf(index: int, number: int, value: int) -> None:
    """RTM_SETLINK with one IPV4_DEVCONF value; pyroute2 does not encode them."""
    conf = _nla(1 | 0x8000, _nla(number, struct.pack("=I", value)))  # IFLA_INET_CONF
    spec = _nla(26 | 0x8000, _nla(socket.AF_INET | 0x8000, conf))  # IFLA_AF_SPEC
    body = struct.pack("=BBHiII", 0, 0, 0, index, 0, 0) + spec
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.settimeout(5.0)
        link.send(struct.pack("=IHHII", 16 + len(body), 19, 5, 1, 0) + body)
        (code,) = struct.unpack_from("=i", link.recv(4096), 16)
    if code:
        raise OSError(-code, "RTM_SETLINK refused")


def _nla(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)
