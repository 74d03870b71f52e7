"""A fake of our nftables table: it answers where a packet goes, from the rendered text alone.

It knows the elements (parsed from the text that the agent gives to nft) and what the rules do with
them; `tests/lab/test_agent_faketable.py` holds it against the kernel with the same packets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_address

from lbctl.core import maglev
from lbctl.core.names import MARK_BASE
from lbctl.core.nftrules import BUCKET_BASE

_MASK = 0xFFFFFFFF
_COMMAND = re.compile(r"(add|delete) element ip lbctl (\w+) \{ (.*) \}$")


def _rol(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def jhash(words: list[int], length: int, seed: int) -> int:
    """Bob Jenkins' lookup3 over at most three words, as include/linux/jhash.h has it."""
    a = b = c = (0xDEADBEEF + length + seed) & _MASK
    padded = [*words, 0, 0, 0]
    a, b, c = (a + padded[0]) & _MASK, (b + padded[1]) & _MASK, (c + padded[2]) & _MASK
    c = ((c ^ b) - _rol(b, 14)) & _MASK
    a = ((a ^ c) - _rol(c, 11)) & _MASK
    b = ((b ^ a) - _rol(a, 25)) & _MASK
    c = ((c ^ b) - _rol(b, 16)) & _MASK
    a = ((a ^ c) - _rol(c, 4)) & _MASK
    b = ((b ^ a) - _rol(a, 14)) & _MASK
    return ((c ^ b) - _rol(b, 24)) & _MASK


def bucket(client: str, port: int | None, size: int) -> int:
    """The bucket of a packet; port None: by the client's address alone."""
    words = [int.from_bytes(ip_address(client).packed, "little")]
    if port is not None:
        words.append(int.from_bytes(port.to_bytes(2, "big"), "little"))
    return (jhash(words, 4 * len(words), maglev.SEED) * size) >> 32


def _key(prefix: str, chain: str | None, client: str, source: int) -> str:
    """What a packet is looked up by, with the bucket that a chain of the table gives it."""
    if chain is None:
        return prefix
    kind, size = re.fullmatch(r"jump (flow|client)(\d+)", chain).groups()  # type: ignore[union-attr]
    number = bucket(client, source if kind == "flow" else None, int(size))
    return f"{prefix} . {BUCKET_BASE + number:#x}"


@dataclass
class FakeTable:
    """The elements of the table. Feed it what the agent gives to nft."""

    maps: dict[str, dict[str, str]] = field(default_factory=dict)

    def apply(self, text: str) -> None:
        """Take one transaction in. KeyError: it deletes what is not there."""
        for line in text.splitlines():
            if line == "delete table ip lbctl":
                self.maps.clear()
            elif line.startswith("flush set ip lbctl "):
                self.maps[line.split()[-1]] = {}
            elif found := _COMMAND.match(line):
                verb, name, entries = found.groups()
                known = self.maps.setdefault(name, {})
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
    ) -> str:
        """Say what becomes of a packet that comes in by an uplink.

        peer: another node sent it. known: conntrack has its flow here. Out: `node INDEX`,
        `pod ADDRESS:PORT`, `chance INDEX`, `established`, `refuse` or `stray`.
        """
        prefix = f"{address} . {protocol} . {port}"
        chain = self.maps.get("svc", {}).get(prefix)
        if not peer:
            if prefix in self.maps.get("closed", {}) and (syn or protocol == "udp"):
                return "refuse"
            if chain is None:
                return "refuse"
        key = _key(prefix, chain, client, source)
        past = _key(prefix, self.maps.get("past", {}).get(prefix), client, source)
        if not peer and (mark := self.maps.get("steer", {}).get(key)):
            return f"node {int(mark, 16) - MARK_BASE}"
        if known:
            return "established"
        if protocol == "tcp" and not syn and (mark := self.maps.get("prev", {}).get(past)):
            return f"chance {int(mark, 16) - MARK_BASE}"
        if pod := self.maps.get("deliver", {}).get(key):
            return "pod " + pod.replace(" . ", ":")
        late = self.maps.get("late", {}).get(past)
        if late and (syn or protocol == "udp"):
            return "pod " + late.replace(" . ", ":")
        return "stray"
