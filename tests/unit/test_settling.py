"""When datagrams begin to follow their buckets: a time after the last change of their EIP."""

from __future__ import annotations

from agent.settling import Settling
from lbctl.core import nodeview
from lbctl.core.model import Protocol
from lbctl.core.nftrules import UDP_MEMORY_S

from .forwarding_cases import EIP, EIP6, pod, service, table

PODS = [pod(n, 2) for n in (1, 2, 3)]


def test_an_eip_is_due_a_time_after_its_last_change() -> None:
    of = service(protocols=(Protocol.TCP, Protocol.UDP))
    settling = Settling()
    views = [nodeview.advance({}, table(PODS[0], of=of, eips=(EIP, EIP6)), "n2")]
    assert not settling.note(views[0], 0.0)  # nothing of it was anybody's before
    views.append(nodeview.advance(views[0], table(*PODS[:2], of=of), "n2"))
    assert settling.note(views[1], 10.0)
    views.append(nodeview.advance(views[1], table(*PODS, of=of), "n2"))
    assert settling.note(views[2], 20.0)
    assert not settling.note(views[2], 25.0)  # not changed
    assert settling.due(19.9 + UDP_MEMORY_S) == ()
    assert settling.due(20.0 + UDP_MEMORY_S) == (EIP,) == settling.due(99.0)
    settled = nodeview.settle(views[2], (EIP,))
    # TCP remembers for as long as the former owner lives.
    assert [bool(view.former) for view in settled[EIP]] == [
        view.table.protocol is Protocol.TCP for view in views[2][EIP]
    ]
    assert not settling.note(settled, 60.0)
    assert settling.due(999.0) == ()


def test_tcp_alone_needs_no_time() -> None:
    view = nodeview.advance({}, table(PODS[0]), "n2")
    settling = Settling()
    settling.note(view, 0.0)
    assert not settling.note(nodeview.advance(view, table(*PODS), "n2"), 1.0)
