"""YAML text into plain values, with the line and column of every key and value.

Rules: works on the parser's events, never on constructed objects, so that no tag runs code, no
alias multiplies memory and no depth overflows the stack. The YAML that is understood is the part
that people write by hand: mappings with text keys, lists, text, whole numbers, decimals, true,
false, null. `010` and `0x10` stay text: nobody agrees on what number they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

Loc: TypeAlias = tuple[str | int, ...]

MAX_BYTES: Final = (1 << 20) - 1024  # what a ConfigMap can hold, with keys of ours beside it
MAX_DEPTH: Final = 64  # the schema in a CRD of somebody's manifests has 30

_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,40}\Z")
_INT: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})\Z")
_FLOAT: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})\.[0-9]{1,18}\Z")
_WORDS: Final[dict[str, bool | None]] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """A place in the text; both numbers start at 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a place. `loc` is the path of keys and indexes, () for the whole file."""

    mark: Mark
    loc: Loc
    text: str

    def __str__(self) -> str:
        where = f"{self.mark.line}:{self.mark.column}: "
        return f"{where}{show_path(self.loc)}: {self.text}" if self.loc else where + self.text


@dataclass(slots=True)
class Document:
    """A parsed file: mappings are dicts, lists are tuples. Marks are of values and of keys.

    complete: it could be read to its end; else `value` is worth nothing. above: how many lines of
    the file come before it.
    """

    value: object = None
    complete: bool = False
    above: int = 0
    values: dict[Loc, Mark] = field(default_factory=dict)
    keys: dict[Loc, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mark(self, loc: Loc) -> Mark:
        """The place of the value at `loc`, or of the nearest thing that holds it."""
        while loc and loc not in self.values:
            loc = loc[:-1]
        return self.values.get(loc, self.place(0, 0))

    def key_mark(self, loc: Loc) -> Mark:
        """The place of the key at `loc`; where it has none (list items), that of the value."""
        return self.keys.get(loc) or self.mark(loc)

    def place(self, line: int, column: int) -> Mark:
        """The place in the file of what the parser counts from 0."""
        return Mark(self.above + line + 1, column + 1)


def show_path(loc: Loc) -> str:
    """`("pools", 0, "name")` as people write it, `pools[0].name`, always on one line."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        key = part if _KEY.match(part) else ascii(part[:40])
        text += f".{key}" if text else key
    return text


def load(text: str, above: int = 0) -> Document:
    """Read one YAML document. Never raises: what is wrong is in `problems`, in file order.

    above: how many lines of the file come before the text; marks are of the file.
    A syntax error ends the reading: nothing after it can be trusted, so it is the only problem
    besides those found before it.
    """
    document = Document(above=above)
    start = document.place(0, 0)
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        document.problems.append(Problem(start, (), f"the file is larger than {MAX_BYTES} bytes"))
        return document
    try:
        _Builder(document, YAML(typ="safe", pure=True).parse(text)).document_root()
    except _Stop:
        pass
    except ReaderError as error:
        document.problems.append(_unreadable(document, text, error))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = document.place(mark.line, mark.column) if mark else start
        said = error.problem or error.context or "cannot be read"
        document.problems.append(Problem(at, (), f"not valid YAML: {said}"))
    except YAMLError as error:
        first = str(error).splitlines()[0] if str(error) else "cannot be read"
        document.problems.append(Problem(start, (), f"not valid YAML: {first}"))
    return document


def _unreadable(document: Document, text: str, error: ReaderError) -> Problem:
    index = error.position if isinstance(error.position, int) else 0
    before = text[:index]
    at = document.place(before.count("\n"), index - (before.rfind("\n") + 1))
    character = text[index : index + 1]
    name = f"U+{ord(character):04X}" if character else "at the end"
    return Problem(at, (), f"not valid YAML: the character {name} is not allowed")


class _Stop(Exception):
    """Reading on makes no sense; the problem is recorded."""


class _Builder:
    """Turns events into values. Recursion is bounded by MAX_DEPTH."""

    def __init__(self, document: Document, events: Iterator[Any]) -> None:
        self._document = document
        self._events = events

    def document_root(self) -> None:
        for event in self._events:
            kind = type(event).__name__
            if kind in ("StreamStartEvent", "DocumentStartEvent", "DocumentEndEvent"):
                if kind == "DocumentStartEvent" and () in self._document.values:
                    self._stop(event, (), "a second document starts here (`---`); only one is read")
                continue
            if kind == "StreamEndEvent":
                self._document.complete = True
                return
            self._document.value = self._value(event, ())

    def _stop(self, event: Any, loc: Loc, text: str) -> None:
        self._document.problems.append(Problem(self._mark(event), loc, text))
        raise _Stop

    def _value(self, event: Any, loc: Loc) -> object:
        kind = type(event).__name__
        if len(loc) > MAX_DEPTH:
            self._stop(event, (), f"nested deeper than {MAX_DEPTH} levels")
        if kind == "AliasEvent":
            self._stop(event, loc, "aliases (`*name`) are not supported; write the value out")
        self._document.values[loc] = self._mark(event)
        tag = getattr(event, "tag", None) or getattr(event, "ctag", None)
        if tag is not None and str(tag) not in ("!", "None", ""):
            self._document.problems.append(
                Problem(
                    self._mark(event), loc, "tags (`!…`) are not supported; write a plain value"
                )
            )
        if kind == "MappingStartEvent":
            return self._mapping(loc)
        if kind == "SequenceStartEvent":
            return self._sequence(loc)
        return _scalar(event)

    def _sequence(self, loc: Loc) -> tuple[object, ...]:
        items: list[object] = []
        for event in self._events:
            if type(event).__name__ == "SequenceEndEvent":
                break
            items.append(self._value(event, (*loc, len(items))))
        return tuple(items)

    def _mapping(self, loc: Loc) -> dict[str, object]:
        found: dict[str, object] = {}
        for event in self._events:
            kind = type(event).__name__
            if kind == "MappingEndEvent":
                break
            if kind != "ScalarEvent":
                self._stop(event, loc, "a key must be plain text")
            key = str(event.value)
            here = (*loc, key)
            if key in found:
                first = self._document.keys[here].line
                self._document.problems.append(
                    Problem(
                        self._mark(event), here, f"the key is there twice (first in line {first})"
                    )
                )
                # Read past the value; what is wrong inside it needs no message of its own.
                _Builder(Document(), self._events)._value(next(self._events), loc)
                continue
            self._document.keys[here] = self._mark(event)
            found[key] = self._value(next(self._events), here)
        return found

    def _mark(self, event: Any) -> Mark:
        return self._document.place(event.start_mark.line, event.start_mark.column)


def _scalar(event: Any) -> object:
    text = str(event.value)
    if event.style in ("'", '"', "|", ">"):
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return text
