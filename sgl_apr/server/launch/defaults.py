"""Command lines for SGLang: what is added on this hardware, and keyword arguments as flags; pure.

SGLang's parser takes the last of several values of a flag, under whatever alias it is given. So defaults
come first, and every flag that a user gives wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_POOL_TOKENS = (
    32768  # KV slots on a CPU, if memory allows: the pool is allocated (and filled) at launch
)

# Threads that wait for each other spin for microseconds instead of milliseconds. On a free machine that costs
# nothing; where anything else runs, a spinning thread keeps the one it waits for from running (60x slower).
SERVER_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}

# lpm: a branch whose prefix is cached goes first, and of several with the same uncached prefix one prefills.
COMMON_FLAGS = {"--grammar-backend": "llguidance", "--schedule-policy": "lpm"}
GPU_FLAGS = {"--attention-backend": "flashinfer", "--page-size": "1"}
FLASHINFER_HEAD_DIM_MULTIPLE = (
    64  # flashinfer's prefill has heads of a multiple of so many dimensions; Triton's has any
)
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": "apr_cpu",
    "--sampling-backend": "pytorch",
    "--dtype": "float32",
    "--cuda-graph-backend-decode": "disabled",
    "--cuda-graph-backend-prefill": "disabled",
    "--sleep-on-idle": None,  # else an idle scheduler eats a core
}


def default_flags(
    *, accelerator: bool, max_tokens: int = DEFAULT_POOL_TOKENS, config: Mapping[str, Any] | None = None
) -> list[str]:
    """The flags to put before the user's. `config` is the model's config.json, where it is known."""
    flags = COMMON_FLAGS | (GPU_FLAGS if accelerator else CPU_FLAGS | {"--max-total-tokens": str(max_tokens)})
    if (
        accelerator
        and (head_dim(config or {}) or FLASHINFER_HEAD_DIM_MULTIPLE) % FLASHINFER_HEAD_DIM_MULTIPLE
    ):
        flags |= {"--attention-backend": "triton"}
    return [word for pair in flags.items() for word in pair if word is not None]


def pool_tokens(config: Mapping[str, Any], available: int) -> int:
    """How many float32 KV slots to have on a CPU: `TOKENS`, or what fits into half of `available` bytes.

    `config` is the model's config.json. A model that does not say its sizes there gets `TOKENS`.
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
    """Of a model by its config.json; None where that does not say it."""
    config = config.get("text_config") or config
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    return config.get("head_dim") or (hidden // heads if hidden and heads else None)


def as_flags(options: Mapping[str, object]) -> list[str]:
    """Keyword arguments as flags: `context_length=4096` is `--context-length 4096`, `x=True` is `--x`.

    A list gives several values; `None` and `False` leave the flag out.
    """
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words
