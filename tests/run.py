"""`make test`: the three halves of the suite one after the other, in one summary.

unit runs on two workers; kube and lab run alone, because a namespace test that shares two cores
with another one measures the neighbour. The last line is the sum over all of them, and the exit
code is that of the first part that failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter

PARTS = (
    ("unit", ["-n", "2", "tests/unit"]),
    ("kube", ["tests/kube"]),
    ("lab", ["tests/lab"]),
)
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|xpassed)")


def run(name: str, arguments: list[str]) -> tuple[int, Counter[str]]:
    """Run one part with its output passed through; return pytest's exit code and its counts."""
    print(f"── {name} " + "─" * 60, flush=True)
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if line.strip() else last
    counts = Counter({word.rstrip("s"): int(n) for n, word in COUNT.findall(last)})
    return process.returncode, counts


def main() -> int:
    """Run all parts and print the sum."""
    begin = time.monotonic()
    codes, total = [], Counter[str]()
    for name, arguments in PARTS:
        code, counts = run(name, arguments)
        codes.append(code)
        total += counts
    failed = total["failed"] + total["error"]
    print(f"all parts in {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{total['passed']} passed, {failed} failed, {total['skipped']} skipped", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    raise SystemExit(main())
