"""Whether the real cluster's programs are here; what becomes of a test where they are not."""

from __future__ import annotations

import os
import shutil
from typing import Final

import pytest

from lbctl.lab.cluster import binaries

REQUIRED: Final = os.environ.get("LBCTL_REQUIRE_KUBERNETES") == "1"


def kubectl() -> str:
    """kubectl from PATH, else the one that is built with the real cluster."""
    return shutil.which("kubectl") or str(binaries.find(print) / "kubectl")


def need_kubernetes() -> None:
    """Skip, rather than build for minutes inside of a test; with LBCTL_REQUIRE_KUBERNETES build."""
    built = (binaries.cache_folder() / "kubectl").exists()
    given = os.environ.get("KUBEBUILDER_ASSETS") or shutil.which("kube-apiserver")
    if not built and not given and not REQUIRED:
        skip_or_fail(
            "its programs are not built yet (`make test` or `lbctl lab up --cluster kubernetes` "
            "builds them)",
            missing=True,
        )


def skip_or_fail(reason: str, *, missing: bool) -> None:
    """Skip what cannot run for a missing program; fail where it is required, or is broken."""
    if REQUIRED or not missing:
        pytest.fail(f"no real cluster: {reason}")
    pytest.skip(f"no real cluster, this half did not run: {reason}")
