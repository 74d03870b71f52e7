"""`/v1/state` as JSON and back."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from ipaddress import ip_address

import pytest

from lbctl.core.model import NodeState, ObjectRef, Phase
from lbctl.core.reasons import Reason
from lbctl.core.state import (
    ConfigState,
    EipState,
    HopState,
    ManagerState,
    NodeStatus,
    PoolState,
    ServiceState,
    SessionState,
    from_json,
    to_json,
)
from lbctl.errors import MessageError

HOPS = (
    HopState("node-1", Reason.ANNOUNCED, ip_address("192.0.2.21")),
    HopState("node-2", Reason.NODE_SUSPECT),
)
STATE = ManagerState(
    manager="manager-a",
    leader=True,
    boot_s=1.5,
    config=ConfigState("abc", 3, True, ("config.yaml:1:1: no",)),
    pools=(PoolState("public", 2**64, 3),),
    eips=(
        EipState(
            ip_address("198.51.100.1"),
            "public",
            ObjectRef("default", "web"),
            Phase.BOUND,
            True,
            HOPS,
        ),
        EipState(ip_address("2001:db8::1"), "six", ObjectRef("x", "y"), Phase.RELEASING, False),
    ),
    services=(ServiceState(ObjectRef("default", "web"), Reason.ALLOCATED, "é", ()),),
    sessions=(
        SessionState("tor-a", ip_address("192.0.2.1"), True, Reason.SESSION_UP, True, "", 7),
        SessionState("tor-b", ip_address("::1"), False, Reason.SESSION_DOWN, detail="no route"),
    ),
    nodes=(NodeStatus("node-1", NodeState.UP, False, None, 4, "00ff", 0.02),),
    now_s=99.0,
    holder="manager-a",
)


def test_there_and_back() -> None:
    assert from_json(to_json(STATE)) == STATE
    bare = ManagerState("m", False, 0.0)
    assert from_json(to_json(bare)) == bare


def test_next_hops_are_the_nodes_that_have_one() -> None:
    assert STATE.eips[0].next_hops == (ip_address("192.0.2.21"),)


def test_it_can_be_read_by_people_and_jq() -> None:
    found = json.loads(to_json(STATE))
    assert found["eips"][0]["address"] == "198.51.100.1"
    assert found["eips"][0]["owner"] == {"namespace": "default", "name": "web"}
    assert found["eips"][0]["hops"][1] == {
        "node": "node-2",
        "reason": "NodeSuspect",
        "next_hop": None,
    }


def test_another_version_is_read_as_far_as_it_goes() -> None:
    found = json.loads(to_json(STATE))
    found["new"] = {"x": 1}
    found["eips"][0]["new"] = []
    for name in ("holder", "now_s", "config"):
        del found[name]
    assert from_json(json.dumps(found)) == replace(
        STATE, holder="", now_s=0.0, config=ConfigState()
    )


@pytest.mark.parametrize("body", ["", "[]", "null", "{}", "[" * 100_000, b"\xff"])
def test_what_is_no_state(body: str | bytes) -> None:
    with pytest.raises(MessageError):
        from_json(body)


def _places(found: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    here = [path] if path else []
    items: list[tuple[str | int, object]] = []
    if isinstance(found, dict):
        items = list(found.items())
    elif isinstance(found, list):
        items = list(enumerate(found))
    return here + [place for key, item in items for place in _places(item, (*path, key))]


@pytest.mark.parametrize("path", _places(json.loads(to_json(STATE))), ids=str)
def test_every_field_is_checked(path: tuple[str | int, ...]) -> None:
    found = json.loads(to_json(STATE))
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = [7] if isinstance(at[path[-1]], dict) else {"no": 7}
    with pytest.raises(MessageError, match="a manager's state"):
        from_json(json.dumps(found))


def test_every_field_is_in_the_json() -> None:
    assert set(json.loads(to_json(STATE))) == {field.name for field in fields(STATE)}
