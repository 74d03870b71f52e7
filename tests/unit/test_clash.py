"""Who else uses what is ours; and our numbers against those that others document."""

from __future__ import annotations

import pytest

from lbctl.core import names, ways
from lbctl.core.clash import (
    LAST_PRIORITY,
    PORTS,
    Clash,
    ForeignRule,
    Kind,
    Surroundings,
    clashes,
)
from lbctl.core.names import MARK_BASE, MARK_MASK, NODE_BITS, RULE_PRIORITY, TUNNEL_PORT

FELIX = 0x001F0000  # Calico: IptablesMarkMask is 0xffff0000, of which Felix takes the lowest bits
# What each documents: marks as value/mask, priorities of rules, tables, UDP and TCP ports, VNIs.
KUBE_PROXY = {"marks": [(0x4000, 0x4000), (0x8000, 0x8000)], "ports": [10249, 10256]}
CALICO = {
    "marks": [(1 << bit, FELIX) for bit in range(16, 21)],
    "priorities": [99],
    "tables": range(1, 251),
    "ports": [179, 4789, 5473, 9091, 9094, 51820, 51821],
    "vnis": [4096],
}
CILIUM = {
    "marks": [(magic << 8, 0xF00) for magic in range(1, 16)],
    "priorities": [9, 10, 20, 100, 110, 111],
    "tables": [2004, 2005],
    "ports": [4240, 4244, 4245, 6081, 8472, 9878, 9879, 9890, 9962, 51871],
    "vnis": [2],
}
FLANNEL = {"marks": [(0x4000, 0x4000)], "ports": [8472, 8285, 51820, 51821], "vnis": [1]}
OUR_PORTS = {
    names.MANAGER_HTTP_PORT,
    names.AGENT_HTTP_PORT,
    names.PROBE_PORT,
    names.MANAGER_PEER_PORT,
    names.SPEAKER_PEER_PORT,
    names.TUNNEL_PORT,
}


@pytest.mark.parametrize("other", [KUBE_PROXY, CALICO, CILIUM, FLANNEL])
def test_our_numbers_are_nobody_elses(other: dict[str, list[tuple[int, int]]]) -> None:
    ours = MARK_BASE | NODE_BITS
    for mark, mask in other["marks"]:
        assert mark & mask, "a mark of 0 would be everybody's"
        assert not ours & mask, f"a steered packet's mark has a bit of {mask:#x}"
    assert not set(range(RULE_PRIORITY, LAST_PRIORITY + 1)) & set(other.get("priorities", ()))
    tables = {names.ROUTE_TABLE_BASE, names.ROUTE_TABLE_BASE + NODE_BITS}
    assert not tables & set(other.get("tables", ())) and min(tables) > 0xFFFF
    assert not OUR_PORTS & set(other["ports"])
    assert names.TUNNEL_VNI not in other.get("vnis", ())


def test_with_others_as_documented_nothing_clashes() -> None:
    """A node of the largest cluster that can be numbered, with Cilium's and Calico's rules."""
    numbers = [ways._number(count) for count in range(1, ways.MOST_NODES + 1)]
    rules = [
        ForeignRule(4, 9, 0x200, 0xF00),
        ForeignRule(4, 10, 0xA00, 0xF00),
        ForeignRule(4, 99, 0x100000, 0x100000, invert=False),
        ForeignRule(4, 100),
        ForeignRule(4, 110),
        ForeignRule(4, 5210, 0x80000, 0xFF0000),  # Tailscale
        ForeignRule(4, 32764, 0xCA6C, 0xFFFFFFFF, invert=True),  # wg-quick
        ForeignRule(4, 32766),
    ]
    assert clashes(Surroundings(rules=tuple(rules)), numbers) == ()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (ForeignRule(4, 50, 0x4C000002, 0xFFFFFFFF), "comes before ours"),
        (ForeignRule(4, 50, 0x2, 0xF), "comes before ours"),
        (ForeignRule(6, 50, 0x10, 0xF0, invert=True), "comes before ours"),
        (ForeignRule(4, 50, 0x4C000009, 0xFF0000FF), "is for marks that are ours"),
        (ForeignRule(4, 500, 0x4C000009, 0xFF0000FF), "is for marks that are ours"),
        (ForeignRule(4, 132), "lies among ours"),
    ],
)
def test_rules_that_clash(rule: ForeignRule, said: str) -> None:
    (found,) = clashes(Surroundings(rules=(rule,)), [1, 2])
    assert found.kind is Kind.RULE and said in found.text


@pytest.mark.parametrize(
    "rule",
    [
        ForeignRule(4, 50, 0x4, 0xF),  # no node has such a number
        ForeignRule(4, 500, 0x2, 0xF),  # steered packets never come to it
    ],
)
def test_rules_that_do_not(rule: ForeignRule) -> None:
    assert clashes(Surroundings(rules=(rule,)), [1]) == ()


def test_everything_else_is_said() -> None:
    seen = Surroundings(
        routes=((4, MARK_BASE + 1, "default"),),
        ports=tuple(sorted(PORTS)),
        vxlans=(("flannel.1", 8472, 1), ("vx", TUNNEL_PORT, 9)),
        closed=("ip filter FORWARD",),
    )
    found = clashes(seen, [1])
    assert [clash.kind for clash in found] == sorted(
        [Kind.ROUTE, Kind.PORT, Kind.PORT, Kind.PORT, Kind.VXLAN, Kind.FORWARD]
    )
    text = "\n".join(clash.text for clash in found)
    for part in ("default", "TCP port 7481", "vx (VNI 9)", "ip filter FORWARD", f"{MARK_MASK:#x}"):
        assert part in text
    assert clashes(Surroundings(), [1]) == () and isinstance(found[0], Clash)
