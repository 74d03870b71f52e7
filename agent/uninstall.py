"""Removes every trace of the agent from a node: nftables tables, rules, routes, tunnel, snapshot.

rp_filter of the uplinks stays as it is: what it was before is not known.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from agent import routes
from agent.dataplane import run_nft
from agent.snapshot import Store
from lbctl.core import nft

_log = structlog.get_logger()


async def uninstall(directory: Path) -> None:
    """Remove everything of ours; again is harmless. Raises DataplaneError."""
    await asyncio.to_thread(run_nft, nft.removal())
    async with routes.opened() as links:
        removed = await links.remove()
    Store(directory, "").kept.remove()
    _log.info("uninstalled", routes_and_rules=removed)
