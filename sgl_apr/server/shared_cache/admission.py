"""Starts the workers of a group together: they are prefilled in one batch, so that they decode in step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sgl_apr.server.shared_cache import lifecycle
from sgl_apr.server.shared_cache.group import WorkerGroup

# Seconds until a group whose workers have not all arrived ends. They are sent one right after the other.
ARRIVAL_TIMEOUT_S = 10.0
# Rounds of the scheduler in which smaller requests may overtake a group that does not fit yet. It is no time, because
# ranks that schedule together have no common clock.
MAX_SKIPPED_ROUNDS = 256


def get_prefill_batch(
    original: Callable[..., Any], scheduler: Any, prefill_delayer_single_pass: Any, running_batch: Any
) -> Any:
    """Choose the next batch to prefill: the workers of one group that is complete and fits, or ordinary requests."""
    grammars = scheduler.grammar_manager
    if grammars.has_waiting_grammars():
        for req in grammars.get_ready_grammar_requests():
            scheduler._add_request_to_queue(req)
    groups = lifecycle.waiting_groups()
    if not groups:
        return _without_grammars(original, scheduler, prefill_delayer_single_pass, running_batch)
    _expire(groups)
    group, holds_others = _next_group(groups, scheduler, running_batch)
    if group is not None:
        members = {id(worker.req) for worker in group.live_workers}
        visible = [req for req in scheduler.waiting_queue if id(req) in members]
    elif holds_others:
        visible = []
    else:
        visible = [req for req in scheduler.waiting_queue if not _is_waiting_worker(req)]
    result = _with_queue(visible, original, scheduler, prefill_delayer_single_pass, running_batch)
    if group is not None:
        _check_started(group, result[0], scheduler, running_batch)
    return result


def _next_group(
    groups: Sequence[WorkerGroup], scheduler: Any, running_batch: Any
) -> tuple[WorkerGroup | None, bool]:
    """Return the group that starts now, and whether another one has waited so long that nothing else may start."""
    holds_others = False
    for group in groups:
        if not group.is_complete:
            continue
        if _fits(group, scheduler, running_batch):
            return group, False
        group.skipped_rounds += 1
        holds_others = holds_others or group.skipped_rounds > MAX_SKIPPED_ROUNDS
        if holds_others:
            break
    return None, holds_others


def _with_queue(visible: list[Any], original: Callable[..., Any], scheduler: Any, *arguments: Any) -> Any:
    """Call the original with some of the waiting requests. The others stay in the queue, in order."""
    shown = set(map(id, visible))
    order = {id(req): place for place, req in enumerate(scheduler.waiting_queue)}
    hidden = [req for req in scheduler.waiting_queue if id(req) not in shown]
    scheduler.waiting_queue = visible
    try:
        return _without_grammars(original, scheduler, *arguments)
    finally:
        left = scheduler.waiting_queue + hidden
        scheduler.waiting_queue = sorted(left, key=lambda req: order.get(id(req), len(order)))


def _without_grammars(original: Callable[..., Any], scheduler: Any, *arguments: Any) -> Any:
    """Call the original, which would queue requests whose grammar has become ready, and prefill workers without their group."""
    grammars = scheduler.grammar_manager
    if not grammars.has_waiting_grammars():
        return original(scheduler, *arguments)
    waiting, grammars.grammar_queue = grammars.grammar_queue, []
    try:
        return original(scheduler, *arguments)
    finally:
        grammars.grammar_queue = waiting + grammars.grammar_queue


def _is_waiting_worker(req: Any) -> bool:
    worker = lifecycle.worker_of(req)
    return worker is not None and not worker.group.started


def _expire(waiting: Sequence[WorkerGroup]) -> None:
    """End groups whose workers do not all arrive, unless ranks schedule together."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_size > 1:
        return
    now = time.monotonic()
    for group in waiting:
        if not group.is_complete and now - group.created_at > ARRIVAL_TIMEOUT_S:
            count = len(group.workers)
            lifecycle.fail(
                group, f"{count} of {group.params.workers} workers arrived within {ARRIVAL_TIMEOUT_S:g} s"
            )


def _fits(group: WorkerGroup, scheduler: Any, running_batch: Any) -> bool:
    """Return whether a group can start now: there are rows and slots for all of its workers, and no chunk is pending.

    The estimate of slots is that of SGLang's `PrefillAdder`. With nothing else running, the group is tried.
    """
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    workers = group.live_workers
    if scheduler.chunked_req is not None:
        return False
    if not _has_rows(scheduler, running_batch, len(workers)):
        if _is_idle(scheduler, running_batch):
            rows = len(workers) + 1
            lifecycle.fail(group, f"{len(workers)} workers need {rows} rows, more than this server has")
        return False
    if _is_idle(scheduler, running_batch):
        return True

    def reserve(req: Any) -> int:
        return int(min(req.sampling_params.max_new_tokens - len(req.output_ids), CLIP_MAX_NEW_TOKENS))

    prompt = group.params.prompt_tokens
    needed = prompt + sum(len(w.req.origin_input_ids) - prompt + reserve(w.req) + 1 for w in workers)
    running = sum(map(reserve, running_batch.reqs)) * scheduler.new_token_ratio_tracker.current
    free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return bool(free - running >= needed)


def _has_rows(scheduler: Any, running_batch: Any, workers: int) -> bool:
    """Return whether there is a row for each worker, and one for the view of the group."""
    allocatable = scheduler.get_num_allocatable_reqs(len(running_batch.reqs), running_batch=running_batch)
    return bool(allocatable >= workers and scheduler.req_to_token_pool.available_size() > workers)


def _is_idle(scheduler: Any, running_batch: Any) -> bool:
    """Return whether nothing runs, and no result is pending whose requests still hold rows and slots."""
    return bool(running_batch.is_empty() and scheduler.last_batch is None)


def _check_started(group: WorkerGroup, batch: Any, scheduler: Any, running_batch: Any) -> None:
    """Note that a group has started, or fail it if only some of its workers have."""
    workers = group.live_workers
    started = set() if batch is None else set(map(id, batch.reqs))
    count = sum(id(worker.req) in started for worker in workers)
    if count:
        lifecycle.start(group)
        if count < len(workers):
            lifecycle.fail(group, f"only {count} of {len(workers)} workers fit into one batch")
        elif any(worker.req.extend_end < len(worker.req.origin_input_ids) for worker in workers):
            lifecycle.fail(group, "the prompt and the headers do not fit into one chunk of the prefill")
        else:  # now, because the next batch could take the last row
            lifecycle.reserve_view_row(group, scheduler.req_to_token_pool)
    elif workers and _is_idle(scheduler, running_batch):
        lifecycle.fail(group, "the workers do not fit into the cache")
