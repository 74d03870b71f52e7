"""The DaemonSet: programs the node's forwarding and answers probes."""

import gc
from typing import Final

# Objects made between two collections, until the first table is there: 10,000 Services make half.
LOADING: Final = 2_000_000
# Here and not in `main`: what is imported stays, and collections during it find nothing (they were
# 0.2 of 1.4 s of its processor time).
gc.set_threshold(LOADING, 50, 100)
