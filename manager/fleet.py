"""The manager replicas as Kubernetes knows them: where they are, which live, which went when.

Rules: a replica lives as long as its Pod exists; one whose Pod is being deleted on a node that is
NotReady, and whom nobody hears, can delete nothing itself and counts as gone. What was known stays
known while the API server is away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from lbctl.core import names
from lbctl.core.model import Address, Node, ObjectRef
from lbctl.kube.objects import Pod

REMEMBER_S: Final = 3600.0
_OVER: Final = ("Succeeded", "Failed")


class Fleet:
    """Feed it Pod changes. heard: ids of the managers heard now."""

    def __init__(
        self,
        manager_id: str,
        nodes: Mapping[ObjectRef, Node],
        heard: Callable[[], tuple[str, ...]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._me = manager_id
        self._nodes = nodes
        self._heard = heard
        self._clock = clock
        self._pods: dict[str, Pod] = {}
        self._gone: dict[str, float] = {}

    def change(self, key: ObjectRef, new: Pod | None) -> bool:
        """A Pod of the namespace changed; whether that concerns the replicas."""
        if new is not None and new.app == names.MANAGER_APP and new.phase not in _OVER:
            self._pods[key.name] = new
            self._gone.pop(key.name, None)
            return True
        if self._pods.pop(key.name, None) is None:
            return False
        now = self._clock()
        self._gone = {n: at for n, at in self._gone.items() if now - at < REMEMBER_S}
        self._gone[key.name] = now
        return True

    def addresses(self) -> tuple[Address, ...]:
        """Where the replicas are, this one among them."""
        return tuple(pod.address for pod in self._pods.values() if pod.address is not None)

    def living(self) -> frozenset[str]:
        """Ids of the replicas that live; this one always does."""
        self._bury()
        return frozenset(self._pods.keys() - self._gone.keys()) | {self._me}

    def gone(self) -> dict[str, float]:
        """Ids of replicas that are gone, and since when (seconds since the epoch)."""
        self._bury()
        return dict(self._gone)

    def _bury(self) -> None:
        heard = self._heard()
        for name, pod in self._pods.items():
            node = self._nodes.get(ObjectRef("", pod.node))
            lost = pod.deleting and (node is None or not node.ready) and name not in heard
            if lost and name != self._me:
                self._gone.setdefault(name, self._clock())
            else:
                self._gone.pop(name, None)
