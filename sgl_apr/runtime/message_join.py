"""The join by message: the prompt of a branch, and what it returns to the sequence that forked it."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_apr.formats.branch_prompts import branch_prompt
from sgl_apr.formats.completion import PLACEHOLDER
from sgl_apr.formats.dialects import Dialect
from sgl_apr.runtime.phase_output import FAILURE_NOTE
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.tokenizer import Tokenizer


def make_branch_prompt(dialect: Dialect, sequence: SequenceState, outline: str, max_tokens: int) -> str:
    """The prompt of a branch with a context of its own, cut to `max_tokens`."""
    tokenizer = sequence.graph.tokenizer
    text = branch_prompt(dialect.branch_prompt).make_prompt(tokenizer.decode(sequence.context), outline)
    return truncate_tokens(tokenizer, text, max_tokens) or PLACEHOLDER


def truncate_tokens(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    """`text`, or its first `max_tokens` tokens."""
    ids = tokenizer.encode(text)
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens])


def write_results(
    dialect: Dialect, sequence: SequenceState, branches: Sequence[SequenceState], max_tokens: int
) -> int:
    """Write what branches returned into the sequence that forked them.

    Args:
        dialect: The format of the results.
        sequence: The sequence that continues after them.
        branches: Branches that have ended. Each result waits for its own branch.
        max_tokens: Tokens that one result may have.

    Returns:
        The number of new tokens.
    """
    grammar, before = dialect.grammar, len(sequence.context)
    sequence.inject("lead", grammar.render_rule("lead"))
    for branch in branches:
        identity, result = branch.identity, _result(dialect, branch, max_tokens)
        rule = "failure" if not result and "failure" in grammar.rules else "result"
        text = grammar.render_rule(rule, identity.number, result, identity.outline)
        sequence.inject("result", text, result.strip(), result_of=identity, waits_for=branch.frontier)
    sequence.inject("tail", grammar.render_rule("tail"))
    return len(sequence.context) - before


def _result(dialect: Dialect, branch: SequenceState, max_tokens: int) -> str:
    """What a branch returns. Empty if it was cut before it had written a result."""
    grammar, tokenizer = dialect.grammar, branch.graph.tokenizer
    if branch.finish == "failed" and "failure" not in grammar.rules:
        return truncate_tokens(tokenizer, FAILURE_NOTE, max_tokens)
    spans = [s for s in branch.spans if s.path == branch.path]
    closers = [s for s in spans if s.role == "closer"]
    if grammar.closing_literal("body", branch.identity.number):
        text = closers[0].label if closers and all(s.origin == "decoded" for s in closers) else ""
    else:
        body = "".join(s.text for s in spans if s.role == "body" and s.origin == "decoded")
        text = branch_prompt(dialect.branch_prompt).extract_result(body)
    text = truncate_tokens(tokenizer, text, max_tokens)
    return text if not any(tag in text for tag in grammar.tag_literals) else ""
