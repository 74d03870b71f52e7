"""At which node each of the client's flows enters: an nftables table of the lab's own.

It decides nothing; by it a drill or a traffic test proves that it could have failed (how many flows
entered at the node that dies, how many were steered).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from ipaddress import ip_address

from lbctl.lab.lab import Lab

_TABLE = """
add table inet lbctl-entries
delete table inet lbctl-entries
table inet lbctl-entries {{
  set entered4 {{ type ipv4_addr . inet_service; flags dynamic; size 65535; }}
  set entered6 {{ type ipv6_addr . inet_service; flags dynamic; size 65535; }}
  chain see {{
    type filter hook prerouting priority -450;
    {rules}
  }}
}}
"""
_RULE = {
    version: f"{family} daddr {{eip}} ether saddr {{{{ {{macs}} }}}}"
    f" add @entered{version} {{{{ {family} daddr . th sport }}}}"
    for version, family in ((4, "ip"), (6, "ip6"))
}


def watch(lab: Lab, eips: Iterable[str]) -> None:
    """Have every node note the client's ports whose packets a switch hands it, from now on."""
    macs = set()
    for switch in lab.of_role("switch"):
        # Packets come from an interface's own MAC or, from the VRRP master, the virtual one.
        links = json.loads(switch.run("ip", "-j", "link").stdout)
        macs |= {str(link["address"]) for link in links if link.get("link_type") == "ether"}
    known = ", ".join(sorted(macs))
    rules = [_RULE[ip_address(eip).version].format(eip=eip, macs=known) for eip in sorted(eips)]
    text = _TABLE.format(rules="\n    ".join(rules))
    for node in lab.of_role("node"):
        if node.alive:
            node.run("nft", "-f", "-", input=text)


def take(lab: Lab) -> dict[tuple[str, int], str]:
    """Node by EIP and client port, as far as noted; the tables are gone then."""
    found: dict[tuple[str, int], str] = {}
    for node in lab.of_role("node"):
        if node.alive:
            said = node.run("nft", "-j", "list", "table", "inet", "lbctl-entries").stdout
            for item in json.loads(said)["nftables"]:
                for entry in item.get("set", {}).get("elem", ()):
                    eip, port = entry["concat"]
                    found[str(eip), int(port)] = node.name
            node.run("nft", "delete", "table", "inet", "lbctl-entries")
    return found
