"""The single values of the configuration: durations, addresses, ranges, names.

Rules: each `parse_*` takes what YAML gave and returns the value, or raises ValueError with a
sentence for the person who wrote it. Nothing is expanded: a range is its two ends, so a /8 costs
no more than a /32. Whatever passes here may stand in ExaBGP's configuration and in nft's text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

from lbctl.core.model import Address, ObjectRef

_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
_SUBDOMAIN: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,14}\Z")
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h)\Z")
_UNIT_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_RESERVED_ASN: Final = {
    0: "0 is reserved (RFC 7607)",
    23456: "23456 stands for AS numbers that an old router cannot show (RFC 6793)",
    65535: "65535 is reserved (RFC 7300)",
    4294967295: "4294967295 is reserved (RFC 7300)",
}
_SPECIAL: Final = tuple(
    (ip_network(text), name)
    for text, name in (
        ("0.0.0.0/8", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
)


def show(value: object) -> str:
    """A value as a person would recognise it, at most 60 characters, on one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, tuple | list):
        return "a list"
    text = json.dumps(value[:60]) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


@dataclass(frozen=True, slots=True, order=True)
class AddressRange:
    """A run of addresses of one family, both ends included."""

    first: Address
    last: Address

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.first.version

    @property
    def size(self) -> int:
        """How many addresses it holds."""
        return int(self.last) - int(self.first) + 1

    def __contains__(self, address: Address) -> bool:
        return self.version == address.version and int(self.first) <= int(address) <= int(self.last)

    def overlaps(self, other: AddressRange) -> bool:
        """Whether any address is in both."""
        return (
            self.version == other.version
            and int(self.first) <= int(other.last)
            and int(other.first) <= int(self.last)
        )

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def parse_address(value: object) -> Address:
    """An IPv4 or IPv6 address without a zone."""
    if not isinstance(value, str):
        raise ValueError(f"must be an IP address, not {show(value)}")
    try:
        address = ip_address(value)
    except ValueError:
        raise ValueError(f"{show(value)} is not an IP address") from None
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ValueError("an address with a zone (`%…`) cannot be used")
    return address


def parse_unicast(value: object) -> Address:
    """An address that one machine can have: a BGP peer's or our own."""
    address = parse_address(value)
    if address.is_multicast or address.is_unspecified or address == IPv4Address("255.255.255.255"):
        raise ValueError(f"{address} is not the address of a machine")
    if address.is_link_local:
        raise ValueError(f"{address} is link-local; a session needs an address that is routed")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        raise ValueError(f"write {address} as the IPv4 address {address.ipv4_mapped}")
    return address


def parse_router_id(value: object) -> IPv4Address:
    """A BGP identifier: four octets, not 0.0.0.0 (RFC 6286)."""
    address = parse_address(value)
    if not isinstance(address, IPv4Address) or not int(address):
        raise ValueError("must look like an IPv4 address other than 0.0.0.0")
    return address


def parse_range(value: object) -> AddressRange:
    """`198.51.100.0/25`, `198.51.100.200-198.51.100.210`, or one address; usable as EIPs."""
    found = parse_range_ends(value)
    for network, name in _SPECIAL:
        special = AddressRange(network.network_address, network.broadcast_address)
        if found.overlaps(special):
            text = str(value).strip()
            raise ValueError(f"{text} holds {name} addresses ({network}), which no EIP can have")
    return found


def parse_range_ends(value: object) -> AddressRange:
    """As `parse_range`, without asking whether the addresses can be used."""
    if not isinstance(value, str):
        raise ValueError(f"must be a CIDR or a range FIRST-LAST, not {show(value)}")
    text = value.strip()
    if "/" in text:
        return _parse_cidr(text)
    if "-" not in text:
        try:
            one = parse_address(text)
        except ValueError:
            raise ValueError(
                f"{show(value)} is neither a CIDR (198.51.100.0/25) nor a range (FIRST-LAST)"
            ) from None
        return AddressRange(one, one)
    first_text, _, last_text = text.partition("-")
    first, last = parse_address(first_text.strip()), parse_address(last_text.strip())
    if first.version != last.version:
        raise ValueError(f"the range {text} mixes IPv4 and IPv6")
    if int(first) > int(last):
        raise ValueError(f"the range {text} is reversed; write {last}-{first}")
    return AddressRange(first, last)


def _parse_cidr(text: str) -> AddressRange:
    base, _, length = text.partition("/")
    address = parse_address(base.strip())
    if not length.isascii() or not length.isdigit() or int(length) > address.max_prefixlen:
        raise ValueError(f"{show(text)}: the prefix length must be 0 to {address.max_prefixlen}")
    network = ip_network((int(address), int(length)), strict=False)
    if address.version == 6:  # ip_network of a small integer would be IPv4
        network = ip_network(f"{address}/{length}", strict=False)
    if network.network_address != address:
        single = f"{address}/{address.max_prefixlen}"
        raise ValueError(
            f"{text} has bits set after the prefix; write {network}, or {single} for that one"
        )
    return AddressRange(network.network_address, network.broadcast_address)


def parse_duration(value: object) -> float:
    """Seconds from `50ms`, `9s`, `5m`, `1h` or a bare number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a duration cannot be negative")
        return float(value)
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"must be a duration such as 50ms, 9s or 5m, not {show(value)}")
    return round(float(match[1]) * _UNIT_S[match[2]], 9)


def _whole_seconds(value: object, what: str) -> int:
    seconds = parse_duration(value)
    if seconds != int(seconds):
        raise ValueError(f"{what} is whole seconds")
    return int(seconds)


def parse_hold_time(value: object) -> int:
    """BGP hold time: 3 to 65535 whole seconds (RFC 4271, 4.2).

    Not 0, which the RFC allows: routes of a manager that died would then stay for ever.
    """
    seconds = _whole_seconds(value, "a hold time")
    if not 3 <= seconds <= 65535:
        raise ValueError("a hold time is 3s to 65535s (RFC 4271; 0 would keep dead routes)")
    return seconds


def parse_restart_time(value: object) -> int:
    """BGP restart time: 1 to 120 whole seconds (RFC 4724, 3, has 12 bits for it).

    Nobody withdraws a dead node meanwhile; 120 s are the first restarts of a container that fails,
    with kubelet's pauses between them, and what FRR asks for itself.
    """
    seconds = _whole_seconds(value, "a restart time")
    if not 1 <= seconds <= 120:
        raise ValueError("a restart time is 1s to 120s (a dead node stays a next hop so long)")
    return seconds


def parse_asn(value: object) -> int:
    """An AS number, 1 to 4294967294, none of the reserved ones."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"must be an AS number (a whole number), not {show(value)}")
    if value in _RESERVED_ASN:
        raise ValueError(f"AS number {_RESERVED_ASN[value]}")
    if not 0 < value < 1 << 32:
        raise ValueError(f"{value} is not an AS number: they are 1 to 4294967294")
    return value


def parse_version(value: object) -> int:
    """The version of the schema: the number 1 (`true` is not a number)."""
    if type(value) is not int or value != 1:
        raise ValueError(f"must be 1, not {show(value)}")
    return value


def is_label(value: object) -> bool:
    """Whether it is a DNS label (RFC 1123)."""
    return isinstance(value, str) and _LABEL.match(value) is not None


def parse_label(value: object) -> str:
    """A DNS label (RFC 1123): names of pools and peers."""
    if not isinstance(value, str) or not is_label(value):
        raise ValueError(
            f"{show(value)} is not a name: use 1 to 63 of a-z, 0-9 and -, "
            "with a letter or digit first and last"
        )
    return value


def parse_label_key(value: object) -> str:
    """A label's key or a loadBalancerClass: a name, perhaps behind a DNS prefix and a slash."""
    if isinstance(value, str) and len(value) <= 317:
        prefix, slash, name = value.rpartition("/")
        if _NAME.match(name) and (not slash or _SUBDOMAIN.match(prefix)):
            return value
    raise ValueError(f"{show(value)} is not a label key such as example.com/name")


def parse_match_labels(value: object) -> tuple[tuple[str, str], ...]:
    """`matchLabels` as sorted pairs."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of labels, not {show(value)}")
    for key, wanted in value.items():
        parse_label_key(key)
        if not isinstance(wanted, str):
            raise ValueError(f"the value of {key} must be text (in quotes), not {show(wanted)}")
    return tuple(sorted(value.items()))


def parse_owner(value: object) -> ObjectRef:
    """A Service as `NAMESPACE/NAME`."""
    if isinstance(value, str):
        namespace, _, name = value.partition("/")
        if is_label(namespace) and is_label(name):
            return ObjectRef(namespace, name)
    raise ValueError(f"{show(value)} is not a Service, NAMESPACE/NAME")


def parse_quota(value: object) -> tuple[tuple[str, int], ...]:
    """Addresses per namespace: one number for each, or a mapping of namespaces ("*": all others).

    Returns sorted pairs of namespace and number.
    """
    given: dict[str, Any] = value if isinstance(value, dict) else {"*": value}
    for namespace, number in given.items():
        if namespace != "*" and not is_label(namespace):
            raise ValueError(f"{show(namespace)} is not a namespace")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"must be a number of addresses, 0 or more, not {show(number)}")
    return tuple(sorted(given.items()))


def parse_secret_name(value: object) -> str:
    """Name of a Secret in our namespace (a DNS subdomain, RFC 1123)."""
    if not isinstance(value, str) or len(value) > 253 or not _SUBDOMAIN.match(value):
        raise ValueError(f"{show(value)} is not the name of a Secret")
    return value


def parse_interface(value: object) -> str:
    """Name of a network interface, 1 to 15 characters, safe in nft's text (no wildcard)."""
    if not isinstance(value, str) or not _INTERFACE.match(value):
        raise ValueError(
            f"{show(value)} is not an interface name: 1 to 15 of letters, digits and _ . - @ +"
        )
    return value
