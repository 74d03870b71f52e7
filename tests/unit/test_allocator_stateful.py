"""Several leaders at once: the allocator against an API server, with leaders that freeze, thaw much
later, and decide by what they knew then, and with watches that are late.

Whatever happens in whatever order: no address is shown by two that do not share it, none is lost or
moved, and none that a Service of ours shows is being released, not even for a moment. Which address
it is, and why, is `test_address_stateful`'s.
"""

from __future__ import annotations

import os
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lbctl.core.classes import not_ours
from lbctl.core.config import shrink_conflicts
from lbctl.core.model import Address, ObjectRef, Phase, Service
from lbctl.core.reasons import Reason
from tests.unit.allocator_model import Leader, Server, config

# Several at a time: single steps would leave most runs with next to nothing in the cluster.
NAMES = st.sets(st.sampled_from([ObjectRef("default", f"s{n}") for n in range(6)]), min_size=1)
ASKS = st.sampled_from([None, None, None, None, "10.0.0.1", "10.9.9.9", "x"])
KEYS = st.sampled_from(["", "", "k"])


def sharing(key: str) -> dict[str, Any]:
    """The annotations of a Service."""
    return {"annotations": (("lbctl.io/allow-shared-ip", key),) if key else ()}


class World(RuleBasedStateMachine):
    """Users, leaders and time."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.size = 3
        self.leader = Leader.start(self.server, config(self.size))
        self.frozen: list[Leader] = []
        self.first: dict[str, tuple[Address, ...]] = {}
        self.uids = 0

    # Users

    @initialize(refs=NAMES)
    def some_services(self, refs: set[ObjectRef]) -> None:
        self.create(refs, None)

    @rule(refs=NAMES, asks=ASKS, key=KEYS)
    def create(self, refs: set[ObjectRef], asks: str | None, key: str = "") -> None:
        for ref in sorted(refs - self.server.services.keys()):
            self.uids += 1
            service = Service(ref, f"u{self.uids}", self.server.now_s // 10, (), True)
            self.server.put_service(replace(service, requested=asks, **sharing(key)))

    @rule(refs=NAMES, key=KEYS)
    def share(self, refs: set[ObjectRef], key: str) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            self.server.put_service(replace(self.server.services[ref], **sharing(key)))

    @rule(refs=NAMES)
    def delete(self, refs: set[ObjectRef]) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            self.server.put_service(replace(self.server.services[ref], deleting=True))

    @rule(refs=NAMES)
    def delete_by_force(self, refs: set[ObjectRef]) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            self.server.drop_service(ref)

    @rule(refs=NAMES)
    def change_type(self, refs: set[ObjectRef]) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            service = self.server.services[ref]
            if not service.deleting:
                other = not service.is_load_balancer
                ingress = service.ingress if other else ()  # as the API server does
                self.server.put_service(replace(service, is_load_balancer=other, ingress=ingress))
                self.first.pop(service.uid, None)

    @rule(refs=NAMES, asks=ASKS)
    def ask_for_another(self, refs: set[ObjectRef], asks: str | None) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            self.server.put_service(replace(self.server.services[ref], requested=asks))

    @rule(refs=NAMES)
    def status_is_lost(self, refs: set[ObjectRef]) -> None:
        for ref in sorted(refs & self.server.services.keys()):
            service = self.server.services[ref]
            self.server.put_service(replace(service, ingress=()))
            # The one address that a lost status may cost: a frozen leader's, given by an older
            # configuration. No announcer announces it, so what takes its place is an improvement.
            if not any(config(self.size).pool_of(address) for address in service.ingress):
                self.first.pop(service.uid, None)

    # Operators and time

    @rule(size=st.integers(1, 6))
    def resize_pool(self, size: int) -> None:
        """Only what the leader would accept."""
        if not shrink_conflicts(self.server.eips.values(), config(size)):
            self.size = size
            self.leader.allocator.configure(config(size))

    @rule(seconds=st.sampled_from([1, 10, 60]))
    def time_passes(self, seconds: int) -> None:
        self.server.now_s += seconds

    @rule()
    def managers_withdraw(self) -> None:
        for eip in list(self.server.eips.values()):
            if eip.phase is Phase.RELEASING and not eip.withdrawn_by:
                self.server.put_eip(replace(eip, withdrawn_by=("m",)))

    # Leaders

    @rule()
    def lead(self) -> None:
        self.leader.watch()
        self.leader.decide()
        self.leader.act()

    @rule()
    def lead_before_the_watch_delivers(self) -> None:
        self.leader.decide()
        self.leader.act()

    @rule(done=st.integers(0, 5))
    def freeze(self, done: int) -> None:
        """The leader stops in the middle of its plan, and another takes over."""
        self.leader.watch()
        self.leader.decide()
        self.leader.act(done)
        self.frozen.append(self.leader)
        self.leader = Leader.start(self.server, config(self.size))

    @rule()
    def restart(self) -> None:
        del self.server.watchers[id(self.leader)]
        self.leader = Leader.start(self.server, config(self.size))

    @precondition(lambda self: self.frozen)
    @rule(again=st.booleans())
    def thaw(self, again: bool) -> None:
        """It goes on where it was; `again`: and decides once more from what it knew then."""
        old = self.frozen.pop(0)
        old.act()
        if again:
            old.decide()
            old.act()
        del self.server.watchers[id(old)]

    @rule(gone=NAMES, new=NAMES, done=st.integers(0, 4), again=st.booleans())
    def thaw_under_another(
        self, gone: set[ObjectRef], new: set[ObjectRef], done: int, again: bool
    ) -> None:
        """As chance seldom has it: what it decided on is gone, and others have come."""
        self.freeze(done)
        self.delete_by_force(gone)
        self.create(new, None)
        self.lead()
        self.thaw(again)

    @rule(refs=NAMES, steps=st.integers(0, 6), again=st.booleans())
    def thaw_into_a_return(self, refs: set[ObjectRef], steps: int, again: bool) -> None:
        """It was giving back, however far it had come, what has found its owner again."""
        self.delete(refs)
        for _ in range(steps):
            self.managers_withdraw()
            self.lead()
            self.server.now_s += 31
        self.freeze(0)
        self.delete_by_force(refs)
        self.create(refs, None)
        self.lead()
        self.thaw(again)

    # What must hold

    @invariant()
    def what_is_shown_is_owned(self) -> None:
        """So no address is shown by two that do not share it."""
        for service in self.server.services.values():
            for address in service.ingress:
                eip = self.server.eips.get(address)
                assert eip is not None and service.ref in eip.members, f"{service.ref} {address}"
                assert len(eip.members) == 1 or eip.sharing_key
                if not_ours(service) is None:
                    assert eip.phase is Phase.BOUND, f"{service.ref} {address} is being released"

    @invariant()
    def none_moved(self) -> None:
        for service in self.server.services.values():
            if service.ingress:
                first = self.first.get(service.uid, service.ingress)
                asked = [str(address) for address in service.ingress] == [service.requested]
                moved = f"{service.ref}: {first} became {service.ingress}"
                assert service.ingress == first or asked, moved
                self.first[service.uid] = service.ingress

    def teardown(self) -> None:
        """When it is quiet at last, all is as it should be."""
        while self.frozen:
            self.thaw(again=False)
        for _ in range(20):
            self.managers_withdraw()
            self.lead()
            self.server.now_s += 31
        self.leader.watch()
        assert not self.leader.allocator.plan(), "it does not come to rest"
        self._check_settled()

    def _check_settled(self) -> None:
        services = self.server.services.values()
        ours = [service for service in services if not_ours(service) is None]
        for service in services:
            if not_ours(service) is not None:
                # A finalizer may stay without an EIP: see Allocator._take_back.
                assert not service.ingress and not service.deleting
        held = {eip.address: eip for eip in self.server.eips.values()}
        on = {ref for eip in held.values() for ref in eip.members}
        assert on <= {service.ref for service in ours}, "an EIP is lost"
        assert all(e.phase is Phase.BOUND and e.forwarding for e in held.values())
        given = {address for service in ours for address in service.ingress}
        assert given == set(held)
        for service in ours:
            decision = self.leader.allocator.decision(service.ref)
            assert decision is not None
            self._check_service(service, decision.reason, given)

    def _check_service(self, service: Service, reason: Reason, given: set[Address]) -> None:
        if service.requested == "x":
            assert reason is Reason.REQUEST_INVALID
        elif service.requested is None:
            taken = [address for address in given if config(self.size).pool_of(address)]
            assert service.ingress or len(taken) == self.size, f"{service.ref} waits in vain"
        elif service.requested not in {str(address) for address in service.ingress}:
            inside = int(ip_address(service.requested)) < int(ip_address("10.0.0.0")) + self.size
            wish = ip_address(service.requested)
            assert reason is (
                Reason.ADDRESS_TAKEN if inside and wish in given else Reason.ADDRESS_OUTSIDE_POOLS
            )


World.TestCase.settings = settings(
    max_examples=int(os.environ.get("LBCTL_EXAMPLES", "200")),
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    derandomize="LBCTL_EXAMPLES" not in os.environ,  # `make test` must not depend on luck
)
# hypothesis shrinks for 300 s at most, and pytest must not cut off what it then has to say.
TestWorld = pytest.mark.timeout(900)(World.TestCase)
