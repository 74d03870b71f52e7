"""How this node reaches the others now: what was seen, what was chosen, what the kernel has of it.

Rules:
- `look` and `plan` decide, `ensure` writes before the nftables table that uses it, `prune` removes
  after the one that stopped to.
- A tunnel that cannot be had is said, and takes nothing from the nodes on our links.
- Nothing is read from the kernel again before it has said that something changed (`notices`), or
  something else is wanted.
"""

from __future__ import annotations

import time
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

_ANYWAY_S: Final = 30.0
_log = structlog.get_logger()


class Reach:
    """The ways from node `me`. One caller at a time."""

    def __init__(self, me: str, routes: Routes) -> None:
        self._me = me
        self._routes = routes
        self._notices = routes.notices
        self._done: dict[str, object] = {}  # what was wanted and said when it was last carried out
        self._known: tuple[dict[Address, str], bool] = {}, False
        self._index: Mapping[str, int] = {}
        self._tunnel: Tunnel | None = None
        self._device: int | None = None  # the tunnel's, once it is made
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
        state = self._said(), interfaces
        if self._done.get("look") == state:
            return False
        found = await self._routes.survey(interfaces)
        changed = bool(found.uplinks) and found != self.survey
        if changed or not self.survey.uplinks:
            self.survey = found
        self._done["look"] = state
        return changed

    def plan(self, inputs: Inputs, index: Mapping[str, int]) -> None:
        """Choose a way to each numbered node."""
        state = self.survey, inputs.forwarding.steering, index, inputs.nodes
        if self._done.get("plan") == state:
            return
        self._done["plan"] = state
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
        changes, state = 0, self._state()
        if self._tunnel is not None and self._done.get("tunnel") != state:
            self._done.pop("tunnel", None)
            try:
                self._device, changes = await self._routes.ensure_tunnel(self._tunnel)
                self._say("")
                self._done["tunnel"] = state
            except DataplaneError as error:
                self._device = None
                self._say(str(error))
        device = self._device if self._tunnel is not None else None
        routes = *state[:2], device
        if self._done.get("routes") != routes:
            self._done.pop("routes", None)
            changes += await self._routes.ensure(self.hops, device)
            self._done["routes"] = routes
        return changes

    async def prune(self) -> int:
        """Remove what the ways do not need; how many changes it took."""
        changes, state = 0, self._state()
        if self._done.get("prune") == state:
            return 0
        self._done.pop("prune", None)
        changes = await self._routes.prune(self.hops)
        try:
            changes += await self._routes.prune_tunnel(self._tunnel)
            self._done["prune"] = state
        except DataplaneError as error:
            self._say(str(error))
        return changes

    def _state(self) -> tuple[object, ...]:
        """What is wanted, and how often the kernel has said something of what there is."""
        said = self._notices.neighbours() if self._tunnel else 0
        return self._said(), self.hops, self._tunnel, said

    def _said(self) -> tuple[int, int]:
        """Rises when the kernel says that something changed, and now and then all the same."""
        return self._notices.routes(), int(time.monotonic() / _ANYWAY_S)

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
        state = self._notices.neighbours(), self.survey, inputs.nodes
        if self._known[1] and self._done.get("neighbours") == state:
            return self._known
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
        self._known = known, len(known) == len({hop.gateway for hop in wanted})
        self._done["neighbours"] = state
        return self._known


def _by_tunnel(hop: Hop) -> bool:
    return hop.interface == TUNNEL
