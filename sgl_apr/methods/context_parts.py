"""Answers a question about a long text part by part: sub-calls read the parts, and what they note is read in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgl_apr.methods.prompt import Completion, Prompt
from sgl_apr.methods.session import MethodSession
from sgl_apr.methods.task import ProgramTask
from sgl_apr.tokenizer import Tokenizer

READ_PART = """Part {number} of {count} of a text:

{part}

Somebody will answer this question about the complete text: {question}
Write down in short all that this part says about it."""
ANSWER = """{text}

{question}"""
NOTES = "What was noted about the parts of a text, in order:\n\n{notes}"


async def answer_by_parts(
    session: MethodSession,
    task: ProgramTask[Any],
    question: str,
    text: str,
    *,
    part_tokens: int,
    reply_tokens: int,
) -> Completion:
    """The completion that answers a question about a text, of which no prompt holds more than a part.

    Sub-calls read the parts in parallel, each in a context of its own, and note what theirs says about the question. If
    the notes are longer than a part, they are read in the same way, as long as they become shorter.

    Args:
        session: What decodes.
        task: Makes chat turns.
        question: The question.
        text: The text.
        part_tokens: Tokens of a part, at most.
        reply_tokens: Tokens of a note, and of the answer, at most.
    """
    tokenizer = session.requests.tokenizer
    parts, read = split_text(text, part_tokens, tokenizer), list[Completion]()
    while len(parts) > 1:
        prompts = [
            _prompt(
                task,
                READ_PART.format(number=k, count=len(parts), part=part, question=question),
                reply_tokens,
                read,
            )
            for k, part in enumerate(parts, 1)
        ]
        read = await session.sample_independent(prompts, share=1 - session.budget.reserve)
        notes = "\n".join(f"{k}: {note.text.strip()}" for k, note in enumerate(read, 1) if note.text.strip())
        text = NOTES.format(notes=notes)
        shorter = split_text(text, part_tokens, tokenizer)
        if len(shorter) >= len(parts):  # notes as long as what they are about: the first ones have to do
            shorter = shorter[:1]
        parts = shorter
    prompt = _prompt(
        task, ANSWER.format(text=parts[0] if parts else "", question=question), reply_tokens, read
    )
    (answer,) = await session.sample_independent([prompt])
    return answer


def _prompt(task: ProgramTask[Any], message: str, tokens: int, depends_on: Sequence[Completion]) -> Prompt:
    return Prompt(task.chat_turn(message), tokens, quoted=(message,), depends_on=tuple(depends_on))


def split_text(text: str, tokens: int, tokenizer: Tokenizer) -> list[str]:
    """Split a text between lines into parts of at most so many tokens; a line that is longer is split within.

    Examples:
        >>> from sgl_apr import ByteTokenizer
        >>> split_text("one\\ntwo\\nthree", 8, ByteTokenizer())
        ['one\\ntwo\\n', 'three']
    """
    parts, size = list[str](), 0
    for line in text.splitlines(keepends=True):
        ids = tokenizer.encode(line)
        for start in range(0, len(ids), tokens):
            piece = ids[start : start + tokens]
            shown = line if len(ids) <= tokens else tokenizer.decode(piece)
            if parts and size + len(piece) <= tokens:
                parts[-1] += shown
                size += len(piece)
            else:
                parts.append(shown)
                size = len(piece)
    return parts
