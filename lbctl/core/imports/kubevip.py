"""kube-vip's cloud provider: ConfigMap `kubevip` in kube-system.

Source: kube-vip-cloud-provider's README, pkg/provider/loadBalancer.go and pkg/config/config.go:
`cidr-SCOPE` and `range-SCOPE`, SCOPE a namespace or `global`; a namespace takes the first of its
own cidr, the global cidr, its own range, the global range.
"""

from __future__ import annotations

from typing import Final

from lbctl.core.config_values import show
from lbctl.core.imports.draft import Draft, Item
from lbctl.core.manifests import Place

KEYS: Final = ("cidr-", "range-")
_NOTES: Final = {
    "interface-": "traffic comes in where forwarding.interfaces says",
    "allow-share-": "Services share an address by a sharing key of their own",
    "search-order": "the lowest free address is given first",
}
_YES: Final = ("1", "t", "T", "true", "TRUE", "True")


def convert(place: Place, draft: Draft) -> None:
    """Add the `data` of the ConfigMap, which stands at `place`, to the draft."""
    data = place.value if isinstance(place.value, dict) else {}
    texts = {key: str(value) for key, value in data.items() if value is not None}
    made: dict[str, Item] = {}
    for key in sorted(texts, key=lambda k: (k.partition("-")[2], k)):
        where = place.at(key)
        _, _, scope = key.partition("-")
        if key.startswith(KEYS) and scope:
            _pool(draft, made, where, scope, texts[key])
        elif why := next((text for start, text in _NOTES.items() if key.startswith(start)), ""):
            draft.notes.append(f"{where}: not taken over {show(texts[key])}: {why}")
        elif key != "skip-end-ips-in-cidr":
            draft.problems.append(where.problem("unknown key", key=True))
    if texts.get("skip-end-ips-in-cidr") in _YES:
        for item in made.values():
            draft.without_ends(item, place.at("skip-end-ips-in-cidr"), "as it says")
    if any(f"range-{scope}" in texts for scope in made) and "cidr-global" in texts:
        draft.notes.append(
            f"{place}: kube-vip used a range only where no cidr held; here all count"
        )


def _pool(draft: Draft, made: dict[str, Item], place: Place, scope: str, value: str) -> None:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if any(part in ("0.0.0.0/32", "0.0.0.0") for part in parts):
        draft.notes.append(f"{place}: left out: addresses from DHCP (0.0.0.0) are not given here")
        return
    if scope not in made:
        made[scope] = draft.pool(scope, place)
        if scope != "global":
            made[scope].keys |= {"namespaces": (scope,), "priority": 1}
    draft.addresses(made[scope], place, [(place, part) for part in parts])
