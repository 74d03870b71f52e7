"""Keeps the last ten accepted configurations, for `lbctl config history` and `rollback`.

Rule: written by the leader after it has accepted, and again by the next leader if that failed: what
is kept follows `lbctl-accepted`, never the other way round.
"""

from __future__ import annotations

import msgspec
import structlog

from lbctl import errors
from lbctl.core import names
from lbctl.kube import accepted, objects
from lbctl.kube import client as api
from lbctl.kube.accepted import Entry

_log = structlog.get_logger()


class History:
    """The leader's pen."""

    def __init__(self, client: api.Client, namespace: str = names.NAMESPACE) -> None:
        self._client = client
        self._namespace = namespace
        self._kept: Entry | None = None

    async def keep(self, entry: Entry) -> None:
        """Make sure that it is kept. Costs one read after a change of leader, else nothing."""
        if entry == self._kept:
            return
        name = accepted.slot(entry.generation)
        path = api.CONFIG_MAPS.path(self._namespace, name)
        try:
            raw = msgspec.json.encode(await self._client.get(path))
            old = objects.CONFIG_MAP.decode(raw)
        except errors.NotFound:
            body = accepted.body(name, self._namespace, entry)
            await self._client.create(api.CONFIG_MAPS.path(self._namespace), body)
        else:
            if accepted.entry_of(old) != entry:
                body = accepted.body(name, self._namespace, entry, old.version)
                await self._client.replace(path, body)
        self._kept = entry
        _log.info("config_kept", name=name, generation=entry.generation, hash=entry.hash)
