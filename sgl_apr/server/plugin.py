"""What SGLang loads into each of its processes: the CPU platform and the attention backend; light to import.

SGLang only logs an exception of a plugin and goes on without it. So a process that `launch` started (it and
its children have the variable `LAUNCHED`) ends at once when something is not where it should be. In any
other process that imports sglang the failure is logged, and nothing else happens.
"""

from __future__ import annotations

import functools
import os
import secrets
from importlib import import_module
from typing import Any

from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.errors import LaunchError
from sgl_apr.server.constants import CACHE_SECRET_ENV, CPU_ATTENTION_BACKEND, KV_JOIN_ENV, LAUNCHED_ENV
from sgl_apr.server.hooks import check_version, has_accelerator, hook_after, hook_around, require_sglang

STOCK_CACHE_BACKEND = "stock"  # SGLang's own radix cache

_TOKENIZED = ("obj", "input_text", "input_ids", "input_embeds", "mm_inputs")
_DECODE = ("query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")
_EXTEND = (*_DECODE, "extend_prefix_lens", "extend_seq_lens", "encoder_lens")
_OPTIONS = ("scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size")

activated = False  # whether `activate` went through in this process


def platform() -> str | None:
    """Entry point: the platform class where there is nothing but a CPU, else None."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or has_accelerator():
        return None
    return "sgl_apr.server.cpu.platform.TorchCpuPlatform"


def activate() -> None:
    """Entry point: registers what this package adds to SGLang."""
    global activated
    try:
        check_version()
        if platform() is not None:
            _register_attention()
            _register_padded_matmul()
        _register_cache()
        if os.environ.get(LAUNCHED_ENV):
            _register_mask_slices()
    except LaunchError as error:
        if os.environ.get(LAUNCHED_ENV):
            raise SystemExit(f"sgl-apr: error: {error}") from None
        raise
    activated = True


def _register_mask_slices() -> None:
    """Have llguidance prepare for free text as our grammars have it; SGLang's module takes the function from there."""
    from sgl_apr.formats.masks.llguidance import LLGUIDANCE_SLICES

    stock = require_sglang("llguidance.hf:from_tokenizer", ["hf_tokenizer", "n_vocab", "eos_token", "slices"])
    import_module("llguidance.hf").from_tokenizer = functools.partial(stock, slices=list(LLGUIDANCE_SLICES))  # type: ignore[attr-defined]


def _register_cache() -> None:
    """The radix cache that joins branches, the positions that go with it, and the door before both."""
    hook_after(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
        _TOKENIZED,
        _validate_layout,
    )
    register = require_sglang(
        "sglang.srt.mem_cache.registry:register_radix_cache_backend", ["name", "factory"]
    )
    register(
        STOCK_CACHE_BACKEND,
        require_sglang("sglang.srt.mem_cache.registry:default_radix_cache_factory", ["ctx"]),
    )
    if os.environ.get(KV_JOIN_ENV) == "0":
        return
    os.environ.setdefault(CACHE_SECRET_ENV, secrets.token_hex(32))
    register(RADIX_CACHE_BACKEND, _make_cache)
    hook_after(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new", ["batch"], _shift_positions
    )


def _make_cache(context: Any) -> Any:
    cache = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
    for method, parameters in {
        "match_prefix": ["params"],
        "_match_tree": ["params"],
        "insert": ["params"],
        "prefix_device_indices": ["req"],
        "path_device_indices": ["node"],
        "lock": ["node_id", "skip_lock_components"],
        "unlock": ["lock"],
        "checkpoint": ["req", "up_to"],
    }.items():
        require_sglang(f"{cache}.{method}", parameters)
    from sgl_apr.server.kv_join import radix_cache

    return radix_cache.make_cache(context)


def _shift_positions(batch: Any, *arguments: Any, **options: Any) -> None:
    from sgl_apr.server.kv_join.radix_cache import shift_positions

    shift_positions(batch, *arguments, **options)


def _validate_layout(request: Any, manager: Any, obj: Any, *arguments: Any, **options: Any) -> None:
    """In the HTTP process: what SGLang answers a ValueError with is a 400."""
    from sglang.srt.runtime_context import get_memory

    from sgl_apr.server.kv_join.validation import validate_request
    from sgl_apr.trajectory.join_layout import LayoutError

    try:
        validate_request(obj, request, joins=get_memory().radix_cache_backend == RADIX_CACHE_BACKEND)
    except LayoutError as error:
        raise ValueError(f"KV join: {error}") from None


def _register_attention() -> None:
    register = require_sglang(
        "sglang.srt.layers.attention.attention_registry:register_attention_backend", ["name"]
    )
    require_sglang("sglang.srt.server_args:add_attention_backend_choices")([CPU_ATTENTION_BACKEND])
    register(CPU_ATTENTION_BACKEND)(_make_attention)


def _register_padded_matmul() -> None:
    from sgl_apr.server.cpu import padded_matmul

    linear = "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply"
    hook_around(linear, ["layer", "x", "bias"], padded_matmul.padded_linear)
    head = "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head"
    hook_around(head, ["hidden_states", "lm_head", "embedding_bias", "out"], padded_matmul.padded_lm_head)


def _make_attention(runner: Any) -> Any:
    # Looked at here and not in `activate`: only the scheduler needs these modules.
    native = "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend"
    require_sglang(f"{native}.init_forward_metadata", ["forward_batch"])
    require_sglang(f"{native}._run_sdpa_forward_decode", [*_DECODE, "encoder_lens", *_OPTIONS])
    require_sglang(f"{native}._run_sdpa_forward_extend", [*_EXTEND, *_OPTIONS])
    from sgl_apr.server.cpu.attention import AprCpuAttention

    return AprCpuAttention(runner)
