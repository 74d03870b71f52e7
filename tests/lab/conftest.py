"""Labs without a cluster. Every lab of a test run has a name with the run's pid in it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from lbctl.lab import preflight
from lbctl.lab.lab import Lab, take_down

from .rack import BARE, SMALL, settled

_numbers = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without root, FRR or a kernel feature these tests cannot run: say which, and skip."""
    for item in items:
        if "chaos_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(config.getoption("--chaos-s") + 540))
    lines = preflight.missing()
    if lines:
        for item in items:
            if "tests/lab/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="; ".join(lines)))


@pytest.fixture
def lab_name() -> Iterator[str]:
    """A name that no other lab has; a lab of that name is gone after the test, come what may."""
    name = f"n-{os.getpid()}-{next(_numbers)}"
    yield name
    take_down(name)


@pytest.fixture(scope="session")
def rack() -> Iterator[Lab]:
    """The small rack, shared by the tests: each leaves it as it found it."""
    name = f"n-{os.getpid()}-{next(_numbers)}"
    try:
        yield settled(Lab.up(SMALL, name, print))
    finally:
        take_down(name)


@pytest.fixture
def new_lab() -> Iterator[Callable[[], Lab]]:
    """Makes bare labs of a test's own, which it may break."""
    made: list[str] = []

    def make() -> Lab:
        made.append(f"n-{os.getpid()}-{next(_numbers)}")
        return Lab.up(BARE, made[-1], print)

    yield make
    for name in made:
        take_down(name)
