"""The manager's small parts that only turn snapshots into snapshots."""

from __future__ import annotations

import asyncio
import base64
import os
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import structlog

from lbctl import errors
from lbctl.core import config, names
from lbctl.core.actions import Action, CreateEip, RemoveFinalizer, WriteStatus
from lbctl.core.holdings import Decision
from lbctl.core.model import Eip, Node, NodeState, NodeView, ObjectRef, Peer, Service, Session
from lbctl.core.reasons import Reason
from lbctl.kube.cache import Cache
from lbctl.kube.client import MERGE, Client
from lbctl.kube.events import EventRecorder, Subject
from lbctl.kube.objects import DataObject, to_service
from manager import keys
from manager.conditions import Conditions
from manager.configuration import Accepted
from manager.confirming import Confirming
from manager.executor import Executor, Sink
from manager.inputs import Inputs
from manager.metrics import Metrics
from manager.neighbours import Neighbours
from manager.probing import Counters
from manager.speaker import messages
from manager.speaker.keeper import Keeper

TEXT = """
version: 1
pools: [{name: p, addresses: [198.51.100.0/24]}]
bgp:
  asn: 64512
  peers:
    - {name: a, address: 192.0.2.1, asn: 64500}
    - {name: b, address: 192.0.2.2, asn: 64501, passwordSecret: tor, port: 1179, holdTime: 12s,
       gracefulRestart: 20s}
"""


def secret(name: str, **data: bytes) -> DataObject:
    pairs = tuple((key, base64.b64encode(value).decode()) for key, value in sorted(data.items()))
    return DataObject(ObjectRef(names.NAMESPACE, name), "u", pairs)


def accepted() -> Accepted:
    return Accepted(config.parse(TEXT), "h", 1)


def test_peers_get_their_passwords_and_keep_them() -> None:
    secrets: dict[ObjectRef, DataObject] = {}
    made = Neighbours(secrets, lambda: True, names.NAMESPACE, ip_address("192.0.2.11"))
    now = accepted()
    assert [peer.name for peer in made.peers(now)] == ["a"], "b must not go without its password"
    assert "Secret tor" in made.missing["b"]
    found = secret("tor", password=b"s3cret\n")
    secrets[found.ref] = found
    a, b = made.peers(now)
    assert not made.missing and (a.password, b.password) == (None, "s3cret")
    assert (b.asn, b.local_asn, b.port, b.hold_time_s) == (64501, 64512, 1179, 12)
    assert (a.graceful_restart_s, b.graceful_restart_s) == (None, 20)
    assert str(a.router_id) == "192.0.2.11" and "s3cret" not in repr(b)
    secrets.clear()
    assert made.peers(now)[1].password == "s3cret", "a password that is known must not be lost"


def test_a_peer_without_its_password_is_down_in_the_metrics_too() -> None:
    metrics = Metrics()
    metrics.measure_sessions(accepted().config.bgp.peers, (Session("a", True, ()),))
    up = [metrics.registry.get_sample_value("lbctl_bgp_session_up", {"peer": p}) for p in "ab"]
    assert up == [1, 0], "an alert on 0 would never fire"


def test_before_secrets_are_listed_the_speaker_keeps_the_passwords() -> None:
    secrets: dict[ObjectRef, DataObject] = {}
    listed = asyncio.Event()
    made = Neighbours(secrets, listed.is_set, names.NAMESPACE, None)
    a, b = made.peers(accepted())
    assert (a.keep_password, b.keep_password, b.password) == (False, True, None)
    assert not made.missing
    listed.set()
    assert [peer.name for peer in made.peers(accepted())] == ["a"], "there is no such Secret"
    found = secret("tor", password=b"s3cret")
    secrets[found.ref] = found
    assert made.peers(accepted())[1] == replace(b, password="s3cret", keep_password=False)


def test_the_speaker_keeps_a_password_that_its_manager_does_not_know(tmp_path: Path) -> None:
    known = Peer("b", ip_address("192.0.2.2"), 64501, 64512, local_address=ip_address("192.0.2.9"))
    known = replace(known, password="s3cret")
    unknown = replace(known, password=None, keep_password=True)
    keeper = Keeper(tmp_path)
    keeper._obey(messages.Peers([messages.from_peer(known)]))
    text = keeper.render()
    keeper.changed.clear()
    keeper._obey(messages.Peers([messages.from_peer(unknown)]))
    assert keeper.peers == (known,) and not keeper.changed.is_set(), "the session must not end"
    started_anew = Keeper(tmp_path)
    started_anew._obey(messages.Peers([messages.from_peer(unknown)]))
    assert started_anew.render() is None and not started_anew.usable()
    assert "password" in started_anew._problems["b"]
    started_anew._obey(messages.Peers([messages.from_peer(known)]))
    assert started_anew.render() == text and not started_anew._problems


@pytest.mark.parametrize("bad", [b"", b"x" * 81, b"two\nlines", "ü".encode()])
def test_unusable_passwords_leave_the_peer_out(bad: bytes) -> None:
    found = secret("tor", password=bad)
    made = Neighbours({found.ref: found}, lambda: True, names.NAMESPACE, None)
    assert [peer.name for peer in made.peers(accepted())] == ["a"]


def test_confirming_counts_every_node_that_may_still_forward() -> None:
    one, two = ip_address("198.51.100.1"), ip_address("198.51.100.2")
    views = {
        "b": NodeView("b", NodeState.UP, confirmed=frozenset({one, two})),
        "a": NodeView("a", NodeState.UP, confirmed=frozenset({one})),
        "c": NodeView("c", NodeState.DOWN, confirmed=frozenset({one})),
        "d": NodeView("d", NodeState.AGENT_SILENT, confirmed=frozenset({two})),
        "e": NodeView("e", NodeState.SUSPECT, confirmed=frozenset({two})),
    }
    found = Confirming(views)
    assert found[one] == ("a", "b") and found[two] == ("b", "d", "e")
    assert found.get(ip_address("198.51.100.3")) == () and len(found) == 2


def test_keys_are_unwrapped_twice_and_placeholders_refused() -> None:
    value = os.urandom(32)
    text = base64.b64encode(value)
    assert keys.read(secret(names.PROBE_SECRET, current=text)).current == value
    for bad in (b"changeme", base64.b64encode(b"\0" * 32), base64.b64encode(value[:16])):
        with pytest.raises(errors.ConfigError):
            keys.read(secret(names.PROBE_SECRET, current=bad))
    with pytest.raises(errors.ConfigError):
        keys.read(secret(names.PROBE_SECRET))


HEARD = Sink(*[lambda _: None] * 5)


class Fake(Client):
    """Takes what it is given; the Service `default/odd` is more than it can bear."""

    def __init__(self) -> None:
        self.written: list[Any] = []
        self.patches: asyncio.Queue[Any] = asyncio.Queue()

    async def create(self, path: str, body: Any) -> Any:
        if body["spec"]["owner"]["name"] == "odd":
            raise ValueError("nobody thought of this")
        self.written.append(body["metadata"]["name"])
        return body

    async def patch(self, path: str, body: Any, content_type: str = MERGE) -> Any:
        self.patches.put_nowait(body)
        return {**body, "metadata": {"name": "web", "namespace": "default"}, "spec": {}}


async def test_one_odd_service_stops_no_other() -> None:
    client, metrics = Fake(), Metrics()
    executor = Executor(client, lambda: True, HEARD, metrics, lambda _: None)
    for number, name in enumerate(("odd", "web")):
        owner = ObjectRef("default", name)
        eip = Eip(ip_address(f"198.51.100.{number}"), "p", owner, "u")
        action = CreateEip(owner, eip, Reason.ALLOCATED)
        left = await executor.carry_out([action])
        assert list(left) == ([action] if name == "odd" else [])
    assert client.written == ["198.51.100.1"]
    assert metrics.registry.get_sample_value(
        "lbctl_writes_total", {"action": "CreateEip", "outcome": "ValueError"}
    )


async def test_a_service_that_is_let_go_keeps_no_mark_of_a_pool() -> None:
    client = Fake()
    executor = Executor(client, lambda: True, HEARD, Metrics(), lambda _: None)
    finalizers = ("other/one", names.FINALIZER)
    web = Service(ObjectRef("default", "web"), "u", 0.0, (), False, finalizers=finalizers)
    left = await executor.carry_out([RemoveFinalizer(web.ref, web, Reason.RELEASED)])
    assert not left
    body = client.patches.get_nowait()
    assert body["metadata"]["finalizers"] == ["other/one"]
    assert body["metadata"]["annotations"] == {names.ANNOTATION_POOL: None}


class Touched(Client):
    """Has one Service that was just written; a guarded write has to name its version."""

    def __init__(self, **spec: Any) -> None:
        self.meta = {"name": "web", "namespace": "default", "uid": "u", "resourceVersion": "2"}
        self.held: dict[str, Any] = {"metadata": self.meta, "spec": spec}

    async def get(self, path: str, params: Any = None, headers: Any = None) -> Any:
        return self.held

    async def patch(self, path: str, body: Any, content_type: str = MERGE) -> Any:
        if body["metadata"]["resourceVersion"] != self.meta["resourceVersion"]:
            raise errors.Conflict("409")
        return {**self.held, "status": body["status"]}


@pytest.mark.parametrize("kind", ["LoadBalancer", "ClusterIP"])
async def test_a_status_is_written_upon_a_newer_version_of_the_same_service(kind: str) -> None:
    client, told, seen = Touched(type=kind), list[Action](), list[Service]()
    sink = replace(HEARD, service=seen.append, written=told.append)
    executor = Executor(client, lambda: True, sink, Metrics(), lambda _: None)
    web = to_service(msgspec.json.encode({"metadata": client.meta, "spec": {"type": kind}}))
    stale = replace(web, is_load_balancer=True, version="1")
    address = ip_address("198.51.100.1")
    write = WriteStatus(stale.ref, stale, (address,), Reason.ALLOCATED)
    left = await executor.carry_out([write])
    if kind == "LoadBalancer":  # our own condition made it newer: nothing is planned again
        assert (told, seen[-1].ingress, not left) == ([write], (address,), True)
    else:  # it is not what was decided on
        assert (told, seen[-1].ingress, list(left)) == ([], (), [write])


class Recorder(EventRecorder):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, subject: Subject, reason: str, message: str, warning: bool = False) -> None:
        self.said.append(f"{subject.ref} {reason}: {message}")


def test_the_event_of_an_allocation_says_why_a_sharing_key_was_not_honoured() -> None:
    events, cache = Recorder(), cast(Cache[Service], SimpleNamespace(items={}, get={}.get))
    conditions = Conditions(
        Fake(), cache, events, lambda: True, Metrics(), lambda _: None, lambda _: Reason.NO_NEXT_HOP
    )
    web = ObjectRef("default", "web")
    eip = Eip(ip_address("198.51.100.1"), "p", web, "u")
    for apart in ("", "an address of its own"):
        conditions.written(CreateEip(web, eip, Reason.ALLOCATED, apart))
    assert events.said == [
        "default/web Allocated: 198.51.100.1 of pool p: an address was given from a pool",
        "default/web Allocated: 198.51.100.1 of pool p: an address of its own",
    ]


async def test_a_condition_says_what_holds_now_and_when_its_status_changed() -> None:
    web = Service(ObjectRef("default", "web"), "u", 0.0, (), True, version="1")
    cache, client = {web.ref: web}, Fake()
    said = ["10.0.0.1 is taken"]
    conditions = Conditions(
        client,
        cast(Cache[Service], SimpleNamespace(items=cache, get=cache.get)),
        cast(EventRecorder, None),
        lambda: True,
        Metrics(),
        lambda ref: Decision(ref, Reason.ADDRESS_TAKEN, said[0]),
        lambda _ref: Reason.NO_NEXT_HOP,
    )
    task = asyncio.create_task(conditions.lead())

    async def written() -> dict[str, str]:
        conditions.mark(web.ref)
        async with asyncio.timeout(30):  # for a condition to be written
            (entry,) = (await client.patches.get())["status"]["conditions"]
        return entry  # type: ignore[no-any-return]

    first = await written()
    assert (first["message"], "lastTransitionTime" in first) == ("10.0.0.1 is taken", True)
    said[0] = "10.0.0.2 is taken"
    second = await written()
    assert (second["message"], "lastTransitionTime" in second) == ("10.0.0.2 is taken", False)
    cache[web.ref] = replace(web, version="2")  # a newer one, and it has no condition
    assert (await written())["lastTransitionTime"]
    task.cancel()


async def test_a_next_hop_that_is_no_address_is_said_once() -> None:
    node = Node("node-1", odd_hops=("192.0.2.210x",))
    nodes = Inputs(Client.with_token("http://127.0.0.1:1", "token")).nodes.cache
    with structlog.testing.capture_logs() as said:
        for found in (node, replace(node, draining=True), replace(node, odd_hops=())):
            await nodes.recall({ObjectRef("", "node-1"): found}, 0.0)
    assert [(line["event"], line["no_addresses"]) for line in said] == [
        ("next_hops_ignored", "192.0.2.210x")
    ]


def test_metrics_say_which_node_lags() -> None:
    metrics = Metrics()
    views = (NodeView("a", NodeState.UP), NodeView("b", NodeState.UP, lags=True))
    metrics.measure_nodes(views, Counters())
    found = {
        name: metrics.registry.get_sample_value("lbctl_node_lags", {"node": name}) for name in "ab"
    }
    assert found == {"a": 0.0, "b": 1.0}
    metrics.measure_nodes(views[:1], Counters())
    assert metrics.registry.get_sample_value("lbctl_node_lags", {"node": "b"}) is None


def test_the_first_failure_of_a_leader_is_a_rise() -> None:
    """A counter that comes into being at 1 has no rate."""
    found = Metrics().registry.get_sample_value("lbctl_task_errors_total", {"task": "lead"})
    assert found == 0.0


def test_metrics_say_what_is_free_by_family() -> None:
    metrics = Metrics()
    left = {"family": "IPv4", "pool": "b"}
    metrics.measure_pools((), (), {"b": {4: 2, 6: 1 << 64}})
    assert metrics.registry.get_sample_value("lbctl_pool_free_addresses", left) == 2.0
    metrics.measure_pools((), (), {})
    assert metrics.registry.get_sample_value("lbctl_pool_free_addresses", left) is None


class Refusing(Fake):
    """Refuses the status of Service `default/odd` so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.refused = times, 0

    async def patch(self, path: str, body: Any, content_type: str = MERGE) -> Any:
        if "/odd/" in path and self.refused < self.times:
            self.refused += 1
            raise errors.Forbidden("a webhook says no")
        return await super().patch(path, body, content_type)


def writes(metrics: Metrics, outcome: str) -> float | None:
    marks = {"action": "Condition", "outcome": outcome}
    return metrics.registry.get_sample_value("lbctl_writes_total", marks)


@pytest.mark.parametrize(("times", "wait_s"), [(1000, 3600.0), (2, 0.0)])
async def test_a_condition_that_is_refused_waits_and_is_counted(
    times: int, wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = SimpleNamespace(next_s=lambda: wait_s)
    monkeypatch.setattr("manager.conditions.Backoff", lambda *_: waiting)
    odd, web = (
        Service(ObjectRef("default", name), "u", 0.0, (), True, version="1")
        for name in ("odd", "web")
    )
    cache, client, metrics, said = {odd.ref: odd, web.ref: web}, Refusing(times), Metrics(), ["a"]
    conditions = Conditions(
        client,
        cast(Cache[Service], SimpleNamespace(items=cache, get=cache.get)),
        cast(EventRecorder, None),
        lambda: True,
        metrics,
        lambda ref: Decision(ref, Reason.ADDRESS_TAKEN, said[0]),
        lambda _ref: Reason.NO_NEXT_HOP,
    )
    task = asyncio.create_task(conditions.lead())
    async with asyncio.timeout(30):  # for two conditions, of web alone or of both
        await client.patches.get()
        if wait_s:
            said[0] = "b"
            conditions.mark(odd.ref)
            conditions.mark(web.ref)
        await client.patches.get()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert client.refused == writes(metrics, "Forbidden") == (1 if wait_s else 2)
    assert writes(metrics, "ok") == 2
