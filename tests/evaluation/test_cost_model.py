"""Engine costs, measured on an engine of known cost in virtual time, and the speedups predicted from them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

import sgl_apr as apr
from sgl_apr.cli.main import main
from sgl_apr.engine.scripted import ScriptedEngine
from sgl_apr.evaluation.cost_model import EngineCost, predict_speedup
from sgl_apr.evaluation.store import SUMMARY_FILE
from sgl_apr.evaluation.tasks.question import QuestionTask
from sgl_apr.evaluation.timing import BATCH_SIZES, EngineTimer
from sgl_apr.methods.registry import method
from sgl_apr.server.launch.launcher import Server
from sgl_apr.trajectory.calls import Call
from tests.runtime.tools.scripted_tools import call
from tests.support import virtual_time
from tests.support.threadweaver_traces import TRACE

KNOWN = EngineCost(
    0.004,
    0.0005,
    ((1.0, 0.01), (2.0, 0.012), (4.0, 0.015), (8.0, 0.02), (16.0, 0.03), (32.0, 0.05), (64.0, 0.09)),
)


class Timed(ScriptedEngine):
    """Takes the time of a known cost: for prompts, one after another, and for steps that all requests share."""

    def __init__(self, script: Any, tokenizer: Any = None, cost: EngineCost = KNOWN) -> None:
        super().__init__(script, tokenizer)
        self.cost, self.gate, self.decoding = cost, asyncio.Lock(), 0

    async def decode(self, request: apr.Request, on_tokens: Any = None) -> apr.Result:
        await self.prefill(request)
        result = await super().decode(request, on_tokens)
        self.decoding += 1
        for _ in result.token_ids:
            await asyncio.sleep(self.cost.step_s(self.decoding))
        self.decoding -= 1
        return result

    async def commit(self, request: apr.Request) -> apr.Result:
        await self.prefill(request)
        return await super().commit(request)

    async def prefill(self, request: apr.Request) -> None:
        async with self.gate:
            new = len(request.input_ids) - self._cached(request.input_ids)
            await asyncio.sleep(self.cost.request_s + new * self.cost.prefill_s)

    async def fork(self, request: apr.Request, size: int) -> tuple[apr.Result, Sequence[ScriptedEngine]]:
        self.forks.append(size)
        return await self.commit(request), [self] * size


def loop_time() -> float:
    return asyncio.get_running_loop().time()


def test_the_timer_measures_a_known_cost():
    watch = EngineTimer(Timed(lambda request, prompt: "x" * 100), loop_time)
    watch.random = random.Random(0)  # texts of letters as tokens now and then begin alike
    cost, took = virtual_time.run(watch.measure_cost())
    assert cost.prefill_s == pytest.approx(KNOWN.prefill_s, rel=0.02)
    assert cost.request_s == pytest.approx(KNOWN.request_s, rel=0.15)
    assert tuple(running for running, _ in cost.steps) == BATCH_SIZES[: len(cost.steps)]
    assert len(cost.steps) >= 5
    assert dict(cost.steps) == pytest.approx(dict(KNOWN.steps[: len(cost.steps)]), rel=0.15)
    assert took < 15


def test_a_slow_engine_gets_fewer_requests():
    slow = EngineCost(0.004, 0.0005, tuple((running, 50 * seconds) for running, seconds in KNOWN.steps))
    engine = Timed(lambda request, prompt: "x" * 100, cost=slow)
    cost, _ = virtual_time.run(EngineTimer(engine, loop_time).measure_cost())
    assert 2 <= len(cost.steps) < len(BATCH_SIZES)
    assert dict(cost.steps) == pytest.approx(dict(slow.steps[: len(cost.steps)]), rel=0.02)


class Noisy(Timed):
    """Takes seconds that have nothing to do with the number of tokens."""

    def __init__(self, seconds: Callable[[apr.Request], float]) -> None:
        super().__init__(lambda request, prompt: "x" * 100)
        self.seconds, self.cached_prompts = seconds, set[tuple[int, ...]]()

    async def decode(self, request: apr.Request, on_tokens: Any = None) -> apr.Result:
        await asyncio.sleep(self.seconds(request))
        self.cached_prompts.add(request.input_ids)
        return await ScriptedEngine.decode(self, request, on_tokens)

    async def commit(self, request: apr.Request) -> apr.Result:
        await asyncio.sleep(0.001 if request.input_ids in self.cached_prompts else self.seconds(request))
        return await ScriptedEngine.commit(self, request)


def test_measurements_that_noise_hides_cost_what_they_cost_at_most():
    """More tokens take no longer: all of the time is that of the tokens."""
    engine = Noisy(lambda request: 0.256)
    cost, _ = virtual_time.run(EngineTimer(engine, loop_time).measure_cost())
    assert cost.prefill_s == pytest.approx(0.256 / 512)
    assert cost.request_s == pytest.approx(0.256 - 16 * 0.256 / 512)
    assert dict(cost.steps) == pytest.approx({size: 0.256 / 5 for size, _ in cost.steps})
    # Long prompts are slower than in proportion: the overhead is that of a cached prompt.
    engine = Noisy(lambda request: 9.0 if len(request.input_ids) > 500 else 0.01)
    cost, _ = virtual_time.run(EngineTimer(engine, loop_time).measure_cost())
    assert (cost.prefill_s, cost.request_s) == (pytest.approx(8.99 / 496), pytest.approx(0.001))


def test_no_cost_is_zero_on_the_event_loop_that_sglang_installs(monkeypatch: pytest.MonkeyPatch):
    """Its clock counts whole milliseconds, and a scripted engine takes microseconds."""
    monkeypatch.setattr("sgl_apr.evaluation.timing.SWEEP_LIMIT_S", 0.05)
    engine = ScriptedEngine(lambda request, prompt: "x" * 100)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        cost = runner.run(EngineTimer(engine).measure_cost())
    assert min(cost.request_s, cost.prefill_s, *(seconds for _, seconds in cost.steps)) > 0


def test_a_context_too_short_to_time_is_an_error():
    engine = ScriptedEngine(lambda request, prompt: "")
    engine.context = 32
    with pytest.raises(apr.AprError, match="a context of 32 tokens, expected more than 80"):
        EngineTimer(engine)


def test_a_cost_round_trips_through_json():
    assert EngineCost.from_json(KNOWN.to_json()) == KNOWN
    for text in ("{", "[]", "{}", '{"request_s": 1, "prefill_s": 1, "steps": [[1]]}'):
        with pytest.raises(apr.AprError, match="not the cost of an engine"):
            EngineCost.from_json(text)
    for steps in ((), ((1.0, 0.1),), ((2.0, 0.1), (1.0, 0.1)), ((1.0, 0.1), (1.0, 0.2))):
        with pytest.raises(apr.AprError, match="two batch sizes or more"):
            EngineCost(0.0, 0.0, steps)


FORK = "Let me see.\n<Parallel>\n<Outlines>\n<Outline>1: one</Outline>\n<Outline>2: two</Outline>\n<Outline>3: three</Outline>\n</Outlines>"


def thinks(request: apr.Request, prompt: str) -> str:
    """Forks into three branches of different lengths, and concludes."""
    if "</Parallel>" in prompt:
        return " So it is 4, and that is all."
    for number in "123":
        if prompt.endswith(f"<Thread>\n{number}:"):
            return " words" * 10 * int(number) + "\n</Thread>"
    return FORK


def test_forks_take_as_long_as_predicted():
    engine = Timed(thinks, apr.ByteTokenizer(apr.dialect("threadweaver").tags))
    made, took = virtual_time.run(apr.areason(engine, "How many?", "threadweaver", pacing=None))
    assert len(made.blocks[0].branches) == 3
    found = predict_speedup(made, KNOWN)
    assert found.parallel_s == pytest.approx(took, rel=0.03)
    assert found.took_s == made.wall_s
    tokens, prompts = sum(c.output_tokens for c in made.calls), sum(c.new_tokens for c in made.calls)
    assert found.sequential_s == pytest.approx(KNOWN.request_s + tokens * 0.01 + prompts * 0.0005)
    assert found.sequential_s > 1.1 * found.parallel_s


def test_tools_take_as_long_as_predicted():
    """One second in the trunk, and one in each branch at the same time."""

    async def search(query: str) -> str:
        """Search."""
        await asyncio.sleep(1.0)
        return f"found {query}"

    def calls(request: apr.Request, prompt: str) -> str:
        asked = call("search", query="tides")
        if prompt.endswith("How many?"):
            return f"Hm. {asked}"
        if any(prompt.endswith(f"<Thread>\n{number}:") for number in "123"):
            return f" Hm. {asked}"
        if prompt.endswith("</tool_response>\n") and "<Thread>" in prompt:
            return " words\n</Thread>"
        return thinks(request, prompt)

    engine = Timed(calls, apr.ByteTokenizer(apr.dialect("threadweaver").tags))
    options = {
        "tools": [search],
        "tool_call_parser": "qwen25",
        "pacing": None,
        "budget": apr.Budget(tokens=6000),
    }
    made, took = virtual_time.run(apr.areason(engine, "How many?", "threadweaver", **options))
    assert [c.path for c in made.tool_calls] == [(), (1, 1), (1, 2), (1, 3)]
    # Trajectories have the real clock.
    timed = replace(made, tool_calls=tuple(replace(c, started=0.0, ended=1.0) for c in made.tool_calls))
    found = predict_speedup(timed, KNOWN)
    assert found.parallel_s == pytest.approx(took, rel=0.03)
    without = predict_speedup(replace(made, tool_calls=()), KNOWN)
    assert found.sequential_s == pytest.approx(without.sequential_s + 4)
    assert found.parallel_s == pytest.approx(without.parallel_s + 2, rel=0.03)


@pytest.mark.parametrize(
    "name", ["sequential", "self_consistency", "best_of_n", "tree_of_thoughts", "group_think"]
)
def test_methods_take_as_long_as_predicted(name: str):
    def says(request: apr.Request, prompt: str) -> str:
        return f"{'so ' * (10 + len(prompt) % 7)}\nScore: 7\nThe best choice is 1.\nAnswer: 4"

    engine = Timed(says)
    work = method(name)(
        engine, "How many?", task=QuestionTask(engine), budget=apr.Budget(tokens=3000), pacing=None
    )
    result, took = virtual_time.run(work)
    assert predict_speedup(result.trajectory, KNOWN).parallel_s == pytest.approx(took, rel=0.1)


def test_a_parsed_trajectory_costs_nothing():
    made = apr.dialect("threadweaver").parse(TRACE, tokenizer=apr.ByteTokenizer())
    found = predict_speedup(made, KNOWN)
    assert (found.sequential_s, found.parallel_s, found.took_s) == (0.0, 0.0, 0.0)


def test_calls_without_cache_counts_or_without_spans():
    call = Call("trunk", (), 100, None, 100, 10, 0.0, 1.0)
    (span,) = apr.dialect("threadweaver").parse("x", tokenizer=apr.ByteTokenizer()).spans
    made = apr.Trajectory((replace(span, call=7),), "threadweaver", (call, replace(call, cached_tokens=90)))
    found = predict_speedup(made, KNOWN)
    assert 2 * 0.004 + 110 * 0.0005 + 10 * 0.01 < found.parallel_s < 0.2, (
        "nothing says that one waits for the other"
    )


@pytest.mark.slow
@pytest.mark.server
def test_the_command_times_the_server(solver: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [
        "eval",
        "countdown",
        "game24",
        "--url",
        solver.url,
        "--limit",
        "1",
        "--methods",
        "apr,self_consistency",
    ]
    argv += ["--budget", "tokens=4096", "--cost-model", "-o", str(tmp_path), "--json"]
    assert main(argv) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    cost = EngineCost.from_json((tmp_path / "cost.json").read_text())
    assert [task["task"] for task in tasks] == ["countdown", "game24"]
    for task in tasks:
        assert EngineCost.from_json(json.dumps(task["cost"])) == cost
        kept = json.loads((tmp_path / task["task"] / SUMMARY_FILE).read_text())
        assert [row["method"] for row in kept["rows"]] == ["apr", "self_consistency"]
        for row in kept["rows"]:
            assert 0 < row["predicted_parallel_s"] <= row["predicted_sequential_s"] * 1.5
            assert row["took_s"] > 0
        sampled = kept["rows"][1]
        assert sampled["predicted_parallel_s"] < sampled["predicted_sequential_s"]
        assert 0 <= sampled["redundancy"] <= 1
    assert 0 < cost.step_s(8) < 8 * cost.step_s(1), "batching pays"
    assert 0 < cost.prefill_s < cost.step_s(1)
    assert main(argv) == 0
    assert EngineCost.from_json((tmp_path / "cost.json").read_text()) == cost, "it is read where it is"
