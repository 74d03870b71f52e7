"""Pages: whatever changes while a manager reads, it ends with exactly what the agent has."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st

from lbctl.core import changelog
from lbctl.core.changelog import ChangeLog, PageReader
from lbctl.core.keys import Keys
from lbctl.core.model import Address, Behind
from lbctl.core.probe import decode_page, encode_page

RING = Keys(bytes(range(32))).node("n")
POOL: list[Address] = [ip_address(f"198.51.{n // 256}.{n % 256}") for n in range(700)]
POOL += [ip_address(f"2001:db8::{n:x}") for n in range(100)]
STATES = st.dictionaries(st.sampled_from(POOL), st.sampled_from(Behind), max_size=20)


def read(log: ChangeLog, reader: PageReader, limit: int = 100) -> int:
    """Read to the end through the wire format; returns how many pages it took."""
    for pages in range(1, limit):
        page = log.page(reader.request(pages))
        if reader.take(decode_page(encode_page(page, RING.signing), RING)):
            return pages
    raise AssertionError("the list was never complete")


def same(log: ChangeLog, reader: PageReader, confirmed: dict[Address, Behind]) -> bool:
    return (
        reader.current(log.boot, log.generation)
        and reader.confirmed == confirmed.keys()
        and reader.empty == {a for a, behind in confirmed.items() if behind is Behind.NOTHING}
        and reader.local_ready == {a for a, behind in confirmed.items() if behind is Behind.HERE}
    )


def test_full_list_takes_several_pages_and_a_change_takes_one() -> None:
    log, reader = ChangeLog(7), PageReader()
    state = dict.fromkeys(POOL, Behind.AWAY)
    assert log.replace(state)
    assert read(log, reader) > 3
    assert same(log, reader, state)
    state[POOL[5]] = Behind.HERE
    del state[POOL[600]]
    assert log.replace(state)
    assert not reader.current(log.boot, log.generation)
    assert read(log, reader) == 1
    assert same(log, reader, state)


def test_replacing_with_the_same_changes_nothing() -> None:
    log = ChangeLog(1)
    assert log.replace({POOL[0]: Behind.HERE})
    assert not log.replace({POOL[0]: Behind.HERE})
    assert log.generation == 1


def test_new_boot_starts_a_new_list() -> None:
    reader = PageReader()
    old = ChangeLog(1)
    old.replace({POOL[0]: Behind.HERE, POOL[1]: Behind.AWAY})
    read(old, reader)
    new = ChangeLog(2)
    new.replace({POOL[2]: Behind.HERE})
    assert not reader.current(new.boot, new.generation)
    read(new, reader)
    assert same(new, reader, {POOL[2]: Behind.HERE})


def test_forgotten_removals_lead_to_a_full_list() -> None:
    log, reader = ChangeLog(1), PageReader()
    addresses = [ip_address(0x0A000000 + n) for n in range(2 * changelog.MAX_REMOVED)]
    log.replace(dict.fromkeys(addresses, Behind.AWAY))
    read(log, reader)
    for kept in (changelog.MAX_REMOVED, 10):
        log.replace(dict.fromkeys(addresses[:kept], Behind.AWAY))
    assert log.page(reader.request(1)).full
    read(log, reader)
    assert same(log, reader, dict.fromkeys(addresses[:10], Behind.AWAY))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_reading_while_it_changes(data: st.DataObject) -> None:
    """Changes, restarts and lost pages at any moment between pages; the last state is read."""
    log, reader = ChangeLog(1), PageReader()
    state = dict.fromkeys(POOL, Behind.AWAY)
    log.replace(state)
    for step in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["page", "lost", "page", "change", "restart"])):
            case "page":
                reader.take(log.page(reader.request(step)))
            case "lost":
                log.page(reader.request(step))
            case "change":
                state = state | data.draw(STATES)
                for address in data.draw(st.lists(st.sampled_from(POOL), max_size=20)):
                    state.pop(address, None)
                log.replace(state)
            case "restart":
                log = ChangeLog(log.boot + 1)
                log.replace(state)
    read(log, reader)
    assert same(log, reader, state)
