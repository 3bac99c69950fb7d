"""SGLang's plugin entry points: the CPU platform, the attention backend, the radix cache and hooks.

SGLang loads the plugin into each of its processes, so this module is light to import. SGLang only logs an exception
of a plugin and continues without it. A process that `sgl_apr.server.launch` started (it and its children have the
variable `LAUNCHED_ENV`) therefore exits at once if SGLang is not as expected. In any other process that imports
sglang, the failure is logged and nothing else happens.

Each hook first checks the function that it is set on (`require_sglang`). The environment variables in `constants`
switch parts of the plugin off.
"""

from __future__ import annotations

import os
from typing import Any

from sgl_apr.engine.sglang_names import RADIX_CACHE_BACKEND
from sgl_apr.errors import LaunchError
from sgl_apr.server import grammar_resume
from sgl_apr.server.constants import (
    CPU_ATTENTION_BACKEND,
    GRAMMAR_LIMITS_ENV,
    KV_JOIN_ENV,
    LAUNCHED_ENV,
    MASK_KERNEL_ENV,
    MASK_SLICES_ENV,
    PADDED_MATMUL_ENV,
)
from sgl_apr.server.hooks import (
    check_version,
    has_accelerator,
    hook_after,
    hook_around,
    is_enabled,
    require_sglang,
)
from sgl_apr.server.kv_join.cache_secret import cache_secret, check_ranks_share_secret, require_shared_secret
from sgl_apr.server.launch import server_folder
from sgl_apr.server.security import abort, auth, grammar_cost, logprob_texts, redaction
from sgl_apr.server.shared_cache import registration as shared_cache

STOCK_CACHE_BACKEND = "stock"  # SGLang's own radix cache

_TOKENIZED = ("obj", "input_text", "input_ids", "input_embeds", "mm_inputs")
_DECODE = ("query", "output", "k_cache", "v_cache", "req_to_token", "req_pool_indices", "seq_lens")
_EXTEND = (*_DECODE, "extend_prefix_lens", "extend_seq_lens", "encoder_lens")
_OPTIONS = ("scaling", "enable_gqa", "causal", "is_cross_attn", "sliding_window_size")

activated = False  # whether `activate` has succeeded in this process


def platform() -> str | None:
    """Entry point: return the path of the platform class on a machine with only a CPU, else None."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or has_accelerator():
        return None
    return "sgl_apr.server.cpu.platform.TorchCpuPlatform"


def activate() -> None:
    """Entry point: register with SGLang what this package adds.

    Raises:
        LaunchError: SGLang is not the supported version, or a function that is hooked is not as expected.
        SystemExit: The same, in a process of a server that this package has launched.
    """
    global activated
    try:
        check_version()
        if platform() is not None:
            _register_attention()
            if is_enabled(PADDED_MATMUL_ENV):
                _register_padded_matmul()
            if os.environ.get(LAUNCHED_ENV) and is_enabled(MASK_KERNEL_ENV):
                _register_mask_kernel()
        _register_cache()
        for module in (redaction, abort, auth, logprob_texts, server_folder):
            module.register_hooks()
        if is_enabled(GRAMMAR_LIMITS_ENV):
            grammar_cost.register_hooks()
        grammar_resume.register_hooks()
        if os.environ.get(LAUNCHED_ENV) and is_enabled(MASK_SLICES_ENV):
            _register_mask_slices()
    except LaunchError as error:
        if os.environ.get(LAUNCHED_ENV):
            raise SystemExit(f"sgl-apr: error: {error}") from None
        raise
    activated = True


def _register_mask_slices() -> None:
    """Let llguidance prepare its token masks for free text, as the grammars of this package have it.

    `MASK_SLICES_ENV` switches this off. It changes the time that a mask takes, not the mask.
    """
    hook_after(
        "sglang.srt.constrained.llguidance_backend:_create_llguidance_tokenizer",
        ["tokenizer", "n_vocab", "eos_token"],
        _with_mask_slices,
    )
    require_sglang("llguidance:LLTokenizer.with_slices", ["slices"])


def _with_mask_slices(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
    from sgl_apr.formats.masks.llguidance import LLGUIDANCE_SLICES

    return tokenizer.with_slices(list(LLGUIDANCE_SLICES))


def _register_cache() -> None:
    """Register the radix cache that joins, the positions that it needs, and the validation of layouts.

    `KV_JOIN_ENV` switches the cache and the positions off. Layouts are validated all the same, so that a server
    without joins rejects them.
    """
    hook_after(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager._create_tokenized_object",
        _TOKENIZED,
        _validate_request,
    )
    register = require_sglang(
        "sglang.srt.mem_cache.registry:register_radix_cache_backend", ["name", "factory"]
    )
    stock_factory = require_sglang("sglang.srt.mem_cache.registry:default_radix_cache_factory", ["ctx"])
    register(STOCK_CACHE_BACKEND, stock_factory)
    if not is_enabled(KV_JOIN_ENV):
        return
    cache_secret()  # here, so that the processes that this one starts inherit it
    register(RADIX_CACHE_BACKEND, _make_cache)
    hook_after(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new", ["batch"], _shift_positions
    )
    hook_after(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
        ["batch", "model_runner"],
        _copy_pending,
    )
    shared_cache.register_hooks()
    hook_around(
        "sglang.srt.model_executor.model_runner:ModelRunner.sample",
        ["logits_output", "forward_batch"],
        _sample_unshifted,
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
        "init_load_back": ["params"],
        "load_back_is_cache_owned": [],
        "inc_host_lock_ref": ["node_id"],
        "dec_host_lock_ref": ["node_id", "params"],
    }.items():
        require_sglang(f"{cache}.{method}", parameters)
    require_shared_secret(context.server_args.nnodes)
    check_ranks_share_secret(context.tp_group)
    from sgl_apr.server.kv_join import radix_cache

    return radix_cache.make_cache(context)


def _shift_positions(forward_batch: Any, /, *arguments: Any, **options: Any) -> None:
    from sgl_apr.server.kv_join.positions import shift_positions

    shift_positions(forward_batch, *arguments, **options)


def _copy_pending(batch: Any, *arguments: Any, **options: Any) -> None:
    from sgl_apr.server.kv_join.slot_copy import copy_pending

    copy_pending(batch, *arguments, **options)


def _sample_unshifted(sample: Any, runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    from sgl_apr.server.kv_join.positions import sample_unshifted

    return sample_unshifted(sample, runner, logits_output, forward_batch)


def _validate_request(request: Any, manager: Any, obj: Any, *arguments: Any, **options: Any) -> None:
    """Validate a layout or a worker of a group in the HTTP process, where SGLang turns a ValueError into a response of status 400."""
    from sglang.srt.runtime_context import get_memory

    from sgl_apr.server.kv_join.validation import validate_request
    from sgl_apr.server.shared_cache.parameters import GroupError
    from sgl_apr.server.shared_cache.validation import validate_worker
    from sgl_apr.trajectory.join_layout import LayoutError

    try:
        joins = get_memory().radix_cache_backend == RADIX_CACHE_BACKEND
        validate_request(obj, request, joins, manager.elastic_worker_count)
        validate_worker(request, manager)
    except LayoutError as error:
        raise ValueError(f"KV join: {error}") from None
    except GroupError as error:
        raise ValueError(f"worker group: {error}") from None


def _register_attention() -> None:
    register = require_sglang(
        "sglang.srt.layers.attention.attention_registry:register_attention_backend", ["name"]
    )
    require_sglang("sglang.srt.server_args:add_attention_backend_choices")([CPU_ATTENTION_BACKEND])
    register(CPU_ATTENTION_BACKEND)(_make_attention)


def _register_padded_matmul() -> None:
    """Multiply two or three rows as four on a CPU. `PADDED_MATMUL_ENV` switches this off."""
    from sgl_apr.server.cpu import padded_matmul

    linear = "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply"
    hook_around(linear, ["layer", "x", "bias"], padded_matmul.padded_linear)
    head = "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head"
    hook_around(head, ["hidden_states", "lm_head", "embedding_bias", "out"], padded_matmul.padded_lm_head)


def _register_mask_kernel() -> None:
    """Apply token masks with a kernel that is compiled once. `MASK_KERNEL_ENV` switches this off."""
    from sgl_apr.server.cpu import mask_kernel

    mask_kernel.register_hooks()


def _make_attention(runner: Any) -> Any:
    # These checks are here and not in `activate`, because only the scheduler imports the modules.
    native = "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend"
    require_sglang(f"{native}.init_forward_metadata", ["forward_batch"])
    require_sglang(f"{native}._run_sdpa_forward_decode", [*_DECODE, "encoder_lens", *_OPTIONS])
    require_sglang(f"{native}._run_sdpa_forward_extend", [*_EXTEND, *_OPTIONS])
    from sgl_apr.server.cpu.attention import AprCpuAttention

    return AprCpuAttention(runner)
