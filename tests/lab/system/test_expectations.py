"""What Kubernetes expects of any load balancer: the behaviour that its own end-to-end tests
(test/e2e/network/loadbalancer.go) look for, from outside, with packets of a client."""

from __future__ import annotations

from typing import Any

from lbctl.core import names
from lbctl.kube import client as kube
from lbctl.lab import workload
from lbctl.lab.api import wait

from .support import CLIENT, System

SOURCE_PORT = 34567
_ASK = """\
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", {source}))
s.settimeout(0.2)
until = time.monotonic() + {limit}
while time.monotonic() < until:
    s.sendto(b"x", ("{eip}", {port}))
    try:
        pod, peer, _ = s.recv(999).decode().split()
    except (TimeoutError, ConnectionError):
        continue
    if pod not in {known!r}:
        print(pod, peer)
        break
    time.sleep(0.05)
"""


def service(system: System, name: str) -> dict[str, Any]:
    return system.api.get(kube.SERVICES, name)


def change(system: System, name: str, **spec: Any) -> None:
    system.api.patch(kube.SERVICES, name, {"spec": spec})


def ask_udp(
    system: System, eip: str, port: int, known: tuple[str, ...] = (), limit_s: float = 60
) -> tuple[str, str]:
    """Ask from one and the same source port until a pod answers that is not known yet."""
    script = _ASK.format(source=SOURCE_PORT, limit=limit_s, eip=eip, port=port, known=known)
    client = system.lab.machine("client")
    said = client.run("python3", "-c", script, timeout_s=limit_s + 30).stdout.split()
    assert len(said) == 2, f"no pod but {known or 'none'} answered UDP within {limit_s} s"
    return said[0], said[1]


def closed(system: System, eip: str, port: int) -> bool:
    done = system.lab.machine("client").run(
        *("curl", "-s", "--connect-timeout", "1", f"http://{eip}:{port}/"), check=False
    )
    return done.returncode != 0


def test_type_and_ports_change_while_the_address_stays(system: System) -> None:
    ports = (("TCP", 80, 8080), ("UDP", 53, 5353))
    plain = workload.service("change", ports=ports)
    plain["spec"] |= {"type": "ClusterIP", "externalTrafficPolicy": None}
    system.made.append("change")
    targets = tuple((protocol, target) for protocol, _, target in ports)
    system.api.apply(workload.deployment("change", 2, targets), plain)
    system.wait_pods("change", 2)
    assert system.api.eip_of("change") is None
    change(system, "change", type="NodePort")
    change(system, "change", type="LoadBalancer")
    eip = wait("an EIP", lambda: system.api.eip_of("change"))
    system.wait_routed(eip)
    assert names.FINALIZER in service(system, "change")["metadata"]["finalizers"]
    assert system.replies(eip, 5) and ask_udp(system, eip, 53)
    found = service(system, "change")["spec"]["ports"]
    moved = [port | {"port": port["port"] + 1} for port in found]
    change(system, "change", ports=moved)
    wait("the new TCP port", lambda: not closed(system, eip, 81))
    assert ask_udp(system, eip, 54)[1] == CLIENT
    wait("the old TCP port to be closed", lambda: closed(system, eip, 80))
    assert system.api.eip_of("change") == eip, "the address moved"
    change(system, "change", type="ClusterIP")
    wait("the status to be cleared", lambda: system.api.eip_of("change") is None)
    system.wait_routed(eip, to=())

    def free_of_us() -> bool:
        return names.FINALIZER not in (
            service(system, "change")["metadata"].get("finalizers") or ()
        )

    wait("the finalizer to be removed", free_of_us)


def pods(system: System, eip: str, count: int) -> int:
    """How many pods answered; 0 if somebody did not.

    A connection under way when the hash changes may fail (docs/forwarding.md, "What moves").
    """
    try:
        return len(system.spread(eip, count))
    except AssertionError:
        return 0


def test_source_ranges_and_affinity_are_switched(system: System) -> None:
    eip = system.deploy("rules", replicas=3)
    assert len(system.spread(eip, 60)) == 3
    change(system, "rules", loadBalancerSourceRanges=["203.0.113.99/32"])
    wait("the client to be shut out", lambda: closed(system, eip, 80))
    change(system, "rules", loadBalancerSourceRanges=["203.0.113.99/32", f"{CLIENT}/32"])
    wait("the client to be let in", lambda: not closed(system, eip, 80))
    change(system, "rules", loadBalancerSourceRanges=None)
    change(system, "rules", sessionAffinity="ClientIP")
    wait("one pod for the client", lambda: pods(system, eip, 30) == 1)
    change(system, "rules", sessionAffinity="None")
    wait("every pod for the client", lambda: pods(system, eip, 60) == 3)
    assert system.api.eip_of("rules") == eip


def test_udp_is_kept_while_the_pod_cycles_on_its_node_and_to_another(system: System) -> None:
    ports = (("UDP", 53, 5353),)
    system.made.append("cycle")
    app = workload.deployment("cycle", 1, (("UDP", 5353),), grace_s=1)
    pod = app["spec"]["template"]["spec"]
    pod["nodeSelector"] = {"kubernetes.io/hostname": "node-1"}
    system.api.apply(app, workload.service("cycle", ports=ports))
    system.wait_pods("cycle", 1)
    eip = wait("an EIP", lambda: system.api.eip_of("cycle"))
    system.wait_routed(eip)
    first, peer = ask_udp(system, eip, 53)
    assert peer == CLIENT and set(system.api.pod_nodes("cycle").values()) == {"node-1"}
    system.api.delete(kube.PODS, first)
    second, peer = ask_udp(system, eip, 53, (first,))
    assert peer == CLIENT and system.api.pod_nodes("cycle")[second] == "node-1"
    pod["nodeSelector"] = {"kubernetes.io/hostname": "node-2"}
    system.api.apply(app)
    third, peer = ask_udp(system, eip, 53, (first, second))
    assert peer == CLIENT and system.api.pod_nodes("cycle")[third] == "node-2"


def test_local_policy_keeps_the_source_and_only_nodes_with_endpoints(system: System) -> None:
    eip = system.deploy("edge", replicas=1, policy="Local", announced=False)
    assert service(system, "edge")["spec"]["healthCheckNodePort"] > 0
    nodes = set(system.api.pod_nodes("edge").values())
    system.wait_routed(eip, to=nodes)
    assert {reply.peer for reply in system.replies(eip, 10)} == {CLIENT}
    change(system, "edge", externalTrafficPolicy="Cluster")
    system.wait_routed(eip)
    assert not service(system, "edge")["spec"].get("healthCheckNodePort")
    assert {reply.peer for reply in system.replies(eip, 10)} == {CLIENT}
    change(system, "edge", externalTrafficPolicy="Local")
    system.wait_routed(eip, to=nodes)
    assert system.api.eip_of("edge") == eip


def test_services_that_share_an_address_answer_and_one_outlives_the_owner(system: System) -> None:
    made = [
        workload.service("first"),
        workload.service("second", app="first", ports=(("TCP", 81, 8080),)),
    ]
    for one in made:
        one["metadata"]["annotations"] = {"lbctl.io/allow-shared-ip": "together"}
    system.made += ["first", "second"]
    system.api.apply(workload.deployment("first", 2), *made)
    system.wait_pods("first", 2)
    eip = wait("an EIP for the first", lambda: system.api.eip_of("first"))
    assert wait("an EIP for the second", lambda: system.api.eip_of("second")) == eip
    system.wait_routed(eip)
    for port in (80, 81):
        wait(f"port {port} to answer", lambda port=port: not closed(system, eip, port))  # type: ignore[misc]
        assert len({reply.pod for reply in system.replies(eip, 30, port)}) == 2
    system.api.delete(kube.SERVICES, "first")
    wait("the first to be gone", lambda: system.api.find(kube.SERVICES, "first") is None)
    assert len(system.replies(eip, 30, 81)) == 30
    wait("its port to be closed", lambda: closed(system, eip, 80))
    spec = system.eip_object(eip)
    assert spec is not None and (spec["owner"]["name"], spec["phase"]) == ("second", "Bound")
    assert system.api.eip_of("second") == eip
    assert len(system.replies(eip, 30, 81)) == 30
