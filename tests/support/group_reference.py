"""Groups of workers computed by transformers, with explicit masks and positions: the reference for those in the engine.

Nothing of SGLang and nothing of this package is used, and the tokens of all workers are given. The rows of a worker are the
log-probabilities from which each of its output tokens was chosen, so a greedy worker is right if every token is the most
likely one of its row.

In both kinds a header reads the prompt and itself. Then, in step k, every worker that has an output token k reads it,
and sees the prompt, all headers and the output tokens up to k of all workers. Every output token is read, the last one of a
worker too. A worker without a header is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Ids = Sequence[int]


def load_reference(path: str | Path, **options: Any) -> Any:
    """Load a model in float32 with attention that takes any mask."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def group_think_rows(
    model: Any,
    prompt: Ids,
    headers: Sequence[Ids],
    outputs: Sequence[Ids],
    position_range: int,
    *,
    blind: bool = False,
) -> list[torch.Tensor]:
    """Compute Group Think (https://arxiv.org/abs/2505.11107) in one forward pass.

    Token j after the prompt of worker n is at position len(prompt) + n * position_range + j.

    Args:
        model: From `load_reference`.
        prompt: The tokens that all workers have in common.
        headers: Those that each worker has before it decodes.
        outputs: Those that each worker has decoded.
        position_range: Positions of each worker.
        blind: Let the workers not see each other, as a control.

    Returns:
        For each worker a tensor [output tokens, vocabulary] of log-probabilities, in float32 on the CPU.
    """
    ids: list[int] = list(prompt)
    positions = list(range(len(prompt)))
    owner = [-1] * len(prompt)
    # Who sees whom: the prompt and headers are causal. `step` orders what was decoded.
    order, step = list(range(len(prompt))), [-1] * len(prompt)
    rows: list[list[int]] = [[] for _ in headers]

    def add(token: int, worker: int, place: int, at_step: int) -> None:
        ids.append(token)
        positions.append(len(prompt) + worker * position_range + place)
        owner.append(worker)
        order.append(place)
        step.append(at_step)
        if place >= len(headers[worker]) - 1:
            rows[worker].append(len(ids) - 1)

    for worker, header in enumerate(headers):
        for place, token in enumerate(header):
            add(token, worker, place, -1)
    for k in range(max(map(len, outputs), default=0)):
        for worker, output in enumerate(outputs):
            if k < len(output):
                add(output[k], worker, len(headers[worker]) + k, k)
    owners, orders, steps = (torch.tensor(values) for values in (owner, order, step))
    own = (owners[:, None] == owners) & (orders <= orders[:, None])
    visible = own | ((owners == -1) & (owners[:, None] != -1))
    if not blind:
        # Tokens of step k see the headers of all workers and what they have decoded up to step k.
        visible |= (steps[:, None] >= 0) & (owners != -1) & (steps <= steps[:, None])
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            attention_mask=mask.to(model.device),
            use_cache=False,
        ).logits[0]
    return [
        logits[row[: len(output)]].float().cpu().log_softmax(-1)
        for row, output in zip(rows, outputs, strict=True)
    ]


def hogwild_rows(
    model: Any,
    prompt: Ids,
    headers: Sequence[Ids],
    outputs: Sequence[Ids],
    *,
    block_ends: Sequence[Sequence[int]] | None = None,
    blind: bool = False,
) -> list[torch.Tensor]:
    """Compute Hogwild! (https://arxiv.org/abs/2504.06261) step by step, with the modules of a Llama of transformers.

    Keys are kept without their rotary embedding. For every worker in every step they are laid out again, at positions 0, 1, 2,
    ...: the prompt, the history, the blocks of the other workers by number, the worker's own block.

    Args:
        model: From `load_reference`.
        prompt: The tokens that all workers have in common.
        headers: Those that each worker has before it decodes.
        outputs: Those that each worker has decoded.
        block_ends: For each worker, the numbers of output tokens after which a block ends. When the next token is read,
            the worker's block (with its header, if it is its first) becomes the end of the history. Several of one
            step do so by worker number.
        blind: Let the workers see only the prompt and their own blocks, as a control.

    Returns:
        For each worker a tensor [output tokens, vocabulary] of log-probabilities, in float32 on the CPU.
    """
    workers = range(len(headers))
    ends = [frozenset(worker) for worker in (block_ends or [()] * len(headers))]
    trunk = _Block(model)
    history: list[tuple[int, _Block]] = []  # with the worker
    blocks = [_Block(model) for _ in workers]

    def view(worker: int) -> list[_Block]:
        if blind:
            return [trunk, *(block for owner, block in history if owner == worker), blocks[worker]]
        others = [blocks[other] for other in workers if other != worker]
        return [trunk, *(block for _, block in history), *others, blocks[worker]]

    for token in prompt:
        _read_tokens(model, [token], [trunk], [[trunk]])
    rows: list[list[torch.Tensor]] = [[] for _ in workers]
    for worker in workers:
        for number, token in enumerate(headers[worker]):
            (row,) = _read_tokens(model, [token], [blocks[worker]], [[trunk, blocks[worker]]])
            if number == len(headers[worker]) - 1:
                rows[worker].append(row)
    for k in range(max(map(len, outputs), default=0)):
        reading = [worker for worker in workers if k < len(outputs[worker])]
        for worker in reading:
            if k in ends[worker]:
                history.append((worker, blocks[worker]))
                blocks[worker] = _Block(model)
        tokens = [outputs[worker][k] for worker in reading]
        step = _read_tokens(model, tokens, [blocks[w] for w in reading], [view(w) for w in reading])
        for worker, row in zip(reading, step, strict=True):
            rows[worker].append(row)
    empty = torch.zeros(0, model.config.vocab_size)
    return [torch.stack(r[: len(o)]) if o else empty for r, o in zip(rows, outputs, strict=True)]


class _Block:
    """The keys, without rotary embedding, and the values of consecutive tokens: one tensor for each layer."""

    def __init__(self, model: Any) -> None:
        config = model.config
        shape = (config.num_key_value_heads, 0, config.head_dim)
        self.keys = [torch.zeros(shape, device=model.device) for _ in model.model.layers]
        self.values = [torch.zeros(shape, device=model.device) for _ in model.model.layers]


def _read_tokens(
    model: Any, tokens: Sequence[int], blocks: Sequence[_Block], views: Sequence[Sequence[_Block]]
) -> list[torch.Tensor]:
    """Read one token for each of some blocks, whose end it becomes. Each sees the blocks of its view; its own is the last.

    Returns:
        Log-probabilities of the next token, for each.
    """
    with torch.no_grad():
        return _forward(model, tokens, blocks, views)


def _forward(
    model: Any, tokens: Sequence[int], blocks: Sequence[_Block], views: Sequence[Sequence[_Block]]
) -> list[torch.Tensor]:
    config, core = model.config, model.model
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = core.embed_tokens(torch.tensor(tokens, device=model.device))
    for number, layer in enumerate(core.layers):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q = attention.q_proj(y).view(len(tokens), heads, dim)
        k = attention.k_proj(y).view(len(tokens), kv_heads, 1, dim)
        v = attention.v_proj(y).view(len(tokens), kv_heads, 1, dim)
        for block, key, value in zip(blocks, k, v, strict=True):  # all are written before any is read
            block.keys[number] = torch.cat([block.keys[number], key], 1)
            block.values[number] = torch.cat([block.values[number], value], 1)
        attended = []
        for query, view in zip(q, views, strict=True):
            keys = torch.cat([block.keys[number] for block in view], 1)
            values = torch.cat([block.values[number] for block in view], 1)
            cos, sin = core.rotary_emb(keys, torch.arange(keys.shape[1], device=model.device)[None])
            keys = _rotate(keys, cos[0], sin[0]).repeat_interleave(heads // kv_heads, 0)
            query = _rotate(query, cos[0, -1], sin[0, -1])[:, None]
            weights = (query @ keys.transpose(1, 2) * dim**-0.5).softmax(-1)
            attended.append((weights @ values.repeat_interleave(heads // kv_heads, 0)).reshape(-1))
        x = x + attention.o_proj(torch.stack(attended))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return list(model.lm_head(core.norm(x)).float().cpu().log_softmax(-1))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
