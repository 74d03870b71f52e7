"""The list+watch cache against a server that hangs, forgets, resets and lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from lbctl.core.model import Node, ObjectRef
from lbctl.kube import objects
from lbctl.kube.cache import Cache
from lbctl.kube.client import Client
from tests.unit.scripted import Scripted

NODES = "/api/v1/nodes"
Seen = list[tuple[str, bool, bool]]


def node(address: str = "192.0.2.21") -> dict[str, Any]:
    return {"status": {"addresses": [{"type": "InternalIP", "address": address}]}}


def key(name: str) -> ObjectRef:
    return ObjectRef("", name)


async def until(what: str, condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while not condition():  # noqa: ASYNC110 (the state is in another thread)
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"waited {limit_s} s for: {what}")


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as running:
        running.put(NODES, "a", node())
        yield running


@pytest.fixture
def seen() -> Seen:
    return []


@pytest.fixture
async def cache(server: Scripted, seen: Seen) -> AsyncIterator[Cache[Node]]:
    def changed(ref: ObjectRef, old: Node | None, new: Node | None) -> None:
        seen.append((ref.name, old is not None, new is not None))

    async with Client.with_token(server.url, "token") as client:
        made = Cache(client, objects.NODE, on_change=changed, watch_s=2.0, slack_s=0.5, cap_s=0.3)
        task = asyncio.create_task(made.run())
        await until("the first list", made.synced.is_set)
        yield made
        task.cancel()
        await asyncio.wait([task])


async def test_follows_additions_changes_and_deletions(
    server: Scripted, cache: Cache[Node], seen: Seen
) -> None:
    server.put(NODES, "b", node("192.0.2.22"))
    await until("b", lambda: key("b") in cache.items)
    server.put(NODES, "b", node("192.0.2.99"))
    await until("b's new address", lambda: str(cache.items[key("b")].addresses[0]) == "192.0.2.99")
    server.remove(NODES, "b")
    await until("b gone", lambda: key("b") not in cache.items)
    assert seen == [
        ("a", False, True),
        ("b", False, True),
        ("b", True, True),
        ("b", True, False),
    ]


async def test_a_change_of_nothing_that_is_used_calls_nobody(
    server: Scripted, cache: Cache[Node], seen: Seen
) -> None:
    server.put(NODES, "a", {**node(), "spec": {"providerID": "x"}})
    server.put(NODES, "b", node())
    await until("b", lambda: key("b") in cache.items)
    assert [name for name, _, _ in seen] == ["a", "b"]


@pytest.mark.parametrize("mode", ["gone", "gone-http"])
async def test_410_lists_again_and_finds_what_was_missed(
    server: Scripted, cache: Cache[Node], seen: Seen, mode: str
) -> None:
    lists = cache.lists
    server.mode = mode
    await until("another list", lambda: cache.lists > lists)
    server.remove(NODES, "a")
    server.put(NODES, "b", node())
    server.forget_history()
    server.mode = "normal"
    await until("b instead of a", lambda: set(cache.items) == {key("b")})
    assert ("a", True, False) in seen


@pytest.mark.parametrize("mode", ["silent", "hang", "reset", "error", "end", "garbage"])
async def test_survives_and_catches_up(server: Scripted, cache: Cache[Node], mode: str) -> None:
    before = server.count("watch")
    server.mode = mode
    await until(f"further watches in mode {mode}", lambda: server.count("watch") > before + 1)
    assert key("a") in cache.items, "what is known must stay served"
    server.put(NODES, "b", node())
    server.mode = "normal"
    await until("b", lambda: key("b") in cache.items)


async def test_watches_that_end_at_once_are_not_asked_in_a_tight_loop(
    server: Scripted, cache: Cache[Node]
) -> None:
    server.mode = "end"
    before = server.count("watch")
    await until("watches to end", lambda: server.count("watch") > before + 3)
    start, loop = asyncio.get_running_loop().time(), asyncio.get_running_loop()
    before = server.count("watch")
    await until("five more", lambda: server.count("watch") >= before + 5)
    assert loop.time() - start > 0.3, "no back-off between watches"


async def test_one_odd_object_spoils_only_itself(server: Scripted, cache: Cache[Node]) -> None:
    server.put(NODES, "odd", {"status": {"addresses": "none"}})
    server.put(NODES, "a", {"status": {"addresses": [{"type": "InternalIP", "address": "x"}]}})
    server.put(NODES, "b", {"status": {"addresses": None}})
    await until("b", lambda: key("b") in cache.items)
    assert key("odd") not in cache.items
    assert str(cache.items[key("a")].addresses[0]) == "192.0.2.21", "the last good version stays"
    assert cache.skipped == 2
    server.forget_history()
    lists = cache.lists
    server.mode = "gone"
    await until("another list", lambda: cache.lists > lists)
    assert key("a") in cache.items, "a list must not drop what it cannot decode"
