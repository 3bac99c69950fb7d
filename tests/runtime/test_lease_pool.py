"""Branches that share tokens: nothing is exceeded, nobody waits for ever, and speed does not matter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
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


@settings(deadline=None)
@given(**cases, most=st.sampled_from([20, 100, 1 << 30]))
def test_nothing_is_exceeded_and_nobody_waits_for_ever(capacity, wanted, results, seed, most):
    written = simulate(capacity, wanted, results, random.Random(seed), most)
    assert all(w <= min(want, most) for w, want in zip(written, wanted, strict=True))


@settings(deadline=None)
@given(**cases)
def test_what_a_branch_may_write_does_not_depend_on_speed(capacity, wanted, results, seed):
    one = simulate(capacity, wanted, results, random.Random(seed))
    other = simulate(capacity, wanted, results, random.Random(seed + 1))
    assert one == other


@settings(deadline=None)
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


@settings(deadline=None)
@given(
    capacity=st.integers(0, 900),
    wanted=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    returned=st.floats(0, 1),
    seed=st.integers(0, 1 << 20),
)
def test_paths_and_results_never_exceed_the_path(capacity, wanted, returned, seed):
    """Branches in parallel, and then their results after one another."""

    def run(order: random.Random) -> list[tuple[int, int]]:
        pool = LeasePool(1 << 40, 0, results=True, path_capacity=capacity)
        leases = pool.open([0] * len(wanted), 1 << 20, [1 << 30] * len(wanted))
        path, ready, ended = [0] * len(wanted), set(range(len(wanted))), dict[int, int]()
        stuck = dict[int, int]()  # the length at which a branch has asked
        while len(ended) < len(wanted):
            assert ready, "all of them wait"
            k = order.choice(sorted(ready))
            if path[k] < min(wanted[k], leases[k].path_tokens):
                path[k] += 1
            elif path[k] == wanted[k] or stuck.get(k) == path[k]:  # it has asked in vain
                ready.discard(k)
                ended[k] = int(path[k] * returned)
                pool.end(leases[k], 0, path[k], ended[k])
            else:
                ready.discard(k)
                stuck[k] = path[k]
                pool.ask_for_path(leases[k], lambda _, k=k: ready.add(k), int(path[k] * returned))
            assert (
                max(one.path_tokens for one in leases) + sum(one.path_result_tokens for one in leases)
                <= capacity
            )
        return [(path[k], ended[k]) for k in range(len(wanted))]

    one = run(random.Random(seed))
    assert one == run(random.Random(seed + 1))
    for (length, _), want in zip(one, wanted, strict=True):
        assert min(want, capacity // (1 + len(wanted))) <= length <= want


def test_short_results_leave_a_longer_path_to_others():
    pool = LeasePool(1 << 20, 0, results=True, path_capacity=300)
    first, second = pool.open([0, 0], 1 << 10, [1 << 20] * 2)
    assert first.path_tokens == second.path_tokens == 100
    granted: list[int] = []
    pool.ask_for_path(first, granted.append, 10)
    assert not granted, "the other still writes"
    pool.end(second, 40, 30, 10)
    assert granted == [0]
    assert first.path_tokens == 190  # and a result of at most 100 tokens, after one of 10
    assert first.path_result_tokens == 100
