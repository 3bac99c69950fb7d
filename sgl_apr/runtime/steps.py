"""What a phase wrote and what follows from it: pure, and apart from any engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_apr.budget import Overhead
from sgl_apr.dialects import Dialect
from sgl_apr.errors import TraceError
from sgl_apr.parse import FILLER, Segment, split_ids
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Finish, Origin, Role

Phase = Literal["trunk", "body", "after"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A span before it has a place in the graph."""

    role: Role
    origin: Origin
    text: str
    token_ids: tuple[int, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """A finished phase: its pieces, how it ended, and the outlines to fork into (none: it is over)."""

    pieces: tuple[Piece, ...]
    finish: Finish
    outlines: tuple[tuple[int, str], ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All ids, decoded and injected, in order."""
        return tuple(i for piece in self.pieces for i in piece.token_ids)


def interpret(
    dialect: Dialect,
    phase: Phase,
    context: tuple[int, ...],
    decoded: tuple[int, ...],
    cut: bool,
    tokenizer: Tokenizer,
) -> Step:
    """Read what `phase` decoded behind `context`, and close by injection what was left open.

    `cut` says that the token limit ended it. Ids are only ever split, never encoded again; a trailing
    end-of-text id is dropped, because whatever comes next writes its own. Text that leaves the
    dialect (possible only without the grammar) becomes one `malformed` piece.
    """
    ended = bool(decoded) and decoded[-1] in tokenizer.eos_ids
    ids = decoded[:-1] if ended else decoded
    text = tokenizer.decode(ids, context)
    finish: Finish = "length" if cut else "eos" if ended else "stop"
    whole = _whole(dialect, phase, text)
    closing = "" if whole is not None else dialect.completion(phase, text) or ""
    found = whole if whole is not None else _whole(dialect, phase, text + closing)
    if found is None:
        return Step((Piece("text" if phase != "body" else "body", "decoded", text, ids),), "malformed")
    outlines = next((s.outlines for s in found if s.role == "fork"), ())
    if whole is not None and (outlines or phase == "body"):
        finish = "stop"  # it closed itself, whichever token the engine ended on
    pieces = tuple(_pieces(found, text, ids, closing, tokenizer))
    return Step(pieces, finish, outlines)


def _whole(dialect: Dialect, phase: Phase, text: str) -> list[Segment] | None:
    try:
        return dialect.segments(phase, text)
    except TraceError:
        return None


def _pieces(
    found: list[Segment], text: str, ids: tuple[int, ...], closing: str, tokenizer: Tokenizer
) -> list[Piece]:
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
        Piece(s.role, "decoded", full[a:b], token_ids, s.label)
        for (s, a, b), token_ids in zip(decoded, split, strict=True)
    ]
    return pieces + [
        Piece(s.role, "injected", full[a:b], tuple(tokenizer.encode(full[a:b])), s.label)
        for s, a, b in injected
    ]


def overhead(dialect: Dialect, tokenizer: Tokenizer) -> Overhead:
    """What the runtime may have to inject, in tokens of this tokenizer, at the most."""

    def cost(text: str | None) -> int:
        return len(tokenizer.encode(text or ""))

    grammar = dialect.grammar
    header = grammar.written("header", dialect.max_width)
    return Overhead(
        fork=max(cost(dialect.completion("trunk", "")), cost(dialect.completion("trunk", FILLER))),
        branch=cost(header) + cost(dialect.completion("body", "")),
        join=cost(grammar.written("lead"))
        + cost(grammar.written("tail"))
        + cost(dialect.completion("after", ""))
        + max(cost(c) for c in _openings(dialect)),
    )


def _openings(dialect: Dialect) -> list[str]:
    """What may have to close an open conclusion: the completion behind every tag of the grammar."""
    return [dialect.completion("after", tag) or "" for tag in dialect.tags]
