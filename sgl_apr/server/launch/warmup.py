"""The first requests to a server, which are sent before it is reported as ready."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from sgl_apr.engine.http_client import check_exists, post_json
from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.errors import EngineError, LaunchError
from sgl_apr.server.constants import QUICK_WARMUP_ENV
from sgl_apr.server.hooks import is_enabled, require_sglang
from sgl_apr.server.kv_join.probe import make_client
from sgl_apr.server.kv_join.selfcheck import PROBE_TOKEN_IDS, assert_joins_correct

# By grammar backend. The grammars are small, but the first one of a process may compile a torch kernel.
WARMUP_GRAMMARS = {"llguidance": 'start: "ok" /[a-z]{1,4}/', "xgrammar": 'root ::= "ok" [a-z]{1,4}'}
WARMUP_TIMEOUT_S = 600.0  # seconds for the warm-up request
POLL_INTERVAL_S, POLL_TIMEOUT_S = 0.05, 5.0
HTTP_SERVER = "sglang.srt.entrypoints.http_server"

logger = logging.getLogger(__name__)


def warm_up_sglang(args: Any) -> bool:
    """Send SGLang's warm-up request as soon as the server listens.

    SGLang's own function waits for a second first. It is called for all that is no plain text generation, and if the
    request fails, so that it reports the reason.

    Args:
        args: SGLang's `ServerArgs`.

    Returns:
        Whether the server works.
    """
    stock = require_sglang(f"{HTTP_SERVER}:_execute_server_warmup", ["server_args"])
    if not is_enabled(QUICK_WARMUP_ENV) or "SGLANG_WARMUP_TIMEOUT" in os.environ:
        return bool(stock(args))
    try:
        state = require_sglang(f"{HTTP_SERVER}:_global_state")
        up = require_sglang(f"{HTTP_SERVER}:ServerStatus.Up")
        plain = _generates_text(args)
    except (LaunchError, AttributeError) as error:
        logger.warning("SGLang's warm-up request is sent a second later: %s", error)
        return bool(stock(args))
    if not plain:
        return bool(stock(args))
    body = {
        "text": "The capital city of France is",
        "sampling_params": {"temperature": 0, "max_new_tokens": 8},
    }
    try:
        _generate(args.url(), body, args.api_key)
    except LaunchError as error:
        logger.warning("%s", error)
        return bool(stock(args))
    state.tokenizer_manager.server_status = up
    return True


def _generates_text(args: Any) -> bool:
    """Return whether SGLang's warm-up request is one request for text."""
    view = require_sglang("sglang.srt.arg_groups.overrides:resolving_view")(args)
    model = require_sglang("sglang.srt.arg_groups.overrides:model_config_of")(args)
    special = (
        view.skip_tokenizer_init or view.debug_tensor_dump_input_file or view.ssl_certfile
        or model.is_image_understandable_model
    )  # fmt: skip
    return view.disaggregation_mode == "null" and view.dp_size == 1 and model.is_generation and not special


def warm_up_grammars(args: Any) -> None:
    """Send constrained requests, because SGLang's own warm-up sends none.

    Torch's mask kernel, which our own replaces on a CPU, is compiled for one row, and again for other numbers of rows.

    Args:
        args: SGLang's `ServerArgs`.

    Raises:
        LaunchError: A request failed.
    """
    if args.grammar_backend not in WARMUP_GRAMMARS or args.skip_tokenizer_init:
        return
    sampling = {"max_new_tokens": 4, "ebnf": WARMUP_GRAMMARS[args.grammar_backend]}
    for texts in (["a"], ["a", "b"], ["a", "b", "c"]):
        try:
            _generate(args.url(), {"text": texts, "sampling_params": sampling}, args.api_key)
        except LaunchError as error:
            raise LaunchError(f"constrained decoding does not work with this model: {error}") from error


def check_joins(args: Any) -> None:
    """Check the joins of a server whose cache joins, on each of its data-parallel ranks.

    `--skip-server-warmup` does not skip this: a server that joins wrongly must not answer.

    Args:
        args: SGLang's `ServerArgs`.

    Raises:
        LaunchError: The joins do not match the model, or the server does not answer.
    """
    view = require_sglang("sglang.srt.arg_groups.overrides:resolving_view")(args)
    if view.radix_cache_backend != RADIX_CACHE_BACKEND:
        return
    _generate(
        args.url(),
        {"input_ids": [PROBE_TOKEN_IDS[0]], "sampling_params": {"max_new_tokens": 0}},
        args.api_key,
    )
    for rank in range(view.dp_size):
        assert_joins_correct(make_client(args.url(), args.api_key, rank))


def wait_until_listening(args: Any) -> None:
    """Block until this node of a server answers HTTP requests. All nodes but the first have no other route than health.

    Args:
        args: SGLang's `ServerArgs`.
    """
    while True:
        try:
            check_exists(f"{args.url()}/health", timeout=POLL_TIMEOUT_S)
            return
        except EngineError as error:
            if error.status is not None:
                return
        time.sleep(POLL_INTERVAL_S)


def _generate(url: str, body: Mapping[str, Any], api_key: str | None) -> None:
    """Send a request once the server listens.

    Raises:
        LaunchError: The server answers with an error, or does not listen.
    """
    deadline = time.monotonic() + WARMUP_TIMEOUT_S
    while True:
        try:
            post_json(f"{url}/generate", body, api_key=api_key, timeout=WARMUP_TIMEOUT_S)
            return
        except EngineError as error:
            if error.status is not None:
                raise LaunchError(str(error)) from error
            if time.monotonic() > deadline:
                raise LaunchError(f"the server does not answer: {error}") from error
            time.sleep(POLL_INTERVAL_S)
