"""The configuration as a JSON Schema, for editors. Generated from the models, never written.

Rules: it says what each key looks like; what only the parser knows (overlaps, duplicates, which
addresses can be used) is not in it. A validator without an entry here is an error, so that a new
kind of value cannot be forgotten.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from lbctl.core.config import Config

_DURATION: Final = {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,6})?(ms|s|m|h)$"}
_LABEL: Final = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
_ADDRESS: Final = {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]}
_ADDRESSES: Final = {"type": "string", "pattern": "^[ 0-9A-Fa-f:./-]+$"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_VALUES: Final[dict[str, JsonSchemaValue]] = {
    "parse_version": {"const": 1},
    "parse_label": _LABEL,
    "parse_asn": {"type": "integer", "minimum": 1, "maximum": 4294967294},
    "parse_unicast": _ADDRESS,
    "parse_router_id": {"type": "string", "format": "ipv4"},
    "parse_duration": {"anyOf": [{"type": "number", "minimum": 0}, _DURATION]},
    "parse_hold_time": {"anyOf": [{"type": "integer", "minimum": 3, "maximum": 65535}, _DURATION]},
    "parse_restart_time": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 120}, _DURATION]},
    "parse_secret_name": {"type": "string", "maxLength": 253},
    "parse_interface": {"type": "string", "minLength": 1, "maxLength": 15},
    "parse_range": _ADDRESSES,
    "parse_label_key": {"type": "string", "maxLength": 317},
    "parse_match_labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "parse_owner": {"type": "string", "pattern": "^[-a-z0-9]+/[-a-z0-9]+$"},
    "parse_quota": {"anyOf": [_COUNT, {"type": "object", "additionalProperties": _COUNT}]},
}
# What may stand in the place of a section or an entry.
_INSTEAD: Final[dict[str, JsonSchemaValue]] = {"given": {"type": "null"}, "_reserved": _ADDRESSES}


class _Generator(GenerateJsonSchema):
    def function_before_schema(self, schema: Any) -> JsonSchemaValue:
        name = schema["function"]["function"].__name__
        if name in _INSTEAD:
            return {"anyOf": [self.generate_inner(schema["schema"]), _INSTEAD[name]]}
        return dict(_VALUES[name])

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No titles: they would be the keys again."""
        return False

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        """Without the default's value: as the models have it, it is not as people write it."""
        return self.generate_inner(schema["schema"])


def schema() -> str:
    """The JSON Schema (2020-12) as text."""
    made = Config.model_json_schema(by_alias=True, schema_generator=_Generator)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Generated: lbctl config schema > deploy/config.schema.json",
    }
    return json.dumps(head | made | {"title": "lbctl configuration"}, indent=2) + "\n"
