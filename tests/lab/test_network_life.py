"""A lab comes and goes: whole, interrupted, killed, twice at once; and nothing of it stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lbctl.errors import LabError
from lbctl.lab.lab import Lab, take_down
from lbctl.lab.processes import members

from .rack import BARE, ROOT, SMALL, lbctl, pings, poll, traces

HOST_FILES = ("/etc/frr", "/var/log/frr", str(ROOT / "bgp-lab"))


def host_files() -> dict[str, tuple[int, int]]:
    """Size and time of every file where FRR would write, were it not kept from the host."""
    paths = [p for top in HOST_FILES for p in [Path(top), *Path(top).rglob("*")] if p.exists()]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}


def scratch_files(lab: Lab) -> set[str]:
    """What the switches' FRR keeps in /var/tmp and the host has not.

    Not compared as a whole before and after: other tests' FRR writes to the host's at any moment.
    """
    found: set[str] = set()
    for machine in lab.of_role("switch"):
        found |= set(machine.run("find", "/var/tmp/frr", "-type", "f").stdout.split())
    return found - {str(path) for path in Path("/var/tmp/frr").rglob("*")}


def test_up_and_down_leave_nothing(lab_name: str) -> None:
    before = host_files()
    lab = Lab.up(SMALL, lab_name, print)
    inits = [machine.init() for machine in lab.machines]
    everything = members([machine.netns for machine in lab.machines])
    assert all(inits)
    # FRR's daemons are there too: zebra, bgpd, staticd, vrrpd, watchfrr on each switch
    assert len(everything) > 2 * len(inits) + 10
    assert len(traces(lab_name)) > len(inits)  # or the emptiness below would mean nothing
    scratch = scratch_files(lab)
    assert scratch

    lab.down()

    assert traces(lab_name) == []
    assert [pid for pid in everything if pid.alive()] == []
    assert host_files() == before
    assert not [path for path in scratch if Path(path).exists()]
    lab.down()  # twice is no error


def test_a_second_up_of_the_same_name_is_refused_and_harms_nothing(lab_name: str) -> None:
    lab = Lab.up(BARE, lab_name, print)
    with pytest.raises(LabError, match="is up already"):
        Lab.up(BARE, lab_name, print)
    assert all(machine.alive for machine in lab.machines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
@pytest.mark.parametrize("stage", ["machines", "cables", "commands", "FRR"])
def test_interrupted_up_is_cleaned_up(lab_name: str, stage: str, number: signal.Signals) -> None:
    argv = [sys.executable, "-m", "lbctl.cli.main", "lab", "up", "--cluster", "none"]
    with subprocess.Popen(
        [*argv, "--lab", lab_name], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if stage in line:
                break
        else:
            pytest.fail(f"`lab up` never reached the stage {stage!r}")
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert traces(lab_name), "the kill came too late to leave anything"

    down = lbctl("lab", "down", "--lab", lab_name)

    assert (down.returncode, down.stderr) == (0, "")
    poll("the killed command's helpers to end", lambda: traces(lab_name) == [])


def test_up_after_a_crash_starts_afresh(lab_name: str) -> None:
    lab = Lab.up(BARE, lab_name, print)
    (lab.directory / "ready").unlink()  # as a crash before the end would have left it
    old = {machine.pid for machine in lab.machines}
    said: list[str] = []
    again = Lab.up(BARE, lab_name, said.append)
    assert "removing what an interrupted start left" in said
    assert old.isdisjoint({machine.pid for machine in again.machines})
    assert pings(again.machine("node-1"), "192.0.2.22")


def test_failed_exec_line_names_itself_and_leaves_nothing(lab_name: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.clab.yml"
    text = BARE.read_text("utf-8")
    broken.write_text(text.replace("address add 192.0.2.22/24 dev eth1", "address add nonsense"))
    with pytest.raises(LabError, match=r"node-2: ip address add nonsense: exit 1"):
        Lab.up(broken, lab_name, print)
    assert traces(lab_name) == []


def test_two_labs_at_once(new_lab: Callable[[], Lab]) -> None:
    one, two = new_lab(), new_lab()
    for lab in (one, two):
        assert pings(lab.machine("control-1"), "192.0.2.21")
    two.machine("node-1").run("ip", "address", "add", "192.0.2.77/24", "dev", "eth1")
    assert pings(two.machine("node-2"), "192.0.2.77")
    assert not pings(one.machine("node-2"), "192.0.2.77")  # the same wires would carry it

    one.down()

    assert traces(one.name) == []
    assert pings(two.machine("control-1"), "192.0.2.21")


def test_a_lab_that_is_down_frees_its_networks_while_another_runs(
    new_lab: Callable[[], Lab],
) -> None:
    """A mount namespace made later must not hold the earlier lab's network namespaces."""
    one = new_lab()
    inode = one.machine("rack").netns.stat().st_ino
    two = new_lab()
    one.down()
    for machine in two.machines:
        held = machine.run("cat", "/proc/self/mountinfo").stdout
        assert f"net:[{inode}]" not in held
        assert one.name not in held


def test_a_recycled_pid_is_never_killed(lab_name: str) -> None:
    lab = Lab.up(BARE, lab_name, print)
    stranger = subprocess.Popen(["sleep", "infinity"])
    try:
        stat = Path(f"/proc/{stranger.pid}/stat").read_text("utf-8").split()
        stat[21] = "1"  # the pid is the stranger's, the start time someone else's
        (lab.directory / "processes" / "old.pid").write_text(" ".join(stat))
        (lab.directory / "machines" / "old.pid").write_text(" ".join(stat))
        lab.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_spawned_processes_live_until_down(lab_name: str) -> None:
    lab = Lab.up(BARE, lab_name, print)
    polite = lab.spawn("polite", ["sh", "-c", "echo here; exec sleep infinity"])
    script = "trap '' TERM; echo stubborn; while :; do sleep 1; done"
    stubborn = lab.spawn("stubborn", ["sh", "-c", script], machine="node-1")
    assert lab.process_names() == ["polite", "stubborn"]
    log = lab.directory / "logs" / "polite.log"
    poll("the output of `polite` in its log", lambda: log.read_text() == "here\n")
    replaced = lab.spawn("polite", ["sleep", "infinity"])
    assert not polite.alive()
    lab.down()
    assert not replaced.alive()
    assert not stubborn.alive()


def test_commands_that_change_a_lab_exclude_each_other(lab_name: str) -> None:
    lab = Lab.up(BARE, lab_name, print)
    fd = os.open(lab.directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(LabError, match="another command"):
            take_down(lab_name)
    finally:
        os.close(fd)
