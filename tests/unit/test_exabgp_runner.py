"""What the runner adds to ExaBGP behaves, and what it repairs still does what ExaBGP promises.

In a process of its own, for the repairs change ExaBGP's classes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path as FilePath

PRELUDE = """
from types import SimpleNamespace
import sys
if {repaired}:
    from manager.speaker import runner
    runner.repair()
from exabgp.environment import getenv
from exabgp.logger import log
log.init(getenv())
from exabgp.configuration.configuration import Configuration
from exabgp.reactor.api import API
from exabgp.bgp.message import Action
from exabgp.protocol.family import AFI, SAFI
from exabgp.rib.outgoing import OutgoingRIB
api = API(None)
rib = OutgoingRIB(True, {{(AFI.ipv4, SAFI.unicast)}})
def change(verb, med, prefix="198.51.100.1/32"):
    line = f"{{verb}} attributes next-hop 192.0.2.21 path-information 7 med {{med}} nlri {{prefix}}"
    (one,) = api.api_attributes(line, [])
    one.nlri.action = Action.ANNOUNCE if verb == "announce" else Action.WITHDRAW
    return one
def sent():
    return [
        (nlri.cidr.prefix(), nlri.action == Action.ANNOUNCE, str(update.attributes).strip())
        for update in rib.updates(True) for nlri in update.nlris
    ]
"""


def run(code: str, repaired: bool = True) -> str:
    """Run code after the prelude; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(repaired=repaired) + code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=FilePath(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LAST_WINS = """
rib.add_to_rib(change("announce", 2, "198.51.100.9/32"))  # opens the bucket of MED 2 first
rib.add_to_rib(change("announce", 1))
rib.add_to_rib(change("announce", 2))
rib.add_to_rib(change("announce", 3))
rib.add_to_rib(change("withdraw", 3))
rib.add_to_rib(change("announce", 2))
print([text.split("med ")[1].split()[0] for prefix, _, text in sent() if prefix.endswith(".1/32")])
"""


def test_the_newest_change_of_a_route_is_the_only_one_sent() -> None:
    """As it is, ExaBGP sends all of them, and the last on the wire is not the newest."""
    assert run(LAST_WINS) == "['2']"
    assert run(LAST_WINS, repaired=False) != "['2']"


def test_a_withdraw_of_what_was_never_sent_is_sent_alone() -> None:
    """No announce before or after it."""
    code = """
rib.add_to_rib(change("announce", 1))
rib.add_to_rib(change("withdraw", 1))
print([up for _, up, _ in sent()], list(rib.cached_changes()))
"""
    assert run(code) == "[False] []"


def test_a_new_session_gets_all_of_it_again() -> None:
    """What was announced is kept; what was withdrawn is not."""
    code = """
for number in range(5):
    rib.add_to_rib(change("announce", number, f"198.51.100.{number}/32"))
sent()
rib.add_to_rib(change("withdraw", 3, "198.51.100.3/32"))
rib.reset()
rib.replace_restart([], [])
print(sorted(prefix for prefix, up, _ in sent() if up))
"""
    assert run(code) == str([f"198.51.100.{number}/32" for number in (0, 1, 2, 4)])


def test_sending_is_known_until_the_last_update() -> None:
    """Also when it is broken off, as a session's end does."""
    code = """
rib.add_to_rib(change("announce", 1))
rib.add_to_rib(change("announce", 2, "198.51.100.2/32"))
seen = [rib.lbctl_sending]
updates = rib.updates(True)
next(updates); seen.append(rib.lbctl_sending)
updates.close(); seen.append(rib.lbctl_sending)
print(seen, rib.pending())
"""
    assert run(code) == "[0, 1, 0] False"


def test_commands_run_in_order_and_a_failed_one_is_an_error() -> None:
    """The queue without its scans: same order, same limit per turn, same answer to a failure."""
    code = """
from exabgp.reactor.asynchronous import ASYNC
queue, seen = ASYNC(), []
queue.set_error_handler(lambda uid: seen.append(f"error {uid}"))
def steps(name, count):
    for number in range(count):
        seen.append(f"{name}{number}")
        yield False
def fails():
    raise ValueError("broken")
    yield False
queue.schedule("a", "", steps("a", 2))
queue.schedule("b", "", fails())
queue.schedule("c", "", steps("c", 1))
print(queue.run(), seen)
queue.schedule("d", "", steps("d", 60))
print(queue.run(), len([s for s in seen if s.startswith("d")]), queue.run())
"""
    expected = "False ['a0', 'a1', 'error b', 'c0']\nTrue 50 False"
    assert run(code) == expected


def test_reconnecting_is_capped() -> None:
    """ExaBGP goes up to 60 s."""
    code = """
from exabgp.reactor.delay import Delay
delay = Delay()
for _ in range(20): delay.increase()
print(delay._next)
"""
    assert run(code) == "5"
    assert int(run(code, repaired=False)) > 5


IDLE = """
import os, select, time
from exabgp.bgp.fsm import FSM
from exabgp.reactor.asynchronous import ASYNC
from exabgp.reactor.loop import Reactor
reactor = Reactor.__new__(Reactor)
reactor.asynchronous = ASYNC()
reactor.processes = SimpleNamespace(fds=[])
reactor._poller = select.poll()
reactor._busyspin, reactor.max_loop_time, reactor._sleep_time = {}, 0.1, 0.001
reactor._peers = {"peer": SimpleNamespace(fsm=FSM.ESTABLISHED)}
def turn(sleep=1):
    reactor.asynchronous.run()
    list(reactor._wait_for_io(sleep))
    return reactor.lbctl_wait_ms
"""


def test_an_idle_exabgp_sleeps_longer_and_longer() -> None:
    """To its limit, a lower one while it dials; work of a peer or of a command ends it."""
    code = """
print([turn() for _ in range(9)][-3:])
reactor.asynchronous.schedule("a", "", iter([False]))
print(turn(), turn(), turn(0), turn())
reactor._peers["other"] = SimpleNamespace(fsm=FSM.CONNECT)
print([turn() for _ in range(9)][-1])
"""
    assert run(IDLE + code) == "[127, 250, 250]\n0 1 0 1\n20"


def test_what_can_be_read_wakes_it_and_a_closed_socket_does_not() -> None:
    """ExaBGP leaves the sockets of sessions that ended in its poller: it would never sleep."""
    code = """
reader, writer = os.pipe()
reactor._poller.register(reader, select.POLLIN)
os.write(writer, b"x")
print(list(reactor._wait_for_io(1)) == [reader], reactor.lbctl_wait_ms)
os.close(reader)
print([turn() for _ in range(9)][-1])
"""
    assert run(IDLE + code) == "True 0\n250"
