"""Decides from SGLang's arguments and the model's configuration whether a server can run groups of workers.

It can in the modes where it joins in its KV cache, where in addition all running requests decode in the same step,
each token has a slot of its own, and nothing computes positions anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.server.constants import CPU_ATTENTION_BACKEND
from sgl_apr.server.kv_join.compatibility import attention_backends, incompatibility

# Decode backends that can turn the queries of Hogwild! for each block. Group Think works with all that join.
HOGWILD_BACKENDS = frozenset({CPU_ATTENTION_BACKEND, "flashinfer"})


def group_incompatibility(args: Any, model: Any, kind: str) -> str | None:
    """Return what keeps a server from running groups of a kind, or None if it can.

    Args:
        args: Resolved server arguments.
        model: SGLang's `ModelConfig`.
        kind: "group_think" or "hogwild".

    Returns:
        Text that completes the phrase "does not work with".
    """
    what = incompatibility(args, model)
    if what is not None:
        return what
    return next((what for what, present in _obstacles(args, model, kind) if present), None)


def _obstacles(args: Any, model: Any, kind: str) -> Iterator[tuple[str, object]]:
    cache = args.radix_cache_backend
    yield f"--radix-cache-backend {cache}", cache != RADIX_CACHE_BACKEND
    yield f"--page-size {args.page_size}", args.page_size != 1
    yield "--enable-mixed-chunk", args.enable_mixed_chunk
    yield f"--pp-size {args.pp_size}", args.pp_size > 1
    yield "M-RoPE positions", model.model_is_mrope
    if kind == "hogwild":
        _, decode = attention_backends(args)
        yield f"--attention-backend {decode} (Hogwild!)", decode not in HOGWILD_BACKENDS
