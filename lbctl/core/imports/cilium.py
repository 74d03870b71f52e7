"""Cilium's LB-IPAM: CiliumLoadBalancerIPPool of group cilium.io.

Source: Cilium's documentation, "LoadBalancer IP Address Management", and
pkg/k8s/apis/cilium.io/v2alpha1/lbipam_types.go.
"""

from __future__ import annotations

from typing import Final

from pydantic import Field

from lbctl.core.imports.draft import Draft, Item
from lbctl.core.imports.reading import Camel, Selector, Text, read
from lbctl.core.manifests import Manifest, Place

GROUP: Final = "cilium.io"
_NAMESPACE: Final = "io.kubernetes.service.namespace"
_NAME: Final = "io.kubernetes.service.name"


class _Block(Camel):
    cidr: Text = ""
    start: Text = ""
    stop: Text = ""


class _Spec(Camel):
    blocks: tuple[_Block, ...] = ()
    cidrs: tuple[_Block, ...] = ()  # up to 1.15
    service_selector: Selector | None = None
    allow_first_last_ips: Text = Field(default="", alias="allowFirstLastIPs")
    disabled: bool = False


def convert(found: Manifest, draft: Draft) -> bool:
    """Add one object to the draft; False if its kind is not this one. Raises ConfigError."""
    if found.kind != "CiliumLoadBalancerIPPool":
        return False
    place = found.place.at("spec")
    spec = read(_Spec, place)
    item = draft.pool(found.name, found.place.at("metadata", "name"))
    texts = [(place.at("blocks", n), _text(one)) for n, one in enumerate(spec.blocks)]
    texts += [(place.at("cidrs", n), _text(one)) for n, one in enumerate(spec.cidrs)]
    draft.addresses(item, place, texts)
    if draft.problems:
        return True
    if spec.allow_first_last_ips.lower() == "no":
        draft.without_ends(item, place.at("allowFirstLastIPs"), "as it says")
    elif not spec.allow_first_last_ips and found.api == "cilium.io/v2alpha1":
        item.note(place, "the first and the last address are given too; before 1.16 Cilium did not")
    if spec.disabled:
        item.keys["drain"] = True
    if spec.service_selector is not None:
        _selector(item, place.at("serviceSelector"), spec.service_selector)
    return True


def _text(block: _Block) -> str:
    if block.cidr:
        return block.cidr
    return f"{block.start}-{block.stop}" if block.stop else block.start


def _selector(item: Item, place: Place, selector: Selector) -> None:
    """Cilium selects by two labels of its own, a Service's namespace and its name, too."""
    plain = dict(selector.match_labels)
    namespace = plain.pop(_NAMESPACE, None)
    expressions = [r for r in selector.match_expressions if r.key not in (_NAMESPACE, _NAME)]
    special = [r for r in selector.match_expressions if r.key in (_NAMESPACE, _NAME)]
    for one in special:
        if one.key == _NAMESPACE and one.operator == "In" and namespace is None:
            item.keys["namespaces"] = one.values
        else:
            item.keys["autoAssign"] = False
            item.note(place, f"{one.key} {one.operator}: not taken over; given on request only")
    if namespace is not None:
        item.keys["namespaces"] = (namespace,)
    if plain.pop(_NAME, None) is not None:
        item.keys["autoAssign"] = False
        item.note(place, f"{_NAME}: not taken over; given on request only")
    if plain or expressions:
        rest = Selector.model_construct(match_labels=plain, match_expressions=tuple(expressions))
        item.keys["serviceSelectors"] = [rest.plain()]
