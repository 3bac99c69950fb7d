"""The spans of text without a dialect, which may end with calls of tools."""

from __future__ import annotations

from sgl_apr.formats.token_split import split_token_ids
from sgl_apr.formats.tool_syntax import ToolSyntax
from sgl_apr.runtime.phase_output import PhaseOutput, SpanDraft
from sgl_apr.runtime.sequence import SequenceState
from sgl_apr.runtime.tools.runner import ToolRunner
from sgl_apr.tokenizer import Tokenizer
from sgl_apr.trajectory.spans import Finish, Role


def free_text_output(
    sequence: SequenceState,
    syntax: ToolSyntax | None,
    text: str,
    ids: tuple[int, ...],
    finish: Finish,
    tokenizer: Tokenizer,
) -> PhaseOutput:
    """Return what a request has decoded in a sequence as spans.

    Args:
        sequence: The sequence.
        syntax: How calls of tools are written, None if there can be none.
        text: What was decoded.
        ids: Its token ids.
        finish: How it ended.
        tokenizer: Of the model.
    """
    role: Role = "body" if sequence.path else "text"
    written = syntax.parse(text) if syntax and finish != "failed" else None
    is_cut = finish not in ("stop", "eos")
    if written is None or written.start >= len(text) or not (written.complete or is_cut):
        return PhaseOutput((SpanDraft(role, "decoded", text, ids),), finish)
    ends = [written.start, len(text)] if written.start else [len(text)]
    pieces = list(split_token_ids(ids, text, ends, tokenizer))
    before = [SpanDraft(role, "decoded", text[: written.start], pieces[0])] if written.start else []
    label = " ".join(ToolRunner.call_ids(sequence, len(written.calls) if written.complete else 1))
    call = SpanDraft("call", "decoded", text[written.start :], pieces[-1], label)
    if written.complete:
        return PhaseOutput((*before, call), "stop", calls=written.calls)
    return PhaseOutput((*before, call), finish, cut_call=True)
