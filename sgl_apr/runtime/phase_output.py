"""What a phase wrote and what follows from it: pure, and apart from any engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sgl_apr.errors import TraceError
from sgl_apr.formats.completion import PLACEHOLDER
from sgl_apr.formats.dialects import BranchNumbering, Dialect, Phase
from sgl_apr.formats.segmenter import Outline, Segment
from sgl_apr.runtime.budget import Overhead
from sgl_apr.tokenizer import Tokenizer, split_ids
from sgl_apr.trajectory.spans import Finish, Origin, Role

FAILURE_NOTE = " (failed)"  # what the model reads in place of what a failed branch would have written


@dataclass(frozen=True, slots=True)
class SpanDraft:
    """A span before it has a place in the graph."""

    role: Role
    origin: Origin
    text: str
    token_ids: tuple[int, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class PhaseOutput:
    """A finished phase: its pieces, how it ended, and what follows from it.

    `forked` says that it forks, into `outlines` if the format has them; `wait` is the number that the
    trunk waits for ("" where a format waits for all), None if it does not. With neither, it is over.
    """

    pieces: tuple[SpanDraft, ...]
    finish: Finish
    forked: bool = False
    outlines: tuple[Outline, ...] = ()
    wait: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All ids, decoded and injected, in order."""
        return tuple(i for piece in self.pieces for i in piece.token_ids)

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return not self.forked and self.wait is None


def parse_phase_output(
    dialect: Dialect,
    phase: Phase,
    place: BranchNumbering,
    context: tuple[int, ...],
    decoded: tuple[int, ...],
    cut: Finish | None,
    tokenizer: Tokenizer,
) -> PhaseOutput:
    """Read what `phase` decoded behind `context`, and close by injection what was left open.

    `cut` says what ended it from outside: a limit, another branch, or a failure, which is noted in the
    text. Ids are only ever split, never encoded again; a trailing end-of-text id is dropped, because
    whatever comes next writes its own. Text that leaves the dialect (possible only without the grammar)
    becomes one `malformed` piece.
    """
    ended = bool(decoded) and decoded[-1] in tokenizer.eos_ids
    ids = decoded[:-1] if ended else decoded
    text = tokenizer.decode(ids, context)
    in_branch = phase in ("branch", "rejoin")
    closing, found = "", (None if cut == "failed" else _whole(dialect, phase, place, text))
    itself = found is not None
    for note in (FAILURE_NOTE, "") if cut == "failed" else ("",):
        if found is None:
            closing = note + (dialect.completion(phase, text + note, place) or "")
            found = _whole(dialect, phase, place, text + closing)
    if found is None:
        return PhaseOutput((SpanDraft("body" if in_branch else "text", "decoded", text, ids),), "malformed")
    fork = next((s for s in found if s.role == "fork"), None)
    wait = next((s.number for s in found if s.role == "wait"), None)
    closes = bool(found) and found[-1].role in ("fork", "wait", "closer")
    # It closed itself, whichever token the engine ended on; where nothing closes a branch, its end does.
    ends = closes or (in_branch and ended and not dialect.grammar.closing_literal("body", "1"))
    finish: Finish = "stop" if itself and ends else cut or ("eos" if ended else "stop")
    pieces = tuple(_pieces(found, text, ids, closing, tokenizer))
    return PhaseOutput(pieces, finish, fork is not None, fork.outlines if fork else (), wait)


def _whole(dialect: Dialect, phase: Phase, place: BranchNumbering, text: str) -> list[Segment] | None:
    try:
        return dialect.segments(phase, text, place)
    except TraceError:
        return None


def _pieces(
    found: list[Segment], text: str, ids: tuple[int, ...], closing: str, tokenizer: Tokenizer
) -> list[SpanDraft]:
    """Segments with their ids; a segment that decoding left unfinished becomes a decoded and an injected piece."""
    cuts: list[tuple[Segment, int, int]] = []
    for segment in found:
        if segment.start < len(text) < segment.end:
            cuts += [(segment, segment.start, len(text)), (segment, len(text), segment.end)]
        else:
            cuts.append((segment, segment.start, segment.end))
    full = text + closing
    decoded = [(s, a, b) for s, a, b in cuts if b <= len(text)]
    injected = [(s, a, b) for s, a, b in cuts if b > len(text)]
    split = split_ids(ids, text, [b for _, _, b in decoded], tokenizer) if decoded else iter(())
    pieces = [
        SpanDraft(s.role, "decoded", full[a:b], token_ids, s.label)
        for (s, a, b), token_ids in zip(decoded, split, strict=True)
    ]
    return pieces + [
        SpanDraft(s.role, "injected", full[a:b], tuple(tokenizer.encode(full[a:b])), s.label)
        for s, a, b in injected
    ]


@lru_cache(maxsize=256)
def closing_overhead(dialect: Dialect, tokenizer: Tokenizer) -> Overhead:
    """What the runtime may have to inject, in tokens of this tokenizer, at the most."""

    def cost(text: str | None) -> int:
        return len(tokenizer.encode(text or ""))

    grammar = dialect.grammar
    number = str(dialect.first_number + dialect.max_width - 1)
    deepest = ".".join([number] * dialect.max_depth)
    place = BranchNumbering(prefix=deepest[: -len(number)], number="" if grammar.repeats("fork") else number)
    openings = [grammar.opening_literal(rule) for rule in ("fork", "wait")]
    nests = "rejoin" in grammar.rules
    returned = ""
    if (
        dialect.branch_context == "message"
    ):  # which is told something, and whose result may name what was asked
        name = "0" * grammar.longest_name("result")
        returned = PLACEHOLDER + grammar.render_rule("result", deepest, PLACEHOLDER, name)
    return Overhead(
        fork=max(cost(dialect.completion("trunk", o, place)) + cost(o) for o in openings)
        if "trunk" in grammar.rules
        else 0,
        branch=cost(
            grammar.render_rule("header", deepest, PLACEHOLDER) if dialect.branch_context == "prefix" else ""
        )
        + cost(dialect.completion("branch", "", place))
        + cost(FAILURE_NOTE)
        + cost(returned)
        + cost(grammar.closing_literal("wait", number)),
        join=cost(grammar.render_rule("lead"))
        + cost(grammar.render_rule("tail"))
        + cost(dialect.completion("after", "", place))
        + max(cost(dialect.completion("after", tag, place)) for tag in ("", *grammar.tag_literals))
        + (cost(dialect.completion("rejoin", "", place)) if nests else 0),
    )
