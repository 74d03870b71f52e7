"""What the allocator and the release planner ask the executor to do.

Rules for the executor: actions of one Service are contiguous and in an order that is safe to stop
after any of them (finalizer, then the EIP object, then the status). When one fails, skip the rest
of that Service's and tell `Allocator.failed`. Every write is guarded by the resourceVersion in
the snapshot that it carries, or is a create; the API server is the arbiter.

Two objects are never written at once, so one pair of rules keeps a stale leader from taking back
what a Service shows. A release reads the Service again *after* it has seen the EIP object and goes
on only if it is as it was decided on. A status shows an address only *after* a write to its EIP
object that was decided on the same Service (CreateEip, RebindEip). So whichever of the two comes
later to the EIP object meets a resourceVersion that is not its own.

msgspec's Structs: a batch has three for each of its Services, and they are made five times as fast
as frozen dataclasses.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from lbctl.core.model import Address, Eip, ObjectRef, Service
from lbctl.core.reasons import Reason


class AddFinalizer(Struct, frozen=True, gc=False):
    """Add `names.FINALIZER` to the Service, so that its EIP outlives it, and say in an annotation
    which pools its addresses are of (separated by commas)."""

    service: ObjectRef
    seen: Service
    reason: Reason
    pools: str = ""


class RemoveFinalizer(Struct, frozen=True, gc=False):
    """Remove `names.FINALIZER` from the Service: nothing of it is left."""

    service: ObjectRef
    seen: Service
    reason: Reason


class CreateEip(Struct, frozen=True, gc=False):
    """Create the EIP object. 409 means that someone else has the address.

    apart: why it is one of its own in spite of a sharing key, "" if there is nothing to say.
    """

    service: ObjectRef
    eip: Eip
    reason: Reason
    apart: str = ""


class RebindEip(Struct, frozen=True, gc=False):
    """Replace `seen` by `eip`: Bound, the Service's uid, forwarding, no marks of a release.

    Always gives it a new resourceVersion, even if nothing else differs (the API server keeps the
    old one if a write changes nothing): who decided on the old one to release it has to lose.
    """

    service: ObjectRef
    seen: Eip
    eip: Eip
    reason: Reason


class ReleaseEip(Struct, frozen=True, gc=False):
    """Make the EIP object Releasing, `releasedAt` now.

    because: the Service that was decided on, None if it was gone. Read it again before the write;
    if it differs now (by more than the same plan's own writes), treat that as a 409.
    """

    service: ObjectRef
    seen: Eip
    reason: Reason
    because: Service | None


class SetUnforwarded(Struct, frozen=True, gc=False):
    """Set `forwarding: false`, `unforwardedAt` now: agents remove it."""

    service: ObjectRef
    seen: Eip
    reason: Reason


class DeleteEip(Struct, frozen=True, gc=False):
    """Delete the EIP object (with a precondition on its resourceVersion): the address is free."""

    service: ObjectRef
    seen: Eip
    reason: Reason


class WriteStatus(Struct, frozen=True, gc=False):
    """Make `status.loadBalancer.ingress` exactly these addresses."""

    service: ObjectRef
    seen: Service
    addresses: tuple[Address, ...]
    reason: Reason


class ClearStatus(Struct, frozen=True, gc=False):
    """Make `status.loadBalancer` empty."""

    service: ObjectRef
    seen: Service
    reason: Reason


class Refused(Struct, frozen=True, gc=False):
    """Nothing is written but an Event and a condition: why the Service has no (full) address."""

    service: ObjectRef
    seen: Service
    reason: Reason
    sentence: str


class LeaveEip(Struct, frozen=True, gc=False):
    """Replace `seen` by `eip`, which no longer has the Service among its members; others do.

    because: as in ReleaseEip, with the same check.
    """

    service: ObjectRef
    seen: Eip
    eip: Eip
    reason: Reason
    because: Service | None


class Told(Struct, frozen=True, gc=False):
    """Nothing is written but an Event: what was just done needs a word. It follows that write."""

    service: ObjectRef
    seen: Service
    reason: Reason
    sentence: str


Action: TypeAlias = (
    AddFinalizer
    | RemoveFinalizer
    | CreateEip
    | RebindEip
    | ReleaseEip
    | SetUnforwarded
    | DeleteEip
    | WriteStatus
    | ClearStatus
    | Refused
    | LeaveEip
    | Told
)
