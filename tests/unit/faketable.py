"""A fake of our nftables tables: it answers where a packet goes, from the rendered text alone.

It knows the elements (parsed from the text that the agent gives to nft) and what the rules do with
them; `tests/lab/test_forwarding_kernel.py` holds it against the kernel with the same packets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from lbctl.core.names import MARK_BASE
from lbctl.core.nftfamily import BUCKET_BASE
from lbctl.core.nodeview import SPARES
from lbctl.core.packet import bucket

_COMMAND = re.compile(r"(add|delete) element (ip6?) lbctl (\w+) \{ (.*) \}$")


def _key(prefix: str, chain: str | None, client: str, source: int, of: int = 1 << 24) -> str:
    """What a packet is looked up by, with the bucket that a chain of the table gives it, modulo."""
    if chain is None:
        return prefix
    kind, size = re.fullmatch(r"jump (flow|client)(\d+)", chain).groups()  # type: ignore[union-attr]
    number = bucket(ip_address(client), source if kind == "flow" else None, int(size))
    return f"{prefix} . {BUCKET_BASE + number % of:#x}"


@dataclass
class FakeTable:
    """The elements of both tables, by `ip NAME` or `ip6 NAME`. Feed it what the agent gives nft."""

    maps: dict[str, dict[str, str]] = field(default_factory=dict)

    def apply(self, text: str) -> None:
        """Take one transaction in. KeyError: it deletes what is not there."""
        for line in text.splitlines():
            if line.startswith("delete table "):
                family = line.split()[2]
                for name in [n for n in self.maps if n.split()[0] == family]:
                    del self.maps[name]
            elif line.startswith(("flush set ", "flush map ")):
                _, _, family, _, name = line.split()
                self.maps[f"{family} {name}"] = {}
            elif found := _COMMAND.match(line):
                self._change(*found.groups())

    def _change(self, verb: str, family: str, name: str, entries: str) -> None:
        known = self.maps.setdefault(f"{family} {name}", {})
        for entry in entries.split(", "):
            key, _, value = entry.partition(" : ")
            if verb == "delete":
                del known[key]
            elif known.setdefault(key, value) != value:
                raise KeyError(f"{key} is there with another value")

    def where(
        self,
        address: str,
        port: int,
        client: str,
        source: int,
        *,
        protocol: str = "tcp",
        syn: bool = True,
        peer: bool = False,
        known: bool = False,
        odd: bool = False,
        about: bool = False,
        handed: bool = False,
        answered: bool = False,
        pinned: str = "",
    ) -> str:
        """Say what becomes of a packet that comes in by an uplink.

        protocol: "icmp" is an echo request. peer: another node sent it. known: conntrack has its
        flow here. odd: with IP options or extension headers. about: not this flow's packet, but an
        ICMP error about one of its answers. handed: with few hops left, as after a hand-over
        or a question; answered: with fewer, as after an answer or two hand-overs. pinned: the pod
        that the client is pinned to here. Out: `node INDEX`, `on INDEX`, `pod ADDRESS:PORT`,
        `chance INDEX`, `owner INDEX` (where no note leads elsewhere), `ask INDEX`, `answer INDEX`,
        `ping`, `established`, or what counts the drop: `refused`, `sources`, `odd` or `stray`.
        """
        prefix = f"{address} . {protocol} . {port}"
        if odd:
            return "odd"
        if not about and not self._allowed(address, client):
            return "sources"
        if protocol == "icmp":
            pingable = address in self._of(address, "pingable")
            return "ping" if pingable else "stray" if peer else "refused"
        chain = self._of(address, "svc").get(prefix)
        if not peer and not about:
            closed = prefix in self._of(address, "closed")
            if chain is None or (closed and (syn or protocol != "tcp")):
                return "refused"
        key = _key(prefix, chain, client, source)
        few, alone = handed or answered, prefix not in self._of(address, "homed")
        goes_on = peer and syn and protocol == "tcp" and alone and not few
        if (not peer or goes_on) and (mark := self._of(address, "steer").get(key)):
            return f"{'on' if peer else 'node'} {int(mark, 16) - MARK_BASE}"
        stays = self._pinned(prefix, pinned)
        asked = self._asked(prefix, client, source)
        asks = prefix in self._of(address, "asks") and (syn or protocol == "udp") and not stays
        if asks and asked and not (few or about):
            return f"ask {asked}"
        if known or about:
            return "established" if known else "stray"
        if asks and handed and (mark := self._of(address, "steer").get(key)):
            return f"answer {int(mark, 16) - MARK_BASE}"
        past = _key(prefix, self._of(address, "past").get(prefix), client, source)
        established = protocol == "tcp" and not syn
        led = self._led(key, past, protocol, alone, handed)
        if led and not answered and (established or protocol != "tcp"):
            return led
        if established and few:
            return "stray"
        spare = _key(prefix, chain, client, source, SPARES) if syn or protocol != "tcp" else ""
        return self._delivered(key, stays, spare)

    def _led(self, key: str, past: str, protocol: str, alone: bool, handed: bool) -> str:
        """To whom goes what conntrack does not know here and may be no new flow; "" for nobody."""
        if protocol == "sctp" or (protocol == "udp" and handed):
            return ""
        if mark := self._of(key, "prev").get(past):
            return f"chance {int(mark, 16) - MARK_BASE}"
        if (protocol == "tcp" or alone) and (mark := self._of(key, "steer").get(key)):
            return f"{'owner' if handed else 'chance'} {int(mark, 16) - MARK_BASE}"
        return ""

    def silent(self, version: int, node: str) -> bool:
        """Whether a note that leads to this node is not followed where someone else is known."""
        held = self.maps.get("ip silent" if version == 4 else "ip6 silent", {})
        return bool(node) and f"{MARK_BASE + int(node[1:]):#x}" in held

    def _delivered(self, key: str, number: str, spare: str) -> str:
        """To the pod of a pin or a bucket of this node, or else to a spare one."""
        deliver = self._of(key, "deliver")
        number = number or self._of(key, "holders").get(key, "")
        pod = deliver.get(f"{key.rpartition(' . ')[0]} . {number}" if number else key)
        pod = pod or self._of(key, "spare").get(spare)
        return "pod " + pod.replace(" . ", ":") if pod else "stray"

    def _asked(self, prefix: str, client: str, source: int) -> int:
        """The node that is asked about a client without a pin; 0 for none."""
        asks = self._of(prefix, "asks").get(prefix)
        mark = self._of(prefix, "prev").get(_key(prefix, asks, client, source), "")
        known = asks is not None and f"{prefix} . {mark}" in self._of(prefix, "holders")
        return int(mark, 16) - MARK_BASE if known else 0

    def _pinned(self, prefix: str, pod: str) -> str:
        """The number of the pod that a pin of it leads to; "" if it takes no new flows."""
        for key, value in self._of(prefix, "deliver").items() if pod else ():
            if key.startswith(f"{prefix} . ") and value.replace(" . ", ":") == pod:
                number = key.rpartition(" . ")[2]
                if number in self._of(prefix, "holders").values():
                    return number
        return ""

    def _of(self, address: str, name: str) -> dict[str, str]:
        family = "ip6" if ":" in address else "ip"
        return self.maps.get(f"{family} {name}", {})

    def _allowed(self, address: str, client: str) -> bool:
        if address not in self._of(address, "restricted"):
            return True
        entries = (entry.split(" . ") for entry in self._of(address, "sources"))
        return any(
            eip == address and ip_address(client) in ip_network(network) for eip, network in entries
        )
