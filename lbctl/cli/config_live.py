"""`lbctl config diff`, `apply`, `history` and `rollback`: configurations against a cluster.

Rules: `apply` and `rollback` refuse what `diff` refuses, before anything is written; the leader
checks again. What is written is ConfigMap `lbctl`, guarded by the version that was looked at.
Exit codes: 0 done, 1 refused or not accepted, 2 the cluster or the file cannot be read.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import typer

from lbctl.cli.live import open_client
from lbctl.cli.output import (
    WRONG,
    Kubeconfig,
    Output,
    OutputOption,
    cannot,
    clean,
    console,
    print_json,
    print_table,
)
from lbctl.cli.site import Site, answered, config_map, look, read_site
from lbctl.core import forecast as outlooks
from lbctl.core import names
from lbctl.core.config import Config, config_hash, parse
from lbctl.core.forecast import Forecast, Outlook
from lbctl.core.plain import to_plain
from lbctl.errors import ConfigError
from lbctl.kube import client as api
from lbctl.kube.accepted import Entry, entry_of
from lbctl.kube.client import Client
from lbctl.kube.objects import DataObject

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a configuration would do. refusals: not empty, it must not be applied."""

    config: Config
    changes: tuple[str, ...]
    forecasts: tuple[Forecast, ...]
    refusals: tuple[str, ...]


def judge(site: Site, text: str, source: str) -> Verdict:
    """Pure. Raises ConfigError if the configuration is not even valid."""
    config = parse(text, source)
    forbidden = outlooks.cluster_addresses(site.nodes, config)
    told = outlooks.forecast(config, site.services, site.eips, forbidden, site.labels)
    old: Config | None = None
    if site.accepted is not None:
        try:
            old = parse(site.accepted.text)
        except ConfigError:
            old = None  # a newer lbctl's
    refusals = outlooks.refusals(config, told, site.eips)
    return Verdict(config, outlooks.changes(old, config), told, refusals)


# Reading and writing


async def read_history(client: Client) -> tuple[Entry, ...]:
    """The accepted configurations that are kept, the newest first."""
    found = await asyncio.gather(*(config_map(client, name) for name in names.HISTORY_CONFIG_MAPS))
    kept = [entry for entry in map(entry_of, found) if entry is not None]
    return tuple(sorted(kept, key=lambda entry: -entry.generation))


async def _write(client: Client, text: str, wanted: DataObject | None) -> None:
    meta: dict[str, Any] = {"name": names.CONFIG_MAP, "namespace": names.NAMESPACE}
    data = {names.CONFIG_KEY: text}
    path = api.CONFIG_MAPS.path(names.NAMESPACE)
    if wanted is None:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        await client.create(path, body)
    else:
        version = {"metadata": {"resourceVersion": wanted.version}}
        await client.patch(f"{path}/{names.CONFIG_MAP}", {**version, "data": data})


async def _accepted(client: Client, text: str, limit_s: float) -> Entry | None:
    """Wait until it is in force; None if it is not in time."""
    digest = config_hash(text)
    try:
        async with asyncio.timeout(limit_s):
            while True:
                entry = entry_of(await config_map(client, names.ACCEPTED_CONFIG_MAP))
                if entry is not None and entry.hash == digest:
                    return entry
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return None


# Commands


def diff(text: str, source: str, kubeconfig: Kubeconfig, output: OutputOption) -> None:
    """Say what a configuration would do; exit code 1 if it is refused."""
    verdict = _judged(look(kubeconfig), text, source)
    show(verdict, output)
    if verdict.refusals:
        raise typer.Exit(WRONG)


def apply(text: str, source: str, kubeconfig: Kubeconfig, wait_s: float) -> None:
    """Write a configuration that `diff` does not refuse, and wait for the leader."""

    async def work() -> str:
        async with await open_client(kubeconfig) as client:
            return await _apply(client, text, source, wait_s)

    typer.echo(answered(work()))


async def _apply(client: Client, text: str, source: str, wait_s: float) -> str:
    site = await read_site(client)
    verdict = _judged(site, text, source)
    if verdict.refusals:
        typer.echo("\n".join(verdict.refusals), err=True)
        raise typer.Exit(WRONG)
    same = site.wanted is not None and site.wanted.get(names.CONFIG_KEY) == text
    if not same:
        await _write(client, text, site.wanted)
    entry = await _accepted(client, text, wait_s)
    if entry is None:
        cause = "`lbctl status` says why, or that nobody leads"
        typer.echo(f"written, but not accepted within {wait_s:g} s: {cause}", err=True)
        raise typer.Exit(WRONG)
    counts = Counter(one.outlook for one in verdict.forecasts)
    told = ", ".join(
        f"{n} {kind if n == 1 else kind.removesuffix('s')}"
        for kind in Outlook
        if (n := counts[kind])
    )
    return f"in force as generation {entry.generation}, hash {entry.hash}" + (
        f"; Services: {told}" if told else ""
    )


def history(kubeconfig: Kubeconfig, output: OutputOption) -> None:
    """List the accepted configurations that are kept."""

    async def read() -> tuple[tuple[Entry, ...], Entry | None]:
        async with await open_client(kubeconfig) as client:
            current = entry_of(await config_map(client, names.ACCEPTED_CONFIG_MAP))
            return await read_history(client), current

    kept, current = answered(read())
    in_force = current.generation if current is not None else 0
    if output is Output.JSON:
        print_json([{**to_plain(e), "in_force": e.generation == in_force} for e in kept])
        return
    rows = [
        (e.generation, e.hash, e.accepted_at, "yes" if e.generation == in_force else "")
        for e in kept
    ]
    heads = ("GENERATION", "HASH", "ACCEPTED AT", "IN FORCE")
    print_table(console(), "Accepted configurations", heads, rows)


def rollback(generation: int, kubeconfig: Kubeconfig, wait_s: float) -> None:
    """Apply an accepted configuration again."""

    async def work() -> str:
        async with await open_client(kubeconfig) as client:
            kept = {entry.generation: entry for entry in await read_history(client)}
            if generation not in kept:
                there = ", ".join(str(number) for number in kept) or "none"
                cannot(f"generation {generation} is not kept; there are: {there}")
            source = f"generation {generation}"
            return await _apply(client, kept[generation].text, source, wait_s)

    typer.echo(answered(work()))


def _judged(site: Site, text: str, source: str) -> Verdict:
    try:
        return judge(site, text, source)
    except ConfigError as error:
        typer.echo("\n".join(error.problems), err=True)
        raise typer.Exit(WRONG) from None


def show(verdict: Verdict, output: Output) -> None:
    """Print a verdict."""
    if output is Output.JSON:
        plain = {name: getattr(verdict, name) for name in ("changes", "forecasts", "refusals")}
        print_json({"refused": bool(verdict.refusals), **plain})
        return
    out = console()
    for line in verdict.changes or ("the same configuration is in force",):
        out.print(clean(line))
    rows = [
        (f.service, f.outlook, _list(f.before), _list(f.after), f.sentence)
        for f in verdict.forecasts
    ]
    heads = ("SERVICE", "WHAT", "NOW", "THEN", "WHY")
    print_table(out, "Services", heads, rows)
    for line in verdict.refusals:
        out.print(clean(f"refused: {line}"))


def _list(addresses: tuple[object, ...]) -> str:
    return ", ".join(str(address) for address in addresses) or "-"
