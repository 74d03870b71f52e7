"""Options of the whole test run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """What lengthens or changes a run that is random."""
    group = parser.getgroup("lbctl")
    group.addoption(
        "--chaos-s",
        type=float,
        default=0.0,
        help="how long each run of tests/lab/test_speaker_chaos.py lasts at least, in seconds",
    )
    group.addoption("--chaos-seed", type=int, default=5, help="its seed")
