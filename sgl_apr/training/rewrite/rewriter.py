"""A trace of thought in a line, made into one with forks: what of it is independent, and how that is written; no I/O.

Questions are put to a language model (`Asker`), each with a JSON schema for its answer: where steps begin; which earlier
steps each needs; how a branch is put so that it does not speak of the others of its fork; what the fork says
of it beforehand; and what they came to, where a dialect wants that said. All else is decided here.
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
    """The schema of an answer that says of every line whether a step begins there."""
    return _object_schema(
        "begins", {"type": "array", "items": {"type": "boolean"}, "minItems": lines, "maxItems": lines}
    )


def dependency_schema(steps: int) -> dict[str, Any]:
    """The schema of an answer that lists for every step the earlier ones that it needs."""
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
        """Its answer to a prompt, which follows a JSON schema; raises an `EngineError` where there is none."""
        ...


class RejectedTrace(AprError):
    """A trace that makes no trajectory; `reason` is one of a few, to be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True, slots=True)
class ReasoningStep:
    """A step of a line of thought: its text, and the places of the steps that it needs."""

    text: str
    needs: frozenset[int]


async def split_steps(trace: str, ask: JsonModel) -> list[ReasoningStep]:
    """The steps that a model finds in a trace; raises `Unusable` where its answers do not follow their schema."""
    lines = trace.strip().splitlines(keepends=True)
    if not 1 < len(lines) <= MAX_LINES:
        raise RejectedTrace(f"not 2 to {MAX_LINES} lines", f"{len(lines)}")
    numbered = "".join(f"{k}: {line}" for k, line in enumerate(lines, 1))
    where = await _request_value(ask, ASK_BEGINS + numbered, step_start_schema(len(lines)))
    if not (isinstance(where, list) and len(where) == len(lines) and all(isinstance(b, bool) for b in where)):
        raise RejectedTrace("an answer does not follow its schema", "begins")
    starts = [0, *(k for k, begin in enumerate(where) if begin and k)]
    texts = ["".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    numbered = "".join(f"{k}: {text}" for k, text in enumerate(texts, 1))
    lists = await _request_value(ask, ASK_NEEDS + numbered, dependency_schema(len(texts)))
    try:
        found = [frozenset(int(n) - 1 for n in own) for own in lists]
    except (TypeError, ValueError):
        found = []
    if len(found) != len(texts) or any(not 0 <= n < k for k, own in enumerate(found) for n in own):
        raise RejectedTrace("an answer does not follow its schema", "needs")
    return [ReasoningStep(text, own) for text, own in zip(texts, found, strict=True)]


def plan_forks(steps: Sequence[ReasoningStep]) -> list[int | list[list[int]]]:
    """The places of the steps, in order: each by itself, or a fork of branches, which are lists of places.

    A fork takes in as many steps that follow one another as it can: a step joins the branch of what it needs
    within the fork, opens one of its own if it needs nothing there, and ends the fork if it needs two branches.
    The last step, which has the answer, is in none.
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
    trace: str, ask: JsonModel, to: Dialect, tokenizer: Tokenizer | None = None, *, width: int = 8
) -> Trajectory:
    """The same line of thought with forks, in a dialect whose branches see what is before the fork.

    Raises `Unusable` with a reason to be counted: nothing in it is independent of the rest, a fork is wider
    than `width`, or what the model wrote is no reply of the dialect.
    """
    if to.branch_context == "message" or to.asynchronous:
        raise AprError(
            f"{to.name}: expected a dialect whose branches see the text before the fork, and are awaited"
        )
    steps = await split_steps(trace, ask)
    plan = plan_forks(steps)
    found = [item for item in plan if not isinstance(item, int)]
    if not found:
        raise RejectedTrace("no independent parts")
    if widest := max(map(len, found)) if max(map(len, found)) > width else 0:
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
                    " ".join((await _request_text(ask, ASK_OUTLINE + text, OUTLINE)).split())
                    for text in texts
                ]
                if "outline" in to.grammar.rules
                else [""] * len(texts),
                branches=[["\n" + await _request_text(ask, ASK_TEXT + text, TEXT) + "\n"] for text in texts],
                conclusion=await _request_text(ask, ASK_CONCLUSION + "\n".join(texts), TEXT)
                if conclusion_support(to.grammar)[1]
                else "",
            )
        )
    try:
        return to.parse(render_blocks(items, to), tokenizer)
    except (ConversionError, TraceError) as error:
        raise RejectedTrace("not in the dialect", str(error)) from None


async def _request_value(ask: JsonModel, prompt: str, schema: Mapping[str, Any]) -> Any:
    """The one entry of an answer."""
    (name,) = schema["required"]
    try:
        return json.loads(await ask(prompt, schema))[name]
    except (ValueError, KeyError, TypeError) as error:
        raise RejectedTrace("an answer does not follow its schema", f"{name}: {error!r}") from None


async def _request_text(ask: JsonModel, prompt: str, schema: Mapping[str, Any]) -> str:
    said = await _request_value(ask, prompt, schema)
    if not isinstance(said, str) or not said.strip():
        raise RejectedTrace("an answer does not follow its schema", "expected a text")
    return said.strip()
