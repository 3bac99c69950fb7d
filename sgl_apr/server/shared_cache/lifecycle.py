"""How workers of a group arrive, end and fail in SGLang's scheduler.

Three rules hold, with and without overlap scheduling:

- The others see every token of a worker, its last one too. So a worker ends one step after its last token was sampled.
- What a worker has written stays in the cache until all have ended.
- If the scheduler takes a running worker's slots away, the group ends with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from sgl_apr.server.shared_cache.group import Worker, WorkerGroup
from sgl_apr.server.shared_cache.parameters import GroupError, has_group, parse_group

ERROR_TYPE = "AprGroup"
MAX_ABANDONED = 64
_waiting: dict[str, WorkerGroup] = {}  # groups that have not started, by name


def worker_of(req: Any) -> Worker | None:
    """Return the worker that a request is, unless it is none or its group has failed."""
    worker: Worker | None = getattr(req, "apr_worker", None)
    return worker if worker is not None and worker.group.failure is None else None


def waiting_groups() -> list[WorkerGroup]:
    """Return the groups that have not started, in the order in which they arrived."""
    return list(_waiting.values())


def register(_: Any, scheduler: Any, req: Any, *arguments: Any, **options: Any) -> None:
    """Let a request that was queued take its place in its group."""
    params = req.sampling_params.custom_params
    if not has_group(params):
        return
    if hasattr(req, "apr_worker"):  # retracted, or preempted by a request of higher priority
        failure = req.apr_worker.group.failure or "worker group: a worker had to make room for other requests"
        req.set_finish_with_abort(failure, HTTPStatus.SERVICE_UNAVAILABLE, ERROR_TYPE)
        return
    is_rejected = req.to_finish is not None  # for instance by its grammar
    try:
        parsed = parse_group(params)
        tokens = len(req.origin_input_ids)
        if not is_rejected and tokens <= parsed.prompt_tokens:
            raise GroupError(f"the input has {tokens} tokens, expected a header after {parsed.prompt_tokens}")
        group = _waiting.get(parsed.name)
        if group is None:
            _forget_abandoned_groups()
            group = _waiting[parsed.name] = WorkerGroup(parsed, time.monotonic())
        elif group.params.group != parsed.group or parsed.worker in group.workers:
            raise GroupError("this worker does not fit the others of its group")
    except GroupError as error:  # an exception here would end the scheduler
        req.set_finish_with_abort(f"worker group: {error}", HTTPStatus.BAD_REQUEST, ERROR_TYPE)
        return
    if is_rejected:
        _miss(group, parsed.worker)
        return
    req.apr_worker = group.add(req, parsed)
    req.skip_radix_cache_insert = True  # its keys are not those of the same text read as one sequence


def _forget_abandoned_groups() -> None:
    """Forget all but the last groups whose workers were aborted before the others arrived, as these may never do.

    The number does not depend on a clock, so that ranks that schedule together forget the same groups.
    """
    abandoned = [name for name, group in _waiting.items() if group.is_abandoned]
    for name in abandoned[:-MAX_ABANDONED]:
        del _waiting[name]


def start(group: WorkerGroup) -> None:
    """Note that the workers of a group are being prefilled."""
    group.started = True
    _waiting.pop(group.params.name, None)


def reserve_view_row(group: WorkerGroup, pool: Any) -> None:
    """Take the row of a group's view from SGLang's `ReqToTokenPool`. The group fails if there is none."""
    rows = pool.alloc_rows(1)
    if rows is None:
        fail(group, "there is no row left for the view of the group")
        return
    group.view_row = rows[0]
    group.free_view_row = lambda: pool.free_rows(rows)


def leave_queue(_: Any, scheduler: Any, req: Any) -> None:
    """Let a group continue without a worker that was aborted in the queue."""
    worker = worker_of(req)
    if worker is not None and not worker.group.started:
        _miss(worker.group, worker.number)


def _miss(group: WorkerGroup, worker: int) -> None:
    """Note that a worker will not be prefilled."""
    group.missing.add(worker)
    if group.is_over:
        _waiting.pop(group.params.name, None)


def fail(group: WorkerGroup, why: str, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE) -> None:
    """End all workers of a group with an error, and give back what the group holds."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if group.failure is not None:
        return
    message = f"worker group: {why}"
    group.failure = message
    _waiting.pop(group.params.name, None)
    for worker in group.workers.values():
        req = worker.req
        if worker.has_ended or req.finished() or req.to_finish is not None:
            continue
        if req.kv.holds_kv:
            req.to_finish = FINISH_ABORT(message, status, ERROR_TYPE)
        else:  # in the queue: it ends with its prefill, which becomes a single token
            req.set_finish_with_abort(message, status, ERROR_TYPE)
    _free(group)


def is_token_read(req: Any) -> bool:
    """Return whether the last token of a request has been read, or is read by the step in flight."""
    return bool(req.kv.kv_committed_len >= len(req.origin_input_ids) + len(req.output_ids))


def update_finish_state(original: Callable[..., None], req: Any, *arguments: Any, **options: Any) -> None:
    """Defer the end of a worker until its last token has been read, and find the ends of its steps."""
    worker = worker_of(req)
    if worker is None:
        original(req, *arguments, **options)
        return
    if req.finished():
        return
    if worker.pending_finish is not None:  # what was sampled in this step is dropped
        req.finished_reason, req.finished_len = worker.pending_finish
        req.to_finish = None
        return
    original(req, *arguments, **options)
    if not req.finished():
        _find_step_end(worker)
        return
    if is_token_read(req):
        return
    length = len(req.output_ids) if req.finished_len is None else req.finished_len
    worker.pending_finish = (req.finished_reason, length)
    req.finished_reason = req.finished_len = None
    req.grammar = None  # the token to come is dropped, so nothing has to accept it


def finishing_in_flight(original: Callable[..., list[Any]], scheduler: Any, batch: Any) -> list[Any]:
    """Keep workers in the next step until their last token is read, and no longer."""
    finishing = original(scheduler, batch)
    workers = [worker for req in batch.reqs if (worker := worker_of(req)) is not None]
    if not workers:
        return finishing
    ended = [w.req for w in workers if w.pending_finish is not None and is_token_read(w.req)]
    return [req for req in finishing if worker_of(req) is None] + ended


def _find_step_end(worker: Worker) -> None:
    """Note that the current step of a worker of Hogwild! ends with its last token, if it does."""
    step_end, req = worker.params.step_end, worker.req
    if step_end is None:
        return
    header = len(req.origin_input_ids) - worker.params.prompt_tokens
    block_start = worker.next_block_starts[-1] if worker.next_block_starts else worker.block_start
    first = max(block_start - header, 0, len(req.output_ids) - len(step_end.encode()) - 4)
    if step_end in req.tokenizer.decode(req.output_ids[first:].tolist()):
        worker.next_block_starts.append(header + len(req.output_ids))


def match_kv_cache(original: Callable[..., Any], req: Any, *arguments: Any, **options: Any) -> Any:
    """Match only the prompt of a worker: what follows has other keys than the same text read as one sequence."""
    worker = worker_of(req)
    if worker is not None:
        prompt, limit = worker.params.prompt_tokens, options.get("max_prefix_len")
        options["max_prefix_len"] = prompt if limit is None else min(limit, prompt)
    return original(req, *arguments, **options)


def release_kv_cache(original: Callable[..., Any], req: Any, tree_cache: Any, **options: Any) -> Any:
    """Keep what a worker has written until all workers of its group have ended."""
    worker = worker_of(req)
    if worker is None:
        return original(req, tree_cache, **options)
    group = worker.group
    if not req.finished():  # retracted, or preempted by a request of higher priority
        worker.has_ended = True
        fail(group, "a worker had to make room for other requests")
        return original(req, tree_cache, **options)
    worker.has_ended = True
    group.held.append((req, lambda: original(req, tree_cache, checkpoint=False)))
    if group.is_over:
        _free(group)
    return None


def _free(group: WorkerGroup) -> None:
    held, group.held = group.held, []
    for _, give_back in held:
        give_back()
    if group.view_row is not None and group.free_view_row is not None:
        group.free_view_row()
    group.view_row = group.free_view_row = None


def with_held_requests(owners: list[Any], checker: Any) -> list[Any]:
    """Count the slots that groups hold for workers that have ended, in SGLang's check of its memory."""
    present = set(map(id, owners))
    held: Iterable[Any] = (
        req for owner in owners if (worker := worker_of(owner)) is not None for req, _ in worker.group.held
    )
    for req in held:
        if id(req) not in present:
            present.add(id(req))
            owners.append(req)
    return owners
