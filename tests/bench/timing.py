"""Processor times of small pieces of work and of programs: others on the machine do not count."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
Measured = tuple[str, tuple[float, ...], str]


def timed(work: Callable[[], object], runs: int) -> tuple[float, ...]:
    """Milliseconds of each run. What `work` returns is let go of off the clock."""
    found = []
    for _ in range(runs):
        begin = time.process_time()
        made = work()
        found.append((time.process_time() - begin) * 1000)
        del made
    return tuple(found)


class Program:
    """What a running process uses."""

    def __init__(self, pid: int) -> None:
        self._proc = Path("/proc") / str(pid)

    def processor_s(self) -> float:
        """What it has used so far, its own and the kernel's for it."""
        words = (self._proc / "stat").read_text().rsplit(")")[1].split()
        return (int(words[11]) + int(words[12])) / _TICKS

    def memory(self, name: str) -> float:
        """VmRSS or VmHWM in MiB."""
        lines = (self._proc / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
