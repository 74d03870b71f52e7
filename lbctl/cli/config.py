"""`lbctl config …`: its sub-commands; here are those that need no cluster.

What reads a configuration takes the bare `config.yaml` as well as the manifest of the ConfigMap
that holds it; positions are those in the file either way. `config_live` asks a cluster.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Final

import typer

from lbctl.cli.output import WRONG, Kubeconfig, Output, OutputOption, cannot, print_json
from lbctl.core import names
from lbctl.core.config import Config, config_hash, parse
from lbctl.core.config_schema import schema as json_schema
from lbctl.core.imports.convert import convert
from lbctl.core.positions import load
from lbctl.errors import ConfigError

File = Annotated[str, typer.Argument(help="config.yaml or the ConfigMap's manifest; - is stdin.")]
Wait = Annotated[
    float, typer.Option("--wait", help="Seconds to wait until the leader has accepted it.")
]

MAX_FILE: Final = 16 << 20  # of manifests; a configuration has a smaller limit of its own

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Work with the configuration."""


@app.command()
def validate(
    file: File,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check a configuration. Exit code 0: valid, 1: errors, 2: the file cannot be read."""
    text = read_text(file)
    source = "stdin" if file == "-" else file
    problems: tuple[str, ...] = ()
    config: Config | None = None
    inner = text
    try:
        inner, line, indent = _unwrap(text, source)
        config = _parse(inner, source, line, indent)
    except ConfigError as error:
        problems = error.problems
    if output is Output.JSON:
        found = {"valid": config is not None, "errors": problems}
        print_json({**found, "hash": config_hash(inner)} if config else found)
    elif config is not None:
        total = sum(pool.size for pool in config.pools)
        typer.echo(
            f"{source} is valid: {_count(len(config.pools), 'pool')} with "
            f"{_count(total, 'address', 'es')}, {_count(len(config.bgp.peers), 'peer')}"
        )
    else:
        typer.echo("\n".join(problems))
    if config is None:
        raise typer.Exit(WRONG)


@app.command("import")
def import_files(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Manifests of MetalLB, OpenELB, kube-vip or Cilium; - is stdin.",
            metavar="FILE...",
        ),
    ],
) -> None:
    """Convert another controller's configuration to ours, on stdout. Exit code 1: errors.

    Comments say what has no counterpart, and what happens instead.
    """
    try:
        typer.echo(convert(read_texts(files)), nl=False)
    except ConfigError as error:
        typer.echo("\n".join(error.problems), err=True)
        raise typer.Exit(WRONG) from None


@app.command()
def schema() -> None:
    """Print the configuration's JSON Schema, for editors (also deploy/config.schema.json)."""
    typer.echo(json_schema(), nl=False)


@app.command()
def diff(file: File, output: OutputOption = Output.TEXT, kubeconfig: Kubeconfig = None) -> None:
    """Which Services keep, get, move or lose addresses. Exit code 1: it would be refused."""
    _live().diff(*configuration(file), kubeconfig, output)


@app.command()
def apply(file: File, wait: Wait = 15.0, kubeconfig: Kubeconfig = None) -> None:
    """Put a configuration in force, unless `diff` refuses it. Exit code 1: not in force."""
    _live().apply(*configuration(file), kubeconfig, wait)


@app.command()
def history(output: OutputOption = Output.TEXT, kubeconfig: Kubeconfig = None) -> None:
    """The last ten accepted configurations, the newest first."""
    _live().history(kubeconfig, output)


@app.command()
def rollback(
    generation: Annotated[int, typer.Argument(help="As `history` shows it.")],
    wait: Wait = 15.0,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Put an accepted configuration in force again, unless `diff` would refuse it now."""
    _live().rollback(generation, kubeconfig, wait)


def _live() -> ModuleType:
    """Imported when it is used: it brings the Kubernetes client, which takes a second to load."""
    return importlib.import_module("lbctl.cli.config_live")


def configuration(file: str) -> tuple[str, str]:
    """The configuration in a file, and what to call it; ends the command if it is not valid."""
    source = "stdin" if file == "-" else file
    try:
        inner, line, indent = _unwrap(read_text(file), source)
        _parse(inner, source, line, indent)
    except ConfigError as error:
        typer.echo("\n".join(error.problems), err=True)
        raise typer.Exit(WRONG) from None
    return inner, source


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def read_texts(files: Iterable[str]) -> list[tuple[str, str]]:
    """What to call each file, and its text; ends the command with code 2 if one cannot be had."""
    return [("stdin" if file == "-" else file, read_text(file)) for file in files]


def read_text(file: str) -> str:
    """A file's text, `-` being stdin; ends the command with code 2 if it cannot be had."""
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with Path(file).open("rb") as stream:
                raw = stream.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            cannot(f"{file} is larger than {MAX_FILE >> 20} MiB; split it")
        return raw.decode("utf-8-sig")
    except OSError as error:
        cannot(f"{file} cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        cannot(f"{file} is not UTF-8 text (byte {error.start})")


def _unwrap(text: str, source: str) -> tuple[str, int, int]:
    """The configuration inside, and how many lines and columns it is moved in the file."""
    document = load(text)
    found = document.value
    if not isinstance(found, dict) or found.get("kind") != "ConfigMap":
        return text, 0, 0
    if document.problems:
        raise ConfigError(tuple(f"{source}:{problem}" for problem in document.problems))
    data = found.get("data")
    inner = data.get(names.CONFIG_KEY) if isinstance(data, dict) else None
    if not isinstance(inner, str):
        said = f"the ConfigMap has no key {names.CONFIG_KEY} in data"
        raise ConfigError((f"{source}:1:1: {said}",))
    line = document.mark(("data", names.CONFIG_KEY)).line
    lines = text.splitlines()
    if "|" not in lines[line - 1]:  # quoted or folded: lines of their own
        return inner, 0, 0
    first = next((one for one in lines[line:] if one.strip()), "")
    return inner, line, len(first) - len(first.lstrip(" "))


def _parse(inner: str, source: str, line: int, indent: int) -> Config:
    try:
        return parse(inner, source)
    except ConfigError as error:
        place = re.compile(rf"^{re.escape(source)}:(\d+):(\d+):")
        raise ConfigError(
            tuple(
                place.sub(lambda m: f"{source}:{int(m[1]) + line}:{int(m[2]) + indent}:", problem)
                for problem in error.problems
            )
        ) from error
