"""Carries out the actions of the allocator and of releases: one write to the API server each.

Rules: leadership is checked by the monotonic clock before every write, and every write is a create
or guarded by a resourceVersion, so a leader that froze in between loses by 409 (a release reads the
Service again as well: `core.actions` says why). What the API server answers is fed back at once;
what it refuses is read afresh and fed back. The client is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, assert_never

import msgspec
import structlog

from lbctl import errors
from lbctl.core import names
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
    SetUnforwarded,
    Told,
    WriteStatus,
)
from lbctl.core.model import Address, Eip, ObjectRef, Service, eip_object_name
from lbctl.kube import client as api
from lbctl.kube import objects
from lbctl.kube.values import timestamp
from manager.metrics import Metrics

_NO_MORE: Final = ("withdrawnBy", "releasedAt", "unforwardedAt", "sharingKey", "sharers")
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Sink:
    """Who hears what the API server holds now, and which actions were carried out."""

    service: Callable[[Service], None]
    service_gone: Callable[[ObjectRef], None]
    eip: Callable[[Eip], None]
    eip_gone: Callable[[Address], None]
    written: Callable[[Action], None]


class Executor:
    """Writes through `client` as long as `is_leader()`. watched: a Service as the cache has it."""

    def __init__(
        self,
        client: api.Client,
        is_leader: Callable[[], bool],
        sink: Sink,
        metrics: Metrics,
        watched: Callable[[ObjectRef], Service | None],
    ) -> None:
        self._watched = watched
        self._client = client
        self._is_leader = is_leader
        self._sink = sink
        self._metrics = metrics

    async def carry_out(self, actions: Sequence[Action]) -> Sequence[Action]:
        """Do the actions of one Service in order; what was left undone, the failed one first.

        Raises `errors.NotLeader` when leadership is lost.
        """
        fresh: dict[ObjectRef, Service] = {}
        for number, action in enumerate(actions):
            name = type(action).__name__
            try:
                await self._one(action, fresh)
            except errors.NotLeader:
                self._metrics.writes.labels(name, "NotLeader").inc()
                raise
            except Exception as error:  # noqa: BLE001 (one odd Service must not stop the others)
                self._metrics.writes.labels(name, type(error).__name__).inc()
                _log.warning(
                    "write_failed",
                    action=name,
                    service=str(action.service),
                    error=str(error),
                    exc_info=not isinstance(error, errors.KubeError),
                )
                if isinstance(error, errors.Conflict | errors.NotFound):
                    await self._refresh(action)
                return actions[number:]
            self._metrics.writes.labels(name, "ok").inc()
            self._tell(action, name)
        return ()

    def _tell(self, action: Action, name: str) -> None:
        self._sink.written(action)
        about = getattr(action, "eip", None) or getattr(action, "seen", None)
        address = str(about.address) if isinstance(about, Eip) else None
        _log.info(
            "written",
            action=name,
            service=str(action.service),
            reason=str(action.reason),
            address=address,
        )

    async def _one(self, action: Action, fresh: dict[ObjectRef, Service]) -> None:
        match action:
            case AddFinalizer() | RemoveFinalizer() | WriteStatus() | ClearStatus():
                seen = self._newest(fresh.get(action.service, action.seen))
                try:
                    fresh[action.service] = await self._write_service(action, seen)
                except errors.Conflict:
                    # by a write that changed nothing that was decided on, as our own conditions do
                    newer = await self._read_service(action.service)
                    if newer is None or newer != seen:
                        raise
                    fresh[action.service] = await self._write_service(action, newer)
            case CreateEip():
                body = objects.eip_body(action.eip)
                self._check()
                self._sink.eip(_eip(await self._client.create(api.EIPS.path(), body)))
            case ReleaseEip() | LeaveEip():
                await self._still(action, fresh.get(action.service, action.because))
                await self._patch_eip(action)
            case RebindEip() | SetUnforwarded():
                await self._patch_eip(action)
            case DeleteEip():
                self._check()
                await self._client.delete(
                    _eip_path(action.seen.address), resource_version=action.seen.version
                )
                self._sink.eip_gone(action.seen.address)
            case Refused() | Told():
                pass  # told below
            case _:
                assert_never(action)

    async def _still(self, action: ReleaseEip | LeaveEip, because: Service | None) -> None:
        """Raises Conflict unless the Service is as it was decided on: see `core.actions`."""
        if await self._read_service(action.service) != because:
            raise errors.Conflict(f"Service {action.service} is not what it was")

    def _newest(self, seen: Service) -> Service:
        """The same content under its latest version: our own conditions raise it all the time."""
        watched = self._watched(seen.ref)
        if watched is None or watched != seen or not seen.version.isdigit():
            return seen
        newer = watched.version.isdigit() and int(watched.version) > int(seen.version)
        return watched if newer else seen

    async def _write_service(
        self, action: AddFinalizer | RemoveFinalizer | WriteStatus | ClearStatus, seen: Service
    ) -> Service:
        others = [name for name in seen.finalizers if name != names.FINALIZER]
        meta: dict[str, Any] = {"resourceVersion": seen.version}
        body: dict[str, Any] = {"metadata": meta}
        sub = ""
        match action:
            case AddFinalizer():
                meta["finalizers"] = [*others, names.FINALIZER]
                meta["annotations"] = {names.ANNOTATION_POOL: action.pools}
            case RemoveFinalizer():
                meta["finalizers"] = others
                meta["annotations"] = {names.ANNOTATION_POOL: None}
            case WriteStatus():
                sub = "status"
                ingress = [{"ip": str(a), "ipMode": "VIP"} for a in action.addresses]
                body["status"] = {"loadBalancer": {"ingress": ingress}}
            case ClearStatus():
                sub = "status"
                body["status"] = {"loadBalancer": {"ingress": None}}
        path = api.SERVICES.path(seen.ref.namespace, seen.ref.name, sub)
        self._check()
        answer = await self._client.patch(path, body)
        service = objects.to_service(msgspec.json.encode(answer))
        if isinstance(action, RemoveFinalizer) and service.deleting and not service.finalizers:
            self._sink.service_gone(service.ref)
        else:
            self._sink.service(service)
        return service

    async def _patch_eip(self, action: RebindEip | LeaveEip | ReleaseEip | SetUnforwarded) -> None:
        spec: dict[str, Any]
        meta: dict[str, Any] = {"resourceVersion": action.seen.version}
        now = timestamp(time.time(), micro=True)
        match action:
            case RebindEip() | LeaveEip():
                spec = objects.eip_body(action.eip)["spec"]
                spec = dict.fromkeys(_NO_MORE) | spec
                meta["annotations"] = {names.ANNOTATION_BOUND_AT: now}
            case ReleaseEip():
                spec = {"phase": "Releasing", "releasedAt": now, "withdrawnBy": None}
            case SetUnforwarded():
                spec = {"forwarding": False, "unforwardedAt": now}
        body = {"metadata": meta, "spec": spec}
        self._check()
        self._sink.eip(_eip(await self._client.patch(_eip_path(action.seen.address), body)))

    async def _refresh(self, action: Action) -> None:
        """What is there instead of what was thought: the other one's write, or nothing."""
        try:
            match action:
                case CreateEip():
                    await self._refresh_eip(action.eip.address)
                case ReleaseEip() | LeaveEip():
                    await self._refresh_eip(action.seen.address)
                    await self._refresh_service(action.service)
                case RebindEip() | SetUnforwarded() | DeleteEip():
                    await self._refresh_eip(action.seen.address)
                case AddFinalizer() | RemoveFinalizer() | WriteStatus() | ClearStatus():
                    await self._refresh_service(action.service)
                case Refused() | Told():
                    pass
        except errors.KubeError as error:
            _log.warning("refresh_failed", service=str(action.service), error=str(error))

    async def _refresh_eip(self, address: Address) -> None:
        try:
            self._sink.eip(_eip(await self._client.get(_eip_path(address))))
        except errors.NotFound:
            self._sink.eip_gone(address)

    async def _refresh_service(self, ref: ObjectRef) -> None:
        service = await self._read_service(ref)
        if service is None:
            self._sink.service_gone(ref)
        else:
            self._sink.service(service)

    async def _read_service(self, ref: ObjectRef) -> Service | None:
        """As the API server has it now (never from its watch cache), None if it is gone."""
        try:
            answer = await self._client.get(api.SERVICES.path(ref.namespace, ref.name))
        except errors.NotFound:
            return None
        return objects.to_service(msgspec.json.encode(answer))

    def _check(self) -> None:
        if not self._is_leader():
            raise errors.NotLeader("leadership was lost before a write")


def _eip_path(address: Address) -> str:
    return api.EIPS.path(name=eip_object_name(address))


def _eip(answer: Any) -> Eip:
    return objects.to_eip(msgspec.json.encode(answer))
