"""Rewrite a sequential trace of thought into one with forks.

A language model (`JsonModel`) answers questions, each with a JSON schema: where steps begin; which earlier steps each step
needs; the text of a branch without references to the other branches of its fork; its outline; and the conclusion of the
fork, if the dialect has one. All else is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sgl_apr.errors import AprError, ConversionError, TraceError
from sgl_apr.formats.conversion import BlockDraft, conclusion_support, render_blocks
from sgl_apr.formats.dialects import Dialect
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.trajectory import Trajectory

MAX_OUTLINE_CHARS = 120
MAX_LINES = 400


def _object_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": {name: schema}, "required": [name], "additionalProperties": False
    }  # fmt: skip


def step_start_schema(lines: int) -> dict[str, Any]:
    """The schema of an answer that has one boolean per line: whether a step begins there."""
    return _object_schema(
        "begins", {"type": "array", "items": {"type": "boolean"}, "minItems": lines, "maxItems": lines}
    )


def dependency_schema(steps: int) -> dict[str, Any]:
    """The schema of an answer that lists for every step the earlier steps that it needs."""
    lists = [
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": max(1, k)},
            "maxItems": min(k, 8),
        }
        for k in range(steps)
    ]
    return _object_schema("needs", {"type": "array", "prefixItems": lists, "items": False, "minItems": steps})


TEXT = _object_schema("text", {"type": "string", "minLength": 1, "maxLength": 4000})
OUTLINE = _object_schema("outline", {"type": "string", "minLength": 1, "maxLength": MAX_OUTLINE_CHARS})
ASK_BEGINS = """\
Below is a line of thought with numbered lines. Say of every line whether a new step of it begins there.

"""
ASK_NEEDS = """\
Below is a line of thought in numbered steps. List for each step the numbers of the earlier steps whose results it needs; \
the list is empty for a step that needs none of them.

"""
ASK_TEXT = """\
Rewrite the following part of a line of thought so that it can be read without the other parts beside it: do not refer \
to them, keep every number and result, and add nothing.

"""
ASK_CONCLUSION = """\
Below are parts of a line of thought. Say in one short line what they have found.

"""
ASK_OUTLINE = """\
Say in one short line what the following part of a line of thought sets out to do, without its result.

"""


class JsonModel(Protocol):
    """A language model that answers in JSON."""

    async def __call__(self, prompt: str, schema: Mapping[str, Any]) -> str:
        """Answer a prompt with JSON that follows a schema.

        Raises:
            EngineError: If there is no answer.
        """
        ...


class RejectedTrace(AprError):
    """A trace that cannot be rewritten.

    Attributes:
        reason: One of a few reasons, to be counted.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True, slots=True)
class ReasoningStep:
    """A step of a trace.

    Attributes:
        text: Its text.
        needs: Indices of the earlier steps that it needs.
    """

    text: str
    needs: frozenset[int]


async def split_steps(trace: str, model: JsonModel) -> list[ReasoningStep]:
    """Split a trace into the steps that a model finds in it.

    Raises:
        RejectedTrace: If the model's answers do not follow their schema, or the trace has too many or too few lines.
    """
    lines = trace.strip().splitlines(keepends=True)
    if not 1 < len(lines) <= MAX_LINES:
        raise RejectedTrace(f"not 2 to {MAX_LINES} lines", f"{len(lines)}")
    numbered = "".join(f"{k}: {line}" for k, line in enumerate(lines, 1))
    begins = await _request_value(model, ASK_BEGINS + numbered, step_start_schema(len(lines)))
    if (
        not isinstance(begins, list)
        or len(begins) != len(lines)
        or not all(isinstance(b, bool) for b in begins)
    ):
        raise RejectedTrace("an answer does not follow its schema", "begins")
    starts = [0, *(k for k, begin in enumerate(begins) if begin and k)]
    texts = ["".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    numbered = "".join(f"{k}: {text}" for k, text in enumerate(texts, 1))
    lists = await _request_value(model, ASK_NEEDS + numbered, dependency_schema(len(texts)))
    try:
        needs = [frozenset(int(n) - 1 for n in numbers) for numbers in lists]
    except (TypeError, ValueError):
        needs = []
    if len(needs) != len(texts) or any(not 0 <= n < k for k, own in enumerate(needs) for n in own):
        raise RejectedTrace("an answer does not follow its schema", "needs")
    return [ReasoningStep(text, own) for text, own in zip(texts, needs, strict=True)]


def plan_forks(steps: Sequence[ReasoningStep]) -> list[int | list[list[int]]]:
    """Group the steps, in order: each is a step of the trunk, or belongs to a branch of a fork.

    A fork takes as many consecutive steps as it can. A step joins the branch of what it needs within the fork, starts a new
    branch if it needs nothing there, and ends the fork if it needs two branches. The last step, which has the answer, stays in the
    trunk.

    Returns:
        Indices of steps; a fork is a list of branches, which are lists of indices.
    """
    plan: list[int | list[list[int]]] = []
    at = 0
    while at < len(steps):
        branches: list[list[int]] = []
        until = at
        while until < len(steps) - 1:
            touched = [b for b in branches if steps[until].needs & set(b)]
            if len(touched) > 1:
                break
            if touched:
                touched[0].append(until)
            else:
                branches.append([until])
            until += 1
        if len(branches) > 1:
            plan.append(branches)
            at = until
        else:
            plan.append(at)
            at += 1
    return plan


async def parallelize(
    trace: str, model: JsonModel, dialect: Dialect, tokenizer: Tokenizer | None = None, *, width: int = 8
) -> Trajectory:
    """Rewrite a trace with forks, in a dialect whose branches see the text before the fork.

    Args:
        trace: The sequential trace.
        model: Answers questions about it.
        dialect: Dialect of the result.
        tokenizer: Adds token ids to the result.
        width: Branches of a fork at most.

    Raises:
        AprError: If the dialect's branches get a message, or are not awaited.
        RejectedTrace: If nothing in the trace is independent of the rest, a fork is too wide, or the result is not valid in
            the dialect.
    """
    if dialect.branch_context == "message" or dialect.asynchronous:
        raise AprError(
            f"{dialect.name}: expected a dialect whose branches see the text before the fork, and are awaited"
        )
    steps = await split_steps(trace, model)
    plan = plan_forks(steps)
    forks = [item for item in plan if not isinstance(item, int)]
    if not forks:
        raise RejectedTrace("no independent parts")
    if (widest := max(map(len, forks))) > width:
        raise RejectedTrace("a fork is too wide", f"{widest} branches")
    items: list[str | BlockDraft] = []
    for item in plan:
        if isinstance(item, int):
            items.append(steps[item].text)
            continue
        texts = ["".join(steps[k].text for k in branch) for branch in item]
        items.append(
            BlockDraft(
                outlines=[
                    " ".join((await _request_text(model, ASK_OUTLINE + text, OUTLINE)).split())
                    for text in texts
                ]
                if "outline" in dialect.grammar.rules
                else [""] * len(texts),
                branches=[
                    ["\n" + await _request_text(model, ASK_TEXT + text, TEXT) + "\n"] for text in texts
                ],
                conclusion=await _request_text(model, ASK_CONCLUSION + "\n".join(texts), TEXT)
                if conclusion_support(dialect.grammar)[1]
                else "",
            )
        )
    try:
        return dialect.parse(render_blocks(items, dialect), tokenizer)
    except (ConversionError, TraceError) as error:
        raise RejectedTrace("not in the dialect", str(error)) from None


async def _request_value(model: JsonModel, prompt: str, schema: Mapping[str, Any]) -> Any:
    """The value of the single entry of an answer."""
    (name,) = schema["required"]
    try:
        return json.loads(await model(prompt, schema))[name]
    except (ValueError, KeyError, TypeError) as error:
        raise RejectedTrace("an answer does not follow its schema", f"{name}: {error!r}") from None


async def _request_text(model: JsonModel, prompt: str, schema: Mapping[str, Any]) -> str:
    text = await _request_value(model, prompt, schema)
    if not isinstance(text, str) or not text.strip():
        raise RejectedTrace("an answer does not follow its schema", "expected a text")
    return text.strip()
