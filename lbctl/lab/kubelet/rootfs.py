"""A container's view of the file system, built in its own mount namespace.

There are no images in the lab: a container sees the machine's programs (`/usr`, `/etc`, …), the
checkout and its interpreter, all read-only, and of `/run`, `/tmp`, `/var`, `/home` nothing but what
its volumes put there. What a manifest forgets to mount is therefore missing here too.

Rules: standard library only; runs in the container's first process, as root, before privileges go.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypedDict

from lbctl.lab.kubelet import linux

_SYSTEM: Final = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "opt")
_EMPTY: Final = ("tmp", "run", "var", "home", "proc", "sys", "dev")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")


class Mount(TypedDict):
    """A volume in a container. `source` is a path of the machine, `target` one of the container."""

    source: str
    target: str
    readonly: bool


def enter(scratch: str, keep: Sequence[str], mounts: Sequence[Mount], readonly: bool) -> None:
    """Build the root at `scratch` (an empty directory) and make it `/`.

    keep: further directories of the machine to show read-only, at the same path. readonly: whether
    what remains (`/tmp`, `/run`, the root directory itself) is read-only too. Raises OSError.
    """
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("root", scratch, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=64m")
    root = Path(scratch)
    shown = [f"/{name}" for name in _SYSTEM] + list(keep)
    points = [_resolved(mount["target"]) for mount in mounts]
    for name in _EMPTY:
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "var/run").symlink_to("/run")
    for path in shown:
        _show(root, path, points)
    for mount, point in zip(mounts, points, strict=True):
        _mount_volume(root, mount, point)
    _kernel_trees(root)
    if readonly:
        linux.mount("", scratch, "", linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY)
    linux.pivot_root(scratch)


def _resolved(target: str) -> str:
    """Mount points under /var/run are under /run: the link exists in every base image."""
    path = os.path.normpath(target)
    return path.removeprefix("/var") if path.startswith("/var/run/") else path


def _show(root: Path, path: str, points: Sequence[str]) -> None:
    """Bind the machine's `path`; if a mount point inside is missing, its children instead."""
    here = root / path.lstrip("/")
    if not os.path.lexists(path) or os.path.lexists(here):
        return
    here.parent.mkdir(parents=True, exist_ok=True)
    there = Path(path)
    if there.is_symlink():
        here.symlink_to(there.readlink())
    elif not there.is_dir():
        here.touch()
        _bind_readonly(path, here)
    elif any(point.startswith(f"{path}/") and not os.path.lexists(point) for point in points):
        here.mkdir()
        shutil.copystat(path, here)
        for child in sorted(there.iterdir()):
            _show(root, str(child), points)
    else:
        here.mkdir()
        _bind_readonly(path, here)


def _bind_readonly(source: str, target: Path) -> None:
    linux.mount(source, str(target), "", linux.MS_BIND | linux.MS_REC)
    linux.make_readonly(str(target))


def _mount_volume(root: Path, mount: Mount, point: str) -> None:
    target = root / point.lstrip("/")
    if Path(mount["source"]).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    linux.mount(mount["source"], str(target), "", linux.MS_BIND | linux.MS_REC)
    if mount["readonly"]:
        linux.make_readonly(str(target))


def _kernel_trees(root: Path) -> None:
    """/proc of this PID namespace with a read-only /proc/sys, /sys read-only, a small /dev."""
    hard = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    proc = str(root / "proc")
    linux.mount("proc", proc, "proc", hard)
    linux.mount(f"{proc}/sys", f"{proc}/sys", "", linux.MS_BIND)
    remount = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | hard
    linux.mount("", f"{proc}/sys", "", remount)
    _bind_readonly("/sys", root / "sys")
    for name in _DEVICES:
        (root / "dev" / name).touch()
        linux.mount(f"/dev/{name}", str(root / "dev" / name), "", linux.MS_BIND)
    (root / "dev/shm").mkdir()
    linux.mount("shm", str(root / "dev/shm"), "tmpfs", hard, "mode=1777,size=64m")
    for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (root / "dev" / name).symlink_to(f"/proc/self/fd{number}")
