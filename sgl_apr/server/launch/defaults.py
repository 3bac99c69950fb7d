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

# Threads that wait for each other spin for microseconds instead of milliseconds. On an idle machine that costs
# nothing. On a busy one, a spinning thread keeps the thread that it waits for from running (60x slower).
SERVER_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}

# lpm: a branch whose prefix is cached goes first, and only one of several with the same uncached prefix prefills it.
COMMON_FLAGS = {"--grammar-backend": "llguidance", "--schedule-policy": "lpm"}
GPU_FLAGS = {"--attention-backend": "flashinfer", "--page-size": "1"}
# The prefill of flashinfer supports multiples of this head dimension only. That of Triton supports any.
FLASHINFER_HEAD_DIM_MULTIPLE = 64
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": CPU_ATTENTION_BACKEND,
    "--sampling-backend": "pytorch",
    "--dtype": "float32",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    "--sleep-on-idle": None,  # without it an idle scheduler uses a core
}


def default_flags(
    *, accelerator: bool, max_tokens: int = DEFAULT_POOL_TOKENS, config: Mapping[str, Any] | None = None
) -> list[str]:
    """Return the flags that go before the user's.

    Args:
        accelerator: Whether the machine has a GPU or another accelerator.
        max_tokens: Size of the KV pool in tokens, on a CPU.
        config: The model's config.json, if it is known.
    """
    flags = COMMON_FLAGS | (GPU_FLAGS if accelerator else CPU_FLAGS | {"--max-total-tokens": str(max_tokens)})
    if (
        accelerator
        and (head_dim(config or {}) or FLASHINFER_HEAD_DIM_MULTIPLE) % FLASHINFER_HEAD_DIM_MULTIPLE
    ):
        flags |= {"--attention-backend": "triton"}
    return [argument for pair in flags.items() for argument in pair if argument is not None]


def pool_tokens(config: Mapping[str, Any], available: int) -> int:
    """Return the size of the float32 KV pool on a CPU, in tokens.

    Args:
        config: The model's config.json.
        available: Free memory in bytes. The pool takes half of it at most.

    Returns:
        At most `DEFAULT_POOL_TOKENS`, and exactly that if the configuration does not contain the model's sizes.
    """
    dim, config = head_dim(config), config.get("text_config") or config
    try:
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        per_token = 2 * 4 * config["num_hidden_layers"] * heads * (dim or 0)
    except KeyError:
        return DEFAULT_POOL_TOKENS
    if not per_token:
        return DEFAULT_POOL_TOKENS
    return int(min(DEFAULT_POOL_TOKENS, max(1024, available // 2 // per_token)))


def head_dim(config: Mapping[str, Any]) -> int | None:
    """Return the dimension of a model's attention heads from its config.json, or None if it is not there."""
    config = config.get("text_config") or config
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    return config.get("head_dim") or (hidden // heads if hidden and heads else None)


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
