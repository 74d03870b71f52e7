"""Our configuration while it is being put together, and its text.

Rules: every pool and peer carries the comments about it; the text is checked by our own parser
before anybody sees it. A restriction that cannot be expressed never widens a pool: its addresses
are then given on request only (`autoAssign: false`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Final

from lbctl.core import config
from lbctl.core.config_values import parse_hold_time, parse_range, parse_range_ends, show
from lbctl.core.imports.reading import Foreign
from lbctl.core.manifests import Place
from lbctl.errors import ConfigError

PLACEHOLDER_ASN: Final = 64512
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*|[0-9]+(\.[0-9]+){3}[0-9./-]*")
_WORDS: Final = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


@dataclass
class Item:
    """A pool or a peer: keys as they will be written, and comments above it."""

    place: Place
    keys: dict[str, object]
    notes: list[str] = field(default_factory=list)
    local_asn: int | None = None  # of a peer: what we call ourselves towards it

    def note(self, place: Place, text: str) -> None:
        """A comment about something in the foreign file."""
        self.notes.append(f"{place}: {text}")

    def leave_out(self, place: Place, found: Foreign, why: Mapping[str, str]) -> None:
        """A comment on each field that was written and has no counterpart. why: by field."""
        for name, key in found.given():
            if name in why:
                shown = "" if "password" in name else f" {_brief(place.at(key).value)}"
                self.note(place.at(key), f"not taken over{shown}: {why[name]}")


@dataclass
class Draft:
    """What has been converted so far."""

    pools: list[Item] = field(default_factory=list)
    peers: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    asns: Counter[int] = field(default_factory=Counter)  # our own, by how many say so

    def pool(self, name: str, place: Place) -> Item:
        """A new pool; its name is made one that we can have."""
        mine = _label(name, self.pools)
        item = Item(place, {"name": mine, "addresses": []})
        if mine != name:
            item.note(place, f"called {show(name)} there; Services that name it have to say {mine}")
        self.pools.append(item)
        return item

    def peer(self, name: str, place: Place, local_asn: int | None) -> Item:
        """A new peer; `local_asn` is what we call ourselves towards it."""
        item = Item(place, {"name": _label(name, self.peers)}, local_asn=local_asn)
        if local_asn is not None:
            self.asns[local_asn] += 1
        self.peers.append(item)
        return item

    def addresses(self, item: Item, place: Place, texts: Iterable[tuple[Place, str]]) -> None:
        """Add CIDRs and ranges to a pool. A CIDR with bits after the prefix is its network."""
        found = item.keys["addresses"]
        assert isinstance(found, list)
        for where, text in texts:
            try:
                whole = ip_network(text.strip(), strict=False) if "/" in text else None
                made = str(whole) if whole is not None else text.strip()
                parse_range(made)
            except ValueError as error:
                self.problems.append(where.problem(str(error)))
                continue
            if made != text.strip():
                item.note(where, f"{text.strip()} is the network {made}")
            found.append(made)
        if not found and not self.problems:
            self.problems.append(place.problem("has no addresses"))

    def without_ends(self, item: Item, place: Place, why: str) -> None:
        """Leave out the first and the last address of each CIDR that is larger than two."""
        kept: list[str] = []
        for text in _texts(item.keys["addresses"]):
            ends = parse_range_ends(text)
            if "/" not in text or ends.size <= 2:
                kept.append(text)
                continue
            kept.append(f"{ends.first + 1}-{ends.last - 1}")
        item.keys["addresses"] = kept
        item.note(place, f"the first and the last address of each CIDR are left out: {why}")

    def hold_time(self, item: Item, place: Place, seconds: int) -> None:
        """The hold time of a peer; what we refuse is left to our default."""
        try:
            item.keys["holdTime"] = f"{parse_hold_time(seconds)}s"
        except ValueError as error:
            item.note(place, f"not taken over: {error}")

    def secret(self, item: Item, place: Place) -> None:
        """A password is never copied: it belongs into a Secret."""
        name = f"bgp-{item.keys['name']}"
        item.keys["passwordSecret"] = name
        item.note(
            place,
            "put the password into a Secret: kubectl -n lbctl-system create secret generic "
            f"{name} --from-literal=password=…",
        )


def _brief(value: object) -> str:
    if isinstance(value, tuple) and all(isinstance(one, str | int) for one in value):
        return "[" + ", ".join(show(one) for one in value[:4]) + (", …]" if value[4:] else "]")
    return show(value)


def _label(name: str, items: Iterable[Item]) -> str:
    """A DNS label that none of the items has yet, as much like `name` as may be."""
    wanted = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-") or "unnamed"
    taken = {item.keys["name"] for item in items}
    numbered = (f"{wanted}-{n}" for n in range(2, len(taken) + 3))
    return next(one for one in (wanted, *numbered) if one not in taken)


def _texts(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []


def render(draft: Draft, origin: str) -> str:
    """The configuration as YAML, comments included. Raises ConfigError if it would be refused."""
    if draft.problems:
        raise ConfigError(tuple(dict.fromkeys(draft.problems)))
    asn = draft.asns.most_common(1)[0][0] if draft.asns else PLACEHOLDER_ASN
    lines = [f"# Converted by `lbctl config import` from {origin}.", *_comments(draft.notes, "")]
    lines += ["version: 1", *_list("pools", draft.pools, "")]
    notes = [] if draft.asns else ["no AS number of our own was found: put yours here"]
    peers, left = _reachable(draft, asn)
    notes += left
    if not peers:
        notes.append("no switch was found: name yours under peers, or nothing is announced")
    lines += ["bgp:", *_comments(notes, "  "), f"  asn: {asn}", *_list("peers", peers, "  ")]
    text = "\n".join(lines) + "\n"
    try:
        config.parse(text, "result")
    except ConfigError as error:
        said = "what it was converted to is not valid here:"
        raise ConfigError((said, *error.problems, *text.splitlines())) from None
    return text


def _reachable(draft: Draft, asn: int) -> tuple[list[Item], list[str]]:
    """The peers that a single AS of ours, one session per address, can have; why not the rest."""
    kept: dict[object, Item] = {}
    left: list[str] = []
    for item in draft.peers:
        address, local = item.keys["address"], item.local_asn
        if local not in (None, asn):
            left.append(f"{item.place}: left out: we are AS {asn} to all peers, not {local}")
        elif address in kept:
            left.append(f"{item.place}: left out: one session to {address} is enough")
        else:
            kept[address] = item
    return list(kept.values()), left


def _comments(notes: Iterable[str], indent: str) -> list[str]:
    printable = ("".join(c if c.isprintable() else " " for c in note) for note in notes)
    return [f"{indent}# {note}" for note in printable]


def _list(key: str, items: list[Item], indent: str) -> list[str]:
    if not items:
        return [f"{indent}{key}: []"]
    lines = [f"{indent}{key}:"]
    for item in items:
        lines += _comments(item.notes, f"{indent}  ")
        for n, (name, value) in enumerate(item.keys.items()):
            lines.append(f"{indent}  {'- ' if n == 0 else '  '}{name}: {_yaml(value)}")
    return lines


def _yaml(value: object) -> str:
    """In flow style; text is quoted where it could be read as something else."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(k)}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(one) for one in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
