"""The prober and real responders over UDP on loopback, in one event loop.

Nodes are addresses 127.83.PID.n, so that parallel runs do not meet. Loopback's kernel always
answers TCP, so a silent agent here is AgentSilent; power cuts are in test_probing_network.py.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.responder import Responder, follow_keys
from lbctl.core import probe
from lbctl.core.health import PeerView
from lbctl.core.keys import Keys
from lbctl.core.model import Address, Behind, Node, NodeState, NodeView
from lbctl.core.probe import node_hash
from lbctl.errors import ConfigError, DataplaneError
from lbctl.keyfiles import read_keys
from lbctl.udp import UdpSocket
from manager.probing import Prober

OLD, NEW = bytes(range(200, 232)), bytes(range(150, 182))
LIMIT_S = 60.0
MANY: list[Address] = [ip_address(0x0A000000 + n) for n in range(1500)]
SOME = {MANY[0]: Behind.HERE, MANY[1]: Behind.AWAY}


async def wait(what: str, holds: Callable[[], object]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end_s, f"waited {LIMIT_S} s for {what}"
        await asyncio.sleep(0.02)


class Bed:
    """Agents by name, and a prober of them all."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.agents: dict[str, Responder] = {}
        self.down: dict[str, list[frozenset[str]]] = {}
        self.nodes: dict[str, Node] = {}
        self.peers: tuple[PeerView, ...] = ()
        self.changes: list[frozenset[str]] = []
        self.keys = Keys(OLD)
        self.prober = Prober(
            self.keys, "m1", time.time_ns(), lambda: self.peers, self.changes.append, port
        )

    def address(self, name: str) -> str:
        pid = os.getpid()
        return f"127.{83 + pid // 62500 % 100}.{pid // 250 % 250}.{int(name[1:]) + pid % 2 * 100}"

    async def agent(
        self,
        name: str,
        confirmed: dict[Address, Behind] | None = None,
        down: frozenset[str] = frozenset(),
    ) -> Responder:
        heard = self.down.setdefault(name, [])
        responder = Responder(
            name, self.keys, time.time_ns(), lambda: tuple(self.nodes), heard.append, down
        )
        self.agents[name] = responder
        await responder.start(self.address(name), self.port)
        if confirmed is not None:
            responder.publish(confirmed, digest=5, config_generation=1)
        self.nodes[name] = Node(name, uid=name, addresses=(ip_address(self.address(name)),))
        self.prober.set_nodes(self.nodes)
        return responder

    async def lose(self, name: str) -> None:
        """A node that was Up as all the others is NotReady and silent."""
        responder = await self.agent(name, SOME)
        await wait(f"all Up before {name} goes", self.up(*self.nodes))
        responder.close()
        self.nodes[name] = replace(self.nodes[name], ready=False)
        self.prober.set_nodes(self.nodes)

    async def answers(self, more: int) -> None:
        mark = self.prober.counters.answered + more
        await wait(f"{more} more answers", lambda: self.prober.counters.answered >= mark)

    def view(self, name: str) -> NodeView:
        return self.prober.views()[name]

    def up(self, *names: str) -> Callable[[], bool]:
        return lambda: all(
            self.view(n).state is NodeState.UP and self.view(n).confirmed for n in names
        )


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    free = UdpSocket("127.0.0.1")
    port = free.port
    free.close()
    made = Bed(port)
    task = asyncio.create_task(made.prober.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for responder in made.agents.values():
            responder.close()


async def test_a_node_that_is_back_lags_until_its_table_is_that_of_the_others(bed: Bed) -> None:
    """It has confirmed what was so when it went: five seconds of that may lead anywhere."""
    for name in ("n1", "n2"):
        await bed.agent(name, SOME)
    await bed.lose("n3")
    await wait("n3 is Down", lambda: bed.view("n3").state is NodeState.DOWN)
    shown: list[tuple[NodeState, bool]] = []

    def seen() -> tuple[NodeState, bool]:
        return bed.view("n3").state, bed.view("n3").lags

    bed.prober._on_change = lambda _names: shown.append(seen())
    agent = await bed.agent("n3", SOME)
    agent.publish(SOME, digest=4, config_generation=1)
    await wait("n3 is Up, and lags", lambda: seen() == (NodeState.UP, True))
    assert (NodeState.UP, False) not in shown
    agent.publish(SOME, digest=5, config_generation=1)
    await wait("n3 does not lag", lambda: seen() == (NodeState.UP, False))


async def test_confirmed_eips_arrive_in_pages_and_follow_changes(bed: Bed) -> None:
    agent = await bed.agent("n1", dict.fromkeys(MANY, Behind.AWAY))
    await wait("the whole list", lambda: len(bed.view("n1").confirmed) == len(MANY))
    assert bed.view("n1").digest == 5 and bed.view("n1").local_ready == frozenset()
    pages = bed.prober.counters.pages
    assert pages >= 7
    agent.publish(SOME, digest=6, config_generation=2)
    await wait("the short list", lambda: bed.view("n1").confirmed == SOME.keys())
    await wait("the digest", lambda: bed.view("n1").digest == 6)
    assert bed.view("n1").local_ready == {MANY[0]}
    assert bed.changes and all(change == {"n1"} for change in bed.changes)
    (status,) = bed.prober.status()
    assert status[2] is not None and status[2] < LIMIT_S


async def test_restarted_agent_loses_nothing_before_it_has_confirmed_anew(bed: Bed) -> None:
    (await bed.agent("n1", SOME)).close()
    await bed.agent("n2", SOME)
    await wait("n2 Up", bed.up("n2"))
    agent = await bed.agent("n1")  # started, nothing published yet: it must not answer
    bed.agents["n1"].publish(SOME, 5, 1)
    await wait("n1 Up", bed.up("n1"))
    agent.close()
    await wait("n1 silent", lambda: bed.view("n1").state is NodeState.AGENT_SILENT)
    agent = await bed.agent("n1")
    missed = bed.prober.counters.missed
    await wait("more misses", lambda: bed.prober.counters.missed > missed + 5)
    assert bed.view("n1").state is NodeState.AGENT_SILENT
    assert bed.view("n1").confirmed == SOME.keys() and agent.answered == 0
    agent.publish({MANY[2]: Behind.HERE}, 5, 1)
    await wait("n1's new list", lambda: bed.view("n1").confirmed == {MANY[2]})
    assert bed.view("n1").state is NodeState.UP


async def test_keys_rotate_without_a_miss_of_three(bed: Bed) -> None:
    await bed.agent("n1", SOME)
    await wait("n1 Up", bed.up("n1"))
    await wait("three answers", lambda: bed.prober.counters.answered > 3)
    mark = len(bed.changes)
    both = Keys(NEW, OLD)
    steps: list[Callable[[], None]] = [
        lambda: bed.prober.set_keys(both),
        lambda: bed.agents["n1"].set_keys(both),
        lambda: bed.prober.set_keys(Keys(NEW)),
        lambda: bed.agents["n1"].set_keys(Keys(NEW)),
    ]
    for step in steps:
        step()
        await bed.answers(4)
    assert bed.view("n1").state is NodeState.UP
    assert bed.changes[mark:] == []


async def test_agent_with_another_key_is_not_believed(bed: Bed) -> None:
    bed.keys = Keys(NEW)
    agent = await bed.agent("n1", SOME)
    await wait("refusals", lambda: agent.refused > 5)
    assert bed.view("n1").state is NodeState.UNKNOWN and agent.answered == 0


async def test_down_set_reaches_the_agents_and_replays_do_not(bed: Bed) -> None:
    agent = await bed.agent("n1", SOME)
    await bed.lose("n2")
    await wait("n2 in the down set", lambda: agent.down == {"n2"})
    ring = bed.keys.node("n1")
    old = probe.Request("m0", 1, 1, nonce=1, cookie=7, judging=True)  # a cookie of long ago
    udp = UdpSocket("127.0.0.1")
    heard = list(bed.down["n1"])
    for _ in range(20):
        data = probe.encode_request(old, ring.signing)
        udp.send(data, udp.target(ip_address(bed.address("n1")), bed.port))
    got: list[object] = []

    def all_answered() -> bool:
        got.extend(udp.receive())
        return len(got) == 20

    await wait("answers to the replays", all_answered)
    udp.close()
    assert agent.down == {"n2"} and bed.down["n1"] == heard == [frozenset({"n2"})]
    bed.prober.set_nodes({"n1": bed.nodes["n1"]})
    await wait("n2 out of the down set", lambda: agent.down == frozenset())


async def test_an_agent_that_was_away_hears_that_a_node_is_back(bed: Bed) -> None:
    await bed.agent("n2", SOME)
    await bed.agent("n1", SOME, down=frozenset({"n2"}))
    await wait("n1 to take n2 for up", lambda: bed.down["n1"] == [frozenset()])


async def test_rubbish_from_anywhere_is_counted_and_dropped(bed: Bed) -> None:
    agent = await bed.agent("n1", SOME)
    await wait("n1 Up", bed.up("n1"))
    udp = UdpSocket("127.0.0.1")
    for size in (0, 1, 40, 512, 1400, 2000):
        assert udp.send(os.urandom(size), udp.target(ip_address(bed.address("n1")), bed.port))
    await wait("refusals", lambda: agent.refused == 6)
    udp.close()
    await bed.answers(1)


async def test_agents_name_the_managers_that_they_hear(bed: Bed) -> None:
    assert bed.prober.heard_by_agents() is None, "no agent, no word"
    agent = await bed.agent("n1", SOME)
    us = node_hash("m1")
    await wait("our own name", lambda: bed.prober.heard_by_agents() == frozenset({us}))
    other = Prober(bed.keys, "m2", time.time_ns(), lambda: (), lambda _: None, bed.port)
    other.set_nodes(bed.nodes)
    task = asyncio.create_task(other.run())
    await wait("both", lambda: bed.prober.heard_by_agents() == frozenset({us, node_hash("m2")}))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await wait("us alone again", lambda: bed.prober.heard_by_agents() == frozenset({us}))
    agent.close()


async def test_silence_of_all_ready_agents_is_no_knowledge(bed: Bed) -> None:
    """Nothing may be announced, or rather withdrawn, by what a manager has heard of nobody."""
    for name in ("n1", "n2"):  # they have published nothing, and answer nothing
        await bed.agent(name)
    await wait("all to be missed", lambda: bed.prober.judges)
    assert not bed.prober.unheard, "no agent is ready: there may be none"
    bed.prober.set_nodes(bed.nodes, None, frozenset({"n1"}))
    assert bed.prober.unheard
    bed.agents["n2"].publish(SOME, 5, 1)
    await wait("an answer", lambda: not bed.prober.unheard)


async def test_nodes_without_an_agent_are_not_probed(bed: Bed) -> None:
    await bed.agent("n1", SOME)
    bed.nodes["n2"] = Node("n2", uid="n2", addresses=(ip_address(bed.address("n2")),))
    bed.prober.set_nodes(bed.nodes, frozenset({"n1"}))
    await wait("n1 Up", bed.up("n1"))
    assert set(bed.prober.views()) == {"n1"} and bed.prober.judges
    bed.prober.set_nodes(bed.nodes, frozenset())
    assert bed.prober.idle


async def test_outlook_names_the_gone(bed: Bed) -> None:
    await bed.agent("n1", SOME)
    await bed.lose("n2")
    await wait("n2 Down", lambda: bed.view("n2").state is NodeState.DOWN)
    outlook = bed.prober.outlook(announcing=True)
    assert (outlook.judging, outlook.announcing, outlook.seen) == (True, True, 1)
    assert outlook.gone == {node_hash("n2")}


async def test_a_port_that_is_taken_is_said(bed: Bed) -> None:
    await bed.agent("n1", SOME)
    second = Responder("n1", bed.keys, 1, lambda: (), lambda down: None)
    with pytest.raises(DataplaneError, match="cannot be had"):
        await second.start(bed.address("n1"), bed.port)


async def test_keys_are_read_again_when_the_mounted_secret_changes(tmp_path: Path) -> None:
    (tmp_path / "current").write_bytes(base64.b64encode(OLD))
    assert read_keys(tmp_path) == Keys(OLD)
    got: list[Keys] = []
    task = asyncio.create_task(follow_keys(tmp_path, got.append))
    try:
        await wait("the first keys", lambda: got == [Keys(OLD)])
        (tmp_path / "previous").write_bytes(base64.b64encode(OLD))
        (tmp_path / "current").write_bytes(b"broken")
        with pytest.raises(ConfigError):
            read_keys(tmp_path)
        (tmp_path / "current").write_bytes(base64.b64encode(NEW))
        await wait("the new keys", lambda: got[-1] == Keys(NEW, OLD))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
