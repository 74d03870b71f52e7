"""The agent's look at its node: what is there of others, in a namespace of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest

from lbctl.core.names import AGENT_HTTP_PORT, PROBE_PORT, ROUTE_TABLE_BASE, TUNNEL_PORT

from .agentnet import ROOT, sh

LOOK = """
import asyncio, json, socket
from agent import clash, routes

async def look():
    async with routes.opened() as links:
        lookout = clash.Lookout(links, lambda: (1, 2))
        await lookout.look()
        print(json.dumps([[c.kind, c.text] for c in lookout.clashes]))

asyncio.run(look())
"""
HOLD = f"""
import socket, sys
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(("::", {PROBE_PORT}))
tcp = socket.create_server(("", {AGENT_HTTP_PORT}))
exec(sys.argv[1])
"""
CLOSED = """
table ip filter {
  chain FORWARD { type filter hook forward priority 0; policy drop; }
}
"""


@pytest.fixture
def space() -> Iterator[str]:
    name = f"ac{os.getpid()}"
    sh("ip", "netns", "add", name)
    try:
        text = "link set lo up\nlink add eth0 type veth peer name far\nlink set eth0 up\n"
        sh("ip", "-n", name, "-batch", "-", text=text)
        yield name
    finally:
        sh("ip", "netns", "del", name)


def look(space: str, before: str = "") -> list[tuple[str, str]]:
    """What is found; `before` is a script that runs the look as its child."""
    code = HOLD if before else LOOK
    command = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code)
    said = sh("ip", "netns", "exec", space, *command, *((before,) if before else ()))
    return [(kind, text) for kind, text in json.loads(said.splitlines()[-1])]


def test_what_others_use_is_seen(space: str) -> None:
    assert look(space) == []
    for line in (
        "rule add fwmark 0x1/0xf lookup 77 pref 50",
        "rule add pref 131 lookup 77",
        "rule add fwmark 0x200/0xf00 lookup 2004 pref 9",  # Cilium's: no clash
        "-6 rule add fwmark 0x4c000001 lookup 77 pref 3000",
        f"route add default dev eth0 table {ROUTE_TABLE_BASE + 1}",
        f"-6 route add 2001:db8::/32 dev eth0 table {ROUTE_TABLE_BASE + 2}",
        f"link add vx type vxlan id 5 dstport {TUNNEL_PORT} dev eth0",
    ):
        sh("ip", "-n", space, *line.split())
    sh("ip", "netns", "exec", space, "nft", "-f", "-", text=CLOSED)
    child = f"import subprocess\nsubprocess.run([sys.executable, '-c', {LOOK!r}], check=True)"
    found = look(space, child)
    assert sorted(kind for kind, _ in found) == [
        *("forward", "port", "port", "route", "route", "rule", "rule", "rule", "vxlan")
    ], found
    # The exception that the text asks for is seen.
    exception = "filter FORWARD meta mark & 0xff000000 == 0x4c000000 accept"
    sh("ip", "netns", "exec", space, "nft", "add", "rule", "ip", *exception.split())
    assert "forward" not in [kind for kind, _ in look(space)]
