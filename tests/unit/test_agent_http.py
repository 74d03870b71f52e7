"""The agent's metrics."""

from __future__ import annotations

from agent.http import of_caches
from lbctl.kube import objects
from lbctl.kube.cache import Cache
from lbctl.kube.client import Client


async def test_an_agent_that_does_not_hear_the_api_server_says_since_when() -> None:
    client = Client.with_token("http://127.0.0.1:1", "token")
    services, nodes = Cache(client, objects.SERVICE), Cache(client, objects.NODE)
    await nodes.recall({}, 100.0)
    found = {
        (sample.name, sample.labels["kind"]): sample.value
        for metric in of_caches((services, nodes))
        for sample in metric.samples
    }
    ages = [found["lbctl_agent_cache_contact_age_seconds", kind] for kind in ("service", "node")]
    assert ages[0] < 60.0 < 100.0 <= ages[1]
    assert found["lbctl_agent_cache_synced", "node"] == 0.0
