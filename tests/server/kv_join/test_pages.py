"""Joins with pages of several tokens in SGLang's scheduler, compared with a forward pass of transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.in_process_scheduler import (
    SchedulerRun,
    close_scheduler,
    make_abort,
    make_request,
    make_scheduler,
    memory_state,
    run_requests,
)
from sgl_apr.server import doctor
from sgl_apr.server.kv_join.probe import GenerateClient
from sgl_apr.server.kv_join.selfcheck import assert_joins_correct, check_identities
from sgl_apr.trajectory.join_layout import commit_prompts, layout_positions, token_count
from tests.server.kv_join.test_cache_keys import random_layout
from tests.server.kv_join.test_radix_cache import LAYOUTS, scaled
from tests.support.dense_mask import dense_mask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NEW = 16
RETRACTION, EVICTION = "retraction", "eviction"
CASES = {
    **LAYOUTS,
    "first branch empty": [21, [[0], [5], [4]], 2],
    "no prefix": [0, [[16], [16], [16]], 1],
    "long": [70, [[30], [40], [25]], 6],
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "pages of 16": ({"page_size": 16}, {}),
    "pages of 64": ({"page_size": 64}, {}),
    "chunked prefill": ({"page_size": 16, "chunked_prefill_size": 16}, {}),
    "chunks and decoding mixed": (
        {"page_size": 16, "chunked_prefill_size": 32, "enable_mixed_chunk": True},
        {},
    ),
    "no overlap": ({"page_size": 16, "overlap": False}, {}),
    "the tree in Python": ({"page_size": 16}, {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}),
    RETRACTION: ({"page_size": 16}, {}),
    EVICTION: ({"page_size": 16, "max_total_tokens": 1600, "max_running_requests": 3}, {}),
    "another attention": ({"page_size": 16, "attention_backend": "torch_native"}, {}),
}
CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_DEBUG_MEMORY_POOL": "1",
}


@dataclass
class Joiner:
    """A scheduler whose cache joins.

    Attributes:
        scheduler: SGLang's.
        sent: How many requests were sent, which numbers them.
    """

    scheduler: Any
    sent: int = field(default=0)

    def request(self, ids: Sequence[int], layout: Any, new: int) -> Any:
        self.sent += 1
        params = {"apr_layout": json.dumps(layout)} if layout else None
        return make_request(f"r{self.sent:06}", ids, new, params, logprobs=False)

    def run(self, prompts: Sequence[tuple[Sequence[int], Any]], new: int) -> tuple[list[Any], SchedulerRun]:
        """Run (ids, layout) at once. Returns their Req objects."""
        requests = [self.request(ids, layout, new) for ids, layout in prompts]
        result = run_requests(self.scheduler, [(1, r) for r in requests], 120)
        return [result.requests[r.rid] for r in requests], result

    def commit(self, cases: Sequence[tuple[Any, Sequence[int]]]) -> None:
        """Commit the branches of (layout, ids), those that depend on others later."""
        waves: dict[int, list[tuple[list[int], Any]]] = {}
        for layout, ids in cases:
            for ranges, own in commit_prompts(layout):
                part = [t for first, last in ranges for t in ids[first:last]]
                waves.setdefault(blocks(own or ()), []).append((part, own))
        for _, wave in sorted(waves.items()):
            self.run(wave, 0)

    def join(self, cases: Sequence[tuple[Any, Sequence[int]]], new: int = NEW) -> tuple[list[Any], int]:
        """Commit and join (layout, ids) until all are joined. Returns their Req objects, and the cache misses."""
        joined: dict[int, Any] = {}
        misses = 0
        for _ in range(50):
            left = [k for k in range(len(cases)) if k not in joined][:6]
            if not left:
                return [joined[k] for k in range(len(cases))], misses
            self.commit([cases[k] for k in left])
            reqs, result = self.run([(cases[k][1], cases[k][0]) for k in left], new)
            for k, req in zip(left, reqs, strict=True):
                reason = result.finish_reason(req.rid)
                if reason["type"] == "abort":
                    assert reason["status_code"] == 409, reason
                    misses += 1
                else:
                    joined[k] = req
        raise AssertionError("the branches were never all in the cache")


def blocks(layout: Any) -> int:
    return sum(1 + sum(map(blocks, item)) for item in layout if not isinstance(item, int))


def prompt(layout: Any, seed: int | str) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 400) for _ in range(token_count(layout))]


@pytest.fixture(scope="module")
def reference(untagged: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        untagged, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def equal_tokens(reference: Any, layout: Any, ids: Sequence[int], output: Sequence[int]) -> int:
    """How many of the output's tokens are the likeliest ones after all tokens before them."""
    grown = [*layout[:-1], layout[-1] + len(output) - 1]
    sees = torch.tensor(dense_mask(grown))
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        logits = reference(
            torch.tensor([[*ids, *output[:-1]]]),
            attention_mask=mask,
            position_ids=torch.tensor([list(layout_positions(grown))]),
            use_cache=False,
        ).logits[0, len(ids) - 1 :]
    return sum(a == b for a, b in zip(logits.argmax(-1).tolist(), output, strict=True))


@pytest.fixture
def joiner(request: pytest.FixtureRequest, untagged: Path) -> Iterator[Joiner]:
    """A scheduler of a variant. Afterwards all its memory is free or can be evicted."""
    flags, environment = VARIANTS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (CHECKS | environment).items():
            patch.setenv(name, value)
        # SGLang reads this variable once, when it is imported.
        patch.setattr("sglang.srt.managers.scheduler.TEST_RETRACT", request.param == RETRACTION)
        scheduler = make_scheduler(untagged, **{"max_total_tokens": 8192, "context_length": 512} | flags)
        try:
            before = memory_state(scheduler)
            yield Joiner(scheduler)
            assert memory_state(scheduler) == before
            assert scheduler.tree_cache.protected_size() == 0
        finally:
            close_scheduler(scheduler)


@pytest.mark.parametrize("joiner", VARIANTS, indirect=True)
def test_joins_are_what_the_model_computes(joiner: Joiner, reference: Any, request: pytest.FixtureRequest):
    variant = request.node.callspec.params["joiner"]
    rng = random.Random(variant)
    made = (scaled(random_layout(rng), 5) for _ in range(200))
    layouts = [*CASES.values(), *[x for x in made if len(x) > 1 and token_count(x) < 250][:12]]
    cases = [(layout, prompt(layout, k)) for k, layout in enumerate(layouts)]
    reqs, misses = joiner.join(cases)
    again, more = joiner.join(cases)
    text = 0
    for (layout, ids), req, second in zip(cases, reqs, again, strict=True):
        output = list(req.output_ids)
        assert list(second.output_ids) == output
        assert equal_tokens(reference, layout, ids, output) == NEW, layout
        if not req.retracted_stain:
            assert req.cached_tokens == len(ids) - layout[-1], "nothing before the join is computed again"
            assert (req.cached_tokens_device, req.cached_tokens_host) == (req.cached_tokens, 0)
            assert second.cached_tokens >= req.cached_tokens
        text += equal_tokens(reference, [len(ids)], ids, output)
    assert text < len(cases) * NEW / 2, "the control: text differs"
    assert variant != RETRACTION or any(req.retraction_count for req in reqs)
    assert variant != EVICTION or misses + more > 0
    plain, _ = joiner.run([(ids, None) for _, ids in cases[:6]], NEW)
    for (_, ids), req in zip(cases, plain, strict=False):
        assert equal_tokens(reference, [len(ids)], ids, list(req.output_ids)) == NEW, "text sees no joins"
    tokens = sum(token_count(layout) for layout, _ in cases)
    print(f"\n{variant}: {len(cases)} joins of {tokens} tokens twice, {misses + more} committed again")


@pytest.mark.parametrize("joiner", ["pages of 16", "chunked prefill"], indirect=True)
def test_a_trajectory_continues_on_its_copies(joiner: Joiner, reference: Any):
    """Three blocks in sequence, with what is decoded between them. Aborted requests leave nothing."""
    layout: list = [20, [[9], [12]], 3]
    ids = prompt(layout, "trajectory")
    for block in range(3):
        ((req,), misses) = joiner.join([(layout, ids)])
        assert misses == 0
        assert equal_tokens(reference, layout, ids, list(req.output_ids)) == NEW
        branches = [[5 + block], [1], [18]]
        rng = random.Random(block)
        ids = [*ids, *req.output_ids, *(rng.randrange(10, 400) for _ in range(6 + block + 19 + 2))]
        layout = [*layout[:-1], layout[-1] + NEW + 1, branches, 1]
        ids = ids[: token_count(layout)]
        longer, _ = joiner.run([(ids[: -token_count([branches, 1])], [*layout[:-3], layout[-3]])], 1)
        assert longer[0].cached_tokens >= len(longer[0].origin_input_ids) - 17, "the request before"
    joiner.commit([(layout, ids)])
    waiting = joiner.request(ids, layout, 400)
    run_requests(joiner.scheduler, [(1, waiting), (6, make_abort(waiting.rid))])


@pytest.mark.parametrize("joiner", ["pages of 16"], indirect=True)
def test_a_branch_that_is_not_cached_is_a_cache_miss(joiner: Joiner):
    layout = LAYOUTS["one"]
    ids = prompt(layout, "miss")
    (req,), result = joiner.run([(ids, layout)], 4)
    reason = result.finish_reason(req.rid)
    assert (reason["status_code"], "are cached" in reason["message"]) == (409, True)
    joiner.run([(ids[:26], None)], 4)
    joiner.run([([*ids[:20], *ids[26:35]], None)], 4)
    (req,), result = joiner.run([(ids, layout)], 4)
    assert result.finish_reason(req.rid)["status_code"] == 409, "only a commit caches the end of a branch"
    joiner.join([(layout, ids)])


def as_client(joiner: Joiner) -> GenerateClient:
    """A client of the start-up check that sends its prompts to the scheduler instead of a server."""

    def answer(req: Any, reason: dict[str, Any]) -> dict[str, Any]:
        output = list(req.output_ids[: req.sampling_params.max_new_tokens])
        meta = {"finish_reason": reason, "cached_tokens": req.cached_tokens}
        for kind in ("output_top_logprobs", "output_token_ids_logprobs") if req.return_logprob else ():
            values, ids = (getattr(req.logprob, f"{kind}_{name}")[: len(output)] for name in ("val", "idx"))
            steps = zip(values, ids, strict=True)
            meta[kind] = [
                [(float(v), t) for v, t in zip(v, t, strict=True)] for v, t in steps if t is not None
            ]
        return {"output_ids": output, "meta_info": meta}

    def generate(body: Mapping[str, Any]) -> list[dict[str, Any]]:
        requests = []
        for k, (ids, sampling) in enumerate(zip(body["input_ids"], body["sampling_params"], strict=True)):
            layout = sampling.get("custom_params", {}).get("apr_layout")
            one = joiner.request(ids, layout and json.loads(layout), sampling["max_new_tokens"])
            if body.get("return_logprob"):
                one.return_logprob, one.top_logprobs_num = True, body["top_logprobs_num"]
                one.token_ids_logprob = body.get("token_ids_logprob", [None] * (k + 1))[k]
            requests.append(one)
        result = run_requests(joiner.scheduler, [(1, r) for r in requests], 120)
        return [answer(result.requests[r.rid], result.finish_reason(r.rid)) for r in requests]

    return generate


@pytest.mark.parametrize("joiner", ["pages of 16", "pages of 64"], indirect=True)
def test_the_start_up_check_holds(joiner: Joiner):
    for seed in range(3):
        checks = {check.name: check for check in check_identities(as_client(joiner), seed)}
        assert [str(c) for c in checks.values() if not c.ok and c.name != "positions"] == []
        assert any(not c.is_uninformative for c in checks.values())
    assert_joins_correct(as_client(joiner))
    assert doctor._check_fork(as_client(joiner)).state == "ok", "the doctor's fork shares complete pages"
