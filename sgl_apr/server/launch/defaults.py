"""Default flags for SGLang's server by hardware, and keyword arguments as flags.

SGLang's parser takes the last of several values of a flag, under any alias. The defaults come first, so every flag
that the user gives wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_apr.server.constants import CPU_ATTENTION_BACKEND

# KV slots on a CPU, if memory allows: the pool is allocated (and filled) at launch.
DEFAULT_POOL_TOKENS = 32768
FLOAT32_BYTES = 4

# Threads that wait for each other spin for microseconds instead of milliseconds. On an idle machine that costs
# nothing. On a busy one, a spinning thread keeps the thread that it waits for from running (60x slower).
SERVER_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}

# lpm: a branch whose prefix is cached goes first, and only one of several with the same uncached prefix prefills it.
COMMON_FLAGS = {"--grammar-backend": "llguidance", "--schedule-policy": "lpm"}
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": CPU_ATTENTION_BACKEND,
    "--sampling-backend": "pytorch",
    "--dtype": "float32",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    "--sleep-on-idle": None,  # without it an idle scheduler uses a core
}


def default_flags(*, accelerator: bool, max_tokens: int = DEFAULT_POOL_TOKENS) -> list[str]:
    """Return the flags that go before the user's. `attention_backend` adds one on some GPUs.

    Args:
        accelerator: Whether the machine has a GPU or another accelerator.
        max_tokens: Size of the KV pool in tokens, on a CPU.
    """
    flags = COMMON_FLAGS | ({} if accelerator else CPU_FLAGS | {"--max-total-tokens": str(max_tokens)})
    return [argument for pair in flags.items() for argument in pair if argument is not None]


def pool_tokens(config: Mapping[str, Any], available: int) -> int:
    """Return the size of the float32 KV pool on a CPU, in tokens.

    Args:
        config: The model's config.json.
        available: Free memory in bytes. The pool takes half of it at most.

    Returns:
        At most `DEFAULT_POOL_TOKENS`, and exactly that if the configuration does not contain the model's sizes.
    """
    values = cached_values_per_token(config)
    if values is None:
        return DEFAULT_POOL_TOKENS
    return int(min(DEFAULT_POOL_TOKENS, max(1024, available // 2 // (FLOAT32_BYTES * values))))


def cached_values_per_token(config: Mapping[str, Any]) -> int | None:
    """Return how many numbers the KV cache has for each token, in all layers together.

    A model with multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434) caches one latent vector and one
    rotated key for all its heads, in place of a key and a value for each.

    Args:
        config: The model's config.json.

    Returns:
        The number, or None if the configuration does not contain the model's sizes.

    Examples:
        >>> cached_values_per_token({"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512})
        2048
        >>> cached_values_per_token({"num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
        1152
    """
    config = text_config(config)
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if not layers:
        return None
    if latent := config.get("kv_lora_rank"):
        return int(layers * (latent + (config.get("qk_rope_head_dim") or 0)))
    key = config.get("head_dim") or (heads and (config.get("hidden_size") or 0) // heads)
    if not key or not heads:
        return None
    value = config.get("v_head_dim") or key
    return int(layers * (config.get("num_key_value_heads") or heads) * (key + value))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model, as SGLang's `get_hf_text_config` does."""
    for name in ("thinker_config", "llm_config", "language_config", "text_config"):
        if isinstance(nested := config.get(name), Mapping) and nested:
            return text_config(nested)
    return config


def as_flags(options: Mapping[str, object]) -> list[str]:
    """Turn keyword arguments into flags.

    A list gives a flag several values. `None` and `False` leave the flag out.

    Examples:
        >>> as_flags({"context_length": 4096, "disable_radix_cache": True, "api_key": None})
        ['--context-length', '4096', '--disable-radix-cache']
    """
    arguments: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if isinstance(value, list | tuple):
            arguments += map(str, value)
        elif value is not True:
            arguments.append(str(value))
    return arguments
