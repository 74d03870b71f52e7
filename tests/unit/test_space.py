"""Free addresses of a pool, against a plain set of numbers."""

from __future__ import annotations

import random
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from lbctl.core.allocator import Allocator
from lbctl.core.model import Address
from lbctl.core.space import Space
from tests.unit.test_allocator import config, eip, given_to, service, settled


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 8)), max_size=40))
def test_space_is_a_set(steps: list[tuple[bool, int, int]]) -> None:
    space, expected = Space(), set[int]()
    for add, start, length in steps:
        run = range(start, start + length + 1)
        if add:
            space.add(start, start + length)
            expected.update(run)
        else:
            space.remove(start, start + length)
            expected.difference_update(run)
        assert [n for n in range(60) if n in space] == sorted(expected)
        assert space.free == len(expected)
        assert space.first() == min(expected, default=None)
        assert len(space) == sum(n - 1 not in expected for n in expected)  # runs are merged


def test_a_nearly_full_big_pool() -> None:
    allocator = Allocator(config("a 10.0.0.0/20"))
    order = list(range(1 << 12))
    random.Random(1).shuffle(order)
    base = int(ip_address("10.0.0.0"))
    free: Address = ip_address(base + order.pop())
    for n in order:
        allocator.set_eip(eip(str(ip_address(base + n)), f"s{n}"))
        allocator.set_service(settled(f"s{n}", str(ip_address(base + n))))
    allocator.set_service(service("web"))
    assert given_to(allocator.plan()) == {"web": str(free)}
    assert allocator.free() == {"a": {4: 0}}
