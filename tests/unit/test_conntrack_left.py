"""Which flows' conntrack entries a node deletes when its endpoints change."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from agent.conntrack import left, without
from lbctl.core.forwarding import EMPTY, Table, revise
from lbctl.core.model import Endpoint, ForwardingOptions, Protocol
from lbctl.core.names import MARK_BASE

from .forwarding_cases import EIP, INDEX, pod, service, table

TCP, UDP = Protocol.TCP, Protocol.UDP
BOTH = service(protocols=(TCP, UDP))
HERE, OTHER, AWAY = pod(1, 1), pod(1, 2), pod(2, 1)


def gone(before: Table, now: Table) -> set[tuple[Protocol, str]]:
    own = [target for target in left(before, now, "n1", INDEX) if not target.mark]
    assert all((target.eip, target.port) == (EIP, 80) for target in own)
    return {(target.protocol, str(target.pod)) for target in own}


def test_a_pod_that_left_takes_its_flows_along() -> None:
    before = table(HERE, OTHER, AWAY, of=BOTH)
    assert gone(before, table(OTHER, AWAY, of=BOTH)) == {(TCP, "10.244.1.1"), (UDP, "10.244.1.1")}
    assert gone(before, table(HERE, OTHER, of=service(protocols=(TCP,)))) == {
        (UDP, "10.244.1.1"),
        (UDP, "10.244.1.2"),
    }


def test_a_pod_that_is_not_ready_or_ends_keeps_its_connections() -> None:
    before = table(HERE, AWAY, of=BOTH)
    for flags in ("", "st"):
        assert (TCP, "10.244.1.1") not in gone(before, table(pod(1, 1, flags), AWAY, of=BOTH))


def test_an_endpoint_on_no_node_takes_its_flows_along_on_every_node() -> None:
    outside = Endpoint(ip_address("192.0.2.200"), 8080)
    masquerading = ForwardingOptions(external="masquerade")

    def made(*endpoints: Endpoint) -> Table:
        return revise(EMPTY, replace(table(*endpoints, of=BOTH).sources, options=masquerading))

    flows = {(TCP, "192.0.2.200"), (UDP, "192.0.2.200")}
    assert gone(made(outside, HERE), made(HERE)) == flows


def test_pods_of_a_node_that_is_called_down_may_live_on() -> None:
    before = table(HERE, AWAY, of=BOTH)
    now = table(HERE, AWAY, of=BOTH, down=frozenset({"n1"}))
    assert gone(before, now) == {(UDP, "10.244.1.1")}


def notes(before: Table, now: Table) -> set[tuple[Protocol, int]]:
    return {(t.protocol, t.mark - MARK_BASE) for t in left(before, now, "n1", INDEX) if t.mark}


def test_notes_of_flows_handed_to_a_node_go_with_its_last_pod() -> None:
    """Else a new connection from the same client port would be handed to who is not there."""
    before, n2 = table(HERE, AWAY, pod(2, 2), of=BOTH), frozenset({"n2"})
    assert notes(before, table(HERE, AWAY, of=BOTH)) == set()
    both = {(TCP, INDEX["n2"]), (UDP, INDEX["n2"])}
    assert notes(before, table(HERE, of=BOTH)) == both
    falls = table(HERE, AWAY, of=BOTH, down=n2, fallen=n2)
    assert notes(before, falls) == {(UDP, INDEX["n2"])}, "TCP is kept for its return"
    assert notes(falls, table(HERE, AWAY, of=BOTH, down=n2)) == {(TCP, INDEX["n2"])}


def test_what_came_back_before_it_was_forgotten_is_left_alone() -> None:
    before, now = table(HERE, AWAY, of=BOTH), table(of=BOTH)
    others = {name: number for name, number in INDEX.items() if name != "n1"}
    targets = left(before, now, "n1", others)
    assert {bool(target.mark) for target in targets} == {True, False}
    assert without(targets, now, "n1", others) == targets
    assert without(targets, before, "n1", others) == ()
    again = without(targets, table(HERE, of=BOTH), "n1", others)
    assert again == tuple(target for target in targets if target.mark)
