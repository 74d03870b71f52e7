"""Two managers and four nodes in namespaces, real datagrams: faults, and what follows from them.

Power is cut by dropping every packet in the node's namespace, so that nothing answers and nothing
is told: no carrier change, no RST, no ICMP error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODES = ["n1", "n2", "n3", "n4"]
ADDRESS = {name: f"192.0.2.{21 + number}" for number, name in enumerate(NODES)}
MANAGERS = {"m1": "192.0.2.11", "m2": "192.0.2.12"}
LIMIT_S = 60.0
CUT = "add table inet cut; add chain inet cut {0} {{ type filter hook {0} priority -400; }}; "
CUT += "add rule inet cut {0} drop"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


class Speaker:
    """A process in a namespace and the JSON lines that it has said."""

    def __init__(self, namespace: str, *arguments: str) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m"]
        self.process = subprocess.Popen(
            [*command, "tests.lab.probe_process", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.said: list[dict[str, object]] = []
        self.other: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.said.append(json.loads(line))
            else:
                self.other.append(line)

    def last(self, key: str) -> dict[str, object]:
        return next((said for said in reversed(self.said) if key in said), {})

    def state(self, node: str) -> tuple[str, bool]:
        views = self.last("views").get("views", {})
        assert isinstance(views, dict)
        state, held, _, _ = views.get(node, ["none", False, True, 0])
        return state, held

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Bed:
    """The network, the processes and the faults."""

    def __init__(self) -> None:
        self.prefix = f"pr{os.getpid() % 100000}-"
        self.processes: dict[str, Speaker] = {}
        run("ip", "netns", "add", f"{self.prefix}lan")
        self._in("lan", "ip", "link", "add", "br0", "type", "bridge")
        self._in("lan", "ip", "link", "set", "br0", "up")
        for name, address in (*MANAGERS.items(), *ADDRESS.items()):
            self._plug(name, address)

    def _in(self, name: str, *command: str) -> None:
        run("ip", "netns", "exec", f"{self.prefix}{name}", *command)

    def _plug(self, name: str, address: str) -> None:
        run("ip", "netns", "add", f"{self.prefix}{name}")
        lan, own = f"{self.prefix}lan", f"{self.prefix}{name}"
        peer = ["type", "veth", "peer", "name", "eth0", "netns", own]
        run("ip", "-n", lan, "link", "add", name, *peer)
        run("ip", "-n", lan, "link", "set", name, "master", "br0", "up")
        run("ip", "-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            run("ip", "-n", own, "link", "set", link, "up")

    def start(self, name: str, *options: str) -> Speaker:
        namespace = f"{self.prefix}{name}"
        if name in ADDRESS:
            process = Speaker(namespace, "agent", name, ",".join(NODES), *options)
        else:
            other = next(a for n, a in MANAGERS.items() if n != name)
            targets = [f"{n}={a}" for n, a in ADDRESS.items()]
            process = Speaker(namespace, "manager", name, other, *targets)
        self.processes[name] = process
        return process

    def cut(self, *names: str) -> float:
        for name in names:
            self._in(name, "nft", "; ".join(CUT.format(hook) for hook in ("input", "output")))
        return time.monotonic()

    def mend(self, *names: str) -> None:
        for name in names:
            self._in(name, "nft", "delete table inet cut")

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()
        for name in (*ADDRESS, *MANAGERS, "lan"):
            run("ip", "netns", "del", f"{self.prefix}{name}")

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        end_s = time.monotonic() + LIMIT_S
        while not holds():
            told = {name: (p.said[-3:], p.other) for name, p in self.processes.items()}
            assert time.monotonic() < end_s, f"waited {LIMIT_S} s for {what}: {told}"
            time.sleep(0.02)

    def both(self, node: str, state: str) -> Callable[[], bool]:
        return lambda: all(self.processes[m].state(node) == (state, False) for m in MANAGERS)

    def down(self, *names: str) -> Callable[[], bool]:
        """Every agent that is heard has exactly these in its down set."""
        want = sorted(names)
        alive = [node for node in NODES if node not in names]
        return lambda: all(self.processes[n].last("down").get("down", []) == want for n in alive)


@pytest.fixture
def bed() -> Iterator[Bed]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made = Bed()
    try:
        for name in (*ADDRESS, *MANAGERS):
            made.start(name)
        for node in NODES:
            made.wait(f"{node} Up", made.both(node, "Up"))
        yield made
    finally:
        made.stop()


def test_power_cut_of_a_node_and_its_return(bed: Bed) -> None:
    cut_s = bed.cut("n2")
    bed.wait("n2 Down at both managers", bed.both("n2", "Down"))
    bed.wait("n2 in every down set", bed.down("n2"))
    for name in (*MANAGERS, "n1", "n3", "n4"):
        said = bed.processes[name].said
        first = next(s["at_s"] for s in said if s["at_s"] > cut_s)  # type: ignore[operator]
        print(f"{name}: first change {first - cut_s:.3f} s after the cut")  # type: ignore[operator]
    bed.mend("n2")
    bed.wait("n2 Up again", bed.both("n2", "Up"))
    bed.wait("n2 out of every down set", bed.down())


def test_frozen_agent_is_silent_but_not_gone(bed: Bed) -> None:
    agent = bed.processes["n3"].process
    before = [len(bed.processes[m].said) for m in MANAGERS]
    agent.send_signal(signal.SIGSTOP)
    bed.wait("n3 AgentSilent", bed.both("n3", "AgentSilent"))
    agent.send_signal(signal.SIGCONT)
    bed.wait("n3 Up", bed.both("n3", "Up"))
    for manager, start in zip(MANAGERS, before, strict=True):
        for said in bed.processes[manager].said[start:]:
            assert said["views"]["n3"][0] in ("Up", "AgentSilent")  # type: ignore[index]
            assert said["views"]["n3"][3] == 1  # type: ignore[index]
    assert all(bed.processes[n].last("down") == {} for n in NODES)


def test_a_manager_cut_off_holds_what_it_announces(bed: Bed) -> None:
    start = len(bed.processes["m1"].said)
    bed.cut("m1")
    cut_off = bed.processes["m1"]
    bed.wait("all held", lambda: all(cut_off.state(n) == ("Suspect", True) for n in NODES))
    for said in bed.processes["m1"].said[start:]:
        for state, held, _, _ in said["views"].values():  # type: ignore[attr-defined]
            assert state == "Up" or held, "withdrew a node although only the manager was cut off"
    assert all(bed.processes["m2"].state(n) == ("Up", False) for n in NODES)
    bed.mend("m1")
    for node in NODES:
        bed.wait(f"{node} Up", bed.both(node, "Up"))


def test_most_nodes_cut_at_once_and_both_managers_agree(bed: Bed) -> None:
    bed.cut("n1", "n2", "n3")
    for node in ("n1", "n2", "n3"):
        bed.wait(f"{node} Down", bed.both(node, "Down"))
    assert bed.both("n4", "Up")()
    # More than half: the agents follow, as both managers say so.
    gone = ["n1", "n2", "n3"]
    bed.wait("n4 to hear of it", lambda: bed.processes["n4"].last("down").get("down") == gone)


def test_one_manager_restarted_beside_a_dead_node(bed: Bed) -> None:
    """A fresh manager that knows nothing yet must not undo the down set."""
    bed.cut("n2")
    bed.wait("n2 in every down set", bed.down("n2"))
    bed.processes["m1"].stop()
    marks = {n: len(bed.processes[n].said) for n in NODES}
    bed.start("m1")
    bed.wait("n2 Down at the new manager", bed.both("n2", "Down"))
    for node in ("n1", "n3", "n4"):
        later = [said["down"] for said in bed.processes[node].said[marks[node] :]]
        assert all("n2" in down for down in later), later  # type: ignore[operator]


def test_rebooted_node_has_confirmed_nothing_until_it_says_so(bed: Bed) -> None:
    """Back after a power cut with a new agent: never Up with the list of the old one."""
    bed.cut("n2")
    bed.wait("n2 Down", bed.both("n2", "Down"))
    bed.processes["n2"].stop()
    starts = {m: len(bed.processes[m].said) for m in MANAGERS}
    bed.start("n2", "--empty")
    bed.mend("n2")
    for manager, start in starts.items():
        process = bed.processes[manager]

        def returned(process: Speaker = process) -> bool:
            return process.state("n2") == ("Up", False)

        bed.wait(f"n2 Up at {manager}", returned)
        for said in process.said[start:]:
            assert said["views"]["n2"][0] != "Up" or said["views"]["n2"][3] == 0  # type: ignore[index]
