"""Tools with a real server and a random model under the grammar: what is decoded is valid, and tools do not hold up others."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.server.launch.launcher import Server
from sgl_apr.training.grpo_config import Updates
from sgl_apr.training.mask_replay import MaskReplay, RecordedGrammars, RecordingEngine
from sgl_apr.training.policy_samples import make_policy_samples
from sgl_apr.training.ppo import update_policy
from sgl_apr.training.training_tree import build_training_tree
from tests.runtime.tools.checked_tools import DIALECTS, PARSERS, check, plot, search

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
T = TypeVar("T")
MESSAGES = [{"role": "user", "content": "What is it?"}]


def with_engine(server: Server, work: Callable[[apr.HttpEngine], Awaitable[T]]) -> T:
    async def run() -> T:
        async with await apr.HttpEngine.connect(server.url) as engine:
            return await work(engine)

    return asyncio.run(run())


async def run_many(
    engine: apr.HttpEngine, dialect: str, parser: str, count: int, **options: Any
) -> list[apr.Trajectory]:
    limit = asyncio.Semaphore(24)

    async def one(seed: int) -> apr.Trajectory:
        async with limit:
            events: list[apr.Event] = []
            trajectory = await apr.areason(
                engine,
                [{"role": "user", "content": f"Question {seed}?"}],
                dialect,
                tools=[search, plot],
                tool_call_parser=parser,
                temperature=1.5,
                on_event=events.append,
                budget={"tokens": 600, "width": 3, "tool_calls": 9, "tool_result_tokens": 48},
                **options,
            )
            assert apr.rebuild(events) == trajectory
            return trajectory

    return await asyncio.gather(*map(one, range(count)))


def recomputed_tokens(trajectory: apr.Trajectory) -> list[int]:
    """For each request after results of tools: the tokens before these that the engine has computed once more."""
    recomputed = []
    for span in trajectory.spans:
        follows = any(trajectory.spans[parent].role == "observation" for parent in span.parents)
        if follows and span.call is not None:
            request = trajectory.calls[span.call]
            if request.cached_tokens is not None:
                recomputed.append(request.prompt_tokens - request.new_tokens - request.cached_tokens)
    return recomputed


def all_valid(server: Server, dialect: str, parser: str, count: int, **options: Any) -> tuple[int, int]:
    """Check trajectories. Returns how many calls they have, and how many of these branches made."""
    trajectories = with_engine(server, lambda engine: run_many(engine, dialect, parser, count, **options))
    calls = sum(check(t, parser) for t in trajectories)
    for t in trajectories:
        assert sum(s.tokens for s in t.reply) <= 600 + 600 * (t.dialect == "spawn")
    again = [tokens for t in trajectories for tokens in recomputed_tokens(t)]
    assert again
    assert sum(tokens > 1 for tokens in again) <= 0.05 * len(again), sorted(again)[-20:]
    return calls, sum(bool(c.path) for t in trajectories for c in t.tool_calls)


def test_branches_of_the_fork_command_call_tools(tool_server: Server, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "fork_tools.py").write_text("def count(n: bool) -> str:\n    return 'three'\n")
    (tmp_path / "report.txt").write_text("The bridge was built in 1931. " * 10)
    monkeypatch.chdir(tmp_path)
    command = (
        f"fork --url {tool_server.url} --context report.txt --task Risks? --task Costs? "
        "--tool fork_tools:count --tool-choice required --budget tokens=400,tool_calls=2"
    ).split()
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [call["name"] for result in results for call in result["tool_calls"]] == ["count", "count"]
    assert main([*command, "--tool-choice", "cuont"]) == 1
    assert "expected auto, none, required, or a tool: count" in capsys.readouterr().err


def test_calls_are_valid_and_fit(tool_server: Server):
    calls, of_branches = all_valid(tool_server, "threadweaver", "qwen25", 12)
    assert calls
    assert of_branches


@pytest.mark.slow
def test_branches_with_tools_join_in_the_cache(tool_server: Server):
    calls, of_branches = all_valid(tool_server, "multiverse", "qwen25", 60, join="kv", mode="parallel")
    print(f"multiverse, joined in the cache: {calls} calls, {of_branches} of branches")
    assert of_branches > 5


class Steered:
    """An engine that makes branches call a tool at once, but not the trunk, nor those whose number is in `silent`."""

    def __init__(self, engine: apr.HttpEngine, silent: str = "") -> None:
        self._engine, self._silent = engine, silent
        self._call = engine.tokenizer.special_token_id("<tool_call>")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def fork(self, request: apr.Request, size: int) -> Any:
        result, _ = await self._engine.fork(request, size)
        return result, [self] * size

    async def decode(self, request: apr.Request, on_tokens: Any = None) -> apr.Result:
        text = self._engine.tokenizer.decode(request.input_ids)
        number = text[-2:-1] if text.endswith(":") else ""
        bias = 100 if number and number not in self._silent else -100
        biases = {str(self._call): bias}
        if number and number in self._silent:
            biases[str(self._engine.tokenizer.special_token_id("</Thread>"))] = -100  # it writes to its limit
        sampling = {**request.sampling, "logit_bias": biases}
        return await self._engine.decode(
            apr.Request(
                request.rid, request.input_ids, request.max_tokens, sampling, request.grammar, request.stop_ids,
                request.stop, fields=request.fields,
            ),
            on_tokens,
        )  # fmt: skip


FOUR = {
    "mode": "parallel",
    "max_blocks": 1,
    "min_width": 4,
    "budget": {"tokens": 1200, "width": 4, "tool_calls": 4, "branch_tokens": 120, "outline_chars": 8},
    "parallel_tool_calls": False,
    "temperature": 1.0,
}


def nap(kind: Literal["a"]) -> str:
    """Take a second."""
    time.sleep(1.0)
    return "rested"


@pytest.mark.slow
def test_four_tools_of_a_second_take_little_more_than_one(tool_server: Server):
    async def measure(engine: apr.HttpEngine) -> tuple[apr.Trajectory, list[tuple[float, apr.Event]]]:
        events: list[tuple[float, apr.Event]] = []
        steered: Any = Steered(engine)
        options: Any = FOUR
        await apr.areason(steered, MESSAGES, "threadweaver", tools=[nap], **options)  # grammars are compiled
        trajectory = await apr.areason(
            steered, MESSAGES, "threadweaver", tools=[nap],
            on_event=lambda event: events.append((time.monotonic(), event)), **options,
        )  # fmt: skip
        return trajectory, events

    trajectory, events = with_engine(tool_server, measure)
    assert [c.outcome for c in trajectory.tool_calls] == ["ok"] * 4
    called = [at for at, event in events if isinstance(event, apr.ToolCalled)]
    returned = [at for at, event in events if isinstance(event, apr.ToolReturned)]
    wall = max(returned) - min(called)
    print(f"four tools of one second: {wall:.2f} s")
    assert wall <= 1.3


@pytest.mark.slow
def test_a_sibling_decodes_while_a_tool_runs(tool_server: Server):
    async def measure(engine: apr.HttpEngine) -> list[tuple[float, apr.Event]]:
        events: list[tuple[float, apr.Event]] = []
        steered: Any = Steered(engine, silent="4")
        options: Any = FOUR
        await apr.areason(
            steered, MESSAGES, "threadweaver", tools=[nap],
            on_event=lambda event: events.append((time.monotonic(), event)), **options,
        )  # fmt: skip
        return events

    events = with_engine(tool_server, measure)
    start = min(at for at, event in events if isinstance(event, apr.ToolCalled))
    end = max(at for at, event in events if isinstance(event, apr.ToolReturned))
    meanwhile = [
        event
        for at, event in events
        if start < at < end and isinstance(event, apr.Delta) and event.path == (1, 4)
    ]
    print(f"{len(meanwhile)} pieces of text of branch 4 while three tools ran")
    assert len(meanwhile) >= 5


@pytest.mark.slow
def test_a_tool_that_never_returns_costs_its_branch_alone(tool_server: Server):
    release = threading.Event()

    def hang(kind: Literal["a"]) -> str:
        """Never return."""
        if not first.is_set():
            first.set()
            release.wait(60)
        return "fine"

    first = threading.Event()

    async def measure(engine: apr.HttpEngine) -> apr.Trajectory:
        steered: Any = Steered(engine)
        options: Any = {**FOUR, "budget": {**FOUR["budget"], "tool_seconds": 2}}  # type: ignore[dict-item]
        return await apr.areason(steered, MESSAGES, "threadweaver", tools=[hang], **options)

    trajectory = with_engine(tool_server, measure)
    release.set()
    assert sorted(c.outcome for c in trajectory.tool_calls) == ["ok", "ok", "ok", "timeout"]
    assert len(trajectory.blocks[0].branches) == 4
    assert trajectory.wall_s < 20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "join"), [("threadweaver", "text"), ("multiverse", "kv")])
def test_training_trees_have_the_log_probabilities_of_the_server(tool_server: Server, name: str, join: str):
    """Of calls in the trunk and in branches, of calls that were cut, and of what follows results."""
    path = requests.get(f"{tool_server.url}/server_info", timeout=60).json()["model_path"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    budget = {"tokens": 600, "width": 3, "tool_calls": 9, "tool_result_tokens": 48, "outline_chars": 8}

    replay = MaskReplay(path, model.config.vocab_size)

    async def run(seed: int) -> tuple[apr.Trajectory, RecordedGrammars]:
        async with await RecordingEngine.connect(tool_server.url) as engine:
            trajectory = await apr.areason(
                engine, [{"role": "user", "content": f"Question {seed}?"}], name, tools=[search, plot], join=join, logprobs=True,
                temperature=1.0, mode="parallel", policy="all", min_width=2, budget=budget, seed=seed,
            )  # fmt: skip
            return trajectory, engine.grammars

    missing = {"trunk", "branch"}
    for seed in range(32):
        trajectory, grammars = asyncio.run(run(seed))
        callers = {"branch" if c.path else "trunk" for c in trajectory.tool_calls if c.outcome == "ok"}
        if not callers & missing:
            continue
        missing -= callers
        assert all(joined.by == "kv" for joined in trajectory.joins)
        found = build_training_tree([trajectory], eos=model.config.eos_token_id)
        assert len(found.sources) == sum(call.output_tokens for call in trajectory.calls)
        roles = {trajectory.spans[span].role for span in found.spans.tolist()}
        assert "call" in roles
        assert "observation" not in roles
        samples = make_policy_samples(trajectory, {s.path: 1.0 for s in trajectory.spans}, replay, grammars)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        update = update_policy(model, optimizer, [[samples]], replay, Updates(), temperature=1.0)
        assert update.logprob_error < 1e-3
        if not missing:
            break
    assert not missing, "calls that were compared"


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_200_of_200_trajectories_are_valid(tool_server: Server, dialect: str, parser: str):
    calls, of_branches = all_valid(tool_server, dialect, parser, 200)
    print(f"{dialect} {parser}: {calls} calls, {of_branches} of branches")
    assert calls > 100
    assert of_branches > 20
