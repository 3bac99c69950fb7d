"""Turns queries and cached keys to other positions, as the model's rotary embedding would have placed them.

A rotary embedding (RoPE, https://arxiv.org/abs/2104.09864) rotates pairs of numbers of each head by angles: the position
times a frequency for each pair. So turning a query or a key by n positions rotates it by n times the frequencies,
whatever its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgl_apr.server.hooks import require_sglang

# Modules of SGLang whose attention does more to queries than to rotate them.
_OTHER_ATTENTION = {
    "beam": "scales queries by position",
    "hunyuan": "normalizes queries after it has rotated them",
    "ministral3": "scales queries by position",
    "xllm": "reorders the numbers of a head before it rotates them",
}
_TABLE_TOLERANCE = 0.02  # of cosines and sines, which a table may hold in bfloat16


@dataclass(frozen=True, slots=True)
class Turns:
    """Rotations of the rows of a tensor.

    Attributes:
        cos: [rows, 1, rotary_dim] or [1, 1, rotary_dim], float32, of the angle of each number.
        sin: The same shape. Negative for the first number of a pair, because x' = x cos - y sin, y' = y cos + x sin.
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding of a model, as a rotation by a number of positions.

    Attributes:
        frequencies: [rotary_dim / 2], radians per position, float64 on the CPU.
        head_dim: Numbers of a head. The first `2 * len(frequencies)` of them are rotated.
        is_neox_style: Whether the pairs are (i, i + rotary_dim / 2) instead of (2 i, 2 i + 1).
    """

    frequencies: torch.Tensor
    head_dim: int
    is_neox_style: bool

    @classmethod
    def from_model(cls, model: torch.nn.Module) -> Rotation:
        """Find the rotary embedding of a model of SGLang.

        Raises:
            ValueError: Queries of this model cannot be turned. The text says why: it completes "does not work with".
        """
        layers = list(_attention_layers(model))
        if not any(getattr(module, "rotary_emb", None) is not None for _, module, _ in layers):
            raise ValueError("a model without a rotary embedding")
        rotations: list[Rotation] = []
        for name, module, attention in layers:
            kind = type(module).__module__.rpartition(".")[2]
            if kind in _OTHER_ATTENTION:
                raise ValueError(f"a model that {_OTHER_ATTENTION[kind]} ({name})")
            if attention.sliding_window_size > -1 or attention.is_cross_attention:
                raise ValueError(f"a model with a sliding window or cross attention ({name})")
            rotary = getattr(module, "rotary_emb", None)
            if rotary is None:
                raise ValueError(f"a model with layers without a rotary embedding ({name})")
            rotations.append(cls.from_rotary_embedding(rotary))
            if rotations[-1].head_dim != attention.head_dim:
                raise ValueError(f"a rotary embedding that is not for a complete head ({name})")
            if not rotations[-1].equals(rotations[0]):
                raise ValueError(f"a model with different rotary embeddings ({name})")
        return rotations[0]

    @classmethod
    def from_rotary_embedding(cls, rotary: Any) -> Rotation:
        """Read SGLang's rotary embedding.

        Raises:
            ValueError: It is not a rotation by a number of positions. The text completes "does not work with".
        """
        frequencies = _frequencies(rotary)
        # A table may have a scale too (YaRN's mscale). It is a factor of keys and queries and not part of a turn.
        row = rotary.cos_sin_cache[1].to("cpu", torch.float64).unflatten(0, (2, -1))
        row = row / row.square().sum(0).sqrt()
        expected = torch.stack([frequencies.cos(), frequencies.sin()])
        if row.shape != expected.shape or float((row - expected).abs().max()) > _TABLE_TOLERANCE:
            raise ValueError(f"a {type(rotary).__name__} with another table of angles")
        return cls(frequencies, rotary.head_size, rotary.is_neox_style)

    def equals(self, other: Rotation) -> bool:
        """Return whether another rotation is the same."""
        same = (self.head_dim, self.is_neox_style) == (other.head_dim, other.is_neox_style)
        return same and torch.equal(self.frequencies, other.frequencies)

    def turns(self, positions: Sequence[int], device: torch.device) -> Turns:
        """Prepare turns by numbers of positions, which may be negative, without waiting for the device."""
        from sglang.srt.utils.common import async_h2d_stack

        # In float64, because in float32 a large angle would be known less exactly than its cosine has to be.
        angles = torch.tensor(positions, dtype=torch.float64)[:, None, None] * self.frequencies
        cos, sin = self._join(angles.cos(), angles.cos()), self._join(-angles.sin(), angles.sin())
        return Turns(*async_h2d_stack([cos.float(), sin.float()], device=device))

    def turn_queries(self, query: torch.Tensor, turns: Turns) -> torch.Tensor:
        """Return the queries at other positions.

        Args:
            query: [rows, heads, dim], already rotated for the positions that they have.
            turns: The turn of each row, or one for all rows.

        Returns:
            [rows, heads, dim], in the type of `query`. The rotation is computed in float32.
        """
        size = 2 * len(self.frequencies)
        rotated = query[..., :size].float()
        left, right = rotated.chunk(2, -1) if self.is_neox_style else (rotated[..., ::2], rotated[..., 1::2])
        turned = torch.addcmul(rotated * turns.cos, self._join(right, left), turns.sin).to(query.dtype)
        return turned if size == query.shape[-1] else torch.cat([turned, query[..., size:]], -1)

    def _join(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return [..., rotary_dim] of the first and the second numbers of all pairs, each [..., rotary_dim / 2]."""
        return (
            torch.cat([left, right], -1) if self.is_neox_style else torch.stack([left, right], -1).flatten(-2)
        )

    def turn_cached_keys(self, kv_pool: Any, slots: torch.Tensor, by: int) -> None:
        """Turn the keys of some slots in every layer, in place, without waiting for the device.

        Args:
            kv_pool: SGLang's pool of keys and values.
            slots: [n], on the pool's device, without repetitions.
            by: By how many positions.

        Raises:
            ValueError: Keys of this pool cannot be turned, as `pool_obstacle` says.
        """
        if obstacle := pool_obstacle(kv_pool):
            raise ValueError(obstacle)
        turns = self.turns([by], slots.device)
        slots = slots.long()
        for layer in range(kv_pool.start_layer, kv_pool.start_layer + kv_pool.layer_num):
            keys = kv_pool.get_key_buffer(layer)
            keys.index_copy_(0, slots, self.turn_queries(keys.index_select(0, slots), turns))


def pool_obstacle(kv_pool: Any) -> str | None:
    """Return what keeps the keys of a pool from being turned, or None. The text completes "does not work with"."""
    stock = require_sglang("sglang.srt.mem_cache.memory_pool:MHATokenToKVPool")
    if type(kv_pool) is not stock or kv_pool.kv_cache_layout != "nhd" or kv_pool.is_quantized_kv_cache:
        return f"a {type(kv_pool).__name__} or its layout of keys"
    if kv_pool.store_dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"keys that are stored as {kv_pool.store_dtype}"
    return None


def _attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    """Yield (name, module that computes queries and keys, its RadixAttention) for each attention layer."""
    radix_attention = require_sglang("sglang.srt.layers.radix_attention:RadixAttention")
    for name, attention in model.named_modules():
        if isinstance(attention, radix_attention):
            parent = name.rpartition(".")[0]
            yield parent, model.get_submodule(parent), attention


def _frequencies(rotary: Any) -> torch.Tensor:
    """Return [rotary_dim / 2] radians per position in float64, without the scale of a table.

    Raises:
        ValueError: There are no such frequencies.
    """
    from sglang.srt.layers import rotary_embedding as sglang_rotary
    from sglang.srt.layers.rotary_embedding import base, rope_variant, yarn

    kind = type(rotary)
    if kind in (base.RotaryEmbedding, rope_variant.Llama3RotaryEmbedding):
        frequencies = rotary._compute_inv_freq(rotary.base)
    elif kind is base.LinearScalingRotaryEmbedding and len(rotary.scaling_factors) == 1:
        frequencies = rotary._compute_inv_freq(rotary.base) / rotary.scaling_factors[0]
    elif kind is yarn.YaRNScalingRotaryEmbedding:
        frequencies = rotary._compute_inv_freq(rotary.scaling_factor)
    elif isinstance(rotary, sglang_rotary.MRotaryEmbedding) or "MRotary" in kind.__name__:
        raise ValueError("M-RoPE positions")
    elif "Dynamic" in kind.__name__ or "LongRoPE" in kind.__name__:
        raise ValueError(f"a rotary embedding with dynamic scaling ({kind.__name__})")
    else:
        raise ValueError(f"this rotary embedding: {kind.__name__}")
    return frequencies.to("cpu", torch.float64)
