"""An interface that is taken down, and brought back with the addresses and routes that went."""

from __future__ import annotations

import json

from lbctl.lab.machine import Machine

Command = tuple[str, ...]


def down(machine: Machine, interface: str) -> tuple[Command, ...]:
    """Take it down; the commands that bring back what the kernel forgets then.

    Those are IPv6 addresses, and routes that someone wrote (a daemon's are the daemon's to write
    again). A host's network configuration does the same.
    """
    lost: list[Command] = []
    said = machine.run("ip", "-6", "-j", "address", "show", "dev", interface, "scope", "global")
    for link in json.loads(said.stdout):
        for address in filter(None, link.get("addr_info", ())):  # those of other scopes are empty
            words = (f"{address['local']}/{address['prefixlen']}", "dev", interface, "nodad")
            lost.append(("ip", "-6", "address", "replace", *words))
    for family in ("-4", "-6"):
        shown = machine.run("ip", family, "route", "show", "dev", interface, "proto", "boot")
        for route in shown.stdout.splitlines():
            lost.append(("ip", family, "route", "replace", *route.split(), "dev", interface))
    machine.run("ip", "link", "set", interface, "down")
    return tuple(lost)


def up(machine: Machine, interface: str, lost: tuple[Command, ...]) -> None:
    """Bring it back. lost: what `down` returned."""
    machine.run("ip", "link", "set", interface, "up")
    for command in lost:
        machine.run(*command)
