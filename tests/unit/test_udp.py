"""Our datagrams ask to be let through first: by their DSCP and in this host's own queue."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from lbctl.core.names import FIRST
from lbctl.precedence import CS6
from lbctl.udp import UdpSocket

LIMIT_S = 30.0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_are_network_control(host: str) -> None:
    address = ip_address(host)
    four = address.version == 4
    family = socket.AF_INET if four else socket.AF_INET6
    level, option = (
        (socket.IPPROTO_IP, socket.IP_RECVTOS)
        if four
        else (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS)
    )
    with socket.socket(family, socket.SOCK_DGRAM) as far:
        far.bind((host, 0))
        far.settimeout(LIMIT_S)
        far.setsockopt(level, option, 1)
        for bound in ("", host):
            near = UdpSocket(bound)
            try:
                assert near.send(b"probe", near.target(address, far.getsockname()[1]))
                _, more, _, _ = far.recvmsg(16, 64)
                assert [data[0] for _, _, data in more] == [CS6]
                assert near.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == FIRST
            finally:
                near.close()
