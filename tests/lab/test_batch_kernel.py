"""What the agent's netlink batches write is what nft writes for the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lbctl.core import nft

from .agentnet import ROOT, sh
from .batch_process import OLDER, states


@pytest.fixture
def spaces() -> Iterator[tuple[str, str]]:
    """Two namespaces: one for nft's text, one for batches."""
    names = f"nb{os.getpid()}t", f"nb{os.getpid()}b"
    made = []
    try:
        for name in names:
            sh("ip", "netns", "add", name)
            made.append(name)
        yield names
    finally:
        for name in made:
            sh("ip", "netns", "del", name)


class Writer:
    """The process that writes batches."""

    def __init__(self, space: str) -> None:
        command = ["ip", "netns", "exec", space, sys.executable, "-m", "tests.lab.batch_process"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def write(self, number: int) -> str:
        """Set a state; what went wrong."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return str(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        self.process.communicate(timeout=30)


@pytest.fixture
def writer(spaces: tuple[str, str]) -> Iterator[Writer]:
    """In the second namespace."""
    made = Writer(spaces[1])
    try:
        yield made
    finally:
        made.close()


def load(space: str, texts: list[str]) -> None:
    for text in texts:
        sh("ip", "netns", "exec", space, "nft", "-f", "-", text=text)


def held(space: str) -> dict[str, list[str]]:
    """The elements of each set and map, and the rules of each chain."""
    found: dict[str, list[str]] = {}
    for family in ("ip", "ip6"):
        text = sh("ip", "netns", "exec", space, "nft", "-j", "list", "table", family, "lbctl")
        for entry in json.loads(text)["nftables"]:
            for kind in ("set", "map"):
                if kind in entry:
                    name = f"{family} {kind} {entry[kind]['name']}"
                    elements = [json.dumps(e, sort_keys=True) for e in entry[kind].get("elem", ())]
                    found[name] = sorted(elements)
            if "rule" in entry:
                chain = found.setdefault(f"{family} chain {entry['rule']['chain']}", [])
                rule = {k: v for k, v in entry["rule"].items() if k != "handle"}
                chain.append(json.dumps(rule, sort_keys=True))
    return found


def test_the_kernel_holds_what_nft_would_have_written(
    spaces: tuple[str, str], writer: Writer
) -> None:
    by_text, by_batch = spaces
    known = states()
    load(by_text, nft.full(known[0]))
    assert writer.write(0) == ""
    whole = held(by_text)
    assert held(by_batch) == whole
    big = [n for n, e in whole.items() if n.split()[1] == "map" and e]
    assert len(big) == 18  # svc past asks pin steer prev deliver holders spare, twice
    for number in range(1, len(known)):
        load(by_text, nft.difference(known[number - 1], known[number]))
        assert writer.write(number) == "", number
        assert held(by_batch) == held(by_text), number


def test_a_refused_batch_changes_nothing_and_is_named(
    spaces: tuple[str, str], writer: Writer
) -> None:
    space = spaces[1]
    assert "No such file or directory" in writer.write(-1)  # there is no table yet
    assert writer.write(0) == ""
    before = held(space)
    said = writer.write(-1)
    assert said == "nftables refused: delete element ip lbctl steer: No such file or directory"
    assert held(space) == before


def test_an_upgraded_agent_writes_its_own_chains_and_leaves_the_elements(
    spaces: tuple[str, str], writer: Writer
) -> None:
    space = spaces[1]
    assert writer.write(0) == ""
    before = held(space)
    older = ("flush chain ip lbctl arrived", "add rule ip6 lbctl handover counter drop")
    load(space, [*older, "flush chain ip lbctl cleanup\ndelete chain ip lbctl cleanup"])
    load(space, ["flush chain ip lbctl lookup\ndelete set ip lbctl silent"])
    load(space, ["flush chain ip lbctl brought\ndelete set ip lbctl homed"])
    assert held(space) != before
    assert writer.write(OLDER) == ""
    assert held(space) == before
