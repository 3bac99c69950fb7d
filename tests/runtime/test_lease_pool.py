"""Branches that share tokens: nothing is exceeded, nobody waits for ever, and speed does not matter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_apr.runtime.lease_pool import FIRST_LEASE, NEXT_LEASE, Lease, LeasePool

CLOSING = 7


class Branch:
    """Writes until it has what it wants, has to wait, or gets no more."""

    def __init__(self, pool: LeasePool, lease: Lease, wanted: int) -> None:
        self.pool, self.lease, self.wanted = pool, lease, wanted
        self.written = self.allowed = 0
        self.is_waiting = self.has_ended = False

    def step(self) -> None:
        """Write one token, or ask, or end."""
        if self.written < min(self.wanted, self.allowed):
            self.written += 1
        elif self.written == self.wanted:
            self.end()
        else:
            self.is_waiting = True
            self.pool.ask(self.lease, self.receive, returned=self.written)

    def receive(self, tokens: int) -> None:
        self.is_waiting = False
        self.allowed += tokens
        if tokens == 0:
            self.end()

    def end(self) -> None:
        self.has_ended = True
        result = min(self.written, self.lease.result_tokens)
        self.pool.end(self.lease, self.written + result + CLOSING)


def simulate(
    capacity: int, wanted: list[int], results: bool, order: random.Random, most: int = 1 << 30
) -> list[int]:
    """Run branches in any order. Returns what each has written."""
    pool = LeasePool(capacity, CLOSING, results=results)
    equal = max(0, capacity - len(wanted) * CLOSING) // (len(wanted) * (1 + results))
    leases = pool.open([0] * len(wanted), equal, [most] * len(wanted))
    branches = [Branch(pool, lease, want) for lease, want in zip(leases, wanted, strict=True)]
    for branch in branches:
        branch.allowed = branch.lease.tokens
        if not branch.lease.started:
            branch.is_waiting = True
            pool.ask(branch.lease, branch.receive)
    while running := [b for b in branches if not b.has_ended]:
        ready = [b for b in running if not b.is_waiting]
        assert ready, "all of them wait"
        order.choice(ready).step()
        assert pool.uncommitted >= 0 or capacity < len(wanted) * CLOSING
    written = sum(b.written * (1 + results) + CLOSING for b in branches)
    assert written <= max(capacity, len(wanted) * CLOSING)
    return [b.written for b in branches]


cases = {
    "capacity": st.integers(0, 3000),
    "wanted": st.lists(st.integers(0, 900), min_size=1, max_size=8),
    "results": st.booleans(),
    "seed": st.integers(0, 1 << 20),
}


@given(**cases, most=st.sampled_from([20, 100, 1 << 30]))
def test_nothing_is_exceeded_and_nobody_waits_for_ever(capacity, wanted, results, seed, most):
    written = simulate(capacity, wanted, results, random.Random(seed), most)
    assert all(w <= min(want, most) for w, want in zip(written, wanted, strict=True))


@given(**cases)
def test_what_a_branch_may_write_does_not_depend_on_speed(capacity, wanted, results, seed):
    one = simulate(capacity, wanted, results, random.Random(seed))
    other = simulate(capacity, wanted, results, random.Random(seed + 1))
    assert one == other


@given(**cases)
def test_nothing_of_use_is_left_while_a_branch_wants_more(capacity, wanted, results, seed):
    written = simulate(capacity, wanted, results, random.Random(seed))
    taken = sum(w * (1 + results) + CLOSING for w in written)
    for w, want in zip(written, wanted, strict=True):
        if w < want:
            enough = NEXT_LEASE if w else FIRST_LEASE
            assert (capacity - taken) // (1 + results) < enough


def test_what_early_branches_leave_goes_to_the_others():
    assert simulate(400 + 4 * CLOSING, [10, 20, 30, 500], False, random.Random(0)) == [10, 20, 30, 340]


def test_where_equal_shares_are_too_short_fewer_branches_start():
    written = simulate(150 + 4 * CLOSING, [60, 60, 60, 60], False, random.Random(0))
    assert written[:2] == [60, 60]
    assert written[2:] == [0, 0]


class Source:
    """Gives some tokens once."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.asked, self.withdrawn = tokens, 0, 0
        self.grant = None

    def ask(self, grant) -> None:
        self.asked += 1
        self.grant = grant

    def withdraw(self) -> None:
        self.withdrawn += 1


@pytest.mark.parametrize("tokens", [0, 100])
def test_a_pool_that_is_empty_asks_its_source_once_nobody_runs(tokens):
    source = Source(tokens)
    pool = LeasePool(200 + 2 * CLOSING, CLOSING, results=False, source=source)
    first, second = pool.open([0, 0], 100, [1 << 30] * 2)
    granted: list[int] = []
    pool.ask(first, granted.append)
    assert not source.asked, "one of them still runs"
    pool.ask(second, granted.append)
    assert source.asked == 1
    source.grant(tokens)
    assert granted == [tokens // 2] * 2


def test_a_pool_whose_branches_have_all_ended_withdraws():
    source = Source(0)
    pool = LeasePool(100 + CLOSING, CLOSING, results=False, source=source)
    (lease,) = pool.open([0], 100, [1 << 30])
    pool.ask(lease, lambda tokens: None)
    pool.end(lease, 100 + CLOSING)
    assert source.withdrawn == 1
