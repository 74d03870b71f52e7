"""`lbctl demo`: the main job at work, in a lab, in under a minute. Nothing in it is staged.

Every line is printed when it has been seen: an address in the API server, next hops in a switch's
kernel, answers at the client. The lab stays up afterwards.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from lbctl.lab import preflight, workload
from lbctl.lab.api import Api, wait
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.lab import Lab, take_down
from lbctl.lab.load import Load, Report

TOPOLOGY: Final = Path(__file__).parents[2] / "bgp-lab" / "small.clab.yml"
REQUESTS: Final = 40
PODS: Final = 4
RATE: Final = 40.0  # requests per second during the power cut
BEFORE_S: Final = 1.0
AFTER_S: Final = 3.0
SERVICE: Final = "web"

app = typer.Typer(rich_markup_mode=None)


@app.command()
def demo(
    lab: Annotated[str, typer.Option(help="Name of the lab; one that is up is replaced.")] = "lab",
    cluster: Annotated[str, typer.Option(help="embedded or kubernetes")] = "embedded",
) -> None:
    """Bring the lab up, give a Service an EIP, send requests, and cut a node's power."""
    preflight.check()
    if cluster not in ("embedded", "kubernetes"):
        raise typer.BadParameter("embedded or kubernetes", param_hint="--cluster")
    Demo(lab, Console(highlight=False)).run("embedded" if cluster == "embedded" else "kubernetes")


class Demo:
    """One run of the demo, printing to a console."""

    def __init__(self, name: str, console: Console) -> None:
        self.name = name
        self.console = console
        self.begin_s = time.monotonic()

    def run(self, kind: ClusterKind) -> None:
        """All of it. Raises LabError if a step is not seen in time."""
        if take_down(self.name):
            self._say(f"took down the lab {self.name!r} that was up")
        with self._step("lab") as say:
            lab = Lab.up(TOPOLOGY, self.name, say)
            bring_up(lab, kind, say)
        with Api(lab.directory / KUBECONFIG) as api:
            eip = self._announce(lab, api)
            self._ask(lab, eip)
            self._cut(lab, api, eip)
        self._next(eip)

    def _announce(self, lab: Lab, api: Api) -> str:
        """Pool and Service in, EIP out, routes in each switch's kernel."""
        begin_s = time.monotonic()
        api.apply(workload.config_map(), workload.deployment(SERVICE, PODS))
        api.apply(workload.service(SERVICE))
        self._say(f"applied: pool {workload.POOL} …, Service {SERVICE} with {PODS} pods")
        eip = wait("an EIP", lambda: api.eip_of(SERVICE), every_s=0.01)
        self._say(f"EIP [bold]{eip}[/bold]", begin_s)
        wait(f"{PODS} ready pods", lambda: len(api.ready_pods(SERVICE)) == PODS)
        self._say(f"{PODS} pods ready", begin_s)
        nodes = sorted(machine.address for machine in lab.of_role("node"))
        for switch in lab.of_role("switch"):
            hops = wait(
                f"{switch.name} to have all next hops in its kernel",
                lambda name=switch.name: (  # type: ignore[misc]
                    found if (found := lab.kernel_routes(name, f"{eip}/32")) == nodes else None
                ),
            )
            self._say(f"{switch.name}'s kernel: {eip} → {', '.join(hops)}", begin_s)
        return eip

    def _ask(self, lab: Lab, eip: str) -> None:
        """Requests, each on a connection of its own; who answered, and whom the pods saw."""
        begin_s = time.monotonic()
        said = lab.machine("client").run(
            *("curl", "-s", "--max-time", "20", "-H", "Connection: close"),
            f"http://{eip}/n/[1-{REQUESTS}]",
        )
        answers = [line.split() for line in said.stdout.splitlines() if line]
        counts = Counter(answer[0] for answer in answers)
        seen = sorted({answer[1].rsplit(":", 1)[0] for answer in answers})
        own = lab.machine("client").address
        self._say(f"{len(answers)} of {REQUESTS} requests from {own} answered", begin_s)
        for pod, count in sorted(counts.items()):
            self.console.print(f"          {pod}  {count:3}  {'▪' * count}")
        self.console.print(f"          the pods saw the client as {', '.join(seen)}")

    def _cut(self, lab: Lab, api: Api, eip: str) -> None:
        """Power off the node with most pods under traffic, and show each request."""
        on = api.pod_nodes(SERVICE)
        victim = Counter(sorted(on.values())).most_common(1)[0][0]
        lost = sum(1 for node in on.values() if node == victim)
        self._say(f"cutting the power of {victim} ({lost} of {PODS} pods) under {RATE:.0f}/s …")
        address = lab.machine(victim).address
        client = lab.machine("client")
        with Load.start(client, eip, 80, flows=30, probes_per_s=RATE, timeout_s=0.5) as load:
            self._pause(BEFORE_S)
            at_s = load.mark("cut")
            lab.power_cut(victim)
            for switch in lab.of_role("switch"):
                wait(
                    f"{victim} to be out of {switch.name}'s kernel",
                    lambda name=switch.name: (  # type: ignore[misc]
                        address not in lab.kernel_routes(name, f"{eip}/32")
                    ),
                    every_s=0.01,
                )
                self._say(f"{switch.name}'s kernel no longer has {address}", at_s)
            self._pause(AFTER_S - (time.monotonic() - at_s))
            report = load.stop()
        self._line(report, at_s)
        living = [flow for flow in report.flows if on[flow.pod] != victim]
        broken = sum(1 for flow in living if flow.broken)
        self.console.print(
            f"          {len(living)} open connections to pods that live: {broken} broken; "
            f"{len(report.flows) - len(living)} were to pods of {victim}"
        )

    def _line(self, report: Report, at_s: float) -> None:
        """One mark per request in the order of sending, and the gap between answers."""
        marks = "".join("×" if probe.error else "·" for probe in report.probes)
        cut = sum(1 for probe in report.probes if probe.start_s < at_s)
        self.console.print(f"          {marks[:cut]}[bold]⚡[/bold]{marks[cut:]}")
        answered = sorted(p.start_s + p.took_s for p in report.probes if not p.error)
        gap_s = max((b - a for a, b in pairwise(answered)), default=0.0)
        failed = len(report.failed_probes())
        self.console.print(
            f"          · answered  × failed  ⚡ power cut: {failed} of {len(report.probes)} "
            f"requests failed, the last one started {report.outage_s('cut'):.2f} s after the cut; "
            f"longest time without an answer {gap_s:.2f} s"
        )

    def _next(self, eip: str) -> None:
        name = "" if self.name == "lab" else f" --lab {self.name}"
        total_s = time.monotonic() - self.begin_s
        self.console.print(f"\n[bold]done in {total_s:.0f} s.[/bold] The lab is up; next:")
        for command, what in (
            (f"lbctl lab status{name}", "machines, processes"),
            (f"lbctl lab exec{name} client -- curl -s http://{eip}/", "ask once more"),
            (f"lbctl lab exec{name} tor-a -- vtysh -c 'show ip route'", "look at a switch"),
            (f"export KUBECONFIG=$(.venv/bin/lbctl lab kubeconfig{name})", "then plain kubectl,"),
            (f"lbctl explain default/{SERVICE}", "and why each node is a next hop or not"),
            (f"lbctl lab down{name}", "remove every trace"),
        ):
            prefix = "" if command.startswith("export") else ".venv/bin/"
            self.console.print(f"  {prefix + command:<66} {what}", soft_wrap=True)

    def _say(self, text: str, since_s: float | None = None) -> None:
        """A line with the time since the beginning, and how long this step took."""
        took = "" if since_s is None else f"  [dim]({time.monotonic() - since_s:.2f} s)[/dim]"
        self.console.print(f"{time.monotonic() - self.begin_s:7.2f}   {text}{took}", soft_wrap=True)

    def _pause(self, seconds: float) -> None:
        """Let traffic flow for so long; this is the demo's own clock, nothing is waited for."""
        time.sleep(max(0.0, seconds))

    @contextmanager
    def _step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Progress of one long step: a spinner on a terminal, a line per stage elsewhere."""
        begin_s = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(name) as status:
                yield lambda text: status.update(text)
        else:
            yield lambda text: self._say(text)
        self._say(f"{name} is up", begin_s)
