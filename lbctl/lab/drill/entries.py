"""At which node each of the client's flows enters: an nftables table of the drill's own.

It decides nothing; by it a drill proves that it could have failed (how many flows entered at the
node that dies, how many were steered).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from lbctl.lab.drill.site import Site

_TABLE = """
add table ip lbctl-entries
delete table ip lbctl-entries
table ip lbctl-entries {{
  set entered {{ type ipv4_addr . inet_service; flags dynamic; size 65535; }}
  chain see {{
    type filter hook prerouting priority -450;
    ip daddr {{ {eips} }} ether saddr {{ {macs} }} add @entered {{ ip daddr . th sport }}
  }}
}}
"""


def watch(site: Site, eips: Iterable[str]) -> None:
    """Have every node note the client's ports whose packets a switch hands it, from now on."""
    macs = set()
    for switch in site.lab.of_role("switch"):
        links = json.loads(switch.run("ip", "-j", "link").stdout)
        macs |= {str(link["address"]) for link in links if link.get("link_type") == "ether"}
    text = _TABLE.format(eips=", ".join(sorted(eips)), macs=", ".join(sorted(macs)))
    for node in site.lab.of_role("node"):
        if node.alive:
            node.run("nft", "-f", "-", input=text)


def take(site: Site) -> dict[tuple[str, int], str]:
    """Node by EIP and client port, as far as noted; the tables are gone then."""
    found: dict[tuple[str, int], str] = {}
    for node in site.lab.of_role("node"):
        if node.alive:
            said = node.run("nft", "-j", "list", "set", "ip", "lbctl-entries", "entered").stdout
            for item in json.loads(said)["nftables"]:
                for entry in item.get("set", {}).get("elem", ()):
                    eip, port = entry["concat"]
                    found[str(eip), int(port)] = node.name
            node.run("nft", "delete", "table", "ip", "lbctl-entries")
    return found
