"""A trajectory written in another dialect, as far as that can express it; nothing is run and nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sgl_apr.errors import ConversionError, TraceError
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.grammar import TEXT, Grammar
from sgl_apr.formats.lark_ast import Alt, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Path
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass
class BlockDraft:
    """A block apart from any format. `results` are the messages that came back."""

    outlines: list[str] = field(default_factory=list)
    branches: list[list[str | BlockDraft]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    conclusion: str = ""


def convert(trajectory: Trajectory, to: Dialect | str, tokenizer: Tokenizer | None = None) -> Trajectory:
    """The same text, blocks, outlines, branches and conclusions, in the format of `to`.

    Raises `ConversionError` where `to` has no place for something (nesting, a conclusion, outlines), wants
    something that is not there, or lets its branches see something else. What was decoded is not told from
    what was injected, and there are token ids only with a `tokenizer`: a converted reply was never sampled.
    """
    target = dialect(to) if isinstance(to, str) else to
    where = f"{trajectory.dialect} to {target.name}"
    roles = {span.role for span in trajectory.reply_spans}
    kept = trajectory.dialect == target.name
    asynchronous, sees = "wait" in roles, "message" if "result" in roles else "prefix"
    if (
        trajectory.blocks
        and not kept
        and (asynchronous or target.asynchronous or sees != target.branch_context)
    ):
        raise ConversionError(f"{where}: their branches see something else, or join at another time")
    try:
        text = trajectory.text if kept else write(_read(trajectory, ()), target)
        made = target.parse(text, tokenizer)
    except (TraceError, ConversionError) as error:
        raise ConversionError(f"{where}: {error}") from None
    if _structure(made) != _structure(trajectory):
        raise ConversionError(f"{where}: the text holds what {target.name} takes for tags")
    prompts = [s for s in trajectory.spans if s.origin == "prompt"]
    return made.with_prompt(trajectory.prompt, prompts[0].token_ids) if prompts else made


def write(items: Sequence[str | BlockDraft], to: Dialect) -> str:
    """Texts and blocks as a reply in a dialect; raises `ConversionError` for what it has no place for."""
    return _Writer(to).sequence(items, "", 0)


def _structure(trajectory: Trajectory) -> list[object]:
    return [
        (block.path, block.conclusion, [(b.path, b.outline, b.result) for b in block.branches])
        for block in trajectory.blocks
    ]


def _read(trajectory: Trajectory, path: Path) -> list[str | BlockDraft]:
    """Texts and blocks of one sequence, in order."""
    views = {block.path: block for block in trajectory.blocks}
    items: list[str | BlockDraft] = []
    ended = 0
    for span in trajectory.reply_spans:
        if span.path == path and span.role in ("text", "body"):
            items.append(span.text)
        elif span.path == path and span.role == "tail":
            ended += 1
            view = views[(*path, ended)]
            items.append(
                BlockDraft(
                    outlines=[b.outline for b in view.branches],
                    branches=[_read(trajectory, b.path) for b in view.branches],
                    results=[b.result for b in view.branches],
                    conclusion=view.conclusion,
                )
            )
    return items


class _Writer:
    """Writes what was read by the rules of one dialect."""

    def __init__(self, target: Dialect) -> None:
        self.target, self.grammar = target, target.grammar

    def sequence(self, items: Sequence[str | BlockDraft], prefix: str, depth: int) -> str:
        return "".join(i if isinstance(i, str) else self.block(i, prefix, depth) for i in items)

    def block(self, block: BlockDraft, prefix: str, depth: int) -> str:
        target, grammar = self.target, self.grammar
        if depth >= target.max_depth:
            raise ConversionError(f"{target.name} nests at most {target.max_depth} deep")
        outlined = any(block.outlines)
        if outlined and "outline" not in grammar.rules:
            raise ConversionError(f"{target.name} has no outlines, and {block.outlines[0]!r} would be lost")
        if "outline" in grammar.rules and not all(block.outlines):
            raise ConversionError(f"{target.name} wants an outline for each branch")
        concluded, wanted = conclusion_support(grammar)
        if block.conclusion and not concluded:
            raise ConversionError(f"{target.name} has no conclusions, and {block.conclusion!r} would be lost")
        if wanted and not block.conclusion:
            raise ConversionError(f"{target.name} wants a conclusion behind every block")
        numbers = [f"{prefix}{target.first_number + k}" for k in range(len(block.branches))]
        outlines = [
            (n, self.with_whitespace("outline", o)) for n, o in zip(numbers, block.outlines, strict=True)
        ]
        if target.branch_context == "message":
            middle = "".join(
                grammar.render_rule("failure" if not r and "failure" in grammar.rules else "result", n, r, o)
                for n, r, o in zip(numbers, block.results, block.outlines, strict=True)
            )
        else:
            middle = "".join(
                grammar.render_rule("header", n)
                + self.sequence(branch, f"{n}.", depth + 1)
                + grammar.closing_literal("body", n)
                for n, branch in zip(numbers, block.branches, strict=True)
            )
        return (
            grammar.render_rule("fork", each=outlines)
            + grammar.render_rule("lead")
            + middle
            + grammar.render_rule("tail")
            + grammar.render_rule("close", text=self.with_whitespace("close", block.conclusion))
        )

    def with_whitespace(self, rule: str, text: str) -> str:
        """Text as formats set it: behind a line break it ends with one, behind a number it begins with a blank."""
        if rule == "close":
            tail = self.grammar.render_rule("tail")
            own_line = (
                text
                and tail.endswith("\n")
                and self.grammar.opening_literal("close") == ""
                and _bare(self.grammar)
            )
            return f"{text}\n" if own_line else text
        expr = self.grammar.rules.get(rule)
        items = expr.items if isinstance(expr, SequenceExpr) else ()
        if TEXT not in [i.name for i in items if isinstance(i, SymbolRef)]:
            return text
        return f" {text}\n" if len(items) > 1 and self.grammar.is_break(items[1]) else f" {text}"


def _bare(grammar: Grammar) -> bool:
    """Whether a conclusion begins where the tail ends."""
    close = grammar.rules.get("close")
    return isinstance(close, SequenceExpr) and close.items[0] == SymbolRef(TEXT)


def conclusion_support(grammar: Grammar) -> tuple[bool, bool]:
    """Whether a block can have a conclusion, and whether it has to."""

    def find(expr: object, optional: bool) -> tuple[bool, bool]:
        match expr:
            case SymbolRef(name) if name == TEXT:
                return True, not optional
            case SymbolRef(name) if name in grammar.rules:
                return find(grammar.rules[name], optional)
            case Repeat(item, low):
                return find(item, optional or not low)
            case SequenceExpr(items) | Alt(items):
                found = [find(i, optional or isinstance(expr, Alt)) for i in items]
                return any(f[0] for f in found), any(f[1] for f in found)
            case _:
                return False, False

    return find(grammar.rules.get("close", StringLiteral("")), False)
