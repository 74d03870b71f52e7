"""What daemons and switches say to each other goes before data: DSCP CS6 and a priority.

Why: behind the data of a full uplink a probe's answer would come late or not at all, and a busy
node would be taken for dead; a session could miss its hold time.

Source: RFC 4594, 3.1 (network control); RFC 4271, appendix E (BGP); tc-prio(8).
"""

from __future__ import annotations

import socket
from typing import Final

from lbctl.core.names import FIRST

CS6: Final = 48 << 2  # as TOS or traffic class: for switches that sort by it


def prefer(of: socket.socket) -> None:
    """Let what is sent go first, of both families where the socket has both. Raises OSError."""
    of.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, CS6)
    if of.family == socket.AF_INET6:
        of.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, CS6)
    of.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, FIRST)  # last: a TOS sets one too
