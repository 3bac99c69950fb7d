"""Requests that continue others where their lease ended: how they are cut, recorded and limited."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from sgl_apr.runtime.lease_pool import LeasePool


class Nested:
    """A branch that has forked, as the source of the pool of its branches."""

    def __init__(self, pool: LeasePool, lease) -> None:
        self.pool, self.lease, self.asked = pool, lease, 0

    def ask(self, grant) -> None:
        self.asked += 1
        self.pool.ask(self.lease, lambda tokens: grant(tokens * 3 // 4))

    def withdraw(self) -> None:
        self.pool.withdraw(self.lease)


def test_a_nested_pool_that_asks_again_at_once_gets_nothing_twice():
    pool = LeasePool(240, 0, results=False)
    first, second = pool.open([0, 0], 100, [1 << 30] * 2)
    nested = LeasePool(200, 0, results=False, source=Nested(pool, first))
    inner = nested.open([0, 0], 100, [1 << 30] * 2)
    pool.ask(second, lambda tokens: None)
    for lease in inner:
        nested.ask(lease, lambda tokens: None)
    assert pool.uncommitted >= 0
    assert first.tokens + second.tokens <= 240


def test_branches_that_wait_for_a_longer_path_take_no_tokens_from_the_outer_fork():
    outer = LeasePool(1000, 0, results=True)
    (lease,) = outer.open([0], 100, [1 << 30])
    source = Nested(outer, lease)
    pool = LeasePool(400, 0, results=True, source=source, path_capacity=60)
    inner = pool.open([0, 0], 100, [1 << 30] * 2)
    granted: list[int] = []
    for one in inner:
        pool.ask_for_path(one, granted.append, 20)
    assert granted == [0, 0]
    assert not source.asked
