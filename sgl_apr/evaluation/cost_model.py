"""What an engine takes for a prompt and for a step of so many requests, and what forks gain by that; nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sgl_apr.engine.base import Load
from sgl_apr.errors import AprError
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.trajectory import Trajectory

EPSILON = 1e-9  # of a second, or of a step: what rounding leaves


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of an engine that does nothing else.

    request_s: of any request. prefill_s: of a token of a prompt that is not in the cache. steps: (requests that decode,
    seconds of their step), ascending, as `Load.steps`.
    """

    request_s: float
    prefill_s: float
    steps: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if len(self.steps) < 2 or sorted(dict(self.steps).items()) != list(self.steps):
            raise AprError(f"steps of {self.steps}, expected two numbers of requests or more, ascending")

    def step_s(self, running: int) -> float:
        """Of a step of so many requests, by those that were measured next to it."""
        return Load(0, 0, 0, 0, steps=self.steps).step_s(running) or 0.0

    def to_json(self) -> str:
        """One JSON object, read back by `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cost:
        """The one that `to_json` wrote; raises `AprError` for anything else."""
        try:
            data = json.loads(text)
            steps = tuple((float(running), float(seconds)) for running, seconds in data["steps"])
            return cls(float(data["request_s"]), float(data["prefill_s"]), steps)
        except (ValueError, KeyError, TypeError) as error:
            raise AprError(f"no cost of an engine: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Gain:
    """Seconds of a trajectory: as one request that writes all of it in a line, as its forks should take, and as it took."""

    sequential_s: float
    parallel_s: float
    took_s: float


def predict_speedup(trajectory: Trajectory, cost: Cost) -> Gain:
    """What the forks of a trajectory should gain on an engine of that cost with nothing else to do.

    In a line every token is computed once. With forks what the cache did not hold is, too, whenever it was, and calls
    that do not wait for one another run at once: prompts one after another, decoding in steps of all.
    """
    calls = trajectory.calls
    prompts = sum(call.new_tokens for call in calls) * cost.prefill_s
    decoding = sum(call.output_tokens for call in calls) * cost.step_s(1)
    in_a_line = cost.request_s + prompts + decoding if calls else 0.0
    return Gain(in_a_line, _side_by_side(calls, _needs(trajectory), cost), trajectory.wall_s)


def _side_by_side(calls: Sequence[Call], needs: Sequence[set[int]], cost: Cost) -> float:
    """When the last of the calls ends, if each begins when those that it needs have ended."""
    now, waiting, over = 0.0, set(range(len(calls))), set[int]()
    prompts, decoding = (
        dict[int, float](),
        dict[int, float](),
    )  # seconds alone, and steps, that are left of each
    while waiting or prompts or decoding:
        ready = {i for i in waiting if needs[i] <= over}
        waiting -= ready
        prompts |= {i: cost.request_s + _computed(calls[i]) * cost.prefill_s for i in ready}
        slower, step = len(prompts), cost.step_s(len(decoding))
        ends = [left * slower for left in prompts.values()] + [left * step for left in decoding.values()]
        now += (wait := min(ends))
        prompts = {i: left - wait / slower for i, left in prompts.items()}
        decoding = {i: left - wait / step if step else 0.0 for i, left in decoding.items()}
        begun = {i for i, left in prompts.items() if left <= EPSILON}
        prompts = {i: left for i, left in prompts.items() if i not in begun}
        over |= {i for i, left in decoding.items() if left <= EPSILON}
        decoding = {i: left for i, left in decoding.items() if i not in over}
        decoding |= {i: float(calls[i].output_tokens) for i in begun}
    return now


def _computed(call: Call) -> int:
    return call.new_tokens if call.cached_tokens is None else call.prompt_tokens - call.cached_tokens


def _needs(trajectory: Trajectory) -> list[set[int]]:
    """Calls that have to end before each: those that wrote what it sees or waited for. No span says what a commit sees:
    it stands between the calls of its sequence, and those of its branches."""
    calls = trajectory.calls
    needs: list[set[int]] = [set() for _ in calls]
    last = list[set[int]]()  # behind each span: the calls that end last
    for span in trajectory.spans:
        known = set[int]().union(*(last[p] for p in (*span.parents, *span.waits_for)))
        if span.call is None or not 0 <= span.call < len(calls):
            last.append(known)
        else:
            needs[span.call] |= known
            last.append({span.call})
    for i, call in enumerate(calls):
        for j, other in enumerate(calls[:i]):
            if "commit" in (call.phase, other.phase) and _related(call.path, other.path):
                needs[i].add(j)
    # Calls are in the order of their ends.
    return [{j for j in found if j < i} for i, found in enumerate(needs)]


def _related(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]
