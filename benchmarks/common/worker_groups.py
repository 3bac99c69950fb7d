"""Groups of workers for the scheduler in this process, and the comparison of their tokens with transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.common.in_process_scheduler import SchedulerRun, make_request
from sgl_apr.engine.sglang_names import GROUP_PARAM
from tests.support.group_reference import group_think_rows, hogwild_rows

# In nats. Two tokens that are closer than this in float32 are equally likely for all that two implementations can tell.
TIE_TOLERANCE = 1e-4
# What a group must differ from: workers that do not see each other; Group Think without position ranges; Hogwild! whose
# queries are not turned to the blocks.
CONTROLS = {"group_think": ("blind", "no_ranges"), "hogwild": ("blind", "unturned")}


@dataclass(frozen=True, slots=True)
class WorkerGroupCase:
    """A group to run.

    Attributes:
        name: The name of the group, with which the ids of its requests begin.
        kind: "group_think" or "hogwild".
        prompt: Token ids that all workers have in common.
        headers: For each worker, the ids before it decodes.
        new_tokens: For each worker, how many tokens to decode at most.
        position_range: Positions of each worker (Group Think).
        step_end: Text that ends a block (Hogwild!).
        sampling: For each worker, other sampling parameters.
    """

    name: str
    kind: Literal["group_think", "hogwild"]
    prompt: Sequence[int]
    headers: Sequence[Sequence[int]]
    new_tokens: Sequence[int]
    position_range: int = 512
    step_end: str | None = None
    sampling: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def rid(self, worker: int) -> str:
        """The request id of a worker."""
        return f"{self.name}-{worker:02}"

    def requests(self, *, logprobs: bool = True) -> list[Any]:
        """The requests of all workers."""
        common: dict[str, Any] = {"kind": self.kind, "name": self.name, "workers": len(self.headers)}
        common["prompt_tokens"] = len(self.prompt)
        if self.kind == "group_think":
            common["position_range"] = self.position_range
        else:
            common["step_end"] = self.step_end
        return [
            make_request(
                self.rid(worker), [*self.prompt, *header], new, {GROUP_PARAM: common | {"worker": worker}}, logprobs,
                **self.sampling.get(worker, {}),
            )
            for worker, (header, new) in enumerate(zip(self.headers, self.new_tokens, strict=True))
        ]  # fmt: skip

    def due(self, first: int = 0, apart: int = 0) -> list[tuple[int, Any]]:
        """The requests with the rounds in which the scheduler receives them: `apart` rounds after one another."""
        return [(first + apart * worker, request) for worker, request in enumerate(self.requests())]

    def outputs(self, run: SchedulerRun) -> list[list[int]]:
        """What each worker has decoded. A worker that was aborted while it waited has decoded nothing."""
        return [
            [] if self.rid(w) in run.aborted else list(run.requests[self.rid(w)].output_ids_through_stop)
            for w in range(len(self.headers))
        ]


@dataclass(frozen=True, slots=True)
class GroupComparison:
    """How the tokens of a group compare with the reference.

    Attributes:
        equal: Tokens that are the reference's most likely ones, or tie with it.
        tokens: All tokens.
        first_difference: For each worker, the number of its first other token, or None.
        logprob_error: The largest difference of a token's log-probability, in nats; 0 if there are none.
        narrowest_lead: The smallest lead of a most likely token over the second, in nats.
    """

    equal: int
    tokens: int
    first_difference: tuple[int | None, ...]
    logprob_error: float
    narrowest_lead: float


def block_ends(tokenizer: Any, output: Sequence[int], step_end: str | None) -> list[int]:
    """The numbers of output tokens after which a block ends: as soon as its text contains `step_end`."""
    ends: list[int] = []
    for count in range(1, len(output) + 1):
        start = ends[-1] if ends else 0
        if step_end is not None and step_end in tokenizer.decode(output[start:count]):
            ends.append(count)
    return ends


def compare_group(
    case: WorkerGroupCase, run: SchedulerRun, model: Any, tokenizer: Any = None, control: str | None = None
) -> GroupComparison:
    """Compare a group's tokens with those of transformers, given the tokens before each.

    Args:
        case: The group.
        run: The run in which it was decoded.
        model: The same model, from `load_reference`.
        tokenizer: The model's tokenizer, for a group with `step_end`.
        control: One of `CONTROLS`, to compare with what the group must differ from.
    """
    outputs = case.outputs(run)
    rows = reference_rows(case, run, model, tokenizer, control)
    equal, errors, leads = 0, [0.0], [float("inf")]
    first: list[int | None] = []
    for worker, (output, row) in enumerate(zip(outputs, rows, strict=True)):
        if not output:
            first.append(None)
            continue
        top = row.topk(2, -1).values
        chosen = [float(row[place, token]) for place, token in enumerate(output)]
        same = [a >= float(b) - TIE_TOLERANCE for a, b in zip(chosen, top[:, 0], strict=True)]
        equal += sum(same)
        first.append(same.index(False) if False in same else None)
        leads.append(float((top[:, 0] - top[:, 1]).min()))
        computed = run.requests[case.rid(worker)].logprob
        if computed is not None:
            values = computed.output_token_logprobs_val[: len(output)]
            errors += [abs(float(a) - b) for a, b in zip(values, chosen, strict=True)]
    return GroupComparison(equal, sum(map(len, outputs)), tuple(first), max(errors), min(leads))


def reference_rows(
    case: WorkerGroupCase, run: SchedulerRun, model: Any, tokenizer: Any = None, control: str | None = None
) -> list[Any]:
    """The log-probabilities from which each worker's tokens are chosen. See `compare_group`."""
    outputs, blind = case.outputs(run), control == "blind"
    # A worker that was aborted while it waited is not there.
    waiting = [case.rid(worker) in run.aborted for worker in range(len(case.headers))]
    headers = [[] if gone else header for gone, header in zip(waiting, case.headers, strict=True)]
    if case.kind == "group_think" or control == "unturned":
        position_range = 0 if control in ("no_ranges", "unturned") else case.position_range
        return group_think_rows(model, case.prompt, headers, outputs, position_range, blind=blind)
    ends = [block_ends(tokenizer, output, case.step_end) for output in outputs]
    return hogwild_rows(model, case.prompt, headers, outputs, block_ends=ends, blind=blind)
