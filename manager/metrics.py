"""The manager's Prometheus metrics, in one registry.

Rules: names follow prometheus.io/docs/practices/naming (base units, `_total` for counters); labels
are bounded: pools, peers, nodes, kinds and reasons, never a Service or an address.
"""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from lbctl.core.config import PeerConfig, Pool
from lbctl.core.model import Eip, NodeState, NodeView, Session

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class _Counted(Collector):
    """Counters that somebody else counts."""

    def __init__(self, name: str, text: str, label: str) -> None:
        self._described = name, text, label
        self.values: dict[str, int] = {}

    def collect(self) -> Iterator[Metric]:
        name, text, label = self._described
        family = CounterMetricFamily(name, text, labels=[label])
        for kind, value in sorted(self.values.items()):
            family.add_metric([kind], value)
        yield family


class Metrics:
    """All metrics of one manager. Attributes are the metrics themselves."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._allocation(registry)
        self._announcing(registry)
        self._running(registry)

    def _allocation(self, registry: CollectorRegistry) -> None:
        self.pool_addresses = Gauge(
            "lbctl_pool_addresses", "Addresses that a pool holds.", ["pool"], registry=registry
        )
        self.pool_used = Gauge(
            "lbctl_pool_used_addresses", "Addresses of a pool in use.", ["pool"], registry=registry
        )
        self.pool_free = Gauge(
            "lbctl_pool_free_addresses",
            "Addresses that a pool can still give to who asks for none of them; the leader's.",
            ["pool", "family"],
            registry=registry,
        )
        self.decisions = Counter(
            "lbctl_allocations_total", "Decisions by reason.", ["reason"], registry=registry
        )
        self.queue = Gauge(
            "lbctl_queue_length", "Services that wait to be looked at.", registry=registry
        )
        self.writes = Counter(
            "lbctl_writes_total",
            "Writes to the API server by action and outcome.",
            ["action", "outcome"],
            registry=registry,
        )

    def _announcing(self, registry: CollectorRegistry) -> None:
        self.session_up = Gauge(
            "lbctl_bgp_session_up",
            "1 while established, of every configured peer.",
            ["peer"],
            registry=registry,
        )
        self.prefixes = Gauge(
            "lbctl_announced_prefixes", "EIPs with at least one next hop.", registry=registry
        )
        self.paths = Gauge(
            "lbctl_announced_paths", "Paths (EIP and next hop) announced.", registry=registry
        )
        self.next_hops = Gauge(
            "lbctl_next_hop_prefixes", "EIPs that a node leads to.", ["node"], registry=registry
        )
        self.node_state = Gauge(
            "lbctl_node_state", "1 for the state of a node.", ["node", "state"], registry=registry
        )
        self.node_lags = Gauge(
            "lbctl_node_lags",
            "1 while a node's table differs from the majority's for too long.",
            ["node"],
            registry=registry,
        )
        self._probes = _Counted("lbctl_probes", "Probe events, by kind.", "kind")
        registry.register(self._probes)
        self.select_seconds = Histogram(
            "lbctl_route_selection_seconds",
            "Time of one round of route selection.",
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
            registry=registry,
        )

    def _running(self, registry: CollectorRegistry) -> None:
        self.leader = Gauge("lbctl_leader", "1 while this replica allocates.", registry=registry)
        self.config_generation = Gauge(
            "lbctl_config_generation", "Generation of the accepted one.", registry=registry
        )
        self.config_rejected = Gauge(
            "lbctl_config_rejected", "1 while ConfigMap lbctl is not accepted.", registry=registry
        )
        self.cache_objects = Gauge(
            "lbctl_cache_objects", "Objects known, by kind.", ["kind"], registry=registry
        )
        self.cache_skipped = Gauge(
            "lbctl_cache_skipped_objects", "Undecodable objects met.", ["kind"], registry=registry
        )
        self.cache_age = Gauge(
            "lbctl_cache_contact_age_seconds",
            "Seconds since the API server last spoke, by kind.",
            ["kind"],
            registry=registry,
        )
        self.snapshot_in_use = Gauge(
            "lbctl_snapshot_in_use",
            "1 while the API server has not been read since the start, but a snapshot.",
            registry=registry,
        )
        self.task_errors = Counter(
            "lbctl_task_errors_total", "Errors at task roots.", ["task"], registry=registry
        )
        self.task_errors.labels("lead")  # from 0 on, else the first error is no rise

    def measure_pools(
        self,
        pools: Iterable[Pool],
        eips: Iterable[Eip],
        free: Mapping[str, Mapping[int, int]],
    ) -> None:
        """Fill in the pool metrics. free: by pool and family, if we lead."""
        used = Counted(eip.pool for eip in eips)
        self.pool_addresses.clear()
        self.pool_used.clear()
        for pool in pools:
            self.pool_addresses.labels(pool.name).set(pool.size)
            self.pool_used.labels(pool.name).set(used[pool.name])
        self.pool_free.clear()
        for name, families in free.items():
            for version, number in families.items():
                self.pool_free.labels(name, f"IPv{version}").set(number)

    def measure_sessions(self, peers: Iterable[PeerConfig], sessions: Iterable[Session]) -> None:
        """Fill in the session of every peer, of those too that cannot be spoken to."""
        up = {session.peer for session in sessions if session.up}
        self.session_up.clear()
        for peer in peers:
            self.session_up.labels(peer.name).set(peer.name in up)

    def measure_nodes(self, views: Iterable[NodeView], counters: DataclassInstance) -> None:
        """Fill in the node metrics; `counters` is a dataclass of integers."""
        self.node_state.clear()
        self.node_lags.clear()
        for view in views:
            self.node_lags.labels(view.name).set(view.lags)
            for state in NodeState:
                self.node_state.labels(view.name, str(state)).set(view.state is state)
        self._probes.values = asdict(counters)
