"""What workers of a group see, in numbers alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sgl_apr.server.shared_cache.group import HistoryMove, WorkerGroup
from sgl_apr.server.shared_cache.parameters import GroupParams

PROMPT = 10


def make_group(workers: int, kind: Any = "hogwild") -> WorkerGroup:
    """A group whose workers have rows 1, 2, ..., and whose view is row 9."""
    params = [GroupParams(kind, n, workers, PROMPT, position_range=100, name="g") for n in range(workers)]
    group = WorkerGroup(params[0], 0.0, view_row=9, view_length=PROMPT)
    for number, worker in enumerate(params):
        group.add(SimpleNamespace(kv=SimpleNamespace(req_pool_idx=number + 1)), worker)
    return group


def key_positions(group: WorkerGroup, moves: list[HistoryMove], view: Any) -> list[int]:
    """The position of each key relative to the query, from 0, as the turned query meets it."""
    worker = next(w for w in group.workers.values() if w.number == view.batch_row)
    query = PROMPT + worker.tokens_read - 1
    distances = []
    for block in view.blocks:
        # Keys of the view row are at their places. Those of workers are cached at their places in their own rows.
        distances += [query + block.turn - place for place in range(block.first, block.last)]
    assert distances[-1] == 0
    return [distances[0] - distance for distance in distances]


def test_the_view_of_a_worker_is_one_sequence_of_positions() -> None:
    group = make_group(3)
    assert group.read_tokens({0: 15, 1: 12, 2: 18}) == []
    for view in group.hogwild_views({0: 0, 1: 1, 2: 2}):
        assert key_positions(group, [], view) == list(range(PROMPT + 5 + 2 + 8))
        assert view.blocks[-1].row == view.batch_row + 1, "its own block comes last"
    others = [[b.row for b in view.blocks] for view in group.hogwild_views({0: 0, 1: 1, 2: 2})]
    assert others == [[9, 2, 3, 1], [9, 1, 3, 2], [9, 1, 2, 3]]


def test_a_step_moves_when_the_token_after_it_is_read() -> None:
    group = make_group(2)
    group.workers[0].next_block_starts = [4]  # own places 0 to 3 are the step
    assert group.read_tokens({0: PROMPT + 4, 1: PROMPT + 4}) == [], "the last token of the step is read"
    moves = group.read_tokens({0: PROMPT + 5, 1: PROMPT + 5})
    assert moves == [HistoryMove(row=1, first=10, last=14, target=10, turn=0)]
    assert group.view_length == PROMPT + 4
    group.workers[1].next_block_starts = [7]
    group.read_tokens({0: PROMPT + 6, 1: PROMPT + 6})
    group.read_tokens({0: PROMPT + 7, 1: PROMPT + 7})
    (move,) = group.read_tokens({0: PROMPT + 8, 1: PROMPT + 8})
    assert move == HistoryMove(row=2, first=10, last=17, target=14, turn=4)
    for view in group.hogwild_views({0: 0, 1: 1}):
        assert key_positions(group, moves, view) == list(range(PROMPT + 8 + 8))


def test_a_step_of_one_token_ends_before_the_one_before_it_has_moved() -> None:
    group = make_group(1)
    group.workers[0].next_block_starts = [
        4,
        5,
    ]  # without overlap, both ends are known before the next token is read
    assert [(m.first, m.last) for m in group.read_tokens({0: PROMPT + 5})] == [(10, 14)]
    assert [(m.first, m.last) for m in group.read_tokens({0: PROMPT + 6})] == [(14, 15)]
    assert group.read_tokens({0: PROMPT + 7}) == []


def test_steps_that_end_together_move_by_number() -> None:
    group = make_group(2)
    group.read_tokens({0: PROMPT + 3, 1: PROMPT + 3})
    group.workers[0].next_block_starts = [3]
    group.workers[1].next_block_starts = [3]
    moves = group.read_tokens({1: PROMPT + 4, 0: PROMPT + 4})
    assert [(move.row, move.target, move.turn) for move in moves] == [(1, 10, 0), (2, 13, 3)]


def test_a_worker_that_has_ended_is_still_seen() -> None:
    group = make_group(2)
    group.read_tokens({0: PROMPT + 3, 1: PROMPT + 3})
    group.workers[1].has_ended = True
    group.read_tokens({0: PROMPT + 4})
    (view,) = group.hogwild_views({0: 0})
    assert [(b.row, b.first, b.last) for b in view.blocks] == [(9, 0, 10), (2, 10, 13), (1, 10, 14)]


def test_a_worker_of_group_think_has_positions_of_its_own() -> None:
    group = make_group(3, "group_think")
    assert [worker.params.first_position for worker in group.workers.values()] == [10, 110, 210]


def test_a_group_is_complete_without_workers_that_never_come() -> None:
    params = GroupParams("group_think", 0, 2, PROMPT, position_range=5, name="g")
    group = WorkerGroup(params, 0.0)
    worker = group.add(object(), params)
    assert not group.is_complete
    group.missing.add(1)
    assert group.is_complete
    assert not group.is_over
    worker.has_ended = True
    assert group.is_over
