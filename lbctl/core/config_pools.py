"""The pools of the configuration: which addresses there are, and who may have them.

Rules: a pool's `namespaces`, selectors, `reserved` and `quota` bind every Service, whatever it asks
for (`lbctl.core.tenancy` applies them). `priority`: lower first, 0 last, ties by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lbctl.core.config_model import Label, Model
from lbctl.core.config_values import (
    AddressRange,
    parse_label_key,
    parse_match_labels,
    parse_owner,
    parse_quota,
    parse_range,
)
from lbctl.core.model import Address, ObjectRef


class Requirement(Model):
    """One of a selector's matchExpressions, as Kubernetes has them."""

    key: Annotated[str, BeforeValidator(parse_label_key)]
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.operator in ("In", "NotIn") and not self.values:
            raise ValueError(f"{self.operator} needs values")
        if self.operator in ("Exists", "DoesNotExist") and self.values:
            raise ValueError(f"{self.operator} takes no values")
        return self

    def matches(self, labels: Mapping[str, str]) -> bool:
        """NotIn holds for an object without the label too (Kubernetes' rule)."""
        found = labels.get(self.key)
        match self.operator:
            case "In":
                return found in self.values
            case "NotIn":
                return found not in self.values
            case "Exists":
                return found is not None
        return found is None


class Selector(Model):
    """A label selector; everything in it must hold, an empty one matches all."""

    match_labels: Annotated[tuple[tuple[str, str], ...], BeforeValidator(parse_match_labels)] = (
        Field(default=(), validation_alias="matchLabels")
    )
    match_expressions: tuple[Requirement, ...] = Field(
        default=(), validation_alias="matchExpressions"
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is selected."""
        return all(labels.get(key) == value for key, value in self.match_labels) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )


class Reserved(Model):
    """Addresses that are never given out by themselves. `owner` alone may have them, if there is
    one, and gets them without asking."""

    addresses: Annotated[AddressRange, BeforeValidator(parse_range)] = Field(
        validation_alias="address"
    )
    owner: Annotated[ObjectRef, BeforeValidator(parse_owner)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.owner is not None and self.addresses.size > 1:
            raise ValueError("an owner has one address; write one entry for each")
        return self


def _reserved(value: object) -> object:
    if isinstance(value, str):
        return Reserved.model_construct(addresses=parse_range(value), owner=None)
    return value


class Pool(Model):
    """Addresses that Services get. docs/addresses.md has an example of each key."""

    name: Label
    addresses: tuple[Annotated[AddressRange, BeforeValidator(parse_range)], ...]
    auto_assign: bool = Field(default=True, validation_alias="autoAssign")
    avoid_buggy_ips: bool = Field(default=False, validation_alias="avoidBuggyIPs")
    priority: int = Field(default=0, ge=0, le=1_000_000)
    namespaces: tuple[Label, ...] = ()
    namespace_selectors: tuple[Selector, ...] = Field(
        default=(), validation_alias="namespaceSelectors"
    )
    service_selectors: tuple[Selector, ...] = Field(default=(), validation_alias="serviceSelectors")
    requests: Literal["any", "listed", "none"] = "any"
    share_across_namespaces: tuple[Label, ...] = Field(
        default=(), validation_alias="shareAcrossNamespaces"
    )
    reserved: tuple[Annotated[Reserved, BeforeValidator(_reserved)], ...] = ()
    quota: Annotated[tuple[tuple[str, int], ...], BeforeValidator(parse_quota)] = ()
    drain: bool = False
    release: bool = False

    @property
    def size(self) -> int:
        """How many addresses it holds."""
        return sum(part.size for part in self.addresses)

    @property
    def rank(self) -> tuple[float, str]:
        """Pools are tried in this order."""
        return self.priority or float("inf"), self.name

    @property
    def gives(self) -> bool:
        """Whether Services that ask for nothing get addresses of it."""
        return self.auto_assign and not self.drain

    def quota_of(self, namespace: str) -> int | None:
        """How many addresses a namespace may have, None without a limit."""
        found = dict(self.quota)
        return found.get(namespace, found.get("*"))

    def avoids(self, address: Address) -> bool:
        """Whether it is one of those that `avoidBuggyIPs` keeps back: .0 and .255, IPv4 only."""
        return self.avoid_buggy_ips and address.version == 4 and int(address) & 255 in (0, 255)

    def __contains__(self, address: Address) -> bool:
        return any(address in part for part in self.addresses)
