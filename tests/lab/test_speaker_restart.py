"""BGP graceful restart (`gracefulRestart`) against real FRR: what a switch keeps, and what ends it.

FRR 8.4 clears one stale path of each prefix only (FRR #17372), so here an EIP has one path. With
several it takes another FRR: LBCTL_FRR_ROOT=DIR, a tree with a newer one (docs/operations.md).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath

import pytest

from lbctl.core.keys import Keys
from tests.routes import by_prefix

from .speaker_bed import SPEAKER, SWITCH6, Bed, expected, frr_config, path, path6, peer
from .test_speaker_session import Other, neighbor, settle, speaking, until

ROOT = os.environ.get("LBCTL_FRR_ROOT")
LONG_S = 120


@pytest.fixture
def bed(tmp_path: FilePath) -> Iterator[Bed]:
    """A bed with two peers of one FRR, IPv4 and IPv6."""
    made = Bed(tmp_path, FilePath(ROOT) if ROOT else None)
    made.config = frr_config(ipv6_peer=True)
    try:
        made.open()
        yield made
    finally:
        made.close()


@contextmanager
def watching(bed: Bed) -> Iterator[list[str]]:
    """Routes that are deleted from the switch's kernel, or replaced, until the end."""
    command = ["ip", "-n", bed.switch, "-o", "monitor", "route"]
    seen: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        try:
            yield seen
        finally:
            monitor.terminate()
            assert monitor.stdout is not None
            seen += [line for line in monitor.stdout.read().splitlines() if "proto bgp" in line]


async def test_routes_stay_while_the_speaker_restarts(bed: Bed) -> None:
    """SIGKILL and start: no route moves; what is no longer wanted goes with End-of-RIB."""
    bed.start_speaker()
    paths = {path(eip, 1) for eip in range(50)} | {path6(eip, 1) for eip in range(50)}
    there = {f"198.51.0.{eip}" for eip in range(50)}
    async with speaking(bed) as port:
        await settle(port, port.set([peer(graceful_restart_s=LONG_S)], by_prefix(paths)))
        await until(lambda: bed.kernel().keys() == there, "the routes")
        await until(lambda: len(bed.kernel(6)) == 50, "those of IPv6")
        with watching(bed) as moved:
            bed.stop("speaker", signal.SIGKILL)
            await until(lambda: neighbor(bed)["bgpState"] != "Established", "the session's end")
            fewer = paths - {path(7, 1), path6(8, 1)}
            number = port.set([peer(graceful_restart_s=LONG_S)], by_prefix(fewer))
            bed.start_speaker()
            await settle(port, number)
            await until(lambda: bed.kernel().keys() == there - {"198.51.0.7"}, "End-of-RIB")
            await until(lambda: len(bed.kernel(6)) == 49, "that of IPv6")
        gone = {line.split()[1] for line in moved if line.startswith("Deleted")}
        assert gone == {"198.51.0.7", "2001:db8:100::8"}, moved


async def test_what_does_not_come_back_goes_after_the_restart_time(bed: Bed) -> None:
    """A manager that does not know yet what it wants starts no session and ends no restart."""
    bed.start_speaker()
    short_s = 2
    async with speaking(bed) as port:
        number = port.set([peer(graceful_restart_s=short_s)], by_prefix({path(1, 1)}))
        await settle(port, number)
        await until(bed.kernel, "the route")
    killed_s = time.monotonic()
    bed.stop("speaker", signal.SIGKILL)
    await until(lambda: neighbor(bed)["bgpState"] != "Established", "the session's end")
    assert bed.kernel(), "kept"
    bed.start_speaker()
    async with speaking(bed) as port:
        await until(lambda: port.connected, "a manager that does not know yet")
        await until(lambda: not bed.kernel(), "the end of the restart time")
    assert time.monotonic() - killed_s > short_s - 1


async def test_who_ends_on_purpose_takes_the_routes_along(bed: Bed) -> None:
    """With Cease, at once, whatever was negotiated: peers that go, silence, SIGTERM."""
    bed.start_speaker()
    keys, paths = Keys(secrets.token_bytes(32)), frozenset({path(1, 1)})
    graceful = peer(graceful_restart_s=LONG_S)
    other_peer = peer("tor6", address=SWITCH6, router_id=SPEAKER)
    async with speaking(bed, ring=keys.managers()) as port:
        for peers in ([other_peer], []):
            await settle(port, port.set([graceful], by_prefix(paths)))
            await until(bed.kernel, "the route")
            port.set(peers, by_prefix(()))
            await until(lambda: not bed.kernel(), "the route to go with its peer")
        await settle(port, port.set([graceful], by_prefix(paths)))
        await until(bed.kernel, "the route")
    other = Other(bed, keys)
    beating = asyncio.create_task(other.beat())
    await until(lambda: not bed.kernel(), "the route to go beside a living manager")
    beating.cancel()
    other.socket.close()
    async with speaking(bed) as port:
        await settle(port, port.set([graceful], by_prefix(paths)))
        await until(bed.kernel, "the route of the manager that speaks again")
        await asyncio.to_thread(bed.stop, "speaker")
        await until(lambda: not bed.kernel(), "the route to go after SIGTERM")
    await until(lambda: ended(bed) == "Cease/Administrative Shutdown", "its word")


def ended(bed: Bed) -> object:
    """The switch's reason for the last session's end, as far as one was told."""
    return neighbor(bed).get("lastNotificationReason")


@pytest.mark.skipif(ROOT is None, reason="LBCTL_FRR_ROOT names no tree with FRR 9.1 or newer")
async def test_all_stale_next_hops_of_a_prefix_go(bed: Bed) -> None:
    """ADD-PATH, four next hops; two of the nodes are gone when the speaker is back."""
    bed.start_speaker()
    paths = frozenset(one(eip, n) for one in (path, path6) for eip in range(50) for n in range(4))
    fewer = frozenset(p for p in paths if p.node in ("node-0", "node-3"))
    async with speaking(bed) as port:
        await settle(port, port.set([peer(graceful_restart_s=LONG_S)], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the load")
        bed.stop("speaker", signal.SIGKILL)
        await until(lambda: neighbor(bed)["bgpState"] != "Established", "the session's end")
        assert bed.routes() == expected(paths), "kept"
        number = port.set([peer(graceful_restart_s=LONG_S)], by_prefix(fewer))
        bed.start_speaker()
        await settle(port, number)
        await until(lambda: bed.routes() == expected(fewer), "End-of-RIB")
        await until(lambda: bed.routes(6) == expected(fewer, version=6), "that of IPv6")
        hops = {"10.99.0.20", "10.99.0.23"}
        await until(lambda: all(had == hops for had in bed.kernel().values()), "the kernel")
