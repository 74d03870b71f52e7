"""Where a real cluster's programs come from: order of places, and what the cache is keyed by."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbctl.errors import LabError
from lbctl.lab.cluster import binaries


def program(folder: Path, name: str, script: str = "exit 0") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_kubebuilder_assets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in binaries.PROGRAMS:
        program(tmp_path, name)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert binaries.find(lambda _: None) == tmp_path


def test_half_a_set_of_programs_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets, path = tmp_path / "assets", tmp_path / "path"
    assets.mkdir()
    path.mkdir()
    program(assets, "etcd")
    for name in (*binaries.PROGRAMS, *binaries.EXTRAS):
        program(path, name)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    monkeypatch.setenv("PATH", str(path))
    assert binaries.find(lambda _: None) == path


def test_cache_is_keyed_by_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = binaries.cache_folder()
    assert here.parent == tmp_path / "lbctl"
    modules = tmp_path / "modules" / "kube"
    modules.mkdir(parents=True)
    (modules / "go.mod").write_text("module other\n")
    monkeypatch.setattr(binaries, "MODULES", tmp_path / "modules")
    assert binaries.cache_folder() != here


def test_version_of_a_program_that_does_not_run(tmp_path: Path) -> None:
    assert binaries.version(program(tmp_path, "good", "echo v1")) == "v1"
    with pytest.raises(LabError, match="does not run"):
        binaries.version(program(tmp_path, "bad", "exit 3"))
