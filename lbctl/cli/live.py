"""Asks every manager for its state through the API server, and merges the answers.

Rules: a manager that does not answer is part of the result, not a failure, as long as one does.
`merge` is pure; what the managers do not agree on is said, never averaged.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbctl.core import names
from lbctl.core.model import NodeState
from lbctl.core.reasons import SENTENCE, Reason
from lbctl.core.state import (
    EipState,
    ManagerState,
    NodeStatus,
    PoolState,
    ServiceState,
    from_plain,
)
from lbctl.errors import KubeError, LbctlError, NotFound, Unreachable
from lbctl.kube.client import PODS, SERVICES, Client

# A node that is no next hop for one of these reasons is as its owner wants it.
_WANTED = {
    Reason.NO_ENDPOINTS,
    Reason.NO_LOCAL_ENDPOINT,
    Reason.NODE_EXCLUDED,
    Reason.NODE_OUT_OF_SERVICE,
    Reason.NODE_DRAINING,
    Reason.RELEASING,
}

# A node that is fit for an EIP, and not announced by this manager all the same.
_SPARED = {Reason.LEFT_TO_OTHERS, Reason.OVER_MAX_PATHS}

# A Service with one of these is as its owner wants it; with every other, it lacks something.
SERVED = {
    Reason.ALLOCATED,
    Reason.RESTORED,
    Reason.RECREATED,
    Reason.SHARED,
    Reason.ADOPTED,
    Reason.OBSERVING,
    Reason.NOT_LOAD_BALANCER,
    Reason.OTHER_CLASS,
    Reason.RELEASING,
    Reason.RELEASED,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the manager in one Pod said: its state, or why there is none.

    runs: whether the Pod may have a speaker; a silent one may still announce something.
    """

    pod: str
    node: str = ""
    state: ManagerState | None = None
    error: str = ""
    runs: bool = True


@dataclass(frozen=True, slots=True)
class Live:
    """All answers, and the nodes that an agent's Pod is on (None: not known)."""

    answers: tuple[Answer, ...]
    agents: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Merged:
    """All managers' states as one picture.

    problems: what is wrong, disagreements first, each a sentence. leader: manager id, "" if none.
    """

    managers: tuple[ManagerState, ...]
    answers: tuple[Answer, ...]
    leader: str
    pools: tuple[PoolState, ...]
    eips: tuple[EipState, ...]
    services: tuple[ServiceState, ...]
    problems: tuple[str, ...]


def find_kubeconfig(given: Path | None) -> Path | None:
    """The file that will be used, None for in-cluster or several in $KUBECONFIG.

    Raises KubeError if there is none: the library would say so at length.
    """
    listed = os.environ.get("KUBECONFIG", "")
    if given is None and (os.pathsep in listed or "KUBERNETES_SERVICE_HOST" in os.environ):
        return None
    chosen = given or (Path(listed) if listed else Path.home() / ".kube" / "config")
    if chosen.is_file():
        return chosen
    hint = "say which by --kubeconfig or $KUBECONFIG"
    raise KubeError(f"there is no kubeconfig at {chosen}; {hint}")


async def open_client(kubeconfig: Path | None) -> Client:
    """A client of the API server that a kubeconfig names. KubeError if there is none."""
    return await Client.from_environment(find_kubeconfig(kubeconfig), timeout_s=15.0)


async def fetch(kubeconfig: Path | None, namespace: str = names.NAMESPACE) -> Live:
    """Every manager's answer, sorted by Pod name. Raises KubeError when nobody can be asked."""
    async with await open_client(kubeconfig) as client:
        return await ask_all(client, namespace)


async def fetch_service(
    kubeconfig: Path | None, namespace: str, name: str
) -> tuple[Live, str | None]:
    """As `fetch`, and the type of the Service, None if there is no such Service."""
    async with await open_client(kubeconfig) as client:
        live = await ask_all(client, names.NAMESPACE)
        try:
            found = await client.get(SERVICES.path(namespace, name))
        except NotFound:
            return live, None
        return live, str(found["spec"].get("type"))


async def ask_all(client: Client, namespace: str) -> Live:
    """Ask the manager in each Pod. Raises KubeError if there is no Pod or no token to be had."""
    managers, agents = await asyncio.gather(
        _pods(client, namespace, names.MANAGER_APP), _pods(client, namespace, names.AGENT_APP)
    )
    if not managers:
        raise NotFound(f"no manager is deployed: namespace {namespace} has no Pod of it")
    token = await _token(client, namespace)
    found = await asyncio.gather(
        *(_ask(client, namespace, pod, node, phase, token) for pod, node, phase in managers)
    )
    return Live(tuple(found), frozenset(node for _, node, _ in agents if node))


async def _pods(client: Client, namespace: str, app: str) -> list[tuple[str, str, str]]:
    """Name, node and phase of each Pod of an app, sorted."""
    selector = {"labelSelector": f"app.kubernetes.io/name={app}"}
    listed = await client.get(PODS.path(namespace), selector)
    return sorted(_pod(item) for item in (listed or {}).get("items") or ())


def _pod(item: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name, node and phase."""
    spec, status = item.get("spec") or {}, item.get("status") or {}
    return str(item["metadata"]["name"]), spec.get("nodeName") or "", status.get("phase") or ""


async def _token(client: Client, namespace: str) -> str:
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{names.VIEWER_ACCOUNT}/token"
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": 600},
    }
    answer = await client.create(path, body)
    token = ((answer or {}).get("status") or {}).get("token")
    if not isinstance(token, str) or not token:
        raise KubeError(f"the API server gave no token for ServiceAccount {names.VIEWER_ACCOUNT}")
    return token


async def _ask(
    client: Client, namespace: str, pod: str, node: str, phase: str, token: str
) -> Answer:
    if not node or phase in ("Pending", "Failed", "Succeeded"):
        return Answer(pod, node, error=f"its Pod is {phase or 'not scheduled'}", runs=False)
    base = f"/api/v1/namespaces/{namespace}/pods/http:{pod}:{names.MANAGER_HTTP_PORT}"
    headers = {names.STATE_TOKEN_HEADER: f"Bearer {token}"}
    try:
        body = await client.get(f"{base}/proxy/v1/state", headers=headers)
        return Answer(pod, node, from_plain(body))
    except Unreachable as error:
        return Answer(pod, node, error=f"it does not answer ({error})")
    except LbctlError as error:
        return Answer(pod, node, error=str(error))


# Merging, pure from here


def merge(live: Live) -> Merged:
    """One picture of all answers. At least one must have a state (ValueError)."""
    answers = live.answers
    states = tuple(sorted((a.state for a in answers if a.state), key=lambda s: s.manager))
    if not states:
        raise ValueError("no manager answered")
    leaders = [state for state in states if state.leader]
    chief = leaders[0] if leaders else states[0]
    problems = [
        *(f"manager {a.pod} on {a.node or 'no node'}: {a.error}" for a in answers if not a.state),
        *_leadership(states, leaders),
        *_snapshots(states),
        *_disagreements(states),
        *_configuration(states),
        *_sessions(states),
        *_nodes(states, live.agents),
        *_eips(states),
        *(s.sentence or f"Service {s.ref}: {SENTENCE[s.reason]}" for s in _refused(chief)),
    ]
    return Merged(
        managers=states,
        answers=answers,
        leader=chief.manager if leaders else "",
        pools=chief.pools,
        eips=_all_eips(states, chief),
        services=chief.services,
        problems=tuple(dict.fromkeys(problems)),
    )


def _all_eips(states: tuple[ManagerState, ...], chief: ManagerState) -> tuple[EipState, ...]:
    found = {eip.address: eip for state in states for eip in state.eips}
    found.update({eip.address: eip for eip in chief.eips})
    return tuple(sorted(found.values(), key=lambda e: (e.address.version, int(e.address))))


def _refused(chief: ManagerState) -> list[ServiceState]:
    return [service for service in chief.services if service.reason not in SERVED]


def _leadership(states: tuple[ManagerState, ...], leaders: list[ManagerState]) -> list[str]:
    if len(leaders) > 1:
        both = " and ".join(state.manager for state in leaders)
        return [f"{both} each say that they lead"]
    if leaders:
        return []
    holder = next((state.holder for state in states if state.holder), "")
    who = (
        f"the Lease names {holder}, which did not answer so" if holder else "nobody holds the Lease"
    )
    return [f"no manager leads ({who}): addresses are neither given nor taken back"]


def _snapshots(states: tuple[ManagerState, ...]) -> list[str]:
    return [
        f"{state.manager} has not reached the API server since its start: it announces by a "
        f"snapshot that is {state.snapshot_age_s:.0f} s old"
        for state in states
        if state.snapshot_age_s is not None
    ]


def _disagreements(states: tuple[ManagerState, ...]) -> list[str]:
    problems = []
    checks: tuple[tuple[str, Callable[[ManagerState], dict[str, str]]], ...] = (
        ("the configuration", lambda s: {"": f"hash {s.config.hash or 'none'}"}),
        ("next hops of", lambda s: {str(e.address): _fit(e) for e in s.eips}),
        ("node", lambda s: {n.name: n.state.value for n in s.nodes}),
    )
    for what, view in checks:
        views = [(state.manager, view(state)) for state in states]
        for key in sorted({key for _, found in views for key in found}):
            said = [(manager, found.get(key, "unknown")) for manager, found in views]
            if len({text for _, text in said}) > 1:
                each = ", ".join(f"{manager} says {text}" for manager, text in said)
                problems.append(f"managers disagree on {what} {key}".rstrip() + f": {each}")
    return problems


def _fit(eip: EipState) -> str:
    """The nodes found fit for it: which of these are announced may differ (`paths: perManager`)."""
    fit = [hop.node for hop in eip.hops if hop.next_hop is not None or hop.reason in _SPARED]
    return " ".join(sorted(fit)) or "none"


def _configuration(states: tuple[ManagerState, ...]) -> list[str]:
    problems = []
    for state in states:
        if not state.config.hash and not state.config.errors:
            problems.append(
                f"{state.manager} has no configuration: {SENTENCE[Reason.WAITING_FOR_CONFIG]}"
            )
        problems += [f"configuration refused: {error}" for error in state.config.errors]
    return problems


def _sessions(states: tuple[ManagerState, ...]) -> list[str]:
    return [
        f"session from {state.manager} to {session.peer} ({session.address}): "
        + (session.detail or SENTENCE[session.reason])
        for state in states
        for session in state.sessions
        if session.reason is not Reason.SESSION_UP
    ]


def _nodes(states: tuple[ManagerState, ...], agents: frozenset[str] | None) -> list[str]:
    """A node without an agent (a control plane's, say) is not expected to answer."""
    return [
        f"node {node.name} is {node.state.value} for {state.manager}"
        + (f": {SENTENCE[node.reason]}" if node.reason else "")
        for state in states
        for node in state.nodes
        if _wrong(node)
        and (agents is None or node.name in agents or node.state is not NodeState.UNKNOWN)
    ]


def _wrong(node: NodeStatus) -> bool:
    """A node that answers and has another table than most is no next hop either."""
    judged = node.state is not NodeState.UP or node.reason is Reason.NODE_LAGS
    return judged and node.reason not in _WANTED


def _eips(states: tuple[ManagerState, ...]) -> list[str]:
    return [
        f"{eip.address} of Service {eip.owner} has no next hop at {state.manager}"
        + (f": {SENTENCE[eip.reason]}" if eip.reason else "")
        for state in states
        for eip in state.eips
        if eip.phase.value == "Bound"
        and not eip.next_hops
        and eip.reason is not Reason.NO_ENDPOINTS
        and not (eip.hops and any(hop.reason in _WANTED for hop in eip.hops))
    ]
