"""`lbctl uninstall`: what is planned for what is found, and what is changed of each object."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from lbctl.cli.uninstall import told
from lbctl.core import names
from lbctl.core.config import parse
from lbctl.core.model import Eip, Node, ObjectRef, Service, Sharer
from lbctl.core.uninstall import (
    CONFIG,
    MANAGERS,
    SPACE,
    THINGS,
    AwaitRoutes,
    CleanNodes,
    Delete,
    Found,
    LetGo,
    StopManagers,
    Undrain,
    cleaning,
    let_go,
    plan,
    uncleaned,
)
from lbctl.lab.bringup import manifests, url_of

WEB, DNS = ObjectRef("default", "web"), ObjectRef("default", "dns")
ADDRESS, OTHER = ip_address("198.51.100.1"), ip_address("203.0.113.9")
EIP = Eip(ADDRESS, "public", WEB, "u", sharers=(Sharer(DNS, "v"),))
OURS = Service(WEB, "u", 0.0, (), True, finalizers=(names.FINALIZER,), ingress=(ADDRESS,))
MARKED = replace(OURS, annotations=((names.ANNOTATION_POOL, "public"),))
ACCEPTED = parse(
    "version: 1\npools: [{name: public, addresses: [198.51.100.0/24]}]\n"
    "bgp: {asn: 64512, peers: [{name: a, address: 192.0.2.1, asn: 64500, holdTime: 30s}]}\n"
    "announce: {drainTime: 5s}\n"
)
ALL = Found(("m-1", "m-2"), (MARKED,), (EIP,), things=frozenset({MANAGERS, *THINGS}))


def test_what_deploy_installs_is_what_is_deleted() -> None:
    """And no more, but for what the leader writes."""
    installed = {
        (url.split("/")[-2], str(item["metadata"]["name"]))
        for item in manifests()
        if (url := url_of(item))
    }
    deleted = {(thing.plural, thing.name) for thing in (MANAGERS, *THINGS)}
    written = {("configmaps", n) for n in (names.ACCEPTED_CONFIG_MAP, *names.HISTORY_CONFIG_MAPS)}
    written |= {("secrets", names.PROBE_SECRET), ("leases", names.LEASE)}
    written |= {("configmaps", names.CONFIG_MAP)}  # example-config.yaml is applied by itself
    assert deleted == installed | written


def test_no_two_managers_are_drained_at_once() -> None:
    """A budget whose selector meets nothing would hold nobody."""
    kinds = {item["kind"]: item for item in manifests()}
    budget, managers = kinds["PodDisruptionBudget"]["spec"], kinds["Deployment"]["spec"]
    marks = managers["template"]["metadata"]["labels"].items()
    assert budget["maxUnavailable"] == 1 < managers["replicas"]
    assert budget["selector"]["matchLabels"].items() <= marks


def test_routes_go_before_forwarding_and_services_before_what_knows_them() -> None:
    steps = plan(replace(ALL, config=ACCEPTED))
    assert steps[:4] == (
        StopManagers(("m-1", "m-2"), 1),
        AwaitRoutes(35.0),
        CleanNodes(),
        LetGo(WEB, frozenset({ADDRESS}), True),
    )
    assert steps[4:] == tuple(Delete(thing) for thing in THINGS)
    assert plan(ALL)[1] == AwaitRoutes(11.0), "the defaults"


def test_after_each_stage_the_rest_is_left() -> None:
    things = frozenset(THINGS)
    stopped = replace(ALL, managers=(), things=things)
    assert type(plan(stopped)[0]) is AwaitRoutes
    assert type(plan(replace(stopped, quiet=True))[0]) is CleanNodes
    clean = replace(stopped, quiet=True, cleaned=True)
    assert type(plan(clean)[0]) is LetGo
    free = replace(clean, services=(replace(OURS, finalizers=(), ingress=()),))
    assert plan(free) == tuple(Delete(thing) for thing in THINGS)
    assert plan(replace(free, things=frozenset())) == ()
    assert plan(Found()) == ()


def test_without_agents_nothing_is_waited_for() -> None:
    bare = Found(services=(MARKED,), things=frozenset({SPACE}))
    assert plan(bare) == (LetGo(WEB, frozenset({ADDRESS}), True), Delete(SPACE))


def test_a_manager_that_lost_its_deployment_is_waited_for() -> None:
    assert type(plan(Found(managers=("m-1",)))[0]) is StopManagers


def test_the_configuration_stays_if_asked_to() -> None:
    kept = {s.thing for s in plan(ALL, keep_config=True) if isinstance(s, Delete)}
    assert set(THINGS) - kept == {CONFIG, SPACE}


def test_a_node_that_is_not_clean_holds_no_service() -> None:
    left = replace(ALL, managers=(), things=frozenset(THINGS), quiet=True, cleaned=True)
    assert plan(replace(left, dirty=("node-1",))) == (LetGo(WEB, frozenset({ADDRESS}), True),)


def test_drained_nodes() -> None:
    nodes = (Node("n-1"), Node("n-2", draining=True))
    assert plan(Found(nodes=nodes)) == (Undrain("n-2"),)


@pytest.mark.parametrize(
    ("service", "eips", "step"),
    [
        pytest.param(OURS, (EIP,), LetGo(WEB, frozenset({ADDRESS}), True), id="by its EIP"),
        pytest.param(
            replace(OURS, ref=DNS), (EIP,), LetGo(DNS, frozenset({ADDRESS}), True), id="sharer"
        ),
        pytest.param(MARKED, (), LetGo(WEB, frozenset({ADDRESS}), True), id="EIPs lost"),
        pytest.param(
            replace(MARKED, ingress=(OTHER,)),
            (),
            LetGo(WEB, frozenset(), True),
            id="another's address",
        ),
        pytest.param(
            replace(OURS, ingress=(), deleting=True, load_balancer_class="lbctl.io/bgp"),
            (),
            LetGo(WEB, frozenset(), True),
            id="by its class",
        ),
        pytest.param(
            replace(OURS, finalizers=(), ingress=(), condition=("False", "NoPool", "")),
            (),
            LetGo(WEB, frozenset(), False),
            id="condition alone",
        ),
        pytest.param(OURS, (), None, id="another controller's"),
        pytest.param(
            replace(OURS, load_balancer_class="example.com/x"), (), None, id="another class"
        ),
    ],
)
def test_which_services_are_let_go(
    service: Service, eips: tuple[Eip, ...], step: LetGo | None
) -> None:
    found = Found(services=(service,), eips=eips, config=ACCEPTED)
    assert plan(found) == ((step,) if step else ())


def test_only_what_is_ours_is_taken_off_a_service() -> None:
    theirs = [{"ip": "203.0.113.9"}, {"hostname": "lb.example.com"}]
    ready = {"type": "example.com/Ready", "status": "True"}
    item: dict[str, Any] = {
        "metadata": {
            "annotations": {names.ANNOTATION_POOL: "public", "lbctl.io/address-pool": "public"},
            "finalizers": ["example.com/x", names.FINALIZER],
        },
        "status": {
            "loadBalancer": {"ingress": [{"ip": "198.51.100.1", "ipMode": "VIP"}, *theirs]},
            "conditions": [ready, {"type": names.CONDITION_ANNOUNCED, "status": "True"}],
        },
    }
    step = LetGo(WEB, frozenset({ADDRESS}), True)
    of_status, of_meta = let_go(step, item)
    assert of_status["status"] == {"loadBalancer": {"ingress": theirs}, "conditions": [ready]}
    notes = {names.ANNOTATION_POOL: None}
    assert of_meta["metadata"] == {"annotations": notes, "finalizers": ["example.com/x"]}
    assert let_go(step, {"metadata": {}}) == ({}, {})
    assert not let_go(replace(step, finalizer=False), item)[1]["metadata"].get("finalizers")


def daemon_set() -> dict[str, Any]:
    (found,) = (item for item in manifests() if item["kind"] == "DaemonSet")
    meta = {**found["metadata"], "resourceVersion": "7", "generation": 2}
    state = {"observedGeneration": 2, "desiredNumberScheduled": 2}
    return {**found, "metadata": meta, "status": state}


def pod(node: str, item: dict[str, Any], ready: bool = True) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(ready)}]
    spec = {**item["spec"]["template"]["spec"], "nodeName": node}
    return {"spec": spec, "status": {"conditions": conditions}}


def test_agents_clean_their_nodes_also_where_there_is_no_secret() -> None:
    item = daemon_set()
    change = cleaning(item)
    spec = change["spec"]["template"]["spec"]
    (agent,) = spec["containers"]
    assert agent["command"] == ["lbctl-agent", "--uninstall", "--stay"]
    assert [mount["name"] for mount in agent["volumeMounts"]] == ["snapshot"]
    assert [volume["name"] for volume in spec["volumes"]] == ["snapshot"]
    assert change["metadata"] == {"resourceVersion": "7"}
    item["spec"]["template"]["spec"]["containers"] = spec["containers"]
    assert cleaning(item) == {}, "it is told once"


def test_which_nodes_are_not_clean_yet() -> None:
    old, new = daemon_set(), daemon_set()
    both = frozenset({"n-1", "n-2"})
    new["spec"]["template"]["spec"].update(cleaning(old)["spec"]["template"]["spec"])
    assert uncleaned(new, [pod("n-1", new), pod("n-2", old)], both) == ("n-2",)
    assert uncleaned(new, [pod("n-1", new), pod("n-2", new, ready=False)], both) == ("n-2",)
    assert uncleaned(new, [pod("n-1", new)], both) is None, "one Pod is being replaced"
    assert uncleaned(new, [pod("n-1", new), pod("n-2", new)], both) == ()
    assert uncleaned(new, [pod("n-1", new), pod("n-2", old)], frozenset({"n-1"})) == ()
    new["status"]["observedGeneration"] = 1
    assert uncleaned(new, [pod("n-1", new), pod("n-2", new)], both) is None


def test_a_long_plan_is_shortened_where_it_need_not_be_whole() -> None:
    many = [LetGo(ObjectRef("a", f"s{n:03}"), frozenset(), True) for n in range(30)]
    whole = told([StopManagers((), 30), *many], whole=True)
    assert len(whole) == 31 and whole[-1] == "   let Service a/s029 go"
    lines = told([StopManagers((), 30), *many], whole=False)
    assert lines[0].startswith("1. stop the managers: the routes of 30 EIPs")
    assert lines[1] == "2. let Service a/s000 go" and lines[-1] == "   and 20 more"
