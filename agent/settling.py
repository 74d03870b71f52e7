"""When a changed port has had time to show what there was: then new flows follow buckets alone.

Rules: of a port that is not TCP, new flows go to their bucket's former owner until a time
(`UDP_MEMORY_S`) after its last change, then to the new one; of TCP, former owners are asked about
first packets for a shorter one (`SYN_MEMORY_S`). The cost is that of what changed.
"""

from __future__ import annotations

from collections.abc import Callable

from lbctl.core.model import Address
from lbctl.core.nodeview import PortView, View
from lbctl.core.pmap import PMap, changed


class Settling:
    """The EIPs with ports that are `unsettled`, with the time (monotonic seconds) of the change."""

    def __init__(self, unsettled: Callable[[PortView], bool], after_s: float) -> None:
        self._unsettled = unsettled
        self.after_s = after_s
        self._seen: View = PMap()
        self._changed_s: dict[Address, float] = {}  # in order of time

    def due(self, now_s: float) -> tuple[Address, ...]:
        """Those that are to be settled now; they stay due until `note` sees it done."""
        found = []
        for address, since_s in self._changed_s.items():
            if since_s + self.after_s > now_s:
                break
            found.append(address)
        return tuple(found)

    def note(self, view: View, now_s: float) -> bool:
        """Take in the view that the kernel has now; whether something of it is to be settled."""
        more = False
        for address in changed(self._seen, view):
            was, now = (self._of(known.get(address, ())) for known in (self._seen, view))
            if not now or was != now:
                self._changed_s.pop(address, None)
            if now and was != now:
                self._changed_s[address] = now_s
                more = True
        self._seen = view
        return more

    def _of(self, ports: tuple[PortView, ...]) -> list[int]:
        """Those that are unsettled; a port that did not change is the same object."""
        return [id(port) for port in ports if self._unsettled(port)]
