"""What ExaBGP has been told and has acknowledged: the speaker's memory across managers and relays.

Pure. Rules: only acknowledged commands change it; a command whose outcome was never heard makes its
routes unsure; an announce replaces what is in its slot (prefix, path-id), a withdraw empties it.
"""

from __future__ import annotations

from lbctl.core import exabgp
from lbctl.core.announce import Held
from lbctl.core.exabgp import Command, Verb

Known = dict[str, dict[str, set[str]]]  # peer -> attributes -> prefixes


class Ledger:
    """Routes per peer, sure and unsure."""

    def __init__(self) -> None:
        self._sure: Known = {}
        self._unsure: Known = {}

    def clear(self) -> None:
        """ExaBGP starts anew."""
        self._sure.clear()
        self._unsure.clear()

    def acknowledged(self, command: Command) -> None:
        """ExaBGP did it."""
        for peer in command.peers:
            self._empty(self._sure, peer, command)
            self._empty(self._unsure, peer, command)
            if command.verb is Verb.ANNOUNCE:
                _add(self._sure, peer, command.attributes, command.prefixes)

    def lost(self, command: Command) -> None:
        """Whether ExaBGP did it will never be heard."""
        for peer in command.peers:
            for attributes, prefixes in self._empty(self._sure, peer, command).items():
                _add(self._unsure, peer, attributes, prefixes)
            if command.verb is Verb.ANNOUNCE:
                _add(self._unsure, peer, command.attributes, command.prefixes)

    def doubt(self, peer: str) -> None:
        """The peer's configuration changed: its routes may be gone from ExaBGP."""
        for attributes, prefixes in self._sure.pop(peer, {}).items():
            _add(self._unsure, peer, attributes, prefixes)

    def entries(self, peers: frozenset[str]) -> list[Held]:
        """All that is known of these peers, in order."""
        held = []
        for known, sure in ((self._sure, True), (self._unsure, False)):
            for peer in sorted(peers & known.keys()):
                for attributes, prefixes in sorted(known[peer].items()):
                    if prefixes:
                        held.append(Held(peer, attributes, tuple(sorted(prefixes)), sure))
        return held

    def _empty(self, known: Known, peer: str, command: Command) -> dict[str, list[str]]:
        """Take the command's prefixes out of their slots; returns what was there."""
        slot, taken = exabgp.path_id(command.attributes), {}
        for attributes, prefixes in list(known.get(peer, {}).items()):
            if exabgp.path_id(attributes) == slot:
                taken[attributes] = [prefix for prefix in command.prefixes if prefix in prefixes]
                prefixes.difference_update(command.prefixes)
                if not prefixes:
                    del known[peer][attributes]
        return taken


def _add(
    known: Known, peer: str, attributes: str, prefixes: tuple[str, ...] | list[str] | set[str]
) -> None:
    if prefixes:
        known.setdefault(peer, {}).setdefault(attributes, set()).update(prefixes)
