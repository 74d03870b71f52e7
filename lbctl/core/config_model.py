"""What the parts of the configuration are made of: their base class and the shared kinds of value.

Rules: frozen, strict, no unknown key. YAML's camelCase is the alias of each snake_case field.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from lbctl.core import config_values as values
from lbctl.core.model import Address

Label = Annotated[str, BeforeValidator(values.parse_label)]
Asn = Annotated[int, BeforeValidator(values.parse_asn)]
Unicast = Annotated[Address, BeforeValidator(values.parse_unicast)]
Seconds = Annotated[float, BeforeValidator(values.parse_duration)]


def given(value: object) -> object:
    """A section whose lines are all commented out is an empty section."""
    return {} if value is None else value


class Model(BaseModel):
    """A section of the configuration."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_by_name=True, validate_by_alias=True
    )
