"""Clocks of our own processes that can be set, with libfaketime: the host's clock is shared.

Rules: the library is loaded through the environment in the pod template, as anyone could do it in a
cluster; what it tells the process is read from a file in a directory that the container may write,
so a step happens while it runs. Where durations stay true, Python's `time.sleep` fails (EINVAL,
libfaketime 0.9.10); ours never call it. Source: faketime(1), libfaketime's README.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from lbctl.core import names
from lbctl.errors import DrillError, MissingFeature
from lbctl.lab.api import wait
from lbctl.lab.drill.site import WORKLOADS, Site

_STARTS_S: Final = 10.0  # in which a container is there again
_PLACES: Final = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu")
_FILE: Final = {
    "manager": f"{names.SPEAKER_SOCKET_DIR}/clock-manager",
    "speaker": f"{names.SPEAKER_SOCKET_DIR}/clock-speaker",
    "agent": f"{names.AGENT_SNAPSHOT_DIR}/clock",
}


def fake(site: Site, of: str, monotonic: bool) -> None:
    """Give managers or agents clocks that `step` sets. Raises LabError."""
    if of in site.faked:
        return
    kind, name = WORKLOADS[of]
    found = site.api.get(kind, name, names.NAMESPACE)
    containers: list[Any] = found["spec"]["template"]["spec"]["containers"]
    site.faked[of] = containers
    site.set_containers(of, [_faked(container, monotonic) for container in containers])


def _faked(container: dict[str, Any], monotonic: bool) -> dict[str, Any]:
    more = environment(_FILE[container["name"]], monotonic)
    added = [{"name": key, "value": value} for key, value in more.items()]
    return {**container, "env": [*container.get("env", ()), *added]}


def environment(file: str, monotonic: bool = False) -> dict[str, str]:
    """What gives a process the clock that `file` tells; durations stay true unless `monotonic`.

    Raises MissingFeature.
    """
    return {
        "LD_PRELOAD": str(_library()),
        "FAKETIME_TIMESTAMP_FILE": file,
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "0" if monotonic else "1",
    }


def _library() -> Path:
    for place in _PLACES:
        path = Path(place) / "faketime" / "libfaketime.so.1"
        if path.exists():
            return path
    raise MissingFeature("clocks are set with libfaketime: apt-get install libfaketime")


def step(site: Site, what: str, by: int) -> None:
    """Set the clocks of `WHAT@WHERE` to `by` seconds from the true time. Raises LabError."""
    container = what.partition("@")[0]
    of = "agents" if container == "agent" else "managers"
    if container not in _FILE or of not in site.faked:
        raise DrillError(f"{what!r} has no clock that can be set: fakeClocks comes first")

    def written() -> bool:
        """Not while the container is just being restarted."""
        try:
            for pid in site.processes(what):
                file = Path(f"/proc/{pid.pid}/root{_FILE[container]}")
                file.with_suffix(".new").write_text(f"{by:+d}\n")
                file.with_suffix(".new").replace(file)
        except (OSError, DrillError):
            return False
        return True

    wait(f"the clock of {what} to be set", written, limit_s=_STARTS_S)
