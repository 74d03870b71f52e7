"""`lbctl status` and `lbctl explain`: what is made of the managers' answers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from rich.console import Console

from lbctl.cli.explain import Story
from lbctl.cli.live import SERVED, Answer, Live, find_kubeconfig, merge
from lbctl.cli.status import as_json, show
from lbctl.core.model import NodeState, ObjectRef, Phase
from lbctl.core.plain import to_plain
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.state import (
    ConfigState,
    EipState,
    HopState,
    ManagerState,
    NodeStatus,
    PoolState,
    ServiceState,
    SessionState,
)
from lbctl.errors import KubeError

WEB = ObjectRef("default", "web")
ADDRESS = ip_address("198.51.100.1")
HOPS = (
    HopState("node-1", Reason.ANNOUNCED, ip_address("192.0.2.21")),
    HopState("node-2", Reason.ANNOUNCED, ip_address("192.0.2.22")),
)
EIP = EipState(ADDRESS, "public", WEB, Phase.BOUND, True, HOPS)
UP = SessionState("tor-a", ip_address("192.0.2.1"), True, Reason.SESSION_UP, True)
DECISION = ServiceState(WEB, Reason.ALLOCATED, "Service default/web has 198.51.100.1", (ADDRESS,))
ONE = ManagerState(
    manager="one",
    leader=True,
    boot_s=0.0,
    now_s=100.0,
    config=ConfigState("abc", 1),
    pools=(PoolState("public", 11, 1, 8),),
    eips=(EIP,),
    services=(DECISION,),
    sessions=(UP,),
    nodes=tuple(
        NodeStatus(f"node-{n}", NodeState.UP, confirmed=1, answer_age_s=0.02) for n in (1, 2)
    ),
    holder="one",
)
TWO = replace(ONE, manager="two", leader=False, services=())


def live(*found: ManagerState | Answer, agents: frozenset[str] | None = None) -> Live:
    answers = [
        one if isinstance(one, Answer) else Answer(f"pod-{one.manager}", "control", one)
        for one in found
    ]
    return Live(tuple(answers), agents)


def page(found: Live) -> str:
    out = Console(file=io.StringIO(), markup=False, highlight=False, width=300)
    show(merge(found), out)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def told(found: Live, kind: str | None = "LoadBalancer") -> str:
    out = Console(file=io.StringIO(), markup=False, highlight=False, width=300)
    Story(merge(found), WEB, kind).show(out)
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_manager_that_works_by_its_snapshot_is_told() -> None:
    (problem,) = merge(live(ONE, replace(TWO, snapshot_age_s=61.2))).problems
    assert problem.startswith("two has not reached the API server") and "61 s old" in problem


def test_all_is_well() -> None:
    merged = merge(live(ONE, TWO))
    assert merged.problems == () and merged.leader == "one"
    text = page(live(ONE, TWO))
    for words in (
        "All is well.",
        "NAME USED TOTAL FREE public 1 11 8",
        "198.51.100.1 default/web public Bound 192.0.2.21, 192.0.2.22",
        "one control leader abc (generation 1) 100s",
        "tor-a 192.0.2.1 two up yes",
        "node-1 Up (1 EIPs, heard 20 ms ago) Up (1 EIPs, heard 20 ms ago)",
    ):
        assert words in " ".join(text.split()), words
    assert not any(line.startswith("…") or "…" in line for line in text.splitlines())


def problem(*states: ManagerState | Answer) -> list[str]:
    return list(merge(live(*states)).problems)


def test_a_manager_that_does_not_answer() -> None:
    silent = Answer("pod-two", "control-2", error="it does not answer (timed out)")
    assert problem(ONE, silent) == ["manager pod-two on control-2: it does not answer (timed out)"]
    assert "pod-two" in page(live(ONE, silent))


def test_nobody_answers() -> None:
    with pytest.raises(ValueError, match="no manager answered"):
        merge(live(Answer("pod-one", error="x")))


def test_disagreements_are_said() -> None:
    other = replace(TWO, config=ConfigState("def", 2))
    assert problem(ONE, other) == [
        "managers disagree on the configuration: one says hash abc, two says hash def"
    ]
    fewer = replace(TWO, eips=(replace(EIP, hops=HOPS[:1]),))
    assert problem(ONE, fewer) == [
        "managers disagree on next hops of 198.51.100.1: one says node-1 node-2, two says node-1"
    ]
    down = NodeStatus("node-1", NodeState.DOWN, reason=Reason.NODE_DOWN)
    assert problem(ONE, replace(TWO, nodes=(down, ONE.nodes[1]))) == [
        "managers disagree on node node-1: one says Up, two says Down",
        "node node-1 is Down for two: the node is down: two witnesses agree",
    ]


@pytest.mark.parametrize("reason", [Reason.OVER_MAX_PATHS, Reason.LEFT_TO_OTHERS])
def test_a_fit_node_that_each_manager_leaves_out_is_no_disagreement(reason: Reason) -> None:
    """`paths: perManager`, and managers on hosts that are next hops."""
    first = replace(EIP, hops=(HOPS[0], HopState("node-2", reason)))
    second = replace(EIP, hops=(HopState("node-1", reason), HOPS[1]))
    assert problem(replace(ONE, eips=(first,)), replace(TWO, eips=(second,))) == []
    lost = replace(EIP, hops=(HOPS[0], HopState("node-2", Reason.NODE_SUSPECT)))
    said = problem(replace(ONE, eips=(second,)), replace(TWO, eips=(lost,)))
    assert said == [
        "managers disagree on next hops of 198.51.100.1: one says node-1 node-2, two says node-1"
    ]


def test_a_node_that_lags_is_wrong_though_it_is_up() -> None:
    lags = replace(ONE.nodes[0], reason=Reason.NODE_LAGS)
    assert problem(replace(ONE, nodes=(lags, ONE.nodes[1]))) == [
        "node node-1 is Up for one: the node's table differs from the majority's for too long"
    ]
    drained = replace(ONE.nodes[0], reason=Reason.NODE_DRAINING)
    assert problem(replace(ONE, nodes=(drained,))) == []


def test_leadership() -> None:
    (said,) = problem(ONE, replace(TWO, leader=True))
    assert said == "one and two each say that they lead"
    nobody = [replace(ONE, leader=False, holder="gone"), replace(TWO, holder="gone")]
    (said,) = problem(*nobody)
    assert said.startswith("no manager leads (the Lease names gone")
    assert merge(live(*nobody)).leader == ""


def test_what_else_is_wrong() -> None:
    dead = replace(UP, up=False, reason=Reason.SESSION_DOWN, add_path=None, detail="no route")
    alone = replace(ONE, sessions=(dead,))
    assert problem(alone) == ["session from one to tor-a (192.0.2.1): no route"]
    bad = replace(ONE, config=ConfigState("abc", 1, True, ("config.yaml:1:1: no",)))
    assert problem(bad) == ["configuration refused: config.yaml:1:1: no"]
    full = ServiceState(ObjectRef("a", "b"), Reason.POOL_EXHAUSTED, "Service a/b: no more")
    assert problem(replace(ONE, services=(DECISION, full))) == ["Service a/b: no more"]
    assert "a/b PoolExhausted" in " ".join(page(live(replace(ONE, services=(full,)))).split())
    lost = replace(EIP, hops=(HopState("node-1", Reason.NODE_DOWN),))
    assert problem(replace(ONE, eips=(lost,))) == [
        "198.51.100.1 of Service default/web has no next hop at one"
    ]


@pytest.mark.parametrize("reason", Reason)
def test_no_reason_why_a_service_lacks_something_is_kept_back(reason: Reason) -> None:
    """A new reason counts as a refusal until it is called good in `SERVED`."""
    lacks = ServiceState(ObjectRef("a", "b"), reason)
    said = problem(replace(ONE, services=(DECISION, lacks)))
    assert said == ([] if reason in SERVED else [f"Service a/b: {SENTENCE[reason]}"])
    story = Story(merge(live(replace(ONE, services=(lacks,)))), lacks.ref)
    assert f"[{reason.value}]" in story.address()[0]


def test_each_reason_is_in_the_table_for_the_pager() -> None:
    table = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    assert not [reason for reason in Reason if f"`{reason.value}`" not in table]


def test_explain_of_a_service_that_shares_shows_the_addresss_hops() -> None:
    tcp = ObjectRef("default", "dns-tcp")
    shared = replace(EIP, sharers=(tcp,))
    both = replace(ONE, eips=(shared,), services=(ServiceState(tcp, Reason.SHARED),))
    story = Story(merge(live(both)), tcp)
    assert story.good and story.hops(shared)
    assert story.address()[1] == "198.51.100.1 from pool public is shared with default/web."
    assert "default/web, default/dns-tcp" in page(live(both))


def test_what_its_owner_wants_is_not_wrong() -> None:
    scaled_down = replace(EIP, hops=(HopState("node-1", Reason.NO_ENDPOINTS),))
    assert problem(replace(ONE, eips=(scaled_down,))) == []
    draining = NodeStatus("node-1", NodeState.SUSPECT, reason=Reason.NODE_DRAINING)
    assert problem(replace(ONE, nodes=(draining,))) == []
    silent = NodeStatus("control", NodeState.UNKNOWN, reason=Reason.NODE_UNKNOWN)
    state = replace(ONE, nodes=(silent,))
    assert merge(live(state, agents=frozenset({"node-1"}))).problems == ()
    assert merge(live(state, agents=frozenset({"control"}))).problems != ()


def test_json_of_status() -> None:
    silent = Answer("pod-x", "n", error="e")
    found = json.loads(json.dumps(as_json(merge(live(ONE, TWO, silent)))))
    assert found["ok"] is False and found["leader"] == "one"
    assert found["unreachable"] == [{"pod": "pod-x", "node": "n", "error": "e"}]
    assert found["eips"][0]["next_hops"] == ["192.0.2.21", "192.0.2.22"]
    assert found["managers"]["two"] == to_plain(TWO)


def test_nothing_from_elsewhere_steers_the_terminal() -> None:
    evil = replace(UP, detail="\x1b[31mred\x07 [bold]x[/bold]\nnew line")
    text = page(live(replace(ONE, sessions=(evil,))))
    assert "\x1b" not in text and "\x07" not in text
    assert "[31mred  [bold]x[/bold] new line" in text


# explain


def test_explain_a_service_that_works() -> None:
    story = Story(merge(live(ONE, TWO)), WEB)
    assert story.good
    text = told(live(ONE, TWO))
    assert "  Service default/web has 198.51.100.1. [Allocated]" in text
    assert "  node-1: yes, by 192.0.2.21: the node is a next hop. [Announced]" in text
    assert "  two to tor-a (192.0.2.1): the BGP session is established. [SessionUp]" in text


def test_explain_says_who_sees_what_where_managers_differ() -> None:
    hops = (HOPS[0], HopState("node-2", Reason.NODE_SUSPECT))
    text = told(live(ONE, replace(TWO, eips=(replace(EIP, hops=hops),))))
    assert "node-2: yes, by 192.0.2.22: the node is a next hop. [Announced] (one)" in text
    assert "node-2: no: the node has stopped answering probes. [NodeSuspect] (two)" in text


@pytest.mark.parametrize(
    ("state", "exists", "words"),
    [
        (
            replace(ONE, eips=(), services=(ServiceState(WEB, Reason.POOL_EXHAUSTED, "", ()),)),
            True,
            "No address of the pools it may use is free. [PoolExhausted]",
        ),
        (replace(ONE, eips=(), services=()), True, "has not decided about it yet"),
        (replace(ONE, eips=(), services=(), leader=False), True, "No manager leads"),
        (
            replace(
                ONE,
                eips=(replace(EIP, phase=Phase.RELEASING, hops=(), detail="it drains"),),
                services=(),
            ),
            False,
            "198.51.100.1 from pool public is being given back (it drains).",
        ),
        (replace(ONE, eips=()), True, "198.51.100.1 is not written yet"),
        (replace(ONE, eips=(replace(EIP, hops=()),)), True, "No node is judged for it yet."),
        (replace(ONE, sessions=(replace(UP, up=False),)), True, "Sessions"),
    ],
)
def test_explain_what_is_missing(state: ManagerState, exists: bool, words: str) -> None:
    kind = "LoadBalancer" if exists else None
    assert words in told(live(state), kind)
    assert not Story(merge(live(state)), WEB, kind).good


def test_a_service_of_another_controller_is_no_failure() -> None:
    other = ServiceState(WEB, Reason.OTHER_CLASS)
    story = Story(merge(live(replace(ONE, eips=(), services=(other,)))), WEB)
    assert story.good
    assert story.address() == [
        "By its loadBalancerClass, or for want of one, it is not ours. [OtherLoadBalancerClass]"
    ]


def test_a_service_of_another_type_is_no_failure() -> None:
    story = Story(merge(live(replace(ONE, eips=(), services=()))), WEB, "ClusterIP")
    assert story.good
    assert story.address() == ["The Service is not of type LoadBalancer. [NotLoadBalancer]"]


def test_json_of_explain() -> None:
    found = json.loads(json.dumps(Story(merge(live(ONE, TWO)), WEB).as_json()))
    assert found["ok"] is True
    assert found["decision"]["reason"] == "Allocated"
    assert found["eips"][0]["by_manager"]["two"][1]["node"] == "node-2"


def test_which_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(KubeError, match=f"there is no kubeconfig at {file}"):
        find_kubeconfig(None)
    file.write_text("")
    assert find_kubeconfig(None) == file
    monkeypatch.setenv("KUBECONFIG", "/a:/b")
    assert find_kubeconfig(None) is None
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KubeError, match="say which by --kubeconfig"):
        find_kubeconfig(None)
