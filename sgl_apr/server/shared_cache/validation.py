"""Validates groups in the HTTP process, and gives them their names.

A group is one batch: one `/generate` request with a prompt for each worker. Its name is made here, at random, because
whoever knows the name of a group could read the cache of another client.
"""

from __future__ import annotations

import secrets
from functools import lru_cache
from typing import Any

from sgl_apr.engine.sglang_names import GROUP_PARAM
from sgl_apr.server.kv_join.validation import UNSUPPORTED_FIELDS
from sgl_apr.server.shared_cache.compatibility import group_incompatibility
from sgl_apr.server.shared_cache.parameters import (
    GroupError,
    GroupParams,
    check_group,
    has_group,
    parse_group,
)
from sgl_apr.trajectory.join_layout import LAYOUT_PARAM

# Fields of a batch that have to be the same for all of its workers, because they share keys and values.
COMMON_FIELDS = ("lora_path", "extra_key", "cache_salt", "priority")


def name_group(_: Any, request: Any) -> None:
    """Name the group of a batch, after SGLang has normalized its arguments.

    Raises:
        ValueError: The batch is not one valid group. SGLang answers with status 400.
    """
    sampling = request.sampling_params
    items = sampling if isinstance(sampling, list) else [sampling]
    custom = [item.get("custom_params") if isinstance(item, dict) else None for item in items]
    if not any(map(has_group, custom)):
        return
    try:
        _name_group(request, items, custom)
    except GroupError as error:
        raise ValueError(f"worker group: {error}") from None


def _name_group(request: Any, items: list[Any], custom: list[Any]) -> None:
    if request.is_single:
        raise GroupError("expected a batch with one prompt for each worker, found a single request")
    if getattr(request, "parallel_sample_num", 1) != 1:
        raise GroupError(f"n is {request.parallel_sample_num}, expected 1")
    if request.input_ids is None or request.text is not None:
        raise GroupError("the prompt is counted in token ids: expected input_ids instead of text")
    if not all(map(has_group, custom)):
        raise GroupError("only some requests of the batch name a group, expected all of them")
    if any("name" in params[GROUP_PARAM] for params in custom if isinstance(params[GROUP_PARAM], dict)):
        raise GroupError("a group has a name already: the server makes it")
    workers = [parse_group(params) for params in custom]
    check_group(workers)
    _check_prompts(workers[0], request.input_ids)
    for name in COMMON_FIELDS:
        value = getattr(request, name, None)
        if isinstance(value, list) and any(other != value[0] for other in value):
            raise GroupError(f"{name} differs between workers, expected the same for all")
    name = secrets.token_hex(16)
    for item, params in zip(items, custom, strict=True):
        item["custom_params"] = {**params, GROUP_PARAM: {**params[GROUP_PARAM], "name": name}}


def _check_prompts(params: GroupParams, prompts: list[list[int]]) -> None:
    prompt = prompts[0][: params.prompt_tokens]
    for number, ids in enumerate(prompts):
        if len(ids) <= params.prompt_tokens:
            raise GroupError(
                f"worker {number} has {len(ids)} tokens, expected a header after the {params.prompt_tokens} of the prompt"
            )
        if ids[: params.prompt_tokens] != prompt:
            raise GroupError(
                f"worker {number} begins with another prompt than worker 0, expected the same {params.prompt_tokens} tokens"
            )


def validate_worker(request: Any, manager: Any) -> None:
    """Validate one tokenized worker against the server.

    Args:
        request: The tokenized request.
        manager: SGLang's tokenizer manager.

    Raises:
        GroupError: The server cannot run it.
    """
    params = request.sampling_params.custom_params
    if not has_group(params):
        return
    worker = parse_group(params)
    if not worker.name:
        raise GroupError("expected a batch with one prompt for each worker, found a single request")
    if LAYOUT_PARAM in params:
        raise GroupError("a worker cannot have a layout of branches as well")
    if what := _incompatibility(manager, worker.kind):
        raise GroupError(f"this server does not run groups: they do not work with {what}")
    if manager.elastic_worker_count > 1 and request.routed_dp_rank is None:
        raise GroupError(
            f"this server has {manager.elastic_worker_count} data-parallel ranks: expected routed_dp_rank, so that all workers "
            "get to one of them"
        )
    if worker.step_end is not None and manager.tokenizer is None:
        raise GroupError("step_end needs a tokenizer, but this server runs with --skip-tokenizer-init")
    for name, what in UNSUPPORTED_FIELDS.items():
        if getattr(request, name, None) is not None:
            raise GroupError(f"a worker cannot have {what}")
    if (request.sampling_params.beam_width or 1) > 1:
        raise GroupError("a worker cannot be decoded with beam search")
    if request.return_logprob and 0 <= request.logprob_start_len < len(request.input_ids):
        raise GroupError("a worker has no log-probabilities of its input")
    _check_size(worker, request, manager)


def _check_size(worker: GroupParams, request: Any, manager: Any) -> None:
    """Check the size of a worker. The same bounds for each worker bound the group."""
    new = request.sampling_params.max_new_tokens
    if not new or new < 1:
        raise GroupError(f"max_new_tokens is {new}, expected at least 1")
    header = len(request.input_ids) - worker.prompt_tokens
    # One more for the token that SGLang samples while it reads the last one.
    own = header + new + 1
    context = manager.model_config.context_len
    if worker.kind == "group_think":
        if own > worker.position_range:
            raise GroupError(
                f"worker {worker.worker} may have {own} tokens, expected at most its position_range of {worker.position_range}"
            )
        total = worker.prompt_tokens + worker.workers * worker.position_range
    else:
        total = worker.prompt_tokens + worker.workers * own
    if total > context:
        raise GroupError(
            f"the prompt and the tokens of {worker.workers} workers may be {total} tokens, expected at most the context of {context}"
        )
    chunk = manager.server_args.chunked_prefill_size
    if chunk is not None and 0 < chunk < worker.workers * header:
        raise GroupError(
            f"headers of {header} tokens for {worker.workers} workers do not fit into one chunk of {chunk} tokens"
        )


@lru_cache(maxsize=4)
def _incompatibility(manager: Any, kind: str) -> str | None:
    from sglang.srt.arg_groups.overrides import resolving_view

    return group_incompatibility(resolving_view(manager.server_args), manager.model_config, kind)
