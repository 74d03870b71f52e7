"""Chaos: whatever happens to the speaker and its sessions, the switch ends with what is desired.

Real ExaBGP through launcher, relay and port; real bgpd and zebra. The seed is fixed; an option
lengthens the run and another changes it:

    .venv/bin/pytest -s tests/lab/test_speaker_chaos.py --chaos-s 600 --chaos-seed 7
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath

import pytest

from manager.speaker.port import ExabgpSpeaker
from tests.routes import Route, by_prefix

from . import speaker_bed
from .speaker_bed import Bed, expected, peer

EPISODES = 10  # at least, however slow the machine
EIPS, NODES = 120, 6
QUIET_S = 90.0


@pytest.fixture(params=[True, False], ids=["add-path", "one-path"])
def bed(request: pytest.FixtureRequest, tmp_path: FilePath) -> Iterator[Bed]:
    """A bed with FRR, agreeing to ADD-PATH or not, and the speaker running."""
    made = Bed(tmp_path)
    made.add_path = request.param
    made.config = speaker_bed.frr_config(made.add_path)
    try:
        made.open()
        made.start_speaker()
        yield made
    finally:
        made.close()


class Chaos:
    """Random operations and faults, and what they add up to."""

    def __init__(self, bed: Bed, seed: int) -> None:
        self.bed, self.random = bed, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wanted: dict[tuple[int, int], Route] = {}
        self.speaker: ExabgpSpeaker | None = None
        self.number = 0
        self.faults: dict[str, Callable[[], None]] = {
            "clear": lambda: self._clear("clear bgp *"),
            "soft-clear": lambda: self._clear("clear bgp * soft in"),
            "bgpd-kill": self._kill_bgpd,
            "link-down": self.bed.flap,
            "relay-kill": lambda: self._signal("relay", signal.SIGKILL),
            "exabgp-kill": lambda: self._signal("runner", signal.SIGKILL),
            "exabgp-stop": lambda: self._signal("runner", signal.SIGSTOP),
            "exabgp-pause": self._pause,
            "speaker-kill": self._kill_speaker,
        }

    def operate(self) -> None:
        """Some announces, withdraws and changes, then the new desired state as a whole."""
        for _ in range(self.random.choice((1, 1, 5, 60))):
            key = self.random.randrange(EIPS), self.random.randrange(NODES)
            self.counts["operations"] += 1
            if key in self.wanted and self.random.random() < 0.4:
                del self.wanted[key]
            else:
                self.wanted[key] = self._path(*key)
        if self.random.random() < 0.05:  # a node goes, from everywhere
            gone = self.random.randrange(NODES)
            victims = [key for key in self.wanted if key[1] == gone]
            self.counts["operations"] += len(victims)
            for key in victims:
                del self.wanted[key]
        self.set()

    def _path(self, eip: int, node: int) -> Route:
        med = self.random.choice((None, None, 10, 20))
        words = self.random.choice(((), ("64512:1",), ("64512:1", "64512:2")))
        return speaker_bed.path(eip, node, med, words)

    def set(self) -> None:
        """Hand the desired state to the port, if there is one."""
        if self.speaker is not None:
            self.number = self.speaker.set([peer()], by_prefix(self.wanted.values()))

    def fault(self) -> None:
        """One random fault."""
        names = sorted(self.faults)
        # What ends ExaBGP also ends what could be wrong in it: the rarer fault.
        weights = [
            1 if name in ("exabgp-kill", "exabgp-stop", "speaker-kill") else 4 for name in names
        ]
        (name,) = self.random.choices(names, weights)
        self.counts[name] += 1
        self.faults[name]()

    def _clear(self, command: str) -> None:
        self.bed.vtysh("-d", "bgpd", "-c", command)

    def _kill_bgpd(self) -> None:
        self.bed.stop("bgpd", signal.SIGKILL)
        self.bed.start_frr("bgpd")

    def _signal(self, module: str, number: int) -> None:
        for pid in self.bed.descendants(module):
            os.kill(pid, number)

    def _pause(self) -> None:
        pids = self.bed.descendants("runner")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)

    def _kill_speaker(self) -> None:
        self.bed.stop("speaker", signal.SIGKILL)
        self.bed.start_speaker()

    async def quiet(self) -> None:
        """Nothing happens: the switch must come to what is desired, and stay."""
        desired = expected(frozenset(self.wanted.values()), self.bed.add_path)
        until = time.monotonic() + QUIET_S
        seen = await asyncio.to_thread(self.bed.routes)
        while seen != desired and time.monotonic() < until:
            await asyncio.sleep(0.2)
            seen = await asyncio.to_thread(self.bed.routes)
        missing, stale = len(desired - seen), len(seen - desired)
        self.counts["quiet periods"] += 1
        self.counts["missing"] += missing
        self.counts["stale"] += stale
        log = (self.bed.directory / "speaker.log").read_text()[-4000:]
        assert (missing, stale) == (0, 0), f"{dict(self.counts)}\n{log}"
        assert self.speaker is not None
        async with asyncio.timeout(QUIET_S):
            await self.speaker.settled(self.number)

    async def episode(self) -> None:
        """One life of a manager's port: operations and faults, then quiet."""
        self.counts["manager starts"] += 1
        async with ExabgpSpeaker(self.bed.speaker_directory, "chaos") as self.speaker:
            self.set()
            for _ in range(self.random.randrange(1, 4)):
                for _ in range(self.random.randrange(1, 30)):
                    self.operate()
                    await asyncio.sleep(self.random.choice((0, 0, 0.005, 0.05)))
                if self.random.random() < 0.8:
                    await asyncio.to_thread(self.fault)
                    self.operate()
            if self.random.random() < 0.6:
                await self.quiet()


@pytest.fixture
def chaos_run(request: pytest.FixtureRequest) -> tuple[float, int]:
    """How long in seconds, and the seed; `tests/lab/conftest.py` sets the timeout by the first."""
    return request.config.getoption("--chaos-s"), request.config.getoption("--chaos-seed")


async def test_the_switch_ends_with_what_is_desired(bed: Bed, chaos_run: tuple[float, int]) -> None:
    """Operations and faults at random; after each quiet period 0 missing and 0 stale."""
    seconds, seed = chaos_run
    chaos = Chaos(bed, seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until or chaos.counts["manager starts"] < EPISODES:
        await chaos.episode()
    async with ExabgpSpeaker(bed.speaker_directory, "chaos") as chaos.speaker:
        chaos.set()
        await chaos.quiet()
        chaos.wanted.clear()
        chaos.set()
        await chaos.quiet()
    flaps = sum(chaos.counts[name] for name in chaos.faults)
    counts = dict(sorted(chaos.counts.items()))
    print(f"\nseed {seed}, ADD-PATH {bed.add_path}: {flaps} faults, {counts}")
    assert chaos.counts["quiet periods"] >= 3
    assert flaps >= 3
