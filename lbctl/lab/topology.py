"""A topology file in containerlab's format as frozen dataclasses. Pure but for reading the file.

The part of the format that a lab of `linux` nodes needs: `name`, `topology.defaults`,
`topology.kinds.linux`, `topology.nodes` (kind, image, binds, exec, labels) and `topology.links`.
What the lab cannot carry out is refused, never ignored: a topology that works here has to mean the
same under `containerlab deploy`. So a link cannot end at `eth0`, which is containerlab's management
network, and lists and labels, which containerlab merges, stand only at nodes. Everything wrong is
reported at once.

Source: https://containerlab.dev/manual/topo-def-file/ and `schemas/clab.schema.json` there.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_interface, ip_network
from pathlib import Path
from typing import Any, Final, TypeAlias

from lbctl.errors import LabError

ROLE_LABEL: Final = "lbctl.io/role"
POD_CIDR_LABEL: Final = "lbctl.io/pod-cidr"
ROLES: Final = frozenset({"switch", "node", "control", "host", "client", "lan", "cluster"})
# Those that have routes to the pod networks.
ROUTED_ROLES: Final = frozenset({"node", "control", "host", "cluster"})

_NODE_KEYS: Final = frozenset({"kind", "image", "binds", "exec", "labels", "group"})
_SHARED_KEYS: Final = frozenset({"kind", "image", "group"})
_TOPOLOGY_KEYS: Final = frozenset({"defaults", "kinds", "nodes", "links"})
_MANAGEMENT: Final = "eth0"
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
Interface: TypeAlias = IPv4Interface | IPv6Interface


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host shown inside a node. `source` is absolute."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a link: a node's interface."""

    node: str
    interface: str


@dataclass(frozen=True, slots=True)
class Link:
    """A cable."""

    a: LinkEnd
    b: LinkEnd

    def ends(self) -> tuple[LinkEnd, LinkEnd]:
        """Both ends, as written."""
        return self.a, self.b

    def far(self, node: str) -> LinkEnd:
        """The end that is not `node`'s."""
        return self.b if self.a.node == node else self.a


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node. `exec` are command lines without a shell, run in order once the links are up."""

    name: str
    role: str
    image: str = ""
    binds: tuple[Bind, ...] = ()
    exec: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def pod_cidr(self) -> str:
        """The node's pod networks, comma-separated, the main family first; "" without one."""
        return dict(self.labels).get(POD_CIDR_LABEL, "")


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes by name and links, both in the file's order."""

    name: str
    nodes: tuple[NodeSpec, ...]
    links: tuple[Link, ...] = field(default=())

    def node(self, name: str) -> NodeSpec:
        """The node of that name; LabError if there is none."""
        for spec in self.nodes:
            if spec.name == name:
                return spec
        known = ", ".join(spec.name for spec in self.nodes)
        raise LabError(f"no node {name!r} in this lab; there are {known}")

    def links_of(self, name: str) -> tuple[Link, ...]:
        """The links that end at a node."""
        return tuple(link for link in self.links if name in (link.a.node, link.b.node))

    def to_json(self) -> dict[str, Any]:
        """For the lab's state file; `from_json` reads it back."""
        return asdict(self)


def plays(own: str, role: str) -> bool:
    """Whether a machine of one role is one of another: a host is a node and a control host."""
    return own == role or (own == "host" and role in ("node", "control"))


def from_json(data: Mapping[str, Any]) -> Topology:
    """The inverse of `Topology.to_json`, after a trip through JSON."""
    nodes = tuple(
        NodeSpec(
            name=n["name"],
            role=n["role"],
            image=n["image"],
            binds=tuple(Bind(**b) for b in n["binds"]),
            exec=tuple(n["exec"]),
            labels=tuple((k, v) for k, v in n["labels"]),
        )
        for n in data["nodes"]
    )
    links = tuple(Link(LinkEnd(**item["a"]), LinkEnd(**item["b"])) for item in data["links"])
    return Topology(data["name"], nodes, links)


def load(path: Path) -> Topology:
    """Read and check a topology file. Raises LabError that names everything wrong, one a line."""
    from ruamel.yaml import YAML  # slow to import, and only `lab up` reads a topology
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe").load(path.read_text("utf-8"))
    except OSError as error:
        raise LabError(f"cannot read topology {path}: {error.strerror}") from error
    except YAMLError as error:
        raise LabError(f"{path}: not YAML: {error}") from error
    return parse(data, path.resolve().parent, str(path))


def parse(data: object, base: Path, source: str) -> Topology:
    """Check a topology that was read as YAML. Relative binds start at `base`."""
    problems: list[str] = []
    if not isinstance(data, Mapping) or not isinstance(data.get("topology"), Mapping):
        raise LabError(f"{source}: has no `topology:`; see bgp-lab/small.clab.yml")
    body = data["topology"]
    shared = _shared(body, problems)
    nodes = [
        _node(str(name), {**shared, **(raw or {})}, base, problems)
        for name, raw in (body.get("nodes") or {}).items()
    ]
    names = {node.name for node in nodes}
    links = [link for raw in body.get("links") or () if (link := _link(raw, names, problems))]
    problems += _twice(links)
    if not nodes:
        problems.append("topology.nodes: there are none")
    if problems:
        raise LabError("\n".join(f"{source}: {problem}" for problem in problems))
    return Topology(str(data.get("name", "lab")), tuple(nodes), tuple(links))


def _shared(body: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """What `defaults` and `kinds.linux` say for every node."""
    problems += [
        f"topology.{key}: not supported by the lab" for key in sorted(set(body) - _TOPOLOGY_KEYS)
    ]
    shared: dict[str, Any] = {}
    linux = (body.get("kinds") or {}).get("linux")
    for where, raw in (("defaults", body.get("defaults")), ("kinds.linux", linux)):
        shared |= raw or {}
        problems += [
            f"{where}.{key}: not supported by the lab here, only at a node"
            for key in sorted(set(raw or ()) - _SHARED_KEYS)
        ]
    return {key: value for key, value in shared.items() if key in _SHARED_KEYS}


def _node(name: str, raw: Mapping[str, Any], base: Path, problems: list[str]) -> NodeSpec:
    where = f"nodes.{name}"
    if not _NAME.fullmatch(name):
        problems.append(f"{where}: a name is lower-case letters, digits and dashes, at most 32")
    problems += [
        f"{where}.{key}: not supported by the lab" for key in sorted(set(raw) - _NODE_KEYS)
    ]
    if raw.get("kind", "linux") != "linux":
        problems.append(f"{where}.kind: {raw['kind']!r}; only `linux` runs in namespaces")
    labels = {str(k): str(v) for k, v in (raw.get("labels") or {}).items()}
    role = labels.get(ROLE_LABEL, "")
    if role not in ROLES:
        problems.append(
            f"{where}.labels.{ROLE_LABEL}: {role!r} is none of {', '.join(sorted(ROLES))}"
        )
    try:
        for cidr in labels[POD_CIDR_LABEL].split(",") if POD_CIDR_LABEL in labels else ():
            ip_network(cidr.strip())
    except ValueError as error:
        problems.append(f"{where}.labels.{POD_CIDR_LABEL}: {error}")
    binds = [
        bind for text in raw.get("binds") or () if (bind := _bind(where, text, base, problems))
    ]
    lines = tuple(str(line) for line in raw.get("exec") or ())
    for line in lines:
        try:
            shlex.split(line)
        except ValueError as error:
            problems.append(f"{where}.exec: {line!r}: {error}")
    image = str(raw.get("image", ""))
    return NodeSpec(name, role, image, tuple(binds), lines, tuple(sorted(labels.items())))


def _bind(where: str, text: object, base: Path, problems: list[str]) -> Bind | None:
    source, _, rest = str(text).partition(":")
    target, _, option = rest.partition(":")
    path = base / source
    if not target.startswith("/") or option not in ("", "ro", "rw") or "|" in str(text):
        problems.append(f"{where}.binds: {text!r} is not SOURCE:/TARGET[:ro]")
        return None
    if not path.exists():
        problems.append(f"{where}.binds: {path} does not exist")
        return None
    return Bind(str(path), target, option == "ro")


def _link(raw: object, names: set[str], problems: list[str]) -> Link | None:
    ends = raw.get("endpoints") if isinstance(raw, Mapping) else None
    parsed = [str(end).partition(":") for end in ends] if isinstance(ends, list) else []
    if len(parsed) != 2:
        problems.append(f"links: {raw!r} is not {{endpoints: [NODE:INTERFACE, NODE:INTERFACE]}}")
        return None
    for node, _, interface in parsed:
        if node not in names:
            problems.append(f"links: {node}:{interface}: there is no node {node!r}")
        if not _INTERFACE.fullmatch(interface):
            problems.append(f"links: {node}:{interface}: bad interface name")
        if interface == _MANAGEMENT:
            problems.append(f"links: {node}:{interface}: is the management network; begin at eth1")
    (a, _, a_if), (b, _, b_if) = parsed
    return Link(LinkEnd(a, a_if), LinkEnd(b, b_if))


def _twice(links: list[Link]) -> list[str]:
    count = Counter(end for link in links for end in link.ends())
    return [f"links: {e.node}:{e.interface}: used {n} times" for e, n in count.items() if n > 1]


@dataclass(frozen=True, slots=True)
class Addition:
    """What adding a node takes: its spec, its link, and the routes that the others need."""

    spec: NodeSpec
    link: Link
    addresses: tuple[str, ...]
    routes: tuple[str, ...]  # command lines for every node of ROUTED_ROLES


def next_node(topology: Topology) -> Addition:
    """Plan a node like the last one of role `node`: name, addresses, pod networks, port one up.

    Its exec lines are the last node's with that node's own addresses replaced, plus routes to it.
    Raises LabError if there is no node to go by.
    """
    nodes = [spec for spec in topology.nodes if spec.role == "node"]
    if not nodes:
        raise LabError("the topology has no node of role `node` to copy")
    last = nodes[-1]
    stem, number = _split_number(last.name)
    name = f"{stem}{number + 1}"
    own = _own_addresses(last)
    new = {key: ip_interface(f"{old.ip + 1}/{old.network.prefixlen}") for key, old in own.items()}
    lines = list(last.exec)
    for key, old in own.items():
        lines = [line.replace(f" {old} ", f" {new[key]} ") for line in lines]
    lines += _routes(_cidrs(last), own)
    cidrs = {key: _next_network(cidr) for key, cidr in _cidrs(last).items()}
    labels = {**dict(last.labels), POD_CIDR_LABEL: ",".join(cidrs.values())}
    spec = NodeSpec(
        name, "node", last.image, last.binds, tuple(lines), tuple(sorted(labels.items()))
    )
    link = topology.links_of(last.name)[0]
    far, near = link.far(last.name), next(e for e in link.ends() if e.node == last.name)
    new_link = Link(_free_port(topology, far), LinkEnd(name, near.interface))
    addresses = tuple(str(address.ip) for address in new.values())
    return Addition(spec, new_link, addresses, tuple(_routes(cidrs, new)))


def _routes(cidrs: Mapping[int, str], via: Mapping[int, Interface]) -> list[str]:
    """By family; one that only one of the two has is left out."""
    return [
        f"ip route replace {cidr} via {via[version].ip}"
        for version, cidr in cidrs.items()
        if version in via
    ]


def _cidrs(spec: NodeSpec) -> dict[int, str]:
    if not spec.pod_cidr:
        raise LabError(f"the last node has no label {POD_CIDR_LABEL}")
    cidrs = [cidr.strip() for cidr in spec.pod_cidr.split(",")]
    return {ip_network(cidr).version: cidr for cidr in cidrs}


def _split_number(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(\d+)", name)
    if match is None:
        raise LabError(f"cannot count on from node {name!r}: its name has no number at the end")
    return match[1], int(match[2])


def _own_addresses(spec: NodeSpec) -> dict[int, Interface]:
    """The first address of each family, by IP version."""
    found: dict[int, Interface] = {}
    for line in spec.exec:
        if match := re.match(r"ip addr(?:ess)? add (\S+) dev ", line):
            address = ip_interface(match[1])
            found.setdefault(address.version, address)
    if not found:
        raise LabError(f"node {spec.name} has no `ip address add A/N dev I` among its exec lines")
    return found


def _next_network(cidr: str) -> str:
    network = ip_network(cidr)
    return f"{network.network_address + network.num_addresses}/{network.prefixlen}"


def _free_port(topology: Topology, like: LinkEnd) -> LinkEnd:
    stem, _ = _split_number(like.interface)
    used = {e.interface for link in topology.links for e in link.ends() if e.node == like.node}
    number = next(n for n in range(1, 10_000) if f"{stem}{n}" not in used)
    return LinkEnd(like.node, f"{stem}{number}")
