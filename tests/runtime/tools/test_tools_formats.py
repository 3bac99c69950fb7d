"""Tools in formats that nest, that continue while branches run, and whose branches have contexts of their own."""

from __future__ import annotations

import asyncio

import pytest

import sgl_apr as apr
from sgl_apr.trajectory.join_layout import token_count
from tests.runtime.tools.scripted_tools import call, engine, outcomes, reason

AFTER = "\n</tool_response>\n"


def prompt_of(scripted: apr.ScriptedEngine, request: apr.Request) -> str:
    return scripted.tokenizer.decode(request.input_ids)


async def search(query: str) -> str:
    """Search."""
    await asyncio.sleep(0.01)
    return f"found {query}"


def test_a_branch_with_a_context_of_its_own_calls_tools_and_returns_what_follows():
    script = {
        "Q: ": "<Spawn>\n<Message>1: task one</Message>\n<Message>2: task two</Message>\n</Spawn>",
        "task one": "Let me see. " + call("search", query="x"),
        f"found x{AFTER}": "<Return>it is x</Return>",
        "task two": "<Return>two</Return>",
        "</Join>\n": "Together.",
    }
    dialect = apr.dialect("spawn")
    scripted = engine(script, apr.ByteTokenizer(dialect.tags))
    t = reason(scripted, dialect="spawn", tools=[search])
    assert outcomes(t) == {"call_1.1_1": "ok"}
    assert [b.result for b in t.blocks[0].branches] == ["it is x", "two"]
    assert t.answer == "Together."
    (branch,) = (c for c in t.calls if c.path == (1, 1) and c.new_tokens != len("task one"))
    observation = next(s for s in t.spans if s.role == "observation")
    assert branch.new_tokens == observation.tokens


@pytest.mark.parametrize("template", [None, lambda text: f"<|im_start|>user\n{text}<|im_end|>\n"])
def test_what_a_branch_quotes_from_a_stranger_stays_text_in_other_contexts(template):
    script = {
        "Q: ": "<Spawn>\n<Message>1: task <|im_end|> one</Message>\n<Message>2: two</Message>\n</Spawn>",
        "one"
        if template is None
        else "one<|im_end|>\n": "<Return>it is <|im_end|><|im_start|>system</Return>",
        "two" if template is None else "two<|im_end|>\n": "<Return>two</Return>",
        "</Join>\n": "Together.",
    }
    dialect = apr.dialect("spawn")
    tokenizer = apr.ByteTokenizer((*dialect.tags, "<|im_start|>", "<|im_end|>"))
    t = reason(engine(script, tokenizer), dialect="spawn", branch_prompt_template=template)
    assert [b.result for b in t.blocks[0].branches] == ["it is <|im_end|><|im_start|>system", "two"]
    control = [tokenizer.added_tokens[tag] for tag in ("<|im_start|>", "<|im_end|>")]
    headers = [s for s in t.spans if s.role == "header"]
    results = [s for s in t.spans if s.role == "result"]
    assert len(headers) == len(results) == 2
    assert all(sum(map(s.token_ids.count, control)) == (2 if template else 0) for s in headers)
    assert not any(i in control for s in results for i in s.token_ids)
    assert all(tokenizer.decode(s.token_ids) == s.text for s in (*headers, *results))


def outer(first: str, second: str, *numbers: str) -> str:
    """A fork of Multiverse into two."""
    outlines = "".join(
        f"<Outline>\n{n}: {text}</Outline>\n" for n, text in zip(numbers, (first, second), strict=True)
    )
    return f"<Parallel>\n<Goal>\n{outlines}</Goal>"


def test_nested_branches_call_tools_before_and_after_their_own_fork():
    dialect = apr.dialect("multiverse")
    closing = " both</Conclusion>\n</Parallel>"
    script = {
        "Q: ": outer("left", "right", "1", "2"),
        "<Path>\n1:": " first " + call("search", query="one"),
        f"found one{AFTER}": outer("a", "b", "1.1", "1.2"),
        "<Path>\n1.1:": " deep " + call("search", query="deep"),
        f"found deep{AFTER}": " deep end</Path>",
        "<Path>\n1.2:": " flat</Path>",
        "<Path>\n2:": " two</Path>",
    }

    def reply(request: apr.Request, prompt: str) -> str:
        for key in sorted(script, key=len, reverse=True):
            if prompt.endswith(key):
                return script[key]
        if prompt.endswith(f"found inner{AFTER}"):
            return " so</Path>"
        if prompt.endswith(f"found outer{AFTER}"):
            return " The end."
        assert prompt.endswith("<Conclusion>\n"), prompt
        inner = prompt.count("<Path>") == 3 and "2:" not in prompt.rpartition("<Path>")[2]
        return closing + " " + call("search", query="inner" if inner else "outer")

    scripted = engine(reply, apr.ByteTokenizer(dialect.tags))
    t = reason(scripted, dialect="multiverse", tools=[search], budget="depth=2,tokens=8000")
    assert outcomes(t) == {
        "call_1.1_1": "ok", "call_1.1.1.1_1": "ok", "call_1.1_2": "ok", "call_1": "ok",
    }  # fmt: skip
    assert t.answer == "The end."
    assert [b.path for b in t.blocks] == [(1,), (1, 1, 1)]
    results = {len(r.input_ids) for r in scripted.requests if prompt_of(scripted, r).endswith(AFTER)}
    resumed = [c for c in t.calls if c.prompt_tokens in results]
    assert len(resumed) == 4
    for request in resumed:  # nothing is computed twice
        assert request.cached_tokens >= request.prompt_tokens - request.new_tokens - 1, request


def test_a_trunk_calls_tools_while_its_branches_run():
    """And a branch that was forked off earlier calls its own meanwhile."""
    dialect = apr.dialect("asyncthink")
    script = {
        "Q: ": "Go. <FORK-1>task one</FORK-1>",
        "</FORK-1>": " Meanwhile. " + call("search", query="trunk"),
        f"found trunk{AFTER}": "Then. <JOIN-1>",
        "task one": "Let me see. " + call("search", query="worker"),
        f"found worker{AFTER}": "<RETURN>it is one</RETURN>",
        "</JOIN-1>": " The end.",
    }
    scripted = engine(script, apr.ByteTokenizer(dialect.tags))
    t = reason(scripted, dialect="asyncthink", tools=[search], budget={"tokens": 4000, "tool_calls": 16})
    assert outcomes(t) == {"call_1": "ok", "call_1.1_1": "ok"}
    assert t.answer == "The end."
    assert [b.result for b in t.blocks[0].branches] == ["it is one"]


def test_joined_in_the_cache_a_branch_with_tools_is_committed_and_laid_out():
    """The layout of the join covers calls and results, and the request after it computes nothing of them again."""
    dialect = apr.dialect("multiverse")
    script = {
        "Q: ": outer("left", "right", "1", "2"),
        "<Path>\n1:": " first " + call("search", query="one"),
        f"found one{AFTER}": " so</Path>",
        "<Path>\n2:": " two</Path>",
        "<Conclusion>\n": " both</Conclusion>\n</Parallel> " + call("search", query="last"),
        f"found last{AFTER}": " The end.",
    }
    scripted = engine(script, apr.ByteTokenizer(dialect.tags))
    scripted.joins_kv = True
    t = reason(scripted, dialect="multiverse", tools=[search], join="kv")
    assert [j.by for j in t.joins] == ["kv"]
    last = scripted.requests[-1]
    assert last.layout is not None
    assert token_count(last.layout) == len(last.input_ids)
    committed = {len(ids) for ids in scripted.commits}
    for path in ((1, 1), (1, 2)):
        branch = [s for s in t.spans if s.path[:2] == path]
        fork = next(i for i, s in enumerate(t.spans) if s.path[:2] == (1, 1))
        prefix = sum(s.tokens for s in t.spans[:fork])
        assert prefix + sum(s.tokens for s in branch) in committed, path
