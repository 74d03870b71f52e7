"""The pure parts of the embedded cluster: rollouts, patches, selectors, placement."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbctl.errors import ApiRefusal
from lbctl.lab.apiserver import patch, selectors, tables
from lbctl.lab.controllers.deployments import limits, roll
from lbctl.lab.controllers.pods import may_run, resolve, template_hash, tolerates

counts = st.integers(0, 12).flatmap(lambda asked: st.tuples(st.just(asked), st.integers(0, asked)))


@given(
    wanted=st.integers(0, 12),
    surge=st.integers(0, 6),
    unavailable=st.integers(0, 6),
    new=counts,
    old=st.lists(counts, max_size=3),
)
def test_a_rollout_step_keeps_its_limits(
    wanted: int, surge: int, unavailable: int, new: tuple[int, int], old: list[tuple[int, int]]
) -> None:
    after = roll(wanted, surge, unavailable, new, old)
    assert all(count >= 0 for count in after)
    before = new[0] + sum(asked for asked, _ in old)
    assert sum(after) <= max(before, wanted + surge)
    assert all(count <= asked for count, (asked, _) in zip(after[1:], old, strict=True))
    available = new[1] + sum(ready for _, ready in old)
    # What may still serve: an old set loses Pods that are not ready first.
    serving = min(new[1], after[0]) + sum(
        min(ready, count) for (_, ready), count in zip(old, after[1:], strict=True)
    )
    if new[0] <= wanted:
        assert serving >= min(available, wanted - unavailable)


@given(wanted=st.integers(0, 9), surge=st.integers(0, 3), unavailable=st.integers(0, 3))
def test_a_rollout_ends(wanted: int, surge: int, unavailable: int) -> None:
    surge, unavailable = limits({"maxSurge": surge, "maxUnavailable": unavailable}, wanted)
    new, old = 0, wanted
    for _ in range(50):
        new, old = roll(wanted, surge, unavailable, (new, new), [(old, old)])
    assert (new, old) == (wanted, 0)


def test_percentages() -> None:
    assert (resolve("25%", 3, up=True), resolve("25%", 3, up=False)) == (1, 0)
    assert limits({"maxSurge": 0, "maxUnavailable": "10%"}, 3) == (0, 1)


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return value


@given(target=json_values, change=st.dictionaries(st.text(max_size=2), json_values, max_size=3))
def test_merge_patch_twice_is_once(target: Any, change: Any) -> None:
    once = patch.merge_patch(target, change)
    assert patch.merge_patch(once, change) == once
    assert patch.merge_patch({}, change) == without_nulls(change)


def test_json_patch_moves_and_refuses() -> None:
    document = {"a": [1, 2], "b": {"c~/d": 3}}
    operations = [
        {"op": "move", "from": "/b/c~0~1d", "path": "/a/0"},
        {"op": "copy", "from": "/a/1", "path": "/a/-"},
        {"op": "remove", "path": "/b"},
    ]
    assert patch.json_patch(document, operations) == {"a": [3, 1, 2, 1]}
    assert document == {"a": [1, 2], "b": {"c~/d": 3}}
    for bad in ({"op": "remove", "path": "/x"}, {"op": "add", "path": "/a/9", "value": 0}):
        with pytest.raises(ApiRefusal):
            patch.json_patch(document, [bad])


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("a=b", {"a": "b"}, True),
        ("a in (b, c),!d", {"a": "c"}, True),
        ("a in (b, c),!d", {"a": "c", "d": ""}, False),
        ("a notin (b)", {}, True),
        ("a!=b", {}, True),
        ("example.com/a", {"example.com/a": ""}, True),
    ],
)
def test_label_selectors(text: str, labels: dict[str, str], expected: bool) -> None:
    match = selectors.parse_labels(text)
    assert match is not None and match(labels) is expected


def test_placement() -> None:
    node: dict[str, Any] = {"metadata": {"name": "n", "labels": {"disk": "ssd"}}, "spec": {}}
    assert may_run({"nodeSelector": {"disk": "ssd"}}, node) == (True, True)
    assert may_run({"nodeSelector": {"disk": "hdd"}}, node) == (False, False)
    node["spec"]["taints"] = [{"key": "k", "value": "v", "effect": "NoSchedule"}]
    assert may_run({}, node) == (False, True)
    assert may_run({"tolerations": [{"operator": "Exists"}]}, node) == (True, True)
    node["spec"]["taints"] = [{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]
    assert may_run({}, node) == (True, True)  # daemons stay on silent nodes
    taint = {"key": "k", "value": "v", "effect": "NoExecute"}
    assert not tolerates({"key": "k", "operator": "Equal", "value": "w"}, taint)
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["hdd"]}]}
                ]
            }
        }
    }
    assert may_run({"affinity": affinity}, node) == (False, False)


def test_hash_and_ages() -> None:
    assert template_hash({"a": 1, "b": 2}) == template_hash({"b": 2, "a": 1})
    ages = {5: "5s", 119: "119s", 130: "2m10s", 3600: "60m", 4 * 3600: "4h", 100 * 3600: "4d4h"}
    assert {elapsed: tables.human(elapsed) for elapsed in ages} == ages
