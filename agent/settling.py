"""When the flows of a changed port that is not TCP have had time to show themselves.

Rule: new flows of such a port go to their bucket's former owner until `UDP_MEMORY_S` after its last
change, then to the new one. The cost is that of what changed.
"""

from __future__ import annotations

from lbctl.core.model import Address
from lbctl.core.nftrules import UDP_MEMORY_S
from lbctl.core.nodeview import View, unsettled
from lbctl.core.pmap import PMap, changed


class Settling:
    """The EIPs whose ports are not settled, with the time (monotonic seconds) of the change."""

    def __init__(self) -> None:
        self._seen: View = PMap()
        self._changed_s: dict[Address, float] = {}  # in order of time

    def due(self, now_s: float) -> tuple[Address, ...]:
        """Those that are to be settled now; they stay due until `note` sees it done."""
        found = []
        for address, since_s in self._changed_s.items():
            if since_s + UDP_MEMORY_S > now_s:
                break
            found.append(address)
        return tuple(found)

    def note(self, view: View, now_s: float) -> bool:
        """Take in the view that the kernel has now; whether something of it is to be settled."""
        more = False
        for address in changed(self._seen, view):
            self._changed_s.pop(address, None)
            if any(map(unsettled, view.get(address, ()))):
                self._changed_s[address] = now_s
                more = True
        self._seen = view
        return more
