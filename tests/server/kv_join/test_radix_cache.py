"""Joins in the KV cache, compared with a forward pass of transformers with an explicit mask and positions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from sgl_apr.server.launch.launcher import Server
from sgl_apr.trajectory.join_layout import layout_positions, token_count
from tests.server.kv_join.test_cache_keys import random_layout
from tests.support.dense_mask import dense_mask

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
NEW = 16

LAYOUTS = {
    "one": [20, [[6], [9]], 3],
    "one branch": [20, [[6]], 2],
    "empty branch": [20, [[6], [0], [4]], 2],
    "unequal": [20, [[1], [3], [50]], 4],
    "eight": [30, [[k + 2] for k in range(8)], 3],
    "in sequence": [12, [[5], [7]], 4, [[3], [8]], 2, [[6], [6]], 3],
    "nested": [12, [[5], [7, [[2], [3]], 2]], 3],
    "three deep": [10, [[4, [[3], [2, [[5], [1]], 2]], 3], [6]], 4, [[2], [3, [[1], [1]], 1]], 2],
    "block first": [3, [[4, [[2], [2]], 1], [2]], 1],
}


@pytest.fixture(scope="module")
def model(untagged: Path) -> Path:
    return untagged


@pytest.fixture(scope="module")
def joining(checked: Server) -> Server:
    return checked


@pytest.fixture(scope="module")
def reference(model: Path):
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def expected(reference, layout: list, ids: list[int], new: int = NEW) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by transformers, with the layout's mask and positions."""
    out: list[int] = []
    logprobs: list[float] = []
    for k in range(new):
        grown = [*layout[:-1], layout[-1] + k]
        sees = torch.tensor(dense_mask(grown))
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits = reference(
                torch.tensor([[*ids, *out]]),
                attention_mask=mask,
                position_ids=torch.tensor([list(layout_positions(grown))]),
                use_cache=False,
            ).logits[0, -1]
        out.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[out[-1]]))
    return out, logprobs


async def generate(session, url: str, ids: list[int], new: int, layout: list | None = None, **more) -> dict:
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    if layout is not None:
        sampling["custom_params"] = {"apr_layout": json.dumps(layout)}
    body = {"input_ids": ids, "sampling_params": sampling, **more}
    async with session.post(f"{url}/generate", json=body) as response:
        return {"status": response.status, **(await response.json())}


class Evicted(Exception):
    """The prefix of a branch is no longer in the cache."""


async def commit(session, url: str, layout: list, ids: list[int], **more) -> None:
    """Prefill every segment of a prompt into the cache, after the tokens it attends to; raises `Evicted`."""

    async def walk(sequence: list, at: int, before: list, seen: list[int]) -> int:
        for k, item in enumerate(sequence):
            if isinstance(item, int):
                seen, at, before = [*seen, *ids[at : at + item]], at + item, [*before, item]
                nested = any(not isinstance(i, int) for i in before)
                last = sequence is layout and k == len(sequence) - 1
                if item and not last:
                    found = await generate(session, url, seen, 0, merged(before) if nested else None, **more)
                    if found["status"] == 409:
                        raise Evicted
                    assert found["status"] == 200, found
                continue
            start = at
            for branch in item:
                at = await walk(branch, at, before, seen)
            seen, before = [*seen, *ids[start:at]], [*before, item]
        return at

    await walk(layout, 0, [], [])


def merged(sequence: list) -> list:
    """Merge consecutive runs into one, as in a request of its own."""
    out: list = []
    for item in sequence:
        if isinstance(item, int) and out and isinstance(out[-1], int):
            out[-1] += item
        else:
            out.append(item)
    return out


def joined(url: str, layout: list, ids: list[int], new: int = NEW) -> dict:
    async def once() -> dict:
        async with aiohttp.ClientSession() as session:
            await commit(session, url, layout, ids)
            return await generate(session, url, ids, new, layout, return_logprob=True)

    return asyncio.run(once())


def prompt(layout: list, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 400) for _ in range(token_count(layout))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_join_is_what_the_model_computes(joining: Server, reference, name: str):
    layout = LAYOUTS[name]
    for seed in range(2):
        ids = prompt(layout, seed)
        found = joined(joining.url, layout, ids)
        tokens, logprobs = expected(reference, layout, ids)
        assert found["output_ids"] == tokens
        logprobs_of_server = [p for p, *_ in found["meta_info"]["output_token_logprobs"]]
        assert max(abs(a - b) for a, b in zip(logprobs_of_server, logprobs, strict=True)) < 1e-4
        cached = found["meta_info"]["cached_tokens"]
        assert cached == len(ids) - layout[-1], "nothing before the join is computed again"


def test_a_text_join_differs(joining: Server, reference):
    """The negative control: without a layout the branches see one another."""
    layout = LAYOUTS["unequal"]
    ids = prompt(layout, 7)

    async def plain() -> dict:
        async with aiohttp.ClientSession() as session:
            return await generate(session, joining.url, ids, NEW, return_logprob=True)

    before, reply, after = asyncio.run(plain()), joined(joining.url, layout, ids), asyncio.run(plain())
    assert before["output_ids"] == after["output_ids"]
    linear, logprobs = expected(reference, [len(ids)], ids)
    assert after["output_ids"] == linear, "an ordinary prompt never sees joined keys and values"
    logprobs_of_server = [p for p, *_ in reply["meta_info"]["output_token_logprobs"]]
    assert logprobs_of_server[0] != pytest.approx(logprobs[0], abs=1e-4)


@pytest.mark.parametrize("name", ["unequal", "in sequence", "nested"])
@pytest.mark.parametrize("text_first", [True, False])
def test_a_join_and_the_same_text_share_only_the_first_branch(
    joining: Server, reference, name: str, text_first: bool
):
    """Whichever was cached first, and whatever was decoded after it: the other reuses the first branch at most."""
    layout = LAYOUTS[name]
    ids = prompt(layout, 70 + 2 * list(LAYOUTS).index(name) + text_first)
    shared = layout[0] + layout[1][0][0]  # the prefix, and the first run of the first branch

    def as_text() -> dict:
        async def once() -> dict:
            async with aiohttp.ClientSession() as session:
                return await generate(session, joining.url, ids, NEW)

        return asyncio.run(once())

    first = as_text() if text_first else None
    reply = joined(joining.url, layout, ids)
    assert reply["output_ids"] == expected(reference, layout, ids)[0]
    assert reply["meta_info"]["cached_tokens"] == len(ids) - layout[-1], "the end of the text is not shared"
    read = first or as_text()
    assert read["output_ids"] == expected(reference, [len(ids)], ids)[0]
    assert read["meta_info"]["cached_tokens"] <= shared
    assert joined(joining.url, layout, ids)["output_ids"] == reply["output_ids"]
    assert as_text()["output_ids"] == read["output_ids"]


def test_what_is_decoded_after_a_join_is_cached_there_only(joining: Server, reference):
    layout = LAYOUTS["one"]
    ids = prompt(layout, 11)
    first = joined(joining.url, layout, ids)
    longer, more = [*ids, *first["output_ids"]], [*layout[:-1], layout[-1] + NEW]
    again = joined(joining.url, more, longer)
    assert again["meta_info"]["cached_tokens"] >= len(longer) - 1
    assert again["output_ids"] == expected(reference, more, longer)[0]

    async def plain() -> dict:
        async with aiohttp.ClientSession() as session:
            return await generate(session, joining.url, longer, 4)

    shared = layout[0] + layout[1][0][0]
    assert asyncio.run(plain())["meta_info"]["cached_tokens"] <= shared, "the prefix and the first branch"


BAD = {
    "expected a layout as JSON": "[1, [[",
    "expected a list": "null",
    "expected the 32": "[20, [[6], [1]], 3]",
    "expected a run": '[20, [["6"], [6]], 3]',
}


@pytest.mark.parametrize("message", BAD)
def test_a_malformed_layout_is_rejected_and_the_server_continues(joining: Server, message: str):
    async def once() -> tuple[dict, dict]:
        async with aiohttp.ClientSession() as session:
            ids = prompt([32], 5)
            sampling = {"max_new_tokens": 4, "custom_params": {"apr_layout": BAD[message]}}
            async with session.post(
                f"{joining.url}/generate", json={"input_ids": ids, "sampling_params": sampling}
            ) as response:
                refused = {"status": response.status, "text": await response.text()}
            return refused, await generate(session, joining.url, ids, 4)

    refused, fine = asyncio.run(once())
    assert refused["status"] == 400
    assert message in refused["text"]
    assert len(fine["output_ids"]) == 4


def test_a_branch_that_is_not_cached_is_a_cache_miss(joining: Server):
    async def once() -> dict:
        async with aiohttp.ClientSession() as session:
            layout = LAYOUTS["one"]
            return await generate(session, joining.url, prompt(layout, 99), 4, layout)

    found = asyncio.run(once())
    assert found["status"] == 409
    assert "are cached" in json.dumps(found)


def scaled(layout: list, factor: int) -> list:
    return [i * factor if isinstance(i, int) else [scaled(b, factor) for b in i] for i in layout]


VARIANTS = {
    "chunked prefill": ({"chunked_prefill_size": 8}, {}),
    "chunks and decoding mixed": ({"chunked_prefill_size": 16, "enable_mixed_chunk": True}, {}),
    "no overlap": ({"disable_overlap_schedule": True}, {}),
    "another order": ({"schedule_policy": "dfs-weight"}, {}),
    "the tree in Python": ({}, {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}),
    "retraction": ({}, {"SGLANG_TEST_RETRACT": "1"}),
    "pages of several tokens": ({"page_size": 16}, {}),
    "eviction": ({"max_total_tokens": 700, "max_running_requests": 3}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_joins_do_not_depend_on_the_servers_options(model: Path, reference, tmp_path: Path, variant: str):
    """Many requests in parallel. Branches that were evicted between commit and join are committed again."""
    options, environment = VARIANTS[variant]
    rng = random.Random(variant)
    factor = 6 if variant == "eviction" else 1
    made = (scaled(random_layout(rng), factor) for _ in range(200))
    layouts = [x for x in made if len(x) > 1 and token_count(x) < 250][:24]
    cases = [(layout, prompt(layout, k)) for k, layout in enumerate(layouts)]

    async def one(
        session, url: str, gate: asyncio.Semaphore, layout: list, ids: list[int]
    ) -> tuple[dict, int]:
        async with gate:
            for misses in range(50):
                with contextlib.suppress(Evicted):
                    await commit(session, url, layout, ids)
                    found = await generate(session, url, ids, NEW, layout)
                    if found["status"] != 409:
                        return found, misses
        raise AssertionError("the branches were never all in the cache")

    async def go(url: str) -> list[tuple[dict, int]]:
        gate = asyncio.Semaphore(3 if variant == "eviction" else 6)
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(one(session, url, gate, *case) for case in cases))

    checks = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (checks | environment).items():
            patch.setenv(name, value)
        flags = {"max_total_tokens": 4096, "context_length": 512, **options}
        log = tmp_path / "log"
        with Server(model, radix_cache_backend="apr", log_path=log, **flags) as server:
            found = asyncio.run(go(server.url))
            again = asyncio.run(go(server.url))
    for (answer, _), (second, _), (layout, ids) in zip(found, again, cases, strict=True):
        assert answer["output_ids"] == second["output_ids"] == expected(reference, layout, ids)[0]
    missed = sum(m for _, m in [*found, *again])
    assert variant != "retraction" or "retract" in log.read_text().lower()
    assert variant != "eviction" or sum(map(token_count, layouts)) > 3 * flags["max_total_tokens"]
    print(
        f"\n{variant}: {sum(map(token_count, layouts))} tokens, {len(cases)} joins twice, {missed} committed again"
    )
