"""deploy/config.schema.json: generated, and of the parser's opinion where it has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lbctl.core.config import parse
from lbctl.core.config_schema import schema
from lbctl.errors import ConfigError

FILE = Path(__file__).parents[2] / "deploy" / "config.schema.json"
GOOD = """\
version: 1
pools:
  - name: public
    addresses: [198.51.100.0/25, 198.51.100.200-198.51.100.210, "2001:db8::/64"]
    namespaceSelectors: [{matchLabels: {team: web}}]
    reserved: [198.51.100.1, {address: 198.51.100.2, owner: shop/web}]
    quota: {shop: 3, "*": 1}
bgp:
  asn: 64512
  peers: [{name: tor-a, address: 192.0.2.1, asn: 64500, holdTime: 9s, multihop: 2,
    gracefulRestart: 20s}]
announce: {drainTime: 100ms, reuseAfter: 30}
probe:
forwarding: {interfaces: [eth0], steering: auto}
"""


def accepts(text: str) -> bool:
    made: Any = yaml.safe_load(schema())
    validator = jsonschema.Draft202012Validator(made)
    return not list(validator.iter_errors(yaml.safe_load(text)))


def test_the_file_is_what_the_code_generates() -> None:
    assert FILE.read_text() == schema(), "run: lbctl config schema > deploy/config.schema.json"


def test_it_takes_what_the_parser_takes() -> None:
    assert parse(GOOD)
    assert accepts(GOOD)
    manifest = FILE.parent / "kustomize" / "base" / "example-config.yaml"
    assert accepts(yaml.safe_load(manifest.read_text())["data"]["config.yaml"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("version: 1", "version: 2"),
        ("name: public", "name: Public!"),
        ("name: public", "nam: public"),
        ("    reserved:", "    reserve:"),
        ("asn: 64512", "asn: 0"),
        ("asn: 64500, ", ""),
        ("holdTime: 9s", "holdTime: 9 seconds"),
        ("drainTime: 100ms", "drainTime: soon"),
        ("steering: auto", "steering: by-hand"),
        ("multihop: 2", "multihop: 256"),
        ("shop/web", "web"),
        ('"*": 1', '"*": -1'),
    ],
)
def test_it_refuses_what_the_parser_refuses(old: str, new: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(ConfigError):
        parse(text)
    assert not accepts(text)
