"""Manifests that demo, tests and bench apply: the pool ConfigMap, a web Deployment, its Service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lbctl.core import names

POOL = "198.51.100.0/25"
POOL6 = "2001:db8:100::/64"
CONFIG = f"""\
version: 1
pools:
  - name: public
    addresses: [{POOL}, 198.51.100.200-198.51.100.210]
  - name: public6
    addresses: ["{POOL6}"]
bgp:
  asn: 64512
  peers:
    - {{name: tor-a, address: 192.0.2.1, asn: 64500}}
    - {{name: tor-b, address: 192.0.2.2, asn: 64500}}
announce: {{}}
probe: {{}}
forwarding: {{}}
"""


def config_map(text: str = CONFIG) -> dict[str, Any]:
    """The ConfigMap `lbctl` with this `config.yaml`."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": names.CONFIG_MAP, "namespace": names.NAMESPACE},
        "data": {names.CONFIG_KEY: text},
    }


def deployment(
    name: str,
    replicas: int,
    ports: Iterable[tuple[str, int]] = (("TCP", 8080),),
    grace_s: int = 5,
    pre_stop_s: int = 0,
) -> dict[str, Any]:
    """A Deployment of the lab's pod server, labelled app=NAME, on these container ports.

    pre_stop_s: its pods go on serving so long before they hear SIGTERM.
    """
    container: dict[str, Any] = {
        "name": "web",
        "image": "lbctl.io/pod-server",
        "ports": [{"containerPort": port, "protocol": protocol} for protocol, port in ports],
    }
    if pre_stop_s:
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": pre_stop_s}}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"terminationGracePeriodSeconds": grace_s, "containers": [container]},
            },
        },
    }


def service(
    name: str,
    app: str = "",
    ports: Iterable[tuple[str, int, int]] = (("TCP", 80, 8080),),
    policy: str = "Cluster",
    families: str = "SingleStack",
) -> dict[str, Any]:
    """A Service of type LoadBalancer; ports are (protocol, port, targetPort).

    families: its `ipFamilyPolicy`.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "LoadBalancer",
            "selector": {"app": app or name},
            "externalTrafficPolicy": policy,
            "ipFamilyPolicy": families,
            "ports": [
                {
                    "name": f"{protocol.lower()}-{port}",
                    "protocol": protocol,
                    "port": port,
                    "targetPort": target,
                }
                for protocol, port, target in ports
            ],
        },
    }
