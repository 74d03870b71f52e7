"""One Service's writes in order, several Services' at a time.

Rules: while a Service's actions are under way nothing else is written of it; what was planned for
it meanwhile is handed back undone. A Service that failed waits longer each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from lbctl.core.actions import Action
from lbctl.core.model import ObjectRef
from lbctl.kube.backoff import Backoff
from manager.executor import Executor

_AT_A_TIME: Final = 16


class Dispatcher:
    """Runs sequences of actions in `group`. undone(actions) is called with what was not done."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        executor: Executor,
        undone: Callable[[Sequence[Action]], None],
    ) -> None:
        self._group = group
        self._executor = executor
        self._undone = undone
        self._slots = asyncio.Semaphore(_AT_A_TIME)
        self._late: dict[ObjectRef, list[Action]] = {}
        self._waits: dict[ObjectRef, Backoff] = {}

    @property
    def busy(self) -> int:
        """Services whose actions are under way."""
        return len(self._late)

    def submit(self, actions: Sequence[Action]) -> None:
        """The actions of one Service; returns at once."""
        ref = actions[0].service
        if ref in self._late:
            self._late[ref] += actions
            return
        self._late[ref] = []
        self._group.create_task(self._run(ref, actions), name=f"write {ref}")

    async def _run(self, ref: ObjectRef, actions: Sequence[Action]) -> None:
        async with self._slots:
            left = await self._executor.carry_out(actions)
        if left:
            await asyncio.sleep(self._waits.setdefault(ref, Backoff(0.02, 5.0)).next_s())
        else:
            self._waits.pop(ref, None)
        late = self._late.pop(ref)
        if left or late:
            self._undone([*left, *late])
