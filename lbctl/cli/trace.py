"""`lbctl trace EIP:PORT --from CLIENT:PORT`: which pod gets a packet, and by which rule.

Computed from the API server's objects and the managers' states, as agents compute it
(`lbctl.core.trace`); no packet is sent. One odd object is left out, as agents leave it out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console

from lbctl.cli.live import Live, ask_all, open_client
from lbctl.cli.output import (
    OK,
    WRONG,
    Kubeconfig,
    Output,
    OutputOption,
    cannot,
    clean,
    console,
    print_json,
)
from lbctl.cli.status import merge_or_stop
from lbctl.core import forwarding, names
from lbctl.core import trace as tracing
from lbctl.core.config import Config, parse
from lbctl.core.endpoints import Doubt
from lbctl.core.forwarding import EVERYWHERE, Locator
from lbctl.core.model import Address, Protocol
from lbctl.core.nftrules import UDP_MEMORY_S
from lbctl.core.plain import to_plain
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.trace import Action, Ingress, Packet, Scene, Trace, Verdict
from lbctl.errors import KubeError, LbctlError, NotFound
from lbctl.kube import objects
from lbctl.kube.client import CONFIG_MAPS, Client
from lbctl.kube.objects import Kind
from lbctl.kube.slices import SliceIndex

T = TypeVar("T")


class Transport(StrEnum):
    """`--proto`."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


def trace(
    to: Annotated[str, typer.Argument(metavar="EIP:PORT", help="IPv6: [EIP]:PORT")],
    source: Annotated[str, typer.Option("--from", metavar="CLIENT:PORT")],
    proto: Annotated[Transport, typer.Option(help="Layer-4 protocol")] = Transport.TCP,
    output: OutputOption = Output.TEXT,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Where a new flow goes, and by which rule. Exit code 0: to an endpoint, 1: not, 2: unknown."""
    (eip, port), (client, client_port) = _end(to), _end(source)
    if eip.version != client.version:
        cannot(f"{eip} and {client} are of different families")
    packet = Packet(eip, port, client, client_port, Protocol(proto.value.upper()))
    try:
        scene, live = asyncio.run(_fetch(kubeconfig))
    except LbctlError as error:
        cannot(error)
    merge_or_stop(live)
    found = tracing.trace(packet, scene)
    if output is Output.JSON:
        print_json({"arrives": found.arrives, **to_plain(found)})
    else:
        show(found, live, console())
    raise typer.Exit(OK if found.arrives else WRONG)


def _end(text: str) -> tuple[Address, int]:
    """`198.51.100.1:80` or `[2001:db8::1]:80`."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host)
        number = int(port) if colon and port.isascii() and port.isdigit() else 0
    except ValueError:
        cannot(f"{text} is not ADDRESS:PORT")
    if (address.version == 6) is not bracketed or not 0 < number < 65536:
        cannot(f"{text} is not ADDRESS:PORT (of IPv6 [ADDRESS]:PORT)")
    return address, number


async def _fetch(kubeconfig: Path | None) -> tuple[Scene, Live]:
    async with await open_client(kubeconfig) as client:
        return await fetch_scene(client)


async def fetch_scene(client: Client) -> tuple[Scene, Live]:
    """What a trace is computed from, and all managers' answers. KubeError if it cannot be had."""
    live, config, eips, services, slices, nodes = await asyncio.gather(
        ask_all(client, names.NAMESPACE),
        _accepted(client),
        _every(client, objects.EIP),
        _every(client, objects.SERVICE),
        _every(client, objects.SLICE),
        _every(client, objects.NODE),
    )
    index, doubt = SliceIndex(), Doubt()
    for node in nodes:
        doubt.note(node.name, node.ready, 0.0)
    for one in slices:
        index.change(None, one)
    managers = tuple(answer.state for answer in live.answers if answer.state is not None)
    options = config.forwarding_options
    table = forwarding.build(
        eips,
        {service.ref: service for service in services},
        {known.service: known for known in index.all()},
        Locator(nodes, options.located_by),
        tracing.down_set(managers, nodes),
        options=options,
        doubtful=doubt.nodes(0.0),
    )
    return Scene(config, table, tuple(nodes), managers, live.agents), live


async def _accepted(client: Client) -> Config:
    try:
        path = CONFIG_MAPS.path(names.NAMESPACE, names.ACCEPTED_CONFIG_MAP)
        found = await client.get(path)
    except NotFound as error:
        raise KubeError("no configuration has been accepted yet") from error
    text = ((found or {}).get("data") or {}).get(names.CONFIG_KEY) or ""
    return parse(text, names.ACCEPTED_CONFIG_MAP)


async def _every(client: Client, kind: Kind[T]) -> list[T]:
    page = await client.list(kind.resource.path())
    decoded = (_decoded(raw, kind.decode) for raw in page.items or ())
    return [one for one in decoded if one is not None]


def _decoded(raw: msgspec.Raw, decode: Callable[[bytes | msgspec.Raw], T]) -> T | None:
    try:
        return decode(raw)
    except KubeError:
        return None


def show(found: Trace, live: Live, out: Console) -> None:
    """The page for people."""
    packet = found.packet
    ends = (_ended(packet.client, packet.source), _ended(packet.eip, packet.port))
    out.print(f"{ends[0]} to {ends[1]}, {packet.protocol.value}, a new flow", style="bold")
    for line in told(found.verdict):
        out.print(f"  {clean(line)}")
    for line in _but(packet, found.verdict):
        out.print(f"  {line}")
    out.print("Where it may come in", style="bold")
    for one in found.ingress:
        out.print(f"  {clean(one.node)}: {clean(_way(one, found))}")
        for line in _judgements(one):
            out.print(f"    {clean(line)}")
    problems = [
        f"{one.node}'s table has the digest {one.digest}, computed is {found.digest}:"
        " it is behind or ahead, and may do otherwise"
        for one in found.ingress
        if one.differs
    ]
    problems += [f"manager {a.pod}: {a.error}" for a in live.answers if a.state is None]
    if problems:
        out.print("Beware", style="bold red")
        for problem in problems:
            out.print(f"  {clean(problem)}")


def _but(packet: Packet, verdict: Verdict) -> list[str]:
    """What the nodes may know that no manager does."""
    if verdict.endpoint is None:
        return []
    if verdict.by_client:
        return [
            "So it is for a new client. One that is pinned to a pod of that node keeps that pod;",
            "if the bucket moved, one that is pinned on its last owner's node keeps the one there.",
        ]
    if packet.protocol is Protocol.UDP:
        return [f"Within {UDP_MEMORY_S} s of a change of endpoints the bucket's former one may."]
    return []


def _ended(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def told(verdict: Verdict) -> list[str]:
    """The rule, in sentences."""
    lines = [] if verdict.service is None else [f"It is for Service {verdict.service}."]
    said = SENTENCE[verdict.reason]
    if verdict.reason is Reason.OWN_ENDPOINTS:
        return [*lines, f"{said[0].upper()}{said[1:]}. [{verdict.reason.value}]"]
    if verdict.endpoint is None:
        return [*lines, f"Nobody gets it: {said}. [{verdict.reason.value}]"]
    what = (
        "client's address (ClientIP affinity)" if verdict.by_client else "client's address and port"
    )
    where = f"on {verdict.node}"
    if verdict.node == EVERYWHERE:
        where = "on no node, in the name of the node that it comes in by"
    lines.append(f"By the {what} it falls into bucket {verdict.bucket} of {verdict.buckets}.")
    end = _taker(verdict)
    lines.append(f"That bucket's endpoint gets it: {end} {where}. [{verdict.reason.value}]")
    return lines


def _taker(verdict: Verdict) -> str:
    pod = f"pod {verdict.pod}, " if verdict.pod else ""
    return pod + _ended(verdict.endpoint, verdict.port) if verdict.endpoint else ""


_WAYS = {
    "direct": "directly",
    "tunnel": "by the tunnel",
    "auto": "directly within a subnet, else by the tunnel",
}


def _way(one: Ingress, found: Trace) -> str:
    does = one.action.value
    if one.action is Action.STEERS:
        does = f"steers it to {one.to} ({one.via}) {_WAYS[found.steering]}"
    elif one.action is Action.LEAVES:
        does = "does nothing with it: the node's own routes and rules decide"
    elif one.action is Action.DELIVERS and found.verdict.endpoint is None:
        does = f"delivers it to {_taker(one.verdict)}"
    elif one.verdict.reason is Reason.NO_LOCAL_ENDPOINT:
        does = f"drops it: {SENTENCE[one.verdict.reason]} [{one.verdict.reason.value}]"
    else:
        does = f"{does} it"
    seen = f"a next hop at {', '.join(one.switches)}" if one.switches else "no next hop"
    return f"{seen}; {does}"


def _judgements(one: Ingress) -> list[str]:
    """How managers judge the node: one line if they agree."""
    lines: dict[str, list[str]] = {}
    for judged in one.judged:
        why = f", {SENTENCE[judged.reason]} [{judged.reason.value}]" if judged.reason else ""
        lines.setdefault(f"{judged.state.value}{why}", []).append(judged.manager)
    if len(lines) == 1:
        return list(lines)
    return [f"{line} ({', '.join(managers)})" for line, managers in lines.items()]
