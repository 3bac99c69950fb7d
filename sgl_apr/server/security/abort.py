"""Lets a scheduler abort the request with a given id only.

SGLang's scheduler aborts every request whose id begins with the given one. Clients choose ids, and a request is also
aborted when its client leaves. So a client that calls its request "a" and leaves would end the requests of all others
that begin with "a".

SGLang also aborts the id of a request two seconds after its response, whatever request then has that id. So a client
that sends a running id, which is refused, would end the request that has it.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sgl_apr.server.hooks import hook_after, hook_around

# No id of a client begins with it: `check_request_id` rejects control characters.
_HIDDEN = "\x00"
MAX_REQUEST_ID_LENGTH = 256
ABORT_DELAY_S = 2.0  # SGLang's own

_requests: weakref.WeakSet[Any] = (
    weakref.WeakSet()
)  # the requests of this process's scheduler, in all its queues


def register_hooks() -> None:
    """Set the hooks in the scheduler, and the check of ids in the HTTP process."""
    hook_after("sglang.srt.managers.schedule_batch:Req.__init__", ["rid"], _track)
    scheduler = "sglang.srt.managers.scheduler:Scheduler.abort_request"
    hook_around(scheduler, ["recv_req"], abort_exact_request)
    manager = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
    hook_around(f"{manager}.create_abort_task", ["obj"], _create_abort_task)
    receiver = "sglang.srt.disaggregation.encoder.receiver:MMReceiverBase.abort_waiting_requests"
    hook_around(receiver, ["recv_req"], _abort_waiting_request)
    for kind in ("GenerateReqInput", "EmbeddingReqInput"):
        hook_around(
            f"sglang.srt.managers.io_struct:{kind}.normalize_batch_and_arguments", [], normalize_request
        )


def abort_exact_request(abort: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Call SGLang's `Scheduler.abort_request` for the request with the given id, but not for those it is a prefix of.

    Args:
        abort: The method.
        scheduler: The scheduler.
        request: The `AbortReq`.
    """
    if request.abort_all:
        return abort(scheduler, request)
    with hidden_from_prefix(request.rid, _requests):
        return abort(scheduler, request)


def _abort_waiting_request(abort: Callable[..., Any], receiver: Any, request: Any) -> Any:
    if request.abort_all:
        return abort(receiver, request)
    with hidden_from_prefix(request.rid, receiver.waiting_list):
        return abort(receiver, request)


@contextmanager
def hidden_from_prefix(rid: str, requests: Iterable[Any]) -> Iterator[None]:
    """Rename, inside the block, the requests whose ids `rid` is a proper prefix of.

    The scheduler has one thread, so nothing else sees the names.

    Args:
        rid: The id.
        requests: Objects with an id `rid`.
    """
    hidden = [(r, r.rid) for r in list(requests) if r.rid != rid and r.rid.startswith(rid)]
    try:
        for request, own in hidden:
            request.rid = _HIDDEN + own
        yield
    finally:
        for request, own in hidden:
            request.rid = own


def check_request_id(rid: object) -> None:
    """Check an id that a client chose, before it reaches a scheduler, a log or another process.

    Raises:
        ValueError: It is not a string of 1 to `MAX_REQUEST_ID_LENGTH` printable characters.
    """
    if not isinstance(rid, str) or not 0 < len(rid) <= MAX_REQUEST_ID_LENGTH or not rid.isprintable():
        found = f"{type(rid).__name__} {str(rid)[:40]!r}"
        raise ValueError(
            f"rid: found {found}, expected a string of 1 to {MAX_REQUEST_ID_LENGTH} printable characters"
        )


def _create_abort_task(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Return SGLang's task, which sees only the ids that are still those of the request."""
    tasks = original(manager, request)
    for task in tasks.tasks:
        task.func = functools.partial(abort_own_requests, manager, request)
        task.is_async = True
    return tasks


async def abort_own_requests(manager: Any, request: Any) -> None:
    """Abort what is left of a request after its response, unless another request has its id by then.

    Args:
        manager: SGLang's `TokenizerManager`.
        request: The `GenerateReqInput`, normalized.
    """
    await asyncio.sleep(ABORT_DELAY_S)
    if not hasattr(request, "is_single"):  # it was refused before SGLang had normalized it
        return
    parts = [request] if request.is_single else [request[i] for i in range(len(request.rid))]
    for part in parts:
        state = manager.rid_to_state.get(part.rid)
        if state is not None and state.obj is part:
            manager.abort_request(part.rid)


def normalize_request(normalize: Callable[..., Any], request: Any) -> Any:
    """Normalize a request as SGLang does, and check its ids.

    Args:
        normalize: SGLang's method.
        request: The `GenerateReqInput` or `EmbeddingReqInput`.

    Raises:
        RequestRefused: An id is not possible, or the fields do not fit one another.
    """
    from sgl_apr.server.guard.middleware import note_refusal  # in the HTTP process only
    from sgl_apr.server.guard.refusal import MISFIT_ERRORS, RequestRefused, misfit

    try:
        result = normalize(request)
    except MISFIT_ERRORS as error:
        raise note_refusal(misfit(error)) from error
    rid = request.rid
    try:
        for each in rid if isinstance(rid, list) else [rid]:
            check_request_id(each)
    except ValueError as error:
        raise note_refusal(RequestRefused(str(error), "rid")) from None
    return result


def _track(result: Any, request: Any, *_: Any, **__: Any) -> None:
    _requests.add(request)
