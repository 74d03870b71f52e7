"""`takeover: observe`: what would be done, for every Service, and nothing done.

Rules: the forecast is of `adopt`, which comes next. It looks at everything each time, in a thread
and at most once a second: another controller still gives addresses, and one that it gives changes
what others could get.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from lbctl.core.actions import Told
from lbctl.core.config import Config
from lbctl.core.forecast import Forecast, forecast, told
from lbctl.core.holdings import Decision
from lbctl.core.model import ObjectRef
from lbctl.core.reasons import Reason
from lbctl.core.supply import Forbidden
from manager.inputs import Inputs

_EVERY_S: Final = 1.0


class Rehearsal:
    """say: an Event about a Service; decided: its decision changed."""

    def __init__(
        self, inputs: Inputs, say: Callable[[Told], None], decided: Callable[[ObjectRef], None]
    ) -> None:
        self._inputs = inputs
        self._say = say
        self._decided = decided
        self._looked_s = 0.0
        self._decisions: dict[ObjectRef, Decision] = {}

    def decision(self, ref: ObjectRef) -> Decision | None:
        """What would be done about a Service, None if nothing is known of it."""
        return self._decisions.get(ref)

    async def look(self, config: Config, forbidden: Iterable[Forbidden]) -> None:
        """Forecast again, and tell what has changed."""
        await asyncio.sleep(max(0.0, self._looked_s + _EVERY_S - time.monotonic()))
        services = dict(self._inputs.services.cache.items)
        eips = tuple(self._inputs.eips.cache.items.values())
        later = config.model_copy(update={"takeover": "adopt"})
        labels = {
            namespace.ref.name: dict(namespace.labels)
            for namespace in self._inputs.namespaces.cache.items.values()
        }
        found = await asyncio.to_thread(
            forecast, later, services.values(), eips, tuple(forbidden), labels
        )
        self._looked_s = time.monotonic()
        before = self._decisions
        self._decisions = {one.service: _decision(one) for one in found}
        for ref, now in sorted(self._decisions.items()):
            if before.get(ref) != now:
                self._say(Told(ref, services[ref], now.reason, now.sentence))
                self._decided(ref)


def _decision(one: Forecast) -> Decision:
    return Decision(one.service, Reason.OBSERVING, f"takeover: observe: {told(one)}")
