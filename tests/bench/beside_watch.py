"""Runs in a node's namespace: prints the monotonic instant of every change of nftables.

iptables 1.8 in Debian writes through nftables too, so one clock serves all.
"""

from __future__ import annotations

import time

from agent.nfnetlink import Nfnetlink

EVERY_S = 0.002


def main() -> None:
    """Until it is killed."""
    kernel, last = Nfnetlink(), -1
    while True:
        now = kernel.generation()
        if now != last:
            print(time.monotonic(), flush=True)
            last = now
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
