"""Which Up nodes still confirm an address: looked up when asked, not built for every address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lbctl.core.model import Address, NodeState, NodeView


class Confirming(Mapping[Address, tuple[str, ...]]):
    """address → names of the Up nodes that confirm it, sorted; () for an unknown one."""

    def __init__(self, views: Mapping[str, NodeView]) -> None:
        self._views = [views[name] for name in sorted(views) if views[name].state is NodeState.UP]

    def __getitem__(self, address: Address) -> tuple[str, ...]:
        return tuple(view.name for view in self._views if address in view.confirmed)

    def __iter__(self) -> Iterator[Address]:
        return iter(frozenset().union(*(view.confirmed for view in self._views)))

    def __len__(self) -> int:
        return len(frozenset().union(*(view.confirmed for view in self._views)))
