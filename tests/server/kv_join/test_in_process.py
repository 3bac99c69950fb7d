"""Joins in SGLang's scheduler in the test process, compared with transformers: M-RoPE, and the noise of samples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers import sampler
from sglang.srt.sampling import sampling_batch_info
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.common.in_process_scheduler import (
    SchedulerRun,
    close_scheduler,
    make_request,
    make_scheduler,
    run_requests,
)
from sgl_apr.server.kv_join import positions
from sgl_apr.trajectory.join_layout import commit_prompts, layout_positions, token_count
from tests.support.dense_mask import dense_mask
from tests.support.tiny_vl import random_qwen_vl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NEW = 24
LAYOUTS = [[20, [[7], [3]], 3], [20, [[7, [[2], [4]], 2], [5]], 3], [70, [[30], [40], [25]], 6]]


@pytest.fixture(scope="module", params=["llama", "qwen2_5_vl"])
def served(
    request: pytest.FixtureRequest, untagged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any, bool]]:
    """A scheduler, its model in transformers, and whether the model has M-RoPE positions."""
    vision = request.param != "llama"
    directory = random_qwen_vl(tmp_path_factory.mktemp("vl")) if vision else untagged
    loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    reference = loader.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    scheduler = make_scheduler(directory, max_total_tokens=4096)
    assert scheduler.tp_worker.model_runner.model_config.model_is_mrope == vision
    yield scheduler, reference, vision
    close_scheduler(scheduler)


def draw(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(10, 400) for _ in range(tokens)]


def join(
    scheduler: Any, layout: list, ids: list[int], name: str, neighbours: Sequence[Any] = (), **sampling: Any
) -> SchedulerRun:
    """Commit the branches of a prompt, and decode after their join, among other requests."""
    for k, (ranges, own) in enumerate(commit_prompts(layout)):
        part = [i for first, last in ranges for i in ids[first:last]]
        params = {"apr_layout": json.dumps(own)} if own else None
        run_requests(scheduler, [(0, make_request(f"{name}-c{k}", part, 1, params))])
    joined = make_request(name, ids, NEW, {"apr_layout": json.dumps(layout)}, **sampling)
    return run_requests(scheduler, [(0, joined), *((3 + 4 * k, other) for k, other in enumerate(neighbours))])


def likeliest(reference: Any, vision: bool, layout: list, ids: list[int], output: list[int]) -> list[int]:
    """The likeliest token in place of each token of an output, by transformers with the layout's mask and positions."""
    grown = [*layout[:-1], layout[-1] + len(output) - 1]
    sees = torch.tensor(dense_mask(grown))
    places = torch.tensor([list(layout_positions(grown))])
    with torch.no_grad():
        logits = reference(
            input_ids=torch.tensor([ids + output[:-1]]),
            attention_mask=torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None],
            position_ids=places.repeat(3, 1, 1) if vision else places,
            use_cache=False,
        ).logits[0, len(ids) - 1 :]  # fmt: skip
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_join_is_what_the_model_computes(served: tuple[Any, Any, bool], layout: list):
    scheduler, reference, vision = served
    rng = random.Random(f"equal {layout}")
    ids = draw(rng, token_count(layout))
    neighbours = [make_request(f"n{layout}-{k}", draw(rng, 90), 6) for k in range(4)]
    run = join(scheduler, layout, ids, f"j{layout}", neighbours)
    output = list(run.requests[f"j{layout}"].output_ids)
    assert run.finish_reason(f"j{layout}")["type"] == "length"
    assert run.requests[f"j{layout}"].cached_tokens == len(ids) - layout[-1]
    assert output == likeliest(reference, vision, layout, ids, output)
    assert output != likeliest(reference, vision, [len(ids)], ids, output), "as text it is something else"


def test_decode_steps_copy_nothing_while_the_batch_stays_the_same(
    served: tuple[Any, Any, bool], monkeypatch: pytest.MonkeyPatch
):
    """The device would be waited for. Two copies remain: for the extension, and for the first step of the batch."""
    scheduler = served[0]
    copies: list[Any] = []
    stock = positions.async_h2d
    positions._offsets_on_device.cache_clear()
    monkeypatch.setattr(positions, "async_h2d", lambda *a, **k: copies.append(a[0]) or stock(*a, **k))
    layout, rng = LAYOUTS[0], random.Random(2)
    neighbour = make_request("among", draw(rng, 30), NEW)
    run = join(scheduler, layout, draw(rng, token_count(layout)), "still", [neighbour])
    assert run.rounds > NEW
    assert sorted(copies, key=len) in ([[-3], [-3, 0]], [[-3], [0, -3]])


@pytest.fixture
def noise(served: tuple[Any, Any, bool], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position that the sampler has for each token of a single request. With the seed it chooses the noise."""
    model_sampler, passed = served[0].tp_worker.model_runner.sampler, []
    stock = model_sampler.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        passed.extend(arguments[-1].tolist())
        return stock(*arguments, **options)

    monkeypatch.setattr(model_sampler, "forward", forward)
    return passed


def multinomial_by_generator(
    logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Draw by seed and position, as SGLang's function does with a hash for which it has kernels for GPUs only."""
    rows = []
    for row, number, position in zip(logprobs, seed.tolist(), positions.tolist(), strict=True):
        generator = torch.Generator().manual_seed(1_000_003 * number + position)
        rows.append(torch.multinomial(row.exp(), 1, generator=generator))
    return torch.stack(rows)


def test_every_token_has_its_own_noise(
    served: tuple[Any, Any, bool], noise: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Seeds are honoured in deterministic inference, which SGLang refuses on a CPU: here its sampler alone does so."""
    layout, rng = LAYOUTS[0], random.Random(3)
    ids = draw(rng, token_count(layout))
    places = list(range(len(ids) - 1, len(ids) - 1 + NEW))
    join(served[0], layout, ids, "unseeded", temperature=1.0)
    assert len(set(noise[-NEW:])) == NEW - 1, "the positions of joined tokens, of which one is used twice"
    features = sampling_batch_info.get_exec().features
    seeded = SimpleNamespace(
        features=features, deterministic=SimpleNamespace(enable_deterministic_inference=True)
    )
    monkeypatch.setattr(sampling_batch_info, "get_exec", lambda: seeded)
    monkeypatch.setattr(sampler, "multinomial_with_seed", multinomial_by_generator)
    outputs = []
    for attempt in range(2):
        run = join(served[0], layout, ids, f"seeded-{attempt}", temperature=1.0, sampling_seed=7)
        outputs.append(list(run.requests[f"seeded-{attempt}"].output_ids))
        assert noise[-NEW:] == places
    assert outputs[0] == outputs[1], "the same seed draws the same tokens"
