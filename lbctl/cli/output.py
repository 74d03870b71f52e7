"""How every command speaks: tables for people, JSON for programs, exit codes.

Rules: exit code 0 all is well, 1 something is wrong with what was asked about, 2 the question
could not be answered, said in one sentence on stderr. Colour only on a terminal. Text from
elsewhere never carries control characters or markup to the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from lbctl.core.plain import to_plain

OK, WRONG, CANNOT = 0, 1, 2


class Output(StrEnum):
    """`--output`."""

    TEXT = "text"
    JSON = "json"


Kubeconfig = Annotated[
    Path | None, typer.Option("--kubeconfig", help="Default: $KUBECONFIG, then ~/.kube/config.")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="text or json")]


def console() -> Console:
    """Stdout. Off a terminal lines are never folded, so that `grep` works."""
    found = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    if found.is_terminal:
        return found
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True, width=400)


def clean(value: object) -> str:
    """One printable line."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def print_table(
    out: Console, title: str, heads: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """A table under a title; "none" if it has no rows."""
    out.print(title, style="bold")
    found = [tuple(clean(cell) for cell in row) for row in rows]
    if not found:
        out.print("  none\n")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("", width=1)
    for head in heads:
        table.add_column(head, no_wrap=not out.is_terminal, overflow="fold")
    for row in found:
        table.add_row("", *row)
    out.print(table)
    out.print()


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """One JSON document into a file."""
    path.write_text(json.dumps(to_plain(value), ensure_ascii=False) + "\n", "utf-8")


def cannot(sentence: object) -> NoReturn:
    """The question could not be answered."""
    sys.stderr.write(f"lbctl: {clean(sentence)}\n")
    raise typer.Exit(CANNOT)
