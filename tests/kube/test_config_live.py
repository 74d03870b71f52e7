"""`lbctl config diff`, `apply`, `history` and `rollback` against a cluster with a leader, and
`lbctl uninstall` where there was one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from lbctl import errors
from lbctl.cli.config_live import read_history
from lbctl.core import names
from lbctl.core.config import config_hash
from lbctl.kube import client as api
from lbctl.kube.accepted import Entry
from lbctl.kube.client import Client
from lbctl.lab.cluster.handle import Cluster
from manager.history import History
from tests.kube.manager_parts import (
    Replica,
    Site,
    Timing,
    configuration,
    connect,
    define,
    eventually,
    lbctl,
    until,
)

pytestmark = pytest.mark.alone
LEASE: Timing = {"lease_duration_s": 3.0, "renew_deadline_s": 2.0, "retry_period_s": 0.3}
FIRST = configuration("198.51.100.16/31")
SECOND = configuration("198.51.100.16/31", "198.51.100.20/32")
MAPS = (names.CONFIG_MAP, names.ACCEPTED_CONFIG_MAP, *names.HISTORY_CONFIG_MAPS)


@pytest.fixture
async def site(cluster: Cluster) -> AsyncIterator[Site]:
    """The namespace that the command works in, without any configuration."""
    async with connect(cluster) as client:
        made = Site(client)
        made.namespace = names.NAMESPACE
        await define(client)
        with contextlib.suppress(errors.Conflict):
            await client.create("/api/v1/namespaces", {"metadata": {"name": made.namespace}})
        try:
            yield made
        finally:
            await _clean(made)


async def _clean(site: Site) -> None:
    """The namespace itself stays for the next test."""
    for name in MAPS:
        await site.client.delete(api.CONFIG_MAPS.path(site.namespace, name))
    page = await site.client.get(api.SERVICES.path(site.namespace))
    for item in page["items"]:
        path = api.SERVICES.path(site.namespace, item["metadata"]["name"])
        await site.client.patch(path, {"metadata": {"finalizers": None}})
        await site.client.delete(path)
    for address in await site.eips():
        await site.client.delete(api.EIPS.path(name=address))
    await site.client.delete(api.LEASES.path(site.namespace, names.LEASE))


async def config(cluster: Cluster, *words: str, stdin: str = "") -> tuple[int, str, str]:
    """Run `lbctl config …`; exit code, stdout, stderr."""
    return await lbctl(cluster, "config", *words, stdin=stdin)


@contextlib.asynccontextmanager
async def leader(cluster: Cluster, site: Site) -> AsyncIterator[Replica]:
    async with Replica(cluster, site, "one", **LEASE).running() as replica:
        await until("one to lead", replica.elector.is_leader)
        yield replica


async def kept(client: Client, *generations: int) -> None:
    """Wait until exactly these are in the history."""

    async def there() -> bool:
        found = await read_history(client)
        return tuple(entry.generation for entry in found) == generations

    await eventually(f"the history to be {generations}", there)


async def test_apply_history_and_rollback(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site):
        code, out, err = await config(cluster, "apply", "-", "--wait", "60", stdin=FIRST)
        assert code == 0, err
        assert f"generation 1, hash {config_hash(FIRST)}" in out
        code, out, err = await config(cluster, "diff", "-", stdin=FIRST)
        assert code == 0 and "the same configuration is in force" in out, out + err
        await site.add("a")
        await site.address("a")
        code, out, err = await config(cluster, "apply", "-", "--wait", "60", stdin=SECOND)
        assert code == 0 and "generation 2" in out and "1 keeps" in out, out + err
        await kept(site.client, 2, 1)
        code, out, err = await config(cluster, "history", "-o", "json")
        found = json.loads(out)
        assert [(e["generation"], e["in_force"]) for e in found] == [(2, True), (1, False)]
        assert found[1]["text"] == FIRST and found[1]["accepted_at"]
        code, out, err = await config(cluster, "rollback", "1", "--wait", "60")
        assert code == 0 and f"generation 3, hash {config_hash(FIRST)}" in out, out + err
        await kept(site.client, 3, 2, 1)
        code, out, err = await config(cluster, "rollback", "9")
        assert code == 2 and "there are: 3, 2, 1" in err


async def test_what_diff_refuses_is_not_applied(cluster: Cluster, site: Site) -> None:
    async with leader(cluster, site) as one:
        await site.configure(SECOND)
        ref = await site.add("a", loadBalancerIP="198.51.100.20")
        assert await site.address("a") == "198.51.100.20"
        code, out, _ = await config(cluster, "diff", "-", stdin=FIRST)
        assert code == 1 and f"refused: Service {ref} uses 198.51.100.20" in out
        code, out, _ = await config(cluster, "diff", "-", "-o", "json", stdin=FIRST)
        assert code == 1 and json.loads(out)["refused"] is True
        code, out, err = await config(cluster, "apply", "-", stdin=FIRST)
        assert code == 1 and str(ref) in err and not out
        code, _, err = await config(cluster, "apply", "-", stdin="version: 1\n")
        assert code == 1 and "stdin:1:1: pools: is missing" in err
        path = api.CONFIG_MAPS.path(site.namespace, names.CONFIG_MAP)
        assert (await site.client.get(path))["data"][names.CONFIG_KEY] == SECOND
        assert one.configuration.current is not None
        assert one.configuration.current.generation == 1


async def test_without_a_leader_nothing_is_promised(cluster: Cluster, site: Site) -> None:
    code, out, err = await config(cluster, "apply", "-", "--wait", "0.5", stdin=FIRST)
    assert code == 1 and "not accepted within 0.5 s" in err and not out
    code, out, err = await config(cluster, "history")
    assert code == 0 and "none" in out


async def test_the_last_ten_are_kept(cluster: Cluster, site: Site) -> None:
    history = History(site.client, site.namespace)
    for number in range(1, 13):
        await history.keep(Entry(number, config_hash(str(number)), str(number), "2026-01-01"))
    await kept(site.client, *range(12, 2, -1))
    again = History(site.client, site.namespace)  # the next leader
    await again.keep(Entry(12, config_hash("12"), "12", "2026-01-01"))
    await kept(site.client, *range(12, 2, -1))


async def test_uninstall_lets_services_go_when_the_managers_are_gone(
    cluster: Cluster, site: Site
) -> None:
    async with leader(cluster, site):
        await site.configure(FIRST)
        await site.add("a")
        await site.address("a")
    code, out, err = await lbctl(cluster, "uninstall", "--yes", "--keep-config")
    assert code == 0, out + err
    found = await site.service("a")
    assert found is not None and not found.ingress and not found.finalizers
    assert names.ANNOTATION_POOL not in dict(found.annotations)
    await site.delete("a")
    assert await site.service("a") is None
    again, out, err = await lbctl(cluster, "uninstall", "--yes", "--keep-config")
    assert again == 0 and "nothing of lbctl" in out, out + err
    path = api.CONFIG_MAPS.path(site.namespace, names.CONFIG_MAP)
    assert (await site.client.get(path))["data"][names.CONFIG_KEY] == FIRST
    await define(site.client)  # the next test's
