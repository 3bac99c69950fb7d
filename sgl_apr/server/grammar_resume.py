"""Lets a request continue under its grammar where another one was cut by its token limit.

A matcher of SGLang starts with its request. So the last ids of the prompt, which were decoded under the same grammar, are
given to it first. A request says how many in the custom parameter `RESUME_PARAM`.
"""

from __future__ import annotations

from typing import Any

from sgl_apr.engine.sglang_request import RESUME_PARAM
from sgl_apr.server.hooks import hook_after

MANAGER = "sglang.srt.constrained.grammar_manager:GrammarManager"


def register_hooks() -> None:
    """Set the hooks, in the scheduler's process.

    Raises:
        LaunchError: SGLang's grammar manager is not as expected.
    """
    hook_after(f"{MANAGER}.process_req_with_grammar", ["req"], _after_process)
    hook_after(f"{MANAGER}.get_ready_grammar_requests", [], _after_compile)


def _after_process(is_queued: bool, manager: Any, req: Any) -> None:
    """Resume a request whose grammar was compiled before."""
    if not is_queued:
        resume(req)


def _after_compile(ready: list[Any], manager: Any) -> None:
    """Resume requests whose grammars have just been compiled."""
    for req in ready:
        resume(req)


def resume(req: Any) -> None:
    """Give the matcher of a request the ids that it continues after. A request that it refuses is aborted."""
    params = req.sampling_params.custom_params
    count = params.get(RESUME_PARAM) if isinstance(params, dict) else None
    if count is None or req.grammar is None or req.finished() or req.to_finish is not None:
        return
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= len(req.origin_input_ids):
        req.set_finish_with_abort(
            f"{RESUME_PARAM}={count!r}, expected a number from 1 to {len(req.origin_input_ids)}, the prompt's tokens"
        )
        return
    try:
        for token in req.origin_input_ids[-count:]:
            req.grammar.accept_token(token)
    except Exception as error:  # an exception here would end the scheduler
        req.set_finish_with_abort(f"the grammar cannot resume after the last {count} tokens: {error}")
