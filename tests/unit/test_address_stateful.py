"""The allocator against a slow model of its rules (`address_model`): whatever users, operators and
time do, in whatever order, everybody has what docs/addresses.md says, and for that reason.

Frozen leaders are in `test_allocator_stateful`. CONTRIBUTING.md says how to search longer.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from lbctl.core.config import Config, parse, shrink_conflicts
from lbctl.core.model import Address, ObjectRef, Phase, Service, TrafficPolicy
from lbctl.core.reasons import Reason
from tests.unit.address_model import CLASS, PoolText, Rules
from tests.unit.address_rules import ports
from tests.unit.allocator_model import Leader, Server

REFS = [ObjectRef("x", "s0"), ObjectRef("x", "s1"), ObjectRef("x", "s2"), ObjectRef("y", "s0")]
NAMES = st.sets(st.sampled_from([*REFS, ObjectRef("y", "s1")]), min_size=1)
SERVED = (Reason.ALLOCATED, Reason.RESTORED, Reason.RECREATED, Reason.SHARED)


def asks(addresses: str = "", pool: str = "", key: str = "") -> tuple[tuple[str, str], ...]:
    said = {"loadBalancerIPs": addresses, "address-pool": pool, "allow-shared-ip": key}
    return tuple((f"lbctl.io/{name}", value) for name, value in said.items() if value)


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "annotations": st.sampled_from(
        [
            *[asks()] * 4,
            asks("10.0.0.1"),
            asks("10.0.1.0"),
            asks("10.0.0.2, 2001:db8::1"),
            asks("10.9.9.9"),
            asks("x"),
            asks(pool="a"),
            asks(pool="b"),
            asks(pool="none"),
            *[asks(key="k")] * 5,
            asks(key="l"),
            asks("10.0.0.1", key="k"),
            asks("10.0.0.1", "b"),
            asks(pool="b", key="k"),
        ]
    ),
    "requested": st.sampled_from([*[None] * 7, "10.0.0.3"]),
    "families": st.sampled_from([*[(4,)] * 4, (6,), (4, 6)]),
    "needs_both": st.booleans(),
    "ports": st.sampled_from([ports("811"), ports("812", "53/UDP"), ports("801")]),
    "policy": st.sampled_from([*[TrafficPolicy.CLUSTER] * 3, TrafficPolicy.LOCAL]),
    "source_ranges": st.sampled_from([(), (), (), (ip_network("192.0.2.0/24"),)]),
    "selector": st.sampled_from([(), (("app", "web"),)]),
    "labels": st.sampled_from([(), (("app", "web"),)]),
}
SPECS = st.fixed_dictionaries({name: of for name, of in FIELDS.items() if name != "ports"})
SEVERAL = {
    "a": ("10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1", "2001:db8::2"),
    "b": ("10.0.1.0", "10.0.1.1", "10.0.1.2"),
    "c": ("10.0.2.1", "2001:db8:1::1"),
}
TWISTS: dict[str, st.SearchStrategy[Any]] = {
    "auto_assign": st.booleans(),
    "avoid_buggy": st.booleans(),
    "priority": st.integers(0, 2),
    "namespaces": st.sampled_from([(), (), ("x",), ("y",)]),
    "tier": st.sampled_from(["", "", "front"]),
    "app": st.sampled_from(["", "", "", "web"]),
    "requests": st.sampled_from(["any", "any", "listed", "none"]),
    "share_across": st.sampled_from([(), ("x", "y")]),
    "quota": st.sampled_from([None, 1, 1, 2]),
    "drain": st.booleans(),
    "release": st.booleans(),
}


_parsed = cache(parse)


def some(of: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """One to three of these, each as likely as the others."""
    pairs = [st.tuples(st.just(name), values) for name, values in of.items()]
    return st.lists(st.one_of(pairs), min_size=1, max_size=3).map(dict)


class World(RuleBasedStateMachine):
    """Users, operators and time; after each of them the leader works until it rests."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.model = Rules((PoolText("a", SEVERAL["a"]), PoolText("b", SEVERAL["b"])))
        self.leader = Leader.start(self.server, self.config())
        self.uids = 0

    def config(self) -> Config:
        pools = ", ".join(pool.yaml() for pool in self.model.pools)
        without = str(self.model.without_class).lower()
        return _parsed(
            f"version: 1\npools: [{pools}]\nbgp: {{asn: 64512, peers: []}}\n"
            f"services: {{withoutClass: {without}}}\n"
        )

    # Users

    @initialize(refs=NAMES, changes=SPECS)
    def begin(self, refs: set[ObjectRef], changes: dict[str, Any]) -> None:
        """Next to nothing happens without Services."""
        self.create(refs, changes, None)

    @rule(refs=NAMES, changes=SPECS, of=st.sampled_from([None, None, CLASS, "other/lb"]))
    def create(self, refs: set[ObjectRef], changes: dict[str, Any], of: str | None) -> None:
        for ref in sorted(refs - self.server.services.keys()):
            self.uids += 1
            port = ports(f"8{ref.namespace < 'y':d}{ref.name[1]}")  # each its own: they can share
            made = Service(ref, f"u{self.uids}", self.server.now_s // 100, port, True, of)
            self.server.put_service(replace(made, **changes))
        self.settle()

    @rule(refs=NAMES, changes=some(FIELDS))
    def change(self, refs: set[ObjectRef], changes: dict[str, Any]) -> None:
        self.each(refs, **changes)

    @rule(refs=NAMES, of=st.sampled_from([None, CLASS, "other/lb"]))
    def change_type(self, refs: set[ObjectRef], of: str | None) -> None:
        """To ClusterIP and back; the API server clears the status."""
        for ref in sorted(refs & self.server.services.keys()):
            service = self.server.services[ref]
            other = not service.is_load_balancer
            self.server.put_service(
                replace(
                    service,
                    is_load_balancer=other,
                    load_balancer_class=of if other else None,
                    ingress=service.ingress if other else (),
                )
            )
        self.settle()

    @rule(refs=NAMES)
    def delete(self, refs: set[ObjectRef]) -> None:
        self.each(refs, deleting=True)

    @rule(refs=NAMES)
    def delete_by_force(self, refs: set[ObjectRef]) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            self.server.drop_service(ref)
        self.settle()

    @rule(refs=NAMES, text=st.sampled_from(["", "", "10.0.0.0", "10.0.1.1", "10.9.9.9"]))
    def write_status(self, refs: set[ObjectRef], text: str) -> None:
        """It is lost, or written by somebody else."""
        self.each(refs, ingress=(ip_address(text),) if text else ())

    def each(self, refs: set[ObjectRef], **changes: Any) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            self.server.put_service(replace(self.server.services[ref], **changes))
        self.settle()

    # Operators and time

    @rule(name=st.sampled_from("xy"), tier=st.sampled_from(["", "front"]))
    def label_namespace(self, name: str, tier: str) -> None:
        found = {"tier": tier} if tier else {}
        self.model.labels[name] = self.server.labels[name] = found
        self.leader.allocator.set_namespace(name, found)
        self.settle()

    @rule(name=st.sampled_from("abc"), twist=some(TWISTS))
    def change_pool(self, name: str, twist: dict[str, Any]) -> None:
        pool = next((p for p in self.model.pools if p.name == name), PoolText(name, SEVERAL[name]))
        self.configure(replace(pool, **twist))

    @rule(name=st.sampled_from("abc"), size=st.integers(1, 6))
    def resize_pool(self, name: str, size: int) -> None:
        pool = next((p for p in self.model.pools if p.name == name), PoolText(name, ()))
        self.configure(replace(pool, addresses=SEVERAL[name][:size]))

    @rule(at=st.sampled_from([0, 1, 2]), owner=st.sampled_from(["", "x/s1", "y/s0", None]))
    def reserve(self, at: int, owner: str | None) -> None:
        """None: not any more. An owner has one address, wherever it is."""
        pool = self.model.pools[0]
        address = SEVERAL[pool.name][at % len(SEVERAL[pool.name])]
        pools = [
            replace(
                one,
                reserved=tuple(
                    entry
                    for entry in one.reserved
                    if entry[0] != address and (not entry[1] or entry[1] != owner)
                ),
            )
            for one in self.model.pools
        ]
        if owner is not None:
            pools[0] = replace(pools[0], reserved=(*pools[0].reserved, (address, owner)))
        self.accept(tuple(pools), self.model.without_class)

    @rule(name=st.sampled_from("abc"))
    def remove_pool(self, name: str) -> None:
        left = tuple(pool for pool in self.model.pools if pool.name != name)
        if left:
            self.accept(left, self.model.without_class)

    @rule(without_class=st.booleans())
    def change_class_rule(self, without_class: bool) -> None:
        self.accept(self.model.pools, without_class)

    def configure(self, pool: PoolText) -> None:
        others = [p for p in self.model.pools if p.name != pool.name]
        self.accept(tuple(sorted([*others, pool], key=lambda p: p.name)), self.model.without_class)

    def accept(self, pools: tuple[PoolText, ...], without_class: bool) -> None:
        """The leader refuses what takes an address away."""
        before = self.model.pools
        refused = self.model.refuses(pools)
        self.model.pools = pools
        assert bool(shrink_conflicts(self.server.eips.values(), self.config())) == refused
        if refused:
            self.model.pools = before
            return
        self.model.without_class = without_class
        self.leader.configure(self.config())
        self.settle()

    @rule(rounds=st.integers(1, 3))
    def time_passes(self, rounds: int) -> None:
        """Routes are withdrawn, connections drain, addresses rest."""
        for _ in range(rounds):
            for eip in list(self.server.eips.values()):
                if eip.phase is Phase.RELEASING and not eip.withdrawn_by:
                    self.server.put_eip(replace(eip, withdrawn_by=("m",)))
            self.leader.watch()
            self.server.now_s += 31
            for _ in range(5):
                self.leader.release()
                self.leader.act()
                for address in self.model.held.keys() - self.server.eips.keys():
                    del self.model.held[address]
                self.settle()

    @rule(lost=st.booleans())
    def restart(self, lost: bool) -> None:
        """lost: and the status of every Service with it."""
        if lost:
            for service in list(self.server.services.values()):
                self.server.put_service(replace(service, ingress=()))
        self.start()

    @rule()
    def restore_without_eips(self) -> None:
        """A backup brings Services with their status back, but none of our objects."""
        self.server.eips.clear()
        self.model.held.clear()
        self.start()

    def start(self) -> None:
        del self.server.watchers[id(self.leader)]
        self.leader = Leader.start(self.server, self.config())
        self.settle()

    # What must hold

    def settle(self) -> None:
        self.model.services = dict(self.server.services)
        for _ in range(40):
            self.leader.watch()
            self.leader.plan()
            if not self.leader.todo:
                break
            self.leader.act()
        else:
            raise AssertionError("the allocator does not come to rest")
        self.model.settle()
        self.compare()

    def compare(self) -> None:
        found = {a: (e.members, e.phase is Phase.RELEASING) for a, e in self.server.eips.items()}
        expected = {a: (tuple(h.members), h.releasing) for a, h in self.model.held.items()}
        assert found == expected
        for address, held in self.model.held.items():
            eip = self.server.eips[address]
            if not held.releasing:
                assert (eip.pool, eip.sharing_key) == (held.pool, held.key), f"{address}"
        for ref, service in self.server.services.items():
            if ref in self.model.why:
                self.compare_service(service, self.model.services[ref].ingress)

    def compare_service(self, service: Service, expected: tuple[Address, ...]) -> None:
        assert set(service.ingress) == set(expected), f"{service.ref} shows"
        decision, why = self.leader.allocator.decision(service.ref), self.model.why[service.ref]
        assert decision is not None
        allowed = SERVED if why is None else (why,)
        assert decision.reason in allowed, f"{service.ref}: {decision.sentence} ({why})"


World.TestCase.settings = settings(
    max_examples=int(os.environ.get("LBCTL_EXAMPLES", "60")),
    stateful_step_count=25,
    deadline=None,
    report_multiple_bugs=False,
    derandomize="LBCTL_EXAMPLES" not in os.environ,  # `make test` must not depend on luck
)
# hypothesis shrinks for 300 s at most, and pytest must not cut off what it then has to say.
TestWorld = pytest.mark.timeout(900)(World.TestCase)
