"""The words that all rules share: what differs between IPv4 and IPv6, and packets' marks.

Source: nft(8), libnftables of nftables 1.0.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lbctl.core.model import Address
from lbctl.core.names import MARK_BASE, MARK_MASK, NFT_TABLE

BUCKET_BASE: Final = MARK_BASE + 0x1000000  # marks that live for a few hooks only
# What has no more hops than this was handed over (or comes from very far, and has one chance less).
HANDOVER_TTL: Final = 8
# With one hop less it is at the first that it was handed to, who may pass it on. With fewer, on it
# goes by the flow's own history (conntrack's mark) alone.
LAST_LOOKUP_TTL: Final = HANDOVER_TTL - 1

NODE: Final = f"meta mark & {MARK_MASK:#x} == {MARK_BASE:#x}"
NOT_NODE: Final = f"meta mark & {MARK_MASK:#x} != {MARK_BASE:#x}"
BUCKET: Final = f"meta mark & {MARK_MASK:#x} == {BUCKET_BASE:#x}"
SYN: Final = "tcp flags & (fin|syn|rst|ack) == syn"
NOT_SYN: Final = "tcp flags & (fin|syn|rst|ack) != syn"


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between the tables of IPv4 and IPv6, in nft's words.

    ip: the header's keyword. address: the type of an address. icmp, icmp_number: the protocol's
    keyword and the one that `meta l4proto` knows. hops: the header field that each router lowers.
    errors, redirect: ICMP types. odd: matches a packet with options or extension headers between
    its IP and its transport header. own: protocol and destination port, at their places in a packet
    without. tail: the end of the client's address, of 8 bytes at most. The rest is about the packet
    that an ICMP error speaks of: odd_inner finds one whose ports are elsewhere; sent has its
    protocol and source port, client and client_port whom it was sent to.
    """

    version: int
    ip: str
    address: str
    icmp: str
    icmp_number: str
    hops: str
    errors: str
    redirect: str
    odd: str
    own: str
    tail: str
    odd_inner: str
    sent: str
    client: str
    client_port: str

    @property
    def table(self) -> str:
        """The table's family and name."""
        return f"{self.ip} {NFT_TABLE}"

    @property
    def key(self) -> str:
        """What of a packet says which EIP:protocol:port it is for."""
        return f"{self.ip} daddr . meta l4proto . th dport"

    @property
    def raw_key(self) -> str:
        """The same of a packet that is not odd; `raw_error_key` can share a map with it."""
        return f"{self.ip} daddr . {self.own}"

    @property
    def raw_error_key(self) -> str:
        """Which EIP:protocol:port sent the packet that an ICMP error speaks of."""
        return f"{self.ip} daddr . {self.sent}"

    @property
    def owner(self) -> str:
        """The node that owns the packet's bucket becomes its mark; nothing if that is this one."""
        return f"meta mark set {self.raw_key} . meta mark map @steer"

    @property
    def delivered(self) -> str:
        """The rule that gives a new flow to the pod that its mark stands for, if there is one."""
        to = f"{self.key} . meta mark map @deliver"
        return f"meta l4proto {{ tcp, udp, sctp }} dnat {self.ip} to {to}"


V4: Final = Family(
    version=4,
    ip="ip",
    address="ipv4_addr",
    icmp="icmp",
    icmp_number="icmp",
    hops="ttl",
    errors="destination-unreachable, time-exceeded, parameter-problem",
    redirect="redirect",
    odd="ip hdrlength != 5",
    own="@nh,72,8 . @nh,176,16",
    tail="ip saddr",
    odd_inner="@th,64,8 != 0x45",
    sent="@th,136,8 . @th,224,16",
    client="@th,192,32",
    client_port="@th,240,16",
)
V6: Final = Family(
    version=6,
    ip="ip6",
    address="ipv6_addr",
    icmp="icmpv6",
    icmp_number="ipv6-icmp",
    hops="hoplimit",
    errors="destination-unreachable, packet-too-big, time-exceeded, parameter-problem",
    redirect="nd-redirect",
    odd="ip6 nexthdr != { tcp, udp, sctp, ipv6-icmp }",
    own="@nh,48,8 . @nh,336,16",
    tail="@nh,128,32 . @nh,160,32",
    odd_inner="@th,64,4 != 6",
    sent="@th,112,8 . @th,384,16",
    client="@th,256,32 . @th,288,32 . @th,320,32 . @th,352,32",
    client_port="@th,400,16",
)
FAMILIES: Final = (V4, V6)


def family_of(address: Address) -> Family:
    """Return the family whose table holds an address."""
    return V4 if address.version == 4 else V6
