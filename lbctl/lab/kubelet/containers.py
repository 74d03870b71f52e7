"""One container's life: start, probes, death, restart with back-off, and its end on request.

Rules: the state is changed only here; `changed()` is called after each change. A container is
killed as the kubelet kills it: SIGTERM to its first process, the grace period, SIGKILL.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import structlog

from lbctl.errors import LabError
from lbctl.lab.kubelet import podspec, probes, status
from lbctl.lab.kubelet.launch import Launch
from lbctl.lab.kubelet.runtime import Runtime

Object: TypeAlias = dict[str, Any]
_log = structlog.get_logger()
_BACKOFF_S: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_STEADY_S: Final = 60.0  # a run this long starts the back-off anew
_RETRY_S: Final = 0.5
_START_FAILED: Final = 128


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a container needs of its pod."""

    pod: Object
    runtime: Runtime
    prepare: Callable[[Object], Launch]
    target: Callable[[Object, Callable[..., Awaitable[tuple[int | None, str]]]], probes.Target]
    changed: Callable[[], None]


class Container:
    """A container of a pod, from its first start until `stop`."""

    def __init__(self, spec: Object, around: Surroundings, restarts: int = 0) -> None:
        """restarts: what the pod's status counted before this kubelet knew it."""
        self.spec = spec
        self.name: str = spec["name"]
        self.state = status.ContainerState(self.name, spec.get("image", ""), restarts=restarts)
        self.key = f"{around.pod['metadata']['uid']}/{self.name}"
        self.pidns = 0
        self._around = around
        self._exit: asyncio.Future[int] | None = None
        self._stopping = False
        self._killing: asyncio.Task[None] | None = None
        self._failures = 0
        self._started = asyncio.Event()

    def exited(self, code: int) -> None:
        """The runtime says that the first process is gone."""
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(code)

    async def run(self) -> None:
        """Run it, again and again as the restartPolicy says. Returns when it is over for good."""
        while not self._stopping:
            try:
                launch = self._around.prepare(self.spec)
            except podspec.ConfigProblem as error:
                self._wait("CreateContainerConfigError", str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            began = time.time()
            code, why = await self._once(launch)
            self._ended(code, began, why)
            if self._over(code):
                return
            if time.time() - began > _STEADY_S:
                self._failures = 0
            await self._back_off()

    async def _once(self, launch: Launch) -> tuple[int, str]:
        """One run; its exit code, and why it could not start."""
        self._exit = asyncio.get_running_loop().create_future()
        try:
            self.pidns = await self._around.runtime.launch(self.key, launch)
        except LabError as error:
            if self._around.runtime.lost.is_set():
                raise
            return _START_FAILED, str(error)
        self._running()
        checks = [asyncio.create_task(check) for check in self._checks()]
        try:
            return await self._exit, ""
        finally:
            self.pidns = 0
            for check in checks:
                check.cancel()
            await asyncio.gather(*checks, return_exceptions=True)

    def _running(self) -> None:
        meta = self._around.pod["metadata"]
        self.state.container_id = f"lab://{meta['uid']}-{self.name}-{self.state.restarts}"
        self.state.state = status.running(time.time())
        self.state.started = "startupProbe" not in self.spec
        self._started = asyncio.Event()
        if self.state.started:
            self._started.set()
        self.state.ready = self.state.started and "readinessProbe" not in self.spec
        self._around.changed()

    def _wait(self, reason: str, message: str) -> None:
        fresh = status.waiting(reason, message)
        if self.state.state != fresh:
            self.state.state = fresh
            self._around.changed()

    def _ended(self, code: int, began: float, why: str) -> None:
        ended = status.terminated(code, began, time.time(), self.state.container_id)
        if why:
            ended["terminated"].update(reason="StartError", message=why)
            _log.warning("container_start_failed", container=self.key, error=why)
        self.state.state = ended
        self.state.ready = self.state.started = False
        self._around.changed()

    def _over(self, code: int) -> bool:
        policy = self._around.pod["spec"].get("restartPolicy") or "Always"
        again = policy == "Always" or (policy == "OnFailure" and code != 0)
        self.state.over = self._stopping or not again
        self._around.changed()
        return self.state.over

    async def _back_off(self) -> None:
        delay = _BACKOFF_S[min(self._failures, len(_BACKOFF_S) - 1)]
        self._failures += 1
        self.state.last = self.state.state
        if delay:
            message = f"back-off {delay:g}s restarting failed container={self.name}"
            self._wait("CrashLoopBackOff", message)
        await asyncio.sleep(delay)
        self.state.restarts += 1

    # probes

    def _checks(self) -> list[Any]:
        """The coroutines that probe this run."""
        target = self._around.target(self.spec, self._execute)
        startup = probes.parse(self.spec, "startupProbe")
        if startup is not None:
            return [
                probes.keep_checking(startup, target, self._startup, eager=True),
                *self._after_startup(target),
            ]
        return self._after_startup(target)

    def _after_startup(self, target: probes.Target) -> list[Any]:
        found: list[Any] = []
        for name, verdict in (("livenessProbe", self._liveness), ("readinessProbe", self._ready)):
            probe = probes.parse(self.spec, name)
            if probe is not None:
                found.append(self._once_started(probe, target, verdict, name == "readinessProbe"))
        return found

    async def _once_started(
        self,
        probe: probes.Probe,
        target: probes.Target,
        verdict: Callable[[bool, str], None],
        eager: bool,
    ) -> None:
        await self._started.wait()
        await probes.keep_checking(probe, target, verdict, eager)

    def _startup(self, good: bool, why: str) -> None:
        if good:
            self.state.started = True
            self._started.set()
            self.state.ready = "readinessProbe" not in self.spec
            self._around.changed()
        elif not self.state.started:
            self._kill_soon("startup", why)

    def _ready(self, good: bool, why: str) -> None:
        if self.state.ready != good:
            _log.info("container_ready", container=self.key, ready=good, why=why)
            self.state.ready = good
            self._around.changed()

    def _liveness(self, good: bool, why: str) -> None:
        if not good:
            self._kill_soon("liveness", why)

    def _kill_soon(self, probe: str, why: str) -> None:
        _log.warning("container_unhealthy", container=self.key, probe=probe, why=why)
        asked = self._around.pod["spec"].get("terminationGracePeriodSeconds")
        self._killing = asyncio.create_task(self.kill(30.0 if asked is None else float(asked)))

    async def _execute(self, argv: list[str], timeout_s: float) -> tuple[int | None, str]:
        return await self._around.runtime.execute(self.key, argv, timeout_s)

    # the end

    async def kill(self, grace_s: float) -> None:
        """End the run that is on, as a kubelet does. Returns when it has ended."""
        ending = self._exit
        if not self.pidns or ending is None or ending.done():
            return
        try:
            if grace_s > 0:
                await self._pre_stop(grace_s)
                await self._around.runtime.signal(self.key, signal.SIGTERM)
                await asyncio.wait([ending], timeout=grace_s)
            if not ending.done():
                await self._around.runtime.signal(self.key, signal.SIGKILL)
                await asyncio.wait([ending])
        except LabError as error:
            _log.info("container_kill_failed", container=self.key, error=str(error))

    async def _pre_stop(self, grace_s: float) -> None:
        hook: Object = (self.spec.get("lifecycle") or {}).get("preStop") or {}
        if "sleep" in hook:
            await asyncio.sleep(min(grace_s, float(hook["sleep"]["seconds"])))
        elif "exec" in hook:
            await self._execute(hook["exec"]["command"], grace_s)

    async def stop(self, grace_s: float) -> None:
        """End it for good."""
        self._stopping = True
        await self.kill(grace_s)
