"""How this node reaches the others now: what was seen, what was chosen, what the kernel has of it.

Rules:
- `look` and `plan` decide, `ensure` writes before the nftables table that uses it, `prune` removes
  after the one that stopped to.
- A tunnel that cannot be had is said, and takes nothing from the nodes on our links.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import structlog

from agent import settings, tunnel
from agent.inputs import Inputs
from agent.routes import Routes
from lbctl.core import ways
from lbctl.core.model import Address
from lbctl.core.names import TUNNEL_DEVICE
from lbctl.core.ways import TUNNEL, Hop, Survey, Tunnel, Ways
from lbctl.errors import DataplaneError

_VERSIONS: Final = (4, 6)
_log = structlog.get_logger()


class Reach:
    """The ways from node `me`. One caller at a time."""

    def __init__(self, me: str, routes: Routes) -> None:
        self._me = me
        self._routes = routes
        self._index: Mapping[str, int] = {}
        self._tunnel: Tunnel | None = None
        self.survey = Survey()
        self.hops: Ways = {}
        self.unreachable: tuple[str, ...] = ()  # nodes to which there is no way
        self.trouble = ""  # with the tunnel, in words

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the nodes to which there are ways."""
        return tuple(sorted({number for _, number in self.hops}))

    @property
    def uplinks(self) -> tuple[str, ...]:
        """The interfaces by which packets for EIPs come, the tunnel included."""
        names = tuple(name for name, _ in self.survey.uplinks)
        return (*names, TUNNEL_DEVICE) if self._tunnel else names

    @property
    def tunnel_peers(self) -> tuple[Address, ...]:
        """The addresses of the nodes that may send to us through the tunnel."""
        return self._tunnel.peers if self._tunnel else ()

    @property
    def tunnel_mtu(self) -> int:
        """What fits into the tunnel, in bytes of IP; 0 without one."""
        return self._tunnel.mtu if self._tunnel else 0

    @property
    def ipv6(self) -> bool:
        """Whether this node has ways over IPv6."""
        return any(version == 6 for version, _ in self.hops)

    def usable(self, version: int) -> tuple[str, ...]:
        """The nodes that can be steered to in one IP version."""
        return tuple(
            name
            for name, number in self._index.items()
            if (hop := self.hops.get((version, number))) and not (self.trouble and _by_tunnel(hop))
        )

    async def look(self, interfaces: tuple[str, ...]) -> bool:
        """Look at the interfaces; whether anything has changed."""
        found = await self._routes.survey(interfaces)
        changed = bool(found.uplinks) and found != self.survey
        if changed or not self.survey.uplinks:
            self.survey = found
        return changed

    def plan(self, inputs: Inputs, index: Mapping[str, int]) -> None:
        """Choose a way to each numbered node."""
        self._index, nodes = index, inputs.nodes
        steering = inputs.forwarding.steering
        self.hops = ways.choose(self.survey, steering, self._me, index, nodes)
        self._tunnel = ways.tunnel(self.survey, self.hops, self._me, index, nodes)
        away = tuple(ways.unreached(self.survey, self.hops, self._me, index, nodes))
        if away != self.unreachable:
            self.unreachable = away
            _log.warning("nodes_without_a_way", nodes=away, effect="their endpoints get nothing")

    async def ensure(self) -> int:
        """Add and correct what the ways need; how many changes it took."""
        device, changes = None, 0
        if self._tunnel is not None:
            try:
                device, changes = await self._routes.ensure_tunnel(self._tunnel)
                self._say("")
            except DataplaneError as error:
                self._say(str(error))
        return changes + await self._routes.ensure(self.hops, device)

    async def prune(self) -> int:
        """Remove what the ways do not need; how many changes it took."""
        changes = await self._routes.prune(self.hops)
        try:
            return changes + await self._routes.prune_tunnel(self._tunnel)
        except DataplaneError as error:
            self._say(str(error))
            return changes

    async def loosen(self) -> int:
        """Set rp_filter on all interfaces by which packets come; how many had to be changed."""
        index = tunnel.index() if self._tunnel else None
        own = ((TUNNEL_DEVICE, index),) if index is not None else ()
        return await settings.loosen((*self.survey.uplinks, *own))

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            _log.warning("tunnel_trouble", problem=trouble or "none any more")

    async def neighbours(self, inputs: Inputs) -> tuple[dict[Address, str], bool]:
        """The MACs of the nodes on our links, as far as they are known; whether all are.

        The kernel is made to ask for those that are not.
        """
        wanted = [
            hop
            for node in inputs.nodes
            if node.name != self._me
            for address in ways.node_addresses(node)
            if (hop := self.survey.hop(address)) is not None
        ]
        found = await self._routes.neighbours(self.survey)
        await self._routes.resolve([hop for hop in wanted if hop.gateway not in found])
        known = {hop.gateway: found[hop.gateway] for hop in wanted if hop.gateway in found}
        return known, len(known) == len({hop.gateway for hop in wanted})


def _by_tunnel(hop: Hop) -> bool:
    return hop.interface == TUNNEL
