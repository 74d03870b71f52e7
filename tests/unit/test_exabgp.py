"""ExaBGP's text: what is rendered, what is refused, what is read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path as FilePath
from typing import Any

import pytest

from lbctl.core import exabgp
from lbctl.core.exabgp import Acknowledged, BarrierAnswer, Command, SessionEvent, Verb
from lbctl.core.model import Address, Path, Peer
from lbctl.errors import MessageError, SpeakerError
from manager.speaker.process import environment

GOLDEN = FilePath(__file__).parent / "golden"
GOLDEN_NAMES = ("exabgp-one.conf", "exabgp-three.conf", "exabgp-restart.conf")
RELAY = ("/bin/true", "-m", "manager.speaker.relay", "/run/lbctl-speaker/relay.sock")

TOR_A = Peer("tor-a", IPv4Address("192.0.2.1"), 64500, 64512)
FULL = Peer(
    "tor-b",
    IPv6Address("2001:db8::1"),
    4200000000,
    64512,
    port=1179,
    hold_time_s=3,
    local_address=IPv6Address("2001:db8::2"),
    router_id=IPv4Address("10.0.0.1"),
    multihop=3,
    password="it's; a \"}\\ password #1",
)
RESTARTING = dataclasses.replace(TOR_A, graceful_restart_s=20)
BARE6 = Peer("tor-c", IPv6Address("2001:db8::3"), 64501, 64512)
PATH = Path(ip_address("192.0.2.21"), 17, "node-1")


def rendered() -> dict[str, str]:
    """What the golden files hold, by file name."""
    local: dict[str, Address] = {
        "tor-a": IPv4Address("192.0.2.11"),
        "tor-c": IPv6Address("2001:db8::2"),
    }
    return {
        "exabgp-one.conf": exabgp.render_config((TOR_A,), local, RELAY),
        "exabgp-three.conf": exabgp.render_config((FULL, BARE6, TOR_A), local, RELAY),
        "exabgp-restart.conf": exabgp.render_config((RESTARTING,), local, RELAY),
    }


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_configuration_is_the_golden_one(name: str) -> None:
    """Any change of the text is seen in review."""
    assert rendered()[name] == (GOLDEN / name).read_text()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_real_exabgp_takes_the_golden_files(name: str) -> None:
    """`exabgp validate` itself, and what it understood of the neighbour."""
    done = subprocess.run(
        [sys.executable, "-m", "exabgp", "validate", "-nrv", str(GOLDEN / name)],
        env=environment() | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_real_exabgp_refuses_a_broken_file(tmp_path: FilePath) -> None:
    """The test above can fail."""
    bad = tmp_path / "bad.conf"
    bad.write_text(rendered()["exabgp-one.conf"].replace("hold-time 9", "hold-time 2"))
    done = subprocess.run(
        [sys.executable, "-m", "exabgp", "validate", "-nrv", str(bad)],
        env=environment() | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "tor\n}"},
        {"name": "tor a"},
        {"name": ""},
        {"name": "x" * 64},
        {"name": 7},
        {"address": "192.0.2.1"},
        {"address": IPv4Address("0.0.0.0")},
        {"address": IPv4Address("224.0.0.1")},
        {"address": IPv6Address("fe80::1%eth0")},
        {"asn": 0},
        {"asn": 2**32},
        {"asn": True},
        {"asn": "64500; }"},
        {"local_asn": -1},
        {"port": 0},
        {"port": 65536},
        {"hold_time_s": 2},
        {"hold_time_s": 9.5},
        {"local_address": IPv6Address("2001:db8::2")},
        {"local_address": "auto"},
        {"router_id": IPv6Address("::1")},
        {"router_id": IPv4Address("0.0.0.0")},
        {"multihop": 0},
        {"multihop": 256},
        {"password": ""},
        {"password": "x" * 81},
        {"password": "new\nline"},
        {"password": "grün"},
        {"password": b"bytes"},
        {"graceful_restart_s": 0},
        {"graceful_restart_s": 4096},
        {"graceful_restart_s": 20.5},
    ],
)
def test_a_peer_with_a_bad_value_is_refused(changes: dict[str, Any]) -> None:
    """And the message never has the password in it."""
    with pytest.raises(SpeakerError) as caught:
        exabgp.check_peer(dataclasses.replace(TOR_A, **changes))
    if changes.get("password"):
        assert str(changes["password"]) not in str(caught.value)


def test_the_password_is_no_syntax() -> None:
    """It is in the file base64-encoded only."""
    text = rendered()["exabgp-three.conf"]
    assert FULL.password is not None and FULL.password not in text
    assert "tor-b" not in text


def test_config_needs_a_source_and_one_peer_per_address() -> None:
    """No guesses, no duplicates, no odd command lines."""
    with pytest.raises(SpeakerError, match="local address"):
        exabgp.render_config((TOR_A,), {}, RELAY)
    local: dict[str, Address] = {
        "tor-a": IPv4Address("192.0.2.11"),
        "again": IPv4Address("192.0.2.11"),
    }
    with pytest.raises(SpeakerError, match="same address"):
        exabgp.render_config((TOR_A, dataclasses.replace(TOR_A, name="again")), local, RELAY)
    with pytest.raises(SpeakerError, match="interpret"):
        exabgp.render_config((TOR_A,), local, ("/bin/sh", "-c", "a; b"))


def test_attributes() -> None:
    """Canonical order; the path-id only for peers with ADD-PATH."""
    path = dataclasses.replace(PATH, med=0, communities=("64512:2", "1:2:3", "64512:10", "64512:2"))
    text = exabgp.attributes(path)
    assert text == (
        "next-hop 192.0.2.21 path-information 17 med 0 community [ 64512:10 64512:2 ] "
        "large-community [ 1:2:3 ]"
    )
    assert exabgp.path_id(text) == 17
    assert exabgp.next_hop(text) == "192.0.2.21"
    assert exabgp.check_attributes(text) == text
    assert exabgp.path_id(exabgp.attributes(path, identified=False)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"path_id": 0},
        {"path_id": 2**32},
        {"path_id": "1.2.3"},
        {"path_id": True},
        {"med": -1},
        {"med": 2**32},
        {"communities": ("64512:65536",)},
        {"communities": ("64512:1 ]\nshutdown",)},
        {"communities": ("no-export",)},
        {"communities": ("1:2:4294967296",)},
        {"communities": ("\u0661:1",)},
        {"next_hop": "self"},
        {"next_hop": IPv4Address("239.0.0.1")},
    ],
)
def test_a_path_with_a_bad_value_is_refused(changes: dict[str, Any]) -> None:
    """Before it is text."""
    with pytest.raises(SpeakerError):
        exabgp.attributes(dataclasses.replace(PATH, **changes))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "next-hop self",
        "next-hop 192.0.2.1 path-information 0",
        "next-hop 192.0.2.01",
        "next-hop 192.0.2.1 path-information 1.2.3",
        "next-hop 192.0.2.1 path-information 1 split /24",
        "next-hop 192.0.2.1 path-information 1\n",
        "next-hop 192.0.2.1 med 1 path-information 1",
        "next-hop 192.0.2.1 community [ 2:2 1:1 ]",
        "next-hop 192.0.2.1 nlri 0.0.0.0/0",
        7,
    ],
)
def test_attributes_of_others_are_refused(text: object) -> None:
    """The launcher takes only what `attributes` writes."""
    with pytest.raises(MessageError):
        exabgp.check_attributes(text)


def test_command() -> None:
    """One line for several peers and prefixes."""
    command = Command(
        Verb.WITHDRAW,
        ("192.0.2.1", "192.0.2.2"),
        exabgp.attributes(PATH),
        ("198.51.100.1/32", "198.51.100.2/32"),
    )
    assert exabgp.render(exabgp.check_command(command)) == (
        "neighbor 192.0.2.1 , neighbor 192.0.2.2 withdraw attributes next-hop 192.0.2.21 "
        "path-information 17 nlri 198.51.100.1/32 198.51.100.2/32"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"peers": ()},
        {"peers": ("*",)},
        {"peers": ("192.0.2.1 shutdown",)},
        {"peers": ("2001:DB8::1",)},
        {"prefixes": ()},
        {"prefixes": ("198.51.100.1/24",)},
        {"prefixes": ("2001:db8::/128",)},
        {"prefixes": ("198.51.100.1",)},
        {"prefixes": ("198.51.100.1/32\nshutdown",)},
        {"prefixes": ("198.51.100.1/32",) * 201},
        {"attributes": "next-hop self"},
    ],
)
def test_a_command_with_a_bad_value_is_refused(changes: dict[str, Any]) -> None:
    """Whatever the manager sends."""
    good = Command(Verb.ANNOUNCE, ("192.0.2.1",), exabgp.attributes(PATH), ("198.51.100.1/32",))
    with pytest.raises(MessageError):
        exabgp.check_command(dataclasses.replace(good, **changes))


def test_a_prefix_is_a_network() -> None:
    """A text could be anything."""
    assert exabgp.prefix(ip_network("2001:db8::/128")) == "2001:db8::/128"
    with pytest.raises(SpeakerError):
        exabgp.prefix("198.51.100.1/32")


def test_answers() -> None:
    """Acknowledgements, events and barriers; the rest is nothing."""
    assert exabgp.parse_line("done\n") == Acknowledged(True)
    assert exabgp.parse_line("error") == Acknowledged(False)
    assert exabgp.parse_line("shutdown in progress") is None
    assert exabgp.parse_line('{ "type": "notification", "notification": "shutdown" }') is None
    for bad in ("{", '{"type": "state"}', '{"type": "state", "neighbor": 7}'):
        with pytest.raises(MessageError):
            exabgp.parse_line(bad)
    agreed = {"ipv6 unicast": False, "ipv4 unicast": True, "l2vpn evpn": True}
    state = {"up": True, "agreed": agreed, "flushed": False}
    barrier = {exabgp.BARRIER: "ab", "peers": {"192.0.2.1": state}, "reloads": 2, "failures": 0}
    session = SessionEvent("192.0.2.1", up=True, agreed=((4, True), (6, False)))
    answer = exabgp.parse_line(json.dumps(barrier))
    assert answer == BarrierAnswer("ab", {"192.0.2.1": False}, (session,), 2, 0)
    with pytest.raises(MessageError):
        exabgp.parse_line(json.dumps(barrier | {"peers": {"192.0.2.1": True}}))
    with pytest.raises(SpeakerError):
        exabgp.render_barrier("a b")


def test_end_of_rib_names_addresses_only() -> None:
    """One line, with nothing in it that ExaBGP could read as more."""
    said = exabgp.render_end_of_rib(("192.0.2.1", "2001:db8::1"))
    assert said == f"{exabgp.END_OF_RIB} 192.0.2.1 2001:db8::1"
    with pytest.raises(ValueError, match="does not appear to be"):
        exabgp.render_end_of_rib(("192.0.2.1\nshutdown",))


def event(kind: str, **content: object) -> str:
    """An event as ExaBGP 5.0.15 writes it, cut to what is read."""
    neighbor = {"address": {"local": "192.0.2.11", "peer": "192.0.2.1"}, **content}
    return json.dumps({"exabgp": "5.0.0", "type": kind, "neighbor": neighbor})


def test_session_events() -> None:
    """Up, down with its reason, the families agreed, and for which of them ADD-PATH was."""
    assert exabgp.parse_line(event("state", state="up")) == SessionEvent("192.0.2.1", up=True)
    down = exabgp.parse_line(event("state", state="down", reason="hold timer expired"))
    assert down == SessionEvent("192.0.2.1", up=False, detail="hold timer expired")
    assert exabgp.parse_line(event("state", state="connected")) is None
    both = ["ipv4 unicast", "ipv6 unicast"]
    for families, send, agreed in (
        (both, both, ((4, True), (6, True))),
        (both, both[:1], ((4, True), (6, False))),
        (both, [], ((4, False), (6, False))),
        (both[:1], both, ((4, True),)),
        ([], both, ()),
    ):
        negotiated = {"families": families, "add_path": {"send": send, "receive": []}}
        found = exabgp.parse_line(event("negotiated", negotiated=negotiated))
        assert found == SessionEvent("192.0.2.1", agreed=agreed)


def test_router_id_of_an_ipv6_address() -> None:
    """Never zero."""
    assert exabgp.router_id(IPv6Address("2001:db8::2")) == IPv4Address("0.0.0.2")
    assert exabgp.router_id(IPv6Address("2001:db8::")) == IPv4Address("0.0.0.1")
