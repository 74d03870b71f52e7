"""`make test`: the parts of the suite in three lanes, in one summary.

Contract tests mostly wait for controllers, namespace tests mostly for packets, and tests of leases
and BGP sessions mostly for timers, so one of each runs side by side. Of two namespace tests one
would measure the other, so those with forwarded traffic share a lane, but for the real cluster's at
the end; machines and pods that come and go are in another. A part's output is printed when it ends.

A test that failed beside the other lane is run once more, alone, if there are few of them and it is
none of the pure ones; if it passes then, it is named as flaky and counts as passed. The last line
is the sum over all parts, and the exit code 1 if a test failed for good.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from lbctl.errors import MissingFeature
from lbctl.lab.cluster import binaries

REAL = {"LBCTL_LAB_CLUSTER": "kubernetes"}
SPEAKER: Final = ("tests/lab/test_speaker_session.py", "tests/lab/test_speaker_chaos.py")
MACHINES: Final = (
    "tests/lab/test_kubelet_cluster.py",
    "tests/lab/test_kubelet_runtime.py",
    "tests/lab/test_network_life.py",
    "tests/lab/test_network_machine.py",
    "tests/lab/test_preflight.py",
)


def without(files: tuple[str, ...]) -> list[str]:
    """pytest's options that leave these files out."""
    return [word for file in files for word in ("--ignore", file)]


Part = tuple[str, list[str], dict[str, str]]
LANES: tuple[tuple[Part, ...], ...] = (
    (
        ("lab", ["tests/lab", *without(("tests/lab/system", *SPEAKER, *MACHINES))], {}),
        ("system", ["-m", "not real", "tests/lab/system"], {}),
    ),
    (
        ("unit", ["tests/unit"], {}),
        ("kube", ["-n", "4", "--dist", "loadfile", "-m", "not alone", "tests/kube"], {}),
        ("system on kubernetes", ["-m", "both or real", "tests/lab/system"], REAL),
    ),
    (
        ("managers", ["-m", "alone", "tests/kube"], {}),
        ("speaker", list(SPEAKER), {}),
        ("machines", list(MACHINES), {}),
    ),
)
ALONE: Final = 4  # so many failed tests may be the machine's fault
FAILED: Final = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)")
PRINT = threading.Lock()


@dataclass(frozen=True, slots=True)
class Result:
    """How one part ended: pytest's exit code, its counts, and the tests that failed."""

    part: Part
    code: int
    counts: Counter[str]
    failed: tuple[str, ...]


def run(part: Part) -> Result:
    """Run one part, then print all that it said."""
    name, arguments, more = part
    say(f"   {name} begins")
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    environment = {**os.environ, **more}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    took_s = time.monotonic() - begin
    say(f"── {name}, {took_s:.0f} s " + "─" * 60 + f"\n{done.stdout}")
    last = done.stdout.rstrip().rpartition("\n")[2]
    counts = Counter({word.rstrip("s"): int(n) for n, word in COUNT.findall(last)})
    failed = tuple(dict.fromkeys(FAILED.findall(done.stdout)))
    return Result(part, done.returncode, counts, failed)


def again(results: list[Result]) -> list[Result]:
    """Run what failed once more, alone, where that can help; the results after that."""
    if sum(len(result.failed) for result in results) > ALONE:
        return results
    return [_again(result) if result.failed else result for result in results]


def _again(result: Result) -> Result:
    name, _, more = result.part
    if name == "unit" or result.code != 1:
        return result
    alone = run((f"{name}, alone", list(result.failed), more))
    if alone.code:
        return result
    say("flaky, passed alone: " + ", ".join(result.failed))
    passed = result.counts["passed"] + alone.counts["passed"]
    return replace(
        result,
        code=0,
        failed=(),
        counts=Counter({**result.counts, "passed": passed, "failed": 0, "error": 0}),
    )


def run_lane(lane: tuple[Part, ...]) -> list[Result]:
    """Run parts one after the other."""
    return [run(part) for part in lane]


def say(text: str) -> None:
    """Print without another lane's words in between."""
    with PRINT:
        print(text, flush=True)


def build() -> None:
    """Build the real cluster's programs, once; where they cannot be had, say so and go on."""
    try:
        binaries.find(lambda text: print(text, flush=True))
    except MissingFeature as error:
        print(f"no real cluster: {error}", flush=True)


def main() -> int:
    """Run all parts and print the sum."""
    build()
    begin = time.monotonic()
    with ThreadPoolExecutor(len(LANES)) as lanes:
        results = again(list(chain.from_iterable(lanes.map(run_lane, LANES))))
    total = sum((result.counts for result in results), Counter[str]())
    failed = total["failed"] + total["error"]
    print(f"all parts in {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return next((result.code for result in results if result.code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
