"""Pods' networks and volumes inside a node: the work of a CNI plug-in and of a volume manager.

A pod has a namespace with `eth0`, its address as a host route, and the node as gateway; the node
has one veth and one host route per pod. Volumes live below one directory of the node's `/run`.

Rules: standard library and `ip` only; runs in the node's single-threaded runtime.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypedDict

from lbctl.lab.kubelet import linux

_IP: Final = "/usr/sbin/ip"
_GATEWAY6: Final = "fe80::1"


class PodAddress(TypedDict):
    """An address of a pod and, for IPv4, the gateway that the node answers as."""

    address: str
    gateway: str
    version: int


class File(TypedDict):
    """A file of a secret, configMap or projected volume. `data` is base64."""

    data: str
    mode: int


def prepare_node() -> None:
    """What every CNI asks of a node: forward packets between its interfaces."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        with suppress(FileNotFoundError):
            Path(f"/proc/sys/net/{name}").write_text("1")


def interface(uid: str) -> str:
    """Name of the node's end of a pod's veth."""
    return f"pod{hashlib.sha256(uid.encode()).hexdigest()[:10]}"


def _batch(lines: Sequence[str], netns: int | None = None, share: Sequence[int] = ()) -> None:
    """Run `ip -batch`, in `netns` if given, which may name the descriptors `share`.

    Raises OSError with what ip said.
    """

    def enter() -> None:
        if netns is not None:
            linux.setns(netns, linux.CLONE_NEWNET)

    run = subprocess.run(
        [_IP, "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=False,
        pass_fds=share,
        preexec_fn=enter,
    )
    if run.returncode:
        raise OSError(f"ip: {run.stderr.strip()}")


class Sandboxes:
    """The network namespaces of this node's pods, held open by file descriptors."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def fd(self, uid: str) -> int:
        """The namespace of a pod. Raises ValueError if it has none."""
        if uid not in self._fds:
            raise ValueError(f"pod {uid} has no network")
        return self._fds[uid]

    def create(self, uid: str, addresses: Sequence[PodAddress]) -> None:
        """Make a pod's network; one that exists already is kept. Raises OSError."""
        if uid in self._fds:
            return
        linux.unshare(linux.CLONE_NEWNET)
        try:
            netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            linux.setns(self._home, linux.CLONE_NEWNET)
        link = interface(uid)
        try:
            _batch(self._node_side(link, netns, addresses), share=[netns])
            _batch(self._pod_side(addresses), netns)
        except OSError:
            os.close(netns)
            raise
        self._fds[uid] = netns

    @staticmethod
    def _node_side(link: str, netns: int, addresses: Sequence[PodAddress]) -> list[str]:
        peer = f"/proc/self/fd/{netns}"
        lines = [f"link add {link} type veth peer name eth0 netns {peer}"]
        for entry in addresses:
            if entry["version"] == 4:
                lines.append(f"address add {entry['gateway']}/32 dev {link}")
            else:
                lines.append(f"address add {_GATEWAY6}/64 dev {link} nodad")
        lines.append(f"link set {link} up")
        for entry in addresses:
            lines.append(f"route replace {entry['address']} dev {link}")
        return lines

    @staticmethod
    def _pod_side(addresses: Sequence[PodAddress]) -> list[str]:
        lines = ["link set lo up"]
        for entry in addresses:
            if entry["version"] == 4:
                lines.append(f"address add {entry['address']}/32 dev eth0")
            else:
                lines.append(f"address add {entry['address']}/128 dev eth0 nodad")
        lines.append("link set eth0 up")
        for entry in addresses:
            if entry["version"] == 4:
                lines.append(f"route add {entry['gateway']} dev eth0 scope link")
                lines.append(f"route add default via {entry['gateway']} dev eth0")
            else:
                lines.append(f"route add default via {_GATEWAY6} dev eth0")
        return lines

    def remove(self, uid: str) -> None:
        """Take a pod's network away, veth and routes with it."""
        netns = self._fds.pop(uid, None)
        if netns is not None:
            os.close(netns)
            # the namespace may outlive its last descriptor by a moment; the link must not
            with suppress(OSError):
                _batch([f"link delete {interface(uid)}"])


class Volumes:
    """Pods' volumes below `base`."""

    def __init__(self, base: str) -> None:
        self._base = Path(base) / "pods"

    def _place(self, uid: str, name: str) -> Path:
        place = self._base / uid / name
        if place.parent.parent != self._base or name in ("", ".", ".."):
            raise ValueError(f"not a volume name: {name!r}")
        return place

    def directory(self, uid: str, name: str, group: int | None) -> str:
        """An emptyDir (tmpfs, as /run is), writable for all as in Kubernetes, `group` as owner."""
        place = self._place(uid, name)
        place.mkdir(parents=True, exist_ok=True)
        if group is not None:
            os.chown(place, -1, group)
        place.chmod(0o2777 if group is not None else 0o777)
        return str(place)

    def write(self, uid: str, name: str, files: Mapping[str, File], group: int | None) -> str:
        """A volume of files. An update is one rename of the `..data` link, as the kubelet's."""
        place = self._place(uid, name)
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o755)
        number = 1 + max((int(old.name[3:]) for old in place.glob("..v[0-9]*")), default=0)
        fresh = place / f"..v{number}"
        for path, content in sorted(files.items()):
            _write_file(fresh, path, content, group)
        fresh.mkdir(exist_ok=True)
        link = place / "..data_tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(fresh.name)
        link.rename(place / "..data")
        self._names(place, {path.split("/")[0] for path in files})
        for old in place.glob("..v[0-9]*"):
            if old != fresh:
                shutil.rmtree(old)
        return str(place)

    @staticmethod
    def _names(place: Path, wanted: set[str]) -> None:
        for entry in place.iterdir():
            if not entry.name.startswith("..") and entry.name not in wanted:
                entry.unlink()
        for name in sorted(wanted):
            if not os.path.lexists(place / name):
                (place / name).symlink_to(f"..data/{name}")

    def remove(self, uid: str) -> None:
        """Delete all volumes of a pod."""
        shutil.rmtree(self._place(uid, "x").parent, ignore_errors=True)


def _write_file(root: Path, path: str, content: File, group: int | None) -> None:
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "" in parts:
        raise ValueError(f"not a file name for a volume: {path!r}")
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(base64.b64decode(content["data"]))
    mode = content["mode"]
    if group is not None:
        os.chown(target, -1, group)
        mode |= 0o440
    target.chmod(mode)


def host_path(path: str, kind: str) -> str:
    """The node's `path` for a hostPath volume. Only below /run may it be made: the rest is shared.

    Raises ValueError for one that is missing, or would have to be made elsewhere.
    """
    clean = os.path.normpath(path)
    if kind in ("DirectoryOrCreate", "FileOrCreate") and not os.path.lexists(clean):
        if not clean.startswith(("/run/", "/var/run/")):
            raise ValueError(f"hostPath {path}: a lab node may create it below /run only")
        if kind == "DirectoryOrCreate":
            Path(clean).mkdir(parents=True)
        else:
            Path(clean).touch(mode=0o644)
    if not Path(clean).exists():
        raise ValueError(f"hostPath {path} is not there and its type {kind!r} does not create it")
    return clean
