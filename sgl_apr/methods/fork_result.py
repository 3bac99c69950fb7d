"""What the branches of a fork returned, and the merge after them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sgl_apr.trajectory.blocks import Outcome, branch_outcome
from sgl_apr.trajectory.calls import Call
from sgl_apr.trajectory.spans import Finish, Path
from sgl_apr.trajectory.tool_calls import ToolCall
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """The tokens of one or more engine requests.

    Attributes:
        prompt_tokens: Tokens of the first prompt.
        cached_tokens: Of these, the tokens that were in the cache. None if the engine did not report them.
        output_tokens: Tokens that were decoded, in all requests.
    """

    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0

    @classmethod
    def of_calls(cls, calls: Sequence[Call]) -> TokenUsage:
        """The usage of the calls of one sequence, in the order of time."""
        if not calls:
            return cls()
        decoded = sum(call.output_tokens for call in calls)
        return cls(calls[0].prompt_tokens, calls[0].cached_tokens, decoded)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one branch of a fork, or the merge, returned.

    Attributes:
        name: The name of the task.
        text: What it wrote after its last call of a tool, without a stop text.
        finish: How it ended: "stop" by itself or at a stop text, "length" at a limit of tokens or calls, "timeout",
            "aborted" by the policy, or "failed".
        usage: Its tokens.
        tool_calls: The tools that it called.
        path: Its path in the trajectory.
    """

    name: str
    text: str
    finish: Finish
    usage: TokenUsage = TokenUsage()
    tool_calls: tuple[ToolCall, ...] = ()
    path: Path = ()

    @property
    def outcome(self) -> Outcome:
        """How it ended, with "ok" for a branch that ended by itself."""
        return branch_outcome(self.finish) or "ok"

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself."""
        return self.finish in ("stop", "eos")


@dataclass(frozen=True, slots=True)
class ForkResult:
    """The result of a fork of a context.

    Attributes:
        results: What each task returned, in their order. Also those that were cut, and those that failed.
        merge: What the merge returned, None without one.
        shared_tokens: Tokens that the prompts of all branches have in common, and that were computed once.
        trajectory: Everything that happened: the prompt, a branch for each task, and the merge.
    """

    results: tuple[TaskResult, ...]
    merge: TaskResult | None
    shared_tokens: int
    trajectory: Trajectory = field(repr=False)  # it is long: a span for each text, with its token ids

    @property
    def merged(self) -> str | None:
        """The text of the merge, None without one."""
        return None if self.merge is None else self.merge.text

    @property
    def answer(self) -> str:
        """The text of the merge. Without one, the texts of the branches that ended by themselves, after one another."""
        if self.merge is not None:
            return self.merge.text
        return "\n\n".join(result.text for result in self.results if result.is_complete)

    @property
    def usage(self) -> TokenUsage:
        """The tokens of all branches and of the merge. What they share counts once as a prompt."""
        usages = [result.usage for result in (*self.results, *((self.merge,) if self.merge else ()))]
        prompt = self.shared_tokens + sum(max(0, u.prompt_tokens - self.shared_tokens) for u in usages)
        first = next((call for call in self.trajectory.calls if call.phase == "commit"), None)
        cached = first.cached_tokens if first else None
        return TokenUsage(prompt, cached, sum(usage.output_tokens for usage in usages))

    @property
    def min_cached_share(self) -> float:
        """The lowest share of the common tokens that a branch found in the cache.

        The last token of a prompt is always computed. Branches that sent no request do not count.
        """
        expected = max(1, self.shared_tokens - 1)
        cached = [r.usage.cached_tokens for r in self.results if r.usage.cached_tokens is not None]
        return min((min(1.0, tokens / expected) for tokens in cached), default=0.0)

    def __getitem__(self, name: str) -> TaskResult:
        """The result of the task with this name.

        Raises:
            KeyError: No task has it.
        """
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(
            f"no result {name!r}, expected one of {', '.join(result.name for result in self.results)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can express: the response of `/apr/fork`."""
        return {
            "results": [_result_dict(result) for result in self.results],
            "merge": _result_dict(self.merge) if self.merge else None,
            "answer": self.answer,
            "shared_tokens": self.shared_tokens,
            "usage": asdict(self.usage),
            "trajectory": json.loads(self.trajectory.to_json()),
        }


def _result_dict(result: TaskResult) -> dict[str, Any]:
    return {**asdict(result), "outcome": result.outcome}


def render_results(results: Sequence[TaskResult], outlines: Sequence[str]) -> str:
    """Return results as the text that a merge reads: number, name and text of each, and a note where one was cut.

    Args:
        results: The results.
        outlines: What their tasks were.

    Examples:
        >>> results = [TaskResult("1", "None.", "stop"), TaskResult("2", "", "failed")]
        >>> print(render_results(results, ["List the risks.", "List the costs."]))
        Result 1 (List the risks.):
        None.
        <BLANKLINE>
        Result 2 (List the costs.):
        (failed)
    """
    pairs = enumerate(zip(results, outlines, strict=True), 1)
    return "\n\n".join(f"Result {k} ({outline}):\n{result_text(result)}" for k, (result, outline) in pairs)


def result_text(result: TaskResult) -> str:
    """Return the text of a result with a note where it was cut, or in place of it where it failed."""
    if result.finish == "failed":
        return "(failed)"
    notes = {"length": "(cut off)", "timeout": "(cut off: out of time)", "aborted": "(cut off)"}
    return "\n".join(filter(None, (result.text.strip(), notes.get(result.finish, "")))) or "(empty)"
