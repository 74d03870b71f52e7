"""A rack with real FRR switches, nodes and a client, in network namespaces on this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lbctl.errors import LabError

if TYPE_CHECKING:
    from lbctl.lab.cluster.handle import ClusterKind
    from lbctl.lab.lab import Lab
    from lbctl.lab.machine import Machine

_TOPOLOGIES: Final = Path(__file__).resolve().parents[2] / "bgp-lab"

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None, add_completion=False)
node_app = typer.Typer(
    help="Change the rack.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)
app.add_typer(node_app, name="node")


class Output(StrEnum):
    """How to print."""

    TEXT = "text"
    JSON = "json"


class ClusterChoice(StrEnum):
    """What Kubernetes the lab runs."""

    EMBEDDED = "embedded"
    KUBERNETES = "kubernetes"
    NONE = "none"


class KubeProxyChoice(StrEnum):
    """In which mode kube-proxy runs on the lab's nodes."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


LabName = Annotated[
    str, typer.Option("--lab", metavar="NAME", envvar="LBCTL_LAB", help="Which lab.")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Format of the answer.")]


@app.command()
def up(
    topology: Annotated[
        str,
        typer.Argument(help="A containerlab topology file, or one of ours: small, hosts, racks."),
    ] = "small",
    cluster: Annotated[
        ClusterChoice, typer.Option(help="embedded starts at once; kubernetes is the real one.")
    ] = ClusterChoice.EMBEDDED,
    kube_proxy: Annotated[
        KubeProxyChoice, typer.Option(help="Its mode; only the cluster kubernetes has it.")
    ] = KubeProxyChoice.NFTABLES,
    name: LabName = "lab",
    keep: Annotated[bool, typer.Option(help="Keep what is there if the start fails.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Build the rack, its switches and its cluster."""
    from lbctl.lab import preflight
    from lbctl.lab.lab import Lab

    preflight.check()
    progress = _progress()
    lab = Lab.up(_topology(topology), name, progress)
    try:
        if cluster is not ClusterChoice.NONE:
            from lbctl.lab.bringup import bring_up
            from lbctl.lab.kubeproxy import Mode

            kind: ClusterKind = "embedded" if cluster is ClusterChoice.EMBEDDED else "kubernetes"
            bring_up(lab, kind, progress, Mode(kube_proxy.value))
    except BaseException:
        if not keep:
            progress("the start failed: taking the lab down")
            lab.down()
        raise
    progress("up")
    if output is Output.JSON:
        print(json.dumps(_status(lab), indent=2))
    else:
        print(f"lab {name} is up. Next: lbctl lab status --lab {name}")


def _topology(text: str) -> Path:
    """A file, or by its short name one of `bgp-lab/`."""
    ours = _TOPOLOGIES / f"{text}.clab.yml"
    return ours if "/" not in text and ours.exists() else Path(text)


def _progress() -> Callable[[str], None]:
    """Lines on stderr with the time since the start."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    return say


@app.command()
def status(name: LabName = "lab", output: OutputOption = Output.TEXT) -> None:
    """Machines, switches and processes of a lab."""
    from lbctl.lab.lab import Lab

    data = _status(Lab.load(name))
    if output is Output.JSON:
        print(json.dumps(data, indent=2))
        return
    _table(
        ("MACHINE", "ROLE", "POWER", "PID", "ADDRESSES", "PODS"),
        [
            (
                m["name"],
                m["role"],
                m["power"],
                m["pid"] or "-",
                ", ".join(m["addresses"]),
                m["pods"],
            )
            for m in data["machines"]
        ],
    )
    for item in data["switches"]:
        vrrp = ", ".join(f"group {k} {v}" for k, v in item["vrrp"].items()) or "none"
        peers = ", ".join(f"{k} {v}" for k, v in item["bgp"].items()) or "none"
        print(f"\n{item['name']}: {item['error'] or f'VRRP {vrrp}; BGP {peers}'}", end="")
    print(f"\n\nprocesses: {', '.join(data['processes']) or 'none'}")
    print(f"logs: {data['directory']}/logs   kubeconfig: {data['kubeconfig'] or 'no cluster'}")


def _status(lab: Lab) -> dict[str, Any]:
    from lbctl.lab import switch

    machines, switches = [], []
    for machine in lab.machines:
        init = machine.init()
        entry = {"name": machine.name, "role": machine.role, "power": "on" if init else "off"}
        where = {"pid": init.pid if init else None, "addresses": _addresses(machine)}
        machines.append({**entry, **where, "pods": machine.pod_cidr, "netns": str(machine.netns)})
        if machine.role == "switch":
            answer: dict[str, Any] = {"name": machine.name, "vrrp": {}, "bgp": {}, "error": ""}
            try:
                answer["vrrp"] = switch.vrrp_states(machine)
                answer["bgp"] = switch.bgp_peers(machine)
            except LabError as error:
                answer["error"] = str(error)
            switches.append(answer)
    kubeconfig = lab.directory / "kubeconfig"
    return {
        "name": lab.name,
        "topology": str(lab.source),
        "directory": str(lab.directory),
        "kubeconfig": str(kubeconfig) if kubeconfig.exists() else None,
        "machines": machines,
        "switches": switches,
        "processes": lab.process_names(),
    }


def _addresses(machine: Machine) -> list[str]:
    """A machine of an interrupted start may have no network namespace yet."""
    with suppress(LabError):
        return list(machine.addresses)
    return []


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Aligned columns; bold head on a terminal only."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)


@app.command("exec", context_settings={"ignore_unknown_options": True})
def execute(
    node: Annotated[str, typer.Argument(help="A machine of the lab.")],
    command: Annotated[list[str], typer.Argument(help="What to run; put -- before it.")],
    name: LabName = "lab",
) -> None:
    """Run a command inside a machine; its exit code is ours."""
    from lbctl.lab.lab import Lab

    argv = Lab.load(name).machine(node).command(*command)
    sys.stdout.flush()
    os.execvp(argv[0], argv)


@app.command()
def kubeconfig(name: LabName = "lab", output: OutputOption = Output.TEXT) -> None:
    """Print the path of the administrator's kubeconfig, for KUBECONFIG=$(lbctl lab kubeconfig)."""
    from lbctl.lab.lab import Lab

    path = Lab.load(name).directory / "kubeconfig"
    if not path.exists():
        raise LabError(f"lab {name!r} has no cluster; it was started with --cluster none")
    print(json.dumps({"kubeconfig": str(path)}) if output is Output.JSON else path)


@app.command()
def logs(
    node: Annotated[str, typer.Argument(help="A machine, or a process of the lab.")],
    name: LabName = "lab",
    output: OutputOption = Output.TEXT,
) -> None:
    """Print all log files of a machine, the newest last, each under its name."""
    from lbctl.lab.lab import Lab

    lab = Lab.load(name)
    own = lab.directory / "logs" / f"{node}.log"
    files = [own] if own.is_file() else _log_files(lab.machine(node).log_dir)
    texts = {str(path): path.read_text("utf-8", "replace") for path in files}
    if output is Output.JSON:
        print(json.dumps(texts, indent=2))
        return
    for path, text in texts.items():
        print(f"==> {path} <==\n{text.rstrip()}\n")


def _log_files(directory: Path) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: (path.stat().st_mtime, str(path)))


@node_app.command("add")
def add(name: LabName = "lab", output: OutputOption = Output.TEXT) -> None:
    """Add a node like the last one, wired to the same rack; ends when it serves."""
    from lbctl.lab.bringup import add_node
    from lbctl.lab.lab import Lab

    machine = add_node(Lab.load(name), _progress())
    answer = {"name": machine.name, "address": machine.address, "pods": machine.pod_cidr}
    if output is Output.JSON:
        print(json.dumps(answer))
    else:
        print(f"{machine.name} is up at {machine.address}, pods {machine.pod_cidr}")


@app.command()
def down(name: LabName = "lab", output: OutputOption = Output.TEXT) -> None:
    """End a lab: no process, namespace, mount or file of it stays."""
    from lbctl.lab import preflight
    from lbctl.lab.lab import take_down

    preflight.check_root()
    was_up = take_down(name)
    if output is Output.JSON:
        print(json.dumps({"name": name, "was_up": was_up}))
    else:
        print(f"lab {name} is down" if was_up else f"lab {name} was not up")
