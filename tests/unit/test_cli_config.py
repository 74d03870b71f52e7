"""`lbctl config validate`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbctl.core.config import config_hash
from tests.command import lbctl

GOOD = """\
version: 1
pools: [{name: public, addresses: [198.51.100.0/30]}]
bgp: {asn: 64512, peers: [{name: tor-a, address: 192.0.2.1, asn: 64500}]}
"""
BAD = """\
version: 1
pools:
  - {name: a, addresses: [10.0.0.0/24]}
  - {name: a, addresses: [10.0.0.9]}
bgp: {asn: 64512, peers: []}
"""


def test_a_valid_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(GOOD)
    done = lbctl("config", "validate", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{file} is valid: 1 pool with 4 addresses, 1 peer\n"


def test_every_error_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(BAD)
    done = lbctl("config", "validate", str(file))
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        f'{file}:4:12: pools[1].name: another pool is called "a" (line 3)',
        f"{file}:4:27: pools[1].addresses[0]: 10.0.0.9 of pool a overlaps 10.0.0.0/24 of pool a "
        "(line 3)",
    ]


def test_places_in_the_manifest_of_the_config_map(tmp_path: Path) -> None:
    file = tmp_path / "cm.yaml"
    inner = "".join(f"    {line}\n" for line in BAD.splitlines())
    file.write_text("apiVersion: v1\nkind: ConfigMap\ndata:\n  config.yaml: |\n" + inner)
    done = lbctl("config", "validate", str(file))
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith(f"{file}:8:16: pools[1].name: ")
    assert file.read_text().splitlines()[8 - 1][16 - 1] == "a"


@pytest.mark.parametrize("data", ["", "data: {other: x}\n", "data: {config.yaml: [1]}\n"])
def test_a_config_map_without_a_configuration(tmp_path: Path, data: str) -> None:
    file = tmp_path / "cm.yaml"
    file.write_text("kind: ConfigMap\n" + data)
    done = lbctl("config", "validate", str(file))
    assert done.returncode == 1
    assert done.stdout == f"{file}:1:1: the ConfigMap has no key config.yaml in data\n"


def test_json() -> None:
    done = lbctl("config", "validate", "-", "--output", "json", stdin=GOOD)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"valid": True, "errors": [], "hash": config_hash(GOOD)}
    done = lbctl("config", "validate", "-", "-o", "json", stdin=BAD)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["valid"] is False
    assert [error[:11] for error in found["errors"]] == ["stdin:4:12:", "stdin:4:27:"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    done = lbctl("config", "validate", str(missing))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"lbctl: {missing} cannot be read: No such file or directory\n"
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    done = lbctl("config", "validate", str(binary))
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not UTF-8 text" in done.stderr
