"""The worked examples of docs/addresses.md, run as they stand there: the page cannot go untrue."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lbctl.core import eip_plan, positions, uninstall
from lbctl.core.annotations import TABLE
from lbctl.core.config import parse
from lbctl.core.config_pools import Pool
from lbctl.core.model import Service
from lbctl.kube.objects import to_service
from tests.unit.address_rules import World, config
from tests.unit.address_rules import service as named

PAGE = (Path(__file__).parents[2] / "docs/addresses.md").read_text("utf-8")
SECTION = PAGE.partition("\n## Worked examples\n")[2].partition("\n## ")[0]
EXAMPLES = dict(part.split("\n", 1) for part in SECTION.split("\n### ")[1:])
BLOCK = re.compile(r"^```(yaml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BGP = "\nversion: 1\nbgp: {asn: 64512, peers: []}\n"


class Row(NamedTuple):
    """A line of a table: what somebody does, and what comes of it."""

    service: str
    says: str
    address: str
    outcome: str


def manifest(row: Row, number: int) -> Service:
    """The Service that a row writes, read as the API server would send it."""
    known = named(row.service).ref
    meta: dict[str, Any] = {"namespace": known.namespace, "name": known.name, "uid": f"u{number}"}
    meta["creationTimestamp"] = f"2026-01-01T00:00:{number:02}Z"
    spec: dict[str, Any] = {"type": "LoadBalancer", "ports": [{"port": 80}]}
    whole: dict[str, Any] = {"metadata": meta, "spec": spec}
    for part in () if row.says == "-" else row.says.split("; "):
        key, _, text = part.partition(": ")
        value = positions.load(text + "\n").value
        if "/" in key:
            assert key in TABLE, key
            meta.setdefault("annotations", {})[key] = str(value)
        elif key.startswith("labels."):
            meta.setdefault("labels", {})[key.removeprefix("labels.")] = value
        elif key == "status":
            whole["status"] = {"loadBalancer": {"ingress": [{"ip": value}]}}
        elif key == "port":
            port, _, protocol = str(value).partition("/")
            spec["ports"] = [{"port": int(port), "protocol": protocol or "TCP"}]
        else:
            spec[key] = value
    return to_service(json.dumps(whole).encode())


def happens(world: World, row: Row, number: int) -> tuple[str, str]:
    """Do what a row says; the addresses that its Service shows then, and the Reason.

    The Reason is what was decided, or an Event since the row before if the page names that one.
    """
    ref = named(row.service).ref
    if row.service.startswith("namespace "):
        labels = dict([row.says.split(": ")])
        world.allocator.set_namespace(row.service.removeprefix("namespace "), labels)
        return "-", "-"
    if row.says == "deleted":
        world.remove(row.service)
        world.vanish(row.service)
    elif row.says == "forgotten":
        for address in [text for text, eip in world.eips.items() if eip.owner == ref]:
            world.free(address)
    elif row.says != "as before":
        made, before = manifest(row, number), world.services.get(ref)
        if before is not None:
            made = replace(made, uid=before.uid, created_s=before.created_s)
        world.put(made)
    found, decision = world.services.get(ref), world.allocator.decision(ref)
    shown = ", ".join(str(address) for address in found.ingress) if found is not None else ""
    reasons = [str(decision.reason)] if decision is not None else ["-"]
    reasons += [str(reason) for name, reason, _ in world.said if name == ref.name]
    world.said.clear()
    return shown or "-", row.outcome if row.outcome in reasons else reasons[0]


def planned(world: World, rows: list[Row]) -> list[tuple[str, str]]:
    """What `lbctl eip plan` says of all rows at once: addresses, and how sure each is."""
    wanted = [eip_plan.Wanted(manifest(row, n), row.service) for n, row in enumerate(rows)]
    known, eips = world.services.values(), world.eips.values()
    found = []
    for one in eip_plan.plan(world.config, wanted, known, eips, (), world.labels):
        how = "refused" if one.refused else str(one.given[0].certainty)
        found.append((", ".join(str(given.address) for given in one.given) or "-", how))
    return found


def uninstalled(world: World) -> list[str]:
    """What `lbctl uninstall --dry-run` says, up to the objects that are deleted last."""
    services, eips = tuple(world.services.values()), tuple(world.eips.values())
    things = frozenset({uninstall.MANAGERS, uninstall.AGENTS})
    found = uninstall.Found(("m",), services, eips, things=things, config=world.config)
    return [str(s) for s in uninstall.plan(found) if not isinstance(s, uninstall.Delete)]


@pytest.mark.parametrize("title", EXAMPLES)
def test_a_worked_example_comes_out_as_the_page_says(title: str) -> None:
    world, number = World(config("name: none, addresses: [192.0.2.0/32]")), 0
    for kind, block in BLOCK.findall(EXAMPLES[title]):
        if kind == "yaml":
            world.configure(parse(block + BGP))
            continue
        if not block.startswith("SERVICE"):
            assert uninstalled(world) == block.splitlines()
            continue
        head, *lines = [re.split(r" {2,}", line) for line in block.splitlines()]
        rows = [Row(*cells) for cells in lines]
        if head[-1] == "HOW":
            assert planned(world, rows) == [(row.address, row.outcome) for row in rows]
            continue
        for row in rows:
            number += 1
            assert (*row[:2], *happens(world, row, number)) == row
    assert number, "an example without a table"


def test_every_key_of_a_pool_and_every_annotation_has_an_example() -> None:
    keys = [str(field.validation_alias or name) for name, field in Pool.model_fields.items()]
    blocks = " ".join(block for _, block in BLOCK.findall(SECTION))
    assert not [key for key in [*keys, *TABLE] if f"{key}:" not in blocks]
