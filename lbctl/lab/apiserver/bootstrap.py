"""What every cluster has from the start: its namespaces and the Service `kubernetes`."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

from lbctl.lab.apiserver.api import Api
from lbctl.lab.apiserver.resources import Obj

NAMESPACES: Final = ("default", "kube-system", "kube-public", "kube-node-lease")


def create(api: Api, address: str, port: int) -> None:
    """Create what is missing. `address` and `port` are where the API server listens."""
    spaces = api.registry.key("namespaces")
    for name in NAMESPACES:
        if api.store.get("namespaces", "", name) is None:
            api.create(spaces, "", {"metadata": {"name": name}})
    if api.store.get("services", "default", "kubernetes") is None:
        labels = {"component": "apiserver", "provider": "kubernetes"}
        spec = {
            "clusterIP": str(api.services.network[1]),
            "ports": [{"name": "https", "protocol": "TCP", "port": 443, "targetPort": port}],
        }
        meta = {"name": "kubernetes", "labels": labels}
        api.create(api.registry.key("services"), "default", {"metadata": meta, "spec": spec})
    slices = api.registry.key("endpointslices.discovery.k8s.io")
    if api.store.get(slices.key, "default", "kubernetes") is not None:
        api.store.remove(slices.key, "default", "kubernetes")
    api.create(slices, "default", _slice(address, port))


def _slice(address: str, port: int) -> Obj:
    return {
        "metadata": {
            "name": "kubernetes",
            "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": f"IPv{ip_address(address).version}",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": "https", "protocol": "TCP", "port": port}],
    }
