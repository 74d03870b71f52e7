"""The node's runtime in a bare machine: what a container may and may not do, and the pod server."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from lbctl.errors import LabError
from lbctl.lab.kubelet.runtime import Runtime
from lbctl.lab.kubelet.sandbox import File, PodAddress

from .kubelet_node import Node, program, served

ADDRESS = PodAddress(address="10.99.1.2", gateway="10.99.1.1", version=4)


class Bed:
    """A machine, its runtime, and the exits that it reported."""

    def __init__(self, node: Node, logs: Path) -> None:
        self.node = node
        self.logs = logs
        self.exits: dict[str, int] = {}
        self.runtime = Runtime(node.name, self.exits.__setitem__)

    def log(self, name: str) -> str:
        return (self.logs / name / "main.log").read_text()

    async def until(self, what: str, look: Callable[[], object], limit_s: float = 30.0) -> None:
        deadline = time.monotonic() + limit_s
        while not look():
            assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
            await asyncio.sleep(0.01)

    async def pod(self, name: str = "pod", udp: int = 0) -> None:
        await self.runtime.sandbox(name, [ADDRESS])
        await self.runtime.launch(f"{name}/main", served(name, 8080, udp=udp))


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.close()


@pytest.fixture
async def bed(node: Node, tmp_path: Path) -> AsyncIterator[Bed]:
    made = Bed(node, tmp_path)
    await made.runtime.start(node, tmp_path)
    yield made
    await made.runtime.stop()


async def finished(bed: Bed, script: str, **changes: object) -> str:
    """What a shell script said as a container, once it is over."""
    await bed.runtime.launch("uid/main", program("main", ["sh", "-c", script], **changes))
    await bed.until("the container to end", lambda: "uid/main" in bed.exits)
    return bed.log("main")


async def test_an_unprivileged_container_has_nothing(bed: Bed) -> None:
    said = await finished(
        bed, "id -u; id -g; id -G; grep -E '^(Cap|NoNew)' /proc/self/status; echo $$; hostname"
    )
    lines = said.splitlines()
    assert lines[:3] == ["65532", "65532", "65532"]
    values = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert all(int(value, 16) == 0 for name, value in values.items() if name.startswith("Cap"))
    assert values["NoNewPrivs"] == "1"
    assert "1" in lines  # its shell is the first process of its own PID namespace


async def test_root_with_one_capability_has_that_one(bed: Bed) -> None:
    said = await finished(
        bed,
        "grep ^Cap /proc/self/status; ip link add x0 type veth peer name x1 && echo made; "
        "chown 1 /run/v && echo chowned",
        uid=0,
        gid=0,
        capabilities=["NET_ADMIN"],
        mounts=[await _volume(bed)],
    )
    values = dict(line.split(":\t") for line in said.splitlines() if ":\t" in line)
    net_admin = f"{1 << 12:016x}"
    assert values["CapEff"] == values["CapBnd"] == values["CapPrm"] == net_admin
    assert "made" in said
    assert "chowned" not in said


async def _volume(bed: Bed, group: int | None = None) -> dict[str, object]:
    source = await bed.runtime.directory("uid", "v", group)
    return {"source": source, "target": "/run/v", "readonly": False}


async def test_the_root_is_read_only_and_holds_nothing_of_the_machine(bed: Bed) -> None:
    bed.node.run("touch", "/run/secret-of-the-machine")
    said = await finished(
        bed,
        "for f in /x /tmp/x /run/x /usr/x /etc/x /proc/sys/net/ipv4/ip_forward; do "
        "  (echo 1 >$f) 2>/dev/null && echo wrote $f; done; ls -A /run /tmp /home /root",
        uid=0,
        gid=0,
    )
    assert "wrote" not in said
    assert "secret" not in said


async def test_without_read_only_root_tmp_is_writable_and_private(bed: Bed) -> None:
    said = await finished(bed, "echo 1 >/tmp/x && cat /tmp/x; touch /usr/x", readonly=False)
    assert said.startswith("1\n")
    assert not Path("/usr/x").exists()
    assert "Read-only file system" in said or "Permission denied" in said


async def test_an_empty_dir_is_shared_by_fs_group(bed: Bed) -> None:
    volume = await _volume(bed, group=4242)
    said = await finished(
        bed, "touch /run/v/f && stat -c '%g' /run/v/f", mounts=[volume], groups=[4242]
    )
    assert said == "4242\n"


async def test_a_mount_point_that_the_machine_lacks_is_made(bed: Bed) -> None:
    path = await bed.runtime.files("uid", "conf", _files(a=b"one"), None)
    mount = {"source": path, "target": "/etc/not/there", "readonly": True}
    said = await finished(
        bed, "cat /etc/not/there/a; test -e /etc/passwd && echo too", mounts=[mount]
    )
    assert said == "onetoo\n"
    assert not Path("/etc/not").exists()


def _files(**content: bytes) -> dict[str, File]:
    return {
        name: File(data=base64.b64encode(data).decode(), mode=0o644)
        for name, data in content.items()
    }


async def test_a_volume_changes_whole_under_a_running_container(bed: Bed) -> None:
    path = await bed.runtime.files("uid", "conf", _files(a=b"1", b=b"1"), None)
    mount = {"source": path, "target": "/run/conf", "readonly": True}
    script = "while :; do cat /run/conf/..data/a /run/conf/..data/b; echo; done"
    await bed.runtime.launch("uid/main", program("main", ["sh", "-c", script], mounts=[mount]))
    await bed.until("the old content", lambda: "11\n" in bed.log("main"))
    await bed.runtime.files("uid", "conf", _files(a=b"2", c=b"2"), None)
    names = bed.node.run("ls", path).split()
    assert names == ["a", "c"]
    assert bed.node.run("cat", f"{path}/a", f"{path}/c") == "22"
    await bed.runtime.signal("uid/main", signal.SIGKILL)
    await bed.until("the container to end", lambda: bed.exits.get("uid/main") == 137)


async def test_volume_names_and_files_cannot_leave_their_place(bed: Bed) -> None:
    with pytest.raises(LabError, match="volume name"):
        await bed.runtime.directory("uid", "../../etc", None)
    with pytest.raises(LabError, match="file name"):
        await bed.runtime.files("uid", "v", {"../x": _files(x=b"")["x"]}, None)
    with pytest.raises(LabError, match="below /run"):
        await bed.runtime.host_path("/usr/lib/new", "DirectoryOrCreate")


async def test_a_command_that_is_not_there_is_an_error_with_its_name(bed: Bed) -> None:
    with pytest.raises(LabError, match="No such file"):
        await bed.runtime.launch("uid/main", program("main", ["no-such-program"]))
    await bed.runtime.launch("uid/main", program("main", ["true"]))  # the name is free again


async def test_exec_sees_the_container_and_is_ended_in_time(bed: Bed) -> None:
    await bed.runtime.launch("uid/main", program("main", ["sleep", "600"]))
    code, said = await bed.runtime.execute("uid/main", ["sh", "-c", "id -u; ls /proc; exit 3"], 30)
    assert code == 3
    assert said.splitlines()[0] == "65532"
    assert {"1"} <= set(said.split())
    code, _ = await bed.runtime.execute("uid/main", ["sleep", "600"], 0.1)
    assert code is None


async def test_nothing_outlives_the_first_process(bed: Bed) -> None:
    inode = await bed.runtime.launch(
        "uid/main", program("main", ["sh", "-c", "setsid sleep 600 & setsid sleep 600 & wait"])
    )
    await bed.until("three processes", lambda: len(_members(inode)) == 3)
    await bed.runtime.signal("uid/main", signal.SIGKILL)
    await bed.until("the container to end", lambda: "uid/main" in bed.exits)
    assert _members(inode) == []


def _members(inode: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "ns/pid").stat().st_ino == inode:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


async def test_a_power_cut_takes_everything(bed: Bed) -> None:
    await bed.pod()
    inode = await bed.runtime.launch("uid/main", program("main", ["sleep", "600"]))
    asked = asyncio.create_task(bed.runtime.execute("uid/main", ["sleep", "600"], 600))
    await bed.until("the command to run", lambda: len(_members(inode)) > 1)
    os.kill(bed.node.pid, signal.SIGKILL)
    await asyncio.wait_for(bed.runtime.lost.wait(), 30)
    with pytest.raises(LabError, match="no power"):
        await asked
    await bed.until("its processes to be gone", lambda: not _members(inode))


async def test_a_pods_server_says_who_it_is(bed: Bed) -> None:
    await bed.pod(udp=53)
    url = "http://10.99.1.2:8080"
    assert (
        bed.node.run("curl", "-s", f"{url}/a", f"{url}/b") == "pod 10.99.1.1 /a\npod 10.99.1.1 /b\n"
    )
    assert bed.node.run("curl", "-s", "-X", "POST", "-d", "x" * 5000, f"{url}/p") == (
        "pod 10.99.1.1 /p\n"
    )
    assert len(bed.node.run("curl", "-s", f"{url}/bytes/3000000")) == 3_000_000
    ask = "import socket; s=socket.socket(2,2); s.settimeout(20); s.connect(('10.99.1.2',53)); "
    ask += "s.send(b'hello'); print(s.recv(99).decode())"
    assert bed.node.run("python3", "-c", ask) == "pod 10.99.1.1 hello\n"


_TALK = """
import socket, sys, time
s = socket.create_connection(('10.99.1.2', 8080), timeout=60)
def ask(path):
    s.sendall(b'GET %s HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' % path)
    return s.recv(65536)
assert b'keep-alive' in ask(b'/1')
print('open', flush=True); sys.stdin.readline()
end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        socket.create_connection(('10.99.1.2', 8080), timeout=60).close()
    except ConnectionRefusedError:
        print('refused', flush=True)
        break
    except ConnectionResetError:
        pass  # it was in the queue of a listener that closed in this moment
assert b'Connection: close' in ask(b'/2'), 'not told to close'
assert s.recv(1) == b'', 'not closed'
"""


async def test_a_pod_ends_gracefully(bed: Bed) -> None:
    await bed.pod()
    argv = bed.node.command("python3", "-c", _TALK)
    pipe = asyncio.subprocess.PIPE
    talk = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    assert talk.stdin is not None
    assert talk.stdout is not None
    assert await asyncio.wait_for(talk.stdout.readline(), 30) == b"open\n"
    await bed.runtime.signal("pod/main", signal.SIGTERM)
    assert "pod/main" not in bed.exits  # a connection is open: it waits
    talk.stdin.write(b"\n")
    out, _ = await asyncio.wait_for(talk.communicate(), 60)
    assert out == b"refused\n"
    assert talk.returncode == 0
    await bed.until("the pod to end", lambda: bed.exits.get("pod/main") == 0)


async def test_a_removed_pod_leaves_no_link_and_no_process(bed: Bed) -> None:
    await bed.pod()
    assert "10.99.1.2" in bed.node.run("ip", "route")
    await bed.runtime.remove("pod")
    await bed.until("its server to end", lambda: "pod/main" in bed.exits)
    assert "10.99.1.2" not in bed.node.run("ip", "route")
    await bed.pod()  # and the name can be used again
