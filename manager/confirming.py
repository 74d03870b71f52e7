"""Which nodes may still forward an address: looked up when asked, not built for every address.

Rule: a silent or suspect node keeps what it last confirmed (its kernel goes on with the table that
it has, and the other manager may announce it), so an address is not given to another Service before
that node has dropped it or is Down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lbctl.core.model import Address, NodeState, NodeView


class Confirming(Mapping[Address, tuple[str, ...]]):
    """address → names of the nodes, not Down, that confirm it, sorted; () for an unknown one."""

    def __init__(self, views: Mapping[str, NodeView]) -> None:
        alive = (name for name in sorted(views) if views[name].state is not NodeState.DOWN)
        self._views = [views[name] for name in alive]

    def __getitem__(self, address: Address) -> tuple[str, ...]:
        return tuple(view.name for view in self._views if address in view.confirmed)

    def __iter__(self) -> Iterator[Address]:
        return iter(frozenset().union(*(view.confirmed for view in self._views)))

    def __len__(self) -> int:
        return len(frozenset().union(*(view.confirmed for view in self._views)))
