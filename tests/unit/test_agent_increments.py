"""Passes that build upon the last one give what one from nothing gives, whatever happened before.

That is the safety net of "a change costs what changed": tables, digests, rulesets, totals, what is
confirmed and the snapshot, all against the same made from scratch; and the text of each difference,
applied to a fake table, against the full text.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.engine import Confirmed, confirmed_eips
from agent.inputs import Inputs
from agent.rendering import State, render
from agent.snapshot import Store
from lbctl.core import forwarding, nft, nodeview
from lbctl.core.forwarding import Locator, Sources
from lbctl.core.model import (
    Address,
    Behind,
    Eip,
    Endpoint,
    External,
    ForwardingOptions,
    LocalDelivery,
    LocatedBy,
    Network,
    ObjectRef,
    PortEndpoints,
    Protocol,
    Service,
    ServiceEndpoints,
    ServicePort,
    Sharer,
    TrafficPolicy,
)
from lbctl.core.pmap import PMap, persistent

from .faketable import FakeTable
from .forwarding_cases import RANGES, nodes, pod

EIPS = [ip_address(f"198.51.100.{n}") for n in (1, 2, 200)] + [ip_address("2001:db8::1")]
REFS = [ObjectRef("default", name) for name in ("a", "b", "c")]
PODS = [pod(n, p) for n in (1, 2, 3) for p in (2, 3)]
PODS.append(replace(pod(2, 9), node="n1"))  # in n2's pod CIDR
OUTSIDE = Endpoint(ip_address("192.0.2.200"), 8080)
SOURCES = [ip_network("203.0.113.0/24"), ip_network("192.0.2.0/25")]
PORTS = [ServicePort("", Protocol.TCP, 80), ServicePort("dns", Protocol.UDP, 53)]


def confirmed_from(table: forwarding.Table) -> PMap[Address, Behind]:
    return confirmed_eips("n1", Confirmed(), table)


class Passes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.store = Store(Path(self.directory.name), "n1")
        self.inputs = Inputs(nodes=nodes(), ranges=RANGES)
        self.down: frozenset[str] = frozenset()
        self.fallen: frozenset[str] = frozenset()
        self.usable: tuple[str, ...] = ("n2", "n3")
        self.tunnelled = False
        self.state, self.counts, self.confirmed = State(), nft.totals(nft.Ruleset()), Confirmed()
        self.kernel = FakeTable()
        self.view: nodeview.View = {}  # made without knowing what changed

    def teardown(self) -> None:
        self.directory.cleanup()

    @rule(
        eip=st.sampled_from(EIPS),
        refs=st.lists(st.sampled_from(REFS), min_size=1, max_size=2, unique=True),
        forwarding=st.booleans(),
    )
    def own(self, eip: IPv4Address, refs: list[ObjectRef], forwarding: bool) -> None:
        sharers = tuple(Sharer(ref, "uid") for ref in refs[1:])
        made = Eip(eip, "public", refs[0], "uid", forwarding=forwarding, sharers=sharers)
        self.inputs = replace(self.inputs, eips=persistent(self.inputs.eips).updated({eip: made}))

    @rule(eip=st.sampled_from(EIPS))
    def free(self, eip: IPv4Address) -> None:
        self.inputs = replace(self.inputs, eips=persistent(self.inputs.eips).updated({}, [eip]))

    @rule(
        ref=st.sampled_from(REFS),
        ports=st.sets(st.sampled_from(PORTS)),
        affinity_s=st.sampled_from([None, 10, 60]),
        sources=st.sets(st.sampled_from(SOURCES)),
        policy=st.sampled_from(TrafficPolicy),
    )
    def serve(
        self,
        ref: ObjectRef,
        ports: set[ServicePort],
        affinity_s: int | None,
        sources: set[Network],
        policy: TrafficPolicy,
    ) -> None:
        made = Service(
            ref,
            "uid",
            0.0,
            tuple(sorted(ports)),
            True,
            policy=policy,
            affinity_s=affinity_s,
            source_ranges=tuple(sorted(sources, key=str)),
        )
        known = persistent(self.inputs.services)
        self.inputs = replace(self.inputs, services=known.updated({ref: made}))

    @rule(ref=st.sampled_from(REFS))
    def delete(self, ref: ObjectRef) -> None:
        known = persistent(self.inputs.services)
        self.inputs = replace(self.inputs, services=known.updated({}, [ref]))

    @rule(
        ref=st.sampled_from(REFS),
        chosen=st.sets(st.sampled_from([*PODS, OUTSIDE])),
        odd=st.sampled_from(["", "st", "t"]),
        some=st.sets(st.sampled_from(PODS)),
    )
    def scale(self, ref: ObjectRef, chosen: set[Endpoint], odd: str, some: set[Endpoint]) -> None:
        """odd: what `some` of the pods are: not ready, serving yet, or terminating."""
        pods = tuple(
            replace(p, ready=False, serving="s" in odd, terminating="t" in odd) if p in some else p
            for p in sorted(chosen)
        )
        made = ServiceEndpoints(ref, tuple(PortEndpoints(p.name, p.protocol, pods) for p in PORTS))
        known = persistent(self.inputs.endpoints)
        self.inputs = replace(self.inputs, endpoints=known.updated({ref: made}))

    @rule(down=st.sets(st.sampled_from(["n1", "n2", "n3"]), max_size=1), lately=st.booleans())
    def judge(self, down: set[str], lately: bool) -> None:
        self.down = frozenset(down)
        self.fallen = self.down if lately else frozenset()

    @rule(
        ping=st.booleans(),
        local=st.sampled_from(get_args(LocalDelivery)),
        external=st.sampled_from(get_args(External)),
        by=st.sampled_from(get_args(LocatedBy)),
        doubtful=st.sets(st.sampled_from(["n1", "n2", "n3"])),
    )
    def configure(
        self,
        ping: bool,
        local: LocalDelivery,
        external: External,
        by: LocatedBy,
        doubtful: set[str],
    ) -> None:
        options = ForwardingOptions(
            ping=ping, local_delivery=local, external=external, located_by=by
        )
        self.inputs = replace(self.inputs, forwarding=options, doubtful=frozenset(doubtful))

    @rule(
        count=st.integers(2, 3), wide=st.booleans(), reachable=st.booleans(), tunnel=st.booleans()
    )
    def rebuild(self, count: int, wide: bool, reachable: bool, tunnel: bool) -> None:
        self.tunnelled = tunnel
        spans = (*RANGES, (EIPS[2], EIPS[2])) if wide else RANGES
        self.inputs = replace(self.inputs, nodes=nodes(count), ranges=spans)
        self.usable = tuple(f"n{n}" for n in range(2, count + 1)) if reachable else ()

    @rule()
    def one_pass(self) -> None:
        i, before = self.inputs, self.state
        locator = Locator(i.nodes, i.forwarding.located_by)
        sources = Sources(
            i.eips,
            i.services,
            i.endpoints,
            locator,
            self.down,
            i.forwarding,
            self.fallen,
            i.doubtful,
        )
        table = forwarding.revise(before.table, sources)
        view = nodeview.advance(before.view, table, "n1", before.table)
        macs = {ip_address("192.0.2.22"): "02:00:00:00:00:02"}
        bare = State(i, self.down, table, view, {"n2": 1, "n3": 2}, macs, usable=self.usable)
        if self.tunnelled:
            bare = replace(bare, tunnel_peers=(ip_address("192.0.3.9"),), tunnel_mtu=1450)
        generation = before.rules.generation + 1
        self.state = render(bare, "n1", generation, ("eth0",), before)
        pieces = nft.difference(before.rules, self.state.rules)
        for piece in pieces if before.rules.generation else nft.full(self.state.rules):
            self.kernel.apply(piece)
        self.counts = nft.recounted(self.counts, before.rules, self.state.rules)
        eips = confirmed_eips("n1", self.confirmed, table)
        self.confirmed = Confirmed(generation, 0, table, eips)

        plain = replace(
            sources,
            eips=dict(i.eips),
            services=dict(i.services),
            endpoints=dict(i.endpoints),
        )
        whole = forwarding.revise(forwarding.EMPTY, plain)
        assert (table.eips, table.digest, table.owned) == (whole.eips, whole.digest, whole.owned)
        self.view = nodeview.advance(dict(self.view), whole, "n1")
        assert view == self.view
        fresh = render(replace(bare, view=self.view), "n1", generation, ("eth0",))
        assert self.state.rules == fresh.rules and self.state.strays == fresh.strays
        assert self.state.externals == fresh.externals
        assert self.counts == nft.totals(fresh.rules)
        assert eips == confirmed_from(whole)
        anew = FakeTable()
        for piece in nft.full(fresh.rules):
            anew.apply(piece)
        kept, made = self.kernel.maps, anew.maps
        assert {n: m for n, m in kept.items() if m and not n.endswith(" gen")} == {
            n: m for n, m in made.items() if m and not n.endswith(" gen")
        }

    @rule()
    def snapshot(self) -> None:
        self.store.save(self.state)
        self.store.kept.write()

    @rule()
    def restart(self) -> None:
        if self.state.rules.generation:
            self.snapshot()
            self.store = Store(Path(self.directory.name), "n1")
            found = self.store.load()
            assert found is not None
            assert (found.rules, found.table.digest) == (self.state.rules, self.state.table.digest)
            self.state, self.view = found, found.view

    @invariant()
    def the_snapshot_is_the_state_when_written(self) -> None:
        if self.store._latest is self.state and self.state.rules.generation:
            self.store.kept.write()
            found = self.store.load()
            assert found is not None
            assert found.rules == self.state.rules
            assert found.table.digest == self.state.table.digest


TestPasses = Passes.TestCase
TestPasses.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
