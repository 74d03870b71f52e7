"""The `lbctl` command inside the test's own process: its start costs more than most of its work.

Arguments, standard streams and exit code are those of a process. What only a process shows (its
start, signals, a terminal) is tested with one: tests/lab/rack.py and tests/lab/system/test_cli.py.
"""

from __future__ import annotations

import io
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from subprocess import CompletedProcess

import pytest

from lbctl.cli.main import main


def lbctl(*words: str, stdin: str = "") -> CompletedProcess[str]:
    """Run the command to its end; not two at a time, the streams are the process's."""
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["lbctl", *words])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return CompletedProcess(["lbctl", *words], code, out.getvalue(), err.getvalue())
