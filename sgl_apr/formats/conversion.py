"""Conversion of a trajectory to another dialect. Whatever the target cannot express is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sgl_apr.errors import ConversionError, TraceError
from sgl_apr.formats.dialects import Dialect, dialect
from sgl_apr.formats.grammar import TEXT, Grammar
from sgl_apr.formats.lark_ast import Alt, Repeat, SequenceExpr, StringLiteral, SymbolRef
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Path, Span
from sgl_apr.trajectory.trajectory import Trajectory


@dataclass
class BlockDraft:
    """A block without a format.

    Attributes:
        outlines: The outline of each branch, empty where it has none.
        branches: The texts and blocks of each branch, in order.
        results: The message that each branch returned, empty where branches join otherwise.
        conclusion: The conclusion of the block, empty if it has none.
    """

    outlines: list[str] = field(default_factory=list)
    branches: list[list[str | BlockDraft]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    conclusion: str = ""


def convert(trajectory: Trajectory, to: Dialect | str, tokenizer: Tokenizer | None = None) -> Trajectory:
    """Convert a trajectory to another dialect, with the same text, blocks, outlines, branches and conclusions.

    A converted reply was never sampled, so all of its spans count as decoded.

    Args:
        trajectory: The trajectory.
        to: The target dialect, or its name.
        tokenizer: Adds token ids to the result.

    Raises:
        ConversionError: The target cannot express something (nesting, a conclusion, outlines), requires something
            that the trajectory does not have, or conditions its branches on something else. Or the trajectory is
            something else. Or a model called tools in it: their results, which it did not write, would count as
            decoded.
        GrammarError: There is no such dialect.
    """
    if not isinstance(trajectory, Trajectory):
        found = type(trajectory).__name__
        raise ConversionError(
            f"the trajectory is of type {found}, expected a Trajectory such as read(text).trajectory"
        )
    target = to if isinstance(to, Dialect) else dialect(to)
    where = f"{trajectory.dialect} to {target.name}"
    roles = {span.role for span in trajectory.reply_spans}
    same_dialect = trajectory.dialect == target.name
    if "call" in roles or "observation" in roles:
        raise ConversionError(
            f"{where}: the trajectory has calls of tools, whose results would count as text of the model"
        )
    asynchronous, branch_context = "wait" in roles, "message" if "result" in roles else "prefix"
    if (
        trajectory.blocks
        and not same_dialect
        and (asynchronous or target.asynchronous or branch_context != target.branch_context)
    ):
        raise ConversionError(f"{where}: their branches see different contexts, or join at different times")
    try:
        text = trajectory.text if same_dialect else render_blocks(_drafts_of(trajectory), target)
        converted = target.parse(text, tokenizer)
    except (TraceError, ConversionError) as error:
        raise ConversionError(f"{where}: {error}") from None
    if _summarize_blocks(converted) != _summarize_blocks(trajectory):
        raise ConversionError(f"{where}: the text contains tags of {target.name}")
    prompts = [s for s in trajectory.spans if s.origin == "prompt"]
    return converted.with_prompt(trajectory.prompt, prompts[0].token_ids) if prompts else converted


def render_blocks(items: Sequence[str | BlockDraft], to: Dialect) -> str:
    """Write texts and blocks as a reply in a dialect.

    Raises:
        ConversionError: The dialect cannot express something.
    """
    return _Writer(to).sequence(items, "", 0)


def _summarize_blocks(trajectory: Trajectory) -> list[object]:
    return [
        (block.path, block.conclusion, [(b.path, b.outline, b.result) for b in block.branches])
        for block in trajectory.blocks
    ]


def _drafts_of(trajectory: Trajectory) -> list[str | BlockDraft]:
    """The texts and blocks of a reply, in order."""
    by_path = {block.path: block for block in trajectory.blocks}
    spans_by_path: dict[Path, list[Span]] = {}
    for span in trajectory.reply_spans:
        spans_by_path.setdefault(span.path, []).append(span)

    def drafts(path: Path) -> list[str | BlockDraft]:
        items: list[str | BlockDraft] = []
        ended = 0
        for span in spans_by_path.get(path, ()):
            if span.role in ("text", "body"):
                items.append(span.text)
            elif span.role == "tail":
                ended += 1
                block = by_path.get((*path, ended))
                if block is None:
                    raise ConversionError(f"block {ended} of {path or 'the trunk'} has no branches")
                items.append(
                    BlockDraft(
                        outlines=[b.outline for b in block.branches],
                        branches=[drafts(b.path) for b in block.branches],
                        results=[b.result for b in block.branches],
                        conclusion=block.conclusion,
                    )
                )
        return items

    return drafts(())


class _Writer:
    """Writes texts and blocks by the rules of one dialect."""

    def __init__(self, target: Dialect) -> None:
        self.target, self.grammar = target, target.grammar

    def sequence(self, items: Sequence[str | BlockDraft], prefix: str, depth: int) -> str:
        return "".join(i if isinstance(i, str) else self.block(i, prefix, depth) for i in items)

    def block(self, block: BlockDraft, prefix: str, depth: int) -> str:
        target, grammar = self.target, self.grammar
        if depth >= target.max_depth:
            raise ConversionError(f"{target.name} nests at most {target.max_depth} deep")
        if any(block.outlines) and "outline" not in grammar.rules:
            raise ConversionError(f"{target.name} has no outlines, so {block.outlines[0]!r} would be lost")
        if "outline" in grammar.rules and not all(block.outlines):
            raise ConversionError(f"{target.name} requires an outline for each branch")
        can_conclude, must_conclude = conclusion_support(grammar)
        if block.conclusion and not can_conclude:
            raise ConversionError(f"{target.name} has no conclusions, so {block.conclusion!r} would be lost")
        if must_conclude and not block.conclusion:
            raise ConversionError(f"{target.name} requires a conclusion after every block")
        numbers = [f"{prefix}{target.first_number + k}" for k in range(len(block.branches))]
        outlines = [
            (n, self.with_whitespace("outline", o)) for n, o in zip(numbers, block.outlines, strict=True)
        ]
        if target.branch_context == "message":
            branches = "".join(
                grammar.render_rule("failure" if not r and "failure" in grammar.rules else "result", n, r, o)
                for n, r, o in zip(numbers, block.results, block.outlines, strict=True)
            )
        else:
            branches = "".join(
                grammar.render_rule("header", n)
                + self.sequence(branch, f"{n}.", depth + 1)
                + grammar.closing_literal("body", n)
                for n, branch in zip(numbers, block.branches, strict=True)
            )
        return (
            grammar.render_rule("fork", each=outlines)
            + grammar.render_rule("lead")
            + branches
            + grammar.render_rule("tail")
            + grammar.render_rule("close", text=self.with_whitespace("close", block.conclusion))
        )

    def with_whitespace(self, rule: str, text: str) -> str:
        """Add the white space that is customary: a text after a line break ends with one, one after a number begins with a space."""
        if rule == "close":
            tail = self.grammar.render_rule("tail")
            own_line = (
                text
                and tail.endswith("\n")
                and self.grammar.opening_literal("close") == ""
                and _begins_with_text(self.grammar)
            )
            return f"{text}\n" if own_line else text
        expr = self.grammar.rules.get(rule)
        items = expr.items if isinstance(expr, SequenceExpr) else ()
        if TEXT not in [i.name for i in items if isinstance(i, SymbolRef)]:
            return text
        return f" {text}\n" if len(items) > 1 and self.grammar.is_line_break(items[1]) else f" {text}"


def _begins_with_text(grammar: Grammar) -> bool:
    """Whether the text of a conclusion begins right after the tail."""
    close = grammar.rules.get("close")
    return isinstance(close, SequenceExpr) and close.items[0] == SymbolRef(TEXT)


def conclusion_support(grammar: Grammar) -> tuple[bool, bool]:
    """Return whether a block of a grammar can have a conclusion, and whether it must have one."""

    visited: set[tuple[str, bool]] = set()  # a rule can refer to itself

    def find(expr: object, optional: bool) -> tuple[bool, bool]:
        match expr:
            case SymbolRef(name) if name == TEXT:
                return True, not optional
            case SymbolRef(name) if name in grammar.rules and (name, optional) not in visited:
                visited.add((name, optional))
                return find(grammar.rules[name], optional)
            case Repeat(item, min_count):
                return find(item, optional or not min_count)
            case SequenceExpr(items) | Alt(items):
                results = [find(i, optional or isinstance(expr, Alt)) for i in items]
                return any(can for can, _ in results), any(must for _, must in results)
            case _:
                return False, False

    return find(grammar.rules.get("close", StringLiteral("")), False)
