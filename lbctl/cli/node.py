"""`lbctl node drain|undrain NODE`: take a node out of all routes before work on it, and back.

Rules: draining withdraws the node's next hops and nothing else; its pods go on serving what other
nodes steer to them until `kubectl drain` moves them. "Safe" is said only when every manager that
runs answers and has withdrawn it. Exit code 0 done, 1 not within the limit, 2 it cannot be told,
because a manager did not answer within the limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lbctl.cli.live import Answer, ask_all, find_kubeconfig
from lbctl.cli.output import WRONG, Kubeconfig, cannot, clean, console
from lbctl.core import names
from lbctl.core.model import Phase
from lbctl.errors import LbctlError, NotFound, Unreachable
from lbctl.kube.client import NODES, Client

POLL_S: Final = 0.3
# Speakers confirm in milliseconds; a switch's kernel follows within a second (docs/benchmarks.md).
SETTLE_S: Final = 2.0

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Name = Annotated[str, typer.Argument(help="The Kubernetes node.")]
Limit = Annotated[float, typer.Option("--timeout", help="Seconds to wait at most.")]


@app.callback()
def _root() -> None:
    """Take nodes out of the routes for maintenance, and back."""


@app.command()
def drain(node: Name, timeout: Limit = 60.0, kubeconfig: Kubeconfig = None) -> None:
    """Withdraw a node's next hops; returns when it may be switched off as a forwarder."""
    left = _run(_drain(node, timeout, kubeconfig))
    out = console()
    if left:
        for line in left:
            out.print(f"not yet: {clean(line)}")
        out.print(f"{node} is not out of all routes after {timeout:g} s; `lbctl status` has more")
        raise typer.Exit(WRONG)
    out.print(f"{node} is in no route any more: no connection enters by it")
    out.print(
        f"its pods still get what other nodes steer to them; to move them: kubectl drain {node}"
    )
    out.print(f"afterwards: lbctl node undrain {node}")


@app.command()
def undrain(node: Name, kubeconfig: Kubeconfig = None) -> None:
    """Let a node be a next hop again."""
    _run(_annotate(node, None, kubeconfig))
    console().print(f"{node} may be a next hop again; `lbctl status` shows when it is")


def _run(work: Coroutine[Any, Any, tuple[str, ...]]) -> tuple[str, ...]:
    try:
        return asyncio.run(work)
    except LbctlError as error:
        cannot(error)


async def _client(kubeconfig: Path | None) -> Client:
    return await Client.from_environment(find_kubeconfig(kubeconfig), timeout_s=10.0)


async def _annotate(node: str, value: str | None, kubeconfig: Path | None) -> tuple[str, ...]:
    async with await _client(kubeconfig) as client:
        await _set(client, node, value)
    return ()


async def _set(client: Client, node: str, value: str | None) -> None:
    path = NODES.path(name=node)
    try:
        await client.patch(path, {"metadata": {"annotations": {names.ANNOTATION_DRAIN: value}}})
    except NotFound as error:
        raise NotFound(f"there is no node {node!r}; `kubectl get nodes` lists them") from error


async def _drain(node: str, limit_s: float, kubeconfig: Path | None) -> tuple[str, ...]:
    """Annotate, then wait; what is still in the way at the limit, () if nothing."""
    deadline = time.monotonic() + limit_s
    async with await _client(kubeconfig) as client:
        await _set(client, node, "true")
        while True:
            answers = (await ask_all(client, names.NAMESPACE)).answers
            left, silent = in_the_way(node, answers), unheard(answers)
            if not left and not silent:
                await asyncio.sleep(SETTLE_S)
                return ()
            if time.monotonic() > deadline:
                if not left:
                    raise Unreachable(f"{node} may still be in routes: {silent}")
                return left
            await asyncio.sleep(POLL_S)


def unheard(answers: Iterable[Answer]) -> str:
    """Which managers' routes are not known, in a sentence with the way out; "" if all are. Pure."""
    silent = [answer for answer in answers if answer.runs and answer.state is None]
    who = ", ".join(f"{a.pod} on {a.node or 'no node'} ({a.error})" for a in silent)
    return who and f"no answer of manager {who}; look at the switches before you switch it off"


def in_the_way(node: str, answers: Iterable[Answer]) -> tuple[str, ...]:
    """Why a node cannot be called out of all routes yet, in sentences; () if it is. Pure."""
    found = []
    states = [answer.state for answer in answers if answer.state is not None]
    if not states:
        return ("no manager answers",)
    for state in states:
        still = [
            str(eip.address)
            for eip in state.eips
            if eip.phase is Phase.BOUND
            and any(hop.node == node and hop.next_hop is not None for hop in eip.hops)
        ]
        if still:
            more = f" and {len(still) - 1} more" if len(still) > 1 else ""
            found.append(f"{state.manager} still announces it for {still[0]}{more}")
    return tuple(found)
