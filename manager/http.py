"""The manager's HTTP: /healthz, /readyz, /metrics, /v1/state.

Rules: /healthz answers while the event loop turns, nothing else matters to it; /readyz names what
is missing; /v1/state needs a token unless the request comes from loopback.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from lbctl import errors
from manager.access import Gate, token_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STATE_PATH = "/v1/state"
_log = structlog.get_logger()


class Pages:
    """What is served. ready: what is still missing, () when ready. state: JSON.

    measure: called before metrics are read, to fill in gauges.
    """

    def __init__(
        self,
        gate: Gate,
        registry: CollectorRegistry,
        ready: Callable[[], tuple[str, ...]],
        state: Callable[[], Awaitable[bytes]],
        measure: Callable[[], None],
    ) -> None:
        self._gate = gate
        self._registry = registry
        self._ready = ready
        self._state = state
        self._measure = measure

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=4096)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get(STATE_PATH, self._serve_state)
        return app

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        missing = self._ready()
        text = "\n".join(missing) if missing else "ok"
        return web.Response(text=text + "\n", status=503 if missing else 200)

    async def _metrics(self, _request: web.Request) -> web.Response:
        self._measure()
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _serve_state(self, request: web.Request) -> web.Response:
        if not _local(request):
            try:
                code = await self._gate.check(token_of(request.headers), STATE_PATH)
            except errors.KubeError as error:
                return web.Response(text=f"cannot check the token: {error}\n", status=503)
            if code != 200:
                return web.Response(text="a token that may get /v1/state is needed\n", status=code)
        return web.Response(body=await self._state(), content_type="application/json")


def _local(request: web.Request) -> bool:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    try:
        return peer is not None and ip_address(peer[0].partition("%")[0]).is_loopback
    except ValueError:
        return False


@asynccontextmanager
async def serving(pages: Pages, host: str | None, port: int) -> AsyncIterator[int]:
    """Serve while the context lasts; gives the port. host None: every address of the machine."""
    runner = web.AppRunner(pages.application(), access_log=None, handle_signals=False)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, reuse_address=True)
        await site.start()
        bound = int(runner.addresses[0][1])
        _log.info("http_listening", port=bound)
        yield bound
    finally:
        await runner.cleanup()
