"""Registers groups of workers with SGLang: hooks on its scheduler, its batches and its validation of requests."""

from __future__ import annotations

from typing import Any

from sgl_apr.server.hooks import hook_after, hook_around

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker"


def register_hooks() -> None:
    """Set the hooks.

    Raises:
        LaunchError: A function of SGLang is not as expected.
    """
    from sgl_apr.server.shared_cache import flashinfer_attention, lifecycle, validation

    flashinfer_attention.register_hooks()  # on a GPU: the attention of Hogwild!

    request = "sglang.srt.managers.io_struct:GenerateReqInput.normalize_batch_and_arguments"
    hook_after(request, [], validation.name_group)
    hook_after(f"{_SCHEDULER}._add_request_to_queue", ["req"], lifecycle.register)
    hook_after(f"{_SCHEDULER}._release_aborted_request", ["req"], lifecycle.leave_queue)
    hook_around(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        ["prefill_delayer_single_pass", "running_batch"],
        _get_prefill_batch,
    )
    hook_around(f"{_SCHEDULER}._reqs_finishing_inflight", ["batch"], lifecycle.finishing_in_flight)
    hook_around(
        "sglang.srt.managers.schedule_batch:Req.update_finish_state",
        ["new_accepted_len"],
        lifecycle.update_finish_state,
    )
    hook_around(
        "sglang.srt.mem_cache.common:release_kv_cache", ["req", "tree_cache"], lifecycle.release_kv_cache
    )
    hook_around("sglang.srt.mem_cache.common:match_kv_cache", ["req", "tree_cache"], lifecycle.match_kv_cache)
    hook_after(f"{_CHECKER}._requests_owning_rows", [], lifecycle.with_held_requests)
    hook_around(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ["batch", "model_runner"],
        _init_forward_batch,
    )


def _get_prefill_batch(*arguments: Any, **options: Any) -> Any:
    from sgl_apr.server.shared_cache.admission import get_prefill_batch

    return get_prefill_batch(*arguments, **options)


def _init_forward_batch(*arguments: Any, **options: Any) -> Any:
    from sgl_apr.server.shared_cache.forward_batch import init_forward_batch

    return init_forward_batch(*arguments, **options)
