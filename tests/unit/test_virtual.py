"""Virtual next hops: who shares one, where it is, and what is announced as things change."""

from __future__ import annotations

from ipaddress import ip_address

from lbctl.core.config_values import parse_range
from lbctl.core.model import Address, Network, Path, host_route
from lbctl.core.virtual import Group, Levels, VirtualHop, virtual_address

RANGES = (parse_range("100.64.0.0/10"), parse_range("fd00:76::/64"))
AT, ELSEWHERE = ip_address("100.64.0.7"), ip_address("100.64.0.8")
A, B, C = (ip_address(f"198.51.100.{n}") for n in (1, 2, 3))
Routes = dict[Network, frozenset[Path]]


def to(nodes: str) -> frozenset[Path]:
    """Paths over these nodes, one letter each."""
    return frozenset(Path(ip_address(f"192.0.2.{ord(node)}"), ord(node), node) for node in nodes)


def hop(group: str, fit: str | None = None, at: Address = AT) -> VirtualHop:
    """The virtual next hop of a group of nodes, of which these are fit."""
    return VirtualHop(at, frozenset(group), to(group if fit is None else fit))


class Switch:
    """What is announced."""

    def __init__(self) -> None:
        self.levels = Levels()
        self.routes: Routes = {}

    def put(self, *eips: Address, via: VirtualHop) -> set[Network]:
        """EIPs over the nodes of a virtual next hop; which routes differ."""
        nodes = "".join(path.node for path in via.paths)
        return self.take(self.levels.routes([(eip, to(nodes), via) for eip in eips]))

    def take(self, routes: Routes) -> set[Network]:
        differ = {prefix for prefix, paths in routes.items() if self.routes.get(prefix) != paths}
        self.routes = {p: paths for p, paths in (self.routes | routes).items() if paths}
        return differ

    def sweep(self) -> set[Network]:
        return self.take(dict.fromkeys(self.levels.sweep(), frozenset()))

    def leads(self, eip: Address) -> str:
        """To which nodes an EIP leads, after `>` if by a virtual next hop; "" if nowhere."""
        paths = self.routes.get(host_route(eip), frozenset())
        through = [self.routes[host_route(path.next_hop)] for path in paths if not path.node]
        found = paths if not through else through[0]
        return ">" * bool(through) + "".join(sorted(path.node for path in found))


def test_the_address_depends_on_the_nodes_alone() -> None:
    """Not on their order, nor on who asks; in the range of the family, if there is one."""
    groups: list[Group] = [frozenset(f"node-{n}" for n in range(1, size)) for size in range(2, 200)]
    found = [virtual_address(RANGES, 4, group) for group in groups]
    again = [virtual_address(RANGES[::-1], 4, frozenset(sorted(g)[::-1])) for g in groups]
    assert found == again
    assert all(address is not None and address in RANGES[0] for address in found)
    assert len(set(found)) == len(groups)
    six = virtual_address(RANGES, 6, groups[0])
    assert six is not None and six in RANGES[1]
    assert virtual_address(RANGES[:1], 6, groups[0]) is None
    assert virtual_address(RANGES, 4, frozenset()) is None


def test_a_node_that_goes_is_one_change() -> None:
    """Of the virtual next hop; what leads to it stays as it is."""
    switch = Switch()
    switch.put(A, B, C, via=hop("xyz"))
    assert [switch.leads(eip) for eip in (A, B, C)] == [">xyz"] * 3
    assert switch.put(A, via=hop("xyz", "xz")) == {host_route(AT)}
    assert switch.put(B, C, via=hop("xyz", "xz")) == set()
    assert switch.leads(C) == ">xz"
    assert not switch.levels.moved


def test_the_last_node_takes_all_with_it() -> None:
    """No EIP leads to a virtual next hop without a path; it comes back as it was."""
    switch = Switch()
    switch.put(A, via=hop("xy"))
    switch.put(A, via=hop("xy", ""))
    assert switch.leads(A) == ""
    assert host_route(A) not in switch.routes
    switch.put(A, via=hop("xy", "y"))
    assert switch.leads(A) == ">y"


def test_an_eip_leaves_before_its_virtual_next_hop_goes() -> None:
    """That stays for one sweep, and goes at the second unless it is in use again."""
    switch = Switch()
    switch.put(A, via=hop("xy"))
    assert switch.put(A, via=hop("x", at=ELSEWHERE)) == {host_route(A), host_route(ELSEWHERE)}
    assert switch.sweep() == set()
    switch.put(B, via=hop("xy"))
    assert switch.sweep() == set()
    switch.put(B, via=hop("x", at=ELSEWHERE))
    assert [switch.sweep(), switch.sweep()] == [set(), {host_route(AT)}]
    assert [switch.leads(eip) for eip in (A, B)] == [">x", ">x"]


def test_two_groups_at_one_address_go_directly() -> None:
    """Both, whoever came first: a manager that sees them the other way round does the same."""
    one, other = hop("xy"), hop("yz")
    for first, second in ((one, other), (other, one)):
        switch = Switch()
        switch.put(A, via=first)
        switch.put(B, via=second)
        assert switch.levels.moved, "the EIPs of the first have to be looked at again"
        switch.levels.moved = False
        switch.put(A, via=first)
        assert not switch.levels.moved, "once"
        assert switch.leads(A) == "".join(sorted(first.group))
        assert switch.leads(B) == "".join(sorted(second.group))


def test_one_group_left_shares_again() -> None:
    """Once what the other one left behind is gone."""
    switch = Switch()
    switch.put(A, via=hop("xy"))
    switch.put(B, via=hop("yz"))
    switch.put(A, via=hop("x", at=ELSEWHERE))
    assert switch.leads(A) == ">x"
    switch.put(B, via=hop("yz"))
    assert switch.leads(B) == "yz", "the address still stands for the other group"
    switch.sweep()
    switch.levels.moved = False
    assert switch.sweep() == {host_route(AT)}
    assert switch.levels.moved
    switch.put(B, via=hop("yz"))
    assert switch.leads(B) == ">yz"
