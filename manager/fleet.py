"""The manager replicas as Kubernetes knows them: where they are, which live, which went when.

A release waits for every replica that lives; a dead one must not block it, and one that still
announces must not be passed over. So a replica whose Pod exists counts as gone only when neither a
manager nor an agent has heard it for the hold time and MARGIN_S, and
- its host answers us, and we have been announcing for MARGIN_S: then its speaker hears us, and has
  closed its sessions for want of its manager (docs/internals.md, "Speaker"); or
- its host answers nothing, and its node is NotReady or no more: then its sessions are as old as
  its silence, and the switches have dropped them.
A replica that is cut off from us and from the API server goes on probing the agents, and they say
so; if no agent answers us, nothing is concluded. One whose Pod vanished is gone from then on, or
since it was last heard. What was known stays known while the API server is away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from lbctl.core import names
from lbctl.core.model import Address, Node, ObjectRef
from lbctl.core.probe import node_hash
from lbctl.kube.objects import Pod

REMEMBER_S: Final = 3600.0
MARGIN_S: Final = 3.0
_OVER: Final = ("Succeeded", "Failed")


class Witness(Protocol):
    """Who else may know of a replica."""

    def heard(self) -> tuple[str, ...]:
        """Ids of the managers that are heard now."""

    def heard_by_agents(self) -> frozenset[int] | None:
        """Hashes (`node_hash`) of the managers that agents hear; None if no agent answers."""

    def host_answers(self, manager: str, address: Address) -> bool:
        """Whether its host has answered us just now."""

    def announces(self) -> bool:
        """Whether we announce, and say so in our heartbeats."""


@dataclass(slots=True)
class _Silence:
    """Of one replica, each in seconds of the monotonic clock: `since` nobody has heard it, `dark`
    its host has not answered us, `fenced` (None: not so) its host hears us announce."""

    since: float
    dark: float
    fenced: float | None = None


class Fleet:
    """Feed it Pod changes and call `look` several times a second. ticks: a monotonic clock."""

    def __init__(
        self,
        manager_id: str,
        nodes: Mapping[ObjectRef, Node],
        witness: Witness,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = manager_id
        self._nodes = nodes
        self._witness = witness
        self._ticks = ticks
        self._pods: dict[str, Pod] = {}
        self._gone: dict[str, float] = {}
        self._silent: dict[str, _Silence] = {}

    def change(self, key: ObjectRef, new: Pod | None) -> bool:
        """A Pod of the namespace changed; whether that concerns the replicas."""
        if new is not None and new.app == names.MANAGER_APP and new.phase not in _OVER:
            if key.name not in self._pods:
                self._gone.pop(key.name, None)
            self._pods[key.name] = new
            return True
        if self._pods.pop(key.name, None) is None:
            return False
        self._silent.pop(key.name, None)
        now = self._ticks()
        self._gone = {n: at for n, at in self._gone.items() if now - at < REMEMBER_S}
        self._gone.setdefault(key.name, now)
        return True

    def addresses(self) -> tuple[Address, ...]:
        """Where the replicas are, this one among them."""
        return tuple(pod.address for pod in self._pods.values() if pod.address is not None)

    def living(self) -> frozenset[str]:
        """Ids of the replicas that may still announce; this one always does."""
        return frozenset(self._pods.keys() - self._gone.keys()) | {self._me}

    def gone(self) -> dict[str, float]:
        """Ids of replicas that are gone, and since when (seconds of the monotonic clock)."""
        return dict(self._gone)

    def look(self, hold_time_s: float) -> bool:
        """Take in who is heard now; whether `living` or `gone` is different from before."""
        before = self.living(), self.gone()
        heard, told = {*self._witness.heard(), self._me}, self._witness.heard_by_agents()
        for name in [n for n in self._gone if n not in self._pods]:
            if name in heard or (told is not None and node_hash(name) in told):
                self._gone[name] = self._ticks()
        for name, pod in self._pods.items():
            sure = told is not None and node_hash(name) not in told
            if name in heard or not sure:
                self._silent.pop(name, None)
                self._gone.pop(name, None)
            elif self._is_gone(name, pod, hold_time_s):
                self._gone.setdefault(name, self._silent[name].since)
            else:
                self._gone.pop(name, None)
        return before != (self.living(), self.gone())

    def _is_gone(self, name: str, pod: Pod, hold_time_s: float) -> bool:
        now = self._ticks()
        silence = self._silent.setdefault(name, _Silence(now, now))
        answers = pod.address is not None and self._witness.host_answers(name, pod.address)
        if answers:
            silence.dark = now
        if not answers or not self._witness.announces():
            silence.fenced = None
        elif silence.fenced is None:
            silence.fenced = now
        due = now - hold_time_s - MARGIN_S
        if silence.since > due:
            return False
        if silence.fenced is not None and silence.fenced <= now - MARGIN_S:
            return True
        node = self._nodes.get(ObjectRef("", pod.node))
        return silence.dark <= due and (node is None or not node.ready)
