"""A demonstration: a message of a user, and a reply in the ThreadWeaver format or without a fork."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_apr.formats.dialects import dialect

DIALECT = "threadweaver"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A message and the reply to it.

    Attributes:
        kind: Which generator made it.
        template: The wording of the message, which belongs to one split.
        topics: What it is about.
        message: The message.
        reply: The reply, with its fork if the message has several parts.
        answers: One for each part; empty where nothing can be verified.
        is_multi_part: Whether the message has parts that do not need one another, so that the reply forks.
        is_complete: Whether the reply ends here, instead of having been cut.
    """

    kind: str
    template: str
    topics: tuple[str, ...]
    message: str
    reply: str
    answers: tuple[str, ...]
    is_multi_part: bool
    is_complete: bool = True


def fork_reply(parts: Sequence[tuple[str, str]], answer: str) -> str:
    """A reply that forks once.

    Args:
        parts: For each branch its outline and its text.
        answer: The text after the join.

    Examples:
        >>> print(fork_reply([("1 + 1", "1 + 1 = 2."), ("2 + 2", "2 + 2 = 4.")], "2 and 4"))
        <Parallel>
        <Outlines>
        <Outline>1: 1 + 1</Outline>
        <Outline>2: 2 + 2</Outline>
        </Outlines>
        <Thread>
        1: 1 + 1 = 2.</Thread><Thread>
        2: 2 + 2 = 4.</Thread>
        </Parallel>
        2 and 4
    """
    grammar = dialect(DIALECT).grammar
    outlines = "".join(f"<Outline>{k}: {outline}</Outline>\n" for k, (outline, _) in enumerate(parts, 1))
    threads = "".join(
        f"{grammar.render_rule('header', str(k))} {text}{grammar.closing_literal('body', str(k))}"
        for k, (_, text) in enumerate(parts, 1)
    )
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{threads}\n</Parallel>\n{answer}"


def numbered(lines: Sequence[str]) -> str:
    """Numbered lines.

    Examples:
        >>> numbered(["Paris", "7"])
        '1. Paris\\n2. 7'
    """
    return "\n".join(f"{k}. {line}" for k, line in enumerate(lines, 1))


def enumeration(words: Sequence[str], conjunction: str = "and") -> str:
    """Words as a sentence lists them.

    Examples:
        >>> enumeration(["a", "b", "c"])
        'a, b and c'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"
