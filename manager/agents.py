"""On which nodes an agent is expected: those that have an agent Pod.

Rules: where none is expected, nothing is probed and judged. A Pod that goes (a roll-out, an
eviction) leaves its forwarding behind, so its node is probed on for the agents' grace. While the
API server is away the last known Pods count. If no agent Pod is known at all, agents run in some
other way, and every node is expected to have one. A Pod that Kubernetes calls ready has worked: if
its node never answers us, it is not because there is no agent yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from lbctl.core import names
from lbctl.core.model import ObjectRef
from lbctl.kube.objects import Pod

_OVER: Final = ("Succeeded", "Failed")


class AgentHosts:
    """Feed it Pod changes. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pods: dict[ObjectRef, tuple[str, bool]] = {}  # node, and whether it is ready
        self._left: dict[str, float] = {}

    def change(self, key: ObjectRef, new: Pod | None) -> bool:
        """A Pod of the namespace changed; whether that concerns the agents."""
        ours = new is not None and new.app == names.AGENT_APP and new.phase not in _OVER
        node = new.node if new is not None and ours else ""
        now = node, new is not None and new.ready
        before = self._pods.pop(key, ("", False))
        if node:
            self._pods[key] = now
        if before[0] and before[0] != node:
            self._left[before[0]] = self._clock()
        return before != now

    def nodes(self, grace_s: float) -> frozenset[str] | None:
        """Names of the nodes to probe; None for all."""
        now_s = self._clock()
        self._left = {n: at_s for n, at_s in self._left.items() if now_s - at_s <= grace_s}
        return frozenset({*(node for node, _ in self._pods.values()), *self._left}) or None

    def ready(self) -> frozenset[str]:
        """Names of the nodes whose agent Kubernetes calls ready."""
        return frozenset(node for node, ready in self._pods.values() if ready)
