"""The speaker alone against real FRR: what it promises the manager and the switch, one by one."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path as FilePath

import pytest

from lbctl.core import names, probe
from lbctl.core.announce import Paths
from lbctl.core.keys import Keys
from lbctl.core.model import Agreed, Session
from lbctl.core.pmap import PMap
from lbctl.core.virtual import Levels, VirtualHop
from manager.speaker.port import ExabgpSpeaker
from tests.routes import Route, by_prefix

from . import speaker_bed
from .speaker_bed import SPEAKER, SWITCH6, Bed, expected, frr_config, path, path6, peer

LIMIT_S = 90.0


@pytest.fixture
def bed(tmp_path: FilePath) -> Iterator[Bed]:
    """A bed with FRR running; the test starts the speaker."""
    made = Bed(tmp_path)
    try:
        made.open()
        yield made
    finally:
        made.close()


@asynccontextmanager
async def speaking(
    bed: Bed, name: str = "control-1", **more: object
) -> AsyncIterator[ExabgpSpeaker]:
    """A port, connected or not, that pings as a manager does."""
    async with ExabgpSpeaker(bed.speaker_directory, name, **more) as port:  # type: ignore[arg-type]

        async def ping() -> None:
            while True:
                port.ping(others=False)
                await asyncio.sleep(0.2)

        task = asyncio.create_task(ping())
        try:
            yield port
        finally:
            task.cancel()


async def until(condition: Callable[[], object], what: str) -> None:
    """Poll until true, without blocking the port."""
    end = time.monotonic() + LIMIT_S
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, f"waited {LIMIT_S} s for {what}"
        await asyncio.sleep(0.05)


async def settle(port: ExabgpSpeaker, number: int, sessions: int = 1) -> None:
    """Until that many sessions are up and have the number."""
    await until(lambda: sum(s.up for s in port.sessions()) == sessions, "the sessions")
    async with asyncio.timeout(LIMIT_S):
        await port.settled(number)


def neighbor(bed: Bed, address: object = SPEAKER) -> dict[str, object]:
    """The switch's view of a session."""
    done = bed.vtysh("-d", "bgpd", "-c", f"show bgp neighbors {address} json")
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found[str(address)]


async def test_settled_means_that_the_switch_has_it(bed: Bed) -> None:
    """Load, withdraw of a node, change of attributes, both families: right soon after settled."""
    bed.start_speaker()
    async with speaking(bed) as port:
        paths = frozenset(path(eip, node) for eip in range(500) for node in range(4))
        six = frozenset(path6(eip, node) for eip in range(500) for node in range(4))
        await settle(port, port.set([peer()], by_prefix(paths | six)))
        await until(lambda: bed.routes() == expected(paths), "the load")
        await until(lambda: bed.routes(6) == expected(six, version=6), "the load of IPv6")
        hops = {f"fd99::{20 + node}" for node in range(4)}
        await until(lambda: bed.kernel(6).get("2001:db8:100::1") == hops, "the switch's kernel")
        six = frozenset(p for p in six if p.node != "node-1")
        await settle(port, port.set([peer()], by_prefix(paths | six)))
        await until(lambda: bed.routes(6) == expected(six, version=6), "the withdraw of IPv6")
        assert bed.routes() == expected(paths)
        paths = frozenset(p for p in paths if p.node != "node-1")
        await settle(port, port.set([peer()], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the withdraw")
        assert bed.routes(6) == set()
        paths = frozenset(path(e, n, 10, ("64512:1",)) for e in range(500) for n in (0, 2, 3))
        await settle(port, port.set([peer()], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the change")
        assert port.sessions() == (Session("tor", True, ((4, True), (6, True)), ""),)


async def test_virtual_next_hops(bed: Bed) -> None:
    """The switch resolves them to nodes; a node out is one UPDATE a family, whatever leads there;
    after resets of every kind nothing is missing and nothing stale.
    """
    bed.config = frr_config(recursive=True)
    bed.stop("bgpd", signal.SIGKILL)
    bed.start_frr("bgpd")
    bed.start_speaker()
    four, six = ip_address("100.64.0.1"), ip_address("fd00:76::1")
    nodes, eips = range(4), range(300)

    def levels(fit: Iterable[int]) -> Paths:
        """Half of the EIPs are IPv6."""
        made, found = Levels(), {}
        for at, make in ((four, path), (six, path6)):
            paths = by_prefix(make(0, n) for n in fit)[make(0, 0).prefix]
            hop = VirtualHop(at, frozenset("abcd"), paths)
            listed = [(make(eip, 0).prefix.network_address, paths, hop) for eip in eips]
            found.update(made.routes(listed))
        return PMap(found)

    def right(fit: Iterable[int]) -> bool:
        every = [(four, path, bed.kernel()), (six, path6, bed.kernel(6))]
        for at, make, kernel in every:
            hops = {str(make(0, node).next_hop) for node in fit}
            addresses = [at, *(make(eip, 0).prefix.network_address for eip in eips)]
            if kernel != dict.fromkeys(map(str, addresses), hops):
                return False
        return True

    async with speaking(bed) as port:
        await settle(port, port.set([peer()], levels(nodes)))
        await until(lambda: right(nodes), "the load")
        before = neighbor(bed)
        await settle(port, port.set([peer()], levels((0, 1, 3))))
        await until(lambda: right((0, 1, 3)), "the node to be out of all")
        after = neighbor(bed)
        sent = [state["messageStats"]["updatesRecv"] for state in (before, after)]  # type: ignore[index]
        assert sent[1] - sent[0] == 2
        for reset in ("clear bgp *", "clear bgp * soft in", "link", "clear bgp *"):
            established = neighbor(bed)["connectionsEstablished"]
            if reset == "link":
                bed.flap()
            else:
                bed.vtysh("-d", "bgpd", "-c", reset)
            again = () if "soft" in reset else (established,)
            await until(lambda: neighbor(bed)["connectionsEstablished"] not in again, reset)  # noqa: B023
            await until(lambda: prefixes(bed, SPEAKER) == len(eips) + 3, f"all after {reset}")
            await until(lambda: right((0, 1, 3)), f"all to be right after {reset}")


async def test_a_manager_restarts_without_a_route_moving(bed: Bed) -> None:
    """Nothing is withdrawn or sent again; what the new one does not want goes."""
    bed.start_speaker()
    paths = frozenset(path(eip, node) for eip in range(50) for node in range(2))
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the load")
    before = neighbor(bed)
    fewer = frozenset(p for p in paths if p.node == "node-0")
    async with speaking(bed) as port:
        await until(lambda: port.connected, "the speaker")
        assert bed.routes() == expected(paths)
        await settle(port, port.set([peer()], by_prefix(fewer)))
        await until(lambda: bed.routes() == expected(fewer), "the difference")
    after = neighbor(bed)
    assert after["connectionsEstablished"] == before["connectionsEstablished"]
    sent = [state["messageStats"]["updatesRecv"] for state in (before, after)]  # type: ignore[index]
    assert sent[1] - sent[0] == 1, "one UPDATE withdraws 50 paths; anything more was sent again"


async def test_a_new_peer_does_not_disturb_the_others(bed: Bed) -> None:
    """IPv6 peer with a password added, changed, removed by reload; the first session stays."""
    password = "it's-a-secret!"  # FRR 8.4 takes no space
    bed.config = frr_config(ipv6_peer=True, password6=password)
    bed.stop("bgpd", signal.SIGKILL)
    bed.start_frr("bgpd")
    bed.start_speaker()
    four = peer()
    six = peer("tor6", address=SWITCH6, password=password, router_id=SPEAKER)
    paths = frozenset(path(eip, node) for eip in range(20) for node in range(2))
    async with speaking(bed) as port:
        await settle(port, port.set([four], by_prefix(paths)))
        await settle(port, port.set([four, six], by_prefix(paths)), 2)
        file = bed.speaker_directory / "exabgp.conf"
        assert file.stat().st_mode & 0o777 == 0o600
        await until(lambda: prefixes(bed, SPEAKER) == prefixes(bed, "fd99::2") == 40, "both peers")
        number = port.set([four, dataclasses.replace(six, hold_time_s=30)], by_prefix(paths))
        await until(
            lambda: neighbor(bed, "fd99::2")["connectionsEstablished"] == 2, "the new timer"
        )
        await settle(port, number, 2)
        await until(lambda: prefixes(bed, "fd99::2") == 40, "the changed peer")
        await settle(port, port.set([four], by_prefix(paths)))
        await until(lambda: prefixes(bed, "fd99::2") == 0, "the end of the second session")
        number = port.set([four, six], by_prefix(p for p in paths if p.node == "node-0"))
        await settle(port, number, 2)
        await until(lambda: prefixes(bed, "fd99::2") == 20, "the peer that came back")
    assert neighbor(bed)["connectionsEstablished"] == 1


def prefixes(bed: Bed, address: object) -> int:
    """How many IPv4 paths the switch has from a neighbour; 0 while it is not established."""
    families = neighbor(bed, address).get("addressFamilyInfo", {})
    count = families.get("ipv4Unicast", {}).get("acceptedPrefixCounter", 0)  # type: ignore[attr-defined]
    return int(count) if neighbor(bed, address)["bgpState"] == "Established" else 0


async def test_a_switch_without_add_path_gets_one_path(bed: Bed) -> None:
    """And changes in place, with no moment without a route; then ADD-PATH is agreed after all."""
    bed.config = frr_config(add_path=False)
    bed.stop("bgpd", signal.SIGKILL)
    bed.start_frr("bgpd")
    bed.start_speaker()
    paths = frozenset(path(eip, node) for eip in range(50) for node in range(3))
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        assert port.sessions()[0].add_path is False
        await until(lambda: bed.routes() == expected(paths, add_path=False), "one path each")
        fewer = frozenset(p for p in paths if p.node != "node-0")
        await settle(port, port.set([peer()], by_prefix(fewer)))
        await until(lambda: bed.routes() == expected(fewer, add_path=False), "the next path")
        bed.config = frr_config()
        bed.stop("bgpd", signal.SIGKILL)
        bed.start_frr("bgpd")
        await until(lambda: bed.routes() == expected(fewer), "all paths")
        assert port.sessions()[0].add_path is True


@pytest.mark.parametrize("agreed", [((4, True), (6, False)), ((4, False), (6, True)), ((4, True),)])
async def test_each_family_as_the_switch_takes_it(bed: Bed, agreed: Agreed) -> None:
    """ADD-PATH in one family only, or one family not at all; then the switch takes everything."""
    bed.config = frr_config(agreed=agreed)
    bed.stop("bgpd", signal.SIGKILL)
    bed.start_frr("bgpd")
    bed.start_speaker()
    modes = dict(agreed)

    def right(paths: frozenset[Route]) -> bool:
        return all(
            bed.routes(version)
            == (expected(paths, several, version) if several is not None else set())
            for version in (4, 6)
            for several in [modes.get(version)]
        )

    paths = frozenset(one(eip, n) for one in (path, path6) for eip in range(50) for n in range(3))
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        assert port.sessions()[0].agreed == agreed
        await until(lambda: right(paths), "the load")
        fewer = frozenset(p for p in paths if p.node != "node-0")
        await settle(port, port.set([peer()], by_prefix(fewer)))
        await until(lambda: right(fewer), "the withdraw")
        bed.config = frr_config()
        bed.stop("bgpd", signal.SIGKILL)
        bed.start_frr("bgpd")
        modes = {4: True, 6: True}
        await until(lambda: right(fewer), "all of both families")
        await settle(port, port.set([peer()], by_prefix(fewer)))
        assert port.sessions()[0].agreed == ((4, True), (6, True))


class Other:
    """Another manager, as far as its heartbeats go."""

    def __init__(self, bed: Bed, keys: Keys, manager: str = "control-2") -> None:
        self.keys, self.manager, self.sequence = keys, manager, 0
        with (
            FilePath(f"/run/netns/{bed.speaker}").open() as inside,
            FilePath("/proc/self/ns/net").open() as outside,
        ):
            _setns(inside.fileno())
            try:
                self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            finally:
                _setns(outside.fileno())

    async def beat(self) -> None:
        """A heartbeat every 100 ms, until cancelled."""
        while True:
            self.sequence += 1
            beat = probe.Heartbeat(self.manager, 1, self.sequence, True, True, 3, 0, frozenset())
            data = probe.encode_heartbeat(beat, self.keys.managers().signing)
            self.socket.sendto(data, (str(SPEAKER), names.SPEAKER_PEER_PORT))
            await asyncio.sleep(0.1)


def _setns(descriptor: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")


async def test_a_silent_manager_is_cut_off_only_beside_a_living_one(bed: Bed) -> None:
    """Alone: held. Heartbeats of a stranger or of itself: held. Another announces: closed."""
    bed.start_speaker()
    keys, paths = Keys(secrets.token_bytes(32)), frozenset({path(1, 1), path(2, 1)})
    async with speaking(bed, ring=keys.managers()) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the load")
    stranger = Other(bed, Keys(secrets.token_bytes(32)))
    itself = Other(bed, keys, "control-1")
    tasks = [asyncio.create_task(one.beat()) for one in (stranger, itself)]
    (runner,) = bed.descendants("runner")
    silent_s, worked_s = time.monotonic(), processor_s(runner)
    await until(lambda: time.monotonic() - silent_s > 5, "5 s of silence")
    share = (processor_s(runner) - worked_s) / (time.monotonic() - silent_s)
    assert share < 0.01, f"an idle ExaBGP took {share:.1%} of a processor"
    assert bed.routes() == expected(paths), "held while no other manager announces"
    other = Other(bed, keys)
    tasks.append(asyncio.create_task(other.beat()))
    await until(lambda: bed.routes() == set(), "the withdrawal beside a living manager")
    assert neighbor(bed)["lastNotificationReason"] == "Cease/Administrative Shutdown"
    async with speaking(bed, ring=keys.managers()) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the replay")
    for task in tasks:
        task.cancel()
    for one in (stranger, itself, other):
        one.socket.close()


def processor_s(pid: int) -> float:
    """The processor time that a process has taken, in seconds."""
    fields = FilePath(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("others", [True, False])
async def test_sigterm_says_cease_only_when_another_announces(bed: Bed, others: bool) -> None:
    """And ExaBGP and the relay are gone either way."""
    bed.start_speaker()
    async with ExabgpSpeaker(bed.speaker_directory, "control-1") as port:
        await settle(port, port.set([peer()], by_prefix({path(1, 1)})))
        port.ping(others)
        await until(lambda: bed.descendants("relay"), "the relay")
        left = bed.descendants("runner") + bed.descendants("relay")
        await until(lambda: bed.routes(), "the route")
        await asyncio.to_thread(bed.stop, "speaker")
    await until(lambda: neighbor(bed)["bgpState"] != "Established", "the end of the session")
    cease = neighbor(bed).get("lastNotificationReason") == "Cease/Administrative Shutdown"
    assert cease is others
    await until(lambda: not any(alive(pid) for pid in left), "the end of ExaBGP and relay")


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return FilePath(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_the_liveness_probe_tells_a_frozen_launcher(bed: Bed) -> None:
    """No socket: dead. Running: alive, without a manager too. Stopped: dead, though it listens."""

    def ask() -> int:
        command = (sys.executable, "-m", "manager.speaker.alive", str(bed.speaker_directory))
        return subprocess.run(command, cwd=speaker_bed.CHECKOUT, check=False).returncode

    assert await asyncio.to_thread(ask) == 1
    bed.start_speaker()
    await until(lambda: ask() == 0, "the launcher to answer")
    launcher = bed.processes["speaker"]
    launcher.send_signal(signal.SIGSTOP)
    try:
        assert await asyncio.to_thread(ask) == 1
    finally:
        launcher.send_signal(signal.SIGCONT)
    await until(lambda: ask() == 0, "the launcher to answer again")


async def test_a_frozen_exabgp_is_replaced(bed: Bed) -> None:
    """SIGSTOP for ever: it is killed, and the routes are back without help."""
    bed.start_speaker()
    paths = frozenset(path(eip, 1) for eip in range(50))
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        (frozen,) = bed.descendants("runner")
        os.kill(frozen, signal.SIGSTOP)
        await until(lambda: not alive(frozen), "the end of the frozen ExaBGP")
        await settle(port, port.set([peer()], by_prefix(paths | {path(99, 1)})))
        await until(lambda: bed.routes() == expected(paths | {path(99, 1)}), "the routes")


async def test_a_relay_that_dies_often_does_not_matter(bed: Bed) -> None:
    """Six deaths make ExaBGP end with code 0; it is started again and gets everything."""
    bed.start_speaker()
    paths = frozenset(path(eip, 1) for eip in range(50))
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        (first,) = bed.descendants("runner")
        for round_ in range(8):
            await until(lambda: bed.descendants("relay"), f"relay {round_}")
            for pid in bed.descendants("relay"):
                os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: not alive(pid), "its end")  # type: ignore[misc]
        await until(lambda: bed.descendants("runner") not in ([first], []), "another ExaBGP")
        await settle(port, port.set([peer()], by_prefix(paths | {path(99, 1)})))
        await until(lambda: bed.routes() == expected(paths | {path(99, 1)}), "the routes")


async def test_unprivileged_with_a_read_only_root(bed: Bed) -> None:
    """A uid that no passwd has, no capabilities, only the speaker's directory writable."""
    uid = "65532"
    bed.speaker_directory = bed.run_directory / "speaker"
    bed.speaker_directory.mkdir()
    os.chown(bed.speaker_directory, int(uid), int(uid))
    bed.run_directory.chmod(0o755)
    # /root is closed to others and /tmp is hidden: of these, show that uid only what it runs.
    needed = sorted({sys.base_prefix, sys.prefix, str(speaker_bed.CHECKOUT)})
    script = f"""set -e
    mount --make-rprivate /
    number=0
    for place in {" ".join(needed)}; do
        number=$((number + 1))
        mkdir -p {bed.run_directory}/kept$number
        mount --bind $place {bed.run_directory}/kept$number
    done
    mount -t tmpfs -o mode=755 none /root
    mount -t tmpfs -o mode=755 none /tmp
    number=0
    for place in {" ".join(needed)}; do
        number=$((number + 1))
        mkdir -p $place
        mount --bind {bed.run_directory}/kept$number $place
    done
    mount -o remount,ro /tmp
    mount --bind {bed.speaker_directory} {bed.speaker_directory}
    mount -o remount,bind,ro /
    exec setpriv --reuid {uid} --regid {uid} --clear-groups --no-new-privs \\
        --bounding-set=-all --inh-caps=-all "$@"
    """
    bed.speaker_prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    bed.start_speaker()
    paths = frozenset(path(eip, node) for eip in range(20) for node in range(2))
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(paths)))
        await until(lambda: bed.routes() == expected(paths), "the routes")
    (runner,) = bed.descendants("runner")
    status = FilePath(f"/proc/{runner}/status").read_text()
    assert f"Uid:\t{uid}\t{uid}" in status
    assert "CapEff:\t0000000000000000" in status
    places = ("/tmp", "/run", "/var/tmp", str(speaker_bed.CHECKOUT), str(bed.run_directory))
    enter = ("nsenter", "-t", str(runner), "-m", "-S", uid, "-G", uid, "touch")
    for place in (*places, str(bed.speaker_directory)):
        touch = await asyncio.create_subprocess_exec(*enter, f"{place}/x", stderr=-3)
        assert (await touch.wait() == 0) is (place == str(bed.speaker_directory)), place


async def test_what_is_not_the_protocol_is_refused(bed: Bed) -> None:
    """Injections and garbage on the manager's socket: no route, no crash, the next one works."""
    bed.start_speaker()
    good = frozenset({path(1, 1)})
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(good)))
    (before,) = bed.descendants("runner")
    evil: tuple[object, ...] = (
        {"op": "run", "verb": "announce", "attributes": "next-hop self", "prefixes": ["0.0.0.0/0"]},
        {"op": "peers", "peers": [{"name": "x\n}", "address": "10.99.0.1"}]},
        {"op": "peers", "peers": "all"},
        {"op": "shutdown"},
        "\x00\xff",
    )
    for one in evil:
        reader, writer = await asyncio.open_unix_connection(bed.speaker_directory / "manager.sock")
        writer.write(b'{"op":"hello","manager":"evil"}\n' + json.dumps(one).encode() + b"\n")
        async with asyncio.timeout(LIMIT_S):
            await reader.read()
        writer.close()
    assert bed.descendants("runner") == [before]
    assert bed.routes() == expected(good)
    async with speaking(bed) as port:
        await settle(port, port.set([peer()], by_prefix(good | {path(2, 1)})))
        await until(lambda: bed.routes() == expected(good | {path(2, 1)}), "the next manager")
