"""Everything that watches nodes, wired up: the prober, and the other managers as second witness.

Rule: what one part learns the other acts on at once. A changed judgement goes out as a heartbeat; a
heartbeat that says something new makes the prober judge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from lbctl.core.keys import Keys
from lbctl.core.model import Address
from manager.peers import Outlook, Peers
from manager.probing import Prober


class NodeWatch:
    """`prober` and `peers` of one manager.

    addresses: where the other managers are (their host addresses; ours may be among them).
    announcing: whether our own sessions are up and full. on_nodes: takes the names of the nodes
    whose view changed. on_managers: called when another manager appears, goes or
    says something new.
    """

    def __init__(
        self,
        keys: Keys,
        manager_id: str,
        addresses: Callable[[], Iterable[Address]],
        announcing: Callable[[], bool],
        on_nodes: Callable[[frozenset[str]], None],
        on_managers: Callable[[], None] = lambda: None,
    ) -> None:
        boot = time.time_ns()
        self._announcing = announcing
        self._on_nodes = on_nodes
        self._on_managers = on_managers
        self._told = Outlook()
        self.peers = Peers(keys, manager_id, boot, addresses, self._outlook, self._managers_changed)
        self.prober = Prober(keys, manager_id, boot, self.peers.alive, self._nodes_changed)

    def set_keys(self, keys: Keys) -> None:
        """Use these keys from now on."""
        self.prober.set_keys(keys)
        self.peers.set_keys(keys)

    async def run(self) -> None:
        """Watch until cancelled; raises LbctlError (in a group) if a port cannot be had."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.peers.run(), name="peers")
            group.create_task(self.prober.run(), name="prober")

    def _outlook(self) -> Outlook:
        self._told = self.prober.outlook(self._announcing())
        return self._told

    def _nodes_changed(self, nodes: frozenset[str]) -> None:
        if self.prober.outlook(self._told.announcing) != self._told:
            self.peers.poke()
        self._on_nodes(nodes)

    def _managers_changed(self) -> None:
        self.prober.judge()
        self._on_managers()
