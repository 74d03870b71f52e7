"""Datagrams: what is encoded comes back, nothing else is accepted, answers are never larger."""

from __future__ import annotations

import base64
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import probe
from lbctl.core.keys import Key, KeyRing, Keys, parse_keys
from lbctl.core.model import Behind
from lbctl.errors import ConfigError, MessageError

SECRET = bytes(range(7, 39))
OTHER = bytes(range(100, 132))
KEYS = Keys(SECRET)
RING = KEYS.node("node-1")
U64 = st.integers(0, 2**64 - 1)
HASHES = st.frozensets(st.integers(0, 2**32 - 1), max_size=probe.MAX_NODES)
HEARD = st.frozensets(st.integers(0, 2**32 - 1), max_size=probe.MAX_HEARD)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True)
CURSORS = st.builds(
    probe.Cursor,
    U64,
    st.sampled_from([b"", b"\xff"]) | st.ip_addresses().map(probe.address_key),
)
ENTRIES = st.builds(probe.Entry, st.ip_addresses(), st.booleans(), st.sampled_from(Behind))
DECODERS = (
    probe.decode_request,
    probe.decode_answer,
    probe.decode_page_request,
    probe.decode_page,
    probe.decode_heartbeat,
    lambda data, _: probe.peek(data),
)


@settings(deadline=None)
@given(
    st.builds(probe.Request, NAMES, U64, U64, U64, U64, st.booleans(), st.integers(0, 255), HASHES)
)
def test_request_round_trip(message: probe.Request) -> None:
    data = probe.encode_request(message, RING.signing)
    assert probe.decode_request(data, RING) == (message, RING.signing)
    assert probe.REQUEST_BYTES <= len(data) <= probe.MAX_BYTES
    assert probe.peek(data) == (probe.Kind.REQUEST, message.nonce)


@settings(deadline=None)
@given(
    st.builds(probe.Answer, U64, NAMES, U64, U64, U64, U64, U64, st.integers(0, 2**32 - 1), HEARD)
)
def test_answer_round_trip_and_no_amplification(message: probe.Answer) -> None:
    data = probe.encode_answer(message, RING.signing)
    assert probe.decode_answer(data, RING) == message
    assert len(data) <= probe.REQUEST_BYTES


def test_longest_answer_is_no_larger_than_a_request() -> None:
    heard = frozenset(range(probe.MAX_HEARD + 1))
    longest = probe.Answer(1, "n" * probe.MAX_NODE_NAME, 2, 3, 4, 5, 6, 7, heard)
    assert len(probe.encode_answer(longest, RING.signing)) <= probe.REQUEST_BYTES


@settings(deadline=None)
@given(st.builds(probe.PageRequest, U64, U64, U64, CURSORS))
def test_page_request_round_trip(message: probe.PageRequest) -> None:
    data = probe.encode_page_request(message, RING.signing)
    assert probe.decode_page_request(data, RING) == (message, RING.signing)
    assert len(data) == probe.MAX_BYTES


@settings(deadline=None)
@given(
    st.builds(
        probe.Page,
        U64,
        U64,
        U64,
        st.booleans(),
        st.lists(ENTRIES, max_size=60).map(tuple),
        st.none() | CURSORS,
    )
)
def test_page_round_trip(message: probe.Page) -> None:
    assert probe.decode_page(probe.encode_page(message, RING.signing), RING) == message


@settings(deadline=None)
@given(
    st.builds(
        probe.Heartbeat,
        NAMES,
        U64,
        U64,
        st.booleans(),
        st.booleans(),
        st.integers(0, 65535),
        st.integers(0, 65535),
        HASHES,
    )
)
def test_heartbeat_round_trip(message: probe.Heartbeat) -> None:
    ring = KEYS.managers()
    assert probe.decode_heartbeat(probe.encode_heartbeat(message, ring.signing), ring) == message


@settings(deadline=None)
@given(st.binary(max_size=1400))
def test_random_bytes_raise_only_message_error(data: bytes) -> None:
    for decode in DECODERS[:-1]:
        with pytest.raises(MessageError):
            decode(data, RING)
    try:
        probe.peek(data)
    except MessageError:
        assert len(data) < 32


@settings(deadline=None)
@given(st.sampled_from(list(probe.Kind)), st.binary(max_size=1208))
def test_signed_rubbish_raises_only_message_error(kind: probe.Kind, body: bytes) -> None:
    """Even who has the key cannot make a decoder fail in another way."""
    data = probe._seal(kind, body, RING.signing)
    for decode in DECODERS:
        try:
            decode(data, RING)
        except MessageError as error:
            assert str(error)


@settings(deadline=None)
@given(st.integers(0, 511), st.integers(1, 255))
def test_any_changed_byte_is_refused(place: int, change: int) -> None:
    data = bytearray(probe.encode_request(probe.Request("m", 1, 2, 3), RING.signing))
    data[place] ^= change
    with pytest.raises(MessageError):
        probe.decode_request(bytes(data), RING)


def test_another_nodes_key_is_refused() -> None:
    data = probe.encode_answer(probe.Answer(1, "node-1", 2, 3, 4, 5, 6), RING.signing)
    with pytest.raises(MessageError, match="signature"):
        probe.decode_answer(data, KEYS.node("node-2"))


def test_unpadded_request_is_refused() -> None:
    data = probe.encode_request(probe.Request("m", 1, 2, 3), RING.signing)
    short = probe._seal(probe.Kind.REQUEST, data[8:80], RING.signing)
    with pytest.raises(MessageError, match="padded"):
        probe.decode_request(short, RING)


def test_too_large_a_page_is_refused() -> None:
    entries = tuple(probe.Entry(ip_address(f"2001:db8::{n:x}"), True) for n in range(70))
    with pytest.raises(MessageError, match="fit"):
        probe.encode_page(probe.Page(1, 2, 3, True, entries, None), RING.signing)


def test_more_dead_nodes_than_fit_are_cut_alike_everywhere() -> None:
    down = frozenset(range(1000))
    data = probe.encode_request(probe.Request("m", 1, 2, 3, down=down), RING.signing)
    assert probe.decode_request(data, RING)[0].down == frozenset(range(probe.MAX_NODES))


def test_rotation_keeps_everybody_talking_at_every_step() -> None:
    """Managers see a new Secret at once, agents later; no step may cut them off."""
    steps = [Keys(SECRET), Keys(OTHER, SECRET), Keys(OTHER)]
    for manager, agent in [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]:
        sender, receiver = steps[manager].node("n"), steps[agent].node("n")
        request = probe.encode_request(probe.Request("m", 1, 2, 3), sender.signing)
        _, key = probe.decode_request(request, receiver)
        answer = probe.encode_answer(probe.Answer(3, "n", 1, 1, 1, 1, 1), key)
        assert probe.decode_answer(answer, sender).nonce == 3
    forgotten = probe.encode_request(probe.Request("m", 1, 2, 3), Keys(SECRET).node("n").signing)
    with pytest.raises(MessageError, match="not known"):
        probe.decode_request(forgotten, Keys(OTHER).node("n"))


def test_key_ring_travels_as_text() -> None:
    ring = Keys(OTHER, SECRET).managers()
    assert KeyRing.from_text(ring.to_text()) == ring
    assert len(ring.accepted) == 2


@settings(deadline=None)
@given(st.text(max_size=200))
def test_random_key_ring_text_raises_only_message_error(text: str) -> None:
    with pytest.raises(MessageError):
        KeyRing.from_text(text)


def test_keys_are_parsed() -> None:
    text = base64.b64encode(SECRET)
    assert parse_keys({"current": text + b"\n"}) == Keys(SECRET)
    both: dict[str, str | bytes] = {"current": base64.b64encode(OTHER).decode(), "previous": text}
    assert parse_keys(both) == Keys(OTHER, SECRET)
    assert parse_keys({"current": text, "previous": ""}) == Keys(SECRET)
    assert "secret" not in repr(Key(1, b"secret")) and repr(SECRET) not in repr(Keys(SECRET))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"", "no key"),
        (b"not base64!", "not base64"),
        (base64.b64encode(SECRET[:31]), "31 bytes"),
        (base64.b64encode(b"\0" * 32), "placeholder"),
        (base64.b64encode(b"ab" * 20), "placeholder"),
        (base64.b64encode(b"replace-me-with-random-bytes, please do it"), "placeholder"),
    ],
)
def test_weak_keys_are_refused(value: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_keys({"current": value})
    if value:
        with pytest.raises(ConfigError, match=why):
            parse_keys({"current": base64.b64encode(SECRET), "previous": value})
