"""Training trees against the requests that the engine got: each decoded token once, after what it had read."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

import sgl_apr as apr
from sgl_apr.engine.scripted import Script
from sgl_apr.runtime.loop import run_with_options
from sgl_apr.runtime.options import make_options
from sgl_apr.training.attention_mask import Visibility
from sgl_apr.training.collate import Collator, log_probabilities
from sgl_apr.training.training_tree import TrainingTree, build_training_tree
from sgl_apr.trajectory.causal_graph import context_layout
from sgl_apr.trajectory.join_layout import layout_positions
from sgl_apr.trajectory.metrics import longest_paths
from tests.runtime.tools.scripted_tools import call
from tests.support.example_documents import DOCUMENTS
from tests.support.masked_sampler import SampledEngine, masked
from tests.support.tool_trajectories import tool_trajectory

KV = [name for name in apr.dialect_names() if "kv" in apr.dialect(name).joins]


class Noted(SampledEngine):
    """Records requests and their results."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.noted: list[tuple[apr.Request, tuple[int, ...]]] = []
        self.joins_kv = True

    async def decode(self, request, on_tokens=None):
        result = await super().decode(request, on_tokens)
        self.noted.append((request, result.token_ids))
        return result


def sampled(name: str, seed: int, **more) -> tuple[apr.Trajectory, Noted]:
    dialect = apr.dialect(name)
    engine = Noted(masked(name), seed=seed)
    budget = apr.Budget(tokens=900, width=3, depth=min(3, dialect.max_depth))
    more = {"mode": "parallel", "budget": budget, **more}
    return asyncio.run(apr.areason(engine, "Q: ", name, **more)), engine


def read(found: TrainingTree) -> Counter:
    """(visible tokens, positions, target) of every loss."""
    dense = Visibility.from_trees([found.tree]).dense_mask()[0, 0].numpy()
    ids, at = found.tree.token_ids, found.tree.positions
    losses = Counter()
    for source, target in zip(found.sources.tolist(), found.targets.tolist(), strict=True):
        seen = dense[source].nonzero()[0]
        losses[tuple(ids[seen].tolist()), tuple(at[seen].tolist()), target] += 1
    return losses


def requests(engine: Noted) -> Counter:
    """The same, computed from the requests."""
    losses = Counter()
    for request, decoded in engine.noted:
        layout = request.layout or (len(request.input_ids),)
        for k, token in enumerate(decoded):
            where = tuple(layout_positions((*layout, k)))
            losses[request.input_ids + decoded[:k], where, token] += 1
    return losses


@pytest.mark.parametrize("name", apr.dialect_names())
def test_each_decoded_token_has_one_loss_after_what_it_had_read(name: str):
    blocks = 0
    for seed in range(6):
        trajectory, engine = sampled(name, seed)
        found = build_training_tree([trajectory], eos=apr.ByteTokenizer.EOS)
        assert read(found) == requests(engine)
        blocks += len(trajectory.blocks)
    assert blocks >= 6


@pytest.mark.parametrize("name", KV)
def test_kv_joins_match_the_requests(name: str):
    for seed in range(6):
        trajectory, engine = sampled(name, seed, join="kv")
        assert all(join.by == "kv" for join in trajectory.joins)
        found = build_training_tree([trajectory], eos=apr.ByteTokenizer.EOS)
        assert read(found) == requests(engine)
        expected = apr.causality(trajectory)
        assert found.tree.token_ids.tolist() == list(expected.token_ids), "each token once"
        assert found.tree.positions.tolist() == list(expected.positions)
        dense = Visibility.from_trees([found.tree]).dense_mask()[0, 0]
        hidden = [
            {k for first, last in ranges for k in range(first, last)} for ranges in expected.masked_ranges
        ]
        assert dense.tolist() == [
            [k <= q and k not in hidden[q] for k in range(len(hidden))] for q in range(len(hidden))
        ]


@pytest.mark.parametrize("name", KV)
def test_a_second_turn_continues_what_the_first_has_joined(name: str):
    nested = 0
    for seed in range(2):
        trajectory, engine = sampled(name, seed, join="kv")
        for _ in range(2):
            layout = context_layout(trajectory)
            assert layout
            nested += any(isinstance(i, tuple) for block in layout[1::2] for branch in block for i in branch)
            options = make_options(
                name, engine.tokenizer, join="kv", mode="parallel", budget={"tokens": 600, "width": 3}
            )
            engine.noted.clear()
            ids = (*trajectory.context_ids, *engine.tokenizer.encode("\nMore: "))
            trajectory = asyncio.run(run_with_options(engine, ids, options, prompt_layout=layout))
            found = build_training_tree([trajectory], eos=apr.ByteTokenizer.EOS)
            assert read(found) == requests(engine)
            assert found.tree.positions.tolist() == list(apr.causality(trajectory).positions)
    assert nested or apr.dialect(name).max_depth == 1


@pytest.mark.parametrize("name", KV)
def test_a_text_join_may_be_trained_as_a_kv_join(name: str):
    trajectory, _ = sampled(name, 1, join="text")
    assert len(build_training_tree([trajectory]).tree.token_ids) > trajectory.metrics().total, "read again"
    as_kv, expected = build_training_tree([trajectory], join="kv"), apr.causality(trajectory, "kv")
    assert as_kv.tree.token_ids.tolist() == list(expected.token_ids)
    assert as_kv.tree.positions.tolist() == list(expected.positions)
    back, _ = sampled(name, 1, join="kv")
    assert read(build_training_tree([back], join="text")) == read(build_training_tree([trajectory])), (
        "and the reverse"
    )


def test_trajectories_share_their_common_prefixes():
    made = [sampled("threadweaver", seed) for seed in range(4)]
    together = build_training_tree([t for t, _ in made], eos=apr.ByteTokenizer.EOS)
    separate = [build_training_tree([t], eos=apr.ByteTokenizer.EOS) for t, _ in made]
    assert read(together) == sum((read(s) for s in separate), Counter())
    assert together.tokens <= sum(s.tokens for s in separate) - 3 * len("Q: ")
    assert Counter(together.trajectories.tolist()) == {k: len(s.sources) for k, s in enumerate(separate)}


def test_a_trajectory_without_ids_is_an_error():
    trajectory = apr.dialect("threadweaver").parse("six times seven is 42")
    with pytest.raises(apr.AprError, match="tokenizer="):
        build_training_tree([trajectory])


def test_a_trajectory_that_lost_a_join_is_an_error():
    trajectory, _ = sampled("multiverse", 2, join="kv")
    lost = apr.JoinRecord((), "text", "forgotten")
    with pytest.raises(apr.AprError, match="forgotten"):
        build_training_tree([replace(trajectory, joins=(*trajectory.joins, lost))])


@pytest.mark.parametrize("name", ["apr", "spawn", "multiverse"])
def test_separate_contexts_are_split(name: str):
    trajectory, _ = sampled(name, 3)
    expected = build_training_tree([trajectory], eos=apr.ByteTokenizer.EOS)
    parts = build_training_tree([trajectory], eos=apr.ByteTokenizer.EOS, separate_contexts=True).split()
    roots = [s for s in trajectory.spans if not s.parents]
    assert len(parts) == len(roots)
    assert (len(parts) > 1) == (name != "multiverse")
    assert sum((read(part) for part in parts), Counter()) == read(expected)


@pytest.mark.parametrize("join", ["text", "kv"])
def test_flex_attention_sees_the_same(join: str):
    torch.manual_seed(0)
    rows = [build_training_tree([sampled("multiverse", seed, join=join)[0]]).tree for seed in (1, 2)]
    sight = Visibility.from_trees(rows)
    heads = [torch.randn(2, 2, sight.ends.shape[1], 16) for _ in range(3)]
    found = flex_attention(*heads, block_mask=sight.block_mask(16))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=sight.dense_mask())
    for k, row in enumerate(rows):
        torch.testing.assert_close(found[k, :, : len(row.ends)], expected[k, :, : len(row.ends)])


def contexts(trajectory: apr.Trajectory) -> Iterator[tuple[apr.Span, list[int], int]]:
    """Every decoded span, with the ids that it followed and the position of its first token, straight from the graph."""
    spans = trajectory.spans
    joined = any(join.by == "kv" for join in trajectory.joins)
    ends = longest_paths(spans, [s.tokens for s in spans])
    for i, span in enumerate(spans):
        if span.origin == "decoded":
            seen = [t for a in trajectory.ancestors(i)[:-1] for t in spans[a].token_ids or ()]
            yield span, seen, ends[i] - span.tokens if joined else len(seen)


def expected_losses(trajectory: apr.Trajectory) -> Counter:
    """(visible tokens, position of the last of them, target) of every decoded token."""
    losses = Counter()
    for span, seen, position in contexts(trajectory):
        for k, token in enumerate(span.token_ids or ()):
            losses[tuple(sorted([*seen, *span.token_ids[:k]])), position + k - 1, token] += 1
    return losses


@pytest.mark.parametrize(
    ("name", "join"), [*((name, "text") for name in DOCUMENTS), *((name, "kv") for name in KV)]
)
def test_calls_of_tools_have_losses_and_their_results_have_none(name: str, join: str):
    """In the trunk and in branches; a call that was cut is in no later context."""
    trajectory = tool_trajectory(name)
    if join == "kv":
        trajectory = replace(
            trajectory, joins=tuple(apr.JoinRecord(block.path, "kv") for block in trajectory.blocks)
        )
    found = build_training_tree([trajectory])
    dense = Visibility.from_trees([found.tree]).dense_mask()[0, 0].numpy()
    ids, at = found.tree.token_ids, found.tree.positions
    losses = Counter(
        (tuple(sorted(ids[dense[source]].tolist())), int(at[source]), target)
        for source, target in zip(found.sources.tolist(), found.targets.tolist(), strict=True)
    )
    assert losses == expected_losses(trajectory)
    learned = {(trajectory.spans[i].role, trajectory.spans[i].origin) for i in found.spans.tolist()}
    assert ("call", "decoded") in learned
    assert "observation" not in {role for role, _ in learned}
    cut = [i for i, span in enumerate(trajectory.spans) if span.role == "call" and span.finish == "length"]
    assert bool(cut) == any(span.role == "body" and span.path[-1] != 1 for span in trajectory.spans)
    assert set(cut) <= set(found.spans.tolist()), "what was decoded has a loss"


def test_the_tree_of_a_trajectory_with_tools_is_as_good_as_its_separate_contexts():
    """By the log-probabilities of a model: the tree at once, and each span after exactly what it had read."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    trajectory = tool_trajectory("threadweaver")
    found = build_training_tree([trajectory])
    with torch.no_grad():
        ours = log_probabilities(model, Collator()([found]))
        theirs = []
        for span, seen, _ in contexts(trajectory):
            rows = (
                model(torch.tensor([[*seen, *span.token_ids]])).logits[0, len(seen) - 1 : -1].log_softmax(-1)
            )
            theirs.append(rows.gather(-1, torch.tensor(span.token_ids)[:, None])[:, 0])
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-4, rtol=0)
    causal = torch.tensor([s for span in trajectory.spans for s in span.token_ids])
    assert len(causal) < found.tokens, "the text join is read again"


class NotedScript(apr.ScriptedEngine):
    """A scripted engine that records requests and their results."""

    def __init__(self, script: Script, tokenizer: apr.ByteTokenizer) -> None:
        super().__init__(script, tokenizer)
        self.noted: list[tuple[apr.Request, tuple[int, ...]]] = []
        self.joins_kv = True

    async def decode(self, request, on_tokens=None):
        result = await super().decode(request, on_tokens)
        self.noted.append((request, result.token_ids))
        return result


MULTIVERSE_FORK = "<Parallel>\n<Goal>\n<Outline>\n1: a\n</Outline>\n<Outline>\n2: b\n</Outline>\n<Outline>\n3: c\n</Outline>\n</Goal>"


@pytest.mark.parametrize("join", ["text", "kv"])
def test_a_run_with_tools_is_trained_on_as_the_requests_read_it(join: str):
    """In the trunk, two at once in a branch, one that fails in another, and one that is cut in a third."""
    asked = Counter()

    def search(query: str) -> str:
        """Search."""
        asked[query] += 1
        if query == "fail":
            raise ValueError("no such page")
        return f"found {query}"

    def script(request: apr.Request, prompt: str) -> apr.Reply | str:
        for end, reply in {
            "Q: ": "Hm. " + call("search", query="trunk"),
            "found trunk\n</tool_response>\n": "So. " + MULTIVERSE_FORK,
            "1:": " One." + call("search", query="x") + "\n" + call("search", query="y"),
            "found y\n</tool_response>\n": " Found.\n</Path>",
            "2:": " Two." + call("search", query="fail"),
            "no such page\n</tool_response>\n": " Failed.\n</Path>",
            "3:": " Three." + call("search", query="z" * 400),
        }.items():
            if prompt.endswith(end):
                return reply
        return "all\n</Conclusion>\n</Parallel>\nDone."

    engine = NotedScript(script, apr.ByteTokenizer(apr.dialect("multiverse").tags))
    trajectory = asyncio.run(
        apr.areason(
            engine, "Q: ", "multiverse", tools=[search], tool_call_parser="qwen25", join=join,
            budget=apr.Budget(tokens=6000, branch_tokens=300), mode="parallel",
        )
    )  # fmt: skip
    assert sorted(asked) == ["fail", "trunk", "x", "y"], "not the one that was cut"
    assert Counter(c.outcome for c in trajectory.tool_calls) == {"ok": 3, "error": 1, "length": 1}
    assert {j.by for j in trajectory.joins} == ({"kv"} if join == "kv" else set())
    assert trajectory.answer == "Done."
    found = build_training_tree([trajectory], eos=apr.ByteTokenizer.EOS)
    assert read(found) == requests(engine)
    roles = {trajectory.spans[i].role for i in found.spans.tolist()}
    assert "call" in roles
    assert "observation" not in roles
    m = trajectory.metrics()
    assert (m.blocks, m.branches, m.tool_calls, m.tool_errors) == (1, 3, 5, 2)
