"""What this machine lacks is said in one clear line, with the way to get it, and exit code 2."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lbctl.errors import LabError
from lbctl.lab import preflight
from lbctl.lab.drill.opening import opened

from .rack import ROOT, lbctl

TOOLS = ("ip", "sysctl", "nsenter", "unshare", "setpriv", "mount", "nft", "sh")


def test_this_machine_has_everything() -> None:
    assert preflight.missing() == []


def test_no_frr(tmp_path: Path) -> None:
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    done = lbctl("lab", "up", "--lab", "never", env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == "lbctl: vtysh is not installed: apt-get install frr\n"
    assert not Path("/run/lbctl-lab/never").exists()


def test_not_root() -> None:
    """As nobody, who may read files everywhere: Python itself may be in root's home here."""
    may_read = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    nobody = ("setpriv", "--reuid", "65534", "--clear-groups", *may_read)
    for command in ("up", "down"):
        done = subprocess.run(
            [*nobody, sys.executable, "-m", "lbctl.cli.main", "lab", command, "--lab", "never"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        line = "lbctl: the lab needs root (it makes network namespaces): run it with sudo\n"
        assert done.stderr == line


def test_a_missing_kernel_feature_is_named(tmp_path: Path) -> None:
    """An `ip` that refuses macvlan stands for a kernel without it."""
    ip = tmp_path / "ip"
    real = shutil.which("ip")
    ip.write_text(f'#!/bin/sh\ncase "$*" in *macvlan*) exit 2;; esac\nexec {real} "$@"\n')
    ip.chmod(0o755)
    done = lbctl("lab", "up", "--lab", "never", env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin"})
    assert done.returncode == 2
    assert done.stderr == "lbctl: this kernel has no macvlan: it needs CONFIG_MACVLAN\n"


def test_drills_are_run_by_one_command_at_a_time() -> None:
    """The second one says so before it touches the first one's lab."""
    name = f"claimed-{os.getpid()}"
    with pytest.raises(LabError, match="is not up"), opened("small", "embedded", "never", name):
        raise AssertionError("there is no such lab")
    file = Path(f"/run/lbctl-lab/{name}.drills")
    try:
        with file.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            done = lbctl("drill", "run", "node-dies", "--lab", name)
    finally:
        file.unlink()
    assert done.returncode == 2
    assert done.stderr == (
        f"lbctl: drills are being run in lab '{name}': wait for them, or bring up a lab of another"
        " name and say --lab\n"
    )
