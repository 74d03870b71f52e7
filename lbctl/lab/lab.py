"""A lab: a topology that runs, with its state on disk so that any later command can find it.

Everything that is made is written down before it is made (`/run/lbctl-lab/NAME/`), so `down`
works at any moment: after Ctrl-C in the middle of `up`, after a crash, twice in a row. One command
at a time changes a lab: it holds a lock on the lab's directory.

Layout: `lab.json` (topology as it is now, name, file), `machines/NODE.pid`, `processes/NAME.pid`,
`logs/NODE/…` (inside the machine: /var/log), `logs/NAME.log` (processes of the lab itself).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from lbctl.errors import LabError
from lbctl.lab import machine as machines_
from lbctl.lab import network, processes, switch
from lbctl.lab.machine import Machine
from lbctl.lab.topology import (
    ROUTED_ROLES,
    Addition,
    NodeSpec,
    Topology,
    from_json,
    load,
    next_node,
    plays,
)

STATE_ROOT: Final = Path("/run/lbctl-lab")
Progress = Callable[[str], None]

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")
_WORKERS: Final = 8
_WORKER: Final = "lbctl-lab"


class Lab:
    """A lab on this machine. Make one with `up` or `load`; not for use from several threads."""

    def __init__(self, name: str, topology: Topology, source: Path) -> None:
        self.name = name
        self.topology = topology
        self.source = source

    # --- finding -------------------------------------------------------------------------------

    @classmethod
    def load(cls, name: str) -> Lab:
        """The lab of that name. Raises LabError if it is not up."""
        lab = cls._read(name)
        if lab is None:
            raise LabError(f"lab {name!r} is not up; `lbctl lab up` starts one")
        return lab

    @classmethod
    def _read(cls, name: str) -> Lab | None:
        try:
            data = json.loads((directory_of(name) / "lab.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return cls(name, from_json(data["topology"]), Path(data["source"]))

    @staticmethod
    def names() -> list[str]:
        """Labs that have state on this machine, also half-built ones."""
        with suppress(OSError):
            return sorted(path.name for path in STATE_ROOT.iterdir() if path.is_dir())
        return []

    @property
    def directory(self) -> Path:
        """The lab's state directory, visible inside its machines at the same path."""
        return directory_of(self.name)

    @property
    def machines(self) -> list[Machine]:
        """All machines, in the topology's order, those without power too."""
        return [self._machine(spec) for spec in self.topology.nodes]

    def machine(self, name: str) -> Machine:
        """One machine. Raises LabError for an unknown name."""
        return self._machine(self.topology.node(name))

    def of_role(self, role: str) -> list[Machine]:
        """The machines of a role, hosts as what they are too, in the topology's order."""
        return [machine for machine in self.machines if plays(machine.role, role)]

    def _machine(self, spec: NodeSpec) -> Machine:
        return Machine(spec.name, spec.role, self.name, self.directory, spec.pod_cidr)

    # --- up and down ---------------------------------------------------------------------------

    @classmethod
    def up(cls, topology: Path, name: str, progress: Progress) -> Lab:
        """Build network and switches from a topology file. Takes away what it made if it fails.

        `progress` gets one short line per stage. Raises LabError; also if that lab is up.
        """
        spec = load(topology)
        directory_of(name)
        lab = cls(name, spec, topology.resolve())
        with _locked(name):
            if (lab.directory / "ready").exists():
                raise LabError(f"lab {name!r} is up already; `lbctl lab down --lab {name}` ends it")
            if cls._read(name) is not None:
                progress("removing what an interrupted start left")
                cls._remove(name)
                lab.directory.mkdir(parents=True, exist_ok=True)
            try:
                lab._build(progress)
            except BaseException:
                _join_workers()
                cls._remove(name)
                raise
        return lab

    def _build(self, progress: Progress) -> None:
        self._write()
        nodes = self.topology.nodes
        progress(f"starting {len(nodes)} machines")
        self._each(nodes, self._start_machine)
        progress(f"laying {len(self.topology.links)} cables")
        network.wire(self.topology.links, self._netns)
        progress("running the topology's commands")
        self._each(nodes, self._execute)
        switches = [spec for spec in nodes if spec.role == "switch"]
        if switches:
            progress(f"starting FRR on {', '.join(spec.name for spec in switches)}")
            self._each(switches, lambda spec: switch.start(self._machine(spec)))
        (self.directory / "ready").touch()

    def _start_machine(self, spec: NodeSpec) -> None:
        machines_.start(self._machine(spec), spec)

    def _execute(self, spec: NodeSpec) -> None:
        machine = self._machine(spec)
        for line in spec.exec:
            machine.run(*shlex.split(line))

    def _each(self, specs: Sequence[NodeSpec], work: Callable[[NodeSpec], None]) -> None:
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix=_WORKER) as pool:
            for _ in pool.map(work, specs):
                pass

    def _netns(self, node: str) -> Path:
        return self.machine(node).netns

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for part in ("machines", "processes", "logs"):
            (self.directory / part).mkdir(exist_ok=True)
        data = {"source": str(self.source), "topology": self.topology.to_json()}
        new = self.directory / "lab.json.new"
        new.write_text(json.dumps(data, indent=1), "utf-8")
        new.replace(self.directory / "lab.json")

    def down(self) -> None:
        """End everything of this lab: processes, namespaces, mounts, files. Idempotent."""
        take_down(self.name)

    @classmethod
    def _remove(cls, name: str) -> None:
        directory = directory_of(name)
        own = [pid for file in directory.glob("processes/*.pid") if (pid := _pid(file))]
        processes.stop(own)
        inits = [pid for file in directory.glob("machines/*.pid") if (pid := _pid(file))]
        processes.stop(inits, grace_s=0)
        lab = cls._read(name)
        names = [machine.netns for machine in lab.machines] if lab else []
        processes.stop(processes.members(names), grace_s=0)
        for path in names:
            machines_.release_name(path)
        shutil.rmtree(directory, ignore_errors=True)
        for parent in (STATE_ROOT, machines_.NETNS_DIR):
            with suppress(OSError):
                parent.rmdir()

    # --- processes of the lab itself -------------------------------------------------------------

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        machine: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> processes.Pid:
        """Start a process that lives until `down` (SIGTERM, 5 s later SIGKILL).

        On the host, or inside `machine` (then it ends with its power). Output goes to
        `logs/NAME.log`. Another process of that name is stopped first.
        """
        pid_file = self.directory / "processes" / f"{name}.pid"
        if old := _pid(pid_file):
            processes.stop([old])
        log = self.directory / "logs" / f"{name}.log"
        command = self.machine(machine).command(*argv) if machine else list(argv)
        return processes.spawn(command, pid_file=pid_file, log=log, env=env)

    def process(self, name: str) -> processes.Pid | None:
        """A process that `spawn` started, None if it does not run."""
        pid = _pid(self.directory / "processes" / f"{name}.pid")
        return pid if pid and pid.alive() else None

    def process_names(self) -> list[str]:
        """Names of the running processes that `spawn` started."""
        names = (path.stem for path in (self.directory / "processes").glob("*.pid"))
        return sorted(name for name in names if self.process(name))

    # --- changes ---------------------------------------------------------------------------------

    def add_node(self) -> Machine:
        """A node like the last one, on the same bridge; its neighbours get routes to its pods.

        All or nothing: if it fails, the lab is as it was. Raises LabError.
        """
        with _locked(self.name):
            self.topology = before = self.load(self.name).topology
            new = next_node(before)
            bridge = self._bridge_for(new)
            self.topology = replace(
                before, nodes=(*before.nodes, new.spec), links=(*before.links, new.link)
            )
            self._write()
            try:
                self._join(new, bridge)
            except BaseException:
                self._part(new)
                self.topology = before
                self._write()
                raise
        return self.machine(new.spec.name)

    def _bridge_for(self, new: Addition) -> int | None:
        """The bridge of the last node's port, None where nodes hang on no bridge.

        Raises LabError for a port that lost its bridge (an interrupted `power_on`): the new node
        would be up and reach nobody.
        """
        last = self.of_role("node")[-1].name
        port = self.topology.links_of(last)[0].far(last)
        bridge = network.bridge_of(port, self._netns)
        if bridge is None and self.machine(port.node).role == "lan":
            raise LabError(
                f"{port.node}:{port.interface}, the port of {last}, is in no bridge: cut the power "
                f"of {last} and switch it on again, or start the lab anew"
            )
        return bridge

    def _join(self, new: Addition, bridge: int | None) -> None:
        port = new.link.far(new.spec.name)
        beside = {link.far(port.node).node for link in self.topology.links_of(port.node)}
        beside.discard(new.spec.name)
        others = [m for m in self.machines if m.role in ROUTED_ROLES and m.name in beside]
        self._start_machine(new.spec)
        network.wire([new.link], self._netns)
        if bridge is not None:
            network.plug(port, bridge, self._netns)
        self._execute(new.spec)
        for machine in others:
            for route in new.routes if machine.alive else ():
                machine.run(*shlex.split(route))

    def _part(self, new: Addition) -> None:
        """Undo `_join`, however far it came; routes that others got lead nowhere, as before."""
        machine = self._machine(new.spec)
        init = machine.init()
        processes.stop([init] if init else [], grace_s=0)
        processes.stop(processes.members([machine.netns]), grace_s=0)
        network.unplug(new.link.far(machine.name), self._netns)
        machines_.release_name(machine.netns)
        machine.pid_file.unlink(missing_ok=True)

    def power_cut(self, name: str) -> None:
        """Cut a machine's power: it falls silent in one instant, then its processes die.

        Far ends keep carrier and its address stays unanswered, as behind a real switch; no FIN,
        RST or Cease gets out. Its network namespace stays, empty, until `power_on` or `down`.
        """
        machine = self.machine(name)
        init = machine.init()
        if init is None:
            raise LabError(f"{name} is off already")
        ends = [e for link in self.topology.links_of(name) for e in link.ends() if e.node == name]
        network.silence([end.interface for end in ends], machine.netns)
        processes.stop([init], grace_s=0)
        processes.stop(processes.members([machine.netns]), grace_s=0)

    def power_on(self, name: str) -> None:
        """Boot a machine whose power was cut: same cables and MAC addresses, all else new."""
        machine = self.machine(name)
        if machine.alive:
            raise LabError(f"{name} is on")
        links = self.topology.links_of(name)
        with _locked(self.name):
            ports = [link.far(name) for link in links]
            bridges = [network.bridge_of(port, self._netns) for port in ports]
            for port in ports:
                network.unplug(port, self._netns)
            machines_.release_name(machine.netns)
            spec = self.topology.node(name)
            self._start_machine(spec)
            network.wire(links, self._netns)
            for port, bridge in zip(ports, bridges, strict=True):
                if bridge is not None:
                    network.plug(port, bridge, self._netns)
            self._execute(spec)
            if spec.role == "switch":
                switch.start(machine)

    # --- questions -------------------------------------------------------------------------------

    def kernel_routes(self, switch_name: str, prefix: str) -> list[str]:
        """Next hops of a prefix in a switch's kernel, sorted; [] without a route."""
        return switch.kernel_routes(self.machine(switch_name), prefix)


def directory_of(name: str) -> Path:
    """State directory of a lab. Raises LabError for a name that cannot be one."""
    if not _NAME.fullmatch(name):
        raise LabError(f"lab name {name!r}: lower-case letters, digits and dashes, at most 24")
    return STATE_ROOT / name


def _join_workers() -> None:
    """Wait for every worker. Ctrl-C in `submit` can leave one that its own pool does not know."""
    for thread in threading.enumerate():
        if thread.name.startswith(_WORKER):
            thread.join()


def take_down(name: str) -> bool:
    """Take down a lab in whatever state it is. False if there was nothing."""
    if not directory_of(name).exists():
        return False
    with _locked(name):
        Lab._remove(name)
    return True


def _pid(file: Path) -> processes.Pid | None:
    return processes.read_pid_file(file)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold the lab's directory; create it. Raises LabError when another command holds it."""
    directory = directory_of(name)
    for _ in range(100):
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            break
    else:
        raise LabError(f"cannot create {directory}")
    with held(fd, f"another command is changing lab {name!r}; try again"):
        yield


@contextmanager
def held(fd: int, otherwise: str) -> Iterator[None]:
    """Hold an open file or directory, then close it. LabError(otherwise) if others hold it."""
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LabError(otherwise) from error
        yield
    finally:
        os.close(fd)
