"""Which Services are ours: by type, by class, and not while they are being deleted.

Rules: pure; `services` of the configuration says which classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lbctl.core.config import Config, Services
from lbctl.core.model import Eip, Phase, Service
from lbctl.core.reasons import Reason

ANY_CLASS_RULE: Final = Services()  # before there is a configuration


def class_rule(config: Config | None) -> Services:
    """Which classes are ours."""
    return config.services if config is not None else ANY_CLASS_RULE


def not_ours(service: Service, rule: Services = ANY_CLASS_RULE) -> Reason | None:
    """Why a Service gets no address from us, None if it does. rule: which classes are ours.

    One that is being deleted gives back.
    """
    if not service.is_load_balancer:
        return Reason.NOT_LOAD_BALANCER
    found = service.load_balancer_class
    if not (rule.without_class if found is None else found == rule.load_balancer_class):
        return Reason.OTHER_CLASS
    if service.deleting:
        return Reason.RELEASING
    return None


def was_ours(service: Service, eips: Iterable[Eip]) -> bool:
    """Whether a Service of another class shows one of these EIPs as its own: only the configuration
    can have changed, for the class cannot, and a change of type clears the status. It stays."""
    return not service.deleting and any(
        eip.phase is Phase.BOUND
        and eip.uid_of(service.ref) == service.uid
        and eip.address in service.ingress
        for eip in eips
    )
