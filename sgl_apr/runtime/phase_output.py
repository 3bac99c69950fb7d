"""Parses what one phase decoded, and closes what was left open. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from sgl_apr.formats.completion import PLACEHOLDER
from sgl_apr.formats.dialects import BranchNumbering, Dialect, Phase
from sgl_apr.formats.segmenter import Outline, Segment
from sgl_apr.formats.token_split import split_token_ids
from sgl_apr.formats.tool_syntax import DecodedCall, ToolSyntax, ToolText
from sgl_apr.runtime.budget import Overhead
from sgl_apr.tokenizer import Tokenizer, truncate_tokens
from sgl_apr.trajectory.spans import Finish, Origin, Role

FAILURE_NOTE = " (failed)"  # what the model reads in place of what a failed branch would have written


class SpanDraft(NamedTuple):
    """A span that has no place in the graph yet."""

    role: Role
    origin: Origin
    text: str
    token_ids: tuple[int, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class PhaseOutput:
    """What a phase wrote, and what follows.

    Attributes:
        pieces: Its spans.
        finish: How it ended.
        forked: It forks.
        outlines: What the branches are to do, if the format says so.
        wait: The number of the branch that the trunk waits for, "" for all, None if it does not wait.
        calls: The tools that it calls. The last span holds all of them, and has the role "call".
        cut_call: It was cut inside a call. The last span holds what was decoded of the calls, and has the role "call".
    """

    pieces: tuple[SpanDraft, ...]
    finish: Finish
    forked: bool = False
    outlines: tuple[Outline, ...] = ()
    wait: str | None = None
    calls: tuple[DecodedCall, ...] = ()
    cut_call: bool = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All ids, decoded and injected, in order."""
        return tuple(i for piece in self.pieces for i in piece.token_ids)

    @property
    def is_final(self) -> bool:
        """Whether the sequence ends here: it neither forks, nor waits, nor calls a tool."""
        return not self.forked and self.wait is None and not self.calls


def parse_phase_output(
    dialect: Dialect,
    phase: Phase,
    numbering: BranchNumbering,
    context: tuple[int, ...],
    decoded: tuple[int, ...],
    cut: Finish | None,
    tokenizer: Tokenizer,
    *,
    completes_fork: bool = True,
    max_filler_tokens: int | None = None,
    tool_syntax: ToolSyntax | None = None,
    resumed: bool = False,
) -> PhaseOutput:
    """Parse what a phase decoded, and close by injection what was left open.

    Decoded ids are only split, never encoded again. A trailing end-of-text id is dropped, since whatever comes next
    writes its own. Text that leaves the dialect, possible only without the grammar, becomes one `malformed` span.

    Args:
        dialect: The format.
        phase: The grammar's phase.
        numbering: The numbers that the phase could write.
        context: The ids before it.
        decoded: The ids that the engine returned.
        cut: What ended the phase from outside: a limit, another branch, or a failure, which is noted in the text.
        tokenizer: Of the model.
        completes_fork: A fork that was cut off is completed. Else it is malformed, for which nothing is injected.
        max_filler_tokens: Tokens of the text that stands for a trunk in which nothing was decoded, or for a branch that
            failed.
        tool_syntax: The tools that the phase could call. Something that is not a call stays text.
        resumed: Whether the phase continued after the result of a tool, so that it began in its free text.
    """
    ended = bool(decoded) and decoded[-1] in tokenizer.eos_ids
    ids = decoded[:-1] if ended else decoded
    text = tokenizer.decode(ids, context)
    in_branch = phase in ("branch", "rejoin")
    if tool_syntax is not None and cut != "failed":
        written = tool_syntax.parse(text)
        before = None
        if written.start < len(text) and (written.complete or cut):
            before = _text_before_call(dialect, phase, numbering, text[: written.start], resumed)
        if before is not None:
            return _calls_output(before, written, cut, ids, text, tokenizer)
    if resumed and phase == "trunk" and not text and max_filler_tokens is not None and max_filler_tokens < 1:
        return PhaseOutput((), cut or "length")  # there is text before, so that none has to stand for it
    closing, segments = "", None
    if cut != "failed":
        segments = dialect.match_phase(phase, text, numbering, resumed=resumed)
    is_complete = segments is not None
    notes = [""]
    if cut == "failed" and (
        max_filler_tokens is None or len(tokenizer.encode(FAILURE_NOTE)) <= max_filler_tokens
    ):
        notes.insert(0, FAILURE_NOTE)
    for note in notes:
        if segments is None:
            closing = note + (dialect.complete_phase(phase, text + note, numbering, resumed=resumed) or "")
            if closing == PLACEHOLDER and phase == "trunk" and max_filler_tokens is not None:
                closing = truncate_tokens(tokenizer, PLACEHOLDER, max_filler_tokens) or PLACEHOLDER[0]
            segments = dialect.match_phase(phase, text + closing, numbering, resumed=resumed)
    fork = wait = None
    for segment in segments or ():
        if segment.role == "fork":
            fork = fork or segment
        elif segment.role == "wait":
            wait = wait or segment
    if segments is None or (closing and not completes_fork and (fork or wait)):
        draft = SpanDraft("body" if in_branch else "text", "decoded", text, ids)
        return PhaseOutput((draft,), "malformed")
    closes = bool(segments) and segments[-1].role in ("fork", "wait", "closer")
    # A phase that closed itself has stopped, whichever token the engine ended on. In a format without a closing tag a
    # branch stops where its text ends.
    stops = closes or (in_branch and ended and not dialect.grammar.closing_literal("body", "1"))
    finish: Finish = "stop" if is_complete and stops else cut or ("eos" if ended else "stop")
    pieces = tuple(_draft_spans(segments, text, ids, closing, tokenizer))
    return PhaseOutput(
        pieces, finish, fork is not None, fork.outlines if fork else (), wait.number if wait else None
    )


def _text_before_call(
    dialect: Dialect, phase: Phase, numbering: BranchNumbering, text: str, resumed: bool
) -> list[Segment] | None:
    """The segments of the text before a call; None if no call can stand after it: it does not end in free text."""
    probe = text + PLACEHOLDER
    closing = dialect.complete_phase(phase, probe, numbering, resumed=resumed)
    if closing is None:
        return None
    segments = dialect.match_phase(phase, probe + closing, numbering, resumed=resumed) or []
    for index, segment in enumerate(segments):
        if segment.end > len(text):  # it holds the placeholder
            if segment.role not in ("text", "body"):
                return None
            kept = [segment._replace(end=len(text))] if segment.start < len(text) else []
            return segments[:index] + kept
    return None


def _calls_output(
    before: list[Segment],
    written: ToolText,
    cut: Finish | None,
    ids: tuple[int, ...],
    text: str,
    tokenizer: Tokenizer,
) -> PhaseOutput:
    """The output of a phase that ends with calls, or was cut inside them."""
    segments = [*before, Segment("call", written.start, len(text))]
    pieces = tuple(_draft_spans(segments, text, ids, "", tokenizer))
    if written.complete:
        return PhaseOutput(pieces, "stop", calls=written.calls)
    return PhaseOutput(pieces, cut or "stop", cut_call=True)


def _draft_spans(
    segments: list[Segment], text: str, ids: tuple[int, ...], closing: str, tokenizer: Tokenizer
) -> list[SpanDraft]:
    """Segments with their ids. A segment that decoding left unfinished becomes a decoded and an injected span."""
    size, full = len(text), text + closing
    decoded = [s for s in segments if s.end <= size]
    rest = segments[len(decoded) :]
    if rest and rest[0].start < size:
        decoded.append(rest[0]._replace(end=size))
        rest = [rest[0]._replace(start=size), *rest[1:]]
    split = split_token_ids(ids, text, [s.end for s in decoded], tokenizer)
    drafts = [
        SpanDraft(s.role, "decoded", text[s.start : s.end], token_ids, s.label)
        for s, token_ids in zip(decoded, split, strict=True)
    ]
    for s in rest:
        written = full[s.start : s.end]
        drafts.append(SpanDraft(s.role, "injected", written, tuple(tokenizer.encode(written)), s.label))
    return drafts


@lru_cache(maxsize=256)
def closing_overhead(dialect: Dialect, tokenizer: Tokenizer, depth: int | None = None) -> Overhead:
    """What the runtime may have to inject to close a fork, at most.

    Args:
        dialect: The format.
        tokenizer: Counts the tokens.
        depth: How deep forks nest, at most. None for as deep as the format allows. The number of a branch is the longer the
            deeper it is.
    """

    def cost(text: str | None) -> int:
        return len(tokenizer.encode(text or ""))

    def cost_to_complete(phase: Phase, text: str = "") -> int:
        return cost(dialect.complete_phase(phase, text, numbering))

    grammar, by_message = dialect.grammar, dialect.branch_context == "message"
    number = str(dialect.first_number + dialect.max_width - 1)
    deepest = ".".join([number] * (depth or dialect.max_depth))
    numbering = BranchNumbering(
        prefix=deepest[: -len(number)], number="" if grammar.has_repetition("fork") else number
    )
    openings = [grammar.opening_literal(rule) for rule in ("fork", "wait")]
    fork = 0
    if "trunk" in grammar.rules:
        fork = max(cost_to_complete("trunk", o) + cost(o) for o in openings)
    header = result = ""
    if by_message:  # the branch has a prompt, and its result may name its outline
        name = "0" * grammar.max_name_chars("result")
        result = PLACEHOLDER + grammar.render_rule("result", deepest, PLACEHOLDER, name)
    else:
        header = grammar.render_rule("header", deepest, PLACEHOLDER)
    branch = cost(header) + cost_to_complete("branch") + cost(result)
    branch += cost(grammar.closing_literal("wait", number))
    join = cost(grammar.render_rule("lead")) + cost(grammar.render_rule("tail")) + cost_to_complete("after")
    join += max(cost_to_complete("after", tag) for tag in ("", *grammar.tag_literals))
    if "rejoin" in grammar.rules:
        join += cost_to_complete("rejoin")
    return Overhead(fork, branch, join)
