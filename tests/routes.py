"""A path with the prefix that it is of, for tests that speak of both at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lbctl.core.announce import Paths
from lbctl.core.model import Network, Path
from lbctl.core.pmap import PMap


@dataclass(frozen=True, kw_only=True)
class Route(Path):
    """A path of a prefix."""

    prefix: Network

    def __hash__(self) -> int:
        return hash((self.path_id, self.prefix))


def by_prefix(routes: Iterable[Route]) -> Paths:
    """As the announcer takes them. Prefixes with the same paths share one set, as those of EIPs."""
    found: dict[Network, set[Path]] = {}
    for r in routes:
        path = Path(r.next_hop, r.path_id, r.node, r.communities, r.med)
        found.setdefault(r.prefix, set()).add(path)
    shared: dict[frozenset[Path], frozenset[Path]] = {}
    sets = {prefix: frozenset(paths) for prefix, paths in found.items()}
    return PMap({prefix: shared.setdefault(paths, paths) for prefix, paths in sets.items()})
