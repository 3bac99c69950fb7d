"""Joins on a server with several data-parallel ranks: each has a cache of its own, and a trajectory names one."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.server.kv_join.validation import validate_request
from sgl_apr.server.launch.launcher import Server
from sgl_apr.trajectory.join_layout import LayoutError
from tests.server.kv_join.test_radix_cache import LAYOUTS, NEW, commit, expected, generate, prompt

RANKS = 2
IDS = prompt(LAYOUTS["one"], 5)


def tokenized(rank: int | None) -> Any:
    sampling = SimpleNamespace(custom_params={"apr_layout": "[20, [[6], [9]], 3]"}, beam_width=None)
    return SimpleNamespace(
        input_ids=IDS, sampling_params=sampling, return_logprob=False, extra_key=None, routed_dp_rank=rank
    )


def test_a_layout_needs_a_rank():
    """Without one, SGLang sends each request to any rank."""
    client_request = SimpleNamespace(input_ids=IDS, text=None, contains_mm_input=lambda: False)
    validate_request(client_request, tokenized(None), joins=True)
    validate_request(client_request, tokenized(1), joins=True, ranks=RANKS)
    with pytest.raises(LayoutError, match=r"2 data-parallel ranks.*expected its number as routed_dp_rank"):
        validate_request(client_request, tokenized(None), joins=True, ranks=RANKS)


@pytest.fixture(scope="module")
def served(untagged: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with two ranks, which has checked the joins of both."""
    cores = RANKS * sorted(os.sched_getaffinity(0))
    log = tmp_path_factory.mktemp("ranks") / "log"
    flags = {"max_total_tokens": 4096, "context_length": 512, "dp_size": RANKS, "skip_server_warmup": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
        with Server(untagged, radix_cache_backend="apr", log_path=log, **flags) as server:
            yield server


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_skipping_the_warm_up_does_not_skip_the_check(served: Server):
    """The check sends eight requests at least to each rank, of three hundred tokens in all."""
    log = Path(str(served._log_path)).read_text(errors="replace")
    for rank in range(RANKS):
        assert sum(map(int, re.findall(rf"DP{rank}\] Prefill batch.*#new-token: (\d+)", log))) > 200


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_join_on_either_rank_is_what_the_model_computes(served: Server, untagged: Path):
    reference = AutoModelForCausalLM.from_pretrained(
        untagged, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    async def joined(layout: list, ids: list[int], rank: int, wrong: int) -> tuple[dict, dict, dict]:
        async with aiohttp.ClientSession() as session:
            await commit(session, served.url, layout, ids, routed_dp_rank=rank)
            found = await generate(session, served.url, ids, NEW, layout, routed_dp_rank=rank)
            other = await generate(session, served.url, ids, NEW, layout, routed_dp_rank=wrong)
            unnamed = await generate(session, served.url, ids, NEW, layout)
            return found, other, unnamed

    for rank in range(RANKS):
        for name in ("unequal", "nested"):
            layout, ids = LAYOUTS[name], prompt(LAYOUTS[name], 40 + rank)
            found, other, unnamed = asyncio.run(joined(layout, ids, rank, 1 - rank))
            assert found["output_ids"] == expected(reference, layout, ids)[0]
            assert found["meta_info"]["cached_tokens"] == len(ids) - layout[-1]
            assert other["status"] == 409, "the other rank has no branch in its cache"
            assert unnamed["status"] == 400
            assert "expected its number as routed_dp_rank" in str(unnamed)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_trajectories_join_in_the_caches_of_all_ranks(served: Server):
    budget = apr.Budget(tokens=400, width=3, branch_tokens=12, outline_chars=8)
    options = {"mode": "parallel", "join": "kv", "temperature": 1.0, "budget": budget}

    async def run_all() -> list[apr.Trajectory]:
        async with await apr.HttpEngine.connect(served.url) as engine:
            return await asyncio.gather(
                *(apr.areason(engine, f"Problem {i}: ", "multiverse", **options) for i in range(8))
            )

    trajectories = asyncio.run(run_all())
    joins = [join for trajectory in trajectories for join in trajectory.joins]
    assert len(joins) >= len(trajectories)
    assert {join.by for join in joins} == {"kv"}, "nothing was read again as text"
    log = Path(str(served._log_path)).read_text(errors="replace")
    assert all(f"DP{rank}] Prefill batch" in log for rank in range(RANKS)), "both had work"
