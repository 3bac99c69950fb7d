"""Gives each worker of a group, in a `ForwardBatch`, the slots and positions of what it sees."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import torch
from sglang.srt.utils.common import async_h2d

from sgl_apr.server.shared_cache import lifecycle
from sgl_apr.server.shared_cache.flashinfer_attention import attention_supports_views
from sgl_apr.server.shared_cache.group import HistoryMove, Worker, WorkerGroup
from sgl_apr.server.shared_cache.rotary import Rotation
from sgl_apr.server.shared_cache.views import WorkerView


def init_forward_batch(
    original: Callable[..., Any], cls: Any, batch: Any, runner: Any, *arguments: Any, **options: Any
) -> Any:
    """Make the `ForwardBatch` of a batch in which there may be workers of groups."""
    rows = [(row, worker) for row, req in enumerate(batch.reqs) if (worker := lifecycle.worker_of(req))]
    runner.attn_backend.worker_views = []
    if not rows:
        return original(cls, batch, runner, *arguments, **options)
    if not batch.forward_mode.is_decode():
        made = original(cls, batch, runner, *arguments, **options)
        _shift_headers(made, batch, rows)
        return made
    groups: defaultdict[int, list[tuple[int, Worker]]] = defaultdict(list)
    for row, worker in rows:
        groups[id(worker.group)].append((row, worker))
    views: list[WorkerView] = []
    shared: list[tuple[int, Worker]] = []
    for members in groups.values():
        group = members[0][1].group
        if not _prepare(group, members, batch, runner):
            continue
        lengths = {worker.number: int(batch.seq_lens_cpu[row]) for row, worker in members}
        moves = group.read_tokens(lengths)
        if group.params.kind == "group_think":
            _append_new_tokens(group, members, batch, runner)
            shared += members
        else:
            for move in moves:
                _move_to_history(group, move, runner)
            views += group.hogwild_views({worker.number: row for row, worker in members})
    runner.attn_backend.worker_views = views
    if not shared:
        return original(cls, batch, runner, *arguments, **options)
    edited, positions = _with_views(batch, shared)
    made = original(cls, edited, runner, *arguments, **options)
    where = async_h2d([row for row, _ in shared], dtype=torch.int64, device=made.positions.device)
    made.positions = made.positions.clone()
    made.positions[where] = positions.to(made.positions.dtype)
    return made


def _shift_headers(made: Any, batch: Any, rows: Sequence[tuple[int, Worker]]) -> None:
    """Shift the positions of headers to the range of their worker (Group Think). They see the prompt and themselves."""
    shifts: list[int] = [0] * int(made.positions.numel())
    ends = torch.tensor(batch.extend_lens).cumsum(0).tolist()
    for row, worker in rows:
        params = worker.params
        shift = params.first_position - params.prompt_tokens
        header = len(worker.req.origin_input_ids) - params.prompt_tokens
        count = min(header, batch.extend_lens[row])
        shifts[ends[row] - count : ends[row]] = [shift] * count
    if any(shifts):
        made.positions = made.positions + async_h2d(
            shifts, dtype=made.positions.dtype, device=made.positions.device
        )


def _prepare(group: WorkerGroup, members: Sequence[tuple[int, Worker]], batch: Any, runner: Any) -> bool:
    """Fill the view row of a group at its first step. Returns False if the group has failed."""
    if group.view_length:
        return True
    if group.params.kind == "hogwild":
        try:
            rotation_of(runner)
        except ValueError as error:
            lifecycle.fail(group, f"Hogwild! does not work with {error}", HTTPStatus.BAD_REQUEST)
            return False
    table, prompt = runner.req_to_token_pool.req_to_token, group.params.prompt_tokens
    first_row = members[0][1].row
    table[group.view_row, :prompt] = table[first_row, :prompt]
    group.view_length = prompt
    if group.params.kind == "group_think":
        for row, worker in members:  # the headers: the new token of each comes with this step
            _append(group, table, table[worker.row, prompt : int(batch.seq_lens_cpu[row]) - 1])
    return True


def _append_new_tokens(
    group: WorkerGroup, members: Sequence[tuple[int, Worker]], batch: Any, runner: Any
) -> None:
    where = async_h2d([row for row, _ in members], dtype=torch.int64, device=batch.out_cache_loc.device)
    _append(group, runner.req_to_token_pool.req_to_token, batch.out_cache_loc[where])


def _append(group: WorkerGroup, table: torch.Tensor, slots: torch.Tensor) -> None:
    end = group.view_length + len(slots)
    table[group.view_row, group.view_length : end] = slots.to(table.dtype)
    group.view_length = end


def _move_to_history(group: WorkerGroup, move: HistoryMove, runner: Any) -> None:
    """Append a step to the history. Its keys are turned in place to the positions that they have there."""
    table = runner.req_to_token_pool.req_to_token
    slots = table[move.row, move.first : move.last]
    table[group.view_row, move.target : move.target + len(slots)] = slots
    if move.turn:
        rotation_of(runner).turn_cached_keys(runner.token_to_kv_pool, slots.to(torch.int64), move.turn)


def _with_views(batch: Any, shared: Sequence[tuple[int, Worker]]) -> tuple[Any, torch.Tensor]:
    """Return a copy of a batch in which workers have the row and length of their group, and their positions."""
    device = batch.seq_lens.device
    where = async_h2d([row for row, _ in shared], dtype=torch.int64, device=device)
    lengths = [worker.group.view_length for _, worker in shared]
    view_rows = [worker.group.view_row for _, worker in shared]
    places = [worker.params.first_position + worker.tokens_read - 1 for _, worker in shared]
    edited = copy.copy(batch)
    edited.seq_lens = batch.seq_lens.clone()
    edited.seq_lens[where] = async_h2d(lengths, dtype=batch.seq_lens.dtype, device=device)
    edited.seq_lens_cpu = batch.seq_lens_cpu.clone()
    edited.seq_lens_cpu[torch.tensor([row for row, _ in shared])] = torch.tensor(
        lengths, dtype=batch.seq_lens_cpu.dtype
    )
    edited.req_pool_indices = batch.req_pool_indices.clone()
    edited.req_pool_indices[where] = async_h2d(view_rows, dtype=batch.req_pool_indices.dtype, device=device)
    edited.seq_lens_sum = int(edited.seq_lens_cpu.sum())
    if batch.seq_lens_sum is None:  # as `ForwardBatch.init_new` does for the batch that it is given
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    return edited, async_h2d(places, dtype=torch.int64, device=device)


def rotation_of(runner: Any) -> Rotation:
    """Return the rotary embedding of a runner's model.

    Raises:
        ValueError: The model has none that Hogwild! can use, or the attention backend cannot turn queries. The text
            completes the phrase "does not work with".
    """
    rotation: Rotation | None = getattr(runner, "apr_rotation", None)
    if rotation is None:
        if not attention_supports_views(runner.attn_backend):
            pool = type(runner.token_to_kv_pool).__name__
            raise ValueError(f"{type(runner.attn_backend).__name__} over a {pool}, as this server has it")
        rotation = runner.apr_rotation = Rotation.from_model(runner.model)
    return rotation
