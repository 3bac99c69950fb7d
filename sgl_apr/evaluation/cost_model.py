"""Predict how long a trajectory takes on an engine, with and without its forks, from the measured cost of that engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sgl_apr.engine.base import Load
from sgl_apr.errors import AprError, TraceError
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.strict_json import read_strictly
from sgl_apr.trajectory.tool_calls import called_tools
from sgl_apr.trajectory.trajectory import Trajectory

EPSILON = 1e-9  # seconds or steps; a smaller remainder is rounding error


@dataclass(frozen=True, slots=True)
class EngineCost:
    """Seconds that an engine takes while it serves nothing else.

    Attributes:
        request_s: Overhead of every request.
        prefill_s: One prompt token that is not in the cache.
        steps: (requests that decode together, seconds of one decoding step), ascending, as in `Load.steps`.
    """

    request_s: float
    prefill_s: float
    steps: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.steps) < 2 or sorted(dict(self.steps).items()) != list(self.steps):
            raise AprError(f"steps = {self.steps}, expected two batch sizes or more, ascending")

    def step_s(self, running: int) -> float:
        """Seconds of one decoding step of `running` requests, interpolated between the batch sizes that were measured."""
        return Load(0, 0, 0, 0, steps=self.steps).step_s(running) or 0.0

    def to_json(self) -> str:
        """One JSON object, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineCost:
        """Read what `to_json` wrote.

        Raises:
            AprError: If the text is anything else.
        """
        try:
            return read_strictly(cls, json.loads(text))
        except (ValueError, RecursionError, TraceError) as error:
            raise AprError(f"not the cost of an engine: {error}") from None


@dataclass(frozen=True, slots=True)
class SpeedupPrediction:
    """Seconds of one trajectory.

    Attributes:
        sequential_s: Predicted, if one request decodes all of it.
        parallel_s: Predicted, with its forks.
        took_s: Measured.
    """

    sequential_s: float
    parallel_s: float
    took_s: float


def seconds_per_token(few: tuple[int, float], many: tuple[int, float]) -> float:
    """Return the cost of one more token, from two measurements.

    Args:
        few: Tokens, and the seconds that they took with the overhead of their request.
        many: The same for more tokens.

    Returns:
        The slope of the line through both. Where noise hides it, because more tokens took no longer, what it is at most:
        the cost of a token if `many` had no overhead.
    """
    (fewer, shorter), (more, longer) = few, many
    return (longer - shorter) / (more - fewer) if longer > shorter else longer / more


def predict_speedup(trajectory: Trajectory, cost: EngineCost) -> SpeedupPrediction:
    """Predict what the forks of a trajectory gain on an engine that serves nothing else.

    Sequentially, every token is computed once. With forks, every prompt token that the cache did not hold is computed too.
    Calls that do not wait for each other run at the same time: their prompts one after another, their decoding in
    shared steps. Tools take the seconds that they took: sequentially all of them, one after another.
    """
    calls = trajectory.calls
    prompts = sum(call.new_tokens for call in calls) * cost.prefill_s
    decoding = sum(call.output_tokens for call in calls) * cost.step_s(1)
    tools = sum(call.seconds for call in trajectory.tool_calls)
    sequential_s = cost.request_s + prompts + decoding + tools if calls else 0.0
    parallel_s = _simulate_parallel(calls, _call_dependencies(trajectory), _tool_waits(trajectory), cost)
    return SpeedupPrediction(sequential_s, parallel_s, trajectory.wall_s)


def _simulate_parallel(
    calls: Sequence[Call], dependencies: Sequence[set[int]], tool_waits: Sequence[float], cost: EngineCost
) -> float:
    """Seconds until the last call ends, if each starts as soon as its dependencies have ended and their tools returned."""
    now, waiting, ended = 0.0, set(range(len(calls))), set[int]()
    tools = dict[int, float]()  # by call that waits for them: seconds until the last tool returns
    prefilling = dict[int, float]()  # by call: seconds left, as if it were prefilled alone
    decoding = dict[int, float]()  # by call: steps left
    while waiting or tools or prefilling or decoding:
        starting = {i for i in waiting if dependencies[i] <= ended}
        waiting -= starting
        tools |= {i: tool_waits[i] for i in starting}
        ready = {i for i, left in tools.items() if left <= EPSILON}
        tools = {i: left for i, left in tools.items() if i not in ready}
        prefilling |= {i: _seconds_before_decoding(calls[i], cost) for i in ready}
        sharing, step = len(prefilling), cost.step_s(len(decoding))
        ends = [left * sharing for left in prefilling.values()] + [left * step for left in decoding.values()]
        now += (elapsed := min([*ends, *tools.values()]))
        tools = {i: left - elapsed for i, left in tools.items()}
        prefilling = {i: left - elapsed / sharing for i, left in prefilling.items()}
        decoding = {i: left - elapsed / step if step else 0.0 for i, left in decoding.items()}
        prefilled = {i for i, left in prefilling.items() if left <= EPSILON}
        prefilling = {i: left for i, left in prefilling.items() if i not in prefilled}
        ended |= {i for i, left in decoding.items() if left <= EPSILON}
        decoding = {i: left for i, left in decoding.items() if i not in ended}
        decoding |= {i: float(calls[i].output_tokens) for i in prefilled}
    return now


def _seconds_before_decoding(call: Call, cost: EngineCost) -> float:
    """The overhead of a call's requests, those that continued it included, and the time of its prompt."""
    return cost.request_s * (1 + call.continuations) + _computed_prompt(call) * cost.prefill_s


def _computed_prompt(call: Call) -> int:
    """Prompt tokens that were computed rather than read from the cache."""
    return call.new_tokens if call.cached_tokens is None else call.prompt_tokens - call.cached_tokens


def _call_dependencies(trajectory: Trajectory) -> list[set[int]]:
    """For each call, the calls that must end before it: those that wrote what it sees or waits for.

    No span records what a commit sees, so a commit depends on the earlier calls of its own sequence and of its
    branches, and the later ones depend on it.
    """
    calls = trajectory.calls
    dependencies: list[set[int]] = [set() for _ in calls]
    last_calls = list[set[int]]()  # for each span, the last calls that lead to its end
    for span in trajectory.spans:
        before = set[int]().union(*(last_calls[p] for p in (*span.parents, *span.waits_for)))
        if span.call is None or not 0 <= span.call < len(calls):
            last_calls.append(before)
        else:
            dependencies[span.call] |= before
            last_calls.append({span.call})
    for i, call in enumerate(calls):
        for j, other in enumerate(calls[:i]):
            if "commit" in (call.phase, other.phase) and _is_prefix_of_other(call.path, other.path):
                dependencies[i].add(j)
    # Calls are listed in the order in which they ended.
    return [{j for j in earlier if j < i} for i, earlier in enumerate(dependencies)]


def _tool_waits(trajectory: Trajectory) -> list[float]:
    """For each call, the seconds of tools between the last calls before it and its start."""
    by_id = {tool_call.id: tool_call for tool_call in trajectory.tool_calls}
    waits = [0.0] * len(trajectory.calls)
    after = list[float]()  # for each span, the seconds of tools since the last call that leads to its end
    for span in trajectory.spans:
        before = max([after[p] for p in (*span.parents, *span.waits_for)], default=0.0)
        if span.call is not None and 0 <= span.call < len(waits):
            waits[span.call] = max(waits[span.call], before)
            before = 0.0
        called = called_tools(span, by_id) if span.role == "call" else []
        after.append(before + max([tool_call.seconds for tool_call in called], default=0.0))
    return waits


def _is_prefix_of_other(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]
