"""A model of the API server, and of leaders that decide and act against it.

The model is the arbiter: creates fail on a name that exists, writes fail on a resourceVersion that
is not the current one. A leader sees changes only when its watch delivers them, carries out what
it decided as `manager/executor.py` does, and can stop between any two requests.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cache

from msgspec import structs

from lbctl.core import actions, names
from lbctl.core.allocator import Allocator
from lbctl.core.config import Config, parse
from lbctl.core.model import Address, Eip, ObjectRef, Phase, Service
from lbctl.core.release import Facts, Releases

FACTS = Facts(living={"m"}, drain_time_s=2, reuse_after_s=30)


@cache
def config(size: int) -> Config:
    return parse(
        f"version: 1\npools: [{{name: a, addresses: [10.0.0.0-10.0.0.{size - 1}]}}]\n"
        "bgp: {asn: 64512, peers: []}\n"
    )


def marked(service: Service, pools: str) -> Service:
    """With what AddFinalizer writes."""
    others = [pair for pair in service.annotations if pair[0] != names.ANNOTATION_POOL]
    notes = (*others, (names.ANNOTATION_POOL, pools))
    return replace(service, finalizers=(names.FINALIZER,), annotations=notes)


class Stale(Exception):
    """409."""


class Server:
    """The API server: objects with versions, and a change feed."""

    def __init__(self) -> None:
        self.services: dict[ObjectRef, Service] = {}
        self.eips: dict[Address, Eip] = {}
        self.labels: dict[str, dict[str, str]] = {}  # of namespaces
        self.watchers: dict[int, list[ObjectRef | Address]] = {}
        self.now_s = 1000.0
        self._version = 0

    def tick(self) -> str:
        self._version += 1
        return str(self._version)

    def _tell(self, key: ObjectRef | Address) -> None:
        for queue in self.watchers.values():
            queue.append(key)

    def put_service(self, service: Service) -> Service:
        """Store; one that is being deleted and has no finalizer goes."""
        stored = replace(service, version=self.tick())
        if stored.deleting and not stored.finalizers:
            self.services.pop(stored.ref, None)
        else:
            self.services[stored.ref] = stored
        self._tell(stored.ref)
        return stored

    def drop_service(self, ref: ObjectRef) -> None:
        del self.services[ref]
        self._tell(ref)

    def put_eip(self, eip: Eip) -> Eip:
        self.eips[eip.address] = replace(eip, version=self.tick())
        self._tell(eip.address)
        return self.eips[eip.address]

    def carry_out(self, action: actions.Action) -> Service | Eip | None:
        """A guarded write. Raises Stale; what is stored now, None if deleted."""
        match action:
            case actions.CreateEip(eip=eip):
                if eip.address in self.eips:
                    raise Stale
                return self.put_eip(eip)
            case actions.RebindEip(seen=seen, eip=eip):
                self._check_eip(seen)
                return self.put_eip(eip)
            case actions.ReleaseEip(seen=seen):
                self._check_eip(seen)
                released = replace(seen, phase=Phase.RELEASING, released_s=self.now_s)
                return self.put_eip(released)
            case actions.SetUnforwarded(seen=seen):
                self._check_eip(seen)
                return self.put_eip(replace(seen, forwarding=False, unforwarded_s=self.now_s))
            case actions.DeleteEip(seen=seen):
                self._check_eip(seen)
                del self.eips[seen.address]
                self._tell(seen.address)
                return None
            case actions.LeaveEip(seen=seen, eip=eip):
                self._check_eip(seen)
                return self.put_eip(eip)
            case actions.Refused() | actions.Told():
                return None
            case _:
                return self._service_write(action)

    def _check_eip(self, seen: Eip) -> None:
        now = self.eips.get(seen.address)
        if now is None or now.version != seen.version:
            raise Stale

    def _service_write(self, action: actions.Action) -> Service:
        assert not isinstance(action, actions.CreateEip)
        now = self.services.get(action.service)
        seen = action.seen
        if now is None or now.version != seen.version:
            raise Stale
        match action:
            case actions.AddFinalizer(pools=pools):
                return self.put_service(marked(now, pools))
            case actions.RemoveFinalizer():
                return self.put_service(replace(now, finalizers=()))
            case actions.WriteStatus(addresses=addresses):
                return self.put_service(replace(now, ingress=addresses))
            case actions.ClearStatus():
                return self.put_service(replace(now, ingress=()))
        raise AssertionError(action)


@dataclass
class Leader:
    """An allocator, its watch, and what it has decided but not yet done."""

    server: Server
    allocator: Allocator
    facts: Facts = FACTS
    queue: list[ObjectRef | Address] = field(default_factory=list)
    todo: list[actions.Action] = field(default_factory=list)
    releases: Releases = field(default_factory=Releases)
    checked: actions.Action | None = None
    skip: set[ObjectRef] = field(default_factory=set)
    fresh: dict[ObjectRef, Service] = field(default_factory=dict)
    cached: dict[Address, Eip] = field(default_factory=dict)
    services: dict[ObjectRef, Service] = field(default_factory=dict)

    @classmethod
    def start(cls, server: Server, accepted: Config, forbidden: Collection[Address] = ()) -> Leader:
        """A new leader: everything is listed before anything is planned."""
        leader = cls(server, Allocator())
        leader.configure(accepted, forbidden)
        for name, labels in server.labels.items():
            leader.allocator.set_namespace(name, labels)
        for eip in server.eips.values():
            leader.see(eip)
        for service in server.services.values():
            leader.see(service)
        server.watchers[id(leader)] = leader.queue
        return leader

    def configure(self, accepted: Config, forbidden: Collection[Address] = ()) -> None:
        """A configuration is in force."""
        self.allocator.configure(accepted, forbidden)
        self.facts = replace(FACTS, rule=accepted.services)

    def see(self, found: Eip | Service) -> None:
        if isinstance(found, Eip):
            self.cached[found.address] = found
            self.allocator.set_eip(found)
        else:
            self.services[found.ref] = found
            self.allocator.set_service(found)

    def lose(self, key: ObjectRef | Address) -> None:
        if isinstance(key, ObjectRef):
            self.services.pop(key, None)
            self.allocator.remove_service(key)
        else:
            self.cached.pop(key, None)
            self.releases.forget(key)
            self.allocator.remove_eip(key)

    def watch(self) -> None:
        """Deliver what the server has told so far."""
        while self.queue:
            self.deliver()

    def deliver(self) -> None:
        """The next of the objects that changed, as it is now."""
        key = self.queue.pop(0)
        if isinstance(key, ObjectRef):
            found: Service | Eip | None = self.server.services.get(key)
        else:
            found = self.server.eips.get(key)
        self.lose(key) if found is None else self.see(found)

    def decide(self) -> None:
        self.plan()
        self.release()

    def plan(self) -> None:
        """What the allocator wants."""
        self._try_again()
        self.todo += self.allocator.plan()

    def release(self) -> None:
        """The next step of every address that is given back."""
        self._try_again()
        for eip in sorted(self.cached.values(), key=lambda e: int(e.address)):
            owned = self.allocator.owned(eip.owner)
            service = self.services.get(eip.owner)
            step = self.releases.step(eip, service, owned, self.facts, self.server.now_s)
            self.todo += step.actions

    def _try_again(self) -> None:
        """A failed action takes along the rest of its Service's, but of one decision only."""
        self.skip.clear()
        self.fresh.clear()

    def act(self, limit: int | None = None) -> None:
        """Do what was decided, or its first `limit` actions."""
        while self.todo and limit != 0:
            limit = None if limit is None else limit - 1
            action = self.todo.pop(0)
            if action.service in self.skip:
                continue
            try:
                if (
                    isinstance(action, actions.ReleaseEip | actions.LeaveEip)
                    and self.checked is not action
                ):
                    self._check(action)
                    continue
                stored = self.server.carry_out(self._fresh(action))
            except Stale:
                self.skip.add(action.service)
                self._refresh(action)
                self.allocator.failed(action)
                continue
            if isinstance(stored, Service):
                self.fresh[stored.ref] = stored
            if stored is not None:
                self.see(stored)
            elif isinstance(action, actions.DeleteEip):
                self.lose(action.seen.address)

    def _check(self, action: actions.ReleaseEip | actions.LeaveEip) -> None:
        """The first half of a release: is the Service as it was? It can freeze in between."""
        because = self.fresh.get(action.service, action.because)
        if self.server.services.get(action.service) != because:
            raise Stale
        self.checked = action
        self.todo.insert(0, action)

    def _refresh(self, action: actions.Action) -> None:
        """As the executor reads what is there instead of what was thought."""
        eip = getattr(action, "eip", None) or getattr(action, "seen", None)
        keys: list[ObjectRef | Address] = [eip.address] if isinstance(eip, Eip) else []
        if not keys or isinstance(action, actions.ReleaseEip | actions.LeaveEip):
            keys.append(action.service)
        self.queue[:0] = keys
        for _ in keys:
            self.deliver()

    def _fresh(self, action: actions.Action) -> actions.Action:
        """Our own earlier write of the same plan moved the Service's version on; follow it."""
        if isinstance(action, actions.WriteStatus | actions.ClearStatus | actions.RemoveFinalizer):
            return structs.replace(action, seen=self.fresh.get(action.service, action.seen))
        return action
