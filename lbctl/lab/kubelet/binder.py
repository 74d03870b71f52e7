"""Carries the scheduler's plan out: binds pods, and says on a pod why it cannot be bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import structlog

from lbctl.errors import Conflict, KubeError, NotFound
from lbctl.lab.kubelet import api as kube
from lbctl.lab.kubelet.scheduler import Decision, plan
from lbctl.lab.kubelet.status import timestamp

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
_GATHER_S: Final = 0.005  # pods of one Deployment arrive together and should be spread together
_RETRY_S: Final = 1.0


class Binder:
    """The scheduler's loop."""

    def __init__(
        self,
        api: kube.Api,
        pods: Callable[[], list[Object]],
        nodes: Callable[[], list[Object]],
    ) -> None:
        """pods, nodes: every object known now."""
        self._api = api
        self._pods = pods
        self._nodes = nodes
        self._wake = asyncio.Event()
        self._assumed: dict[str, str] = {}  # bound by us, not yet seen in the watch
        self._told: dict[str, str] = {}

    def changed(self) -> None:
        """Something that scheduling depends on has changed."""
        self._wake.set()

    async def run(self) -> None:
        """Schedule for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(_GATHER_S)
            try:
                decisions = plan(self._view(), self._nodes())
            except Exception:  # noqa: BLE001 - a task root: an odd pod must not end the daemon
                _log.exception("schedule_failed")
                continue
            await asyncio.gather(*(self._carry_out(decision) for decision in decisions))

    def _view(self) -> list[Object]:
        """Pods as they will be once the watch has caught up with us."""
        pods = self._pods()
        known = {pod["metadata"]["uid"]: pod for pod in pods}
        for uid in list(self._assumed):
            if uid not in known or known[uid]["spec"].get("nodeName"):
                del self._assumed[uid]
        for uid in self._told.keys() - known.keys():
            del self._told[uid]
        view = []
        for pod in pods:
            node = self._assumed.get(pod["metadata"]["uid"])
            view.append({**pod, "spec": {**pod["spec"], "nodeName": node}} if node else pod)
        return view

    async def _carry_out(self, decision: Decision) -> None:
        try:
            if decision.node:
                await self._bind(decision)
            else:
                await self._tell(decision)
        except (NotFound, Conflict):
            self._assumed.pop(decision.uid, None)  # gone, or bound by someone else
        except KubeError as error:
            _log.info("bind_failed", pod=decision.name, error=str(error))
            self._assumed.pop(decision.uid, None)
            asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _bind(self, decision: Decision) -> None:
        self._assumed[decision.uid] = decision.node
        meta = {"name": decision.name, "namespace": decision.namespace, "uid": decision.uid}
        target = {"apiVersion": "v1", "kind": "Node", "name": decision.node}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": meta, "target": target}
        url = kube.path("pods", decision.namespace, decision.name)
        await self._api.create(f"{url}/binding", body)

    async def _tell(self, decision: Decision) -> None:
        if self._told.get(decision.uid) == decision.why:
            return
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": decision.why,
            "lastTransitionTime": timestamp(time.time()),
        }
        body = {"status": {"conditions": [condition]}}
        url = kube.path("pods", decision.namespace, decision.name)
        await self._api.patch(f"{url}/status", body)
        self._told[decision.uid] = decision.why
