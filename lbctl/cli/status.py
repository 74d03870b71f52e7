"""`lbctl status`: pools, EIPs, peers and sessions, nodes, managers, and what is wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import typer
from rich.console import Console

from lbctl.cli.live import Live, Merged, fetch, merge
from lbctl.cli.output import (
    WRONG,
    Kubeconfig,
    Output,
    OutputOption,
    cannot,
    clean,
    console,
    print_json,
    print_table,
)
from lbctl.core.plain import to_plain
from lbctl.core.reasons import SENTENCE
from lbctl.core.state import NodeStatus, SessionState
from lbctl.errors import LbctlError


def status(output: OutputOption = Output.TEXT, kubeconfig: Kubeconfig = None) -> None:
    """All managers' state, merged. Exit code 0: all well, 1: something wrong, 2: cannot say."""
    try:
        live = asyncio.run(fetch(kubeconfig))
    except LbctlError as error:
        cannot(error)
    merged = merge_or_stop(live)
    if output is Output.JSON:
        print_json(as_json(merged))
    else:
        show(merged, console())
    if merged.problems:
        raise typer.Exit(WRONG)


def merge_or_stop(live: Live) -> Merged:
    """`merge`, or exit 2 saying why each manager is silent."""
    try:
        return merge(live)
    except ValueError:
        each = "; ".join(f"{answer.pod}: {answer.error}" for answer in live.answers)
        cannot(f"no manager answered ({each})")


def as_json(merged: Merged) -> dict[str, Any]:
    """The document of `--output json`."""
    return {
        "ok": not merged.problems,
        "problems": list(merged.problems),
        "leader": merged.leader,
        "pools": to_plain(merged.pools),
        "eips": [
            {**to_plain(eip), "next_hops": [str(hop) for hop in eip.next_hops]}
            for eip in merged.eips
        ],
        "services": to_plain(merged.services),
        "managers": {state.manager: to_plain(state) for state in merged.managers},
        "unreachable": [
            {"pod": a.pod, "node": a.node, "error": a.error} for a in merged.answers if not a.state
        ],
    }


def show(merged: Merged, out: Console) -> None:
    """The page for people."""
    _managers(merged, out)
    rows = [(p.name, p.used, p.total, "" if p.free is None else p.free) for p in merged.pools]
    print_table(out, "Pools", ("NAME", "USED", "TOTAL", "FREE"), rows)
    _eips(merged, out)
    _waiting(merged, out)
    _sessions(merged, out)
    _nodes(merged, out)
    if merged.problems:
        out.print(f"{len(merged.problems)} wrong", style="bold red")
        for problem in merged.problems:
            out.print(f"  - {clean(problem)}")
    else:
        out.print("All is well.", style="green")


def _managers(merged: Merged, out: Console) -> None:
    rows = []
    for answer in merged.answers:
        state = answer.state
        if state is None:
            rows.append((answer.pod, answer.node, "?", "does not answer", ""))
            continue
        config = f"{state.config.hash} (generation {state.config.generation})"
        if not state.config.hash:
            config = "none accepted yet"
        elif state.config.errors:
            config += ", the newest was refused"
        elif state.config.stale:
            config += ", not the newest"
        role = "leader" if state.leader else "standby"
        rows.append((state.manager, answer.node, role, config, _age(state.now_s - state.boot_s)))
    print_table(out, "Managers", ("NAME", "NODE", "ROLE", "CONFIGURATION", "UP FOR"), rows)


def _eips(merged: Merged, out: Console) -> None:
    rows = []
    for eip in merged.eips:
        hops = ", ".join(str(hop) for hop in eip.next_hops) or "none"
        why = SENTENCE[eip.reason] if eip.reason and not eip.next_hops else ""
        services = ", ".join(str(ref) for ref in eip.members)
        rows.append((eip.address, services, eip.pool, eip.phase.value, hops, eip.detail or why))
    heads = ("ADDRESS", "SERVICE", "POOL", "PHASE", "NEXT HOPS", "")
    print_table(out, "EIPs", heads, rows)


def _waiting(merged: Merged, out: Console) -> None:
    waiting = [s for s in merged.services if not s.addresses and s.sentence]
    if waiting:
        rows = [(s.ref, s.reason.value, s.sentence) for s in waiting]
        print_table(out, "Services without an address", ("SERVICE", "REASON", ""), rows)


def _sessions(merged: Merged, out: Console) -> None:
    rows = [
        (s.peer, s.address, state.manager, *_session(s))
        for state in merged.managers
        for s in state.sessions
    ]
    heads = ("PEER", "ADDRESS", "FROM", "STATE", "ADD-PATH", "PATHS", "")
    print_table(out, "BGP sessions", heads, sorted(rows, key=lambda row: (row[0], row[2])))


def _session(session: SessionState) -> tuple[str, str, str, str]:
    add_path = {True: "yes", False: "no", None: "-"}[session.add_path]
    paths = "-" if session.paths is None else str(session.paths)
    return "up" if session.up else "DOWN", add_path, paths, session.detail


def _nodes(merged: Merged, out: Console) -> None:
    views: dict[str, dict[str, NodeStatus]] = {}
    for state in merged.managers:
        for node in state.nodes:
            views.setdefault(node.name, {})[state.manager] = node
    rows = []
    for name in sorted(views):
        by_manager = [views[name].get(state.manager) for state in merged.managers]
        known = [node for node in by_manager if node is not None]
        reason = next((node.reason.value for node in known if node.reason), "")
        held = "held" if any(node.held for node in known) else ""
        rows.append((name, *(_judged(node) for node in by_manager), held, reason))
    heads = ("NAME", *(f"FOR {state.manager}" for state in merged.managers), "", "REASON")
    print_table(out, "Nodes", heads, rows)


def _judged(node: NodeStatus | None) -> str:
    if node is None:
        return "unknown"
    age = "" if node.answer_age_s is None else f", heard {node.answer_age_s * 1000:.0f} ms ago"
    return f"{node.state.value} ({node.confirmed} EIPs{age})"


def _age(seconds: float) -> str:
    """A span as kubectl shows it."""
    if seconds < 0:
        return "?"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
