"""The probe keys as files: the mounted Secret of agents and managers."""

from __future__ import annotations

from pathlib import Path

from lbctl.core.keys import Keys, parse_keys
from lbctl.errors import ConfigError


def read_keys(directory: Path) -> Keys:
    """Read the mounted Secret; raises ConfigError if it is missing, short or a placeholder."""
    values: dict[str, bytes] = {}
    for name in ("current", "previous"):
        try:
            values[name] = (directory / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError((f"{directory / name} cannot be read: {error}",)) from error
    return parse_keys(values)
