"""Packets that reach a machine late: rules that send them to a queue, and who holds them there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from subprocess import Popen

from lbctl.errors import LabError
from lbctl.lab.load import spawn
from lbctl.lab.machine import Machine

_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Delay:
    """One that is in place. rules: the program and its words, for each address."""

    machine: Machine
    rules: tuple[tuple[str, ...], ...]
    holder: Popen[bytes]

    def end(self) -> None:
        """Nothing is late any more; what is held comes through at once."""
        if self.machine.alive:
            for program, *rule in self.rules:
                words = ("-w", "-t", "mangle", "-D", "PREROUTING", *rule)
                self.machine.run(program, *words, check=False)  # gone, if this was begun before
        self.holder.communicate(timeout=_END_S)


def begin(machine: Machine, addresses: Iterable[str], ms: int, queue: int) -> Delay:
    """Have a machine hear these addresses so many ms late. queue: a number of its own, from 1.

    nftables' own `queue` and netem are absent from many kernels; NFQUEUE is older than both.
    Raises LabError if this kernel has no such queue either.
    """
    holder = spawn(machine, "lbctl.lab.delaying", "--queue", f"{queue}", "--ms", f"{ms}")
    if holder.stdout is None or holder.stdout.readline() != b"ready\n":
        raise LabError(f"{machine.name}: nothing can hold packets back here (NFQUEUE)")
    rules = []
    for address in sorted(addresses):
        program = "ip6tables" if ip_address(address).version == 6 else "iptables"
        target = ("-j", "NFQUEUE", "--queue-num", f"{queue}", "--queue-bypass")
        rules.append((program, "-s", address, *target))
        machine.run(program, "-w", "-t", "mangle", "-A", "PREROUTING", *rules[-1][1:])
    return Delay(machine, tuple(rules), holder)
