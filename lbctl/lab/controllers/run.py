"""Starts all controllers as tasks of one group."""

from __future__ import annotations

import asyncio

from lbctl.lab.apiserver.api import Api
from lbctl.lab.controllers.base import Controller
from lbctl.lab.controllers.daemonsets import DaemonSets
from lbctl.lab.controllers.deployments import Deployments
from lbctl.lab.controllers.endpointslices import EndpointSlices
from lbctl.lab.controllers.garbage import Garbage
from lbctl.lab.controllers.namespaces import Accounts, CustomResources, Namespaces
from lbctl.lab.controllers.nodes import Nodes
from lbctl.lab.controllers.replicasets import ReplicaSets
from lbctl.lab.controllers.statefulsets import StatefulSets


async def run(api: Api, ca: str, node_grace_s: float) -> None:
    """Run until cancelled. `ca` is the PEM text for kube-root-ca.crt."""
    controllers: tuple[Controller, ...] = (
        Accounts(api, ca),
        EndpointSlices(api),
        ReplicaSets(api),
        Deployments(api),
        DaemonSets(api),
        StatefulSets(api),
        Nodes(api, node_grace_s),
        Garbage(api),
        Namespaces(api),
        CustomResources(api),
    )
    async with asyncio.TaskGroup() as group:
        for controller in controllers:
            group.create_task(controller.run(), name=controller.name)
