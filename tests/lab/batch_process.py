"""In a namespace of its own: write states by netlink batches, as the agent does.

`python -m tests.lab.batch_process` reads numbers of states, one a line, and answers each with what
went wrong, a JSON string; "" for nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from ipaddress import ip_address, ip_network

import structlog

from agent.dataplane import Dataplane
from agent.nfnetlink import BatchWriter, Nfnetlink
from lbctl.core import nfbatch, nft
from lbctl.core.elements import WHOLE, Delta, PortKey
from lbctl.core.model import Address, Protocol
from lbctl.core.nodeview import PortElements, Target
from lbctl.core.sticky import sticky
from lbctl.errors import DataplaneError

OLDER = -2
FOUR, SIX = ip_address("198.51.100.1"), ip_address("2001:db8:100::1")


def port(
    address: Address, protocol: Protocol, number: int, size: int, turn: int
) -> tuple[PortKey, PortElements]:
    """A port with every kind of entry. turn: another one gives other entries."""
    pods = (("10.244.1.2", 8080), ("10.244.1.3", 65535))
    six = (("fd00:10:244:1::2", 8080), ("fd00:10:244:1::3", 65535))
    chosen = pods if address.version == 4 else six
    found: tuple[Target, ...] = tuple((ip_address(a), p) for a, p in chosen)
    targets: tuple[Target, ...] = (None, 1, *found, 7)
    now = bytes((b + turn) % 5 for b in range(size))
    past = bytes((0, 1, 4)[(3 * b + turn) % 5 % 3] for b in range(4 * size))  # no pods
    closed = (turn + number) % 2 == 0
    pods_here = [target for target in found if isinstance(target, tuple)]
    pinned = sticky(10 + turn, pods_here, (1, 7)) if number % 3 == 0 or turn % 2 else None
    head = (address, protocol, number, pinned, closed)
    made = PortElements(*head, targets, now, past, bytes((2, 3) * 4) if turn % 3 else b"")
    return (address, protocol.value, number), made


def states() -> list[nft.Ruleset]:
    """A ruleset of both families, a later one, one with nothing, and one with big tables."""
    base = nft.Ruleset(
        1,
        ("eth0",),
        ("02:00:00:00:00:02",),
        ((FOUR, FOUR + 9), (SIX, SIX + 9)),
        dict(
            port(address, protocol, number, 40, number)
            for address in (FOUR, SIX)
            for protocol in Protocol
            for number in (80, 443)
        ),
        {FOUR: (ip_network("203.0.113.0/24"),), SIX: (ip_network("2001:db8:3::/64"),)},
    )
    later = dict(
        port(address, protocol, number, 160 if protocol is Protocol.UDP else 40, number + 1)
        for address in (FOUR, SIX)
        for protocol in Protocol
        for number in (80, 81)
    )
    wide = dict(port(FOUR + n, Protocol.TCP, 80, 640, n) for n in range(2))
    return [
        base,
        replace(base, generation=2, ports=later, silent=(2, 3)),
        replace(base, generation=3, ports={}, uplinks=("eth0", "eth1"), silent=(3,)),
        replace(base, generation=4, ports=wide, sources={}, silent=(1, 3)),
    ]


def stages(number: int) -> list[nft.Ruleset]:
    """A state; the first one by way of another, as a node that has nothing loads it."""
    wanted = states()[number]
    half = dict(list(wanted.ports.items())[::2])
    return [replace(wanted, ports=half, sources={}), wanted] if number == 0 else [wanted]


def adopt_from_older() -> None:
    """What an agent does that was upgraded: it finds the first state, with other chains."""
    wanted = states()[0]
    seen = tuple(one.shape() if (one := Nfnetlink().fingerprint(v)) else None for v in (4, 6))
    upgraded = Dataplane()
    assert upgraded.adopt(wanted, f"0123 {seen!r}")
    assert not upgraded.damaged()
    assert Dataplane().adopt(wanted, upgraded.shape)


async def take(dataplane: Dataplane, number: int) -> None:
    """Set a state; -1 adds one element and deletes another that is not there, OLDER: see there."""
    if number == OLDER:
        adopt_from_older()
    elif number < 0:
        key = (FOUR, "TCP", 4711)
        (batch,) = nfbatch.pieces([[Delta(key, "svc", [], [WHOLE], b"\0", ["flow40"])]])
        batch.deleted = next(nfbatch.pieces([[Delta(key, "steer", [3])]])).deleted
        BatchWriter().send(batch)
    else:
        assert await dataplane.set(stages(number))
        assert not dataplane.damaged()


def main() -> None:
    """Take each state, and say what went wrong."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    dataplane = Dataplane()
    for line in sys.stdin:
        said = ""
        try:
            asyncio.run(take(dataplane, int(line)))
        except DataplaneError as error:
            said = str(error)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
