"""Conntrack entries of flows whose pod has left.

A UDP flow has no end: its entry lives as long as the client sends, and leads to the address of a
pod that is no more. So when an endpoint leaves that this node delivers to (those on no node too),
the entries of its EIP that lead to it are deleted (kube-proxy does the same for ClusterIPs), and
the flow's next packet chooses anew. The same is done with flows that were handed over to a node,
when none of its endpoints takes flows any more.
A TCP connection that nobody could end stays for days, and swallows each new one from the same
client port: its SYN follows the entry to where nobody is. So those go too, and even those that are
over (TIME_WAIT): a SYN would replace them, but a connection that comes here when its bucket moves
sends none. On a node that others call down its pods may live on: there TCP is left alone.
And so do notes of flows that were handed to a node with no pod of theirs any more: a new connection
from the same client port would go there as long as it is tried.
Rule: only entries whose original destination is one of our EIP:ports are touched. pyroute2 does the
same at 2.6 ms an entry; a pod that answers DNS has thousands.

Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h (CTA_FILTER, Linux 5.8).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from agent.nfnetlink import (
    DONE,
    DUMP,
    ERROR,
    NETLINK_NETFILTER,
    REQUEST,
    attribute,
    messages,
    nested,
)
from lbctl.core.forwarding import Table
from lbctl.core.model import Address, Protocol
from lbctl.core.names import MARK_BASE
from lbctl.core.pmap import changed
from lbctl.errors import DataplaneError

_CONNTRACK: Final = 1 << 8
_GET, _DELETE = 1, 2
_ACK: Final = 0x4
_ORIG, _REPLY, _MARK, _FILTER = 1, 2, 8, 25  # CTA_TUPLE_ORIG, …_REPLY, CTA_MARK, CTA_FILTER
_NUMBER: Final = {Protocol.TCP: socket.IPPROTO_TCP, Protocol.UDP: socket.IPPROTO_UDP}
_BY_PROTOCOL, _BY_PORT = 1 << 3, 1 << 4  # CTA_FILTER_F_CTA_…
_LIMIT_S: Final = 5.0
_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Target:
    """An EIP:port, and the pod that it led to from this node.

    mark: of the node that its flows were handed over to; then the pod is the EIP:port itself.
    """

    eip: Address
    port: int
    pod: Address
    pod_port: int
    mark: int = 0
    protocol: Protocol = Protocol.UDP


def left(before: Table, now: Table, me: str, index: Mapping[str, int]) -> tuple[Target, ...]:
    """The targets on node `me` that `before` had and `now` has no more, sorted.

    index: the other nodes' numbers. Costs what differs between the two.
    """
    gone: set[Target] = set()
    for address in changed(before.eips, now.eips):
        if had := _targets(before, address, me, index):
            gone |= had - _targets(now, address, me, index)
    if me in now.sources.down:
        gone = {target for target in gone if target.protocol is Protocol.UDP}
    return tuple(sorted(gone, key=_order))


def without(
    targets: Iterable[Target], now: Table, me: str, index: Mapping[str, int]
) -> tuple[Target, ...]:
    """Those of the targets that `now` does not have, sorted. Costs what they are."""
    wanted = set(targets)
    for address in {target.eip for target in wanted}:
        wanted -= _targets(now, address, me, index)
    return tuple(sorted(wanted, key=_order))


def _order(target: Target) -> tuple[int | str, ...]:
    numbers = (int(target.eip), target.port, int(target.pod), target.pod_port, target.mark)
    return (*numbers, target.protocol.value)


def _targets(table: Table, address: Address, me: str, index: Mapping[str, int]) -> set[Target]:
    entry = table.eips.get(address)
    found: set[Target] = set()
    for port in entry.ports if entry else ():
        own = (address, port.port)
        if port.protocol in _NUMBER:
            pods = ((h.address, h.port) for h in port.members if h.at(me))
            found |= {Target(*own, *pod, protocol=port.protocol) for pod in pods}
            keepers = port.members if port.protocol is Protocol.TCP else port.endpoints
            others = {h.node for h in keepers} & index.keys()
            found |= {Target(*own, *own, MARK_BASE + index[n], port.protocol) for n in others}
    return found


def forget(targets: Iterable[Target]) -> int:
    """Delete the entries of flows to these; how many there were. Raises DataplaneError."""
    count = 0
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as link:
            link.bind((0, 0))
            link.settimeout(_LIMIT_S)
            for question, group in _grouped(targets):
                for flow in list(_flows(link, question, group)):
                    body = attribute(_ORIG, flow)
                    link.send(_message(_DELETE, REQUEST | _ACK, question.version, body))
                    count += _acknowledged(link)
    except OSError as error:
        raise DataplaneError(f"conntrack: {error}") from error
    return count


class _Question(NamedTuple):
    """What one dump asks for: a walk over all of conntrack is too long for each pod."""

    version: int
    protocol: Protocol
    pod_port: int


_Group = Mapping[tuple[bytes, int, bytes], frozenset[int]]  # EIP, its port, pod: marks


def _grouped(targets: Iterable[Target]) -> Iterator[tuple[_Question, _Group]]:
    groups: dict[_Question, dict[tuple[bytes, int, bytes], frozenset[int]]] = {}
    for target in targets:
        group = groups.setdefault(
            _Question(target.eip.version, target.protocol, target.pod_port), {}
        )
        key = target.eip.packed, target.port, target.pod.packed
        group[key] = group.get(key, frozenset()) | {target.mark}
    yield from groups.items()


def _message(kind: int, flags: int, version: int, body: bytes) -> bytes:
    payload = struct.pack(">BBH", _FAMILY[version], 0, 0) + body
    return struct.pack("=IHHII", 16 + len(payload), _CONNTRACK | kind, flags, 1, 0) + payload


def _flows(link: socket.socket, asked: _Question, group: _Group) -> Iterator[bytes]:
    """The original tuples, as the kernel wrote them, of the flows that lead to the group's pods."""
    number = bytes([_NUMBER[asked.protocol]])
    proto = attribute(1, number) + attribute(2, _port(asked.pod_port))
    source, destination = (1, 2) if asked.version == 4 else (3, 4)  # CTA_IP_V…
    # Not by address: kernels compare IPv6 ones the wrong way round (seen on 6.18).
    flags = attribute(2, struct.pack("=I", _BY_PROTOCOL | _BY_PORT))
    question = _nest(_REPLY, _nest(2, proto)) + _nest(_FILTER, flags)
    link.send(_message(_GET, REQUEST | DUMP, asked.version, question))
    while True:
        data = link.recv(1 << 18)
        for kind, _, message in messages(data):
            if kind == DONE:
                return
            if kind == ERROR:
                raise OSError(-struct.unpack_from("=i", message)[0], "the dump was refused")
            found = dict(nested(message[4:]))
            eip, port = _end(found[_ORIG], destination, 3)
            pod, _ = _end(found[_REPLY], source, 2)
            marks = group.get((eip or b"", int.from_bytes(port or b"", "big"), pod or b""), ())
            mark = int.from_bytes(found.get(_MARK, b""), "big")
            if 0 in marks or mark in marks:
                yield found[_ORIG]


def _end(flow: bytes, address: int, port: int) -> tuple[bytes | None, bytes | None]:
    """Address and port of one end of a tuple, by the numbers of their attributes."""
    parts = dict(nested(flow))
    return dict(nested(parts[1])).get(address), dict(nested(parts[2])).get(port)


def _acknowledged(link: socket.socket) -> int:
    """1 if the entry was deleted, 0 if it had timed out meanwhile."""
    for kind, _, message in messages(link.recv(1 << 16)):
        code = struct.unpack_from("=i", message)[0] if kind == ERROR else 0
        if code not in (0, -errno.ENOENT):
            raise OSError(-code, os.strerror(-code))
        return int(code == 0)
    return 0


def _port(number: int) -> bytes:
    return number.to_bytes(2, "big")


def _nest(kind: int, body: bytes) -> bytes:
    return attribute(kind | 0x8000, body)
