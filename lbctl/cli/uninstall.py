"""`lbctl uninstall`: takes lbctl off a cluster, so that no Service is left that cannot be deleted.

Rules: `core.uninstall` plans; here each stage is carried out, what is there is read again, and the
next one is planned, so running it once more after an interruption finishes it. Managers that cannot
be seen to be gone stop it (they may still announce); a node that cannot be cleaned does not.
Exit codes: 0 done (or nothing to do), 1 something is left, 2 not begun.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, Final

import msgspec
import typer

from lbctl.cli.live import open_client
from lbctl.cli.output import WRONG, Kubeconfig, cannot, clean, console
from lbctl.cli.site import Site, every, read_site
from lbctl.core import names
from lbctl.core import uninstall as plans
from lbctl.core.config import Config, parse
from lbctl.core.uninstall import Found, Step, Thing
from lbctl.errors import ConfigError, Conflict, KubeError, LbctlError, NotFound, Unreachable
from lbctl.kube import client as api
from lbctl.kube import objects
from lbctl.kube.client import Client, Resource

POLL_S: Final = 0.3
_AT_A_TIME: Final = 16
_TRIES: Final = 20  # of a write that meets others'
_SHOWN: Final = 10  # steps of one kind
Say = Callable[[str], None]


def uninstall(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and end.")] = False,
    keep_config: Annotated[
        bool, typer.Option("--keep-config", help="Keep ConfigMap lbctl and its namespace.")
    ] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for each stage.")] = 180.0,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Take lbctl off a cluster: routes, forwarding, Services' addresses, then all of its own."""
    out = console()

    def say(text: str) -> None:
        out.print(clean(text))

    try:
        steps = asyncio.run(_planned(kubeconfig, keep_config))
    except LbctlError as error:
        cannot(error)
    if not steps:
        say("nothing of lbctl is on this cluster")
        return
    for line in told(steps, whole=dry_run):
        say(line)
    if dry_run:
        return
    if not yes:
        _ask()
    try:
        left = asyncio.run(_carry_out(kubeconfig, keep_config, timeout, say))
    except LbctlError as error:
        say(f"stopped: {error}")
        say("what is done is done; `lbctl uninstall` again goes on from here")
        raise typer.Exit(WRONG) from None
    for node in left:
        say(f"left: node {node} is not clean; see its agent's log, then `lbctl uninstall` again")
    if left:
        raise typer.Exit(WRONG)
    say("done: nothing of lbctl is left" + (" but its configuration" if keep_config else ""))


def _ask() -> None:
    if not sys.stdin.isatty():
        cannot("nothing was done: there is no terminal to ask at; say --yes to go ahead")
    if not typer.confirm("Go ahead?"):
        cannot("nothing was done")


def told(steps: Sequence[Step], whole: bool) -> list[str]:
    """The plan for people: stages numbered, long ones shortened if it need not be whole."""
    lines = []
    for number, stage in enumerate(_stages(steps), 1):
        shown = len(stage) if whole else _SHOWN
        lines += [f"{number}. {stage[0]}", *(f"   {step}" for step in stage[1:shown])]
        if len(stage) > shown:
            lines.append(f"   and {len(stage) - shown} more")
    return lines


def _stages(steps: Sequence[Step]) -> Iterable[tuple[Step, ...]]:
    return (tuple(stage) for _, stage in groupby(steps, type))


async def _planned(kubeconfig: Any, keep_config: bool) -> tuple[Step, ...]:
    async with await open_client(kubeconfig) as client:
        return plans.plan(await Uninstaller(client, 0.0, lambda _text: None).look(), keep_config)


async def _carry_out(kubeconfig: Any, keep: bool, limit_s: float, say: Say) -> tuple[str, ...]:
    async with await open_client(kubeconfig) as client:
        return await Uninstaller(client, limit_s, say).run(keep)


class Uninstaller:
    """Carries out stage after stage. limit_s: for each wait."""

    def __init__(self, client: Client, limit_s: float, say: Say) -> None:
        self._client = client
        self._limit_s = limit_s
        self._say = say
        self._quiet = False
        self._cleaned = False
        self._dirty: tuple[str, ...] = ()

    async def run(self, keep_config: bool) -> tuple[str, ...]:
        """Until nothing is left to do; the nodes that could not be cleaned. Raises KubeError."""
        begin_s = time.monotonic()
        before: tuple[Step, ...] = ()
        while steps := plans.plan(await self.look(), keep_config):
            if steps == before:
                raise KubeError(f"it comes back, or was not done: {steps[0]}")
            before = steps
            stage = next(iter(_stages(steps)))
            more = f" (and {len(stage) - 1} more)" if len(stage) > 1 else ""
            self._say(f"{time.monotonic() - begin_s:6.1f} s  {stage[0]}{more}")
            await self._do(stage)
        return self._dirty

    async def look(self) -> Found:
        """What of ours is there."""
        things = (plans.MANAGERS, *plans.THINGS)
        site, pods, *there = await asyncio.gather(
            read_site(self._client),
            self._pods(names.MANAGER_APP),
            *(self._exists(thing) for thing in things),
        )
        return Found(
            managers=tuple(sorted(pod["metadata"]["name"] for pod in pods)),
            services=site.services,
            eips=site.eips,
            nodes=site.nodes,
            things=frozenset(thing for thing, here in zip(things, there, strict=True) if here),
            config=_config(site),
            quiet=self._quiet,
            cleaned=self._cleaned,
            dirty=self._dirty,
        )

    async def _do(self, stage: tuple[Step, ...]) -> None:
        match stage[0]:
            case plans.StopManagers():
                self._quiet = False
                await self._delete(plans.MANAGERS)
                await self._wait(self._managers_left)
            case plans.AwaitRoutes(seconds):
                await asyncio.sleep(seconds)
                self._quiet = True
            case plans.CleanNodes():
                await self._clean_nodes()
            case _:
                slots = asyncio.Semaphore(_AT_A_TIME)
                await asyncio.gather(*(self._one(step, slots) for step in stage))

    async def _one(self, step: Step, slots: asyncio.Semaphore) -> None:
        async with slots:
            match step:
                case plans.LetGo():
                    await self._let_go(step)
                case plans.Undrain(node):
                    body = {"metadata": {"annotations": {names.ANNOTATION_DRAIN: None}}}
                    await self._client.patch(api.NODES.path(name=node), body)
                case plans.Delete(thing):
                    await self._delete(thing)

                    await self._wait(lambda: self._still(thing))

    async def _managers_left(self) -> str:
        pods = await self._pods(names.MANAGER_APP)
        if not pods:
            return ""
        name, node = pods[0]["metadata"]["name"], pods[0]["spec"].get("nodeName") or "no node"
        return (
            f"manager {name} on {node} is still there, and may announce; if its host is off: "
            f"kubectl -n {names.NAMESPACE} delete pod --force {name}"
        )

    async def _clean_nodes(self) -> None:
        """Have the agents clean up; who does not in time is remembered."""
        path = _path(plans.AGENTS)
        if change := plans.cleaning(await self._client.get(path)):
            await self._client.patch(path, change)
        try:
            await self._wait(self._agents_left)
        except KubeError:
            self._dirty = await self._uncleaned() or ("unknown",)
        self._cleaned = True
        ready = await self._ready()
        away = {pod["spec"].get("nodeName") for pod in await self._pods(names.AGENT_APP)} - ready
        for node in sorted(filter(None, away)):
            self._say(f"node {node} is NotReady: what it may have goes when it boots")

    async def _agents_left(self) -> str:
        left = await self._uncleaned()
        if left is None:
            return "the DaemonSet has not been rolled out"
        return f"not clean yet: {', '.join(left)}" if left else ""

    async def _uncleaned(self) -> tuple[str, ...] | None:
        item, pods, ready = await asyncio.gather(
            self._client.get(_path(plans.AGENTS)),
            self._pods(names.AGENT_APP),
            self._ready(),
        )
        return plans.uncleaned(item, pods, ready)

    async def _let_go(self, step: plans.LetGo) -> None:
        """Status first: what holds a Service is taken off when nothing of it is left."""
        ref = step.service
        for _ in range(_TRIES):
            try:
                item = await self._client.get(api.SERVICES.path(ref.namespace, ref.name))
                of_status, of_meta = plans.let_go(step, item)
                if of_status:
                    path = api.SERVICES.path(ref.namespace, ref.name, "status")
                    item = await self._client.patch(path, _guarded(of_status, item))
                if of_meta:
                    path = api.SERVICES.path(ref.namespace, ref.name)
                    await self._client.patch(path, _guarded(of_meta, item))
                return
            except NotFound:
                return
            except Conflict:
                continue  # somebody wrote in between: look again
        raise KubeError(f"Service {ref}: somebody else writes it all the time")

    async def _wait(self, look: Callable[[], Awaitable[str]]) -> None:
        """Until `look` finds nothing ("") left. Raises KubeError with what is, at the limit."""
        deadline = time.monotonic() + self._limit_s
        while True:
            try:
                left = await look()
            except Unreachable as error:
                left = str(error)
            if not left:
                return
            if time.monotonic() > deadline:
                raise KubeError(left)
            await asyncio.sleep(POLL_S)

    # Reading

    async def _pods(self, app: str) -> list[Any]:
        selector = {"labelSelector": f"app.kubernetes.io/name={app}"}
        page = await self._client.list(api.PODS.path(names.NAMESPACE), selector)
        return [msgspec.json.decode(raw) for raw in page.items or ()]

    async def _ready(self) -> frozenset[str]:
        nodes = await every(self._client, objects.NODE)
        return frozenset(node.name for node in nodes if node.ready)

    async def _exists(self, thing: Thing) -> bool:
        try:
            await self._client.get(_path(thing))
        except NotFound:
            return False
        return True

    async def _still(self, thing: Thing) -> str:
        if not await self._exists(thing):
            return ""
        pods = await self._pods(names.AGENT_APP) if thing == plans.SPACE else []
        held = [f"Pod {p['metadata']['name']} on {p['spec'].get('nodeName')}" for p in pods]
        return f"{thing} is still there" + (f", by {', '.join(held)}" if held else "")

    async def _delete(self, thing: Thing) -> None:
        await self._client.delete(_path(thing))


def _config(site: Site) -> Config | None:
    try:
        return parse(site.accepted.text) if site.accepted is not None else None
    except ConfigError:
        return None  # a newer lbctl's


def _path(thing: Thing) -> str:
    space = names.NAMESPACE if thing.namespaced else ""
    return Resource(thing.api, thing.plural, thing.namespaced).path(space, thing.name)


def _guarded(body: dict[str, Any], item: Any) -> dict[str, Any]:
    version = item["metadata"]["resourceVersion"]
    return {**body, "metadata": {**body.get("metadata", {}), "resourceVersion": version}}
