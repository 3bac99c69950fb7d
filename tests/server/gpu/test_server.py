"""Joins in the cache of a server on a GPU with the default flags: half precision, and CUDA graphs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from sgl_apr.trajectory.join_layout import layout_positions, token_count
from tests.server.kv_join.test_radix_cache import LAYOUTS, NEW, commit, generate, prompt
from tests.support.dense_mask import dense_mask

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(600)]
HIDDEN = {"float16": 256, "bfloat16": 512}  # head dimensions 64 and 128, which flashinfer supports
OPTIONS = {"max_total_tokens": 16384, "context_length": 1024}


@pytest.fixture(scope="module", params=HIDDEN)
def served(request, tmp_path_factory) -> Iterator[tuple[Server, Any]]:
    """A server, and its model in single precision with the same, rounded, weights."""
    directory = tmp_path_factory.mktemp(request.param)
    random_llama(directory, hidden=HIDDEN[request.param], seed=3)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    # Not `model.to(...)`, which would round the frequencies of the rotary embedding as well.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, request.param)))
    model = model.to("cuda").eval()
    with Server(directory, log_path=directory / "log", dtype=request.param, **OPTIONS) as server:
        yield server, model


def output_of(answer: dict) -> tuple[list[int], list[float]]:
    assert answer["status"] == 200, answer
    return answer["output_ids"], [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def expected_logprobs(model: Any, layout: list, ids: list[int]) -> list[float]:
    """Log-probabilities of the last `NEW` ids."""
    sees = torch.tensor(dense_mask(layout), device="cuda")
    mask = torch.zeros(sees.shape, device="cuda").masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(
            torch.tensor([ids], device="cuda"),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([list(layout_positions(layout))], device="cuda"),
            use_cache=False,
        ).logits[0, -NEW - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[-NEW:], device="cuda")[:, None])[:, 0].tolist()


def mean_difference(left: list[float], right: list[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(left, right, strict=True))


def test_joins_are_what_the_model_computes(served: tuple[Server, Any]):
    """Joins and the same prompts as text, in parallel. The error of the text shows what the precision allows."""
    server, model = served
    prompts = [(layout, prompt(layout, seed)) for seed, layout in enumerate(LAYOUTS.values())]

    async def answers() -> tuple[list[dict], list[dict]]:
        async with aiohttp.ClientSession() as session:
            for layout, ids in prompts:
                await commit(session, server.url, layout, ids)
            joins = [
                generate(session, server.url, ids, NEW, lay, return_logprob=True) for lay, ids in prompts
            ]
            texts = [generate(session, server.url, ids, NEW, return_logprob=True) for _, ids in prompts]
            both = await asyncio.gather(*joins, *texts)
            return both[: len(joins)], both[len(joins) :]

    joined, text, swapped = [], [], []
    for (layout, ids), by_kv, by_text in zip(prompts, *asyncio.run(answers()), strict=True):
        assert by_kv["meta_info"]["cached_tokens"] == token_count(layout[:-1])
        tokens, logprobs = output_of(by_kv)
        grown, flat = [*layout[:-1], layout[-1] + NEW], [len(ids) + NEW]
        joined.append(mean_difference(logprobs, expected_logprobs(model, grown, ids + tokens)))
        swapped.append(mean_difference(logprobs, expected_logprobs(model, flat, ids + tokens)))
        tokens, logprobs = output_of(by_text)
        text.append(mean_difference(logprobs, expected_logprobs(model, flat, ids + tokens)))
    print(
        f"off by {fmean(joined):.2g} joined, {fmean(text):.2g} as text, {fmean(swapped):.2g} if one is taken for the other"
    )
    assert fmean(joined) < 2 * fmean(text) + 1e-3
    assert fmean(swapped) > 5 * fmean(joined)


def test_the_prefix_of_branches_is_cached(served: tuple[Server, Any]):
    server, _ = served
    ids = prompt([300, [[1]], 1], 99)[:300]

    async def forked() -> list[dict]:
        async with aiohttp.ClientSession() as session:
            await generate(session, server.url, ids, 0)
            return await asyncio.gather(
                *(generate(session, server.url, [*ids, 100 + k], NEW) for k in range(16))
            )

    assert [a["meta_info"]["cached_tokens"] for a in asyncio.run(forked())] == [len(ids)] * 16
