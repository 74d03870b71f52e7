"""The agent's HTTP: /healthz, /readyz, /metrics.

Rules: /healthz answers while the loop that checks the kernel turns; /readyz once a table is in the
kernel and confirmed. Metric labels are bounded: never a Service, an address or a node.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent.dataplane import Dataplane
from agent.engine import Engine
from agent.inputs import Watcher
from agent.responder import Responder
from lbctl import errors
from lbctl.core import nft
from lbctl.core.clash import Kind
from lbctl.core.names import AGENT_HTTP_PORT
from lbctl.kube.cache import Cache

STALLED_S: Final = 10.0


class Figures(Collector):
    """Reads everything when it is asked; keeps nothing. The getters give None before a part is."""

    def __init__(
        self,
        engine: Engine,
        dataplane: Dataplane,
        watcher: Callable[[], Watcher | None],
        responder: Callable[[], Responder | None],
    ) -> None:
        self._engine = engine
        self._dataplane = dataplane
        self._watcher = watcher
        self._responder = responder

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's hook."""
        yield from self._tables()
        yield from self._packets()
        yield from self._probes()

    def _tables(self) -> Iterator[Metric]:
        figures, confirmed = self._dataplane.figures, self._engine.confirmed
        yield _gauge("lbctl_agent_apply_seconds", "The last table's way in.", figures.last_s)
        yield _counter("lbctl_agent_applies", "Tables applied.", figures.applied)
        yield _counter("lbctl_agent_rewrites", "Whole tables written.", figures.rewritten)
        yield _counter("lbctl_agent_failures", "Failed attempts.", self._engine.failures)
        yield _gauge("lbctl_agent_generation", "Of the table.", confirmed.generation)
        yield _gauge("lbctl_agent_config_generation", "In use.", confirmed.config_generation)
        yield _gauge("lbctl_agent_eips", "EIPs confirmed.", len(confirmed.eips))
        refused = sum(len(entry.refused) for entry in confirmed.table.eips.values())
        yield _gauge("lbctl_agent_refused_endpoints", "Endpoints on no node.", refused)
        yield _gauge("lbctl_agent_kernel_problems", "Wrong settings.", len(self._engine.problems))
        clashes = GaugeMetricFamily(
            "lbctl_agent_clashes", "What others on the node use of ours.", labels=["what"]
        )
        for kind in Kind:
            number = sum(clash.kind is kind for clash in self._engine.clashes)
            clashes.add_metric([kind.value], number)
        yield clashes
        yield _gauge("lbctl_agent_down_nodes", "Size of the down set.", len(self._engine.down))
        away = len(self._engine.unreachable)
        yield _gauge("lbctl_agent_unreachable_nodes", "Nodes to which there is no way.", away)
        repairs = CounterMetricFamily(
            "lbctl_agent_repairs", "What someone else removed and was put back.", labels=["what"]
        )
        for what, number in sorted(self._engine.repairs.items()):
            repairs.add_metric([what], number)
        yield repairs
        kernel = self._dataplane.kernel
        if kernel is not None:
            sizes = GaugeMetricFamily(
                "lbctl_agent_elements", "Of each set.", labels=["family", "set"]
            )
            for (version, name), number in sorted(nft.totals(kernel).items()):
                sizes.add_metric([f"IPv{version}", name], number)
            yield sizes

    def _packets(self) -> Iterator[Metric]:
        try:
            counters = self._dataplane.counters()
        except errors.DataplaneError:
            return
        packets = CounterMetricFamily(
            "lbctl_agent_packets",
            "Packets by what was done; new flows for delivered.",
            labels=["way"],
        )
        for name, number in sorted(counters.items()):
            packets.add_metric([name], number)
        yield packets

    def _probes(self) -> Iterator[Metric]:
        responder, watcher = self._responder(), self._watcher()
        if responder is not None:
            yield _counter("lbctl_agent_probes_answered", "Probes answered.", responder.answered)
            yield _counter("lbctl_agent_probes_refused", "Not authentic.", responder.refused)
        if watcher is not None:
            yield from of_caches(watcher.caches)


def of_caches(caches: Iterable[Cache[Any]]) -> Iterator[Metric]:
    """What is read of the API server, and when it last spoke."""
    kind = ["kind"]
    synced = GaugeMetricFamily("lbctl_agent_cache_synced", "1 when listed.", labels=kind)
    text = "Seconds since the API server last spoke, by kind."
    age = GaugeMetricFamily("lbctl_agent_cache_contact_age_seconds", text, labels=kind)
    for cache in caches:
        synced.add_metric([cache.name], float(cache.synced.is_set()))
        age.add_metric([cache.name], cache.age_s())
    yield synced
    yield age


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def application(engine: Engine, figures: Figures) -> web.Application:
    """The aiohttp application."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(figures)

    async def healthz(_request: web.Request) -> web.Response:
        still_s = time.monotonic() - engine.turned_s
        return web.Response(
            text=f"turned {still_s:.1f} s ago\n", status=_status(still_s < STALLED_S)
        )

    async def readyz(_request: web.Request) -> web.Response:
        ready = engine.confirmed.generation > 0
        return web.Response(text="ok\n" if ready else "no table yet\n", status=_status(ready))

    async def metrics(_request: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(client_max_size=4096)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def nothing_left() -> web.Application:
    """What an agent serves that has cleaned its node: alive, and ready to go."""

    async def done(_request: web.Request) -> web.Response:
        return web.Response(text="uninstalled\n")

    app = web.Application(client_max_size=4096)
    app.router.add_get("/healthz", done)
    app.router.add_get("/readyz", done)
    return app


def _status(good: bool) -> int:
    return 200 if good else 503


@asynccontextmanager
async def serving(app: web.Application, port: int = AGENT_HTTP_PORT) -> AsyncIterator[None]:
    """Serve at every address of the node while the block lasts.

    Raises DataplaneError if the port cannot be had.
    """
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, None, port, reuse_address=True).start()
        yield
    except OSError as error:
        raise errors.DataplaneError(f"TCP port {port}: {error}") from error
    finally:
        await runner.cleanup()
