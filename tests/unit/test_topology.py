"""Topology files: containerlab's format, every mistake at once, and the plan for one more node.

`clab.schema.json` here is not containerlab's schema but a subset of it in our own words: the keys
that a lab may use, each with the type that it has upstream or a narrower one. It was compared by
hand with two versions of `schemas/clab.schema.json` in srl-labs/containerlab, commits 007da91 (from
before `network-mode: none`) and b11ef1a (with it). Both say: a node has `kind` (an enumeration that
has `linux`), `image` and `group` (strings), `binds` (strings, unique, at least one), `exec`
(strings, at least one), `labels` (strings or numbers by name), and no key that the schema does not
name; `topology` has `nodes`, `kinds.linux` and `defaults` of that type, and `links`, at least one,
each with `endpoints` of unique `NODE:INTERFACE`, at least two; `name` is a string. So what passes
here passes both, as far as a reader can tell: no test has upstream's file or runs containerlab.
That `eth0` is the management network's, which no schema says, is checked by `topology.parse`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from lbctl.core import config
from lbctl.errors import LabError
from lbctl.lab import topology
from lbctl.lab.topology import Link, LinkEnd, Topology

HERE = Path(__file__).resolve().parent
LAB = HERE.parents[1] / "bgp-lab"
SCHEMA = json.loads((HERE / "clab.schema.json").read_text("utf-8"))


def raw(path: Path) -> Any:
    """A YAML file as plain data."""
    return YAML(typ="safe").load(path.read_text("utf-8"))


@pytest.mark.parametrize("path", sorted(LAB.glob("*.clab.yml")), ids=lambda path: path.name)
def test_topologies_are_valid_for_containerlab(path: Path) -> None:
    jsonschema.validate(raw(path), SCHEMA)
    topology.load(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("topology", "nodes", "tor-a", "kind"), "linus"),
        (("topology", "nodes", "tor-a", "exec"), []),
        (("topology", "nodes", "tor-a", "lables"), {}),
        (("topology", "links"), [{"endpoints": ["a:b"]}]),
        (("name",), 7),
    ],
)
def test_the_schema_refuses(where: tuple[str, ...], value: object) -> None:
    data = raw(LAB / "small.clab.yml")
    item = data
    for key in where[:-1]:
        item = item[key]
    item[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_the_schema_has_no_network_mode() -> None:
    """Upstream took `none` late, older schemas refuse it: a file with it would not be for all."""
    data = raw(LAB / "small.clab.yml")
    data["topology"]["kinds"]["linux"]["network-mode"] = "none"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


@pytest.mark.parametrize("path", sorted(LAB.glob("*.clab.yml")), ids=lambda path: path.name)
def test_data_links_leave_eth0_to_the_management_network(path: Path) -> None:
    """And no command touches it: it is there under containerlab, and absent in the lab."""
    found = topology.load(path)
    assert not [end for link in found.links for end in link.ends() if end.interface == "eth0"]
    assert not [line for node in found.nodes for line in node.exec if "eth0" in line]


@pytest.fixture
def small() -> Topology:
    return topology.load(LAB / "small.clab.yml")


def test_small_is_the_rack_that_the_documentation_draws(small: Topology) -> None:
    roles: dict[str, list[str]] = {}
    for node in small.nodes:
        roles.setdefault(node.role, []).append(node.name)
    assert roles == {
        "lan": ["rack", "edge"],
        "switch": ["tor-a", "tor-b"],
        "cluster": ["kube"],
        "control": ["control-1", "control-2"],
        "node": ["node-1", "node-2", "node-3"],
        "client": ["client"],
    }
    assert [small.node(f"node-{n}").pod_cidr for n in (1, 2, 3)] == [
        "10.244.1.0/24,fd00:10:244:1::/64",
        "10.244.2.0/24,fd00:10:244:2::/64",
        "10.244.3.0/24,fd00:10:244:3::/64",
    ]
    assert small.node("tor-a").image == "quay.io/frrouting/frr:8.4.4"
    assert small.node("node-1").image  # from topology.kinds


def test_json_round_trip(small: Topology) -> None:
    assert topology.from_json(json.loads(json.dumps(small.to_json()))) == small


def test_links(small: Topology) -> None:
    links = small.links_of("tor-b")
    assert [link.far("tor-b") for link in links] == [
        LinkEnd("rack", "eth2"),
        LinkEnd("edge", "eth2"),
    ]
    with pytest.raises(LabError, match="no node 'x' in this lab; there are rack, edge"):
        small.node("x")


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.clab.yml").write_text("""
name: bad
topology:
  groups: {x: {}}
  defaults: {exec: [true]}
  kinds: {linux: {image: x, labels: {lbctl.io/role: node}}}
  nodes:
    a:
      kind: nokia_srlinux
      network-mode: none
      labels: {lbctl.io/role: king, lbctl.io/pod-cidr: 10.0.0.0/33}
      binds: ["nowhere:/etc/x", "bad.clab.yml:relative", "bad.clab.yml:/x:rx"]
      exec: ["echo 'open"]
      startup-delay: 5
    Bad_Name: {labels: {lbctl.io/role: node}}
  links:
    - endpoints: ["a:eth1", "b:eth1"]
    - endpoints: ["a:eth1", "a:an-interface-name-too-long"]
    - endpoints: ["a:eth1"]
    - endpoints: ["a:eth2", "a:eth0"]
    - wrong
""")
    with pytest.raises(LabError) as error:
        topology.load(tmp_path / "bad.clab.yml")
    said = [line.partition(": ")[2] for line in str(error.value).splitlines()]
    starts = [
        "topology.groups: not supported",
        "defaults.exec: not supported by the lab here",
        "kinds.linux.labels: not supported by the lab here",
        "nodes.a.network-mode: not supported",
        "nodes.a.startup-delay: not supported",
        "nodes.a.kind: 'nokia_srlinux'",
        "nodes.a.labels.lbctl.io/role: 'king' is none of client, cluster",
        "nodes.a.labels.lbctl.io/pod-cidr: '10.0.0.0/33'",
        "nodes.a.binds: " + str(tmp_path / "nowhere") + " does not exist",
        "nodes.a.binds: 'bad.clab.yml:relative' is not SOURCE:/TARGET",
        "nodes.a.binds: 'bad.clab.yml:/x:rx' is not",
        'nodes.a.exec: "echo \'open": No closing quotation',
        "nodes.Bad_Name: a name is",
        "links: b:eth1: there is no node 'b'",
        "links: a:an-interface-name-too-long: bad interface name",
        "links: {'endpoints': ['a:eth1']} is not",
        "links: a:eth0: is the management network",
        "links: 'wrong' is not",
        "links: a:eth1: used 2 times",
    ]
    assert len(said) == len(starts), said
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x", "has no `topology:`"),
        ("[", "not YAML"),
        ("name: x\ntopology: {nodes: {}}", "topology.nodes: there are none"),
    ],
)
def test_files_that_are_no_topology(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.clab.yml"
    path.write_text(text)
    with pytest.raises(LabError, match=says):
        topology.load(path)
    with pytest.raises(LabError, match="No such file"):
        topology.load(tmp_path / "absent.clab.yml")


def test_the_next_node(small: Topology) -> None:
    new = topology.next_node(small)
    assert new.spec.name == "node-4"
    assert new.addresses == ("192.0.2.24", "2001:db8:1::24")
    assert new.spec.pod_cidr == "10.244.4.0/24,fd00:10:244:4::/64"
    assert new.link == Link(LinkEnd("rack", "eth9"), LinkEnd("node-4", "eth1"))
    assert new.routes == (
        "ip route replace 10.244.4.0/24 via 192.0.2.24",
        "ip route replace fd00:10:244:4::/64 via 2001:db8:1::24",
    )
    assert "ip address add 192.0.2.24/24 dev eth1" in new.spec.exec
    assert "ip address add 2001:db8:1::24/64 dev eth1 nodad" in new.spec.exec
    assert not any("2.23/24" in line or "::23/64" in line for line in new.spec.exec)
    for number in (1, 2, 3):
        line = f"ip route replace 10.244.{number}.0/24 via 192.0.2.2{number}"
        assert new.spec.exec.count(line) == 1
        line = f"ip route replace fd00:10:244:{number}::/64 via 2001:db8:1::2{number}"
        assert new.spec.exec.count(line) == 1


def test_racks_peers_are_its_top_of_rack_switches() -> None:
    racks = topology.load(LAB / "racks.clab.yml")
    text = (LAB / "racks.lbctl.yaml").read_text("utf-8")
    tors = {
        spec.name: next(line.split()[3] for line in spec.exec if line.startswith("ip address add"))
        for spec in racks.nodes
        if spec.role == "switch" and spec.name != "spine"
    }
    peers = config.parse(text).bgp.peers
    assert {peer.name: f"{peer.address}/25" for peer in peers} == tors


def test_the_next_node_needs_one_to_go_by(small: Topology) -> None:
    bare = Topology("bare", tuple(n for n in small.nodes if n.role != "node"), ())
    with pytest.raises(LabError, match="no node of role `node`"):
        topology.next_node(bare)
