"""The agent's process: puts the parts together, and nothing else.

Rules: the table in the kernel outlives the process; only `--uninstall` removes it. Nothing that the
API server, a manager or the disk does ends it: every part goes on with what it knows.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from agent import LOADING, http, routes
from agent.dataplane import Dataplane
from agent.engine import Confirmed, Engine
from agent.inputs import Watcher
from agent.rendering import State
from agent.responder import Responder, follow_keys
from agent.snapshot import Store
from agent.uninstall import uninstall
from lbctl import log
from lbctl.core.keys import Keys
from lbctl.core.model import Node
from lbctl.core.names import AGENT_SNAPSHOT_DIR, KEYS_DIR
from lbctl.errors import DataplaneError, KubeError, LbctlError
from lbctl.kube.client import Client

_RETRY_S: Final = 2.0
_LOADED: Final = 50_000  # objects made between two collections, after the load
_log = structlog.get_logger()


class Agent:
    """One node's agent. directory: of the snapshot. keys: where the probe Secret is mounted."""

    def __init__(self, node: str, directory: Path, keys: Path, links: routes.Routes) -> None:
        self._node = node
        self._keys = keys
        self._boot = time.time_ns()
        self._dataplane = Dataplane()
        self._store = Store(directory, node)
        self._responder: Responder | None = None
        self._hosts: tuple[tuple[Node, ...], Mapping[str, str]] = (), {}
        self._watcher: Watcher | None = None
        self._engine = Engine(node, self._dataplane, links, self._publish, self._save)

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            state = await asyncio.to_thread(self._store.load)
            if state is not None:
                intact = self._engine.restore(state)
                _log.info("snapshot_loaded", eips=len(state.table.eips), kernel_intact=intact)
            figures = http.Figures(
                self._engine, self._dataplane, lambda: self._watcher, lambda: self._responder
            )
            async with (
                http.serving(http.application(self._engine, figures)),
                asyncio.TaskGroup() as group,
            ):
                group.create_task(self._engine.run(), name="engine")
                group.create_task(self._store.kept.run(), name="snapshot")
                group.create_task(self._watch(), name="watch")
                group.create_task(self._probes(), name="probes")
        finally:
            if self._responder is not None:
                self._responder.close()
            self._dataplane.close()

    async def _watch(self) -> None:
        """Follow the API server; without a usable configuration, try again."""
        while True:
            try:
                async with await Client.from_environment() as client:
                    self._watcher = Watcher(client, self._engine.feed)
                    await self._watcher.run()
            except KubeError as error:
                _log.error("no_api_server", error=str(error))
            await asyncio.sleep(_RETRY_S)

    async def _probes(self) -> None:
        """Answer probes as soon as there are keys."""
        keys: asyncio.Queue[Keys] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(follow_keys(self._keys, keys.put_nowait), name="keys")
            while True:
                found = await keys.get()
                if self._responder is None:
                    await self._answer(found)
                else:
                    self._responder.set_keys(found)

    async def _answer(self, keys: Keys) -> None:
        engine = self._engine
        responder = Responder(
            self._node, keys, self._boot, self._nodes, engine.set_down, engine.down, self._host
        )
        while True:
            try:
                await responder.start()
                break
            except DataplaneError as error:
                # The predecessor may still hold the port for a moment.
                _log.error("probes_not_answered", error=str(error))
                await asyncio.sleep(_RETRY_S)
        self._responder = responder
        if self._engine.confirmed.generation:
            self._publish(self._engine.confirmed)

    def _nodes(self) -> tuple[str, ...]:
        return tuple(node.name for node in self._engine.state.inputs.nodes)

    def _host(self, address: str) -> str:
        nodes = self._engine.state.inputs.nodes
        if self._hosts[0] is not nodes:
            self._hosts = nodes, {str(a): node.name for node in nodes for a in node.addresses}
        return self._hosts[1].get(address.removeprefix("::ffff:"), "")  # IPv4 on an IPv6 socket

    def _publish(self, confirmed: Confirmed) -> None:
        if self._responder is not None:
            self._responder.publish(
                confirmed.eips, confirmed.table.digest, confirmed.config_generation
            )

    def _save(self, state: State) -> None:
        self._store.save(state)
        if gc.get_threshold()[0] == LOADING:
            # What the first table holds stays: no collection, for which probes wait, looks at it.
            gc.freeze()
            gc.set_threshold(_LOADED, 50, 100)


async def _serve(node: str, directory: Path, keys: Path) -> None:
    async with routes.opened() as links:
        agent = Agent(node, directory, keys, links)
        task = asyncio.ensure_future(agent.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        with suppress(asyncio.CancelledError):
            await task
        _log.info("stopped", forwarding="stays")


async def _uninstall(directory: Path, stay: bool) -> None:
    """Clean the node. stay: then be ready until stopped, so that a DaemonSet can tell who is."""
    await uninstall(directory)
    if stay:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        async with http.serving(http.nothing_left()):
            await stopped.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lbctl-agent", description="Programs this node.")
    parser.add_argument(
        "--uninstall", action="store_true", help="remove every trace from this node, and end"
    )
    parser.add_argument(
        "--stay", action="store_true", help="after --uninstall: be ready until stopped"
    )
    parser.add_argument("--snapshot-dir", type=Path, default=Path(AGENT_SNAPSHOT_DIR))
    parser.add_argument("--keys-dir", type=Path, default=Path(KEYS_DIR))
    parser.add_argument("--log-level", default="info")
    return parser.parse_args()


def main() -> None:
    """Entry point of `lbctl-agent`. Exit code 2 when it cannot work here, with the reason."""
    arguments = _arguments()
    log.setup(arguments.log_level)
    node = os.environ.get("NODE_NAME", "")
    try:
        if arguments.uninstall:
            asyncio.run(_uninstall(arguments.snapshot_dir, arguments.stay))
            return
        if not node:
            raise DataplaneError("NODE_NAME is not set: the DaemonSet gives it by the downward API")
        # Tables are made in a thread: probes must not wait for its turn to end.
        sys.setswitchinterval(0.001)
        asyncio.run(_serve(node, arguments.snapshot_dir, arguments.keys_dir))
    except LbctlError as error:
        _log.error("cannot_work", error=str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
