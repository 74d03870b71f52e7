"""`lbctl eip plan`: manifests in, addresses out, for a state of the cluster made by hand."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from lbctl.cli import eip as command
from lbctl.cli.eip import PlanOutput
from lbctl.cli.site import Site
from lbctl.core.config import parse
from lbctl.core.eip_plan import LAST_APPLIED, Certainty, Prospect, plan
from lbctl.core.model import Eip, Node, ObjectRef, Service
from lbctl.core.reasons import Reason
from lbctl.errors import ConfigError
from lbctl.kube.accepted import Entry
from lbctl.kube.wanted import read

from .address_rules import config, service

POOL = "name: public, addresses: [198.51.100.0/28, '2001:db8::/64']"
OWNED = (
    f"{POOL}, reserved: [{{address: 198.51.100.10, owner: default/db-0}}, "
    "{address: 198.51.100.11, owner: default/db-1}]"
)


def manifest(name: str, spec: str = "", annotations: str = "", namespace: str = "") -> str:
    space = f", namespace: {namespace}" if namespace else ""
    return (
        "apiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}{space}, annotations: {{{annotations}}}}}\n"
        "spec:\n  type: LoadBalancer\n"
        f"  selector: {{statefulset.kubernetes.io/pod-name: {name}}}\n"
        "  ports: [{port: 80}]\n" + spec
    )


def planned(
    text: str,
    *services: Service,
    pools: tuple[str, ...] = (OWNED,),
    rest: str = "",
    eips: tuple[Eip, ...] = (),
    nodes: tuple[Node, ...] = (),
    labels: dict[str, dict[str, str]] | None = None,
) -> tuple[Prospect, ...]:
    wanted, more = read([("f.yaml", text)], "default")
    every = {**(labels or {}), **more}
    return plan(config(*pools, rest=rest), wanted, services, eips, nodes, every)


def given(one: Prospect) -> list[tuple[str, Certainty]]:
    return [(str(found.address), found.certainty) for found in one.given]


def bound(address: str, name: str) -> Eip:
    return Eip(ip_address(address), "public", ObjectRef("default", name), f"uid-{name}")


def test_a_reserved_address_is_sure_in_whatever_order() -> None:
    one, zero = planned(manifest("db-1") + "---\n" + manifest("db-0"))
    assert given(one) == [("198.51.100.11", Certainty.RESERVED)]
    assert given(zero) == [("198.51.100.10", Certainty.RESERVED)]
    assert (zero.pod, zero.refused, zero.place) == ("db-0", False, "f.yaml:9")


def test_a_free_address_is_a_forecast_after_all_that_wait_in_the_order_of_the_files() -> None:
    waiting = service("old", 5.0)
    b, a = planned(manifest("b") + "---\n" + manifest("a"), waiting)
    assert given(b) == [("198.51.100.1", Certainty.FORECAST)]
    assert given(a) == [("198.51.100.2", Certainty.FORECAST)]


def test_what_a_service_has_it_keeps_and_is_not_reserved_for_it() -> None:
    live = service("db-0", 1.0, ingress=["198.51.100.3"])
    (one,) = planned(manifest("db-0"), live, eips=(bound("198.51.100.3", "db-0"),))
    assert given(one) == [("198.51.100.3", Certainty.HAS)]
    assert "198.51.100.10 is reserved for it, but" in one.given[0].why


def test_what_the_manifest_does_not_say_stays_as_it_is() -> None:
    live = service("web", 1.0, annotations={"lbctl.io/loadBalancerIPs": "198.51.100.7"})
    (one,) = planned(manifest("web"), live)
    assert given(one) == [("198.51.100.7", Certainty.FORECAST)]
    asked = '"lbctl.io/loadBalancerIPs": 198.51.100.8'
    (one,) = planned(manifest("web", annotations=asked), live)
    assert given(one) == [("198.51.100.8", Certainty.FORECAST)]


def test_what_an_earlier_apply_set_and_the_manifest_has_no_more_goes() -> None:
    was = {"lbctl.io/loadBalancerIPs": "198.51.100.7", "lbctl.io/allow-shared-ip": "by-hand"}
    for applied, address in (
        ({"metadata": {"annotations": {"lbctl.io/loadBalancerIPs": ""}}}, "198.51.100.0"),
        ({"metadata": {"annotations": {"other": ""}}, "spec": []}, "198.51.100.7"),
        ([], "198.51.100.7"),
    ):
        live = service("web", 1.0, annotations={**was, LAST_APPLIED: json.dumps(applied)})
        (one,) = planned(manifest("web"), live)
        assert given(one) == [(address, Certainty.FORECAST)]
    by_field = json.dumps({"spec": {"loadBalancerIP": "198.51.100.7"}})
    live = service("web", 1.0, requested="198.51.100.7", annotations={LAST_APPLIED: by_field})
    assert given(planned(manifest("web"), live)[0]) == [("198.51.100.0", Certainty.FORECAST)]


def test_a_refusal_has_its_reason() -> None:
    asked = '"lbctl.io/loadBalancerIPs": 198.51.100.10'
    (one,) = planned(manifest("thief", annotations=asked))
    assert (one.refused, one.given, one.reason) == (True, (), Reason.ADDRESS_RESERVED)
    assert "198.51.100.10 is reserved for another Service" in one.sentence


def test_services_with_one_sharing_key_would_share() -> None:
    key = '"lbctl.io/allow-shared-ip": dns'
    text = manifest("a", annotations=key) + "---\n" + manifest("b", annotations=key)
    first, second = planned(text.replace("port: 80", "port: 81", 1))
    assert given(first) == given(second) == [("198.51.100.0", Certainty.FORECAST)]


def test_an_address_of_the_cluster_is_not_given() -> None:
    node = Node("n", addresses=(ip_address("198.51.100.0"),))
    (one,) = planned(manifest("web"), nodes=(node,))
    assert given(one) == [("198.51.100.1", Certainty.FORECAST)]


def test_another_class_is_not_ours() -> None:
    (one,) = planned(manifest("web", "  loadBalancerClass: example.com/other\n"))
    assert (one.refused, one.given, one.reason) == (True, (), Reason.OTHER_CLASS)


def test_labels_of_namespaces_in_the_cluster_and_in_the_manifests_count() -> None:
    pools = (f"{POOL}, namespaceSelectors: [{{matchLabels: {{tier: front}}}}]",)
    text = manifest("web", namespace="shop")
    (one,) = planned(text, pools=pools)
    assert one.reason is Reason.POOL_NOT_FOR_NAMESPACE
    (one,) = planned(text, pools=pools, labels={"shop": {"tier": "front"}})
    assert not one.refused
    space = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tier: front}}\n---\n"
    (one,) = planned(space + text, pools=pools)
    assert not one.refused


@pytest.mark.parametrize(
    ("spec", "dual", "versions"),
    [
        ("", True, [4]),
        ("  ipFamilies: [IPv6]\n", True, [6]),
        ("  ipFamilyPolicy: PreferDualStack\n", True, [4, 6]),
        ("  ipFamilyPolicy: PreferDualStack\n", False, [4]),
        ("  ipFamilyPolicy: RequireDualStack\n", False, [4, 6]),
        ("  ipFamilies: [IPv6, IPv4]\n", True, [6, 4]),
    ],
)
def test_families_are_filled_in_as_the_api_server_does(
    spec: str, dual: bool, versions: list[int]
) -> None:
    cidrs = ("10.0.0.0/24", "fd00::/64") if dual else ("10.0.0.0/24",)
    node = Node("n", pod_cidrs=tuple(ip_network(cidr) for cidr in cidrs))
    (one,) = planned(manifest("web", spec), nodes=(node,))
    assert [found.address.version for found in one.given] == versions


def test_one_family_too_few_is_refused_and_what_it_gets_is_said() -> None:
    pools = ("name: four, addresses: [198.51.100.0/28]",)
    (one,) = planned(manifest("web", "  ipFamilyPolicy: RequireDualStack\n"), pools=pools)
    assert (len(one.given), one.refused, one.reason) == (1, True, Reason.NO_POOL)


def test_under_observe_it_is_what_adopt_would_do() -> None:
    (one,) = planned(manifest("db-0"), rest="takeover: observe\n")
    assert given(one) == [("198.51.100.10", Certainty.RESERVED)]


def test_lists_and_other_kinds() -> None:
    entry = "\n".join(f"  {line}" for line in manifest("b").splitlines())
    text = "apiVersion: v1\nkind: List\nitems:\n-" + entry[1:] + "\n---\n"
    text += "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n---\n"
    text += manifest("internal").replace("LoadBalancer", "ClusterIP") + "---\n"
    text += json.dumps(yaml.safe_load(manifest("a")))
    assert [one.service.name for one in planned(text)] == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            manifest("web").replace("port: 80", 'port: "80"'),
            "f.yaml:7:18: spec.ports[0].port: expected int, got str",
        ),
        (manifest("We_b"), "f.yaml:3:18: metadata.name: "),
        (manifest("web").replace("name: web", "x: web"), "f.yaml:3:11: metadata.name: is missing"),
        (manifest("web").replace("pod-name: web", "pod-name: 'a b'"), "f.yaml:6:50: "),
        (
            manifest("web", annotations="a: 1"),
            "f.yaml:3:36: metadata.annotations: expected str, got int",
        ),
        (
            manifest("web", '  loadBalancerSourceRanges: ["10.0.0.0/99"]\n'),
            "f.yaml:1:1: not a network: '10.0.0.0/99'",
        ),
        (manifest("a") + "---\n" + manifest("a"), "f.yaml:11:18: metadata.name: Service default/a"),
        ("version: 1\n", "f.yaml:1:1: kind: is missing"),
        ("- 1\n", "f.yaml:1:1: must be a mapping"),
        ("a: [", "f.yaml:2:1: not valid YAML"),
    ],
)
def test_each_error_has_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read([("f.yaml", text)], "default")
    (problem,) = caught.value.problems
    assert problem.startswith(said)


def reported(
    capsys: pytest.CaptureFixture[str], text: str, output: PlanOutput, name: str = "eips"
) -> tuple[int, str, str]:
    ruling = f"version: 1\npools: [{{{OWNED}}}]\nbgp: {{asn: 64512, peers: []}}\n"
    site = Site((), (), (), {}, Entry(7, "h", ruling), None)
    code = 0
    try:
        command.report(site, read([("f.yaml", text)], "default"), None, name, output)
    except typer.Exit as ended:
        code = ended.exit_code
    out, err = capsys.readouterr()
    return code, out, err


def test_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    thief = manifest("thief", annotations='"lbctl.io/loadBalancerIPs": 198.51.100.11')
    text = "---\n".join((manifest("db-0"), manifest("web"), thief))
    code, out, err = reported(capsys, text, PlanOutput.TEXT)
    assert (code, err) == (1, "") and "generation 7" in out
    rows = [line.split(maxsplit=4) for line in out.splitlines() if "default/" in line]
    assert rows[0][:4] == ["default/db-0", "198.51.100.10", "public", "reserved"]
    assert rows[1][:4] == ["default/web", "198.51.100.0", "public", "forecast"]
    assert rows[2][:4] == ["default/thief", "-", "-", "refused"]
    assert "AddressReserved: " in rows[2][4]
    advice = next(line for line in out.splitlines() if "in pool public: " in line)
    assert yaml.safe_load(advice.partition("public: ")[2]) == {
        "reserved": [{"address": "198.51.100.0", "owner": "default/web"}]
    }


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = reported(capsys, manifest("db-0"), PlanOutput.JSON)
    (found,) = json.loads(out)["services"]
    assert code == 0 and found["service"] == {"namespace": "default", "name": "db-0"}
    assert found["given"] == [
        {
            "address": "198.51.100.10",
            "pool": "public",
            "certainty": "reserved",
            "why": "for it alone, whatever the order of creation",
        }
    ]
    assert (found["refused"], found["pod"], found["place"]) == (False, "db-0", "f.yaml:1")


def test_as_a_config_map_for_each_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    both = "  ipFamilyPolicy: RequireDualStack\n"
    more = manifest("db-0-admin").replace("pod-name: db-0-admin", "pod-name: db-0")
    other = manifest("web", namespace="shop").replace("statefulset.kubernetes.io/pod-name", "app")
    text = "---\n".join((manifest("db-1"), manifest("db-0", both), more, other))
    code, out, err = reported(capsys, text, PlanOutput.CONFIGMAP, "addresses")
    default, shop = yaml.safe_load_all(out)
    assert code == 0 and "4 addresses are forecasts" not in err and "3 addresses" in err
    assert default["kind"] == "ConfigMap"
    assert default["metadata"] == {"name": "addresses", "namespace": "default"}
    assert default["data"] == {
        "db-1": "198.51.100.11\n",
        "db-0": "198.51.100.10\n2001:db8::\n198.51.100.0\n",
        "hosts": "198.51.100.11 db-1\n198.51.100.10 db-0\n2001:db8:: db-0\n198.51.100.0 db-0\n",
    }
    assert shop["data"] == {"web": "198.51.100.1\n", "hosts": "198.51.100.1 web\n"}


def test_no_config_map_with_an_address_missing(capsys: pytest.CaptureFixture[str]) -> None:
    thief = manifest("thief", annotations='"lbctl.io/loadBalancerIPs": 198.51.100.11')
    code, out, err = reported(capsys, manifest("db-0") + "---\n" + thief, PlanOutput.CONFIGMAP)
    assert (code, out) == (1, "") and "198.51.100.11 is reserved for another Service" in err
    code, out, err = reported(capsys, manifest("hosts"), PlanOutput.CONFIGMAP)
    assert (code, out) == (2, "") and "hosts is the file with all" in err


@pytest.mark.parametrize(
    ("words", "stdin", "code", "said"),
    [
        (["-"], "kind: [\n", 1, "stdin:2:1: not valid YAML"),
        (["-"], "", 2, "no Service of type LoadBalancer in stdin"),
        (["-", "-"], "", 2, "stdin (-) can be read once only"),
        (["none.yaml"], "", 2, "none.yaml cannot be read: No such file"),
        (["-", "--name", "A_B"], "", 2, "--name A_B is not a name"),
        (["-", "--config", "none.yaml"], manifest("a"), 2, "none.yaml cannot be read"),
        (["-", "--kubeconfig", "none"], manifest("a"), 2, "there is no kubeconfig at none"),
    ],
)
def test_exit_codes(
    words: list[str],
    stdin: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command.app, ["plan", *words], input=stdin)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert said in done.stderr


def test_the_example_gets_its_reserved_addresses() -> None:
    folder = Path(__file__).parents[2] / "deploy" / "examples" / "statefulset"
    wanted, _ = read([("services.yaml", (folder / "services.yaml").read_text())], "default")
    found = plan(parse((folder / "config.yaml").read_text()), wanted, (), (), (), {})
    assert [(one.pod, given(one)) for one in found] == [
        (f"db-{n}", [(f"198.51.100.{120 + n}", Certainty.RESERVED)]) for n in range(3)
    ]
