"""Liveness, readiness and startup probes, carried out from the node's network namespace.

`check` does one; `keep_checking` does them for a container's life and reports each change of mind.
Source: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#container-probes
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from lbctl.errors import LabError

Object: TypeAlias = dict[str, Any]
_EAGER_S: Final = 0.2  # until it is ready for the first time: the lab is quicker than periodSeconds


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe with Kubernetes' defaults filled in."""

    action: Object
    initial_delay_s: float
    period_s: float
    timeout_s: float
    successes: int
    failures: int


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to probe and how to get there: `connect(address, port)` from the node, `run` inside."""

    address: str
    ports: Mapping[str, int]
    new_socket: Callable[[int, int], socket.socket]
    run: Callable[[list[str], float], Awaitable[tuple[int | None, str]]]


def parse(container: Object, name: str) -> Probe | None:
    """The container's probe of that name (`livenessProbe` …), None without one."""
    spec: Object | None = container.get(name)
    if not spec:
        return None
    return Probe(
        action=spec,
        initial_delay_s=float(spec.get("initialDelaySeconds") or 0),
        period_s=float(spec.get("periodSeconds") or 10),
        timeout_s=float(spec.get("timeoutSeconds") or 1),
        successes=int(spec.get("successThreshold") or 1),
        failures=int(spec.get("failureThreshold") or 3),
    )


async def check(probe: Probe, target: Target) -> str:
    """One probe. "" is success, else what went wrong."""
    action = probe.action
    try:
        async with asyncio.timeout(probe.timeout_s):
            if "exec" in action:
                code, output = await target.run(action["exec"]["command"], probe.timeout_s)
                return "" if code == 0 else f"exit code {code}: {output.strip()}"
            if "tcpSocket" in action:
                await _connect(target, action["tcpSocket"])
                return ""
            if "httpGet" in action:
                return await _http(target, action["httpGet"])
    except TimeoutError:
        return f"no answer for {probe.timeout_s:g} s"
    except (OSError, LabError, ValueError) as error:
        return str(error) or repr(error)
    return f"the lab does not know this probe: {sorted(action)}"


async def _connect(
    target: Target, where: Object, tls: ssl.SSLContext | None = None, talk: bytes = b""
) -> bytes:
    """Connect, say `talk`, return the first line of the answer (nothing said: nothing read)."""
    address = where.get("host") or target.address
    port = target.ports[where["port"]] if where["port"] in target.ports else int(where["port"])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = target.new_socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
        name = "" if tls else None
        reader, writer = await asyncio.open_connection(sock=sock, ssl=tls, server_hostname=name)
    except BaseException:
        sock.close()
        raise
    try:
        if not talk:
            return b""
        writer.write(talk)
        return await reader.readline()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _http(target: Target, action: Object) -> str:
    headers = {"Host": action.get("host") or target.address, "User-Agent": "kube-probe/lab"}
    headers.update({item["name"]: item["value"] for item in action.get("httpHeaders") or []})
    lines = [f"GET {action.get('path') or '/'} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    tls = None
    if action.get("scheme") == "HTTPS":
        tls = ssl.create_default_context()
        tls.check_hostname = False  # the kubelet does not verify either
        tls.verify_mode = ssl.CERT_NONE
    talk = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
    words = (await _connect(target, action, tls, talk)).split()
    if len(words) < 2 or not words[1].isdigit():
        return f"not an HTTP answer: {b' '.join(words)[:80]!r}"
    code = int(words[1])
    return "" if 200 <= code < 400 else f"HTTP probe failed with statuscode: {code}"


async def keep_checking(
    probe: Probe, target: Target, verdict: Callable[[bool, str], None], eager: bool = False
) -> None:
    """Probe for ever; `verdict(good, why)` at each change of mind, after the thresholds.

    eager: until the first success, probe more often than the period (no harm: a container that
    was never ready cannot become less ready).
    """
    await asyncio.sleep(probe.initial_delay_s)
    good: bool | None = None
    row, last = 0, True
    while True:
        why = await check(probe, target)
        row = row + 1 if (not why) == last else 1
        last = not why
        needed = probe.failures if why else probe.successes
        if row >= needed and good is not last:
            good = last
            verdict(good, why)
        hurry = eager and not good
        await asyncio.sleep(min(_EAGER_S, probe.period_s) if hurry else probe.period_s)
