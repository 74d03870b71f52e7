"""The `lbctl` command: its sub-commands, and what becomes of errors.

Exit codes: 0 done; 1 it could not be done (or a check failed); 2 wrong usage, or this machine
lacks something. Errors are one line (or one per problem) on stderr, never a traceback.
Sub-commands are imported when they are used, so that `lbctl` starts fast. A module that is listed
here has `app`, a `typer.Typer`, or a function of the command's name.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command as typer_command

from lbctl.errors import LbctlError, MissingFeature

_COMMANDS: Final = {
    "demo": "lbctl.cli.demo",
    "lab": "lbctl.cli.lab",
    "drill": "lbctl.cli.drill",
    "node": "lbctl.cli.node",
    "status": "lbctl.cli.status",
    "explain": "lbctl.cli.explain",
    "trace": "lbctl.cli.trace",
    "config": "lbctl.cli.config",
    "eip": "lbctl.cli.eip",
    "uninstall": "lbctl.cli.uninstall",
}


class LazyGroup(TyperGroup):
    """A group whose commands are modules, imported on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands that are installed."""
        return [name for name, module in _COMMANDS.items() if find_spec(module) is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command's module; None for an unknown name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = typer_command(_app(importlib.import_module(_COMMANDS[cmd_name]), cmd_name))
        command.name = cmd_name
        return command


def _app(module: ModuleType, name: str) -> typer.Typer:
    """A module's `app`, or one made of its single command, the function of that name."""
    found = getattr(module, "app", None)
    if isinstance(found, typer.Typer):
        return found
    single = typer.Typer(rich_markup_mode=None)
    single.command()(getattr(module, name))
    return single


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root() -> None:
    """Bare-metal load balancers for Kubernetes: EIPs, ECMP routes by BGP, forwarding on nodes.

    Try it without hardware: `lbctl lab up`, then `lbctl lab status`.
    """


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="lbctl")
    except MissingFeature as error:
        _fail(error, 2)
    except LbctlError as error:
        _fail(error, 1)


def _fail(error: LbctlError, code: int) -> None:
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"lbctl: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
