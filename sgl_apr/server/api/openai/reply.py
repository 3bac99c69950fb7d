"""Splits the text of a trajectory into the answer and the reasoning before it, as OpenAI's API has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgl_apr.trajectory.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class ReplyText:
    """The texts of one choice of a response.

    Attributes:
        content: The answer, or the complete text if the reasoning is not separate. It ends before a stop string.
        reasoning: What comes before the answer: plans, branches, joins, and texts between them. Empty if there is none.
        stop: The stop string that the answer contained, before which the content ends. None if it had none.
    """

    content: str
    reasoning: str = ""
    stop: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the content."""
        return self.stop is not None


def split_reply(trajectory: Trajectory, *, separate_reasoning: bool, stop: Sequence[str] = ()) -> ReplyText:
    """Split the text of a trajectory.

    `reasoning + content` is the text of the trajectory, up to a stop string.

    Args:
        trajectory: The trajectory.
        separate_reasoning: Whether the content is the answer alone. Otherwise it is the complete text.
        stop: Texts before which the content ends. Only the answer is searched for them.
    """
    text = trajectory.text
    start = answer_start(trajectory)
    position = find_stop(text[start:], stop)
    end = len(text) if position is None else start + position
    if not separate_reasoning:
        start = 0
    found = None if position is None else next(s for s in stop if text.startswith(s, end))
    return ReplyText(text[start:end], text[:start], found)


def answer_start(trajectory: Trajectory) -> int:
    """Return where the answer begins in `Trajectory.text`: after the last join and the white space that follows it.

    A reply without a fork and without a call of a tool is an answer from its first character.
    """
    if all(span.role == "text" and not span.path for span in trajectory.reply_spans):
        return 0
    return len(trajectory.text) - len(trajectory.answer)


def answer_tokens(trajectory: Trajectory) -> int:
    """Return how many tokens the answer has. Those of its leading white space count."""
    tokens = 0
    for span in reversed(trajectory.reply):
        if span.role != "text" or span.path:
            break
        tokens += span.tokens
    return tokens


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins in a text, or None if there is none."""
    positions = [position for s in stop if (position := text.find(s)) >= 0]
    return min(positions, default=None)


def stop_prefix_chars(text: str, stop: Sequence[str]) -> int:
    """Return how many of the last characters of a text may be the beginning of a stop string."""
    longest = 0
    for s in stop:
        for size in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:size]):
                longest = size
                break
    return longest
