"""The ConfigMaps of accepted configurations: the one in force, and the ones before it.

Rules: `lbctl-accepted` is what everyone runs; generation N is kept in `lbctl-history-(N mod 10)`
as well, so the last ten are there under names that are known in advance (RBAC can list them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from lbctl.core import names
from lbctl.core.config import config_hash
from lbctl.kube.objects import DataObject

GENERATION_KEY: Final = "generation"
HASH_KEY: Final = "hash"
ACCEPTED_KEY: Final = "acceptedAt"


@dataclass(frozen=True, slots=True)
class Entry:
    """An accepted configuration. accepted_at: RFC 3339, "" if it was not written down."""

    generation: int
    hash: str
    text: str
    accepted_at: str = ""


def entry_of(found: DataObject | None) -> Entry | None:
    """What such a ConfigMap holds, None if it holds no configuration."""
    text = found.get(names.CONFIG_KEY) if found is not None else None
    if found is None or text is None:
        return None
    number = found.get(GENERATION_KEY) or "0"
    generation = int(number) if number.isascii() and number.isdigit() else 0
    return Entry(generation, config_hash(text), text, found.get(ACCEPTED_KEY) or "")


def slot(generation: int) -> str:
    """Name of the ConfigMap that keeps a generation."""
    return names.HISTORY_CONFIG_MAPS[generation % len(names.HISTORY_CONFIG_MAPS)]


def body(name: str, namespace: str, entry: Entry, version: str = "") -> dict[str, Any]:
    """The ConfigMap. version: the resourceVersion that is replaced, "" to create it."""
    meta = {"name": name, "namespace": namespace}
    if version:
        meta["resourceVersion"] = version
    data = {
        names.CONFIG_KEY: entry.text,
        GENERATION_KEY: str(entry.generation),
        HASH_KEY: entry.hash,
        ACCEPTED_KEY: entry.accepted_at,
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
