"""For tests of the rules for addresses: pools as text, Services, and a world that settles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

from lbctl.core.actions import (
    Action,
    AddFinalizer,
    ClearStatus,
    CreateEip,
    DeleteEip,
    LeaveEip,
    RebindEip,
    Refused,
    ReleaseEip,
    RemoveFinalizer,
    Told,
    WriteStatus,
)
from lbctl.core.allocator import Allocator
from lbctl.core.config import Config, parse
from lbctl.core.model import Eip, ObjectRef, Phase, Protocol, Service, ServicePort
from lbctl.core.reasons import Reason
from tests.unit.allocator_model import marked


def config(*pools: str, rest: str = "") -> Config:
    """Pools as YAML flow mappings, `name: a, addresses: […]`."""
    items = ", ".join(f"{{{pool}}}" for pool in pools)
    return parse(f"version: 1\npools: [{items}]\nbgp: {{asn: 64512, peers: []}}\n{rest}")


def ports(*given: str) -> tuple[ServicePort, ...]:
    """Ports written `80` or `53/UDP`."""
    pairs = [text.partition("/") for text in given]
    return tuple(
        ServicePort(port, Protocol(protocol or "TCP"), int(port)) for port, _, protocol in pairs
    )


def service(ref: str, created_s: float = 0.0, /, **changes: Any) -> Service:
    """A Service `NAMESPACE/NAME` (namespace default); annotations and labels as dicts."""
    namespace, _, name = ref.rpartition("/")
    for key in ("annotations", "labels", "selector"):
        if key in changes:
            changes[key] = tuple(sorted(changes[key].items()))
    if "ingress" in changes:
        changes["ingress"] = tuple(ip_address(text) for text in changes["ingress"])
    made = Service(
        ObjectRef(namespace or "default", name), f"uid-{name}", created_s, ports("80"), True
    )
    return replace(made, **changes)


def sharing(ref: str, created_s: float, key: str, /, **changes: Any) -> Service:
    """A Service with a sharing key."""
    return service(ref, created_s, annotations={"lbctl.io/allow-shared-ip": key}, **changes)


@dataclass
class World:
    """An allocator and an API server that carries out at once whatever it says."""

    config: Config
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    services: dict[ObjectRef, Service] = field(default_factory=dict)
    eips: dict[str, Eip] = field(default_factory=dict)
    said: list[tuple[str, Reason, str]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.allocator = Allocator(self.config)
        for name, found in self.labels.items():
            self.allocator.set_namespace(name, found)

    def put(self, *services: Service) -> None:
        """Users create or change Services; the allocator works until it rests."""
        for one in services:
            before = self.services.get(one.ref)
            if before is not None:
                ingress = one.ingress or before.ingress
                one = replace(one, finalizers=before.finalizers, ingress=ingress)
            self.services[one.ref] = one
            self.allocator.set_service(one)
        self.settle()

    def remove(self, *refs: str) -> None:
        """Services are deleted, with the finalizer as the API server honours it."""
        for text in refs:
            ref = service(text).ref
            going = replace(self.services[ref], deleting=True)
            self.services[ref] = going
            self.allocator.set_service(going)
        self.settle()

    def vanish(self, ref: str) -> None:
        """A Service is gone at once."""
        del self.services[service(ref).ref]
        self.allocator.remove_service(service(ref).ref)
        self.settle()

    def free(self, address: str) -> None:
        """A release has gone all the way: status and finalizer are gone, then the EIP object."""
        eip = self.eips[address]
        found = self.services.get(eip.owner)
        if found is not None and found.deleting:
            del self.services[eip.owner]
            self.allocator.remove_service(eip.owner)
        self.do(DeleteEip(eip.owner, eip, Reason.RELEASED))
        self.settle()

    def hold(self, address: str, owner: str, phase: Phase = Phase.BOUND, **changes: Any) -> None:
        """An EIP object exists already."""
        ref = service(owner).ref
        made = Eip(ip_address(address), "a", ref, f"uid-{ref.name}", phase)
        self.eips[address] = replace(made, **changes)
        self.allocator.set_eip(self.eips[address])

    def configure(self, config: Config) -> None:
        self.config = config
        self.allocator.configure(config)
        self.settle()

    def settle(self) -> None:
        for _ in range(50):
            actions = self.allocator.plan()
            if not actions:
                return
            for action in actions:
                self.do(action)
        raise AssertionError("it does not come to rest")

    def do(self, action: Action) -> None:
        self.done.append(type(action).__name__)
        match action:
            case CreateEip(eip=eip) | RebindEip(eip=eip) | LeaveEip(eip=eip):
                self._store(eip)
            case ReleaseEip(seen=seen):
                self._store(replace(seen, phase=Phase.RELEASING))
            case DeleteEip(seen=seen):
                del self.eips[str(seen.address)]
                self.allocator.remove_eip(seen.address)
            case Refused() | Told():
                self.said.append((action.service.name, action.reason, action.sentence))
            case AddFinalizer(service=ref, pools=pools):
                now = marked(self.services[ref], pools)
                self._change(ref, finalizers=now.finalizers, annotations=now.annotations)
            case RemoveFinalizer(service=ref):
                self._change(ref, finalizers=())
            case WriteStatus(service=ref, addresses=addresses):
                self._change(ref, ingress=addresses, host_names=())
            case ClearStatus(service=ref):
                self._change(ref, ingress=(), host_names=())

    def _store(self, eip: Eip) -> None:
        self.eips[str(eip.address)] = eip
        self.allocator.set_eip(eip)

    def _change(self, ref: ObjectRef, **changes: Any) -> None:
        self.services[ref] = replace(self.services[ref], **changes)
        if self.services[ref].deleting and not self.services[ref].finalizers:
            del self.services[ref]
            self.allocator.remove_service(ref)
        else:
            self.allocator.set_service(self.services[ref])

    # What is seen of it

    def shown(self, ref: str) -> list[str]:
        return [str(address) for address in self.services[service(ref).ref].ingress]

    def addresses(self) -> dict[str, str]:
        """The first address of every Service that shows one."""
        return {
            ref.name: str(found.ingress[0])
            for ref, found in sorted(self.services.items())
            if found.ingress
        }

    def reason(self, ref: str) -> Reason | None:
        decision = self.allocator.decision(service(ref).ref)
        return decision.reason if decision is not None else None

    def reasons(self, ref: str) -> list[Reason]:
        """Of the Events about a Service."""
        return [reason for name, reason, _ in self.said if name == service(ref).ref.name]
