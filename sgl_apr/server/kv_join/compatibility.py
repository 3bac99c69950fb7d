"""Decides from SGLang's arguments and the model's configuration whether a server can join in its KV cache.

It can in the modes where every rank has all keys and values of a prompt, in one slot for each token, attends to them
by slot or by page, and takes positions from `ForwardBatch.init_new`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sgl_apr.server.constants import CPU_ATTENTION_BACKEND, KV_JOIN_ENV
from sgl_apr.server.hooks import is_enabled

# The last two, which are SGLang's choice on Blackwell, only have pages of several tokens.
SUPPORTED_ATTENTION_BACKENDS = frozenset(
    {CPU_ATTENTION_BACKEND, "torch_native", "flashinfer", "triton", "fa3", "fa4", "trtllm_mha", "trtllm_mla"}
)


def incompatibility(args: Any, model: Any) -> str | None:
    """Return what keeps a server from joining, or None if it can join.

    Args:
        args: Resolved server arguments.
        model: SGLang's `ModelConfig`.

    Returns:
        Text that completes the phrase "does not work with".
    """
    return next((what for what, present in _obstacles(args, model) if present), None)


def _obstacles(args: Any, model: Any) -> Iterator[tuple[str, object]]:
    text = model.hf_text_config
    layers = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    yield "a model that does not generate", not model.is_generation
    yield "an encoder-decoder model", model.is_encoder_decoder
    yield "a model with recurrent state", _has_recurrent_state(model)
    yield "a model whose attention is sparse", is_sparse(model)
    yield (
        "a model with a sliding window",
        (model.is_hybrid_swa or model.attention_chunk_size or layers - {"full_attention", "attention"}),
    )
    yield "n-gram embeddings", model.use_ngram_embedding or model.use_engram

    yield f"--disaggregation-mode {args.disaggregation_mode}", args.disaggregation_mode != "null"
    yield "--enable-pdmux", args.enable_pdmux
    yield "--disable-radix-cache", args.disable_radix_cache
    yield "--speculative-algorithm", args.speculative_algorithm
    yield "--enable-hierarchical-cache", args.enable_hierarchical_cache
    yield "--enable-lmcache", args.enable_lmcache
    yield "--enable-flexkv", args.enable_flexkv
    yield "--enable-unified-cache-external-linker", args.enable_unified_cache_external_linker
    yield "--enable-hisparse", args.enable_hisparse
    yield "--enable-unified-memory", args.enable_unified_memory
    yield "--enable-session-radix-cache", args.enable_session_radix_cache
    yield f"--attn-dp-size {args.attn_dp_size}, which is data-parallel attention", args.attn_dp_size > 1
    yield f"--dcp-size {args.dcp_size}", args.dcp_size > 1
    yield f"--attn-cp-size {args.attn_cp_size}", args.attn_cp_size > 1
    yield "--enable-kv-cache-sharding", args.enable_kv_cache_sharding
    yield "--enable-two-batch-overlap", args.enable_two_batch_overlap
    yield "--dllm-algorithm", args.dllm_algorithm
    yield "--enable-nvidia-megakernel", args.enable_nvidia_megakernel
    yield "--kv-canary, which expects positions to equal places", args.kv_canary != "none"
    yield "SGLANG_RADIX_FORCE_MISS", _cache_hits_disabled()
    yield f"{KV_JOIN_ENV}=0", not is_enabled(KV_JOIN_ENV)
    for backend in attention_backends(args):
        yield f"--attention-backend {backend}", backend not in SUPPORTED_ATTENTION_BACKENDS


def is_sparse(model: Any) -> bool:
    """Return whether a model attends to a part of its context that it chooses, as DeepSeek-V3.2 does."""
    return any(hasattr(model.hf_config, name) for name in ("dual_chunk_attention_config", "index_topk"))


def _has_recurrent_state(model: Any) -> bool:
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    return bool(uses_ssm_state(model))


def attention_backends(args: Any) -> tuple[str, str]:
    """Return the attention backends of (prefill, decode)."""
    from sglang.srt.arg_groups.overrides import attention_backends_of

    prefill, decode = attention_backends_of(args)
    return prefill, decode


def _cache_hits_disabled() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_RADIX_FORCE_MISS.get())
