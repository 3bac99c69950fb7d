"""The log-probabilities of the server against those of the training tree: the end-to-end test of training data."""

from __future__ import annotations

import asyncio

import llguidance.numpy as masks
import numpy as np
import pytest
import requests
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import sgl_apr as apr
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.training_tree import TrainingTree, build_training_tree, logprobs

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

FEW = [
    ("threadweaver", "text", 1),
    ("multiverse", "kv", 3),
    ("parallel_r1", "kv", 1),
    ("spawn", "message", 2),
]
CASES = [
    *((name, join, 1) for name in apr.dialect_names() for join in sorted(apr.dialect(name).joins)),
    ("multiverse", "text", 3),
    *FEW,
]


class Noted(apr.HttpEngine):
    """Records the grammar of every call, by its prompt and its output. Some calls consist of several requests."""

    noted: dict[tuple, str]

    async def decode(self, request, on_tokens=None):
        result = await super().decode(request, on_tokens)
        begin = len(request.input_ids) - request.resumed_tokens
        prompt, resumed = request.input_ids[:begin], request.input_ids[begin:]
        self.noted[prompt, (*resumed, *result.token_ids)] = request.grammar
        return result


@pytest.fixture(scope="module")
def path(server) -> str:
    return requests.get(f"{server.url}/server_info", timeout=60).json()["model_path"]


@pytest.fixture(scope="module")
def model(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()


MIN_TOKENS = 20  # of a trajectory that is compared


async def sampled(url: str, name: str, join: str, depth: int, seed: int) -> tuple[apr.Trajectory, dict]:
    """Sample a trajectory, again if the model by chance ends it after a few tokens."""
    async with await Noted.connect(url) as engine:
        budget = apr.Budget(tokens=600, width=3, branch_tokens=60, outline_chars=8, depth=depth)
        for _ in range(20):
            engine.noted = {}
            trajectory = await apr.areason(
                engine, f"Question {seed}: ", name, join=join, budget=budget, logprobs=True, temperature=1.0,
                mode="auto" if name == "parathinker" else "parallel", policy="all", min_width=2,
            )  # fmt: skip
            if sum(call.output_tokens for call in trajectory.calls) > MIN_TOKENS:
                break
        return trajectory, engine.noted


def allowed(path: str, found: TrainingTree, trajectory: apr.Trajectory, noted: dict) -> torch.Tensor:
    """(m, vocabulary), the tokens that the mask allowed where each target was decoded."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    guide, size = from_tokenizer(tokenizer, n_vocab=len(tokenizer)), len(tokenizer)
    dense = Visibility.from_trees([found.tree]).dense_mask()[0, 0].numpy()
    bits = masks.allocate_token_bitmask(1, size)
    calls = [trajectory.spans[span].call for span in found.spans.tolist()]
    rows = torch.zeros(len(calls), size, dtype=torch.bool)
    for call in dict.fromkeys(calls):
        own = [m for m, of in enumerate(calls) if of == call]
        context = tuple(found.tree.token_ids[dense[found.sources[own[0]]]].tolist())
        matcher = LLMatcher(guide, noted[context, tuple(found.targets[own].tolist())])
        for m in own:
            masks.fill_next_token_bitmask(matcher, bits)
            rows[m] = torch.from_numpy(
                np.unpackbits(bits.view(np.uint8), bitorder="little")[:size].astype(bool)
            )
            if m != own[-1]:
                assert matcher.consume_token(int(found.targets[m]))
    return rows


def masked(model, found: TrainingTree, rows: torch.Tensor) -> torch.Tensor:
    batch = Collator()([found])
    with torch.no_grad():
        hidden = model.model(
            batch["input_ids"], position_ids=batch["position_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        logits = model.lm_head(hidden[batch["rows"], batch["sources"]])
    logits = logits.masked_fill(~rows, -torch.inf)
    return logits.log_softmax(-1).gather(-1, batch["targets"][:, None])[:, 0]


def check_log_probabilities(path: str, model, trajectory: apr.Trajectory, noted: dict) -> TrainingTree:
    """Compare the log-probabilities of the server with those of the model on the tree. Returns the tree."""
    found = build_training_tree([trajectory], eos=model.config.eos_token_id)
    assert len(found.sources) == sum(c.output_tokens for c in trajectory.calls) > MIN_TOKENS
    reported = logprobs(found, [trajectory])
    mine = masked(model, found, allowed(path, found, trajectory, noted)).numpy()
    assert np.abs(reported - mine).max() < 1e-3
    return found


@pytest.mark.parametrize(
    ("name", "join", "depth"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in dict.fromkeys(CASES)],
)
def test_log_probabilities_equal_those_of_the_server(
    server, path: str, model, name: str, join: str, depth: int
):
    trajectory, noted = asyncio.run(sampled(server.url, name, join, depth, 0))
    assert trajectory.blocks
    assert all(j.by == "kv" for j in trajectory.joins)
    assert {c.weight_version for c in trajectory.calls} != {None}
    found = check_log_probabilities(path, model, trajectory, noted)
    if join == "kv":  # the reverse has to differ: what is behind the join sees something else
        other = build_training_tree([trajectory], eos=model.config.eos_token_id, join="text")
        behind = np.array([trajectory.spans[s].path == () for s in found.spans])
        theirs = log_probabilities(model, Collator()([other])).detach().numpy()
        ours = log_probabilities(model, Collator()([found])).detach().numpy()
        assert np.abs(theirs - ours)[behind].max() > 1e-2


@pytest.mark.slow
def test_log_probabilities_of_requests_that_continue_others(server, path: str, model):
    """Branches that need more than their first lease of tokens have several requests, and one call."""
    for seed in range(60):
        trajectory, noted = asyncio.run(sampled(server.url, "asyncthink", "message", 1, seed))
        if any(call.continuations for call in trajectory.calls):
            break
    else:
        pytest.fail("no request was continued")
    check_log_probabilities(path, model, trajectory, noted)


def test_aborted_branches_have_none(server):
    """The first branch that ends aborts the others: their text is there, without log-probabilities."""
    options = {
        "budget": apr.Budget(tokens=600, width=3, branch_tokens=60),
        "logprobs": True,
        "temperature": 1.0,
    }
    for seed in range(20):
        trajectory = apr.run(server.url, f"Question {seed}: ", "parathinker", **options)
        cut = {i for i, c in enumerate(trajectory.calls) if c.logprobs is None and c.output_tokens}
        if any(s.call in cut and s.tokens for s in trajectory.spans):
            break
    found = build_training_tree([trajectory])
    reported = logprobs(found, [trajectory])
    assert np.isnan(reported).any()
    assert [trajectory.spans[s].call in cut for s in found.spans] == np.isnan(reported).tolist()


def test_a_trajectory_without_log_probabilities_is_an_error(server):
    trajectory = apr.run(server.url, "Question: ", "npr", budget=apr.Budget(tokens=60))
    with pytest.raises(apr.AprError, match="logprobs=True"):
        logprobs(build_training_tree([trajectory]), [trajectory])
