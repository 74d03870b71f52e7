"""Who may read /v1/state: the API server decides (TokenReview, then SubjectAccessReview).

Rules: no token, no answer; a decision is remembered for `remember_s` under the token's hash, so a
dashboard that asks every second costs the API server little; at most a few questions at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from typing import Any, Final

from lbctl.core import names
from lbctl.kube import client as api

_REMEMBER: Final = 256
_AT_A_TIME: Final = 4
_TOKEN_LIMIT: Final = 16_384


class Gate:
    """Asks the API server whether a token may `get` a URL path."""

    def __init__(self, client: api.Client, remember_s: float = 10.0) -> None:
        self._client = client
        self._remember_s = remember_s
        self._known: OrderedDict[tuple[bytes, str], tuple[float, int]] = OrderedDict()
        self._slots = asyncio.Semaphore(_AT_A_TIME)

    async def check(self, token: str | None, path: str) -> int:
        """200 if allowed, 401 if nobody is known by the token, 403 if that user may not.

        Raises `errors.KubeError` while the API server cannot be asked.
        """
        if not token or len(token) > _TOKEN_LIMIT:
            return 401
        key = (hashlib.sha256(token.encode()).digest(), path)
        known = self._known.get(key)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        async with self._slots:
            answer = await self._ask(token, path)
        self._known[key] = (time.monotonic() + self._remember_s, answer)
        if len(self._known) > _REMEMBER:
            self._known.popitem(last=False)
        return answer

    async def _ask(self, token: str, path: str) -> int:
        review = await self._client.create(
            api.TOKEN_REVIEWS.path(),
            {
                "apiVersion": api.TOKEN_REVIEWS.api,
                "kind": "TokenReview",
                "spec": {"token": token},
            },
        )
        status = review.get("status") or {}
        if not status.get("authenticated"):
            return 401
        user: dict[str, Any] = status.get("user") or {}
        access = await self._client.create(
            api.ACCESS_REVIEWS.path(),
            {
                "apiVersion": api.ACCESS_REVIEWS.api,
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": user.get("username", ""),
                    "uid": user.get("uid", ""),
                    "groups": user.get("groups") or [],
                    "extra": user.get("extra") or {},
                    "nonResourceAttributes": {"path": path, "verb": "get"},
                },
            },
        )
        return 200 if (access.get("status") or {}).get("allowed") else 403


def token_of(headers: Any) -> str | None:
    """The bearer token of a request: `Authorization`, or our own header behind the pod proxy."""
    for name in (names.STATE_TOKEN_HEADER, "Authorization"):
        given = str(headers.get(name, "")).strip()
        if given:
            scheme, _, rest = given.partition(" ")
            return rest.strip() if scheme.lower() == "bearer" else given
    return None
