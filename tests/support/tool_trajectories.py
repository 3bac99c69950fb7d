"""Trajectories with calls of tools in their trunk and branches, made of documents without any."""

from __future__ import annotations

from dataclasses import replace

import sgl_apr as apr
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Path
from tests.support.example_documents import DOCUMENTS

ARGUMENTS = '{"query": "tides & moons"}'
CALL = f'<tool_call>\n{{"name": "search", "arguments": {ARGUMENTS}}}\n</tool_call>'
CUT = '<tool_call>\n{"name": "sear'

INJECTED = ("lead", "header", "tail", "result")  # what the runtime writes around branches


def result_of(call_id: str) -> str:
    """What the tool returns."""
    return f"three hits for {call_id}"


def with_tools(trajectory: apr.Trajectory, tokenizer: Tokenizer, *, cut: bool = True) -> apr.Trajectory:
    """The same trajectory, in which every sequence calls tools in the middle of its first text.

    The trunk calls one, the first branch of a block two at once, whose results are two spans. In every other branch one call is
    cut by a limit (`cut`), so that the runtime closes the branch, and one fails. Calls of a trunk take 2 seconds, of a branch 1 second.

    Args:
        trajectory: A trajectory with token ids, without tools.
        tokenizer: Its tokenizer.
        cut: Whether calls are cut in some branches.
    """
    spans: list[apr.Span] = []
    tool_calls: list[apr.ToolCall] = []
    place: dict[int, int] = {}  # by old index: the span that what follows the old span follows now
    called = set[Path]()

    def add(span: apr.Span) -> int:
        spans.append(span)
        return len(spans) - 1

    def piece(
        like: apr.Span, role: apr.trajectory.Role, text: str, parent: int, label: str = "", **more: object
    ) -> int:
        origin = "injected" if role == "observation" else "decoded"
        ids = tuple(tokenizer.encode(text))
        call = like.call if origin == "decoded" else None
        return add(apr.Span(role, origin, text, ids, (parent,), like.path, label, call=call, **more))  # type: ignore[arg-type]

    def record(path: Path, outcome: apr.trajectory.ToolOutcome = "ok") -> str:
        number = sum(c.path == path for c in tool_calls) + 1
        name = f"call_{'.'.join(map(str, path)) or 'trunk'}_{number}"
        started, seconds = float(len(tool_calls)) / 8, 2.0 if not path else 1.0
        result, arguments = result_of(name), ARGUMENTS
        if outcome == "length":
            result, arguments, seconds = "", CUT, 0.0
        call = apr.ToolCall(name, path, "search", arguments, result, outcome, started, started + seconds)
        tool_calls.append(call)
        return name

    def observation(name: str) -> str:
        return f"<tool_response>\n{result_of(name)}\n</tool_response>\n"

    for i, span in enumerate(trajectory.spans):
        moved = span.with_references(
            tuple(place[p] for p in span.parents), tuple(place[w] for w in span.waits_for)
        )
        if span.role in INJECTED:
            moved = replace(moved, origin="injected", call=None)
        if cut and span.role == "closer" and span.path in called and span.path[-1] != 1:
            moved = replace(moved, origin="injected", finish=None, call=None)
        if span.role not in ("text", "body") or span.path in called or len(span.text) < 2:
            place[i] = add(moved)
            continue
        called.add(span.path)
        half = len(span.text) // 2
        first, rest = span.text[:half], span.text[half:]
        at = add(replace(moved, text=first, token_ids=tuple(tokenizer.encode(first)), label="", finish=None))
        if not span.path:
            name = record(())
            at = piece(span, "call", CALL, at, name)
            at = piece(span, "observation", observation(name), at, name)
        elif span.path[-1] == 1:
            names = record(span.path), record(span.path)
            at = piece(span, "call", CALL + CALL, at, " ".join(names))
            for name in names:
                at = piece(span, "observation", observation(name), at, name)
        else:
            name = record(span.path, "error")
            at = piece(span, "call", CALL, at, name)
            at = piece(span, "observation", observation(name), at, name)
        rest_ids = tuple(tokenizer.encode(rest))
        place[i] = add(replace(moved, text=rest, token_ids=rest_ids, parents=(at,)))
        if cut and span.path and span.path[-1] != 1:
            piece(span, "call", CUT, place[i], record(span.path, "length"), finish="length")
    return replace(trajectory, spans=tuple(spans), tool_calls=tuple(tool_calls))


def tool_trajectory(name: str, tokenizer: Tokenizer | None = None, *, cut: bool = True) -> apr.Trajectory:
    """The example document of a dialect after a prompt, with tools."""
    grammar = apr.dialect(name).grammar
    tokenizer = tokenizer or apr.ByteTokenizer(list(grammar.tag_literals))
    parsed = apr.dialect(name).parse(DOCUMENTS[name], tokenizer)
    prompt = "Question: "
    return with_tools(parsed.with_prompt(prompt, tuple(tokenizer.encode(prompt))), tokenizer, cut=cut)
