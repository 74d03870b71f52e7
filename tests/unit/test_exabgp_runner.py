"""What the runner adds to ExaBGP behaves, and what it repairs still does what ExaBGP promises.

In a process of its own, for the repairs change ExaBGP's classes.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path as FilePath

from manager.speaker.runner import EXABGP_VERSION

# What the runner replaces parts of, or stands in for, as ExaBGP 5.0.15 has it.
READ = {
    "bgp/timer.py": "3ae52b9ba3019bc8",
    "bgp/message/open/capability/capabilities.py": "a4fadbac10b5b001",
    "bgp/message/update/__init__.py": "437c91aab7bd04c5",
    "reactor/api/command/announce.py": "c5dbde71fff5bf58",
    "reactor/api/command/limit.py": "ed3ac4c991e0027f",
    "reactor/api/processes.py": "22e6356630081860",
    "reactor/asynchronous.py": "6cd687ee1e958089",
    "reactor/delay.py": "65622a4d1b2718be",
    "reactor/loop.py": "1ce862d263ca6c20",
    "reactor/network/outgoing.py": "6ee7b917ee6f1966",
    "reactor/peer.py": "d4352d7c7ae1b0b3",
    "reactor/protocol.py": "e9ca1d552d24651e",
    "rib/__init__.py": "c058fa4c5e3fdace",
    "rib/outgoing.py": "9bfb0cecd20f0a6d",
}

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
api = API(None)
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


WIRE = """
from exabgp.bgp.message import Update
from exabgp.bgp.message.open.asn import ASN
from exabgp.bgp.message.direction import Direction
from exabgp.reactor.api.command.command import Command
from manager.speaker.outbox import Outbox
FOUR, SIX = (AFI.ipv4, SAFI.unicast), (AFI.ipv6, SAFI.unicast)
box, answers = Outbox(True, [FOUR, SIX]), []
neighbor = SimpleNamespace(rib=SimpleNamespace(outgoing=box))
reactor = SimpleNamespace(
    peers=lambda service: ["neighbor 10.0.0.1 local-ip 10.0.0.2"],
    configuration=SimpleNamespace(neighbors={"neighbor 10.0.0.1 local-ip 10.0.0.2": neighbor}),
    asynchronous=SimpleNamespace(schedule=lambda service, line, work: list(work)),
    processes=SimpleNamespace(
        answer_done=lambda service: answers.append("done"),
        answer_error=lambda service: answers.append("error"),
    ),
)
def command(text):
    api.response(reactor, "lbctl", text, False)
add_path = SimpleNamespace(send=lambda *_: True, receive=lambda *_: True)
session = SimpleNamespace(
    families=[FOUR, SIX], addpath=add_path, msg_size=4096, local_as=ASN(64512), peer_as=ASN(64500),
    asn4=True, nexthop=[], cached_attributes=None, neighbor=None,
)
def sent():
    for section in box.updates(True):
        for message in section.messages(session):
            update = Update.unpack_message(message[19:], Direction.OUT, session)
            for nlri in update.nlris:
                number = int.from_bytes(nlri.path_info.path_info, "big")
                yield nlri.cidr.prefix(), number, nlri.action == Action.ANNOUNCE, str(nlri.nexthop)
            yield str(update.attributes).strip()
"""


def test_exabgp_reads_what_was_sent_as_it_was_commanded() -> None:
    """Both families, announced and withdrawn, by ExaBGP's own parser."""
    code = """
four = "attributes next-hop 192.0.2.21 path-information 7 med 5 community [ 1:1 2:2 ] nlri"
six = "attributes next-hop 2001:db8::21 path-information 8 nlri"
command(f"neighbor 10.0.0.1 announce {four} 198.51.100.1/32 198.51.100.2/32")
command(f"neighbor 10.0.0.1 announce {six} 2001:db8:1::1/128")
command(f"neighbor 10.0.0.1 withdraw {four} 198.51.100.2/32")
command(f"neighbor 10.0.0.1 withdraw {six} 2001:db8:1::2/128")
command(f"neighbor 10.0.0.9 announce {four} 198.51.100.3/32")
command(f"neighbor 10.0.0.1 announce {four} 198.51.100.300/32")
command("neighbor 10.0.0.1 announce attributes nonsense nlri 198.51.100.3/32")
print(*sent(), answers, sep=chr(10))
"""
    assert run(WIRE + code).splitlines() == [
        "('198.51.100.1/32', 7, True, '192.0.2.21')",
        "origin igp as-path ( 64512 ) med 5 community [ 1:1 2:2 ]",
        "('2001:db8:1::1/128', 8, True, '2001:db8::21')",
        "origin igp as-path ( 64512 )",
        "('198.51.100.2/32', 7, False, 'no-nexthop')",
        "",
        "('2001:db8:1::2/128', 8, False, 'no-nexthop')",
        "",
        "['done', 'done', 'done', 'done', 'error', 'error', 'error']",
    ]


def test_end_of_rib_waits_until_a_session_has_all() -> None:
    """Answered in its turn, for all families that a session has; nobody else hears it."""
    code = """
from collections import deque
from exabgp.bgp.fsm import FSM
from exabgp.reactor.asynchronous import ASYNC
def peer(address, state=FSM.ESTABLISHED, flushed=True):
    class Neighbor(dict):
        rib, eor = SimpleNamespace(outgoing=SimpleNamespace(flushed=flushed)), deque()
    neighbor = Neighbor({"peer-address": address})
    return SimpleNamespace(fsm=state, neighbor=neighbor)
peers = [peer("10.0.0.1"), peer("10.0.0.2", FSM.OPENCONFIRM), peer("10.0.0.3", flushed=False)]
peers += [peer("10.0.0.4")]
answers, queue = [], ASYNC()
reactor = SimpleNamespace(
    _peers=dict(enumerate(peers)),
    asynchronous=queue,
    processes=SimpleNamespace(answer_done=lambda service: answers.append("done")),
)
api.response(reactor, "lbctl", "lbctl-end-of-rib 10.0.0.1 10.0.0.2 10.0.0.3", False)
print(answers)
while queue.run():
    pass
due = [(one.afi, one.safi) for one in peers[0].neighbor.eor]
print(answers, [len(peer.neighbor.eor) for peer in peers], due == [(AFI.undefined, SAFI.undefined)])
print([bool(peer.neighbor.eor) for peer in peers])
peers[2].neighbor.rib.outgoing.flushed = True
print(bool(peers[2].neighbor.eor))
"""
    assert run(code).splitlines() == [
        "[]",
        "['done'] [1, 0, 1, 0] True",
        "[True, False, False, False]",
        "True",
    ]


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


def test_reconnecting_soon_at_first_and_seldom_at_last() -> None:
    """ExaBGP: four times within 7 s, and up to 60 s later."""
    code = """
from exabgp.reactor.delay import Delay
delay, waits = Delay(), []
for _ in range(20): delay.increase(); waits.append(delay._next)
print(sum(sum(waits[:n]) < 7 for n in range(20)), waits[-1])
"""
    assert run(code) == "5 5.0"
    assert run(code, repaired=False) == "4 60"


def test_a_clock_that_is_set_ends_no_session_and_stops_no_dialling() -> None:
    """Forward: no hold time runs out. Back: keepalives are due, and the back-off ends in time."""
    code = """
import time
from exabgp.bgp.timer import ReceiveTimer, SendTimer
from exabgp.reactor.delay import Delay
receive = ReceiveTimer(lambda: "", 9, 4, 0)
send, delay = SendTimer(lambda: "", SimpleNamespace(keepalive=lambda: -1)), Delay()  # due at once
delay.increase()
clock = time.time
time.time = lambda: clock() + 3600
receive.check_ka_timer()
time.time = lambda: clock() - 3600
print(send.need_ka(), delay.backoff())
"""
    assert run(code) == "True False"
    assert run(code.replace("receive.check", "#"), repaired=False) == "False True"


def test_sessions_are_network_control() -> None:
    code = """
import socket
from exabgp.reactor.network import outgoing
for family in AFI.ipv4, AFI.ipv6:
    io = outgoing.create(family)
    six = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
    of = six if family == AFI.ipv6 else (socket.IPPROTO_IP, socket.IP_TOS)
    print(io.getsockopt(*of), io.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY))
"""
    assert run(code).split() == ["192", "6"] * 2
    assert run(code, repaired=False).split() == ["0", "0"] * 2


def test_exabgp_is_the_one_that_the_runner_was_written_for() -> None:
    """Before these digests are changed: read each named file beside the runner and the outbox."""
    exabgp = distribution("exabgp")
    found = {
        name: hashlib.sha256(FilePath(str(exabgp.locate_file(f"exabgp/{name}"))).read_bytes())
        for name in READ
    }
    other = sorted(name for name in READ if found[name].hexdigest()[:16] != READ[name])
    assert not other, f"ExaBGP {exabgp.version} is not {EXABGP_VERSION} as read, in {other}"


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
def peer(fsm):
    return SimpleNamespace(fsm=fsm, stats={"send-update": 0})
reactor._peers = {"peer": peer(FSM.ESTABLISHED)}
def turn(sleep=1):
    reactor.asynchronous.run()
    list(reactor._wait_for_io(sleep))
    return reactor.lbctl_wait_ms
"""


def test_an_idle_exabgp_sleeps_longer_and_longer() -> None:
    """Commands and UPDATEs wake it; it sleeps less while it dials or a socket takes nothing."""
    code = """
print([turn() for _ in range(9)][-3:])
reactor.asynchronous.schedule("a", "", iter([False]))
print(turn(), turn())
reactor._peers["peer"].stats["send-update"] += 1
print(turn(0), [turn(0) for _ in range(5)][-1])
reactor._peers["other"] = peer(FSM.CONNECT)
print([turn() for _ in range(9)][-1])
"""
    assert run(IDLE + code) == "[127, 250, 250]\n0 1\n0 5\n20"


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


def test_it_ends_at_once_if_its_launcher_is_dead_already() -> None:
    """One that was killed while this process started: a second ExaBGP would speak for ever."""
    command = [sys.executable, "-m", "manager.speaker.runner", "/nonexistent", "1"]
    done = subprocess.run(command, cwd=FilePath(__file__).parents[2], check=False, timeout=120)
    assert done.returncode == 1
