"""Foreign objects, read strictly: an unknown key or a wrong type is an error at its place.

Rules: a model has a field for every key that the origin knows, so what is left over is a mistake of
whoever wrote the file (the origin would ignore or refuse it). `null` means absent, as in Go.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Final, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lbctl.core.config_values import show
from lbctl.core.manifests import Place
from lbctl.core.positions import Loc
from lbctl.errors import ConfigError

M = TypeVar("M", bound="Foreign")

_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:h|ms|m|s))+\Z")
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s)")
_UNIT_S: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


class Foreign(BaseModel):
    """A mapping of another controller's; every key it may have is a field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {str(field.alias or name) for name, field in cls.model_fields.items()}
        return {k: v for k, v in data.items() if v is not None or k not in known}

    def given(self) -> tuple[tuple[str, str], ...]:
        """Field and key of what was written, in the order of the fields."""
        return tuple(
            (name, str(field.alias or name))
            for name, field in type(self).model_fields.items()
            if name in self.model_fields_set
        )


def _text(value: object) -> object:
    """Go's YAML takes a number for text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _seconds(value: object) -> int:
    """Go's durations (`90s`, `1m30s`), or a number of seconds; whole seconds."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, str) and _DURATION.match(value):
        return round(sum(float(n) * _UNIT_S[unit] for n, unit in _PART.findall(value)))
    raise ValueError(f"must be a duration such as 90s, not {show(value)}")


Text = Annotated[str, BeforeValidator(_text)]
Seconds = Annotated[int, BeforeValidator(_seconds)]
Anything = Any  # read, and spoken of in a comment only


class Requirement(Foreign):
    """An entry of `matchExpressions`."""

    key: Text
    operator: Text
    values: tuple[Text, ...] = ()


def kebab(name: str) -> str:
    """`auto_assign` as MetalLB's ConfigMap spells it."""
    return name.replace("_", "-")


def camel(name: str) -> str:
    """`auto_assign` as custom resources spell it."""
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


class Camel(Foreign):
    """Part of a custom resource."""

    model_config = ConfigDict(alias_generator=camel)


class Selector(Camel):
    """A label selector as Kubernetes has them."""

    match_labels: dict[str, Text] = Field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()

    def plain(self) -> dict[str, object]:
        """As our configuration would have it."""
        found: dict[str, object] = {}
        if self.match_labels:
            found["matchLabels"] = dict(self.match_labels)
        if self.match_expressions:
            found["matchExpressions"] = [
                {"key": r.key, "operator": r.operator, **({"values": r.values} if r.values else {})}
                for r in self.match_expressions
            ]
        return found


def read(model: type[M], place: Place) -> M:
    """What stands at `place` as `model`. Raises ConfigError with every problem at its place."""
    value = place.value
    try:
        return model.model_validate({} if value is None else value)
    except ValidationError as error:
        problems = [_problem(model, place, dict(item)) for item in error.errors()]
        raise ConfigError(tuple(dict.fromkeys(problems))) from None


_EXPECTED: Final = {
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}


def _problem(model: type[Foreign], place: Place, error: dict[str, Any]) -> str:
    inside: Loc = tuple(p for p in error["loc"] if isinstance(p, int) or "[" not in p)
    loc, kind = place.loc + inside, error["type"]
    if kind == "extra_forbidden":
        return place.problem(_unknown(model, inside), loc, key=True)
    if kind == "missing":
        return place.problem("is missing", loc, key=True)
    if kind == "value_error":
        return place.problem(str(error["ctx"]["error"]), loc)
    said = _EXPECTED.get(kind, "cannot be")
    return place.problem(f"{said}, not {show(error.get('input'))}", loc)


def _unknown(model: type[Foreign], loc: Loc) -> str:
    owner: type[BaseModel] | None = model
    for part in loc[:-1]:
        if isinstance(part, str) and owner is not None:
            owner = _owner(owner, part)
    known = [str(f.alias or n) for n, f in owner.model_fields.items()] if owner else []
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"known here are {', '.join(known)}"
    return f"unknown key; {hint}"


def _owner(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of what stands under a key."""
    for name, field in model.model_fields.items():
        if (field.alias or name) == key:
            return _inside(field.annotation)
    return None


def _inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_inside(part) for part in get_args(annotation))
    return next((one for one in found if one is not None), None)
