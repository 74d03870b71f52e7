"""`lbctl explain SERVICE`: why it has its address and its routes, or why not, in sentences."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from rich.console import Console

from lbctl.cli.live import Merged, fetch_service
from lbctl.cli.output import (
    OK,
    WRONG,
    Kubeconfig,
    Output,
    OutputOption,
    cannot,
    clean,
    console,
    print_json,
)
from lbctl.cli.status import merge_or_stop
from lbctl.core.model import ObjectRef, Phase
from lbctl.core.plain import to_plain
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.state import EipState, HopState, ManagerState, ServiceState, SessionState
from lbctl.errors import LbctlError

_NOT_OURS = (Reason.NOT_LOAD_BALANCER, Reason.OTHER_CLASS)


def explain(
    service: Annotated[str, typer.Argument(help="NAMESPACE/NAME, or NAME with -n.")],
    namespace: Annotated[str | None, typer.Option("--namespace", "-n")] = None,
    output: OutputOption = Output.TEXT,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Each decision about a Service with its reason. Exit code 0: reachable, 1: not, 2: unknown."""
    ref = _ref(service, namespace)
    try:
        live, kind = asyncio.run(fetch_service(kubeconfig, ref.namespace, ref.name))
    except LbctlError as error:
        cannot(error)
    merged = merge_or_stop(live)
    if kind is None and not any(ref in eip.members for eip in merged.eips):
        cannot(f"there is no Service {ref}, and no EIP that it had")
    story = Story(merged, ref, kind)
    if output is Output.JSON:
        print_json(story.as_json())
    else:
        story.show(console())
    raise typer.Exit(OK if story.good else WRONG)


def _ref(service: str, namespace: str | None) -> ObjectRef:
    given, slash, name = service.partition("/")
    if not slash:
        return ObjectRef(namespace or "default", service)
    if not given or not name or "/" in name:
        cannot(f"{service} is not NAMESPACE/NAME")
    if namespace is not None and namespace != given:
        cannot(f"{service} names namespace {given}, -n says {namespace}")
    return ObjectRef(given, name)


def _carries(session: SessionState, eip: EipState) -> bool:
    """Whether the switch can learn the EIP through it; an older manager tells no families."""
    return session.up and (not session.families or eip.address.version in session.families)


def _nobody(eip: EipState) -> str:
    if eip.phase is Phase.RELEASING:
        return "It is announced no more."
    if eip.reason is None:
        return "No node is judged for it yet."
    return f"None: {SENTENCE[eip.reason]}. [{eip.reason.value}]"


class Story:
    """What all managers say about one Service."""

    def __init__(self, merged: Merged, ref: ObjectRef, kind: str | None = "LoadBalancer") -> None:
        """kind: the Service's type now, None if it is gone."""
        self.ref = ref
        self.exists = kind is not None
        self.merged = merged
        self.decision = _decision(merged, ref)
        if self.exists and kind != "LoadBalancer":  # managers tell of load balancers alone
            self.decision = ServiceState(ref, Reason.NOT_LOAD_BALANCER)
        self.eips = tuple(eip for eip in merged.eips if ref in eip.members)

    @property
    def good(self) -> bool:
        """Whether each of its addresses is announced by every manager to every switch; true too
        for a Service that is none of ours."""
        if self.decision is not None and self.decision.reason in _NOT_OURS:
            return True
        bound = [eip for eip in self.eips if eip.phase is Phase.BOUND]
        if not bound or any(answer.state is None for answer in self.merged.answers):
            return False
        return all(
            eip is not None and eip.next_hops and all(_carries(s, eip) for s in state.sessions)
            for state in self.merged.managers
            for eip in (self._seen(state, one) for one in bound)
        )

    def _seen(self, state: ManagerState, eip: EipState) -> EipState | None:
        return next((one for one in state.eips if one.address == eip.address), None)

    def address(self) -> list[str]:
        """Why it has the address that it has."""
        lines = [] if self.exists else [f"Service {self.ref} is deleted."]
        if self.decision is not None:
            said = self.decision.sentence or SENTENCE[self.decision.reason]
            lines.append(f"{_sentence(said)} [{self.decision.reason.value}]")
            written = {eip.address for eip in self.eips}
            lines += [
                f"{address} is not written yet; if that stays, the leader's log says why"
                " (write_failed)."
                for address in self.decision.addresses
                if address not in written
            ]
        elif not self.merged.leader:
            lines.append("No manager leads, so nothing is decided about its address.")
        elif self.exists:
            lines.append(f"The leader {self.merged.leader} has not decided about it yet.")
        for eip in self.eips:
            others = ", ".join(str(ref) for ref in eip.members if ref != self.ref)
            state = f"is shared with {others}" if others else "is its own"
            if eip.phase is not Phase.BOUND:
                state = "is being given back"
            more = f" ({eip.detail})" if eip.detail else ""
            lines.append(f"{eip.address} from pool {eip.pool} {state}{more}.")
        return lines

    def hops(self, eip: EipState) -> list[tuple[str, list[str]]]:
        """For each node, what every manager decided and why; one line if all agree."""
        views: dict[str, dict[str, HopState]] = {}
        for state in self.merged.managers:
            seen = self._seen(state, eip)
            for hop in seen.hops if seen else ():
                views.setdefault(hop.node, {})[state.manager] = hop
        told = []
        for node in sorted(views):
            lines: dict[str, list[str]] = {}
            for state in self.merged.managers:
                lines.setdefault(_hop(views[node].get(state.manager)), []).append(state.manager)
            if len(lines) == 1:
                told.append((node, list(lines)))
            else:
                told.append((node, [f"{line} ({', '.join(m)})" for line, m in lines.items()]))
        return told

    def sessions(self) -> list[str]:
        """Each session: whether the route can get through it."""
        lines = []
        for state in self.merged.managers:
            for session in state.sessions:
                said = SENTENCE[session.reason]
                more = f" ({session.detail})" if session.detail else ""
                lines.append(
                    f"{state.manager} to {session.peer} ({session.address}): {said}{more}."
                    f" [{session.reason.value}]"
                )
        for answer in self.merged.answers:
            if answer.state is None:
                lines.append(f"manager {answer.pod} on {answer.node or 'no node'}: {answer.error}")
        return sorted(lines)

    def show(self, out: Console) -> None:
        """The page for people."""
        out.print(f"Service {self.ref}", style="bold")
        out.print("Address", style="bold")
        for line in self.address():
            out.print(f"  {clean(line)}")
        for eip in self.eips:
            out.print(f"Next hops of {eip.address}", style="bold")
            found = self.hops(eip)
            for node, lines in found:
                for line in lines:
                    out.print(f"  {clean(node)}: {clean(line)}")
            if not found:
                out.print(f"  {clean(_nobody(eip))}")
        out.print("Sessions", style="bold")
        for line in self.sessions() or ["No switch is configured."]:
            out.print(f"  {clean(line)}")

    def as_json(self) -> dict[str, Any]:
        """The document of `--output json`."""
        return {
            "service": {"namespace": self.ref.namespace, "name": self.ref.name},
            "ok": self.good,
            "leader": self.merged.leader,
            "decision": to_plain(self.decision) if self.decision else None,
            "address": self.address(),
            "eips": [
                {
                    **to_plain(eip),
                    "next_hops": [str(hop) for hop in eip.next_hops],
                    "by_manager": {
                        state.manager: to_plain(seen.hops)
                        for state in self.merged.managers
                        if (seen := self._seen(state, eip)) is not None
                    },
                }
                for eip in self.eips
            ],
            "sessions": {s.manager: to_plain(s.sessions) for s in self.merged.managers},
            "sentences": self.sessions(),
        }


def _decision(merged: Merged, ref: ObjectRef) -> ServiceState | None:
    return next((service for service in merged.services if service.ref == ref), None)


def _hop(hop: HopState | None) -> str:
    if hop is None:
        return "not judged"
    said = SENTENCE[hop.reason]
    if hop.next_hop is not None:
        return f"yes, by {hop.next_hop}: {said}. [{hop.reason.value}]"
    return f"no: {said}. [{hop.reason.value}]"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
