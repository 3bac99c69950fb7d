"""Training on forks of a context: every decoded token has a loss after what its request had read."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from sgl_apr.training import build_training_tree
from tests.runtime.tools.scripted_tools import call
from tests.training.test_training_tree import NotedScript, read, requests


@pytest.mark.parametrize("join", ["text", "kv"])
def test_a_fork_of_a_context_is_trained_on_as_its_requests_read_it(join: str):
    def search(query: str) -> str:
        """Search."""
        return f"found {query}"

    def script(request: apr.Request, prompt: str) -> str:
        if prompt.endswith("one"):
            return "Hm." + call("search", query="x")
        return "An answer." if prompt.endswith("</tool_response>\n") else f"The end of {prompt[-5:]!r}."

    engine = NotedScript(script, apr.ByteTokenizer())
    tasks = [apr.ForkTask("one", tools=[search]), "two", apr.ForkTask("three", max_tokens=4)]
    result = asyncio.run(
        apr.fork(
            engine, "A document. ", tasks, apr.Merge("Merge.", join=join), tool_call_parser="qwen25", seed=0
        )
    )
    assert [r.finish for r in result.results] == ["stop", "stop", "length"]
    assert {j.by for j in result.trajectory.joins} == ({"kv"} if join == "kv" else set())
    tree = build_training_tree([result.trajectory], eos=apr.ByteTokenizer.EOS)
    assert read(tree) == requests(engine)
    roles = {result.trajectory.spans[i].role for i in tree.spans.tolist()}
    assert roles == {"body", "call", "text"}
    if join == "kv":
        assert tree.tree.positions.tolist() == list(apr.causality(result.trajectory).positions)
