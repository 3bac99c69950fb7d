"""Turning a query or a key equals the rotary embedding of transformers, and of SGLang, at the other position."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as apply_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sgl_apr.server.shared_cache.rotary import Rotation, pool_obstacle

HEADS, DIM, BASE = 3, 64, 10000.0
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
}  # fmt: skip
POSITIONS = torch.tensor([0, 1, 7, 30, 200, 411])


def sglang_rotary(scaling: dict | None = None, *, neox: bool = True, share: float = 1.0, dtype=torch.float32):
    scaling = dict(scaling or SCALINGS["default"])
    return get_rope(DIM, DIM, 2048, BASE, neox, scaling, dtype, partial_rotary_factor=share)


def rotated(
    scaling: dict, x: torch.Tensor, positions: torch.Tensor, *, neox: bool, share: float
) -> torch.Tensor:
    """`x` [rows, heads, dim] as transformers rotates it, without YaRN's scale."""
    size = int(DIM * share)
    config = LlamaConfig(
        head_dim=size, hidden_size=size, num_attention_heads=1, max_position_embeddings=2048,
        rope_parameters={**scaling, "rope_theta": BASE},
    )  # fmt: skip
    rotary = (LlamaRotaryEmbedding if neox else CohereRotaryEmbedding)(config)
    cos, sin = (table / rotary.attention_scaling for table in rotary(x, positions[None]))
    apply = apply_rotary_pos_emb if neox else apply_interleaved
    turned, _ = apply(x[None, ..., :size], x[None, ..., :size], cos, sin, unsqueeze_dim=2)
    return torch.cat([turned[0], x[..., size:]], -1)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_turn_equals_the_embedding_at_the_other_position(scaling, neox, share):
    torch.manual_seed(0)
    rotation = Rotation.from_rotary_embedding(sglang_rotary(SCALINGS[scaling], neox=neox, share=share))
    x = torch.randn(len(POSITIONS), HEADS, DIM)
    options = {"neox": neox, "share": share}
    here = rotated(SCALINGS[scaling], x, POSITIONS, **options)
    for turns in ([0, 1, 5, 300, -200, -411], [1000] * 6):
        there = rotated(SCALINGS[scaling], x, POSITIONS + torch.tensor(turns), **options)
        turned = rotation.turn_queries(here, rotation.turns(turns, x.device))
        torch.testing.assert_close(turned, there, atol=2e-4, rtol=0)  # angles of 1,000 radians in float32
        assert torch.equal(turned[..., int(DIM * share) :], here[..., int(DIM * share) :])


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_turn_equals_the_embedding_of_sglang(scaling, neox):
    """With the scale of YaRN, which is in the tables of SGLang and not in a turn."""
    torch.manual_seed(0)
    rotary = sglang_rotary(SCALINGS[scaling], neox=neox)
    rotation = Rotation.from_rotary_embedding(rotary)
    x = torch.randn(len(POSITIONS), HEADS * DIM)
    turns = [3, -1, 70, 300, -200, -411]
    here, _ = rotary.forward_native(POSITIONS, x, x.clone())
    there, _ = rotary.forward_native(POSITIONS + torch.tensor(turns), x, x.clone())
    turned = rotation.turn_queries(here.unflatten(1, (HEADS, DIM)), rotation.turns(turns, x.device))
    torch.testing.assert_close(turned.flatten(1), there, atol=1e-4, rtol=0)


def test_a_turn_and_its_negative_cancel():
    rotation = Rotation.from_rotary_embedding(sglang_rotary())
    x = torch.randn(4, HEADS, DIM)
    there = rotation.turn_queries(x, rotation.turns([900], x.device))
    back = rotation.turn_queries(there, rotation.turns([-900], x.device))
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)
    assert torch.equal(rotation.turn_queries(x, rotation.turns([0], x.device)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_keys_turn_in_every_layer_and_nothing_else_does(dtype):
    torch.manual_seed(0)
    pool = MHATokenToKVPool(40, 1, dtype, HEADS, DIM, 3, "cpu", False)
    rotary = sglang_rotary()
    rotation = Rotation.from_rotary_embedding(rotary)
    plain = [torch.randn(len(POSITIONS), HEADS * DIM) for _ in range(3)]
    slots = torch.tensor([5, 9, 3, 40, 11, 2], dtype=torch.int32)
    for layer, keys in enumerate(plain):
        for buffer in pool.get_kv_buffer(layer):
            buffer.copy_(torch.randn(buffer.shape))
        pool.get_key_buffer(layer)[slots.long()] = (
            rotary.forward_native(POSITIONS, keys, keys.clone())[1].view(-1, HEADS, DIM).to(dtype)
        )
    before = [[x.clone() for x in pool.get_kv_buffer(layer)] for layer in range(3)]
    rotation.turn_cached_keys(pool, slots, 123)
    others = torch.tensor([slot for slot in range(41) if slot not in slots.tolist()])
    for layer, keys in enumerate(plain):
        expected = rotary.forward_native(POSITIONS + 123, keys, keys.clone())[1].view(-1, HEADS, DIM)
        now = pool.get_key_buffer(layer)[slots.long()].float()
        torch.testing.assert_close(now, expected, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0)
        assert torch.equal(pool.get_key_buffer(layer)[others], before[layer][0][others])
        assert torch.equal(pool.get_value_buffer(layer), before[layer][1])


def test_keys_that_cannot_be_turned():
    rotation = Rotation.from_rotary_embedding(sglang_rotary())
    pool = MHATokenToKVPool(4, 1, torch.float8_e5m2, HEADS, DIM, 1, "cpu", False)
    assert pool_obstacle(pool) == "keys that are stored as torch.uint8"
    with pytest.raises(ValueError, match="keys that are stored as"):
        rotation.turn_cached_keys(pool, torch.tensor([1]), 1)
    assert "SimpleNamespace" in str(pool_obstacle(SimpleNamespace()))


class Layer(torch.nn.Module):
    """An attention layer as SGLang's models have them."""

    def __init__(self, rotary: torch.nn.Module | None, **options: object) -> None:
        super().__init__()
        self.rotary_emb = rotary
        self.attn = RadixAttention(HEADS, DIM, 1.0, HEADS, 0, **options)


class HunyuanLayer(Layer):
    __module__ = "sglang.srt.models.hunyuan"


class Model(torch.nn.Module):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)


def rope(scaling: dict, **options) -> torch.nn.Module:
    return get_rope(DIM, DIM, 2048, options.pop("base", BASE), True, scaling, torch.float32)


def test_the_rotation_of_a_model():
    rotation = Rotation.from_model(Model(Layer(rope(SCALINGS["llama3"])), Layer(rope(SCALINGS["llama3"]))))
    assert rotation.equals(Rotation.from_rotary_embedding(rope(SCALINGS["llama3"])))
    assert not rotation.equals(Rotation.from_rotary_embedding(rope(SCALINGS["default"])))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: [], "^a model without a rotary embedding"),
        (lambda: [Layer(None), Layer(None)], "^a model without a rotary embedding"),
        (lambda: [Layer(sglang_rotary()), Layer(None)], r"layers without a rotary embedding \(layers\.1\)"),
        (lambda: [Layer(sglang_rotary()), Layer(rope({"rope_type": "default"}, base=5e5))], "different rotary"),
        (lambda: [Layer(sglang_rotary()), Layer(sglang_rotary(neox=False))], "different rotary"),
        (lambda: [Layer(rope({"rope_type": "dynamic", "factor": 2.0}))], "dynamic scaling"),
        (
            lambda: [Layer(rope({
                "rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
                "original_max_position_embeddings": 512,
            }))],
            "dynamic scaling",
        ),
        (lambda: [Layer(rope({"rope_type": "default", "mrope_section": [8, 12, 12]}))], "M-RoPE"),
        (lambda: [Layer(rope({"rope_type": "proportional"}))], "Gemma4RotaryEmbedding"),
        (lambda: [Layer(sglang_rotary(), sliding_window_size=64)], "sliding window"),
        (lambda: [HunyuanLayer(sglang_rotary())], "a model that normalizes queries"),
        (lambda: [Layer(get_rope(32, 32, 2048, BASE, True, None, torch.float32))], "not for a complete head"),
    ],
)  # fmt: skip
def test_models_whose_queries_cannot_be_turned(layers, reason):
    with pytest.raises(ValueError, match=reason):
        Rotation.from_model(Model(*layers()))


def test_a_table_of_other_angles():
    rotary = get_rope(DIM, DIM, 64, 777.0, True, None, torch.float32)
    rotary.cos_sin_cache[1, 3] += 0.3
    with pytest.raises(ValueError, match="another table"):
        Rotation.from_rotary_embedding(rotary)
