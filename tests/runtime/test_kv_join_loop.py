"""The loop with join="kv" on the real server, against a transformers forward with an explicit mask and positions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang as sgl
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import make_options
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.models import random_llama
from sgl_apr.trajectory.causal_graph import context_layout
from sgl_apr.trajectory.join_layout import commit_prompts, layout_positions
from tests.support.dense_mask import dense_mask

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

KV = [name for name in apr.dialect_names() if "kv" in apr.dialect(name).joins]
BUDGET = {"tokens": 600, "width": 3, "branch_tokens": 60, "outline_chars": 8}
# Forks that leave tokens for text after the last join: the model forks for as long as its budget bears another one.
FORKS = {"multiverse": 8, "npr": 10, "parallel_r1": 30}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    tags = dict.fromkeys(tag for name in KV for tag in apr.dialect(name).tags)
    return random_llama(tmp_path_factory.mktemp("joins"), tags=list(tags), tag_bias=3.0, seed=3)


@pytest.fixture(scope="module")
def joining(forked_server: type[Server], model: Path) -> Iterator[Server]:
    options = {"radix_cache_backend": "apr", "max_total_tokens": 16384, "context_length": 2048}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1")
        with forked_server(model, log_path=model / "log", **options) as server:
            yield server


@pytest.fixture(scope="module")
def reference(model: Path):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def options(name: str, depth: int = 1, **more) -> dict:
    depth = min(depth, apr.dialect(name).max_depth)
    return {
        "join": "kv",
        "mode": "parallel",
        "temperature": 0,
        "budget": apr.Budget(**BUDGET, depth=depth),
        **more,
    }


def plain(tokenizer, vocabulary: int) -> torch.Tensor:
    """Tokens that no grammar keeps out of free text: letters."""
    found = [
        i for i in range(vocabulary) if tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii()
    ]
    return torch.tensor(found)


def regret(reference, trajectory: apr.Trajectory, found: apr.Causality, letters: torch.Tensor) -> list[float]:
    """By how much the best letter beats each letter that was decoded, in the reference's log-probabilities."""
    sees = torch.tensor(dense_mask(found.layout))
    with torch.no_grad():
        logprobs = (
            reference(
                torch.tensor([found.token_ids]),
                attention_mask=torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[
                    None, None
                ],
                position_ids=torch.tensor([list(layout_positions(found.layout))]),
                use_cache=False,
            )
            .logits[0]
            .log_softmax(-1)
        )
    known, at, out = set(letters.tolist()), 0, []
    for span in trajectory.spans:
        for k, token in enumerate(span.token_ids):
            # The token before it in its sequence is the one before it in the text, but for the first of a span.
            if span.origin == "decoded" and k and token in known:
                row = logprobs[at + k - 1]
                out.append(float(row[letters].max() - row[token]))
        at += span.tokens
    return out


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        *(pytest.param(name, 1, marks=() if name == "npr" else pytest.mark.slow) for name in KV),
        ("multiverse", 3),
    ],
)
def test_what_is_written_is_what_the_reference_writes(joining: Server, reference, name: str, depth: int):
    forks = FORKS.get(name, 1)
    trajectory = apr.run(joining.url, "Whales and eagles: ", name, **options(name, depth, max_blocks=forks))
    apr.dialect(name).validate(trajectory.text)
    assert len(trajectory.blocks) >= forks
    assert {(j.path, j.by) for j in trajectory.joins} == {(b.path, "kv") for b in trajectory.blocks}
    # What a branch had decoded when another one cut it may not have come into the cache.
    cut = {b.path for block in trajectory.blocks for b in block.branches if b.outcome == "aborted"}
    assert all(c.reprefilled_tokens <= 1 for c in trajectory.calls if c.path not in cut), (
        "nothing is computed again"
    )
    letters = plain(asyncio.run(tokenizer_of(joining.url)), reference.config.vocab_size)
    joined = regret(reference, trajectory, apr.causality(trajectory), letters)
    assert len(joined) > 15
    assert max(joined) < 1e-4
    assert max(regret(reference, trajectory, apr.causality(trajectory, "text"), letters)) > 1e-2, (
        "not in a line"
    )


@pytest.mark.slow
@pytest.mark.parametrize("join", ["kv", "text"])
def test_a_second_turn_continues_what_the_first_has_joined(joining: Server, reference, join: str):
    async def two_turns() -> tuple[apr.Trajectory, apr.Trajectory, apr.Trajectory]:
        async with await apr.HttpEngine.connect(joining.url) as engine:
            first = await apr.areason(engine, "Whales and eagles: ", "multiverse", **options("multiverse"))
            checked = make_options("multiverse", engine.tokenizer, **options("multiverse") | {"join": join})
            turns = [first]
            for _ in range(2):
                ids = (*turns[-1].context_ids, *engine.tokenizer.encode("<|im_end|>\nAnd sharks: "))
                layout = context_layout(turns[-1])
                assert layout
                turns.append(await run_with_options(engine, ids, checked, prompt_layout=layout))
            return tuple(turns)

    letters = plain(asyncio.run(tokenizer_of(joining.url)), reference.config.vocab_size)
    first, *later = asyncio.run(two_turns())
    for before, trajectory in zip((first, later[0]), later, strict=True):
        assert trajectory.calls[0].cached_tokens >= len(before.context_ids) - 1
        assert trajectory == apr.Trajectory.from_json(trajectory.to_json())
        found = apr.causality(trajectory)
        layout = context_layout(before)
        assert found.layout[: len(layout)] == layout
        decoded = regret(reference, trajectory, found, letters)
        assert len(decoded) >= 10
        assert max(decoded) < 1e-4
        assert max(regret(reference, trajectory, apr.causality(trajectory, "text"), letters)) > 1e-2


async def tokenizer_of(url: str):
    async with await apr.HttpEngine.connect(url) as engine:
        return engine.tokenizer


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("first", marks=pytest.mark.slow),
        "quorum:2",
        pytest.param("deadline:0.3", marks=pytest.mark.slow),
    ],
)
def test_what_a_policy_cuts_is_joined_too(joining: Server, policy: str):
    trajectory = apr.run(
        joining.url, "Q: ", "multiverse", **options("multiverse", policy=policy, min_width=3)
    )
    apr.dialect("multiverse").validate(trajectory.text)
    assert {j.by for j in trajectory.joins} == {"kv"}


class Forgetful(apr.HttpEngine):
    """Before each request that has a layout, `forget` says whether the cache has lost what it needs."""

    forget = staticmethod(lambda request: False)

    async def _generate(self, request, sampling, on_tokens):
        if request.layout is not None and self.forget(request):
            raise apr.EngineError("KV join: forgotten", 409)
        return await super()._generate(request, sampling, on_tokens)


def with_forgetful(url: str, forget, name: str = "multiverse", **more) -> apr.Trajectory:
    async def once() -> apr.Trajectory:
        async with await Forgetful.connect(url) as engine:
            engine.forget = forget
            return await apr.areason(engine, "Whales and eagles: ", name, **options(name, **more))

    return asyncio.run(once())


def test_what_the_cache_lost_once_is_committed_again(joining: Server):
    lost: list[str] = []

    def once(request: apr.Request) -> bool:
        lost.append(request.rid)
        return len(lost) == 1

    trajectory = with_forgetful(joining.url, once)
    whole = with_forgetful(joining.url, lambda request: False)
    assert trajectory.text == whole.text, "greedy: nothing else changed"
    assert {j.by for j in trajectory.joins} == {"kv"}
    first = trajectory.blocks[0]
    assert sum(c.phase == "recommit" for c in trajectory.calls) == len(first.branches)
    assert not [c for c in whole.calls if c.phase == "recommit"]


def test_what_the_cache_keeps_losing_is_read_as_text(joining: Server):
    trajectory = with_forgetful(joining.url, lambda request: True)
    apr.dialect("multiverse").validate(trajectory.text)
    (block, sequence) = trajectory.joins[:2]
    assert (block.path, block.by) == ((1,), "kv")
    assert (sequence.path, sequence.by) == ((), "text")
    assert "forgotten" in sequence.why
    again = [c for c in trajectory.calls if c.phase == "recommit"]
    assert len(again) == sum(len(b.branches) for b in trajectory.blocks), "each once"
    with pytest.raises(apr.AprError, match="forgotten"):
        apr.causality(trajectory)


def test_a_flushed_cache_costs_commits_and_not_the_join(joining: Server):
    """The server itself says 409, for what it really does not have any more."""
    import urllib.request

    flushed: list[str] = []

    def flush(request: apr.Request) -> bool:
        if not flushed and not urllib.request.urlopen(f"{joining.url}/flush_cache", b"").close():
            flushed.append(request.rid)
        return False

    trajectory = with_forgetful(joining.url, flush)
    assert {j.by for j in trajectory.joins} == {"kv"}
    assert [c for c in trajectory.calls if c.phase == "recommit"]
    apr.dialect("multiverse").validate(trajectory.text)


def test_calls_are_bounded_with_all_commits(joining: Server):
    for calls in (9, 17):
        budget = apr.Budget(**BUDGET, calls=calls)
        asked = options("multiverse", budget=budget)
        trajectory = apr.run(joining.url, "Q: ", "multiverse", **asked)
        apr.dialect("multiverse").validate(trajectory.text)
        assert trajectory.metrics().engine_calls <= calls
        assert with_forgetful(joining.url, lambda r: True, budget=budget).metrics().engine_calls <= calls


def test_a_program_joins_in_the_cache(joining: Server):
    @sgl.function
    def solve(s, question):
        s += question
        s += apr.reason("answer", "multiverse", join="kv", mode="parallel", budget=apr.Budget(**BUDGET))
        s += "\nSo: " + sgl.gen("so", max_tokens=8, temperature=0)

    with apr.Endpoint(joining.url) as endpoint:
        state = solve.run("Whales and eagles: ", backend=endpoint, temperature=0)
        trajectory = state.get_meta_info("answer")["trajectory"]
        direct = apr.run(joining.url, "Whales and eagles: ", "multiverse", **options("multiverse"))
        assert trajectory.text == direct.text
        assert {j.by for j in trajectory.joins} == {"kv"}
        assert state.get_meta_info("so")["completion_tokens"] > 0


def test_an_engine_that_cannot_says_so():
    engine = apr.ScriptedEngine(lambda request, prompt: "x")
    with pytest.raises(apr.KvJoinUnavailable, match="sgl-apr serve"):
        asyncio.run(apr.areason(engine, "Q: ", "multiverse", join="kv"))


def test_commits_are_of_the_trajectory(joining: Server):
    trajectory = apr.run(joining.url, "Q: ", "multiverse", **options("multiverse", 3))
    found = apr.causality(trajectory)
    assert len(list(commit_prompts(found.layout))) == sum(len(b.branches) for b in trajectory.blocks)
    assert sum(c.phase == "commit" and len(c.path) > 0 for c in trajectory.calls)
