"""`lbctl eip plan FILE…`: which address each Service of manifests would get; nothing is applied.

Exit codes: 0 each gets what it asks for, 1 one does not or a file has errors, 2 the question could
not be answered. As a ConfigMap it is printed only if the exit code is 0: pods would start with
addresses missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lbctl.cli.config import configuration, read_texts
from lbctl.cli.live import open_client
from lbctl.cli.output import (
    WRONG,
    Kubeconfig,
    cannot,
    clean,
    console,
    print_json,
    print_table,
)
from lbctl.cli.site import Site, answered, read_site
from lbctl.core import eip_plan
from lbctl.core.config import Config, parse
from lbctl.core.config_values import is_label
from lbctl.core.eip_plan import Certainty, Prospect, Wanted
from lbctl.errors import ConfigError
from lbctl.kube.wanted import Labels, Planned, filled_in, read

HOSTS = "hosts"  # the key with all of them, in the format of hosts(5)


class PlanOutput(StrEnum):
    """`--output` of `plan`."""

    TEXT = "text"
    JSON = "json"
    CONFIGMAP = "configmap"


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Addresses of Services."""


@app.command()
def plan(
    files: Annotated[
        list[str],
        typer.Argument(help="Manifests with Services; - is stdin.", metavar="FILE..."),
    ],
    config: Annotated[
        str | None,
        typer.Option("--config", help="Instead of the configuration in force.", metavar="FILE"),
    ] = None,
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Of Services that name none.")
    ] = "default",
    name: Annotated[str, typer.Option("--name", help="Of the ConfigMap.")] = "eips",
    output: Annotated[
        PlanOutput, typer.Option("--output", "-o", help="text, json or configmap")
    ] = PlanOutput.TEXT,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Say which address each Service would get, and how sure that is; nothing is applied.

    "reserved" and "has" are sure, whatever the order of creation; "forecast" is what is free now.
    """
    if [*files, config].count("-") > 1:
        cannot("stdin (-) can be read once only; give one of them as a file")
    for option, value in (("--namespace", namespace), ("--name", name)):
        if not is_label(value):
            cannot(f"{option} {value} is not a name: a-z, 0-9 and -, at most 63")
    found = _wanted(files, namespace)
    given = configuration(config) if config is not None else None
    site, (asked, told) = answered(_ask(kubeconfig, found))
    for sentence in told:
        typer.echo(clean(sentence), err=True)
    report(site, (asked, found[1]), given, name, output)


async def _ask(
    kubeconfig: Path | None, planned: Planned
) -> tuple[Site, tuple[tuple[Wanted, ...], tuple[str, ...]]]:
    async with await open_client(kubeconfig) as client:
        site = await read_site(client)
        known = {service.ref for service in site.services}
        return site, await filled_in(client, planned[0], known)


def report(
    site: Site, planned: Planned, given: tuple[str, str] | None, name: str, output: PlanOutput
) -> None:
    """Plan and print. given: a configuration and what to call it, instead of the one in force."""
    wanted, labels = planned
    config, source = _ruling(site, given)
    found = eip_plan.plan(
        config, wanted, site.services, site.eips, site.nodes, _labels(site, labels)
    )
    if output is PlanOutput.JSON:
        print_json({"configuration": source, "services": found})
    elif output is PlanOutput.TEXT:
        _table(found, config, source)
    else:
        _config_maps(found, name)
    if any(one.refused for one in found):
        raise typer.Exit(WRONG)


def _wanted(files: list[str], namespace: str) -> Planned:
    texts = read_texts(files)
    try:
        found = read(texts, namespace)
    except ConfigError as error:
        typer.echo("\n".join(error.problems), err=True)
        raise typer.Exit(WRONG) from None
    if not found[0]:
        cannot(
            f"there is no Service of type LoadBalancer in {', '.join(name for name, _ in texts)}"
        )
    return found


def _ruling(site: Site, given: tuple[str, str] | None) -> tuple[Config, str]:
    """The configuration to plan with, and what to call it."""
    if given is not None:
        text, source = given
        return parse(text, source), source
    if site.accepted is None:
        cannot("no configuration is in force: `lbctl config apply FILE`, or name one by --config")
    try:
        config = parse(site.accepted.text)
    except ConfigError as error:
        cannot(f"the configuration in force is not for this lbctl: {error.problems[0]}")
    return config, f"the configuration in force, generation {site.accepted.generation}"


def _labels(site: Site, planned: Labels) -> Labels:
    """Of the namespaces, as they are after the manifests are applied."""
    changed = {space: {**site.labels.get(space, {}), **own} for space, own in planned.items()}
    return {**site.labels, **changed}


# Output


def _table(found: Sequence[Prospect], config: Config, source: str) -> None:
    out = console()
    out.print(f"By {clean(source)}:\n")
    rows = [row for one in found for row in _rows(one)]
    print_table(out, "Services", ("SERVICE", "ADDRESS", "POOL", "HOW", "WHY"), rows)
    if config.takeover == "observe":
        out.print("`takeover: observe` gives nothing: this is what `takeover: adopt` would do.")
    if advice := _advice(found):
        out.print(advice)


def _rows(one: Prospect) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [
        (one.service, given.address, given.pool, given.certainty, given.why) for given in one.given
    ]
    if one.refused:
        rows.append((one.service, "-", "-", "refused", f"{one.reason}: {one.sentence}"))
    return rows


def _advice(found: Iterable[Prospect]) -> str:
    """How a forecast is made sure; "" if there is none."""
    open_ = [
        (given, one.service)
        for one in found
        for given in one.given
        if given.certainty is Certainty.FORECAST
    ]
    if not open_:
        return ""
    count = f"{len(open_)} address{'es are forecasts' if len(open_) > 1 else ' is a forecast'}"
    lines = [f"{count}. To make sure, reserve:"]
    for pool in sorted({given.pool for given, _ in open_}):
        mine = [  # in quotes: `::` before a comma is no YAML
            f'{{address: "{given.address}", owner: {owner}}}'
            for given, owner in open_
            if given.pool == pool
        ]
        lines.append(f"  in pool {pool}: reserved: [{', '.join(mine)}]")
    return "\n".join(lines)


def _config_maps(found: Sequence[Prospect], name: str) -> None:
    """One for each namespace, if each Service gets what it asks for."""
    refused = [one.sentence for one in found if one.refused]
    if refused:
        typer.echo("\n".join(clean(line) for line in refused), err=True)
        return
    if advice := _advice(found):
        typer.echo(advice, err=True)
    spaces = sorted({one.service.namespace for one in found})
    parts = [
        _config_map(name, space, [one for one in found if one.service.namespace == space])
        for space in spaces
    ]
    typer.echo("---\n".join(parts), nl=False)


def _config_map(name: str, namespace: str, found: Sequence[Prospect]) -> str:
    files: dict[str, list[str]] = {}
    for one in found:
        addresses = files.setdefault(one.pod or one.service.name, [])
        addresses += [str(g.address) for g in one.given if str(g.address) not in addresses]
    if HOSTS in files:
        cannot(f"{namespace}/{HOSTS} cannot be in the ConfigMap: {HOSTS} is the file with all")
    hosts = [f"{address} {key}" for key, addresses in files.items() for address in addresses]
    lines = [
        "# From `lbctl eip plan`: a file for each pod (or Service), and all of them as hosts(5).",
        "apiVersion: v1",
        "kind: ConfigMap",
        "metadata:",
        f"  name: {name}",
        f"  namespace: {namespace}",
        "data:",
    ]
    for key, content in (*files.items(), (HOSTS, hosts)):
        lines += [f"  {json.dumps(key)}: |", *(f"    {line}" for line in content)]
    return "\n".join(lines) + "\n"
