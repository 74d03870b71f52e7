"""`make test`: the parts of the suite one after the other, in one summary.

unit and kube run on two workers; the rest runs alone, because a namespace test that shares two
cores with another one measures the neighbour. The last line is the sum over all of them, and the
exit code is that of the first part that failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter

from lbctl.errors import MissingFeature
from lbctl.lab.cluster import binaries

REAL = {"LBCTL_LAB_CLUSTER": "kubernetes"}
PARTS: tuple[tuple[str, list[str], dict[str, str]], ...] = (
    ("unit", ["-n", "2", "tests/unit"], {}),
    ("kube", ["-n", "2", "--dist", "loadfile", "tests/kube"], {}),
    ("lab", ["tests/lab", "--ignore", "tests/lab/system"], {}),
    ("system", ["tests/lab/system"], {}),
    ("system on kubernetes", ["-m", "both", "tests/lab/system"], REAL),
)
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)")


def run(name: str, arguments: list[str], more: dict[str, str]) -> tuple[int, Counter[str]]:
    """Run one part with its output passed through; return pytest's exit code and its counts."""
    print(f"── {name} " + "─" * 60, flush=True)
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    last = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **more}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if line.strip() else last
    counts = Counter({word.rstrip("s"): int(n) for n, word in COUNT.findall(last)})
    return process.returncode, counts


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
    codes, total = [], Counter[str]()
    for part in PARTS:
        code, counts = run(*part)
        codes.append(code)
        total += counts
    failed = total["failed"] + total["error"]
    print(f"all parts in {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
