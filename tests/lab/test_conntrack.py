"""Entries of flows to a pod that left are deleted, and no others, in both families."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest

from .agentnet import ROOT, sh

RULES = """
table {family} t {{
  chain o {{
    type nat hook output priority -100;
    {family} daddr {eip} udp dport 53 dnat to {pod}:8053
    {family} daddr {eip} udp dport 54 dnat to {pod}:8054
    {family} daddr {eip} tcp dport 80 dnat to {pod}:8080
  }}
}}
"""
# One process with many sockets, in the namespace; then what `forget` says and what is left.
SCRIPT = """
import json, socket, sys
from ipaddress import ip_address
from pathlib import Path
from agent.conntrack import Target, forget
from lbctl.core.model import Protocol

eip, pod, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in eip else socket.AF_INET
sockets = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(count)]
for port in (53, 54):
    for one in sockets:
        one.sendto(b"x", (eip, port))
with socket.create_server((pod, 8080), family=family) as server:  # one of two is over
    clients = [socket.create_connection((eip, 80)) for _ in range(2)]
    accepted = [server.accept()[0] for _ in clients]
clients[0].close()
assert next(one for one in accepted if one.recv(1) == b"") is accepted[0]
accepted[0].close()
pod, eip = ip_address(pod), ip_address(eip)
targets = [Target(eip, 53, pod, 8053), Target(eip, 80, pod, 8080, protocol=Protocol.TCP)]

def left():
    lines = Path("/proc/net/nf_conntrack").read_text().splitlines()
    return [sum(f"dport={port} " in line for line in lines) for port in (53, 54, 80)]

before = left()
print(json.dumps([before, forget(targets), left(), forget(targets)]))
"""


@pytest.fixture
def space() -> Iterator[str]:
    name = f"ct{os.getpid()}"
    sh("ip", "netns", "add", name)
    try:
        yield name
    finally:
        sh("ip", "netns", "del", name)


@pytest.mark.parametrize(
    ("family", "eip", "pod", "shown"),
    [("ip", "198.51.100.1", "10.0.0.2", "{}"), ("ip6", "2001:db8::1", "fd00::2", "[{}]")],
)
def test_only_the_flows_of_the_pod_are_forgotten(
    space: str, family: str, eip: str, pod: str, shown: str
) -> None:
    inside = ("ip", "netns", "exec", space)
    length = "128" if family == "ip6" else "32"
    sh(*inside, "ip", "link", "set", "lo", "up")
    for address in (eip, pod):
        sh(*inside, "ip", "address", "add", f"{address}/{length}", "dev", "lo")
    text = RULES.format(family=family, eip=eip, pod=shown.format(pod))
    sh(*inside, "nft", "-f", "-", text=text)
    command = (sys.executable, "-c", SCRIPT, eip, pod, "40")
    said = sh(*inside, "env", f"PYTHONPATH={ROOT}", *command)
    assert json.loads(said) == [[40, 40, 2], 42, [0, 40, 0], 0]
