"""Runs ExaBGP 5.0.15 in this process, with what it lacks.

Usage: python -m manager.speaker.runner FILE PARENT (the pid of the launcher).

What is added and repaired, each in one function here; `tests/unit/test_exabgp_runner.py` holds that
it still behaves:

- The API command `lbctl-barrier NONCE`: answered in order with the other commands, it says for each
  neighbour whether it is up and whether all is on the wire (`done` says only "in the RIB"), and
  counts reloads (ExaBGP forgets a SIGUSR1 that comes while updates wait).
- The API command `lbctl-end-of-rib ADDRESS…` ends a restart (RFC 4724) for neighbours, in all their
  families, as soon as all is on their wire. ExaBGP's own is answered out of order when it fails.
- A session that is ended by command, by its peer's removal or by a change of it ends with Cease,
  with graceful restart too, where ExaBGP is silent: the switch would keep the routes. What was
  ended by command is not dialled again.
- Routes are kept and sent by `manager.speaker.outbox`. ExaBGP keeps four objects per route and
  neighbour, and sends two changes of one route by when their *attributes* were first seen: the
  older may win on the wire.
- A helper that died while ExaBGP wrote to it does not stop the peers once it is started again.
- Reconnecting after 1 s at first and 5 s at last (ExaBGP: 60 s): a switch that restarts is back in
  seconds, and has no route until we are.
- Its timers go by the monotonic clock. By the wall clock, one that is set forward ends every
  session, one that is set back stops keepalives, and dialling for as long as it went back.
- Commands are run as they come, without a scan of all of them and a new event loop per turn.
- It sleeps until there is something to do; ExaBGP looks a thousand times a second, and sleeps
  while commands wait.
- Its sessions go first (`lbctl.precedence`): a host's full uplink costs none its hold time.
- It dies with the launcher (PR_SET_PDEATHSIG), so that no second ExaBGP meets it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Final

from lbctl.core.exabgp import BARRIER, END_OF_RIB
from lbctl.precedence import prefer
from manager.speaker.outbox import Group, Outbox

EXABGP_VERSION: Final = "5.0.15"
RECONNECT_S: Final = (1.0, 5.0)  # the first wait, the longest
IDLE_MS: Final = (
    250  # keepalives and hold times, counted in whole seconds, are looked at this often
)
BLOCKED_MS: Final = 5  # a peer has something to send, or to say, and its socket takes nothing
DIAL_MS: Final = 20  # a socket that is connecting is not polled for: look so often
MAX_GROUPS: Final = 4096
MAX_ATTRIBUTES: Final = 1500  # letters; packed they are at most twice as many octets
PR_SET_PDEATHSIG: Final = 1
PEER_DECONFIGURED: Final = 3  # Cease's subcode, RFC 4486


def _session(peer: Any, told: set[str]) -> dict[str, Any]:
    """What the barrier says of a peer. told: the neighbours whose `up` event was written."""
    from exabgp.bgp.fsm import FSM

    out = peer.neighbor.rib.outgoing
    if peer.fsm != FSM.ESTABLISHED or str(peer.neighbor["peer-address"]) not in told:
        return {"up": False, "agreed": None, "flushed": True}
    agreed = peer.proto.negotiated
    families = {
        f"{afi} {safi}": bool(agreed.addpath.send(afi, safi)) for afi, safi in agreed.families
    }
    return {"up": True, "agreed": families, "flushed": out.flushed}


def add_barrier() -> None:
    """Register the barrier command, and count reloads for it."""
    from exabgp.reactor.api.command.command import Command
    from exabgp.reactor.api.processes import Processes
    from exabgp.reactor.loop import Reactor

    counts = {"reloads": 0, "failures": 0}
    told: set[str] = set()  # neighbours whose `up` event was written, and no `down` since
    load, up, down = Reactor.reload, Processes.up, Processes.down

    def reload(self: Any) -> bool:
        loaded = bool(load(self))
        counts["reloads" if loaded else "failures"] += 1
        return loaded

    def tell_up(self: Any, neighbor: Any) -> None:
        told.add(str(neighbor["peer-address"]))
        up(self, neighbor)

    def tell_down(self: Any, neighbor: Any, reason: str) -> None:
        told.discard(str(neighbor["peer-address"]))
        down(self, neighbor, reason)

    def barrier(self: Any, reactor: Any, service: str, line: str, use_json: bool) -> bool:
        def answer() -> Iterator[bool]:
            peers = {
                str(peer.neighbor["peer-address"]): _session(peer, told)
                for peer in reactor._peers.values()
                if not peer.stopping()
            }
            text = json.dumps({BARRIER: line.split(" ")[-1], "peers": peers, **counts})
            reactor.processes.write(service, text)
            reactor.processes.answer_done(service)
            yield True

        reactor.asynchronous.schedule(service, line, answer())
        return True

    Reactor.reload, Processes.up, Processes.down = reload, tell_up, tell_down
    Command.register(BARRIER, False)(barrier)


class _Ends(deque[Any]):
    """The End-of-RIBs that a neighbour is to get: none as long as something else waits for it."""

    def __init__(self, rib: Any) -> None:
        super().__init__()
        self._rib = rib

    def __bool__(self) -> bool:
        return len(self) > 0 and bool(self._rib.outgoing.flushed)


def add_end_of_rib() -> None:
    """Register the command that sends it: when all is on the wire that came before, or since."""
    from exabgp.bgp.fsm import FSM
    from exabgp.protocol.family import AFI, SAFI, Family
    from exabgp.reactor.api.command.command import Command

    def end(self: Any, reactor: Any, service: str, line: str, use_json: bool) -> bool:
        def answer() -> Iterator[bool]:
            named = line.split(" ")[1:]
            for peer in reactor._peers.values():
                neighbor = peer.neighbor
                if peer.fsm == FSM.ESTABLISHED and str(neighbor["peer-address"]) in named:
                    if not isinstance(neighbor.eor, _Ends):
                        neighbor.eor = _Ends(neighbor.rib)
                    neighbor.eor.append(Family(AFI.undefined, SAFI.undefined))
            reactor.processes.answer_done(service)
            yield True

        reactor.asynchronous.schedule(service, line, answer())
        return True

    Command.register(END_OF_RIB, False)(end)


def say_cease() -> None:
    """End no session silently, and dial none that was ended by command."""
    from exabgp.bgp.fsm import FSM
    from exabgp.bgp.message.open.capability import Capability
    from exabgp.reactor.peer import Peer

    main, teardown, remove = Peer._main, Peer.teardown, Peer.remove

    def _main(self: Any) -> Iterator[Any]:
        # What was agreed is kept elsewhere: from here on this says only how the session is to end.
        self.proto.negotiated.sent_open.capabilities.pop(Capability.CODE.GRACEFUL_RESTART, None)
        yield from main(self)

    def _teardown(self: Any, code: int, restart: bool = True) -> None:
        teardown(self, code, False)

    def _remove(self: Any) -> None:
        if self.fsm == FSM.ESTABLISHED and self.neighbor["capability"]["graceful-restart"]:
            teardown(self, PEER_DECONFIGURED, False)
            self.neighbor.rib.uncache()
        else:
            remove(self)

    Peer._main, Peer.teardown, Peer.remove = _main, _teardown, _remove


class Changes:
    """The commands that announce and withdraw, on our RIB.

    Their attributes are read by ExaBGP's own parser, once for each text; their prefixes by us.
    """

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}  # by attributes text

    def command(self, api: Any, reactor: Any, service: str, line: str, use_json: bool) -> bool:
        """Queue it, as ExaBGP's own commands do."""
        reactor.asynchronous.schedule(service, line, self._run(api, reactor, service, line))
        return True

    def _run(self, api: Any, reactor: Any, service: str, line: str) -> Iterator[bool]:
        try:
            self._change(api, reactor, service, line)
            reactor.processes.answer_done(service)
        except (ArithmeticError, KeyError, OSError, ValueError):
            reactor.processes.answer_error(service)
        yield True

    def _change(self, api: Any, reactor: Any, service: str, line: str) -> None:
        from exabgp.reactor.api.command.limit import extract_neighbors, match_neighbors

        descriptions, command = extract_neighbors(line)
        peers = match_neighbors(reactor.peers(service), descriptions)
        verb, _, rest = command.partition(" ")
        attributes, _, prefixes = rest.partition(" nlri ")
        listed = prefixes.split()
        if not peers or not listed or len(attributes) > MAX_ATTRIBUTES:
            raise ValueError("no such neighbor, no prefix, or attributes that fill a message")
        group = self._group(api, attributes, listed[0])
        routes = [group.route(prefix) for prefix in listed]
        for neighbor in [reactor.configuration.neighbors[peer] for peer in peers]:
            outbox = neighbor.rib.outgoing
            (outbox.announce if verb == "announce" else outbox.withdraw)(group, routes)

    def _group(self, api: Any, attributes: str, prefix: str) -> Group:
        found = self._groups.get(attributes)
        if found is None:
            (change,) = api.api_attributes(f"announce {attributes} nlri {prefix}", [])
            nlri = change.nlri
            hop = nlri.nexthop.ton(None, nlri.afi)
            family, path_id = nlri.family().afi_safi(), nlri.path_info.path_info
            found = Group(family, path_id, hop, change.attributes)
            if len(self._groups) >= MAX_GROUPS:
                self._groups.clear()
            self._groups[attributes] = found
        return found


def keep_routes_packed() -> None:
    """Our RIB in place of ExaBGP's, and the two commands that change it."""
    import exabgp.rib
    from exabgp.reactor.api.command.command import Command

    exabgp.rib.OutgoingRIB = Outbox
    command = partial(Changes().command)  # ExaBGP hangs a name on it: a bound method takes none
    for verb in ("announce", "withdraw"):
        Command.register(f"{verb} attributes")(command)


def forgive_helpers() -> None:
    """Let a helper that was started again count as whole: ExaBGP stops the peers for ever else."""
    from exabgp.reactor.api.processes import Processes

    start = Processes._start

    def _start(self: Any, process: str) -> None:
        self._broken = [other for other in self._broken if other != process]
        start(self, process)

    Processes._start = _start


def ignore_clock_steps() -> None:
    """Hold times, keepalives and the back-off count what has passed, whatever the time of day."""
    from exabgp.bgp import timer
    from exabgp.reactor import delay

    for module in (timer, delay):
        module.time = SimpleNamespace(time=time.monotonic)


def reconnect_soon() -> None:
    """Another back-off: at once, then by a fifth longer each time."""
    from exabgp.reactor.delay import Delay

    first_s, longest_s = RECONNECT_S

    def increase(self: Any) -> None:
        self._time = time.monotonic() + self._next
        self._next = min(max(first_s, self._next * 1.2), longest_s)

    Delay.increase = increase


def run_commands() -> None:
    """Run the queue of commands as it is: ExaBGP scans it and makes an event loop in every turn."""
    from exabgp.reactor.asynchronous import ASYNC

    def run(self: Any) -> bool:
        self.lbctl_ran = bool(self._async)
        for _ in range(self.LIMIT):
            if not self._async:
                return False
            uid, callback = self._async[0]
            try:
                next(callback)
            except StopIteration:
                self._async.popleft()
            except Exception:  # noqa: BLE001 - as ExaBGP does: the command failed, say so and go on
                self._async.popleft()
                self._notify_error(uid)
        return True

    ASYNC.lbctl_ran = False
    ASYNC.run = run


def sleep_when_idle() -> None:
    """Wait the longer, the more turns in a row had nothing to do: each turn visits every peer.

    Sockets and helpers wake it at once, and what commands changed is looked at in the next turn.
    """
    from exabgp.bgp.fsm import FSM
    from exabgp.reactor.loop import Reactor

    def wait_for_io(self: Any, sleep: int) -> Iterator[int]:
        sent = sum(peer.stats["send-update"] for peer in self._peers.values())
        if self.asynchronous.lbctl_ran or sent != self.lbctl_sent:
            self.lbctl_wait_ms, self.lbctl_sent = 0, sent
        else:
            dialling = any(peer.fsm != FSM.ESTABLISHED for peer in self._peers.values())
            limit = BLOCKED_MS if sleep == 0 else DIAL_MS if dialling else IDLE_MS
            self.lbctl_wait_ms = min(2 * self.lbctl_wait_ms + 1, limit)
        for descriptor, event in self._poller.poll(self.lbctl_wait_ms):
            self.lbctl_wait_ms = 0
            if event & (select.POLLIN | select.POLLPRI):
                yield descriptor
            elif event & select.POLLNVAL and descriptor not in self.processes.fds:
                self._poller.unregister(descriptor)  # of a session that ended; ExaBGP keeps it
            else:
                self._prevent_spin()

    Reactor.lbctl_wait_ms, Reactor.lbctl_sent = 0, 0
    Reactor._wait_for_io = wait_for_io


def prefer_sessions() -> None:
    """Mark what is sent to switches as network control, as other BGP speakers do."""
    from exabgp.reactor.network import outgoing

    create = outgoing.create

    def preferred(afi: Any, interface: Any = None) -> Any:
        io = create(afi, interface)
        prefer(io)
        return io

    outgoing.create = preferred


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when the one that started it dies, or end now if it is dead already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def repair() -> None:
    """All of it. SystemExit if ExaBGP is not the version that this was written for."""
    if version("exabgp") != EXABGP_VERSION:
        sys.exit(f"the speaker needs exabgp {EXABGP_VERSION}, not {version('exabgp')}")
    add_barrier()
    add_end_of_rib()
    say_cease()
    keep_routes_packed()
    forgive_helpers()
    ignore_clock_steps()
    reconnect_soon()
    run_commands()
    sleep_when_idle()
    prefer_sessions()


def main() -> int:
    """Run `exabgp server FILE`."""
    file, parent = sys.argv[1:]
    die_with_parent(int(parent))
    from exabgp.application.main import main as exabgp_main

    repair()
    sys.argv = ["exabgp", "server", file]
    return int(exabgp_main() or 0)


if __name__ == "__main__":
    sys.exit(main())
