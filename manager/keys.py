"""The probe secret: made by the leader when it is missing, watched by everyone.

Rules: `lbctl.core.keys` says what a good key is; with anything else, a placeholder included, the
keys known before stay in use.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Callable
from typing import Final

import structlog

from lbctl import errors
from lbctl.core import names
from lbctl.core.keys import MIN_BYTES, Keys, parse_keys
from lbctl.kube import client as api
from lbctl.kube.objects import DataObject

_RETRY_S: Final = 2.0
_log = structlog.get_logger()


def read(secret: DataObject) -> Keys:
    """Keys from the Secret. Raises `errors.ConfigError` for one that is missing or weak."""
    values: dict[str, str | bytes] = {}
    for name, stored in secret.data:
        try:
            values[name] = base64.b64decode(stored, validate=True)  # the API's own wrapping
        except (binascii.Error, ValueError) as error:
            raise errors.ConfigError((f"Secret {secret.ref}: `{name}` is not base64",)) from error
    return parse_keys(values)


class ProbeKeys:
    """Feed it the Secret's changes; `on_keys` is called with each new, valid set."""

    def __init__(
        self, client: api.Client, on_keys: Callable[[Keys], None], namespace: str = names.NAMESPACE
    ) -> None:
        self._client = client
        self._on_keys = on_keys
        self._namespace = namespace
        self.keys: Keys | None = None

    def change(self, secret: DataObject | None) -> None:
        """The Secret as it is now; None: there is none."""
        if secret is None:
            return
        try:
            self.use(read(secret))
        except errors.ConfigError as error:
            _log.error("probe_keys_refused", error=str(error))

    def use(self, keys: Keys) -> None:
        """These are the keys now."""
        if keys != self.keys:
            self.keys = keys
            self._on_keys(keys)

    async def ensure(self) -> None:
        """The leader's part: create the Secret when it does not exist; retries until it does."""
        text = base64.b64encode(os.urandom(MIN_BYTES))
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": names.PROBE_SECRET, "namespace": self._namespace},
            "type": "Opaque",
            "data": {"current": base64.b64encode(text).decode()},
        }
        while True:
            try:
                await self._client.create(api.SECRETS.path(self._namespace), body)
                _log.info("probe_keys_created")
                return
            except errors.Conflict:
                return
            except errors.KubeError as error:
                _log.warning("probe_keys_not_created", error=str(error))
            await asyncio.sleep(_RETRY_S)
