"""What left is asked of conntrack until it has been done, unless it came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from ipaddress import ip_address

import pytest

from agent.conntrack import Target
from agent.forgetting import Forgetting
from lbctl.errors import DataplaneError

LIMIT_S = 30.0
A, B = (Target(ip_address("198.51.100.1"), 80, ip_address(f"10.244.1.{n}"), 8080) for n in (2, 3))


class Conntrack:
    """Refuses so many walks, and keeps what it was asked in each. B is back after the first."""

    def __init__(self, refuses: int, done: Callable[[], object]) -> None:
        self.refuses = refuses
        self.done = done
        self.asked: list[tuple[Target, ...]] = []
        self.back: set[Target] = set()

    def forget(self, gone: Iterable[Target]) -> int:
        self.asked.append(tuple(gone))
        self.back.add(B)
        if len(self.asked) <= self.refuses:
            raise DataplaneError("conntrack: Device or resource busy")
        self.done()
        return len(self.asked[-1])


@pytest.mark.parametrize("refuses", [0, 1, 3])
def test_a_walk_that_fails_is_done_again(refuses: int) -> None:
    async def check() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        kernel = Conntrack(refuses, lambda: loop.call_soon_threadsafe(done.set))

        def still_gone(gone: Iterable[Target]) -> tuple[Target, ...]:
            return tuple(sorted(set(gone) - kernel.back, key=lambda target: int(target.pod)))

        forgetting = Forgetting(still_gone, kernel.forget, 0.0)
        task = asyncio.create_task(forgetting.run())
        forgetting.add([A, B])
        async with asyncio.timeout(LIMIT_S):
            await done.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert kernel.asked == [(A, B), *[(A,)] * refuses]
        assert forgetting.failures == refuses

    asyncio.run(check())
