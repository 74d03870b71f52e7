"""The allocator against a slow model of its rules (`address_model`): whatever users, operators and
time do, in whatever order, everybody has what docs/addresses.md says, and for that reason, whenever
the leader, or who took over from it, rests. What holds before that, `test_allocator_stateful` says.

CONTRIBUTING.md says how to search longer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any, TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from lbctl.core import actions
from lbctl.core.allocator import Allocator
from lbctl.core.config import Config, parse, shrink_conflicts
from lbctl.core.forecast import forecast
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service, TrafficPolicy
from lbctl.core.reasons import Reason
from tests.unit.address_model import CLASS, Held, PoolSpec, Rules
from tests.unit.address_rules import ports
from tests.unit.allocator_model import Leader, Server

REFS = [ObjectRef("x", f"s{n}") for n in range(4)] + [ObjectRef("y", f"s{n}") for n in range(2)]
ONE, SOME = st.sampled_from(REFS), st.sets(st.sampled_from(REFS), min_size=1)
SERVED = (Reason.ALLOCATED, Reason.RESTORED, Reason.RECREATED, Reason.SHARED, Reason.ADOPTED)
# Few addresses, so that there is always somebody who waits.
SEVERAL = {
    "a": ("10.0.0.0", "10.0.0.1", "10.0.0.2", "2001:db8::1"),
    "b": ("10.0.1.1", "10.0.1.255", "2001:db8:1::1"),
    "c": ("10.0.2.1",),
}
# Several can be true, and what came true first is what was said.
FULL = (Reason.POOL_EXHAUSTED, Reason.QUOTA_EXCEEDED, Reason.ADDRESS_TAKEN)
STATUS = st.sampled_from(["", "", "10.0.0.0", "10.0.0.1", "10.0.1.1", "10.9.9.9"])


def asks(addresses: str = "", pool: str = "", key: str = "", of: str = "lbctl") -> dict[str, Any]:
    said = {"loadBalancerIPs": addresses, "address-pool": pool, "allow-shared-ip": key}
    return {"annotations": tuple((f"{of}.io/{name}", text) for name, text in said.items() if text)}


WISHES = [
    *[asks()] * 6,
    *[asks(key="k")] * 6,
    asks(key="l"),
    asks("10.0.0.0"),
    asks("10.0.0.1"),
    asks("10.0.1.255"),
    asks("10.9.9.9"),
    asks("x"),
    asks("10.0.0.1, 2001:db8::1"),
    asks("10.0.0.2", key="k"),
    asks("10.0.1.1", key="k"),
    asks("10.0.1.1", "b"),
    asks("10.0.1.1", "a"),
    asks(pool="a"),
    asks(pool="b"),
    asks(pool="none"),
    asks(pool="b", key="k"),
    asks("10.0.0.1", of="metallb"),
    {"requested": "10.0.0.1"},
    {**asks("10.0.0.2"), "requested": "10.0.0.1"},
    {**asks("2001:db8::1"), "requested": "10.0.0.1"},
]
CHANGES = [
    *[{"annotations": (), "requested": None, **wish} for wish in WISHES],
    *[{"families": families} for families in [(4,), (4,), (6,), (4, 6), (6, 4)]],
    {"families": (4, 6), "needs_both": True},
    {"families": (4, 6), "needs_both": False},
    *[{"ports": ports(*text)} for text in [("80",), ("81",), ("80/UDP", "82")]],
    {"policy": TrafficPolicy.LOCAL},
    {"policy": TrafficPolicy.LOCAL, "selector": (("app", "web"),)},
    {"policy": TrafficPolicy.CLUSTER},
    {"source_ranges": (ip_network("192.0.2.0/24"),)},
    {"source_ranges": ()},
    {"labels": (("app", "web"),)},
    {"labels": ()},
    {"cluster_ips": (ip_address("10.0.0.1"),)},
    {"cluster_ips": ()},
]
TWISTS: list[dict[str, Any]] = [
    {"auto_assign": False},
    {"avoid_buggy": True},
    {"priority": 1},
    {"priority": 2},
    {"namespaces": ("x",)},
    {"namespaces": ("y",)},
    {"tier": "front"},
    {"app": "web"},
    {"requests": "listed"},
    {"requests": "none"},
    *[{"share_across": ("x", "y")}] * 3,
    *[{"quota": 1}] * 3,
    {"quota": 2},
    {"drain": True},
    {"release": True},
    {"reserved": (("10.0.0.0", "x/s1"),)},
    {"reserved": (("10.0.0.1", "y/s0"),)},
    {"reserved": (("10.0.0.1", ""),)},
]


@dataclass(frozen=True)
class Theme:
    """Pools and Services for which one rule matters, and what then happens to them."""

    pools: dict[str, dict[str, Any]]
    services: tuple[dict[str, Any], ...] = ()
    then: tuple[tuple[int, dict[str, Any]], ...] = ()


GOES = {"deleting": True}
THEMES = [
    Theme({"a": {}, "b": {}}),
    Theme({"a": {"priority": 2}, "b": {"priority": 1}}, ({},)),
    Theme({"c": {}}, ({}, {}, {}), ((0, GOES),)),  # who waits is woken by age
    Theme({"c": {}}, ({}, asks(key="k")), ((0, asks(key="k")),)),  # or by a key
    Theme({"a": {}}, ({**asks(key="k"), "ports": ports("80")},) * 2),  # ports clash
    Theme({"a": {"reserved": (("10.0.0.1", "y/s0"),)}}, (asks("10.0.0.1"),)),
    Theme({"a": {"drain": True}, "b": {}}, ({}, asks("10.0.0.1"))),
    Theme({"a": {"requests": "none"}}, (asks("10.0.0.1"),)),
    Theme({"a": {}}, (asks(key="k"),), ((0, GOES), (1, asks(key="k")))),  # it rests
    Theme({"a": {"quota": 1}}, ({"families": (4, 6), "needs_both": True},)),
    Theme({"a": {"namespaces": ("y",)}, "b": {"app": "web"}}, (asks("10.0.0.1"), {})),
    Theme({"a": {"quota": 1}, "b": {}}, ({}, {}, asks(key="k"), asks(key="k"))),
    Theme({"a": {"avoid_buggy": True}}, ({}, asks("10.0.0.0"))),
    Theme(
        {"a": {"requests": "listed", "reserved": (("10.0.0.1", ""),)}},
        (asks("10.0.0.0"), asks("10.0.0.1")),
    ),
    Theme({"a": {}}, ({"cluster_ips": (ip_address("10.0.0.0"),)}, {})),
    Theme({"a": {}}, (asks(key="k"), {**asks(key="k"), "policy": TrafficPolicy.LOCAL})),
    Theme({"a": {"quota": 1}}, (asks("10.0.0.0"),), ((0, asks("10.0.0.1")),)),
    Theme({"a": {"quota": 1}}, ({}, {}), ((0, GOES),)),
]
PLAIN = {name: getattr(PoolSpec("", ()), name) for twist in TWISTS for name in twist}
UNTWISTS = [{name: value} for name, value in PLAIN.items()]
Batch: TypeAlias = list[tuple[ObjectRef, dict[str, Any], dict[str, Any], int]]
BATCH: st.SearchStrategy[Batch] = st.lists(
    st.tuples(ONE, st.sampled_from(CHANGES), st.sampled_from(CHANGES), st.integers(1, 3)),
    min_size=3,
    max_size=6,
)
_parsed = cache(parse)


def held(eip: Eip) -> str:
    """As the model would say it."""
    resting, members = eip.phase is Phase.RELEASING, list(eip.members)
    return str(Held(eip.pool, members, "" if resting else eip.sharing_key, resting))


class World(RuleBasedStateMachine):
    """Users, operators and time; after each of them the leader works until it rests."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.random = Random(0)  # of the order in which the watch delivers
        self.uids = 0
        self.freeze_at: int | None = None

    @initialize(
        theme=st.sampled_from(THEMES),
        twists=st.lists(st.tuples(st.sampled_from("aab"), st.sampled_from(TWISTS)), max_size=3),
        batch=BATCH,
    )
    def begin(self, theme: Theme, twists: list[tuple[str, dict[str, Any]]], batch: Batch) -> None:
        pools = {
            name: replace(PoolSpec(name, SEVERAL[name]), **twist)
            for name, twist in theme.pools.items()
        }
        for name, twist in twists:
            if not theme.services and (name == "a" or "reserved" not in twist):
                pools[name] = replace(pools[name], **twist)
        self.model = Rules(tuple(pools.values()))
        self.leader = Leader.start(self.server, self.config())
        first: Batch = [(REFS[n], changes, {}, n + 1) for n, changes in enumerate(theme.services)]
        self.create(first, None)
        for n, changes in theme.then:
            self.create([(REFS[n], changes, {}, n + 1)], None)
            self.each({REFS[n]}, **changes)
            self.time_passes()
        self.create(batch, None)

    def config(self) -> Config:
        pools = ", ".join(pool.yaml() for pool in self.model.pools)
        return _parsed(
            f"version: 1\npools: [{pools}]\nbgp: {{asn: 64512, peers: []}}\n"
            f"services: {{withoutClass: {str(self.model.without_class).lower()}}}\n"
            f"takeover: {'adopt' if self.model.adopting else 'none'}\n"
        )

    # Users

    @rule(batch=BATCH, of=st.sampled_from([None, None, CLASS, "other/lb"]))
    def create(self, batch: Batch, of: str | None) -> None:
        """Several before the leader sees the first; `created_s` is what a backup says."""
        for ref, first, second, created_s in batch:
            if ref not in self.server.services:
                self.put_new(ref, created_s, of, **{**first, **second})
        self.settle()

    def put_new(self, ref: ObjectRef, created_s: float, of: str | None, **changes: Any) -> None:
        self.uids += 1
        port = ports(f"8{REFS.index(ref)}")  # each its own: they can share
        made = Service(ref, f"u{self.uids}", created_s, port, True, of)
        self.server.put_service(replace(made, **changes))

    @rule(refs=SOME, change=st.sampled_from(CHANGES), second=st.sampled_from(CHANGES))
    def change(self, refs: set[ObjectRef], change: dict[str, Any], second: dict[str, Any]) -> None:
        self.each(refs, **{**change, **second})

    @rule(refs=SOME, of=st.sampled_from([None, CLASS, "other/lb"]))
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

    @rule(refs=SOME)
    def delete(self, refs: set[ObjectRef]) -> None:
        self.each(refs, deleting=True)

    @rule(refs=SOME, again=st.booleans())
    def delete_by_force(self, refs: set[ObjectRef], again: bool) -> None:
        """again: and created anew before the leader sees it."""
        for ref in sorted(refs & self.server.services.keys()):
            old = self.server.services[ref]
            self.server.drop_service(ref)
            if again:
                self.put_new(ref, 4, old.load_balancer_class, annotations=old.annotations)
        self.settle()

    @rule(refs=SOME, text=STATUS)
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

    @rule(name=st.sampled_from("ab"), twist=st.sampled_from(TWISTS + UNTWISTS))
    def change_pool(self, name: str, twist: dict[str, Any]) -> None:
        old = next((p for p in self.model.pools if p.name == name), PoolSpec(name, SEVERAL[name]))
        if name == "a" or not twist.get("reserved"):
            self.change_pools(name, replace(old, **twist))

    @rule(name=st.sampled_from("abc"), size=st.integers(0, 4))
    def resize_pool(self, name: str, size: int) -> None:
        """0: it goes."""
        old = next((p for p in self.model.pools if p.name == name), PoolSpec(name, ()))
        new = replace(old, addresses=SEVERAL[name][:size])
        reserved = tuple(pair for pair in old.reserved if pair[0] in new.addresses)
        self.change_pools(name, replace(new, reserved=reserved) if size else None)

    def change_pools(self, name: str, pool: PoolSpec | None) -> None:
        others = [old for old in self.model.pools if old.name != name]
        pools = tuple(sorted([*others, *([pool] if pool else [])], key=lambda one: one.name))
        if pools:
            self.accept(pools=pools)

    @rule(without_class=st.booleans())
    def change_class_rule(self, without_class: bool) -> None:
        self.accept(without_class=without_class)

    @rule(never=st.sampled_from([(), ("10.0.0.0",), ("10.0.0.1", "2001:db8::1")]))
    def nodes_come_and_go(self, never: tuple[str, ...]) -> None:
        self.accept(never=frozenset(map(ip_address, never)))

    def accept(self, **changes: Any) -> None:
        """The leader refuses what takes an address away."""
        old = self.model
        self.model = replace(old, **changes)
        refused = old.refuses(self.model.pools)
        assert bool(shrink_conflicts(self.server.eips.values(), self.config())) == refused
        if refused:
            self.model = old
            return
        self.leader.configure(self.config(), self.model.never)
        self.settle()

    @rule()
    def time_passes(self) -> None:
        """Routes are withdrawn, connections drain, addresses rest."""
        for eip in list(self.server.eips.values()):
            if eip.phase is Phase.RELEASING and not eip.withdrawn_by:
                self.server.put_eip(replace(eip, withdrawn_by=("m",)))
        for _ in range(6):
            self.leader.watch()
            self.server.now_s += 31
            self.leader.release()
            self.leader.act()
        for address in [a for a, held in self.model.held.items() if held.resting]:
            del self.model.held[address]
        self.settle()

    @rule(lost=st.booleans())
    def restart(self, lost: bool) -> None:
        """lost: and the status of every Service with it."""
        if lost:
            for service in list(self.server.services.values()):
                self.server.put_service(replace(service, ingress=()))
        self.start()

    @rule(steps=st.integers(0, 6))
    def freeze(self, steps: int) -> None:
        """The leader will freeze in the middle of its next plan, and another take over."""
        self.freeze_at = steps

    @rule()
    def restore_without_eips(self) -> None:
        """A backup brings Services with their status back, but none of our objects."""
        self.server.eips.clear()
        self.model.held.clear()
        self.start()

    @rule(texts=st.lists(STATUS, min_size=6, max_size=6))
    def take_over(self, texts: list[str]) -> None:
        """Another controller gave what the status shows. `observe` foretells what `adopt` does,
        which keeps it; then all rules hold."""
        self.server.eips.clear()
        self.model.held.clear()
        for service, text in zip(list(self.server.services.values()), texts, strict=False):
            shown = (ip_address(text),) if text and service.is_load_balancer else ()
            self.server.put_service(replace(service, ingress=shown))
        self.model.adopting = True
        told = self.foretold()
        self.start()
        found = {ref: self.leader.allocator.decision(ref) for ref in self.model.why}
        assert told == {ref: (one.addresses, bool(one.said)) for ref, one in found.items() if one}
        self.accept(adopting=False)

    def foretold(self) -> dict[ObjectRef, tuple[tuple[Address, ...], bool]]:
        """What each Service of ours will have, and whether it will be refused something."""
        server, never = self.server, self.model.never
        found = forecast(
            self.config(), server.services.values(), server.eips.values(), never, server.labels
        )
        return {one.service: (one.after, one.refused) for one in found}

    def start(self) -> None:
        del self.server.watchers[id(self.leader)]
        self.leader = Leader.start(self.server, self.config(), self.model.never)
        self.settle()

    # What must hold

    def settle(self) -> None:
        self.model.services = dict(self.server.services)
        frozen = self.leader
        if self.freeze_at is not None:
            self.work(self.freeze_at)
            self.leader = Leader.start(self.server, self.config(), self.model.never)
            self.freeze_at = None
        for _ in range(40):
            if not self.work():
                break
        else:
            raise AssertionError("the allocator does not come to rest")
        if frozen is not self.leader:
            self.thaw(frozen)
        self.model.settle()
        for ref in self.model.services.keys() - self.server.services.keys():
            del self.model.services[ref]  # nothing but its finalizer held it
            self.model.settle()
        self.compare()
        if not self.model.adopting:  # what cannot be shown then is written anew at every start
            self.plan_anew()

    def work(self, steps: int | None = None) -> bool:
        """Whether the leader found something to do."""
        self.random.shuffle(self.leader.queue)
        self.leader.watch()
        self.leader.plan()
        busy = bool(self.leader.todo)
        self.leader.act(steps)
        return busy

    def thaw(self, frozen: Leader) -> None:
        """What a leader of old still wants to do meets 409 and changes nothing, but for a finalizer
        that nobody needs any more."""
        before = self.stored()
        frozen.act()
        assert before == self.stored()
        del self.server.watchers[id(frozen)]

    def stored(self) -> tuple[object, ...]:
        services, eips = self.server.services, self.server.eips
        bare = {ref: replace(service, finalizers=()) for ref, service in services.items()}
        versions = [found.version for found in services.values() if found.is_load_balancer]
        return bare, versions, dict(eips)

    def plan_anew(self) -> None:
        """A leader that starts now has nothing to do but to say what was said."""
        fresh = Allocator(self.config(), self.model.never)
        for name, labels in self.server.labels.items():
            fresh.set_namespace(name, labels)
        for eip in self.server.eips.values():
            fresh.set_eip(eip)
        for service in reversed(self.server.services.values()):
            fresh.set_service(service)
        said = (actions.Refused, actions.Told)
        assert [action for action in fresh.plan() if not isinstance(action, said)] == []

    def compare(self) -> None:
        """Who has which address, and for which reason."""
        model, server = self.model, self.server
        assert {str(a): held(e) for a, e in server.eips.items()} == {
            str(a): str(held) for a, held in model.held.items()
        }
        for ref, why in model.why.items():
            shown, decision = server.services[ref].ingress, self.leader.allocator.decision(ref)
            assert decision is not None
            says = f"{ref}: {decision.reason} {decision.sentence}"
            allowed = FULL if why in FULL else (why,) if why else SERVED
            assert decision.reason in allowed, f"{says}; model: {why}"
            assert set(shown) == set(model.services[ref].ingress), says


World.TestCase.settings = settings(
    max_examples=int(os.environ.get("LBCTL_EXAMPLES", "40")),
    stateful_step_count=12,
    deadline=None,
    report_multiple_bugs=False,
    derandomize="LBCTL_EXAMPLES" not in os.environ,  # `make test` must not depend on luck
)
# hypothesis shrinks for 300 s at most, and pytest must not cut off what it then has to say.
TestWorld = pytest.mark.timeout(900)(World.TestCase)


@pytest.mark.parametrize("theme", THEMES)
def test_each_theme_by_itself(theme: Theme) -> None:
    """The draw above need not come to all of them, nor to what another controller gave there,
    who comes while it rests, and who comes back."""
    world = World()
    world.begin(theme=theme, twists=[], batch=[])
    world.take_over(texts=["10.0.0.1", "10.0.0.1", "10.9.9.9", "", "", ""])
    world.change_type(refs=set(REFS), of=None)
    world.create([(REFS[3], asks(key="k"), {}, 9)], None)
    world.change_type(refs=set(REFS[:3]), of=None)
