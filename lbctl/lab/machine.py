"""A machine: one lab node as a long-lived init process in namespaces of its own.

Network, mount, PID and UTS namespace; fresh /proc and /sys; a tmpfs on /run; /etc and /var as
overlays whose changes die with the machine, so that a program in it (FRR, say) finds its files
where Debian has them and leaves nothing behind; the topology's binds; /var/log bound to the lab's
log directory for the machine. The lab's own directory stays visible under /run. The network
namespace is also named in /run/netns, so `ip netns` sees it and it outlives a power cut.

Killing the init kills all that runs inside, because it is pid 1 of its PID namespace.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from lbctl.errors import LabError
from lbctl.lab import processes
from lbctl.lab.topology import NodeSpec

NETNS_DIR: Final = Path("/run/netns")

# Runs as pid 1 of the machine. Our reading of /proc/self/stat comes before the new /proc: the pid
# is the host's. Other labs' namespace names are let go of here, or this mount namespace would keep
# their networks alive after they are taken down. No IPv6 duplicate address detection: it would take
# a second of every start, link-local addresses included, and a lab's addresses are its own.
_INIT: Final = """
set -eu
name=$1 lab=$2 pidfile=$3; shift 3
read -r stat </proc/self/stat
echo "$stat" >"$pidfile.new"; mv "$pidfile.new" "$pidfile"
names() { awk '$5 ~ "^/run/netns(/|$)" {print $5}' /proc/self/mountinfo | sort -r; }
names | while read -r point; do
  umount -l "$point" 2>/dev/null || true  # its lab may just have taken it away everywhere
done
if [ -n "$(names)" ]; then echo "cannot let go of $(names)" >&2; exit 1; fi
mount -n -t tmpfs -o mode=755 tmpfs /mnt
mkdir -p "/mnt/${lab#/run/}" /mnt/lock /mnt/netns
mount -n --bind "$lab" "/mnt/${lab#/run/}"
for dir in etc var; do
  mkdir -p "/mnt/.overlay/$dir/upper" "/mnt/.overlay/$dir/work"
  chmod --reference="/$dir" "/mnt/.overlay/$dir/upper"
  mount -n -t overlay overlay -o \
    "lowerdir=/$dir,upperdir=/mnt/.overlay/$dir/upper,workdir=/mnt/.overlay/$dir/work" "/$dir"
done
mount -n --bind "$lab/logs/$name" /var/log
for bind; do
  source=${bind%%|*} rest=${bind#*|}; target=${rest%%|*} mode=${rest#*|}
  if [ ! -e "$target" ]; then
    mkdir -p "$(dirname "$target")"
    if [ -d "$source" ]; then mkdir "$target"; else : >"$target"; fi
  fi
  mount -n --bind "$source" "$target"
  if [ "$mode" = ro ]; then mount -n -o remount,bind,ro "$target"; fi
done
mount -n --move /mnt /run
mount -n -t proc proc /proc
mount -n -t sysfs sysfs /sys
echo "$name" >/proc/sys/kernel/hostname
for conf in all default; do echo 0 >"/proc/sys/net/ipv6/conf/$conf/accept_dad"; done
echo ready
exec </dev/null >/dev/null 2>&1
exec sh -c 'while :; do sleep infinity & wait; done' lab-init
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """One lab node that is (or was) running. `lab` is the lab's directory, `lab_name` its name."""

    name: str
    role: str
    lab_name: str
    lab: Path
    pod_cidr: str = ""

    @property
    def netns(self) -> Path:
        """The named network namespace."""
        return NETNS_DIR / f"{self.lab_name}-{self.name}"

    @property
    def pid_file(self) -> Path:
        """Pid file of the init."""
        return self.lab / "machines" / f"{self.name}.pid"

    @property
    def log_dir(self) -> Path:
        """Log files of this machine, on the host; inside it is /var/log."""
        return self.lab / "logs" / self.name

    def init(self) -> processes.Pid | None:
        """The init process, None while the machine is off."""
        pid = processes.read_pid_file(self.pid_file)
        return pid if pid and pid.alive() else None

    @property
    def alive(self) -> bool:
        """Whether the power is on."""
        return self.init() is not None

    @property
    def pid(self) -> int:
        """Pid of the init in the host's eyes. Raises LabError while the machine is off."""
        init = self.init()
        if init is None:
            raise LabError(f"{self.name} is off")
        return init.pid

    @property
    def addresses(self) -> tuple[str, ...]:
        """Global addresses that the kernel has now on eth*, by interface name, without lengths.

        Works while the machine is off too: the network namespace is still there.
        """
        out = json.loads(self._in_netns("ip", "-j", "address", "show", "scope", "global"))
        return tuple(
            str(info["local"])
            for link in sorted(out, key=lambda link: str(link.get("ifname", "")))
            if link.get("link_type") == "ether" and link.get("ifname", "").startswith("eth")
            for info in link.get("addr_info", ())
            if "local" in info
        )

    @property
    def address(self) -> str:
        """The first of `addresses`. Raises LabError if there is none."""
        found = self.addresses
        if not found:
            raise LabError(f"{self.name} has no address")
        return found[0]

    def _in_netns(self, *argv: str) -> str:
        command = ["nsenter", f"--net={self.netns}", "--", *argv]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if result.returncode != 0:
            raise LabError(f"{self.name}: {' '.join(argv)}: {result.stderr.strip()}")
        return result.stdout

    def command(self, *argv: str) -> list[str]:
        """The full command line that runs `argv` inside the machine, for `subprocess` and alike.

        It dies (SIGKILL) with the process that was started with it, so a time-out leaves nothing;
        not so a program that changes its user, for which the kernel forgets PR_SET_PDEATHSIG.
        Raises LabError while the machine is off.
        """
        namespaces = ["--mount", "--uts", "--net", "--pid"]
        enter = ["nsenter", "--target", str(self.pid), *namespaces, "--"]
        return [*enter, "setpriv", "--pdeathsig", "KILL", "--", *argv]

    def run(
        self,
        *argv: str,
        check: bool = True,
        timeout_s: float = 30.0,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to completion inside the machine, output captured as text.

        Raises LabError on time-out, and on a non-zero exit if `check`.
        """
        try:
            result = subprocess.run(
                self.command(*argv),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                input=input,
                stdin=None if input is not None else subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            line = " ".join(argv)
            raise LabError(f"{self.name}: {line}: no end after {timeout_s:g} s") from error
        if check and result.returncode != 0:
            said = (result.stderr or result.stdout).strip()
            raise LabError(f"{self.name}: {' '.join(argv)}: exit {result.returncode}: {said}")
        return result

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start inside the machine; `options` are `subprocess.Popen`'s."""
        return subprocess.Popen(self.command(*argv), **options)


def start(machine: Machine, spec: NodeSpec, limit_s: float = 60.0) -> None:
    """Create the namespaces and the init, and wait until it is ready. Links come later.

    Raises LabError with what the init said if it fails.
    """
    machine.log_dir.mkdir(parents=True, exist_ok=True)
    machine.pid_file.parent.mkdir(parents=True, exist_ok=True)
    _create_name(machine.netns)
    unshare = ["unshare", f"--net={machine.netns}", "--uts", "--mount", "--pid", "--fork"]
    binds = [f"{b.source}|{b.target}|{'ro' if b.read_only else 'rw'}" for b in spec.binds]
    init = ["sh", "-c", _INIT, "lab-init", machine.name, str(machine.lab), str(machine.pid_file)]
    errors = machine.lab / "machines" / f"{machine.name}.err"
    with errors.open("w+b") as stderr:
        said = _detach([*unshare, "--propagation", "private", *init, *binds], stderr, limit_s)
        if said.strip() != "ready":
            stderr.seek(0)
            why = stderr.read().decode("utf-8", "replace").strip() or "no answer"
            raise LabError(f"{machine.name} did not start: {why}")
    _in_loopback(machine)


def _create_name(path: Path) -> None:
    """The file that a network namespace is bound to. The directory may vanish under our hands."""
    for _ in range(100):
        path.parent.mkdir(mode=0o755, exist_ok=True)
        with suppress(FileNotFoundError):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o644))
            except FileExistsError as error:
                raise LabError(f"{path} exists already; is another lab of that name up?") from error
            return
    raise LabError(f"cannot create {path}")


def _detach(argv: Sequence[str], stderr: IO[bytes], limit_s: float) -> str:
    """Start as nobody's child, return the first line that it prints ("" at its end)."""
    shell = ["sh", "-c", '"$@" &', "sh", *argv]
    with subprocess.Popen(
        shell,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    ) as process:
        process.wait()
        assert process.stdout is not None
        if not processes.readable(process.stdout.fileno(), limit_s):
            return ""
        return process.stdout.readline().decode()


def _in_loopback(machine: Machine) -> None:
    machine.run("ip", "link", "set", "lo", "up")


def release_name(path: Path) -> None:
    """Let go of a named network namespace; it ends when nothing else holds it."""
    if path.exists():
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)
        path.unlink(missing_ok=True)
