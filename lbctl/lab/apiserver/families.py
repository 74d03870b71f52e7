"""IP families of Services: what is filled in, what is refused, what may change. Pure.

Worded and ordered as kube-apiserver's own (Kubernetes, "IPv4/IPv6 dual-stack", Services): the
families follow from what the user wrote, from the Service as it was, and from the cluster's ranges;
the first ClusterIP never changes, the second comes and goes with `ipFamilyPolicy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, Final

from lbctl.lab.apiserver.resources import Obj
from lbctl.lab.apiserver.status import Cause, duplicate, invalid_value, unsupported

FAMILIES: Final = ("IPv4", "IPv6")
SINGLE: Final = "SingleStack"
PREFER: Final = "PreferDualStack"
REQUIRE: Final = "RequireDualStack"
_POLICIES: Final = (PREFER, REQUIRE, SINGLE)
_IPS: Final = "spec.clusterIPs"
_PLURALS: Final = {"clusterIPs": "cluster IPs", "ipFamilies": "IP families"}
_LISTS: Final = tuple(_PLURALS)


def family_of(address: str) -> str:
    """`IPv4`, `IPv6`, or "" for what is no address."""
    try:
        return f"IPv{ip_address(address).version}"
    except ValueError:
        return ""


def normalize(before: Obj, spec: Obj) -> None:
    """Make `clusterIPs` follow a `clusterIP` that was written without it; {} before a create."""
    wanted, listed = spec.get("clusterIP"), spec.get("clusterIPs")
    if wanted and not listed:
        spec["clusterIPs"] = [wanted]
    elif before and listed == before.get("clusterIPs") and wanted != before.get("clusterIP"):
        spec["clusterIPs"] = [wanted] if wanted else []


def carry_over(before: Obj, spec: Obj) -> None:
    """An update that leaves the addresses out keeps them; one to SingleStack drops the second."""
    if before.get("type") == "ExternalName":
        return
    if not spec.get("clusterIP") and before.get("clusterIP"):
        spec["clusterIP"] = before["clusterIP"]
    if not spec.get("clusterIPs") and spec.get("clusterIP") == before.get("clusterIP"):
        spec["clusterIPs"] = list(before.get("clusterIPs") or ())
    spec.setdefault("ipFamilyPolicy", before.get("ipFamilyPolicy", SINGLE))
    if spec["ipFamilyPolicy"] == SINGLE and before.get("ipFamilyPolicy") in (PREFER, REQUIRE):
        for field in _LISTS:
            if spec.get(field) == before.get(field):
                spec[field] = spec.get(field, [])[:1]


def fill(before: Obj, spec: Obj, offered: Sequence[str]) -> None:
    """Policy and families that were not written. `offered`: the cluster's, its default first."""
    if before and _prefers_still(before, spec):
        return
    bare = spec.get("clusterIP") == "None" and not spec.get("selector")
    spec.setdefault("ipFamilyPolicy", REQUIRE if bare else SINGLE)
    chosen = spec["ipFamilies"] = list(spec.get("ipFamilies") or ())
    addresses = [ip for ip in spec.get("clusterIPs") or () if ip != "None"]
    chosen += [family for ip in addresses[len(chosen) :] if (family := family_of(ip))]
    if not chosen:
        chosen.append(offered[0])
    if spec["ipFamilyPolicy"] != SINGLE and len(chosen) == 1:
        chosen += [f for f in (FAMILIES if bare else offered) if f not in chosen]


def _prefers_still(before: Obj, spec: Obj) -> bool:
    """A Service that prefers two families gets or loses one only when somebody asks for it."""
    same = all(spec.get(key) == before.get(key) for key in ("type", *_LISTS))
    return same and before.get("ipFamilyPolicy") == spec.get("ipFamilyPolicy") == PREFER


def causes(spec: Obj, offered: Sequence[str]) -> list[Cause]:
    """What is wrong with addresses, families and policy, after `fill`."""
    found = _policy_causes(spec, offered) + _address_causes(spec)
    families = spec.get("ipFamilies") or []
    bare = spec.get("clusterIP") == "None" and not spec.get("selector")
    for index, family in enumerate(families):
        at = f"spec.ipFamilies[{index}]"
        if family not in FAMILIES:
            found.append(unsupported(at, family, FAMILIES))
        elif family in families[:index]:
            found.append(duplicate(at, family))
        elif family not in offered and not bare:
            found.append(invalid_value(at, family, "not configured on this cluster"))
    return found


def _policy_causes(spec: Obj, offered: Sequence[str]) -> list[Cause]:
    at, policy = "spec.ipFamilyPolicy", spec.get("ipFamilyPolicy")
    if policy not in _POLICIES:
        return [unsupported(at, str(policy), _POLICIES)]
    if policy == SINGLE:
        return [
            invalid_value(
                at,
                policy,
                f"must be '{REQUIRE}' or '{PREFER}' when multiple {word} are specified",
            )
            for field, word in _PLURALS.items()
            if len(spec.get(field) or ()) > 1
        ][:1]
    if policy == REQUIRE and len(offered) < 2 and spec.get("clusterIP") != "None":
        return [invalid_value(at, policy, "this cluster is not configured for dual-stack services")]
    return []


def _address_causes(spec: Obj) -> list[Cause]:
    addresses, first = spec.get("clusterIPs") or [], spec.get("clusterIP")
    if not addresses:
        return []
    if not first:
        return [invalid_value(_IPS, addresses, "must be empty when `clusterIP` is not specified")]
    if addresses[0] != first:
        return [invalid_value(_IPS, addresses, "first value must match `clusterIP`")]
    if len(addresses) > 2:
        return [invalid_value(_IPS, addresses, "may only hold up to 2 values")]
    if "None" in addresses:
        detail = "must be exactly one value when it is 'None'"
        return [] if len(addresses) == 1 else [invalid_value(_IPS, addresses, detail)]
    found = []
    for index, address in enumerate(addresses):
        at, family = f"{_IPS}[{index}]", family_of(address)
        wanted = dict(enumerate(spec.get("ipFamilies") or ())).get(index)
        if not family:
            found.append(invalid_value(at, address, "must be a valid IP address"))
        elif wanted and wanted != family:
            detail = f"expected an {wanted} value as indicated by `ipFamilies[{index}]`"
            found.append(invalid_value(at, address, detail))
    return found


def change(before: Obj, after: Obj) -> list[Cause]:
    """What must not change between two versions of a Service that both have addresses."""
    if "ExternalName" in (before["type"], after["type"]):
        return []
    return _moved(before, after, "clusterIPs", "cluster IP") + _moved(
        before, after, "ipFamilies", "IP family"
    )


def _moved(before: Obj, after: Obj, field: str, one: str) -> list[Cause]:
    old: list[Any] = before.get(field) or []
    new: list[Any] = after.get(field) or []
    if old and not new:
        return [invalid_value(f"spec.{field}[0]", new, f"primary {one} may not be unset")]
    if len(old) == len(new):
        pairs = zip(old, new, strict=True)
        moved = [index for index, (was, now) in enumerate(pairs) if was != now]
    else:
        moved = [0] if old[:1] != new[:1] else []
    found = [invalid_value(f"spec.{field}[{i}]", new, "may not change once set") for i in moved]
    if len(new) == 1 < len(old) and after.get("ipFamilyPolicy") != SINGLE:
        detail = f"must be '{SINGLE}' to release the secondary {one}"
        found.append(invalid_value("spec.ipFamilyPolicy", after.get("ipFamilyPolicy"), detail))
    return found
