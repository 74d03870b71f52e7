"""Running nft: its words, its limit, and clocks that are set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import dataplane
from agent.dataplane import run_nft
from lbctl.errors import DataplaneError
from lbctl.lab.drill.clocks import environment

Fake = Callable[[str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a script in nft's place."""

    def put(script: str) -> None:
        program = tmp_path / "nft"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return put


def test_it_gets_the_text_whole(fake: Fake, tmp_path: Path) -> None:
    text = "add table ip x\n" * 100_000
    fake(f"cat > {tmp_path}/got; echo $* > {tmp_path}/options")
    run_nft(text, "-c")
    assert (tmp_path / "got").read_text() == text
    assert (tmp_path / "options").read_text() == "-c -f -\n"


def test_what_it_says_is_the_error(fake: Fake) -> None:
    fake("echo 'Error: no such table' >&2; echo more >&2; exit 1")
    with pytest.raises(DataplaneError, match=r"^nft: Error: no such table$"):
        run_nft("x")


def test_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataplaneError, match="nft cannot be run"):
        run_nft("x")


def test_one_that_hangs_is_killed(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataplane, "NFT_LIMIT_S", 0.5)
    fake(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(DataplaneError, match="longer than"):
        run_nft("x")
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_under_libfaketime(fake: Fake, tmp_path: Path) -> None:
    """As drills set clocks: `time.sleep` fails there (EINVAL)."""
    fake("exec 2>&-; sleep 0.3")  # as one whose end takes a moment
    clock = tmp_path / "clock"
    clock.write_text("+3600\n")
    env = {**os.environ, **environment(str(clock))}
    script = "from agent.dataplane import run_nft; run_nft('x'); print('done')"
    done = subprocess.run((sys.executable, "-c", script), env=env, capture_output=True, check=False)
    assert done.stdout == b"done\n", done.stderr.decode()
