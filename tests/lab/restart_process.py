"""A real `lbctl-manager` that is killed while its API server is away, in a network namespace.

Nodes are real responders on addresses of `lo`, API server and speaker are the bench's.
`unshare --net python -m tests.lab.restart_process SERVICES` prints what it found as JSON.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import aiohttp
import structlog

from agent.responder import Responder
from lbctl.core import names
from lbctl.core.exabgp import Verb
from lbctl.core.keys import Keys
from lbctl.core.model import Behind
from lbctl.core.state import ManagerState, from_json
from manager.speaker import messages
from tests.bench.cluster import Cluster
from tests.bench.fakeapi import FakeApi
from tests.bench.fakespeaker import FakeSpeaker
from tests.bench.probes import FIRST, local_addresses

ROOT: Final = Path(__file__).parents[2]
NODES: Final = 4
LIMIT_S: Final = 90.0
STATE: Final = f"http://127.0.0.1:{names.MANAGER_HTTP_PORT}"
SILENT: Final = f"add table ip t; add chain ip t in {{ type filter hook input priority 0; }}; \
add rule ip t in ip daddr {FIRST} drop"


class Scene:
    """One manager, what it runs on, and how often it was told what."""

    def __init__(self, services: int, directory: Path) -> None:
        self.cluster = Cluster(services, NODES, first=FIRST)
        self.directory = directory
        self.speaker = FakeSpeaker()
        self.secret = os.urandom(32)
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, kubeconfig: Path) -> None:
        """Start the manager, as its kubelet does."""
        own = [f"--{of}-dir={self.directory}" for of in ("speaker", "snapshot", "keys")]
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "manager.main", "--id", "m", "--address", "127.0.0.1"),
            *(*own, "--kubeconfig", str(kubeconfig), "--log-level", "error"),
            cwd=ROOT,
            stderr=sys.stderr,
        )

    async def kill(self) -> None:
        """SIGKILL it."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    async def state(self) -> ManagerState | None:
        """What it says of itself."""
        try:
            async with aiohttp.ClientSession() as http, http.get(f"{STATE}/v1/state") as answer:
                return from_json(await answer.read())
        except aiohttp.ClientError:
            return None

    async def until(self, what: str, holds: Callable[[ManagerState], bool]) -> ManagerState:
        """Poll until its state is such."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while (found := await self.state()) is None or not holds(found):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            sys.exit(f"waited {LIMIT_S} s for {what}")
        return found

    async def announced(self, nodes: int) -> ManagerState:
        """Until every EIP has so many next hops, and the speaker all of it."""
        paths = nodes * len(self.cluster.refs)

        def whole(found: ManagerState) -> bool:
            return [session.paths for session in found.sessions] == [paths]

        return await self.until(f"{paths} paths", whole)

    async def ready(self) -> str:
        """What /readyz says."""
        async with aiohttp.ClientSession() as http, http.get(f"{STATE}/readyz") as answer:
            return await answer.text()

    def routes(self, verb: Verb) -> int:
        """How many routes it has announced or withdrawn since it was last asked."""
        found = sum(len(run.prefixes) for run in self.speaker.runs if run.verb is verb)
        self.speaker.runs = [run for run in self.speaker.runs if run.verb is not verb]
        return found


async def play(scene: Scene) -> dict[str, Any]:
    """A start, the API server goes, SIGKILL and a start, a node dies, the API server is back."""
    keys = Keys(scene.secret)
    (scene.directory / "current").write_bytes(base64.b64encode(scene.secret))
    everywhere = dict.fromkeys(scene.cluster.addresses, Behind.AWAY)
    every = [node.name for node in scene.cluster.nodes]
    for node in scene.cluster.nodes:
        agent = Responder(node.name, keys, time.time_ns(), lambda: every, lambda _: None)
        agent.publish(everywhere, digest=77, config_generation=1)
        await agent.start(str(node.addresses[0]))
    found: dict[str, Any] = {}
    async with FakeApi(scene.cluster, scene.secret) as api:
        kubeconfig = api.kubeconfig(scene.directory)
        await scene.start(kubeconfig)
        await scene.announced(NODES)
        while len(list(scene.directory.glob("*.json"))) < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        found["announced"] = scene.routes(Verb.ANNOUNCE)
    await scene.kill()
    began_s = time.monotonic()
    await scene.start(kubeconfig)
    state = await scene.announced(NODES)
    found["restart_s"] = round(time.monotonic() - began_s, 1)
    found["age_s"], found["ready"] = state.snapshot_age_s, await scene.ready()
    found["again"] = scene.routes(Verb.ANNOUNCE), scene.routes(Verb.WITHDRAW)
    began_s = time.monotonic()
    await asyncio.to_thread(subprocess.run, ["nft", SILENT], check=True)
    await scene.announced(NODES - 1)
    found["out_s"] = round(time.monotonic() - began_s, 2)
    found["withdrawn"] = scene.routes(Verb.WITHDRAW)
    async with api:
        await scene.until("the lists", lambda state: state.snapshot_age_s is None)
        await scene.announced(NODES - 1)
    found["flapped"] = scene.routes(Verb.ANNOUNCE), scene.routes(Verb.WITHDRAW)
    return found


async def main(services: int) -> None:
    """Run here."""
    with TemporaryDirectory() as directory:
        scene = Scene(services, Path(directory))
        server = await asyncio.start_unix_server(
            scene.speaker.serve, scene.directory / messages.MANAGER_SOCKET, limit=messages.MAX_LINE
        )
        async with server:
            try:
                print(json.dumps(await play(scene)))
            finally:
                await scene.kill()


if __name__ == "__main__":
    local_addresses()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(main(int(sys.argv[1])))
