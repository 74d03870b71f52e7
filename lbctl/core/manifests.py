"""The objects in manifests: several documents in a file, Lists, and the YAML inside a ConfigMap.

Rules: every object keeps its places in the file that the person has open. So a document is read
with the number of lines before it, and YAML in a block (`config: |`) is read where it stands, with
its indentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lbctl.core.config_values import show
from lbctl.core.positions import Document, Loc, Mark, Problem, load, show_path
from lbctl.errors import ConfigError

_MARKER = re.compile(r"(---|\.\.\.)(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere in a file: the path of keys within one of its documents."""

    source: str
    document: Document
    loc: Loc = ()

    def at(self, *more: str | int) -> Place:
        """Further in."""
        return Place(self.source, self.document, self.loc + more)

    @property
    def value(self) -> object:
        """What stands there, None if nothing does."""
        found = self.document.value
        for part in self.loc:
            try:
                found = found[part]  # type: ignore[index]
            except (KeyError, IndexError, TypeError):
                return None
        return found

    def problem(self, text: str, loc: Loc | None = None, key: bool = False) -> str:
        """A sentence about this place, as `SOURCE:LINE:COLUMN: path: text`."""
        where = self.loc if loc is None else loc
        mark = self.document.key_mark(where) if key else self.document.mark(where)
        return f"{self.source}:{Problem(mark, where, text)}"

    def __str__(self) -> str:
        mark: Mark = self.document.key_mark(self.loc)
        return f"{self.source}:{mark.line}: {show_path(self.loc)}".removesuffix(": ")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object. kind and api are "" for what is none of Kubernetes' (a bare configuration)."""

    place: Place
    api: str
    kind: str

    @property
    def name(self) -> str:
        """`metadata.name`, or "unnamed"."""
        return str(self.place.at("metadata", "name").value or "unnamed")

    @property
    def group(self) -> str:
        """The API group, "" for the core's."""
        return self.api.rpartition("/")[0]


def manifests(text: str, source: str) -> tuple[Manifest, ...]:
    """All objects of a file, those of a List one by one.

    Raises ConfigError with every problem of reading it, each at its line and column.
    """
    found: list[Manifest] = []
    problems: list[str] = []
    for above, part in _documents(text):
        document = load(part, above)
        problems += [f"{source}:{problem}" for problem in document.problems]
        if document.complete and document.value is not None:
            found += _objects(Place(source, document))
    if problems:
        raise ConfigError(tuple(problems))
    return tuple(found)


def _documents(text: str) -> list[tuple[int, str]]:
    """Each document, and how many lines of the file come before it."""
    parts: list[tuple[int, list[str]]] = [(0, [])]
    for number, line in enumerate(text.splitlines()):
        marker = _MARKER.match(line)
        if marker:
            parts.append((number, []))
            line = " " * len(marker[1]) + line[len(marker[1]) :]
        parts[-1][1].append(line)
    return [(above, "\n".join(lines) + "\n") for above, lines in parts]


def _objects(place: Place) -> list[Manifest]:
    value = place.value
    if not isinstance(value, dict):
        raise ConfigError((place.problem(f"must be a mapping, not {show(value)}"),))
    api, kind = str(value.get("apiVersion") or ""), str(value.get("kind") or "")
    items = value.get("items")
    if kind.endswith("List") and isinstance(items, tuple):
        return [one for n in range(len(items)) for one in _objects(place.at("items", n))]
    return [Manifest(place, api, kind)]


def inner(place: Place, text: str) -> Place:
    """The YAML that is the text at `place`; `text` is the whole file.

    Raises ConfigError with every problem of reading it. Text that is quoted or folded has lines of
    its own: places are then those within it.
    """
    value = place.value
    if not isinstance(value, str):
        raise ConfigError((place.problem(f"must be text, not {show(value)}"),))
    line = place.document.mark(place.loc).line
    lines = text.splitlines()
    header = lines[line - 1].rpartition(":")[2].strip() if line <= len(lines) else ""
    source, above = f"{place.source}: {show_path(place.loc)}", 0
    if header.startswith("|"):
        count = len(value.splitlines())
        value = "\n".join(lines[line : line + count]) + "\n"
        source, above = place.source, line
    document = load(value, above)
    if document.problems:
        raise ConfigError(tuple(f"{source}:{problem}" for problem in document.problems))
    return Place(source, document)
