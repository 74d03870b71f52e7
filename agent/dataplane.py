"""The port to nftables: the whole desired ruleset goes in, the kernel's difference goes out.

Rules: what is confirmed is what the kernel took. nft gets the text of chains and small sets, the
big maps are written by netlink. Several steps are several transactions; the generation that the
last one writes tells a complete table from a half-written one. After an error
the kernel's state counts as unknown and the next attempt writes everything anew. What others did to
our table is seen by its handles and its element counts, never by reading all elements.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Final

import structlog

from agent.nfnetlink import BatchWriter, Fingerprint, Nfnetlink
from lbctl.core import nft
from lbctl.core.nft import Ruleset, SetKey, Step
from lbctl.core.nftfamily import FAMILIES
from lbctl.core.nftrules import TIMEOUT_TRIAL
from lbctl.errors import DataplaneError

NFT_LIMIT_S: Final = 60.0
AHEAD: Final = 8  # steps that wait for the kernel, of about 1 MiB each
_Found = dict[int, Fingerprint | None]  # by IP version
_log = structlog.get_logger()


@dataclass(slots=True)
class Figures:
    """What the metrics show of the data plane."""

    applied: int = 0
    rewritten: int = 0
    failed: int = 0
    last_s: float = 0.0


class Dataplane:
    """Our nftables tables in this network namespace. One caller at a time."""

    def __init__(self) -> None:
        self._netlink = Nfnetlink()
        self._writer = BatchWriter()
        self._sender = ThreadPoolExecutor(1, "kernel")
        self._kernel: Ruleset | None = None  # None: unknown
        self._counted: tuple[Ruleset, dict[SetKey, int]] = (Ruleset(), {})
        self._shape: tuple[object, ...] | None = None
        self._seen = -1
        self.figures = Figures()
        self.lacking: tuple[str, ...] = ()  # what this kernel or nft cannot do, in words

    @property
    def kernel(self) -> Ruleset | None:
        """What the kernel holds, as far as we know."""
        return self._kernel

    def close(self) -> None:
        """Close the netlink sockets; the tables stay."""
        self._sender.shutdown()
        self._netlink.close()
        self._writer.close()

    async def survey(self) -> None:
        """Find out what this kernel and nft lack; before the first `set`."""
        try:
            await asyncio.to_thread(run_nft, TIMEOUT_TRIAL, "--check")
        except DataplaneError as error:
            self.lacking = (
                f"ct timeout objects cannot be used ({error}): unanswered flows stay in"
                " conntrack as long as net.netfilter.nf_conntrack_*_timeout_* say, and a flood"
                " fills more of it",
            )

    @property
    def shape(self) -> str:
        """What tells this incarnation of the table from any other, to be kept for `adopt`."""
        return f"{nft.form()} {self._shape!r}"

    def adopt(self, rules: Ruleset, shape: str) -> bool:
        """Take the kernel's table for `rules`, from before a restart, if it bears its generation.

        shape: as it was then. Returns False if the table is another one, changed, or gone; `set`
        then writes it anew. The chains of another version are written anew here, with all elements
        left as they are.
        """
        wanted = rules.generation & 0xFFFFFFFF
        if any(self._netlink.marker(family.version) != wanted for family in FAMILIES):
            return False
        found = self._fingerprints()
        form, _, seen = shape.partition(" ")
        older = form != nft.form()
        if not self._fits(found, rules, older) or repr(_shape(found)) != seen:
            return False
        if older:
            try:
                run_nft(nft.renewed(rules))
            except DataplaneError as error:
                _log.warning("chains_not_renewed", error=str(error))
                return False
            _log.info("chains_renewed")
            found = self._fingerprints()
        self._kernel, self._shape = rules, _shape(found)
        return True

    def blank(self) -> bool:
        """Whether no complete table of ours, of whatever run, is in the kernel."""
        return all(self._netlink.marker(family.version) is None for family in FAMILIES)

    async def set(self, stages: Iterable[Ruleset]) -> bool:
        """Make the kernel hold the last of `stages`; True if anything had to be written.

        stages: the ruleset that is wanted, or from nothing several, of which each holds all of the
        one before. They are asked for in a thread, while the kernel takes what they made so far.
        Raises DataplaneError, after which the kernel's state is unknown.
        """
        started = time.monotonic()
        known = self._kernel
        self._kernel = None
        try:
            rules, count = await asyncio.to_thread(self._write, known, stages)
            if not count:
                self._kernel = known
                return False
            self._remember(rules, count, fresh=known is None or nft.reshapes(known, rules))
        except DataplaneError:
            self.figures.failed += 1
            raise
        self.figures.applied += 1
        self.figures.rewritten += known is None
        self.figures.last_s = time.monotonic() - started
        return True

    def _write(self, known: Ruleset | None, stages: Iterable[Ruleset]) -> tuple[Ruleset, int]:
        """Runs in a thread. Returns the last of the stages, and how many steps led to it.

        A few steps are made while the kernel takes one; what is not made yet takes no memory.
        """
        rules, count = _Last(stages), 0
        waiting: deque[Future[None]] = deque()
        for step in nft.steps(known, rules, timeouts=not self.lacking):
            last = waiting[-1] if waiting else None
            waiting.append(self._sender.submit(self._take, step, last))
            count += 1
            if len(waiting) > AHEAD:
                waiting.popleft().result()
        for taken in waiting:
            taken.result()
        self._count(rules.last)
        return rules.last, count

    def _take(self, step: Step, last: Future[None] | None) -> None:
        if last is not None:
            last.result()  # after one that failed, none
        if isinstance(step, str):
            run_nft(step)
        else:
            self._writer.send(step)

    def _remember(self, rules: Ruleset, count: int, fresh: bool) -> None:
        before, self._seen = self._seen, self._netlink.generation()
        if not fresh and self._seen == before + count:
            self._kernel = rules  # nobody else wrote meanwhile
            return
        found = self._fingerprints()
        if not self._fits(found, rules):
            raise DataplaneError("someone changed our nftables table while it was written")
        if not fresh and self._shape is not None and _shape(found) != self._shape:
            raise DataplaneError("someone changed our nftables rules")
        self._kernel, self._shape = rules, _shape(found)

    def damaged(self) -> bool:
        """Whether someone else changed our table since. Cheap while nobody touched nftables.

        When it says so the kernel's state counts as unknown: the next `set` repairs it.
        """
        if self._kernel is None:
            return True
        now = self._netlink.generation()
        if now == self._seen:
            return False
        found = self._fingerprints()
        if _shape(found) == self._shape and self._fits(found, self._kernel):
            self._seen = now
            return False
        self._kernel = None
        return True

    def _fingerprints(self) -> _Found:
        return {family.version: self._netlink.fingerprint(family.version) for family in FAMILIES}

    def _count(self, rules: Ruleset) -> None:
        self._counted = (rules, nft.recounted(self._counted[1], self._counted[0], rules))

    def _fits(self, found: _Found, rules: Ruleset, older: bool = False) -> bool:
        """Whether the kernel's sets have as many elements. older: some need not be there."""
        self._count(rules)
        counts = {version: one.counts() if one else {} for version, one in found.items()}
        return all(
            counts[version].get(name, number if older else 0) in (None, number)
            for (version, name), number in sorted(self._counted[1].items())
        )

    def counters(self) -> dict[str, int]:
        """Packets by named counter."""
        return self._netlink.counters()


class _Last:
    """Hands rulesets on, and keeps the last."""

    def __init__(self, stages: Iterable[Ruleset]) -> None:
        self._stages = stages
        self.last = Ruleset()

    def __iter__(self) -> Iterator[Ruleset]:
        for rules in self._stages:
            self.last = rules
            yield rules


def _shape(found: _Found) -> tuple[object, ...]:
    return tuple(one and one.shape() for _, one in sorted(found.items()))


def run_nft(text: str, *options: str) -> None:
    """Give one transaction to nft. Raises DataplaneError with what it said."""
    command = ("nft", *options, "-f", "-")
    try:
        with _memory("rules") as given, _memory("said") as heard:
            given.write(text.encode())
            given.seek(0)
            null = subprocess.DEVNULL
            with subprocess.Popen(command, stdin=given, stdout=null, stderr=heard) as process:
                if not _ended(process):
                    process.kill()
                    raise DataplaneError(f"nft took longer than {NFT_LIMIT_S:.0f} s")
            heard.seek(0)
            said = heard.read().decode("utf-8", "replace").strip().splitlines()
    except OSError as error:
        raise DataplaneError(f"nft cannot be run: {error}") from error
    if process.returncode:
        raise DataplaneError(f"nft: {said[0] if said else process.returncode}")


def _memory(name: str) -> IO[bytes]:
    """A file in memory: a pipe would have to be filled and drained at the same time."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ends within NFT_LIMIT_S, without subprocess's sleeps (pidfd_open(2), Linux 5.3).

    They cost up to 50 ms, and fail under libfaketime.
    """
    watched = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        return bool(poll.poll(NFT_LIMIT_S * 1000))
    finally:
        os.close(watched)
