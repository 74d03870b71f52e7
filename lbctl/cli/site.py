"""What the cluster holds that decides about addresses, read once: for `config diff` and `eip plan`.

Nothing of ours needs to be installed for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lbctl.cli.live import open_client
from lbctl.cli.output import cannot
from lbctl.core import names
from lbctl.core.model import Eip, Node, Service
from lbctl.errors import KubeError, NotFound
from lbctl.kube import client as api
from lbctl.kube import objects
from lbctl.kube.accepted import Entry, entry_of
from lbctl.kube.client import Client
from lbctl.kube.objects import DataObject, Kind

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Site:
    """accepted: the configuration in force. wanted: what the user wrote."""

    services: tuple[Service, ...]
    eips: tuple[Eip, ...]
    nodes: tuple[Node, ...]
    labels: dict[str, dict[str, str]]  # of the namespaces
    accepted: Entry | None
    wanted: DataObject | None


async def every(client: Client, kind: Kind[objects.T]) -> tuple[objects.T, ...]:
    """All objects of a kind. Raises KubeError."""
    page = await client.list(kind.resource.path())
    return tuple(kind.decode(raw) for raw in page.items or ())


async def config_map(client: Client, name: str) -> DataObject | None:
    """A ConfigMap of ours, None if there is none."""
    try:
        found = await client.get(api.CONFIG_MAPS.path(names.NAMESPACE, name))
    except NotFound:
        return None
    return objects.CONFIG_MAP.decode(msgspec.json.encode(found))


async def _eips(client: Client) -> tuple[Eip, ...]:
    try:
        return await every(client, objects.EIP)
    except NotFound:
        return ()  # nothing is installed yet


async def read_site(client: Client) -> Site:
    """Ask for all of it. Raises KubeError."""
    services, nodes, spaces, eips, accepted, wanted = await asyncio.gather(
        every(client, objects.SERVICE),
        every(client, objects.NODE),
        every(client, objects.NAMESPACE),
        _eips(client),
        config_map(client, names.ACCEPTED_CONFIG_MAP),
        config_map(client, names.CONFIG_MAP),
    )
    labels = {space.ref.name: dict(space.labels) for space in spaces}
    return Site(services, eips, nodes, labels, entry_of(accepted), wanted)


def look(kubeconfig: Path | None) -> Site:
    """As `read_site`; the command ends if the cluster cannot be asked."""

    async def read() -> Site:
        async with await open_client(kubeconfig) as client:
            return await read_site(client)

    return answered(read())


def answered(work: Coroutine[Any, Any, T]) -> T:
    """Run it; the command ends if the cluster cannot be asked."""
    try:
        return asyncio.run(work)
    except KubeError as error:
        cannot(error)
