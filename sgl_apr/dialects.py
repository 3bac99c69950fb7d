"""Dialects: a grammar file plus the few facts it cannot say; no tag is spelled here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from sgl_apr import parse
from sgl_apr.errors import GrammarError, TraceError
from sgl_apr.grammar import Grammar, grammar_path
from sgl_apr.lowering import Shape, lower
from sgl_apr.parse import Segment
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory import Trajectory

# Where decoding was cut, each of these rules is tried as the whole of what that phase wrote.
_WHOLE = {"trunk": ("trunk",), "body": ("body",), "after": ("close", "after")}


@dataclass(frozen=True)
class Dialect:
    """One trajectory format.

    Rules with a meaning to the runtime: `trace` is a whole reply; `trunk`, `body` and `after` are the
    phases, what one request decodes; `lead`, `header` and `tail` are what the runtime writes before the
    branches, before each, and after them; `fork` holds the numbered `outline`s; `close` ends a block.
    """

    name: str
    source: str
    max_width: int = 50
    max_depth: int = 1
    joins: frozenset[str] = frozenset({"text"})

    @classmethod
    def from_file(cls, path: str | Path, **facts: int | frozenset[str]) -> Dialect:
        """A dialect of your own from a .lark file; its name is the file's."""
        path = Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise GrammarError(f"cannot read the grammar {path}: {error.strerror}") from None
        return cls(name=path.stem, source=source, **facts)  # type: ignore[arg-type]

    @cached_property
    def grammar(self) -> Grammar:
        """The file as rules; raises `GrammarError` if it leaves the shared subset."""
        return Grammar(self.source, f"{self.name}.lark")

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag of the grammar."""
        return self.grammar.tags

    def parse(self, text: str, tokenizer: Tokenizer | None = None) -> Trajectory:
        """A finished reply as a trajectory; raises `TraceError`. With a tokenizer it has token ids."""
        found = parse.segments(self.grammar, "trace", text, self.max_width)
        return parse.trajectory(found, text, self.name, tokenizer)

    def render(self, trajectory: Trajectory) -> str:
        """The text of a trajectory: `render(parse(x)) == x`."""
        return trajectory.text

    def validate(self, text: str) -> None:
        """Raise `TraceError` if `text` is not a whole, rightly numbered reply of this dialect."""
        parse.segments(self.grammar, "trace", text, self.max_width)

    def is_valid(self, text: str) -> bool:
        """Whether `validate` passes."""
        try:
            self.validate(text)
        except TraceError:
            return False
        return True

    def llguidance(self, phase: str, tokenizer: Tokenizer, **shape: Any) -> str:
        """The mask of one phase, as text for a server that runs llguidance.

        `shape` are the fields of `sgl_apr.lowering.Shape` (width, fork, ...).
        """
        wanted = Shape(**shape)
        if not 1 <= wanted.min_width <= wanted.width <= self.max_width:
            raise GrammarError(
                f"{self.name}: width {wanted.min_width} to {wanted.width}, expected within 1 to {self.max_width}"
            )
        return _lowered(self, phase, tokenizer, wanted)

    def stop(self, phase: str) -> str:
        """The tag behind which decoding of a phase stops: the end of a branch, else of a fork's header."""
        return self.grammar.last_tag("body" if phase == "body" else "fork")

    def segments(self, phase: str, text: str) -> list[Segment]:
        """What a finished phase wrote, cut by role; raises `TraceError`."""
        *rules, last = _WHOLE[phase]
        for rule in rules:
            try:
                return parse.segments(self.grammar, rule, text, self.max_width)
            except TraceError:
                continue
        return parse.segments(self.grammar, last, text, self.max_width)

    def completion(self, phase: str, text: str) -> str | None:
        """What closes a phase that was cut off, or None if `text` is beyond repair."""
        options = (parse.completion(self.grammar, rule, text) for rule in _WHOLE[phase])
        return next((o for o in options if o is not None), None)


@lru_cache(maxsize=256)
def _lowered(dialect: Dialect, phase: str, tokenizer: Tokenizer, shape: Shape) -> str:
    return lower(dialect.grammar, phase, tokenizer, shape)


@lru_cache
def dialect(name: str) -> Dialect:
    """A built-in dialect by name; raises `GrammarError` that lists the names."""
    path = grammar_path(name)
    if not path.exists():
        raise GrammarError(f"no dialect {name!r}, expected one of {', '.join(dialect_names())}")
    return Dialect.from_file(path)


def dialect_names() -> list[str]:
    """The names of all built-in dialects."""
    return sorted(p.stem for p in grammar_path("any").parent.glob("*.lark"))
