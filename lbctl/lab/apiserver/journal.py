"""All objects in a file, so that a killed API server comes back with them.

One line of JSON per write, appended and handed to the kernel at once: it survives SIGKILL of the
process, not of the machine. At start, and when it has grown, the file is rewritten
without what was overwritten. A last line that was cut short is dropped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec

from lbctl.errors import LabError
from lbctl.lab.apiserver.store import Item, Key, Store, key_of

_COMPACT_BYTES: Final = 64 * 1024 * 1024  # written since the last rewrite


class Journal:
    """A state file. `load`, then `start`, then `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._size = 0

    def load(self, store: Store) -> None:
        """Put the file's objects into the store. Raises LabError when it is not a state file."""
        if not self._path.exists():
            return
        found: dict[tuple[str, Key], Any] = {}
        version = 0
        lines = self._path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                entry = msgspec.json.decode(line)
                resource, key, obj = entry["r"], (entry["k"][0], entry["k"][1]), entry["o"]
            except (msgspec.DecodeError, KeyError, TypeError, IndexError) as error:
                if number == len(lines):
                    break
                raise LabError(f"{self._path}:{number} is not a line of a state file") from error
            version = max(version, entry["v"])
            if obj is None:
                found.pop((resource, key), None)
            else:
                found[(resource, key)] = obj
        for (resource, _), obj in found.items():
            store.restore(resource, obj)
        store.reset_start(version)

    def start(self, store: Store) -> None:
        """Write the store's objects as a new file, and every further write after them."""
        self.close()
        temporary = self._path.with_suffix(".new")
        self._fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        kept = (
            self._line(store.version, resource, key_of(item.obj), item)
            for resource, item in store.everything()
        )
        self._write(b"".join(kept))
        temporary.replace(self._path)

        def append(resource: str, key: Key, item: Item | None) -> None:
            if self._size > _COMPACT_BYTES:
                self.start(store)
            self._write(self._line(store.version, resource, key, item))

        store.journal = append

    def _line(self, version: int, resource: str, key: Key, item: Item | None) -> bytes:
        head = msgspec.json.encode({"v": version, "r": resource, "k": key})[:-1]
        return head + b',"o":' + (item.raw if item else b"null") + b"}\n"

    def _write(self, data: bytes) -> None:
        self._size += len(data)
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._size = -1, 0
