"""How groups are remembered until they start, without a scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sgl_apr.server.shared_cache import lifecycle


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_waiting", {})


def arrive(name: str, worker: int = 0) -> Any:
    """A worker of a group of two arrives in the queue."""
    group = {
        "kind": "group_think",
        "worker": worker,
        "workers": 2,
        "prompt_tokens": 3,
        "position_range": 9,
        "name": name,
    }
    req = SimpleNamespace(
        sampling_params=SimpleNamespace(custom_params={"apr_group": group}),
        origin_input_ids=[1] * 5,
        to_finish=None,
    )
    lifecycle.register(None, None, req)
    return req


def test_abandoned_groups_are_forgotten() -> None:
    waits = arrive("waits")
    for number in range(3 * lifecycle.MAX_ABANDONED):
        lifecycle.leave_queue(None, None, arrive(f"abandoned {number}"))
    groups = lifecycle.waiting_groups()
    assert len(groups) <= lifecycle.MAX_ABANDONED + 2
    assert waits.apr_worker.group in groups
    last = arrive(f"abandoned {3 * lifecycle.MAX_ABANDONED - 1}", worker=1).apr_worker
    assert last.group.missing == {0}, "a worker that arrives soon after joins its group"
    assert last.group.is_complete
    assert not last.group.is_abandoned


def test_a_group_without_workers_that_can_come_is_over() -> None:
    for worker in range(2):
        lifecycle.leave_queue(None, None, arrive("both", worker))
    assert lifecycle.waiting_groups() == []
