"""Any of the other controllers' files into our configuration."""

from __future__ import annotations

from collections.abc import Iterable

from lbctl.core.imports import cilium, kubevip, metallb_configmap, metallb_resources, openelb
from lbctl.core.imports.draft import Draft, render
from lbctl.core.manifests import Manifest, inner, manifests
from lbctl.errors import ConfigError

_RESOURCES = {
    metallb_resources.GROUP: metallb_resources.convert,
    openelb.GROUP: openelb.convert,
    cilium.GROUP: cilium.convert,
}


def convert(files: Iterable[tuple[str, str]]) -> str:
    """Name and text of each file → our configuration, with comments, valid by our own parser.

    Raises ConfigError with every problem at its `FILE:LINE:COLUMN`, and when no file holds anything
    that is known.
    """
    draft = Draft()
    problems: list[str] = []
    names: list[str] = []
    for source, text in files:
        names.append(source)
        try:
            for found in manifests(text, source):
                problems += _take(found, text, draft)
        except ConfigError as error:
            problems += error.problems
    if problems or draft.problems:
        raise ConfigError(tuple(dict.fromkeys([*problems, *draft.problems])))
    if not draft.pools and not draft.peers:
        said = "nothing of MetalLB, OpenELB, kube-vip or Cilium is in there"
        raise ConfigError((f"{', '.join(names)}: {said}",))
    return render(draft, ", ".join(names))


def _take(found: Manifest, text: str, draft: Draft) -> tuple[str, ...]:
    """Convert one object; what is wrong with it."""
    try:
        if not _known(found, text, draft):
            kind = " ".join(part for part in (found.api, found.kind) if part)
            draft.notes.append(f"{found.place}: {kind} {found.name} is not ours to read: left out")
    except ConfigError as error:
        return error.problems
    return ()


def _known(found: Manifest, text: str, draft: Draft) -> bool:
    place = found.place
    value = place.value if isinstance(place.value, dict) else {}
    if not found.kind:
        if not {"peers", "address-pools"} & value.keys():
            raise ConfigError((place.problem("is neither a manifest nor MetalLB's configuration"),))
        metallb_configmap.convert(place, draft)
        return True
    resource = _RESOURCES.get(found.group)
    if resource is not None:
        return resource(found, draft)
    data = place.at("data")
    keys = data.value.keys() if isinstance(data.value, dict) else ()
    if found.kind != "ConfigMap":
        return False
    if "config" in keys:
        metallb_configmap.convert(inner(data.at("config"), text), draft)
        return True
    if any(key.startswith(kubevip.KEYS) for key in keys):
        kubevip.convert(data, draft)
        return True
    return False
